"""Checkpoints of a run: complete or absent, and a resumed run that nobody can tell from an uninterrupted one."""

from __future__ import annotations

import resource
import signal
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from megatron_pr2.errors import CheckpointError
from megatron_pr2.rl import checkpoint
from tests.distributed import pool
from tests.loop import train_job


def state(step: int) -> dict[str, Any]:
    return {"weights": torch.full((4, 4), float(step)), "nested": {"rank": dist.get_rank(), "values": [1, 2.5, "x", None]}}


def round_trip_job(directory: Path) -> tuple[Any, list[int], list[str], Any]:
    first = checkpoint.load_latest(directory)
    paths = [checkpoint.save(directory, step, state(step)).name for step in (1, 2, 3, 10)]
    found = checkpoint.load_latest(directory)
    return first, [step for step, _ in checkpoint.checkpoints(directory)], paths, found


def test_the_newest_checkpoint_comes_back_and_the_oldest_go(tmp_path: Path) -> None:
    for rank, (first, steps, paths, found) in enumerate(pool(2).run(round_trip_job, tmp_path / "new")):
        assert first is None
        assert paths == ["step_000001", "step_000002", "step_000003", "step_000010"]
        assert steps == [3, 10]
        assert torch.equal(found["weights"], torch.full((4, 4), 10.0))
        assert found["nested"] == {"rank": rank, "values": [1, 2.5, "x", None]}
        assert (found["step"], found["world_size"]) == (10, 2)
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["step_000003", "step_000010"]


def failing_job(directory: Path, how: str) -> tuple[str, Any]:
    """(what this rank raised, what can be loaded afterwards)"""
    checkpoint.save(directory, 1, state(1))
    if dist.get_rank() == (0 if how == "rename" else 1):
        if how == "writer":
            patch = mock.patch.object(checkpoint, "_write", side_effect=OSError(28, "No space left on device"))
        elif how == "pickle":
            patch = mock.patch.object(checkpoint, "_write", side_effect=TypeError("cannot pickle"))
        else:
            patch = mock.patch.object(Path, "rename", side_effect=OSError(5, "Input/output error"))
    else:
        patch = mock.patch.object(checkpoint, "KEEP", checkpoint.KEEP)
    raised = ""
    with patch:
        try:
            checkpoint.save(directory, 2, state(2))
        except CheckpointError as error:
            raised = str(error)
    return raised, checkpoint.load_latest(directory)


@pytest.mark.parametrize(("how", "words"), [("writer", "No space left"), ("pickle", "cannot pickle"), ("rename", "Input/output")])
def test_a_failure_on_one_rank_is_raised_on_all_and_the_previous_checkpoint_is_whole(tmp_path: Path, how: str, words: str) -> None:
    rank = 0 if how == "rename" else 1
    for raised, found in pool(2).run(failing_job, tmp_path, how, timeout=60):
        assert raised.startswith(f"checkpoint {tmp_path}/step_000002 could not be written (rank {rank}: ")
        assert words in raised
        assert "earlier checkpoints are intact" in raised
        assert found["step"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["step_000001"]


def full_disk_job(directory: Path) -> tuple[str, Any]:
    """The kernel refuses to let a file grow beyond 64 KiB, in the middle of the writing, on rank 1."""
    checkpoint.save(directory, 1, state(1))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    if dist.get_rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (64 << 10, limits[1]))
    raised = ""
    try:
        checkpoint.save(directory, 2, {"weights": torch.zeros(1 << 20)})
    except CheckpointError as error:
        raised = str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    return raised, checkpoint.load_latest(directory)


def test_a_file_that_cannot_grow_leaves_the_previous_checkpoint_whole(tmp_path: Path) -> None:
    for raised, found in pool(2).run(full_disk_job, tmp_path, timeout=60):
        assert "could not be written (rank 1: " in raised
        assert found["step"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["step_000001"]


def unusable_directory_job(directory: Path) -> str:
    try:
        checkpoint.save(directory, 1, state(1))
    except CheckpointError as error:
        return str(error)
    return ""


def test_a_directory_that_cannot_be_made_is_said_on_every_rank(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for raised in pool(2).run(unusable_directory_job, tmp_path / "file" / "checkpoints", timeout=60):
        assert "rank 0: NotADirectoryError" in raised


def load_job(directory: Path) -> str:
    try:
        checkpoint.load_latest(directory)
    except CheckpointError as error:
        return str(error)
    return ""


def save_job(directory: Path) -> None:
    checkpoint.save(directory, 1, state(1))


def test_another_number_of_processes_is_refused(tmp_path: Path) -> None:
    pool(2).run(save_job, tmp_path)
    (tmp_path / "step_000001" / "rank_00002.pt").write_bytes(b"")
    for raised in pool(2).run(load_job, tmp_path):
        assert "was written by 3 processes, this run has 2; resume with parallel.processes=3" in raised


def test_a_damaged_file_is_named_on_every_rank(tmp_path: Path) -> None:
    pool(2).run(save_job, tmp_path)
    file = tmp_path / "step_000001" / "rank_00001.pt"
    file.write_bytes(file.read_bytes()[:100])
    for raised in pool(2).run(load_job, tmp_path, timeout=60):
        assert f"{tmp_path}/step_000001 cannot be read (rank 1: " in raised
        assert "remove it" in raised


def test_unfinished_checkpoints_are_not_found(tmp_path: Path) -> None:
    for name in (".step_000009.tmp", "step_9", "step_000009.bak", "final"):
        (tmp_path / name).mkdir()
    assert checkpoint.checkpoints(tmp_path) == []
    assert checkpoint.checkpoints(tmp_path / "absent") == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_resumed_run_continues_with_the_same_bits(tiny_checkpoint: Path, tmp_path: Path, dtype: str) -> None:
    """Two steps and two more are four: rollouts, log-probs, weights, optimizer, predictor, records."""
    common = ["preset=pr2", "pr2.alpha=3", f"model.dtype={dtype}", "checkpoint_every=2", "rollout.prompts=2"]
    jobs = [
        (tmp_path / "straight", ["steps=4", *common], False),
        (tmp_path / "cut", ["steps=2", *common], False),
        (tmp_path / "cut", ["steps=4", *common], True),
    ]
    for straight, first, second in pool(2).run(train_job, tiny_checkpoint, jobs):
        for name in ("rollouts", "samples", "weights", "optimizer"):
            assert first[name] + second[name] == straight[name], name
        assert [record["step"] for record in second["records"]] == [2, 3]
        assert repr(first["records"] + second["records"]) == repr(straight["records"])
        assert second["predictor"] == straight["predictor"] > 0.1
