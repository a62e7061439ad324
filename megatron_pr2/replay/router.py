"""PredictiveTopKRouter: Megatron-Core's TopKRouter with an observer on its gate and a replayable selection.

It copies no routing code. Selection goes through Megatron-Core's own hook, `TopKRouter.router_replay.get_replay_topk`; the gate's
input and logits are shown to an observer. Without a session both are absent and the router is a TopKRouter.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Protocol

import torch
from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_pr2.errors import AttachError

TopK = Callable[..., tuple[Tensor, Tensor]]


class RouteControl(Protocol):
    """What a replay session does for one router."""

    def observe(self, router: PredictiveTopKRouter, hidden: Tensor, logits: Tensor) -> None:
        """Sees the gate's input [S, B, H] and logits [S, B, E] before the selection."""

    def get_replay_topk(
        self, scores: Tensor, topk: int, num_groups: int | None, group_topk: int | None, default_compute_topk: TopK
    ) -> tuple[Tensor, Tensor]:
        """Megatron-Core's hook: (scores [T, K], expert ids [T, K]) from dense scores [T, E]."""

    def counted(self, map_TE: Tensor) -> Tensor | None:
        """What of a routing map says how the live router spreads tokens over experts; None where it replays."""


class PredictiveTopKRouter(TopKRouter):
    """A TopKRouter whose routes can be recorded, predicted and replayed.

    Enters a model through the layer spec (`MoESubmodules.router`) or by `attach`, which upgrades routers in place.
    """

    config: TransformerConfig
    # How Megatron says that a module is not sharded; Megatron-Bridge asks it of classes that it does not know by name.
    tensor_model_parallel = False
    _control: RouteControl | None = None
    attached: bool = False  # whether a PR2 handle owns this router

    def set_control(self, control: RouteControl | None) -> None:
        """Binds a session's control to this router, or releases it."""
        self._control = control
        self.router_replay = control

    def gating(self, input: Tensor) -> Tensor:
        """Gate logits [S, B, E] of the router input [S, B, H]; unchanged, but seen by the session."""
        logits = super().gating(input)
        if self._control is not None:
            self._control.observe(self, input, logits)
        return logits

    def routing(self, logits: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Megatron-Core's routing; the unfused path while a session is bound. What else it is given differs between releases.

        Transformer Engine's fused router returns before it looks at the replay object, which would turn replay off silently.
        """
        if self._control is None or not self.config.moe_router_fusion:
            return super().routing(logits, *args, **kwargs)
        fused: TransformerConfig = self.config
        unfused = copy.copy(fused)
        unfused.moe_router_fusion = False
        self.config = unfused
        try:
            return super().routing(logits, *args, **kwargs)
        finally:
            self.config = fused

    def _apply_expert_bias(self, routing_map: Tensor, padding_mask: Tensor | None = None) -> None:
        """Counts tokens per expert, which move expert biases after an update; in a session only real tokens on live routes."""
        if self._control is None:
            super()._apply_expert_bias(routing_map, padding_mask)
        elif self.enable_expert_bias and torch.is_grad_enabled() and (map_TE := self._control.counted(routing_map)) is not None:
            super()._apply_expert_bias(map_TE, None)

    def _maintain_float32_expert_bias(self) -> None:
        """Megatron-Core's, and the counts as well: Float16Module makes them bf16, in which 1097 tokens are 1096 or 1104."""
        super()._maintain_float32_expert_bias()
        if (counts_E := self.local_tokens_per_expert) is not None and counts_E.dtype != torch.float32:
            counts_E.data = counts_E.data.float()


class _Selected(Exception):
    """Carries the selected ids out of Megatron-Core's routing, which would go on to build dense maps that are not needed."""

    def __init__(self, ids: Tensor) -> None:
        super().__init__()
        self.ids = ids


class _Selection:
    """Takes the ids that Megatron-Core's selection arrives at, and leaves."""

    def get_replay_topk(
        self, scores: Tensor, topk: int, num_groups: int | None, group_topk: int | None, default_compute_topk: TopK
    ) -> tuple[Tensor, Tensor]:
        raise _Selected(default_compute_topk(scores, topk, num_groups, group_topk)[1])


@torch.no_grad()
def select_experts(router: TopKRouter, logits_TE: Tensor, expert_bias_E: Tensor | None = None) -> Tensor:
    """Expert ids [T, K] that this router's own selection rule picks from given logits (groups, expert bias included).

    The rule is Megatron-Core's code, left as soon as it has chosen: ties, dtypes and score functions are decided there, and the
    gate weights and [T, E] maps that follow are never made.

    Args:
        logits_TE: in the dtype that the router computes them in: up to 0.17 Megatron-Core rounds scores to it before it selects.
        expert_bias_E: an earlier one, in place of the present one.
    """
    if logits_TE.shape[0] == 0:
        return torch.zeros(0, router.topk, dtype=torch.long, device=logits_TE.device)
    try:
        topk_routing_with_score_function(
            logits_TE,
            router.topk,
            use_pre_softmax=router.config.moe_router_pre_softmax,
            num_groups=router.config.moe_router_num_groups,
            group_topk=router.config.moe_router_group_topk,
            score_function=router.score_function,
            expert_bias=router.expert_bias if expert_bias_E is None else expert_bias_E,
            router_replay=_Selection(),
        )
    except _Selected as selected:
        return selected.ids
    raise AttachError(
        "topk_routing_with_score_function() did not ask router_replay for its experts: this release of Megatron-Core routes "
        "otherwise than those that selection and replay rely on"
    )
