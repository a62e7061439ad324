"""Prediction by looking ahead: what the policy's next updates will do to the routers, distilled into W_p.

Routers move mostly because their inputs do: knowing how the gate moves is not enough. So the model runs twice over a sample of the
last batch's tokens with their routes, under theta and under theta + c u (prediction.ahead_weights), and what the logits did is
regressed on the router inputs:

    y_t   = p(theta + c u)_t - p(theta)_t - c U h_t          what the gate's own update U does not explain
    W_p   = m (U + ridge(y on h) / c)

m and c are in units of the last update. The next n of them are taken for reach + ... + reach^n times the last one: each is worth
less than the one before, since a momentum decays where the gradients to come are new. Everything is in closed form: there is no
learning rate, and nothing is kept over batches but the optimizer's moments.

Shape suffixes: T rows of a router's input on this rank, S sampled ones, L local MoE layers, E experts, H hidden.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch import Tensor, nn

from megatron_pr2.prediction.ahead_weights import ahead, dense_parameters, swapped_in
from megatron_pr2.prediction.predictor import ExtrapolatingPredictor, shift_logits
from megatron_pr2.prediction.ridge import ridge_fit
from megatron_pr2.replay.micro_batch import BoundMicroBatch
from megatron_pr2.replay.session import Observer
from megatron_pr2.replay.sites import RouterSite

# Relative to the mean diagonal of the router inputs' second moments; a tenth or ten times of it costs 0 to 3 points of gain.
RIDGE = 1e-2


def reached(updates: float, reach: float) -> float:
    """How many times the last update the next `updates` ones come to: reach + reach^2 + ...; linear between whole numbers."""
    whole = math.floor(updates)
    return sum(reach**j for j in range(1, whole + 1)) + (updates - whole) * reach ** (whole + 1)


class LookaheadPredictor(ExtrapolatingPredictor):
    """W_p from a look-ahead; zero until the first one."""

    kind = "lookahead"

    def __init__(self, num_layers: int, num_experts: int, hidden: int, *, reach: float, device: torch.device) -> None:
        """Args: `reach` says what an update counts that is one further ahead."""
        super().__init__(num_layers, num_experts, hidden, device=device)
        self._reach = reach

    def size_of(self, updates: float) -> float:
        """reach + reach^2 + ..., linear between whole numbers of updates."""
        return reached(updates, self._reach)

    def look(self, change_LEH: Tensor, updates: float) -> None:
        """Takes what a look-ahead found: the routers' change per update, to be predicted for so many."""
        torch.mul(change_LEH, self.size_of(updates), out=self._weight_LEH)
        self.horizon = updates


class LookAhead:
    """Two forwards over sampled rows, and what the second one changed in the logits."""

    def __init__(
        self, chunks: Sequence[nn.Module], sites: Sequence[RouterSite], token_group: dist.ProcessGroup | None, score_function: str
    ) -> None:
        """Args: `token_group` are the ranks that hold other tokens of the same layers; None on a single process."""
        self._parameters = dense_parameters(chunks)
        self._sites, self._group = list(sites), token_group
        # A shift of all logits alike changes nothing under softmax, and is noise to the regression.
        self._centred = score_function == "softmax"

    @torch.no_grad()
    def run(
        self,
        optimizer: Any,
        gate_updates_LEH: Tensor,
        multiple: float,
        rows: Mapping[Hashable, Tensor],
        forward: Callable[[Observer], None],
    ) -> Tensor:
        """The change of every router per update, [L, E, H] fp32; the model, its optimizer and the random states stay as they are.

        Collective over the token group, and over the groups of the optimizer's shards.

        Args:
            multiple: c, at least 1.
            rows: of every micro-batch by key, the rows of this rank that are looked at, on the device.
            forward: runs the same micro-batches once with their routes, with an observer.
        """
        inputs: dict[tuple[int, Hashable], Tensor] = {}
        # After the first forward what the logits become if only the gate moves, after the second how far from that they are.
        shifts: dict[tuple[int, Hashable], Tensor] = {}

        def keep(site: RouterSite, bound: BoundMicroBatch, h_TH: Tensor, p_TE: Tensor) -> None:
            key, rows_S = (site.local, bound.micro_batch.key), rows[bound.micro_batch.key]
            inputs[key] = h_TH.index_select(0, rows_S)
            shift_SE = shift_logits(inputs[key].float(), gate_updates_LEH[site.local])
            shifts[key] = torch.add(p_TE.index_select(0, rows_S).float(), shift_SE, alpha=multiple)

        def compare(site: RouterSite, bound: BoundMicroBatch, h_TH: Tensor, p_TE: Tensor) -> None:
            key, rows_S = (site.local, bound.micro_batch.key), rows[bound.micro_batch.key]
            y_SE = p_TE.index_select(0, rows_S).float() - shifts[key]
            shifts[key] = y_SE - y_SE.mean(-1, keepdim=True) if self._centred else y_SE

        with _random_states_kept():
            forward(keep)
            with swapped_in(self._parameters, ahead(optimizer, self._parameters, multiple)):
                forward(compare)
        if not self._sites:
            return gate_updates_LEH
        # Given away layer by layer: all of them are not there twice.
        h, y = ([torch.cat([of.pop((site.local, key)) for key in rows]) for site in self._sites] for of in (inputs, shifts))
        return torch.add(gate_updates_LEH, ridge_fit(h, y, RIDGE, self._group), alpha=1.0 / multiple)


@contextmanager
def _random_states_kept() -> Iterator[None]:
    """Torch's random state, and Megatron-Core's by parallel axis, are afterwards as they were."""
    tracker = get_cuda_rng_tracker()
    states = tracker.get_states()
    with torch.random.fork_rng(devices=[torch.cuda.current_device()] if torch.cuda.is_initialized() else []):
        try:
            yield
        finally:
            tracker.set_states(states)
