"""Reading and thinning of records, on numbers that can be checked by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from megatron_pr2.report.records import RunData, layer_values, lift_all, number, running_mean

NAN = math.nan


def entry(agreement, per_layer):
    return {"agreement": agreement, "per_layer": {"agreement": per_layer}, "changed": [agreement, 1 - agreement, 0.0, 0.0]}


def test_number_reads_absent_values_as_nan():
    record = {"a": 1, "b": {"c": 2.5, "d": None, "e": "x", "f": True}}
    assert number(record, "a") == 1
    assert number(record, "b", "c") == 2.5
    for keys in (("b", "d"), ("b", "e"), ("b", "f"), ("b",), ("z",), ("a", "c"), ("z", "c")):
        assert math.isnan(number(record, *keys)), keys


def test_mini_steps_and_layers():
    records = [
        {"step": 0, "mini_steps": [entry(1.0, [1.0, 1.0]), entry(0.9, [0.8, 1.0]), entry(0.7, [0.6, 0.8])]},
        {"step": 1, "mini_steps": [entry(1.0, [1.0, 1.0]), entry(0.8, [0.7, None])]},
        {"step": 2},
    ]
    data = RunData(records)
    assert data.kappa == 3
    np.testing.assert_allclose(data.mini_steps("agreement"), [[1, 1, NAN], [0.9, 0.8, NAN], [0.7, NAN, NAN]])
    np.testing.assert_allclose(data.mini_step_means("agreement"), [1, 0.85, 0.7])
    np.testing.assert_allclose(data.last_mini_step("agreement"), [0.7, 0.8, NAN])
    np.testing.assert_allclose(data.later_mini_steps("agreement"), [0.8, 0.8, NAN])
    np.testing.assert_allclose(data.layers("agreement"), [[0.7, 0.7, NAN], [0.9, NAN, NAN]])
    np.testing.assert_allclose(data.changed_means()[:, :2], [[1, 0], [0.85, 0.15], [0.7, 0.3]])
    assert data.layers("lift").shape == (0, 3)


def test_lift_over_all_mini_steps():
    steps = [{"lift": -0.02}, {"lift": 0.05}]
    assert lift_all({"lift_all": 0.5, "lift": 0.05, "mini_steps": steps}) == 0.5
    assert lift_all({"lift_all": None, "lift": 0.05, "mini_steps": steps}) == pytest.approx(0.015)
    assert lift_all({"lift": 0.05}) == 0.05
    assert math.isnan(lift_all({"step": 0}))
    data = RunData([{"step": i, "lift_all": float(i)} for i in range(4)], limit=2)
    np.testing.assert_allclose(data.lift_all(), [0.5, 2.5])


def test_lists_per_layer():
    records = [
        {"step": 0, "hold_back": {"beta": [0.0, 1.0]}},
        {"step": 1, "hold_back": {"beta": [0.5, None, "x"]}},
        {"step": 2, "hold_back": None},
    ]
    assert layer_values(records[0], "hold_back", "beta") == [0.0, 1.0]
    assert layer_values(records[2], "hold_back", "beta") == layer_values({}, "hold_back", "beta") == []
    data = RunData(records)
    np.testing.assert_allclose(data.layer_columns("hold_back", "beta"), [[0, 0.5, NAN], [1, NAN, NAN], [NAN, NAN, NAN]])
    assert data.layer_columns("hold_back", "lift").shape == (0, 3)
    thin = RunData(records, limit=2)
    assert thin.layer_columns("hold_back", "lift").shape == thin.layers("lift").shape == (0, 2)
    np.testing.assert_allclose(thin.layer_columns("hold_back", "beta")[0], [0.25, NAN])


def test_layer_series_keeps_every_rollout():
    records = [{"step": i, "mini_steps": [entry(1.0, [1.0]), entry(1.0, [0.1 * i])]} for i in range(5)]
    data = RunData(records, limit=2)
    np.testing.assert_allclose(data.layer_series("agreement", skip=1), [[0, 0.1, 0.2, 0.3, 0.4]])
    np.testing.assert_allclose(data.layer_series("agreement"), [[0.5, 0.55, 0.6, 0.65, 0.7]])


def test_long_runs_are_thinned():
    data = RunData([{"step": i, "x": float(i)} for i in range(10)], limit=4)
    assert data.bin_size == 3
    np.testing.assert_allclose(data.steps, [1, 4, 7, 9])
    np.testing.assert_allclose(data.column("x"), [1, 4, 7, 9])
    np.testing.assert_allclose(data.column("x", reduce=np.nanmax), [2, 5, 8, 9])
    assert data.total("x") == 45


def test_keys_of_lists_what_carries_numbers():
    records = [{"seconds": {"push": 0.0, "rollout": 1.0}}, {"seconds": {"checkpoint": 2.0, "note": None}}, {}]
    assert RunData(records).keys_of("seconds") == ["rollout", "checkpoint"]


def test_running_mean():
    np.testing.assert_allclose(running_mean(np.array([1.0, 2, 3, NAN, 5]), 2), [1, 1.5, 2.5, 3, 5])
    np.testing.assert_allclose(running_mean(np.array([1.0, 2, 3]), 1), [1, 2, 3])
    assert np.isnan(running_mean(np.array([NAN, NAN]), 2)).all()
