"""Routes in buffers that never move, for routers inside captured CUDA graphs, and the capturing itself.

A graph repeats kernels on fixed addresses and no Python: a ReplaySession, which looks up a micro-batch on every call, cannot work
inside of one (replay/sites.py refuses models that capture their routers). What can is a RouteControl whose ids live in one
place: copied in before a graph is launched, or read from after. Suffixes: T rows, K top-k.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from megatron_pr2.replay.router import PredictiveTopKRouter, TopK

R = TypeVar("R")


class StaticRoutes:
    """A RouteControl of one router with a fixed number of rows.

    Attributes:
        ids_TK: expert ids, replayed or recorded.
        missing_T: rows without a route, which the live router decides (replay only).
    """

    def __init__(self, rows: int, topk: int, *, record: bool, device: torch.device) -> None:
        self._record = record
        # Megatron-Core's masks and gathers index with int64; converting inside the graph would cost a kernel per layer.
        self.ids_TK = torch.zeros(rows, topk, dtype=torch.long, device=device)
        self.missing_T = torch.ones(rows, dtype=torch.bool, device=device)

    def set(self, ids_TK: Tensor, missing_T: Tensor) -> None:
        """Routes for the next launch."""
        self.ids_TK.copy_(ids_TK)
        self.missing_T.copy_(missing_T)

    def observe(self, router: PredictiveTopKRouter, hidden: Tensor, logits: Tensor) -> None:
        """Nothing is measured inside a graph."""

    def get_replay_topk(
        self, scores: Tensor, topk: int, num_groups: int | None, group_topk: int | None, default_compute_topk: TopK
    ) -> tuple[Tensor, Tensor]:
        """Megatron-Core's replay hook. All rows are computed live: which of them are missing is known on the device only."""
        chosen, live_TK = default_compute_topk(scores, topk, num_groups, group_topk)
        if self._record:
            self.ids_TK.copy_(live_TK)
            return chosen, live_TK
        ids_TK = torch.where(self.missing_T.unsqueeze(1), live_TK, self.ids_TK)
        return scores.gather(1, ids_TK), ids_TK

    def counted(self, map_TE: Tensor) -> Tensor | None:
        """As a session counts where there is no padding."""
        return map_TE if self._record else None


def captured(work: Callable[[], R], device: torch.device) -> Callable[[], R]:
    """`work` as a captured CUDA graph: each call runs it again and gives the same tensors with new values.

    On a CPU, which has no graphs, a call runs the work itself.
    """
    if device.type != "cuda":
        return work
    # Kernels are chosen, compiled and given their workspaces before the capture, on a stream of their own.
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph: Any = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = work()

    def launch() -> R:
        graph.replay()
        return result

    return launch
