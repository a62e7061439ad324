"""What moments of predicted and true drift explain of a whole run."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from megatron_pr2.report.moments import Explained
from megatron_pr2.report.records import RunData
from tests.report.synthetic import moments

NAMES = ("predicted_squared", "predicted_true", "true_squared", "gate_squared", "gate_true")


def records(kappa: int = 3, rollouts: int = 4) -> tuple[list[dict[str, Any]], np.ndarray]:
    """Random moments of two layers, and their sums over rollouts, [mini-step, name, layer]."""
    rng = np.random.default_rng(0)
    x, d, g = rng.normal(size=(3, rollouts, kappa, 2, 50))
    d[:, 0] = 0.0  # nothing has drifted in the first mini-step
    g[:, 0] = 0.0
    d += 0.8 * x * (np.arange(kappa) > 0)[:, None, None]
    each = np.stack([(a * b).sum(-1) for a, b in ((x, x), (x, d), (d, d), (g, g), (g, d))], axis=2)
    out = []
    for step, of_rollout in enumerate(each):
        entries = [{"per_layer": dict(zip(NAMES, of_step.tolist(), strict=True))} for of_step in of_rollout]
        out.append({"step": step, "mini_steps": entries})
    return out, each.sum(0)


def test_moments_of_all_rollouts_are_pooled() -> None:
    given, sums = records()
    found = Explained.of(RunData(given, limit=2))
    xx, xd, dd, gg, gd = sums.transpose(1, 0, 2)[:, 1:]
    np.testing.assert_allclose(found.r_squared.iloc[1:], (2 * xd - xx) / dd)
    np.testing.assert_allclose(found.correlation.iloc[1:], xd / np.sqrt(xx * dd))
    np.testing.assert_allclose(found.multiple.iloc[1:], xd / xx)
    np.testing.assert_allclose(found.gate_share.iloc[1:], gg / dd)
    np.testing.assert_allclose(found.hidden_share.iloc[1:], (dd - 2 * gd + gg) / dd)
    assert all(frame.iloc[0].isna().all() for frame in vars(found).values())
    np.testing.assert_allclose(found.correlation_sums, (xd / np.sqrt(xx * dd)).sum(0))


@pytest.mark.parametrize(
    ("kappa", "correlation", "said"),
    [
        (4, 0.5, "mini-steps 2 to 4: 1.50, mean of the layers; above 1 in 2 of 2. One gate for all mini-steps pays only above 1"),
        (4, 0.3, "above 1 in 0 of 2. One gate for all mini-steps pays only above 1: only gates per mini-step"),
        (2, 0.9, "mini-step 2: 0.90, mean of the layers; above 1 in 0 of 2. One gate for all mini-steps pays only above 1, wh"),
    ],
)
def test_whether_one_gate_can_pay(kappa: int, correlation: float, said: str) -> None:
    entries = [{"per_layer": moments(np.full(2, 0.01) * (i > 0), correlation**2)} for i in range(kappa)]
    assert said in Explained.of(RunData([{"step": 0, "mini_steps": entries}])).one_gate()


def test_without_moments_nothing_is_said() -> None:
    for given in ([{"step": 0}], [{"step": 0, "mini_steps": [{"per_layer": {"lift": [0.1]}}] * 3}]):
        found = Explained.of(RunData(given))
        assert found.one_gate() == ""
        assert found.correlation_sums.empty or found.correlation_sums.isna().all()
