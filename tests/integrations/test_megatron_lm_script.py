"""examples/pretrain_gpt_pr2.py by the megatron.training of the megatron-core package, on the CPU: alone and on two processes."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_pr2.errors import ConfigError
from tests.helpers.distributed import WorkerError, pool
from tests.helpers.releases import HAS_TRAINING
from tests.integrations.test_megatron_lm import actions

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples/pretrain_gpt_pr2.py"
History = list[dict[str, float]]


needs_training = pytest.mark.skipif(not HAS_TRAINING, reason="megatron-core before 0.17.1 has no megatron.training")


def run(*arguments: str, processes: int = 0) -> subprocess.CompletedProcess[str]:
    """The script as a user starts it.

    Args:
        processes: by torchrun; 0 for python alone.
    """
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH", ""))))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    for name in ("RANK", "WORLD_SIZE"):
        environment.pop(name, None)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes else []
    command = [sys.executable, *torchrun, str(SCRIPT), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


def last_row(done: subprocess.CompletedProcess[str]) -> dict[str, float]:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def example() -> Any:
    """The script as a module."""
    sys.path.insert(0, str(SCRIPT.parent))
    try:
        return importlib.import_module(SCRIPT.stem)
    finally:
        sys.path.remove(str(SCRIPT.parent))


def train_job(*arguments: str) -> History:
    """The script in a worker of the pool, which has a process group."""
    import torch.distributed as dist
    from megatron.training.training import destroy_global_state

    sys.argv = [str(SCRIPT), "--pr2-cpu", *arguments]
    os.environ.update(RANK=str(dist.get_rank()), WORLD_SIZE=str(dist.get_world_size()))
    try:
        return example().main()
    finally:
        destroy_global_state()


# ---- as a command --------------------------------------------------------------------------------------------------------


@needs_training
def test_it_trains_with_routes_that_were_recorded_once() -> None:
    done = run("--pr2-cpu", "--pr2-preset", "r2", "--train-iters", "24")
    last = last_row(done)
    rollouts = re.findall(r"^(iteration \d+/24) \| lm loss", done.stdout, re.MULTILINE)
    assert rollouts == [f"iteration {i}/24" for i in range(4, 25, 4)]
    assert last["lm loss"] < 2.5  # from log(64) = 4.16
    # 16 sequences of 32 tokens, each in one update of four.
    assert last["replayed rows"] == 16 * 32
    # The routers have moved since the routes were recorded.
    assert 0.3 < last["pr2/agreement"] < 1.0


def test_help_teaches_every_flag(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--help"])
    example().main()
    text = " ".join(capsys.readouterr().out.split())
    for action in actions().values():
        assert action.option_strings[0] in text
    assert "--pr2-cpu" in text
    assert "Routes are those of the weights before the first" in text
    assert "torchrun --nproc-per-node 2 examples/pretrain_gpt_pr2.py --pr2-cpu" in text


@needs_training
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--pr2-preset pr2: its routes come from a rollout engine, and pretraining has none"),
        (["--pr2-preset", "r2", "--train-iters", "6"], "--train-iters 6: expected a multiple of --pr2-mini-steps 4"),
        (["--pr2-preset", "r2", "--rotary-percent", "0.5"], "--rotary-percent: this example does not pass them on"),
    ],
)
def test_flags_that_it_refuses(arguments: list[str], message: str) -> None:
    with pytest.raises(WorkerError) as refused:
        pool(1).run(train_job, *arguments)
    assert message in str(refused.value)


@pytest.mark.parametrize("arguments", [[], ["--pr2-cpu"]])
def test_a_megatron_core_without_megatron_training(
    host_platform: None, arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.startswith("megatron.training.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "megatron.training", None)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--pr2-preset", "r2", *arguments])
    with pytest.raises(ConfigError, match=r"megatron.training is not importable.*has it from release 0\.17\.1 on"):
        example().main()


# ---- on several processes ------------------------------------------------------------------------------------------------

SHORT = ("--train-iters", "12", "--pr2-sample-fraction", "1.0")
PREDICTED = ("--pr2-preset", "pr2", "--pr2-routes", "actor", "--no-pr2-hold-back", *SHORT)


def numbers(history: History) -> list[list[float]]:
    return [[row[name] for name in ("lm loss", "mini-step lm loss", "pr2/agreement", "pr2/kl_predicted")] for row in history]


@pytest.fixture(scope="module")
def alone() -> History:
    (history,) = pool(1).run(train_job, *PREDICTED)
    return history


@needs_training
def test_predicted_routes_are_recorded_and_learned_from(alone: History) -> None:
    assert [row["replayed rows"] for row in alone] == [512.0] * 3
    assert alone[0]["pr2/lift"] == 0.0  # nothing was learned before the first batch was recorded
    assert alone[-1]["pr2/lift"] != 0.0
    assert all(row["pr2/predictor/tokens"] > 0 for row in alone)
    assert alone[-1]["lm loss"] < alone[0]["lm loss"] - 1.0


@needs_training
def test_live_routes_are_not_replayed() -> None:
    (history,) = pool(1).run(train_job, "--pr2-preset", "grpo", "--train-iters", "4")
    assert history[0]["replayed rows"] == 0.0


@needs_training
@pytest.mark.parametrize(
    "layout",
    [
        (),
        ("--tensor-model-parallel-size", "2", "--sequence-parallel"),
        ("--tensor-model-parallel-size", "2", "--sequence-parallel", "--recompute-granularity", "full",
         "--recompute-method", "uniform", "--recompute-num-layers", "1"),
    ],
    ids=["data", "tensor", "tensor-recomputed"],
)  # fmt: skip
def test_two_processes_give_the_numbers_of_one(alone: History, layout: tuple[str, ...]) -> None:
    for history in pool(2).run(train_job, *PREDICTED, *layout):
        for row, expected in zip(numbers(history), numbers(alone), strict=True):
            assert row == pytest.approx(expected, rel=2e-3, abs=1e-3)


@needs_training
@pytest.mark.parametrize("layout", ["--expert-model-parallel-size", "--pipeline-model-parallel-size"])
def test_layouts_that_start_from_other_weights(layout: str) -> None:
    """Megatron-Core seeds experts and stages by rank, so only the ranks can be compared."""
    first, second = pool(2).run(train_job, *PREDICTED, layout, "2")
    assert numbers(first) == numbers(second)
    assert first[-1]["lm loss"] < first[0]["lm loss"] - 1.0
    rows = [history[0]["replayed rows"] for history in (first, second)]
    # Each half of the data, or all of them for the layers of each stage.
    assert rows == ([256.0, 256.0] if "expert" in layout else [512.0, 512.0])


# ---- checkpoints ---------------------------------------------------------------------------------------------------------


@needs_training
def test_a_run_by_torchrun_goes_on_from_megatron_lms_checkpoint(tmp_path: Path) -> None:
    """On two processes: what two runs of 8 and 4 updates give is what one of 12 gives, to the last bit."""
    layout = ("--expert-model-parallel-size", "2")
    whole = last_row(run("--pr2-cpu", *PREDICTED, *layout, "--save", str(tmp_path), "--save-interval", "8", processes=2))
    newest = tmp_path / "latest_checkpointed_iteration.txt"
    assert newest.read_text() == "12"
    newest.write_text("8")
    for resumed in pool(2).run(train_job, *PREDICTED, *layout, "--load", str(tmp_path)):
        assert resumed == [whole]
    assert whole["pr2/lift"] != 0.0  # W_p was loaded, too
