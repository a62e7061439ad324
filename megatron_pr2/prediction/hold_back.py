"""HoldBack: the share of a prediction to use, per layer, from the measured gain of the last ones.

Shape suffixes: L local MoE layers, J steps of the line search, S held-out tokens, E experts, K top-k.

The engine gets W + beta W_p. Under beta = 0 its routes are those of replay without prediction (r3), bit by bit. On sampled tokens
that nothing learned from, each training pass counts how many experts of TopK(p_old + delta_j h_old) the updated router would take,
for every beta_j of a small grid and the W_p that was pushed before the batch was rolled out: the prediction is judged on drift that
came after it. delta_j is what a push of W + beta_j W_p changes in the gate as the engine keeps it: a prediction that would be lost
in rounding has gain 0. Per rollout batch, over all of its mini-steps, the gain of beta_j over beta = 0 is one observation; the
first mini-step, in which nothing has drifted yet and a prediction can only be wrong, counts like any other. Observations are
averaged with exponentially decaying weights. The next push takes the beta_j whose mean gain, less some standard errors, is largest,
and 0 where none is above zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_pr2.prediction.predictor import BETAS
from megatron_pr2.routes.overlap import membership

# Fewer rollout batches than this give no usable standard error.
FEWEST = 3.0
_ROWS = ("weight", "weight_squared", "mean_sum", "square_sum", "kept", "slots")


class HoldBack:
    """beta of every local MoE layer, and the measurements that it comes from.

    Attributes:
        beta: per layer, one of BETAS; what the next push takes.
        kind, reports: names of its state, and of what it reports beside beta.
        used: report() as it was at the push that the current rollout batch was predicted with.
    """

    kind = "hold_back"
    reports = ("lift", "lift_error")

    def __init__(self, num_layers: int, *, decay: float, confidence: float, device: torch.device) -> None:
        """Args:
        decay: weight of a rollout batch relative to the next one's.
        confidence: standard errors that a gain has to exceed zero by.
        device: the routers'.
        """
        self._decay, self._confidence = decay, confidence
        self._kept_LJ = torch.zeros(num_layers, len(BETAS) + 1, dtype=torch.float64, device=device)
        self._state = torch.zeros(num_layers, len(_ROWS), len(BETAS), dtype=torch.float64)
        self.beta = [0.0] * num_layers
        self.used = self.report()

    def add(
        self,
        layer: int,
        select: Callable[[Tensor], Tensor],
        shift_JSE: Tensor,
        current_SK: Tensor,
        frozen_SK: Tensor,
        p_old_SE: Tensor,
    ) -> None:
        """Counts one micro-batch of one layer; no host-device synchronisation.

        Args:
            select: the experts that the router of the old-log-prob pass would take, from logits.
            shift_JSE: what each beta_j but 0 would have added to the logits in the push that the batch was rolled out with.
            current_SK: what the updated router takes.
            frozen_SK: TopK(p_old).
        """
        tokens, topk = current_SK.shape
        candidates = (p_old_SE + shift_JSE).flatten(0, 1)
        wanted_SE = membership(current_SK, p_old_SE.shape[1])
        chosen_JSK = torch.cat([frozen_SK, select(candidates)]).view(len(BETAS), tokens, topk).long()
        hits = wanted_SE.expand(len(BETAS), -1, -1).gather(2, chosen_JSK)
        self._kept_LJ[layer, :-1] += hits.sum((1, 2), dtype=torch.float64)
        self._kept_LJ[layer, -1] += float(tokens * topk)

    def discard(self) -> None:
        """Forgets what was counted since the last read()."""
        self._kept_LJ.zero_()

    def read(self, group: dist.ProcessGroup | None) -> None:
        """Adds a mini-step's counts to those of its rollout batch; every rank of `group`, which holds other tokens, calls it."""
        if group is not None and dist.get_world_size(group) > 1:
            dist.all_reduce(self._kept_LJ, group=group)
        counts = self._kept_LJ.to("cpu", copy=True)
        self._kept_LJ.zero_()
        self._row("kept").add_(counts[:, :-1])
        self._row("slots").add_(counts[:, -1:])

    def close_batch(self) -> None:
        """A rollout batch has ended: its gains become an observation, and beta follows; alike on all ranks of a stage."""
        slots, kept = self._row("slots"), self._row("kept")
        seen = slots > 0
        gain = torch.where(seen, (kept - kept[:, :1]) / slots.clamp(min=1.0), 0.0)
        for name, decay, value in (
            ("weight", self._decay, torch.ones_like(gain)),
            ("weight_squared", self._decay**2, torch.ones_like(gain)),
            ("mean_sum", self._decay, gain),
            ("square_sum", self._decay, gain.square()),
        ):
            # A batch without a held-out token is no observation, and old ones keep their weight.
            self._row(name).copy_(torch.where(seen, decay * self._row(name) + value, self._row(name)))
        slots.zero_()
        kept.zero_()
        self._decide()

    def _decide(self) -> None:
        mean, error = self._estimate()
        # beta = 0 has gain 0 without an error: it wins unless something is above zero by enough; the smallest such beta of equals.
        worth = (mean - self._confidence * error).nan_to_num(nan=-math.inf)
        worth[:, 0] = 0.0
        self.beta = [BETAS[j] for j in worth.argmax(dim=1).tolist()]

    def _estimate(self) -> tuple[Tensor, Tensor]:
        """Mean gain and its standard error, [L, J]; the error is NaN where there were too few batches."""
        weight, squared = self._row("weight"), self._row("weight_squared")
        mean = self._row("mean_sum") / weight.clamp(min=1e-300)
        effective = weight.square() / squared.clamp(min=1e-300)
        variance = (self._row("square_sum") / weight.clamp(min=1e-300) - mean.square()).clamp(min=0.0)
        error = (variance / (effective - 1.0).clamp(min=1e-300)).sqrt()
        # Batches are whole numbers until they decay: n of them weigh (1 - d^n) / (1 - d).
        enough = (1.0 - self._decay**FEWEST) / (1.0 - self._decay)
        return mean, torch.where((weight >= enough - 1e-9) & (effective > 1.0), error, math.nan)

    def report(self) -> dict[str, list[float]]:
        """Per layer: beta; the gain in agreement that is expected of it ("lift"), and its standard error; NaN where unknown."""
        mean, error = self._estimate()
        at = torch.tensor([BETAS.index(beta) for beta in self.beta], dtype=torch.long).view(-1, 1)
        unknown = error.isnan().gather(1, at).squeeze(1)
        lift = mean.gather(1, at).squeeze(1).masked_fill(unknown, math.nan)
        return {"beta": list(self.beta), "lift": lift.tolist(), "lift_error": error.gather(1, at).squeeze(1).tolist()}

    def _row(self, name: str) -> Tensor:
        return self._state[:, _ROWS.index(name)]

    def state(self) -> Tensor:
        """Everything it continues from, [L, rows, J] float64."""
        return self._state

    def load_state(self, state: Tensor | None) -> None:
        """Restores :meth:`state`; None starts over, with beta = 0."""
        self._state.zero_()
        if state is not None:
            self._state.copy_(state)
        self.discard()
        self._decide()
        self.used = self.report()
