"""Multiples: the share of a look-ahead to use, per layer and horizon, from the second moments of predicted and true drift.

Shape suffixes: L local MoE layers, I mini-steps, J shares.

A look-ahead is made new for every batch, so what can be known of it is how well the ones before did. Of every mini-step four sums
over its sampled tokens are kept per layer, decayed from batch to batch (drift.moments): of the centred shift x = W_p h_old that the
tokens' push would have made in full, and of the centred drift d = p - p_old that came:

    tokens,  A = <x, x>,  B = <x, d>,  C = <d, d>

The share beta of W_p that the next push of the same horizon takes is where the predicted logits come nearest to the true ones. By
their distance and not its square, since stale experts grow with the distance; summed over the mini-steps that this push is for:

    beta = argmin over b of  sum over mini-steps of sqrt(C - 2 b B + b^2 A)

For a push of one mini-step that is the least-squares share B / A. For one push for all mini-steps it is 0 unless the correlations
B / sqrt(A C) of the later ones add up to more than 1: in the first one nothing drifts, and a prediction can only be wrong. So until
FEWEST batches are known, one push for all is not used, and one for a horizon of its own is used whole.

The shift is never larger than CAP of the drift that was usual in these mini-steps: a batch may turn around.

Drift is measured since the old-log-prob pass. Where no push is for horizon 0, rollouts are older than that: what is measured is
shorter than what is predicted, and pushes for a horizon of their own are used whole.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

# Fewer rollout batches than this say too little.
FEWEST = 3.0
# Largest root mean square of a shift, relative to that of the drift.
CAP = 0.6
SHARES = torch.linspace(0.0, 1.5, 61, dtype=torch.float64)
# The actor records routes, and every token is predicted for its own mini-step.
OWN = "own"
PushedFor = float | str | None
# Mini-steps in the state. Columns: number, weight and sums of each, sums of the batch at work, a horizon (-1: none).
_PLACES = 256
_COLUMNS = 11


class Multiples:
    """The share of W_p of every local MoE layer, and the moments that it comes from; alike on all ranks of a stage.

    Attributes:
        kind, reports: names of its state, and of what it reports beside beta.
        used: report() of the push that the current rollout batch was predicted with.
        horizons: those that the mini-steps were dealt to when the last batch began.
    """

    kind = "multiples"
    reports = ("correlations",)

    def __init__(self, num_layers: int, *, decay: float) -> None:
        """Args: `decay` is the weight of a rollout batch relative to the next one's."""
        self._layers, self._decay = num_layers, decay
        self._known: dict[int, Tensor] = {}  # by mini-step: [L, (weight, tokens, A, B, C)]
        self._batch: dict[int, Tensor] = {}  # the same
        self.horizons: set[float] = set()
        self.used = self.report([0.0] * num_layers)

    def observe(
        self, mini_step: int, tokens_L: Sequence[float], xx_L: Sequence[float], xd_L: Sequence[float], dd_L: Sequence[float]
    ) -> None:
        """Takes a part of a mini-step; all but `tokens_L` are means over its tokens, NaN where there are none."""
        tokens, *means = (torch.tensor(values, dtype=torch.float64) for values in (tokens_L, xx_L, xd_L, dd_L))
        seen = torch.stack([torch.ones_like(tokens), tokens, *(mean.nan_to_num(nan=0.0) * tokens for mean in means)], dim=1)
        if bool(seen[:, 2:].any()):  # else no token's push is known, or nothing drifted and nothing was predicted
            before = self._batch.get(mini_step, torch.zeros_like(seen))
            self._batch[mini_step] = before + seen
            self._batch[mini_step][:, 0] = 1.0

    def close_batch(self) -> None:
        """A rollout batch has ended: what was seen in it is known."""
        for mini_step, seen in self._batch.items():
            self._known[mini_step] = self._decay * self._known.get(mini_step, torch.zeros_like(seen)) + seen
        self._batch = {}

    def shares(self, horizon: PushedFor, shift_L: Sequence[float], horizons: Collection[float]) -> list[float]:
        """beta of every layer.

        Args:
            horizon: of the push, in updates; None for one that serves all mini-steps; OWN.
            shift_L: mean square norm of its W_p h over the tokens that W_p was made of.
            horizons: those that the mini-steps are dealt to, each to the nearest.
        """
        if isinstance(horizon, float | int) and min((*horizons, horizon)) > 0.0:
            return [1.0] * self._layers
        serves = [step for step in self._known if horizon in (None, OWN) or horizon == _nearest(step - 1, {*horizons, horizon})]
        enough = (1.0 - self._decay**FEWEST) / (1.0 - self._decay) - 1e-9
        if not serves or max(float(self._known[step][:, 0].max()) for step in serves) < enough:
            return [0.0 if horizon is None else 1.0] * self._layers
        _, tokens_IL, xx_IL, xd_IL, dd_IL = torch.stack([self._known[step] for step in serves]).unbind(-1)
        b_J11 = SHARES.view(-1, 1, 1)
        distance_JL = (dd_IL - 2.0 * b_J11 * xd_IL + b_J11.square() * xx_IL).clamp(min=0.0).sqrt().sum(1)
        usual_L = dd_IL.sum(0) / tokens_IL.sum(0).clamp(min=1.0)
        largest_L = CAP * (usual_L / torch.tensor(shift_L, dtype=torch.float64)).sqrt()
        return torch.minimum(SHARES[distance_JL.argmin(0)], largest_L.nan_to_num(nan=0.0, posinf=math.inf)).tolist()

    def report(self, beta: Sequence[float]) -> dict[str, list[float]]:
        """Per layer: beta; the correlations of predicted and true drift, summed over the later mini-steps ("correlations")."""
        total_L = torch.full((self._layers,), math.nan, dtype=torch.float64)
        if later := [sums for mini_step, sums in self._known.items() if mini_step > 1]:
            *_, xx_IL, xd_IL, dd_IL = torch.stack(later).unbind(-1)
            total_L = (xd_IL / (xx_IL * dd_IL).sqrt()).nan_to_num(nan=0.0).sum(0)
        return {"beta": list(beta), "correlations": total_L.tolist()}

    def state(self) -> Tensor:
        """Everything it continues from, [L, mini-steps, columns] float64; places without a mini-step are zeros."""
        out = torch.zeros(self._layers, _PLACES, _COLUMNS, dtype=torch.float64)
        out[:, :, -1] = -1.0
        for place, mini_step in enumerate(sorted({*self._known, *self._batch})[:_PLACES]):
            known, batch = self._known.get(mini_step), self._batch.get(mini_step)
            out[:, place, 0] = mini_step
            if known is not None:
                out[:, place, 1:6] = known
            if batch is not None:
                out[:, place, 6:10] = batch[:, 1:]
        for place, horizon in enumerate(sorted(self.horizons)[:_PLACES]):
            out[:, place, -1] = horizon
        return out

    def load_state(self, state: Tensor | None) -> None:
        """Restores :meth:`state`; None starts over."""
        self._known, self._batch, self.horizons = {}, {}, set()
        for place_LC in () if state is None or not self._layers else state.double().unbind(1):
            mini_step, known, batch = int(place_LC[0, 0]), place_LC[:, 1:6], place_LC[:, 6:10]
            if bool(known.any()):
                self._known[mini_step] = known.clone()
            if bool(batch.any()):
                self._batch[mini_step] = torch.cat([torch.ones_like(batch[:, :1]), batch], dim=1)
            if float(place_LC[0, -1]) >= 0.0:
                self.horizons.add(float(place_LC[0, -1]))
        self.used = self.report([0.0] * self._layers)


def _nearest(updates: int, horizons: Collection[PushedFor]) -> PushedFor:
    return min((h for h in horizons if isinstance(h, float | int)), key=lambda h: (abs(h - updates), h))
