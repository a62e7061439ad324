"""examples/pretrain_gpt_pr2.py on the CPU: alone, on two processes, and with Megatron-LM's set-up functions."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.distributed import pool
from tests.integrations.test_megatron_lm import actions

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples/pretrain_gpt_pr2.py"
History = list[dict[str, float]]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The script as a user starts it."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    for name in ("RANK", "WORLD_SIZE"):
        environment.pop(name, None)
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


def example() -> Any:
    """The script as a module; it finds its neighbour as it does when it is started."""
    sys.path.insert(0, str(SCRIPT.parent))
    try:
        return importlib.import_module(SCRIPT.stem)
    finally:
        sys.path.remove(str(SCRIPT.parent))


def train_job(*arguments: str) -> History:
    return example().main(["--pr2-cpu", *arguments])


# ---- as a command --------------------------------------------------------------------------------------------------------


def test_it_trains_with_routes_that_were_recorded_once() -> None:
    done = run("--pr2-cpu", "--pr2-preset", "r2", "--train-iters", "6")
    assert done.returncode == 0, done.stderr
    assert [line.split(" |")[0] for line in done.stderr.splitlines()] == [f"iteration {i}/6" for i in range(1, 7)]
    last = json.loads(done.stdout)
    assert last["lm loss"] < 2.5  # from log(64) = 4.16
    # 16 sequences of 32 tokens, each in one update of four.
    assert last["replayed rows"] == 16 * 32
    # The routers have moved since the routes were recorded.
    assert 0.3 < last["pr2/agreement"] < 1.0


def test_help_teaches_every_flag() -> None:
    done = run("--help")
    assert done.returncode == 0
    assert done.stderr == ""
    text = " ".join(done.stdout.split())
    for name in ("--pr2-cpu", "--pr2-mini-steps", "--num-experts", "--moe-router-topk", "--expert-model-parallel-size"):
        assert name in text
    for action in actions().values():
        assert action.option_strings[0] in text
    assert "Routes are those of the weights before the first" in text
    assert "torchrun --nproc-per-node 2 examples/pretrain_gpt_pr2.py --pr2-cpu" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pr2-cpu"], "--pr2-preset pr2: its routes come from a rollout engine, and pretraining has none"),
        (["--pr2-cpu", "--pr2-preset", "r2", "--global-batch-size", "12"], "expected a multiple of 8 = --pr2-mini-steps 4"),
        (["--pr2-preset", "r2"], "Megatron-LM is not importable"),
    ],
)
def test_errors_say_what_to_do(arguments: list[str], message: str) -> None:
    done = run(*arguments)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr


# ---- on several processes ------------------------------------------------------------------------------------------------

SHORT = ("--train-iters", "3", "--pr2-sample-fraction", "1.0")
PREDICTED = ("--pr2-preset", "pr2", "--pr2-routes", "actor", "--no-pr2-hold-back", *SHORT)


def numbers(history: History) -> list[list[float]]:
    return [[row[name] for name in ("lm loss", "mini-step lm loss", "pr2/agreement", "pr2/kl_predicted")] for row in history]


@pytest.fixture(scope="module")
def alone() -> History:
    (history,) = pool(1).run(train_job, *PREDICTED)
    return history


def test_predicted_routes_are_recorded_and_learned_from(alone: History) -> None:
    assert [row["replayed rows"] for row in alone] == [512.0] * 3
    assert alone[0]["pr2/lift"] == 0.0  # nothing was learned before the first batch was recorded
    assert alone[-1]["pr2/lift"] != 0.0
    assert all(row["pr2/predictor/tokens"] > 0 for row in alone)
    assert alone[-1]["lm loss"] < alone[0]["lm loss"] - 1.0


def test_live_routes_are_not_replayed() -> None:
    (history,) = pool(1).run(train_job, "--pr2-preset", "grpo", "--train-iters", "1")
    assert history[0]["replayed rows"] == 0.0


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


@pytest.mark.parametrize("layout", ["--expert-model-parallel-size", "--pipeline-model-parallel-size"])
def test_layouts_that_start_from_other_weights(layout: str) -> None:
    """Megatron-Core seeds experts and stages by rank, so only the ranks can be compared."""
    first, second = pool(2).run(train_job, *PREDICTED, layout, "2")
    assert numbers(first) == numbers(second)
    assert first[-1]["lm loss"] < first[0]["lm loss"] - 1.0
    rows = [history[0]["replayed rows"] for history in (first, second)]
    # Each half of the data, or all of them for the layers of each stage.
    assert rows == ([256.0, 256.0] if "expert" in layout else [512.0, 512.0])


# ---- by Megatron-LM ------------------------------------------------------------------------------------------------------


class StandIn:
    """The functions of Megatron-LM (core_v0.16) that the script calls, on the host: their names, arguments and results."""

    def __init__(self, arguments: list[str]) -> None:
        self.arguments = arguments
        self.args: argparse.Namespace | None = None
        self.calls: list[str] = []

    def initialize_megatron(self, extra_args_provider: Any = None, args_defaults: Any = None) -> None:
        import pretrain_gpt_cpu

        self.calls.append("initialize_megatron")
        parser = pretrain_gpt_cpu.add_megatron_args(argparse.ArgumentParser())
        self.args = extra_args_provider(parser).parse_args(self.arguments)

    def get_args(self) -> argparse.Namespace:
        assert self.args is not None, "get_args() before initialize_megatron()"
        return self.args

    def core_transformer_config_from_args(self, args: argparse.Namespace, config_class: Any = None) -> Any:
        import pretrain_gpt_cpu

        self.calls.append("core_transformer_config_from_args")
        return pretrain_gpt_cpu.transformer_config(args)

    def setup_model_and_optimizer(self, model_provider: Any, model_type: Any, checkpointing_context: Any = None) -> Any:
        import pretrain_gpt_cpu

        self.calls.append(f"setup_model_and_optimizer {model_type.name}")

        def builder(_: argparse.Namespace, pre_process: bool, post_process: bool, config: Any) -> Any:
            return model_provider(pre_process=pre_process, post_process=post_process, vp_stage=None)

        return *pretrain_gpt_cpu.set_up(self.get_args(), builder), self

    def step(self, increment: int) -> None:
        """Of the learning rate's scheduler."""
        self.calls.append(f"scheduler {increment}")

    def modules(self) -> dict[str, ModuleType]:
        names = {
            "megatron.training": ["get_args"],
            "megatron.training.initialize": ["initialize_megatron"],
            "megatron.training.training": ["setup_model_and_optimizer"],
            "megatron.training.arguments": ["core_transformer_config_from_args"],
        }
        found = {}
        for name, functions in names.items():
            found[name] = ModuleType(name)
            for function in functions:
                setattr(found[name], function, getattr(self, function))
        return found


def megatron_lm_job() -> tuple[History, list[str]]:
    stand_in = StandIn([*PREDICTED])
    module = example()
    sys.modules.update(stand_in.modules())
    try:
        return module.main([]), stand_in.calls
    finally:
        for name in stand_in.modules():
            del sys.modules[name]


def test_the_same_script_on_megatron_lm(alone: History) -> None:
    """What it is given by Megatron-LM gives the same training; Megatron-LM itself is not installable here."""
    ((history, calls),) = pool(1).run(megatron_lm_job)
    assert numbers(history) == numbers(alone)
    assert calls[:3] == [
        "initialize_megatron", "setup_model_and_optimizer encoder_or_decoder", "core_transformer_config_from_args"
    ]  # fmt: skip
    assert calls[3:] == ["scheduler 4"] * 12
