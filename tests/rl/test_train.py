"""The whole job as a user runs it: `megatron-pr2 train` in its own processes, interrupted, resumed, and fed bad input."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from megatron_pr2.cli import app
from tests.helpers.distributed import pool
from tests.helpers.loop import train_job
from tests.helpers.rounding import LOGPROB

pytestmark = pytest.mark.slow

GSM8K = Path(__file__).resolve().parents[3] / "shared" / "data" / "gsm8k_test.jsonl"
# Small enough for a step in about a second; off-2, so that the predictor learns in every step.
SMALL = (
    "rollout.prompts=4", "rollout.responses=4", "rollout.max_new_tokens=6", "algorithm.mini_steps=2",
    "algorithm.micro_batch_size=4", "pr2.sample_fraction=1.0", "optimizer.lr=1e-3",
)  # fmt: skip
# What a step measures on the clock; everything else must be reproduced to the last bit.
CLOCKED = {"wall_seconds", "seconds", "cpu_seconds", "tokens_per_second", "rollout_tokens_per_second", "handshake"}


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Single digits: a random policy guesses some of them."""
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{a}+{b}=", "answer": str(a + b)}) + "\n" for a in range(4) for b in range(4)))
    return path


def start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "megatron_pr2.cli", "train", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        cwd=Path(__file__).resolve().parents[2],
    )


def finish(process: subprocess.Popen[str], timeout: float = 240.0) -> tuple[int, str]:
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.returncode, output


def train(*arguments: str, keep: Path | None = None) -> dict[str, Any]:
    """The JSON object that a successful run prints last.

    Args:
        keep: file for all that it prints.
    """
    code, output = finish(start(*arguments))
    assert code == 0, output
    if keep is not None:
        keep.write_text(output)
    result: dict[str, Any] = json.loads(output.strip().splitlines()[-1])
    return result


def refused(*arguments: str) -> str:
    """What a run prints that is refused before any rank is started; in this process, because it starts none."""
    result = CliRunner().invoke(app, ["train", *arguments])
    assert result.exit_code == 1, result.output
    assert "Traceback" not in result.output
    return result.output


def records(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in CLOCKED} for line in lines]


def wait_for(run: Path, steps: int, process: subprocess.Popen[str]) -> None:
    """Until `steps` records are logged; the run is then in the middle of the next step."""
    file = run / "metrics.jsonl"
    deadline = time.monotonic() + 180
    while not file.exists() or file.read_bytes().count(b"\n") < steps:
        assert process.poll() is None, process.stdout.read() if process.stdout else ""
        assert time.monotonic() < deadline, "the run makes no progress"
        time.sleep(0.05)


def settings(checkpoint: Path, prompts: Path, run: Path) -> list[str]:
    return [f"model.path={checkpoint}", f"run={run}", "--data", str(prompts), *SMALL, "checkpoint_every=2"]


@pytest.fixture(scope="module")
def uninterrupted(tiny_checkpoint: Path, prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight steps in one go, for comparison."""
    run = tmp_path_factory.mktemp("straight") / "run"
    result = train(*settings(tiny_checkpoint, prompts, run), "steps=8", keep=run.with_name("output"))
    assert result["steps"] == 8
    assert result["preset"] == "pr2"
    return run


def test_a_run_leaves_what_it_promises(uninterrupted: Path) -> None:
    assert (uninterrupted / "report.html").stat().st_size > 10_000
    assert (uninterrupted / "environment.json").exists()
    assert list((uninterrupted / "tensorboard").iterdir())
    assert len(list((uninterrupted / "checkpoints").iterdir())) == 2
    logged = records(uninterrupted)
    assert [r["step"] for r in logged] == list(range(8))
    assert all(r["routes"]["missing"] == 0 for r in logged)
    assert logged[-1]["predictor"]["weight_norm"] > 0
    assert all(m["agreement"] == 1.0 for m in logged[0]["mini_steps"][:1]), "nothing has moved in the first mini-step"


def test_a_run_prints_no_warnings(uninterrupted: Path) -> None:
    """Of libraries about each other's deprecated names, for one: there used to be two for every step and rank."""
    printed = uninterrupted.with_name("output").read_text().splitlines()
    assert [line for line in printed if re.search("warning|deprecated", line, re.IGNORECASE)] == []


def test_transformers_generates_from_the_final_checkpoint(uninterrupted: Path, tiny_checkpoint: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(uninterrupted / "final")
    tokenizer = AutoTokenizer.from_pretrained(uninterrupted / "final")
    output = model.generate(**tokenizer("1+2=", return_tensors="pt"), max_new_tokens=4)
    assert output.shape[1] > 4
    before, after = (load_file(p / "model.safetensors") for p in (tiny_checkpoint, uninterrupted / "final"))
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("how", ["ctrl-c", "kill -9"])
def test_an_interrupted_run_continues_with_the_same_numbers(
    how: str, uninterrupted: Path, tiny_checkpoint: Path, prompts: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    arguments = [*settings(tiny_checkpoint, prompts, run), "steps=8"]
    process = start(*arguments)
    wait_for(run, 5, process)
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    if how == "ctrl-c":
        os.killpg(process.pid, signal.SIGINT)
        code, output = finish(process)
        assert code != 0, output
    else:
        for member in family:
            member.kill()
        finish(process)
    _, alive = psutil.wait_procs(family, timeout=20)
    assert not alive, "a rank outlived its run"
    assert not (run / "final").exists(), "the interruption came too late to test anything"
    train(*arguments)
    assert records(run) == records(uninterrupted)
    one, other = (load_file(r / "final" / "model.safetensors") for r in (run, uninterrupted))
    assert all(torch.equal(one[name], other[name]) for name in other)


PRESETS = ("grpo", "r2", "r3", "pr2")


def test_every_preset_runs(tiny_checkpoint: Path, prompts: Path, tmp_path: Path) -> None:
    """The loop without the command around it; the other tests here have both, with preset pr2."""
    runs = [(tmp_path / preset, [*SMALL, "steps=2", f"preset={preset}"], False) for preset in PRESETS]
    for results in pool(2).run(train_job, tiny_checkpoint, runs, prompts):
        for preset, result in zip(PRESETS, results, strict=True):
            assert [record["preset"] for record in result["records"]] == [preset] * 2
            assert all(record["routes"]["missing"] == 0 for record in result["records"])
            assert (result["predictor"] > 0) == (preset == "pr2")
    assert all((tmp_path / preset / "final" / "model.safetensors").is_file() for preset in PRESETS)


def test_each_mini_step_has_routers_of_its_own(tiny_checkpoint: Path, prompts: Path, tmp_path: Path) -> None:
    """With a look-ahead and a group for each mini-step the first is r3, and later ones are predicted, more the later."""
    fast = [*SMALL, "optimizer.lr=0.03"]  # so that routes drift within a few updates
    ahead = [*fast, "steps=3", "pr2.predictor=lookahead", "pr2.hold_back=false"]
    runs = [
        (tmp_path / "groups", [*ahead, "rollout.groups=0"], False),
        (tmp_path / "one", [*ahead, "rollout.groups=1"], False),
        (tmp_path / "r3", [*fast, "steps=1", "preset=r3"], False),
    ]
    for groups, one, r3 in pool(2).run(train_job, tiny_checkpoint, runs, prompts):
        # Before the first look-ahead nothing is predicted: r3, bit by bit.
        for name in ("rollouts", "samples", "weights", "optimizer"):
            assert one[name][: len(r3[name])] == r3[name]
        for record in groups["records"][1:]:
            assert record["mini_steps"][0]["lift"] == 0.0
            assert record["routes"]["missing"] == 0
        assert any(entry["lift"] for record in groups["records"][1:] for entry in record["mini_steps"][1:])
        assert any(record["mini_steps"][0]["lift"] < 0.0 for record in one["records"][1:])
        assert groups["predictor"] > 0


@pytest.mark.sglang
def test_a_killed_engine_is_restarted_and_routes_follow_merged_gates(tiny_checkpoint: Path, prompts: Path, tmp_path: Path) -> None:
    """Real SGLang: killed in the middle of a run, which goes on; and I7 after a restart with a predictor that has learned.

    Then Transformers loads the checkpoint as a user would.
    """
    run = tmp_path / "run"
    arguments = [*settings(tiny_checkpoint, prompts, run), "rollout.engine=sglang", "checkpoint_every=1"]
    process = start(*arguments, "steps=4")
    wait_for(run, 1, process)
    family = psutil.Process(process.pid).children(recursive=True)
    server = [member for member in family if "sglang" in " ".join(member.cmdline())]
    assert server, "no server is running"
    for member in server:
        member.kill()
    code, output = finish(process)
    assert code == 0, output
    # Found dead before the next push, or in the middle of something.
    assert "is lost and is restarted" in output or "restarting the engine" in output
    assert [r["step"] for r in records(run)] == [0, 1, 2, 3]
    train(*arguments, "steps=5")
    _, alive = psutil.wait_procs(server, timeout=20)
    assert not alive
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert logged[3]["predictor"]["weight_norm"] > 0
    # The handshake of the second start compares the engine's routes under W + W_p with the actor's own, in fp32.
    assert logged[4]["handshake"]["route_agreement"] == 1.0
    assert logged[4]["handshake"]["logprob_max"] < LOGPROB
    assert all(r["routes"]["missing"] == 0 for r in logged)
    code = f"from transformers import AutoModelForCausalLM; print(AutoModelForCausalLM.from_pretrained({str(run / 'final')!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Qwen3MoeForCausalLM" in done.stdout


@pytest.mark.sglang
@pytest.mark.parametrize("groups", ["rollout.groups=turns", "rollout.groups=0 rollout.engines=2"])
def test_servers_have_routers_for_each_mini_step(groups: str, tiny_checkpoint: Path, prompts: Path, tmp_path: Path) -> None:
    """Real SGLang, two servers or one that takes turns: the handshake proves every set of gates, and mini-step 1 is r3."""
    run = tmp_path / "run"
    ahead = ["optimizer.lr=0.03", "pr2.predictor=lookahead", "pr2.hold_back=false", "rollout.engine=sglang", *groups.split()]
    train(*settings(tiny_checkpoint, prompts, run), *ahead, "steps=3")
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    gates = 2 * 8 * 32 * 4
    for record in logged:
        assert record["mini_steps"][0]["lift"] == 0.0
        assert record["handshake"]["route_agreement"] == 1.0
        assert record["rollout"]["other_horizon"] == 0
        assert record["routes"]["missing"] == 0
        assert record["bytes"]["gates"] == 2 * gates  # layers x experts x hidden x 4, for each horizon
        assert record["bytes"]["weights"] == logged[0]["bytes"]["weights"] > gates
    assert any(record["mini_steps"][1]["lift"] for record in logged[1:])


@pytest.mark.skipif(not GSM8K.exists(), reason="the GSM8K file is not beside the repository")
def test_gsm8k_as_published_runs_through_the_loop(tiny_checkpoint: Path, tmp_path: Path) -> None:
    sizes = [
        "steps=1", "rollout.prompts=2", "rollout.responses=2", "rollout.max_new_tokens=4", "algorithm.mini_steps=2",
        "algorithm.micro_batch_size=2",
    ]  # fmt: skip
    results = pool(2).run(train_job, tiny_checkpoint, [(tmp_path / "run", sizes, False)], GSM8K)
    (record,) = results[0][0]["records"]
    assert record["routes"]["tokens"] > 200, "whole questions went through"


def test_other_settings_in_the_same_directory_are_refused(uninterrupted: Path, tiny_checkpoint: Path, prompts: Path) -> None:
    assert "optimizer.lr" in refused(*settings(tiny_checkpoint, prompts, uninterrupted), "steps=10", "optimizer.lr=1")
    assert len(records(uninterrupted)) == 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["stepz=3"], "stepz"),
        (["preset=grpo", "pr2.predictor=learned"], "pr2.routes='live'"),
        (["rollout.urls=[http://127.0.0.1:1]"], "rollout.engine=sglang"),
        (["--data", "/nonexistent.jsonl"], "nonexistent.jsonl"),
        (["--config", "/nonexistent.yaml"], "nonexistent.yaml"),
        (["model.path=/nonexistent"], "nonexistent"),
    ],
)
def test_bad_settings_end_in_one_clear_line(arguments: list[str], message: str, tmp_path: Path) -> None:
    assert message in refused(f"run={tmp_path / 'run'}", "model.path=.", *arguments)


def test_a_line_without_answer_is_named(tiny_checkpoint: Path, tmp_path: Path) -> None:
    data = tmp_path / "bad.jsonl"
    data.write_text('{"prompt": "1+1=", "answer": "2"}\n{"prompt": "1+2="}\n')
    assert f"{data}:2" in refused(f"model.path={tiny_checkpoint}", f"run={tmp_path / 'run'}", "--data", str(data))


def test_a_dense_checkpoint_is_refused(host_platform: None, tmp_path: Path, prompts: Path) -> None:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from megatron_pr2.rl.tiny import VOCAB_SIZE, save_byte_tokenizer

    config = Qwen3Config(
        vocab_size=VOCAB_SIZE + 5, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=16,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(tmp_path / "dense")
    save_byte_tokenizer(tmp_path / "dense")
    output = refused(f"model.path={tmp_path / 'dense'}", f"run={tmp_path / 'run'}", "--data", str(prompts))
    assert "mixture-of-experts" in output
