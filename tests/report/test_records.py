"""Reading and thinning of records, on numbers that can be checked by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from megatron_pr2.report.plots import smooth
from megatron_pr2.report.records import RunData

NAN = math.nan


def entry(agreement, per_layer):
    return {"agreement": agreement, "per_layer": {"agreement": per_layer}, "changed": [agreement, 1 - agreement, 0.0, 0.0]}


def equal(found, expected):
    np.testing.assert_allclose(np.asarray(found, dtype=float), expected)


def test_mini_steps_and_layers():
    records = [
        {"step": 0, "mini_steps": [entry(1.0, [1.0, 1.0]), entry(0.9, [0.8, 1.0]), entry(0.7, [0.6, 0.8])]},
        {"step": 1, "mini_steps": [entry(1.0, [1.0, 1.0]), entry(0.8, [0.7, None])]},
        {"step": 2},
    ]
    data = RunData(records)
    assert data.kappa == 3
    equal(data.table("mini_steps.#.agreement").T, [[1, 1, NAN], [0.9, 0.8, NAN], [0.7, NAN, NAN]])
    equal(data.means("mini_steps.#.agreement"), [1, 0.85, 0.7])
    equal(data["mini_steps.+.agreement"], [0.8, 0.8, NAN])
    equal(data.table("mini_steps.+.per_layer.agreement.#").T, [[0.7, 0.7, NAN], [0.9, NAN, NAN]])
    equal(data.table("mini_steps.*.per_layer.agreement.#").T[:1], [[0.8, 0.85, NAN]])
    equal(data.changed().iloc[:, :2], [[1, 0], [0.85, 0.15], [0.7, 0.3]])
    assert data.table("mini_steps.+.per_layer.lift.#").shape == (3, 0)


def test_lift_over_all_mini_steps():
    steps = [{"lift": -0.02}, {"lift": 0.05}]
    records = [
        {"step": 0, "lift_all": 0.5, "lift": 0.05, "mini_steps": steps},
        {"step": 1, "lift_all": None, "lift": 0.05, "mini_steps": steps},
        {"step": 2, "lift": 0.05},
        {"step": 3},
    ]
    equal(RunData(records)["lift_all"], [0.5, 0.015, 0.05, NAN])


def test_lists_per_layer():
    records = [
        {"step": 0, "hold_back": {"beta": [0.0, 1.0]}},
        {"step": 1, "hold_back": {"beta": [0.5, None, "x", 0.25]}},
        {"step": 2, "hold_back": None},
    ]
    data = RunData(records)
    equal(data.table("hold_back.beta.#"), [[0, 1, NAN, NAN], [0.5, NAN, NAN, 0.25], [NAN] * 4])
    assert data.table("hold_back.lift.#").shape == (3, 0)
    equal(RunData(records, limit=2).table("hold_back.beta.#")[1], [0.25, NAN])


def test_long_runs_are_thinned():
    data = RunData([{"step": i, "x": float(i), "ratio_max": float(i)} for i in range(10)], limit=4)
    assert data.bin_size == 3
    equal(data["x"].index, [1, 4, 7, 9])
    equal(data["x"], [1, 4, 7, 9])
    equal(data["ratio_max"], [2, 5, 8, 9])
    assert data.known("x").sum() == 45
    assert data.mean("x") == pytest.approx(4.5)


def test_groups_hold_what_carries_numbers():
    records = [
        {"step": 0, "seconds": {"push": 0.0, "rollout": 1.0}},
        {"step": 1, "seconds": {"checkpoint": 2.0, "note": None}},
        {"step": 2},
    ]
    found = RunData(records).group("seconds")
    assert list(found) == ["rollout", "checkpoint"]
    equal(found, [[1, 0], [0, 2]])


def test_running_mean():
    values = RunData([{"step": i, "x": x} for i, x in enumerate([1.0, 2, 3, None, 5])])["x"]
    equal(smooth(values, 2), [1, 1.5, 2.5, 3, 5])
    equal(smooth(values[:3], 1), [1, 2, 3])
