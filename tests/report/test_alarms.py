"""Alarms: which rollouts they name, and that what is normal raises none."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_pr2.report.alarms import alarms
from megatron_pr2.report.records import RunData
from tests.report.synthetic import run


def found(records: list[dict[str, Any]], dtype: str = "") -> list[str]:
    return alarms(RunData(records), dtype)


@pytest.mark.parametrize("preset", ["grpo", "r2", "r3", "pr2"])
def test_a_calm_run_has_none(preset: str) -> None:
    assert found(run(60, preset=preset)) == []
    assert found([{"step": 0}, {"step": 1, "reward": None}]) == []


def test_each_names_threshold_batch_and_what_to_do() -> None:
    records = run(40)
    records[9]["logprob_gap"]["mean"] = 0.2
    for step, share in ((11, 0.004), (20, 0.01)):
        records[step]["routes"]["missing_share"] = share
    records[12]["mini_steps"][3]["clip_fraction"] = 0.31
    records[13]["grad_norm"] = 40.0
    for record in records:
        record["delivered"] = [0.9, 0.8]
    for step in (30, 31, 32):
        records[step]["delivered"] = [0.5 - 0.01 * step, 0.1]
    gap, missing, clipped, gradient, delivered = found(records)
    assert gap.startswith("Log-prob gap above 1.0e-01: rollout step 9 (2.0e-01); engine and actor score")
    assert missing.startswith("Missing routes above 0.1 % of the tokens: 2 rollouts, first at step 11 (worst 1.00 % at step 20)")
    assert clipped.startswith("Clip fraction above 20 % in a mini-step: rollout step 12 (31.00 %); the policy moves too far")
    assert gradient.startswith("Gradient norm above 5 times the median of the 20 rollouts before: rollout step 13 (40.000); look")
    assert delivered.startswith("Delivered share of the prediction below 50 %: 3 rollouts, first at step 30 (worst 10.00 %")
    assert all(line.endswith(".") for line in (gap, missing, clipped, gradient, delivered))


def test_a_log_prob_gap_is_judged_by_the_dtype_where_nothing_is_predicted() -> None:
    records = run(10, preset="r3")
    records[3]["logprob_gap"]["mean"] = 0.02
    assert found(records, "bfloat16") == found(records) == []
    (line,) = found(records, "float32")
    assert line.startswith("Log-prob gap above 1.0e-03: rollout step 3")


def test_a_gradient_that_grows_slowly_is_no_spike() -> None:
    records = run(60)
    for record in records:
        record["grad_norm"] = 1.1 ** record["step"]
    assert found(records) == []
