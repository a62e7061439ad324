"""The verdict on prediction, on runs whose answer is known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from megatron_pr2.report import formats
from megatron_pr2.report.summary import PRESET_TEXT, judge, standard_error, what_ran
from tests.report.synthetic import run


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
    assert verdict.headline == "Prediction helped"
    assert verdict.lift == pytest.approx(0.004)
    assert verdict.removed == pytest.approx(0.2)
    assert "removed 20.0 % of the route mismatches" in verdict.detail
    assert "lift +0.400 pp" in verdict.detail
    verdict = judge(records_with([-0.002] * 9))
    assert verdict.headline == "Prediction hurt"
    assert "10.0 % more route mismatches" in verdict.detail


def test_harm_where_frozen_routes_were_perfect():
    verdict = judge(records_with([-0.002] * 9, frozen=1.0))
    assert verdict.kind == "hurt"
    assert math.isnan(verdict.removed)
    assert "frozen routes would have had none" in verdict.detail
    assert judge(records_with([0.0] * 9, frozen=1.0)).kind == "same"


def test_no_predictor_is_never_credited():
    assert judge(records_with([0.004] * 20, predictor=False)).kind == "absent"
    for preset in ("grpo", "r2", "r3"):
        verdict = judge(run(10, preset=preset))
        assert (verdict.kind, verdict.headline) == ("absent", "Nothing was predicted")


def test_synthetic_runs():
    assert judge(run(60, gain=0.3)).kind == "helped"
    assert judge(run(60, gain=-0.3)).kind == "hurt"
    assert judge(run(60, gain=0.0)).kind == "same"
    assert judge(run(60, kappa=1)).kind == "absent"  # no mini-step in which the policy is newer


def test_standard_error_counts_correlated_rollouts_once():
    rng = np.random.default_rng(0)
    independent = rng.normal(size=400)
    assert standard_error(independent) == pytest.approx(independent.std(ddof=1) / 20, rel=0.2)
    assert standard_error(np.repeat(independent[:100], 4)) > 1.7 * standard_error(independent)
    assert math.isnan(standard_error(np.array([1.0])))
    assert standard_error(np.array([1.0, 1.0])) == 0


def test_what_ran():
    assert what_ran(run(2, preset="r3")) == [("r3", PRESET_TEXT["r3"])]
    assert [name for name, _ in what_ran([{"preset": "mine"}, {}, {"preset": "mine"}])] == ["mine", "unknown"]


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
    assert formats.count(1234567) == "1 234 567"
    assert [formats.scientific(v) for v in (0.0, 1.24e-4)] == ["0", "1.2e-04"]
