"""The verdict on prediction, on runs whose answer is known."""

from __future__ import annotations

import math
import re

import numpy as np
import pandas as pd
import pytest

from megatron_pr2.report import formats
from megatron_pr2.report.records import RunData
from megatron_pr2.report.summary import (
    PRESET_TEXT,
    against,
    engine_rounding,
    held_back,
    layer_lift,
    ratio_error,
    standard_error,
    what_ran,
)
from megatron_pr2.report.summary import judge as judge_data
from tests.report.synthetic import run


def judge(records):
    return judge_data(RunData(records))


def records_with(lifts, frozen=0.98, predictor=True):
    return [
        {"step": i, "lift": lift, "frozen_agreement": frozen, "predictor": {"tokens": 9 if predictor else 0, "weight_norm": 0.0}}
        for i, lift in enumerate(lifts)
    ]


NOISE = [0.0005 * (-1) ** i for i in range(20)]


@pytest.mark.parametrize(
    ("lifts", "kind"),
    [
        ([0.004 + n for n in NOISE], "helped"),
        ([-0.004 + n for n in NOISE], "hurt"),
        (NOISE, "same"),
        ([0.0] * 20, "same"),
        ([0.0001] * 20, "same"),  # certain, but only 0.5 % of the mismatches
        ([0.02, -0.016] * 10, "same"),  # mean 0.002 = 10 % of the mismatches, but within the noise
        ([0.004] * 4, "early"),
        ([None] * 20, "absent"),
        ([None] * 10 + [0.004] * 10, "helped"),
    ],
)
def test_verdict(lifts, kind):
    assert judge(records_with(lifts)).kind == kind


def test_verdict_numbers():
    verdict = judge(records_with([0.004 + n for n in NOISE]))
    assert verdict.headline == "Prediction removed 20.0 % (95 % interval 18.9 to 21.1 %) of R3's stale slots"
    assert verdict.lift == pytest.approx(0.004)
    assert verdict.removed == pytest.approx(0.2)
    assert "Of R3's frozen routes 2.00 % would have been stale" in verdict.detail
    assert "lift +0.400 pp, 95 % interval +0.377 pp to +0.423 pp, over all mini-steps of 20 rollouts" in verdict.detail
    verdict = judge(records_with([0.0002, -0.0002] * 10))
    assert verdict.headline == "No measurable gain over R3: 0.0 % (95 % interval -0.5 to 0.5 %) of its stale slots removed"
    verdict = judge(records_with([-0.002] * 9))
    assert verdict.headline == "Prediction added 10.0 % (95 % interval 10.0 to 10.0 %) to R3's stale slots"
    assert "Turn pr2.hold_back on" in verdict.detail


def test_harm_where_frozen_routes_were_perfect():
    verdict = judge(records_with([-0.002] * 9, frozen=1.0))
    assert verdict.kind == "hurt"
    assert math.isnan(verdict.removed)
    assert verdict.headline == "Prediction added stale slots where R3 has none"
    assert judge(records_with([0.0] * 9, frozen=1.0)).kind == "same"


def test_the_verdict_is_about_all_mini_steps():
    records = records_with([0.004] * 20)
    for record in records:
        record["mini_steps"] = [{"lift": v, "frozen_agreement": f} for v, f in ((-0.02, 1.0), (0.004, 0.98), (0.004, 0.98))]
    verdict = judge(records)
    assert (verdict.kind, verdict.lift) == ("hurt", pytest.approx(-0.004))
    assert verdict.removed == pytest.approx(-0.004 / (0.04 / 3))
    for record in records:
        record["lift_all"] = 0.004
    assert (judge(records).kind, judge(records).lift) == ("helped", pytest.approx(0.004))


def with_beta(records, *betas):
    return [r | {"hold_back": {"beta": beta}} for r, beta in zip(records, betas, strict=True)]


def test_held_back_entirely_is_r3():
    records = records_with([0.0] * 9)
    verdict = judge(with_beta(records, *[[0.0, 0.0]] * 9))
    assert verdict.kind == "held"
    assert verdict.headline == "No gain over R3: prediction stayed disabled (hold-back)"
    assert "Beta was 0 in all 2 MoE layers of every rollout" in verdict.detail
    assert "Its lift" not in verdict.detail
    # Whatever rounding makes of the lift: nothing was predicted.
    verdict = judge(with_beta(records_with([-0.03] * 9), *[[0.0, None]] * 9))
    assert verdict.kind == "held"
    assert "Its lift, -3.000 pp, only shows how the engine's routes differ" in verdict.detail
    assert "so far" in judge(with_beta(records, *[[0.0]] * 9)[:2]).detail


def test_held_back_in_part_is_judged_and_told():
    records = records_with([0.004 + n for n in NOISE])
    verdict = judge(with_beta(records, *[[0.0, 0.0, 0.0]] * 19, [0.0, 0.5, 1.0]))
    assert verdict.kind == "helped"
    assert "In the last rollout beta was 0 in 1 of 3 layers (mean beta 0.50)." in verdict.detail
    verdict = judge(with_beta(records, [1.0, 1.0], *[[0.0, 0.0]] * 19))
    assert "In the last rollout beta was 0 in 2 of 2 layers" in verdict.detail
    assert held_back(RunData(records)).empty
    assert held_back(RunData(with_beta(records[:1], []))).empty
    hurt = judge(with_beta(records_with([-0.004] * 9), *[[1.0]] * 9))
    assert "hold_back on" not in hurt.detail
    assert "beta was 0 in 0 of 1 layers" in hurt.detail


def test_an_engines_rounding_is_not_blamed_on_prediction():
    records = [r | {"handshake": {"route_agreement": 0.97}} for r in records_with([-0.02 + n for n in NOISE])]
    verdict = judge(records)
    assert (verdict.kind, engine_rounding(RunData(records))) == ("same", pytest.approx(0.03))
    assert "under the same weights 3.00 % of its experts were not the actor's" in verdict.detail
    assert judge([r | {"handshake": {"route_agreement": 1.0}} for r in records]).kind == "hurt"
    assert judge([r | {"lift": -0.05} for r in records]).kind == "hurt"


def test_layer_lift_has_an_error_of_each_layers_own():
    lifts = [[0.01, 0.002 * (-1) ** i] for i in range(16)]
    records = [{"step": i, "mini_steps": [{"per_layer": {"lift": v}}] * 2} for i, v in enumerate(lifts)]
    means, errors = layer_lift(RunData(records, limit=4))
    np.testing.assert_allclose(means, [0.01, 0], atol=1e-12)
    assert errors[1] == 0
    assert errors[2] == pytest.approx(np.std([0.002, -0.002] * 8, ddof=1) / 4)
    first_counts = [{"step": 0, "mini_steps": [{"per_layer": {"lift": [v]}} for v in (-0.03, 0.01, 0.02)]}]
    assert layer_lift(RunData(first_counts))[0].tolist() == pytest.approx([0.0])
    assert all(values.size == 0 for values in layer_lift(RunData([{"step": 0}])))


def test_no_predictor_is_never_credited():
    assert judge(records_with([0.004] * 20, predictor=False)).kind == "absent"
    for preset in ("grpo", "r2", "r3"):
        verdict = judge(run(10, preset=preset))
        assert (verdict.kind, verdict.headline) == ("absent", "No gain over R3: nothing was predicted")


def test_synthetic_runs():
    assert judge(run(60, gain=0.3)).kind == "helped"
    assert judge(run(60, gain=-0.3)).kind == "hurt"
    assert judge(run(60, gain=0.0)).kind == "same"
    assert judge(run(60, gain=0.3, hold_back=True)).kind == "helped"
    assert judge(run(60, gain=0.0, hold_back=True)).kind == "held"
    assert judge(run(60, kappa=1)).kind == "absent"  # no mini-step in which the policy is newer


def test_standard_error_counts_correlated_rollouts_once():
    rng = np.random.default_rng(0)
    independent = pd.Series(rng.normal(size=400))
    assert standard_error(independent) == pytest.approx(independent.std(ddof=1) / 20, rel=0.2)
    assert standard_error(independent[:100].repeat(4)) > 1.7 * standard_error(independent)
    assert math.isnan(standard_error(pd.Series([1.0])))
    assert standard_error(pd.Series([1.0, 1.0])) == 0


def test_the_error_of_a_ratio_is_that_of_the_delta_method() -> None:
    """Against 4,000 runs drawn anew; a numerator that follows its denominator exactly has none."""
    rng = np.random.default_rng(1)
    whole = rng.normal(0.02, 0.004, (4000, 60))
    part = 0.2 * whole + rng.normal(0.0, 0.003, whole.shape)
    ratios = part.mean(1) / whole.mean(1)
    found = [ratio_error(pd.Series(a), pd.Series(b)) for a, b in zip(part[:200], whole[:200], strict=True)]
    assert np.mean(found) == pytest.approx(ratios.std(), rel=0.15)
    assert ratio_error(pd.Series(0.2 * whole[0]), pd.Series(whole[0])) == pytest.approx(0.0, abs=1e-12)
    assert math.isnan(ratio_error(pd.Series([0.1, 0.2]), pd.Series([0.0, 0.0])))


def test_the_interval_grows_where_neighbouring_rollouts_are_alike() -> None:
    lifts = [0.004 + 0.004 * value for value in np.random.default_rng(2).normal(size=60)]
    widths = [judge(records_with(values)).headline for values in (lifts, np.repeat(lifts[::4], 4))]
    low, high = (re.search(r"interval (-?[\d.]+) to ([\d.]+) %", text) for text in widths)
    assert low is not None
    assert high is not None
    assert float(high[2]) - float(high[1]) > 1.4 * (float(low[2]) - float(low[1]))


def test_gain_against_another_run() -> None:
    """Over the steps that both have; a rollout's stale slots are what its agreement falls short of 1 by."""

    def of(agreement: float, steps: range, reward: float = 0.5) -> RunData:
        return RunData([{"step": i, "agreement": agreement + 1e-4 * (-1) ** i, "reward": reward} for i in steps])

    said = against(of(0.985, range(30)), of(0.98, range(10, 40), 0.4), "r3")
    assert said == (
        "Against r3, over 20 rollout steps that both have: 25.0 % (95 % interval 24.9 to 25.1 %) of its stale slots removed; "
        "reward +0.100 (95 % interval +0.100 to +0.100)."
    )
    grpo = RunData([{"step": i, "reward": 0.4} for i in range(3)])
    assert "stale slots were not measured in both; reward +0.100" in against(of(0.985, range(3)), grpo, "grpo")
    assert "0 rollout steps" in against(of(0.9, range(3)), of(0.9, range(5, 8)), "r3")


def test_what_ran():
    assert what_ran(RunData(run(2, preset="r3"))) == [("r3", PRESET_TEXT["r3"])]
    records = [{"step": 0, "preset": "mine"}, {"step": 1}, {"step": 2, "preset": "mine"}]
    assert [name for name, _ in what_ran(RunData(records))] == ["mine", "unknown"]


def test_formats():
    assert [formats.fixed(v) for v in (0.5, 0.0, 1e-5, math.nan)] == ["0.500", "0.000", "1.0e-05", "-"]
    assert [formats.points(v) for v in (0.0031, -0.0031, 1e-7, -1e-7, math.nan)] == [
        "+0.31 pp",
        "-0.31 pp",
        "0.00 pp",
        "0.00 pp",
        "-",
    ]
    assert [formats.percent(v) for v in (0.98765, math.inf)] == ["98.77 %", "-"]
    assert [formats.size(v) for v in (12, 2048, 3 << 20, 5 << 40)] == ["12 B", "2.0 KiB", "3.0 MiB", "5.0 TiB"]
    assert [formats.duration(v) for v in (4.2, 185, 7620)] == ["4.2 s", "3 min 05 s", "2 h 07 min"]
    assert [formats.count(1234567), formats.count(1, "run"), formats.count(2, "run")] == ["1 234 567", "1 run", "2 runs"]
    assert [formats.scientific(v) for v in (0.0, 1.24e-4)] == ["0", "1.2e-04"]
