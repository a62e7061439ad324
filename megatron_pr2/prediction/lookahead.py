"""Prediction by looking ahead: what the policy's next updates will do to the routers, distilled into W_p.

Routers move mostly because their inputs do: knowing how the gate moves is not enough. So the model runs twice over a sample of the
last batch's tokens with their routes, under theta and under theta + c u (prediction.ahead_weights), and what the logits did is
regressed on the router inputs:

    y_t   = p(theta + c u)_t - p(theta)_t - c U h_t          what the gate's own update U does not explain
    W_p   = m (U + ridge(y on h) / c)

Where the last training pass kept its router inputs and logits, one forward is enough: that pass ran under the weights before the
last update, which u repeats, so y_t = p(theta)_t - p(theta - u)_t - U h_t.

m and c are in units of the last update. The next n of them are taken for reach + ... + reach^n times the last one: each is worth
less than the one before, since a momentum decays where the gradients to come are new. Everything is in closed form: there is no
learning rate, and nothing is kept over batches but the optimizer's moments.

Shape suffixes: T rows of a router's input on this rank, S sampled ones, L local MoE layers, E experts, H hidden.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch import Tensor, nn

from megatron_pr2.prediction.ahead_weights import ahead, dense_parameters, swapped_in
from megatron_pr2.prediction.predictor import ExtrapolatingPredictor, shift_logits
from megatron_pr2.prediction.ridge import ridge_fit
from megatron_pr2.replay.micro_batch import BoundMicroBatch, MicroBatch
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
        self._squares = [0.0] * num_layers  # per update

    def size_of(self, updates: float) -> float:
        """reach + reach^2 + ..., linear between whole numbers of updates."""
        return reached(updates, self._reach)

    def look(self, change_LEH: Tensor, squares_L: Tensor, updates: float) -> None:
        """Takes what a look-ahead found (LookAhead.run), to be predicted for so many updates."""
        torch.mul(change_LEH, self.size_of(updates), out=self._weight_LEH)
        self._squares, self.horizon = squares_L.tolist(), updates

    def shift(self, horizon: float | None) -> list[float]:
        """Per layer the mean square norm, over the tokens looked at, of what W_p adds to logits for so many updates."""
        size = self.size_of(self.horizon if horizon is None else horizon)
        return [size * size * square for square in self._squares]

    def clear_not_finite(self) -> list[int]:
        bad = super().clear_not_finite()
        self._squares = [0.0 if layer in bad else square for layer, square in enumerate(self._squares)]
        return bad

    def state(self) -> dict[str, Tensor]:
        """Also shift [L]: its square norm per update."""
        return {**super().state(), "shift": torch.tensor(self._squares, dtype=torch.float64)}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        super().load_state(state)
        self._squares = state["shift"].tolist() if "shift" in state else [0.0] * len(self._squares)


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
        self.forget()

    def forget(self) -> None:
        """Frees what a watched pass left."""
        self._rows: Mapping[MicroBatch, Tensor] = {}
        self._inputs: dict[tuple[int, MicroBatch], Tensor] = {}
        self._logits: dict[tuple[int, MicroBatch], Tensor] = {}

    def watch(self, rows: Mapping[MicroBatch, Tensor]) -> Observer:
        """The observer of the first of the two forwards: keeps router inputs and logits of these rows until :meth:`run`."""
        self.forget()
        self._rows = rows
        return self._keep

    def watched(self, micro_batches: Sequence[MicroBatch]) -> dict[MicroBatch, Tensor] | None:
        """Their rows, if the last training pass was watched for them and ran; also of none, where other ranks have some."""
        ran = {each for each in self._rows if all((site.local, each) in self._inputs for site in self._sites)}
        if not ran.issuperset(micro_batches):
            return None
        return {each: self._rows[each] for each in micro_batches}

    def _keep(self, site: RouterSite, bound: BoundMicroBatch, h_TH: Tensor, p_TE: Tensor) -> None:
        if (rows_S := self._rows.get(bound.micro_batch)) is not None:
            key = site.local, bound.micro_batch
            self._inputs[key], self._logits[key] = h_TH.index_select(0, rows_S), p_TE.index_select(0, rows_S).float()

    @torch.no_grad()
    def run(
        self,
        optimizer: Any,
        gate_updates_LEH: Tensor,
        multiple: float,
        rows: Mapping[MicroBatch, Tensor],
        forward: Callable[[Observer], None],
        *,
        watched: bool,
    ) -> tuple[Tensor, Tensor]:
        """The change of every router per update, [L, E, H] fp32, and the mean square norm of what it adds to logits, [L] fp64.

        The model, its optimizer and the random states stay as they are. Collective over the token group, and over the groups of the
        optimizer's shards.

        Args:
            multiple: c, at least 1.
            rows: of every micro-batch, the rows of this rank that are looked at, on the device.
            forward: runs the same micro-batches once with their routes, with an observer.
            watched: on every rank these are rows that the last training pass was watched for: one forward is enough.
        """
        multiple = 1.0 if watched else multiple

        def compare(site: RouterSite, bound: BoundMicroBatch, h_TH: Tensor, p_TE: Tensor) -> None:
            key = site.local, bound.micro_batch
            y_SE = p_TE.index_select(0, rows[bound.micro_batch]).float() - self._logits[key]
            y_SE -= multiple * shift_logits(self._inputs[key].float(), gate_updates_LEH[site.local])
            self._logits[key] = y_SE - y_SE.mean(-1, keepdim=True) if self._centred else y_SE

        with _random_states_kept():
            if watched:
                forward(compare)
            else:
                forward(self.watch(rows))
                with swapped_in(self._parameters, ahead(optimizer, self._parameters, multiple)):
                    forward(compare)
        if not self._sites:
            self.forget()
            return gate_updates_LEH, torch.zeros(0, dtype=torch.float64)
        # Given away layer by layer: all of them are not there twice.
        _, experts, hidden = gate_updates_LEH.shape

        def joined(parts: dict[tuple[int, MicroBatch], Tensor], layer: int, columns: int) -> Tensor:
            taken = [parts.pop((layer, each)) for each in rows]
            return torch.cat(taken) if taken else gate_updates_LEH.new_zeros((0, columns))

        h = [joined(self._inputs, site.local, hidden) for site in self._sites]
        y = [joined(self._logits, site.local, experts) for site in self._sites]
        self.forget()
        change_LEH = torch.add(gate_updates_LEH, ridge_fit(h, y, RIDGE, self._group), alpha=1.0 / multiple)
        return change_LEH, self._squares(h, change_LEH)

    def _squares(self, inputs: Sequence[Tensor], change_LEH: Tensor) -> Tensor:
        sums_L2 = change_LEH.new_zeros((len(inputs), 2), dtype=torch.float64)
        for layer, h_SH in enumerate(inputs):
            shift_SE = shift_logits(h_SH.float(), change_LEH[layer])
            sums_L2[layer, 0] = (shift_SE - shift_SE.mean(-1, keepdim=True)).square().sum(dtype=torch.float64)
            sums_L2[layer, 1] = float(len(h_SH))
        if self._group is not None and dist.get_world_size(self._group) > 1:
            dist.all_reduce(sums_L2, group=self._group)
        return sums_L2[:, 0] / sums_L2[:, 1].clamp(min=1.0)


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
