"""Checkpoints of a run: complete or absent, for any layout, and a resumed run with the numbers of an uninterrupted one."""

from __future__ import annotations

import contextlib
import re
import resource
import shutil
import signal
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from safetensors.torch import load_file
from torch import Tensor

from megatron_pr2 import host
from megatron_pr2.checkpoint import files
from megatron_pr2.errors import CheckpointError
from megatron_pr2.rl import checkpoint
from tests.helpers.distributed import pool
from tests.helpers.loop import train, train_job
from tests.helpers.rounding import rounding

pytestmark = pytest.mark.slow

OTHERS = {"epoch": 3, "values": [1, 2.5, "x", None]}


def shards(values: Tensor) -> dict[str, Any]:
    """A tensor of which every rank has as many rows as the others."""
    rank, world = dist.get_rank(), dist.get_world_size()
    return {"rows": ShardedTensor.from_rank_offsets("weights.rows", values, (0, rank, world))}


def state(step: int, rows: int = 12) -> dict[str, Any]:
    """Row r of the whole tensor holds step + r."""
    share = rows // dist.get_world_size()
    values = step + torch.arange(rows, dtype=torch.float32)[dist.get_rank() * share :][:share, None].repeat(1, 4)
    return {"weights": shards(values), "others": OTHERS}


def newest(directory: Path, rows: int = 12) -> tuple[int, Tensor, Any] | None:
    """(step, this rank's rows, what is the same on all ranks)"""
    path = checkpoint.latest(directory)
    if path is None:
        return None
    loaded = checkpoint.read(path, {"weights": shards(torch.zeros(rows // dist.get_world_size(), 4))})
    assert {name: loaded[name] for name in ("step", "others")} == checkpoint.read(path)
    return loaded["step"], loaded["weights"]["rows"][:, 0].clone(), loaded["others"]


def round_trip_job(directory: Path) -> tuple[Any, list[int], list[str], Any]:
    first = newest(directory)
    paths = [checkpoint.save(directory, step, state(step)).name for step in (1, 2, 3, 10)]
    return first, [step for step, _ in checkpoint.checkpoints(directory)], paths, newest(directory)


def test_the_newest_checkpoint_comes_back_and_the_oldest_go(tmp_path: Path) -> None:
    for rank, (first, steps, paths, (step, rows, others)) in enumerate(pool(2).run(round_trip_job, tmp_path / "new")):
        assert first is None
        assert paths == ["step_000001", "step_000002", "step_000003", "step_000010"]
        assert steps == [3, 10]
        assert (step, others) == (10, OTHERS)
        assert rows.tolist() == [10.0 + 6 * rank + r for r in range(6)]
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["step_000003", "step_000010"]


def save_job(directory: Path) -> None:
    checkpoint.save(directory, 1, state(1))


def test_another_number_of_processes_finds_its_rows(tmp_path: Path) -> None:
    pool(2).run(save_job, tmp_path)
    for processes in (1, 3):
        results = pool(processes).run(newest, tmp_path)
        assert torch.cat([rows for _, rows, _ in results]).tolist() == [1.0 + r for r in range(12)]


def fail(number: int, message: str) -> Any:
    return mock.Mock(side_effect=OSError(number, message))


def failing_job(directory: Path, how: str) -> tuple[str, Any]:
    """(what this rank raised, what can be loaded afterwards)"""
    checkpoint.save(directory, 1, state(1))
    second = state(2)
    rename = Path.rename

    def unmovable(path: Path, target: Path) -> Path:
        if path.name == ".step_000002.tmp":
            raise OSError(5, "Input/output error")
        return rename(path, target)

    patches = {
        "shards": mock.patch.object(
            torch.distributed.checkpoint.FileSystemWriter, "write_data", fail(28, "No space left on device")
        ),
        "index": mock.patch.object(torch.distributed.checkpoint.FileSystemWriter, "finish", fail(28, "No space left on device")),
        "common": mock.patch.object(files, "_write_common", fail(28, "No space left on device")),
        "format": mock.patch.object(files, "_write_format", fail(28, "No space left on device")),
        "rename": mock.patch.object(Path, "rename", unmovable),
        "twice": mock.patch.object(checkpoint, "KEEP", checkpoint.KEEP),
        "pickle": mock.patch.object(checkpoint, "KEEP", checkpoint.KEEP),
    }
    if how == "twice":  # both ranks say that they have the first half
        second["weights"]["rows"] = ShardedTensor.from_rank_offsets("weights.rows", torch.zeros(6, 4), (0, 0, 2))
    if how == "pickle":
        second["others"] = lambda: None
    raised = ""
    with (
        patches[how] if dist.get_rank() == (1 if how == "shards" else 0) else mock.patch.object(checkpoint, "KEEP", checkpoint.KEEP)
    ):
        try:
            checkpoint.save(directory, 2, second)
        except CheckpointError as error:
            raised = str(error)
    return raised, newest(directory)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("shards", r"rank 1: OSError: \[Errno 28\] No space left"),
        ("index", r"rank 0: OSError: \[Errno 28\] No space left"),
        ("common", r"rank 0: OSError: \[Errno 28\] No space left"),
        ("format", r"rank 0: OSError: \[Errno 28\] No space left"),
        ("rename", r"rank 0: OSError: \[Errno 5\] Input/output"),
        # Later releases of Megatron-Core put a heading before it.
        ("twice", r"rank 0: CheckpointingException: (?:.*\n)*.*Invalid access pattern for .*weights\.rows"),
        ("pickle", "rank 0: AttributeError: Can't pickle local object"),
    ],
)
def test_a_failure_on_one_rank_is_raised_on_all_and_the_previous_checkpoint_is_whole(tmp_path: Path, how: str, words: str) -> None:
    for raised, found in pool(2).run(failing_job, tmp_path, how, timeout=60):
        assert re.match(rf"checkpoint {re.escape(str(tmp_path))}/step_000002 could not be written \({words}", raised), raised
        assert "earlier checkpoints are intact" in raised
        assert found[0] == 1
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
        checkpoint.save(directory, 2, state(2, rows=1 << 18))
    except CheckpointError as error:
        raised = str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    return raised, newest(directory)


def test_a_file_that_cannot_grow_leaves_the_previous_checkpoint_whole(tmp_path: Path) -> None:
    for raised, found in pool(2).run(full_disk_job, tmp_path, timeout=60):
        assert "could not be written (rank 1: " in raised
        assert found[0] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["step_000001"]


def interrupted_job(directory: Path) -> str:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with contextlib.ExitStack() as stack:
        if dist.get_rank() == 1:
            stack.enter_context(mock.patch.object(torch.distributed.checkpoint.FileSystemWriter, "write_data", interrupt))
        try:
            checkpoint.save(directory, 1, state(1))
        except KeyboardInterrupt:
            return "interrupted"
        except CheckpointError as error:
            return str(error)
    return ""


def test_an_interrupt_is_no_failure_to_write(tmp_path: Path) -> None:
    assert pool(2).run(interrupted_job, tmp_path, timeout=60) == ["interrupted"] * 2
    assert not checkpoint.checkpoints(tmp_path)


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
        newest(directory)
    except CheckpointError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(("name", "ranks"), [("__1_0.distcp", {1}), ("common.pt", {0, 1}), (".metadata", {0, 1})])
def test_a_damaged_file_is_told_on_every_rank(tmp_path: Path, name: str, ranks: set[int]) -> None:
    pool(2).run(save_job, tmp_path)
    file = tmp_path / "step_000001" / name
    file.write_bytes(file.read_bytes()[:100])
    for raised in pool(2).run(load_job, tmp_path, timeout=60):
        assert f"{tmp_path}/step_000001 cannot be read (" in raised
        assert {rank for rank in (0, 1) if f"rank {rank}: " in raised} == ranks
        assert "remove it" in raised


def test_unfinished_checkpoints_are_not_found(tmp_path: Path) -> None:
    for name in (".step_000009.tmp", "step_9", "step_000009.bak", "final"):
        (tmp_path / name).mkdir()
    assert checkpoint.checkpoints(tmp_path) == []
    assert checkpoint.checkpoints(tmp_path / "absent") == []


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.exhaustive)])
def test_a_resumed_run_continues_with_the_same_bits(tiny_checkpoint: Path, tmp_path: Path, dtype: str) -> None:
    """Two steps and two more are four: rollouts, log-probs, weights, optimizer, predictor, records."""
    common = ["preset=pr2", "pr2.alpha=3", "pr2.hold_back=false", f"model.dtype={dtype}", "checkpoint_every=2", "rollout.prompts=2"]
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


def layout_job(path: Path, run: Path, overrides: list[str], expert: int, resume: bool) -> dict[str, Any]:
    """A run on this many processes."""
    host.init(expert=expert)
    return train(path, run, overrides, resume=resume)


@pytest.fixture(scope="module")
def common() -> list[str]:
    return ["preset=pr2", "pr2.alpha=3", "pr2.hold_back=false", "checkpoint_every=2", "rollout.prompts=2"]


@pytest.fixture(scope="module")
def straight(tiny_checkpoint: Path, common: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[int, Any]:
    """Four steps in one go and the run directory, and two of them in another one, per number of processes."""
    runs = {}
    for processes in (1, 2):
        settings = [*common, f"parallel.processes={processes}", f"parallel.expert={processes}"]
        whole, cut = (tmp_path_factory.mktemp(name) / "run" for name in ("straight", "cut"))
        results = pool(processes).run(layout_job, tiny_checkpoint, whole, [*settings, "steps=4"], processes, False)
        pool(processes).run(layout_job, tiny_checkpoint, cut, [*settings, "steps=2"], processes, False)
        runs[processes] = results[0], whole, cut
    return runs


@pytest.mark.exhaustive
@pytest.mark.parametrize(("processes", "expert", "then", "then_expert"), [(2, 2, 1, 1), (2, 2, 2, 1), (1, 1, 2, 2)])
def test_a_run_resumes_in_another_layout(
    processes: int,
    expert: int,
    then: int,
    then_expert: int,
    tiny_checkpoint: Path,
    straight: dict[int, Any],
    common: list[str],
    tmp_path: Path,
) -> None:
    """The second half on another number of processes, or with the experts spread otherwise, is the one of the uninterrupted run."""
    expected, whole, cut = straight[processes]
    shutil.copytree(cut, tmp_path / "run")
    settings = [*common, "steps=4", f"parallel.processes={then}", f"parallel.expert={then_expert}"]
    resumed = pool(then).run(layout_job, tiny_checkpoint, tmp_path / "run", settings, then_expert, True)[0]
    assert [record["step"] for record in resumed["records"]] == [2, 3]
    bound = rounding(64, factor=32)  # of the first update; Adam divides by what may be small
    for record, wanted in zip(resumed["records"], expected["records"][2:], strict=True):
        assert record["reward"] == wanted["reward"]
        assert record["routes"]["sampled"] == wanted["routes"]["sampled"]
        for name in ("policy_loss", "grad_norm"):
            assert record[name] == pytest.approx(wanted[name], rel=bound, abs=bound), name
        for name in ("grad_norm", "weight_norm"):
            assert record["predictor"][name] == pytest.approx(wanted["predictor"][name], rel=bound), name
    one, other = (load_file(run / "final" / "model.safetensors") for run in (tmp_path / "run", whole))
    before = load_file(tiny_checkpoint / "model.safetensors")
    for name, weight in other.items():
        # Of what training has moved; a gradient that is almost zero makes Adam's step a matter of rounding.
        moved = float((weight - before[name]).abs().mean())
        assert float((one[name] - weight).abs().mean()) < 1e-3 * moved, name
