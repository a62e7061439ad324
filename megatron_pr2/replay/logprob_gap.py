"""Are the engine's log-probs those that the actor gives the same tokens? Judged per rollout batch, before an update uses it.

Both are of the sampled token, at the sampling temperature, so that under the same weights they differ by rounding. Measured means
of |gap| in nats: 1e-7 with the embedded engine in fp32, 4e-3 to 1e-2 in bf16, up to 7e-3 with a prediction in use (the engine
weights its experts by the merged gates). Log-probs of the neighbouring token differ by 0.4 (a random tiny model) to 3, of another
temperature by 0.1 (0.9 for 1.0) to 2, of unrelated weights by more than 1.

Sums of several ranks add up: a loop of several processes reduces `Sums.values` and `Sums.largest` and judges the result.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

# Mean |gap| in nats from which on a warning is due, and the batch is refused.
BOUNDS = {"float32": (1e-3, 0.05), "bfloat16": (0.05, 0.2), "float16": (0.05, 0.2)}
# The same where a prediction is in use, or the weights have changed since the tokens were sampled: by how much nobody can say, so
# that only what is as far as half of unrelated weights is refused.
OLDER_BOUNDS = (0.1, 0.5)
# Fewer tokens say nothing about a mean.
LEAST_TOKENS = 32
SHIFTS = (-1, 1)
_SHIFTED = 4.0  # the shifted comparison has to be so much closer
_X, _Y, _XX, _YY, _XY = range(2, 7)


def _no_sums() -> npt.NDArray[np.float64]:
    return np.zeros(7 + 2 * len(SHIFTS))


@dataclass
class Sums:
    """What a gap is judged by, added up over tokens.

    Attributes:
        values: tokens; |gap|; engine's and old log-probs, their squares and product; per shift the pairs and their |gap|.
        largest: |gap| of one token.
        kl: sum of the k3 estimate of KL(engine, old) from the engine's samples.
    """

    values: npt.NDArray[np.float64] = field(default_factory=_no_sums)
    largest: float = 0.0
    kl: float = 0.0

    @property
    def tokens(self) -> int:
        return int(self.values[0])

    @property
    def mean(self) -> float:
        """Mean |gap|, nats; NaN without tokens."""
        return float(self.values[1] / self.values[0]) if self.tokens else math.nan

    def shifted(self) -> dict[int, float]:
        """Mean |gap| of old log-probs against the engine's so many tokens later; only where there are enough pairs."""
        pairs = self.values[7:].reshape(-1, 2)
        return {shift: float(gap / count) for shift, (count, gap) in zip(SHIFTS, pairs, strict=True) if count >= LEAST_TOKENS}

    def line(self) -> tuple[float, float, float]:
        """(slope, correlation, share of the mean square gap that is left) of the line that fits old log-probs to the engine's."""
        count, x, y = (self.values[i] for i in (0, _X, _Y))
        xx, yy, xy = (float(self.values[i]) for i in (_XX, _YY, _XY))
        var_x, var_y, cov = xx / count - (x / count) ** 2, yy / count - (y / count) ** 2, xy / count - x * y / count**2
        square = (xx - 2 * xy + yy) / count
        if min(var_x, var_y, square) <= 0.0:
            return 0.0, 0.0, 1.0
        return cov / var_x, cov / math.sqrt(var_x * var_y), max(0.0, var_y - cov**2 / var_x) / square


def measured(
    engine: Iterable[npt.NDArray[Any]], old: Iterable[npt.NDArray[Any]], masks: Iterable[npt.NDArray[np.bool_]]
) -> Sums:
    """Compares log-probs of some sequences; tokens without a finite log-prob, and sequences of other lengths, are left out.

    Args:
        engine, old: per sequence [n], of the response's tokens: the engine's, and the actor's under the weights of the rollout.
        masks: per sequence [n], which tokens to compare.
    """
    sums = Sums()
    for x, y, mask in zip(engine, old, masks, strict=True):
        if not x.shape == y.shape == mask.shape:
            continue
        x, y = x.astype(np.float64), y.astype(np.float64)
        mask = mask & np.isfinite(x) & np.isfinite(y)
        a, b = x[mask], y[mask]
        gap = b - a
        row = [mask.sum(), np.abs(gap).sum(), a.sum(), b.sum(), a @ a, b @ b, a @ b]
        for shift in SHIFTS:
            both, of_engine = (slice(None, -1), slice(1, None)) if shift > 0 else (slice(1, None), slice(None, -1))
            pair = mask[both] & mask[of_engine]
            row += [pair.sum(), np.abs(x[of_engine][pair] - y[both][pair]).sum()]
        sums.values += np.array(row, dtype=np.float64)
        sums.largest = max(sums.largest, float(np.abs(gap).max(initial=0.0)))
        sums.kl += float((np.exp(gap) - 1.0 - gap).sum())
    return sums


@dataclass(frozen=True)
class Verdict:
    """What is wrong, with its likely cause and what to do; `refuse` where the batch must not be trained on."""

    text: str
    refuse: bool


def judge(sums: Sums, bounds: Sequence[float]) -> Verdict | None:
    """None if the mean |gap| is within bounds, or of fewer than LEAST_TOKENS tokens.

    Args:
        bounds: (warn above, refuse above), as in BOUNDS and OLDER_BOUNDS. Log-probs that are shifted by one are refused above the
            first already.
    """
    warn, most = bounds
    if sums.tokens < LEAST_TOKENS or not sums.mean > warn:
        return None
    cause, shifted = likely_cause(sums)
    text = f"the engine's log-probs differ from the actor's by {sums.mean:.3g} nats on average over {sums.tokens} tokens"
    text += f" (expected: below {warn:.3g}, refused above {most:.3g}). Likely cause: {cause}"
    return Verdict(text, refuse=shifted or sums.mean > most)


def likely_cause(sums: Sums) -> tuple[str, bool]:
    """(the likely cause of a large gap and what to do, whether the log-probs are shifted by one).

    log_softmax(z / T) of the sampled token alone does not give T: the normaliser of each token is unknown. What can be seen is
    whether a line fits. With another temperature, on random logits, it leaves 2 to 35 % of the mean square gap at correlations
    above 0.95 (up to 70 % where tokens differ much in how sure the model is, which is then told as other weights); with unrelated
    weights the correlation is near 0, and with noise on the logits 65 to 100 % are left. The slope is about T engine / T actor.
    """
    shifts = sums.shifted()
    best = min(shifts, key=lambda shift: shifts[shift], default=0)
    if best and shifts[best] * _SHIFTED < sums.mean:
        where = "before" if best > 0 else "behind"
        return (
            f"shifted by one: compared with the {'next' if best > 0 else 'previous'} token's, they differ by {shifts[best]:.3g} "
            f"only, so the actor's lie one token {where} the engine's. Log-prob t must be of response token t, and so on"
        ), True
    slope, correlation, left = sums.line()
    if correlation > 0.9 and left < 0.5 and abs(slope - 1.0) > 0.02:
        return (
            f"another temperature, or another base of the logarithm: a line of slope {slope:.2f} fits them (correlation "
            f"{correlation:.2f}). The slope is about the engine's temperature over the actor's; sampled tokens alone do not give "
            "it exactly. Ask the engine for natural log-probs at the sampling temperature, by which the actor's logits are divided"
        ), False
    return (
        f"other weights or other tokens (correlation {correlation:.2f}, no shift and no temperature explains it): run the "
        "handshake, look at the push of weights, and at sampling settings that change probabilities (top-p, top-k, penalties)"
    ), False
