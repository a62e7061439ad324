"""metrics.jsonl: what is written is read back, whatever happened to the process in between."""

from __future__ import annotations

import json
import logging
import math
from unittest import mock

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_pr2.errors import DataError
from megatron_pr2.report import metrics_log
from megatron_pr2.report.metrics_log import MetricsLog, first_and_last_fifth, flat, listed, read_records, scalars
from tests.report.synthetic import run


def steps(run_dir):
    return [record["step"] for record in read_records(run_dir)]


def test_round_trip(tmp_path):
    records = run(4)
    with MetricsLog(tmp_path / "new" / "run") as log:
        for record in records:
            log.append(record)
            assert read_records(tmp_path / "new" / "run")[-1] == record  # flushed at once, not at close
    assert read_records(tmp_path / "new" / "run") == records


def test_not_finite_becomes_null_and_arrays_become_lists(tmp_path):
    with MetricsLog(tmp_path) as log:
        log.append(
            {
                "step": np.int64(0),
                "reward": float("nan"),
                "seconds": {"push": float("inf")},
                "mini_steps": [{"changed": np.array([0.5, -np.inf]), "loss": torch.tensor(0.25), "per_layer": (1, None)}],
            }
        )
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    assert json.loads(text) == {
        "step": 0,
        "reward": None,
        "seconds": {"push": None},
        "mini_steps": [{"changed": [0.5, None], "loss": 0.25, "per_layer": [1, None]}],
    }


@pytest.mark.parametrize("torn", [b'{"step": 2, "rew', b'{"step": 2}', b"\x00\x00"])
def test_torn_last_line_is_dropped_with_a_warning(tmp_path, caplog, torn):
    with MetricsLog(tmp_path) as log:
        for record in run(2):
            log.append(record)
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(torn)
    with caplog.at_level(logging.WARNING):
        assert steps(tmp_path) == [0, 1]
    assert "line 3 is torn" in caplog.text
    with MetricsLog(tmp_path, resume_step=2) as log:  # must not glue the next record to the torn one
        log.append(run(3)[2])
    caplog.clear()
    assert steps(tmp_path) == [0, 1, 2]
    assert not caplog.records


def test_damage_before_the_last_line_names_file_and_line(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"st\n{"step": 2}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl:2 is not JSON"):
        read_records(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n[1]\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl:2 is not a metrics record"):
        read_records(tmp_path)


def test_missing_file_is_an_error(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        read_records(tmp_path)


def test_resume_removes_the_steps_to_be_repeated(tmp_path):
    first = run(5, seed=1)
    with MetricsLog(tmp_path) as log:
        for record in first:
            log.append(record)
    again = run(5, seed=2)
    with MetricsLog(tmp_path, resume_step=3) as log:
        assert steps(tmp_path) == [0, 1, 2]
        log.append(again[3])
        log.truncate(2)  # also while open
        assert steps(tmp_path) == [0, 1]
        log.append(again[2])
    assert read_records(tmp_path) == [*first[:2], again[2]]
    assert {p.name for p in tmp_path.iterdir()} == {"metrics.jsonl", "tensorboard"}


def test_truncate_is_atomic(tmp_path, monkeypatch):
    with MetricsLog(tmp_path) as log:
        for record in run(3):
            log.append(record)
        before = (tmp_path / "metrics.jsonl").read_bytes()

        def fail(*_):
            raise OSError("power cut")

        monkeypatch.setattr("megatron_pr2.routes.files.os.replace", fail)
        with pytest.raises(OSError, match="power cut"):
            log.truncate(1)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    assert {p.name for p in tmp_path.iterdir()} == {"metrics.jsonl", "tensorboard"}


def test_a_new_run_refuses_a_used_directory(tmp_path):
    with MetricsLog(tmp_path) as log:
        log.append({"step": 0})
    with pytest.raises(DataError, match=r"already holds 1 record"):
        MetricsLog(tmp_path)
    with MetricsLog(tmp_path, resume_step=0):
        assert steps(tmp_path) == []


def test_a_partial_write_leaves_no_torn_line(tmp_path, monkeypatch):
    def full_disk(*arguments, **options):
        file = open(*arguments, **options)  # noqa: SIM115
        return mock.MagicMock(wraps=file, __enter__=lambda self: self, write=lambda line: file.write(line[:10]))

    with MetricsLog(tmp_path) as log:
        log.append({"step": 0})
        monkeypatch.setattr(metrics_log, "open", full_disk, raising=False)
        with pytest.raises(OSError, match="step 1 was written only in part"):
            log.append({"step": 1, "reward": 0.5})
        monkeypatch.undo()
        log.append({"step": 1, "reward": 0.25})
    assert read_records(tmp_path) == [{"step": 0}, {"step": 1, "reward": 0.25}]


@pytest.mark.parametrize("step", [None, 1.5, True, "1", 0, -1])
def test_append_refuses_a_step_that_is_no_successor(tmp_path, step):
    with MetricsLog(tmp_path) as log:
        log.append({"step": 0})
        with pytest.raises(DataError, match="expected an integer above the last logged step, 0"):
            log.append({"step": step})


def test_append_names_the_value_that_json_cannot_hold(tmp_path):
    with MetricsLog(tmp_path) as log, pytest.raises(DataError, match=r"record\.mini_steps\[0\]\.loss is a complex"):
        log.append({"step": 0, "mini_steps": [{"loss": 1j}]})


def test_tensorboard_tags(tmp_path):
    records = [r | {"rollout": {"turns": 2.0 + r["step"]}} for r in run(3)]
    with MetricsLog(tmp_path) as log:
        for record in records:
            log.append(record)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert tags == set(scalars(records[-1]))
    assert {"reward", "response_length", "policy/loss", "routes/agreement", "routes/lift", "routes/missing"} <= tags
    assert {"logprob_gap/mean", "predictor/weight_norm", "seconds/rollout", "bytes/routes", "mini_step/agreement/4"} <= tags
    got = [(event.step, event.value) for event in events.Scalars("routes/lift")]
    assert got == [(r["step"], pytest.approx(r["lift"], rel=1e-6)) for r in records]
    assert [event.value for event in events.Scalars("turns")] == [2.0, 3.0, 4.0]
    got = [event.value for event in events.Scalars("mini_step/agreement/2")]
    assert got == pytest.approx([r["mini_steps"][1]["agreement"] for r in records])


def test_tensorboard_hides_repeated_steps_after_a_resume(tmp_path):
    with MetricsLog(tmp_path) as log:
        for step in range(5):
            log.append({"step": step, "reward": 0.25})
    with MetricsLog(tmp_path, resume_step=3) as log:
        log.append({"step": 3, "reward": 0.75})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("reward")] == [(0, 0.25), (1, 0.25), (2, 0.25), (3, 0.75)]


def test_numbers_of_a_record():
    record = {"a": 1, "b": {"c": 2.5, "d": None, "e": "x", "f": True}, "list": [0.5, None, {"g": 2}], "h": math.nan}
    numbers = flat(record)
    assert numbers == {"a": 1, "b.c": 2.5, "list.1": 0.5, "list.3.g": 2}
    assert listed(numbers, "list") == [0.5]


def test_live_routes_have_no_route_scalars():
    assert not {"routes/agreement", "routes/lift", "mini_step/agreement/2"} & set(scalars(run(1, preset="grpo")[0]))


def test_hold_back_scalars():
    record = {"lift_all": 0.25, "hold_back": {"beta": [0.0, 1.0, None], "lift": [0.0, 0.5, None], "lift_error": [None] * 3}}
    assert scalars(record) == {
        "routes/lift_all": 0.25,
        "hold_back/beta": 0.5,
        "hold_back/lift": 0.25,
        "hold_back/held_layers": 0.5,
        "hold_back/beta_by_layer/1": 0.0,
        "hold_back/beta_by_layer/2": 1.0,
    }
    assert not [tag for tag in scalars({"hold_back": {"beta": []}}) if tag.startswith("hold_back")]


def test_first_and_last_fifth():
    records = [{"step": i, "reward": float(i)} for i in range(10)]
    assert first_and_last_fifth(records) == {"first": 0.5, "last": 8.5, "change": 8.0, "rollouts": 2.0}
    assert first_and_last_fifth(records[:9]) == {"first": 0.0, "last": 8.0, "change": 8.0, "rollouts": 1.0}
    assert first_and_last_fifth(records[3:4]) == {"first": 3.0, "last": 3.0, "change": 0.0, "rollouts": 1.0}
    records[0]["reward"] = None
    assert first_and_last_fifth(records)["first"] == 1.0
    assert math.isnan(first_and_last_fifth([])["first"])
    assert first_and_last_fifth([])["rollouts"] == 0
