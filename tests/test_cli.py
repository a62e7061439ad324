"""The command line as a person and as a program meet it: help, pages, plans, plain refusals, and JSON in the last line."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from megatron_pr2.cli import app
from megatron_pr2.plan.models import MODELS
from megatron_pr2.report.metrics_log import MetricsLog
from megatron_pr2.routes.files import save_routes
from megatron_pr2.routes.table import RouteTable
from tests.helpers.ids import random_ids
from tests.report import synthetic

COMMANDS = ("train", "report", "doctor", "plan")
LAYOUT = ("--tp", "2", "--ep", "4", "--dp", "4")


def invoke(*arguments: str | Path) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})
    return result.exit_code, result.output


def last_line(*arguments: str | Path) -> dict[str, Any]:
    """The JSON object that a successful command prints last."""
    code, output = invoke(*arguments)
    assert code == 0, output
    found: dict[str, Any] = json.loads(output.splitlines()[-1])
    return found


def refused(*arguments: str | Path) -> str:
    """What a refused command says: one message, no traceback, exit code 1."""
    code, output = invoke(*arguments)
    assert code == 1, output
    assert "Traceback" not in output
    assert output.startswith("error: ")
    return output.removeprefix("error: ").strip()


# ---- help ------------------------------------------------------------------------------------------------------------


def test_the_commands_are_these() -> None:
    assert set(typer.main.get_command(app).commands) == set(COMMANDS)  # type: ignore[attr-defined]
    code, output = invoke("--help")
    assert code == 0
    assert all(command in output for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches_by_an_example(command: str) -> None:
    code, output = invoke(command, "--help")
    assert code == 0
    assert f"megatron-pr2 {command} " in output
    options = typer.main.get_command(app).commands[command].params  # type: ignore[attr-defined]
    assert options
    for option in options:
        assert option.help, f"{command} {option.name} has no help"


def test_plan_help_names_every_built_in_model() -> None:
    assert all(name in invoke("plan", "--help")[1] for name in MODELS)


def test_the_module_is_the_command() -> None:
    environment = {**os.environ, "COLUMNS": "200"}
    done = subprocess.run(
        [sys.executable, "-m", "megatron_pr2.cli", "--help"], capture_output=True, text=True, check=True, env=environment
    )
    assert "Usage" in done.stdout
    assert "plan" in done.stdout


# ---- report ----------------------------------------------------------------------------------------------------------


def make_run(directory: Path, preset: str) -> Path:
    with MetricsLog(directory) as log:
        for record in synthetic.run(6, preset=preset):
            log.append(record)
    (directory / "config.yaml").write_text(f"preset: {preset}\nseed: 0\n", encoding="utf-8")
    return directory


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("runs")
    return [make_run(root / preset, preset) for preset in ("r3", "pr2")]


@pytest.fixture(scope="module")
def route_files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("routes")
    for seed, name in enumerate(("engine", "actor")):
        tables = {i: RouteTable.from_ids(random_ids(12, 3, 2, 8, seed=10 * seed + i), 8) for i in range(3)}
        save_routes(root / f"{name}.safetensors", tables)
    return [root / "engine.safetensors", root / "actor.safetensors"]


def test_one_run(runs: list[Path], tmp_path: Path) -> None:
    found = last_line("report", runs[1])
    assert found["report"] == str(runs[1] / "report.html")
    assert (found["preset"], found["steps"]) == ("pr2", 6)
    assert "<html" in Path(found["report"]).read_text(encoding="utf-8")
    page = tmp_path / "elsewhere.html"
    assert last_line("report", runs[1], "--output", page)["report"] == str(page)
    last_line("report", runs[1], "--output", page, "--baseline", runs[0])
    assert f"Against {runs[0].name}, over" in page.read_text(encoding="utf-8")
    assert page.stat().st_size > 10_000


def test_several_runs(runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = last_line("report", *runs)
    assert found == {"runs": [str(run) for run in runs], "report": "comparison.html"}
    text = (tmp_path / "comparison.html").read_text(encoding="utf-8")
    assert "r3" in text
    assert "pr2" in text
    page = tmp_path / "deep" / "page.html"
    assert last_line("report", *runs, "--output", page)["report"] == str(page)
    assert page.is_file()


def test_saved_routes(route_files: list[Path], tmp_path: Path) -> None:
    found = last_line("report", "--routes", route_files[0])
    assert found["routes"] == [str(route_files[0])]
    assert "<html" in Path(found["report"]).read_text(encoding="utf-8")
    page = tmp_path / "both.html"
    both = last_line("report", "--routes", route_files[0], "--routes", route_files[1], "--output", page)
    assert both == {"routes": [str(file) for file in route_files], "report": str(page)}
    assert page.stat().st_size > 1000


def test_reports_that_cannot_be_made(runs: list[Path], route_files: list[Path], tmp_path: Path) -> None:
    assert refused("report").startswith("nothing to report on; expected one or more run directories, or --routes FILE")
    assert refused("report", runs[0], "--routes", route_files[0]).startswith("both runs and --routes; expected one or more")
    assert refused("report", tmp_path / "none") == f"{tmp_path / 'none'}: no such run directory"
    assert refused("report", runs[0], tmp_path / "none") == f"{tmp_path / 'none'}: no such run directory"
    assert refused("report", "--routes", tmp_path / "none") == f"--routes {tmp_path / 'none'}: no such file"
    assert refused("report", runs[0], "--baseline", tmp_path / "none") == f"{tmp_path / 'none'}: no such run directory"
    for arguments in ((*runs[:2],), ("--routes", route_files[0])):
        assert refused("report", *arguments, "--baseline", runs[0]).startswith("--baseline goes with one run")
    assert "metrics.jsonl" in refused("report", tmp_path)
    assert "metrics.jsonl" in refused("report", runs[0], tmp_path)
    assert "page.html" in refused("report", "--routes", make_text(tmp_path / "page.html"))
    three = ["--routes", route_files[0]] * 3
    assert "expected one, or two" in refused("report", *three)
    in_the_way = make_text(tmp_path / "file") / "page.html"
    for arguments in ([runs[0]], runs, ["--routes", route_files[0]]):
        assert refused("report", *arguments, "--output", in_the_way).startswith("the page could not be written: ")


def make_text(path: Path) -> Path:
    path.write_text("no routes", encoding="utf-8")
    return path


# ---- plan ------------------------------------------------------------------------------------------------------------


def test_a_plan_is_a_table_and_then_json() -> None:
    code, output = invoke("plan", "--model", "deepseek-v3", *LAYOUT, "--pp", "2", "--first-stage", "31", "--batch", "64")
    assert code == 0, output
    for words in (
        "deepseek-v3: 58 MoE layers (and 3 dense, 1 multi-token-prediction head not counted), hidden 7168, top-8 of 256 experts",
        "16 ranks: TP 2 x PP 2 x CP 1 x DP 4, experts EP 4 x ETP 2; 4 ranks (a replica) train the same sequences",
        "predictor: W_p",
        "route tables",
        "predictor gradient, all-reduced (ring)",
    ):
        assert words in output, words
    *_, text = output.splitlines()
    found = json.loads(text)
    assert f"largest: rank {found['largest']['rank']}" in output
    assert found["layout"]["moe_layers_per_stage"] == [28, 30]
    assert found["layout"]["world"] == 16
    assert found["sequences_per_replica"] == [16, 16]
    # What is shown is what the JSON says.
    held = found["total"]["memory"]
    assert found["total"]["device_bytes"] + found["total"]["host_bytes"] == sum(held.values())
    assert held["weight"] == 58 * 256 * 7168 * 4 * 8
    assert found["total"]["moved"]["gates_pushed"] == 58 * 256 * 7168 * 2


def test_json_alone() -> None:
    code, output = invoke("plan", "--model", "mixtral-8x7b", "--json")
    assert code == 0
    assert len(output.splitlines()) == 1
    assert json.loads(output)["model"]["score_function"] == "softmax"


def test_every_option_of_a_plan_counts() -> None:
    """None of them is read and forgotten."""
    base = ("--model", "qwen3-30b-a3b", "--tp", "2", "--ep", "2", "--pp", "2", "--dp", "4", "--json")
    plain = last_line("plan", *base)
    changes = (
        ("--model", "mixtral-8x7b"), ("--tp", "4"), ("--pp", "4"), ("--ep", "4"), ("--cp", "2"), ("--dp", "8"), ("--etp", "1"),
        ("--vpp", "2"), ("--first-stage", "20"), ("--last-stage", "20"), ("--pipeline-layout", "Et*20|t*28L"), ("--batch", "128"),
        ("--seq", "4096"), ("--prompt", "512"), ("--mini-steps", "2"), ("--micro-batch", "2"), ("--log-prob-micro-batch", "4"),
        ("--padded",), ("--horizons", "3"), ("--predictor", "momentum"), ("--no-hold-back",), ("--sample-fraction", "0.02"),
        ("--predictor", "none"), ("--predictor", "none", "--no-drift"),
        ("--feature-bytes", "1000000000"), ("--feature-device", "cpu"), ("--route-delivery", "local"),
    )  # fmt: skip
    for change in changes:
        assert last_line("plan", *base, *change) != plain, change
    of_three = last_line("plan", *base, "--horizons", "3")["total"]["memory"]
    old_gates = plain["total"]["memory"]["weight"] // 2  # bf16, once for all
    assert of_three == {**plain["total"]["memory"], "pushes": 3 * (plain["total"]["memory"]["pushes"] - old_gates) + old_gates}
    # 46 layers and two places make 48: the stages differ by what they leave out.
    counted = last_line("plan", "--model", "deepseek-v3", "--pp", "3", "--count-embedding", "--count-loss", "--json")
    assert counted["layout"]["moe_layers_per_stage"] == [17, 21, 20]
    assert last_line("plan", "--model", "mixtral-8x7b", "--tp", "2", "--world", "8", "--json")["layout"]["dp"] == 4


def test_the_sample_fraction_follows_from_the_budget() -> None:
    arguments = ("plan", "--model", "qwen3-30b-a3b", "--batch", "64", "--seq", "8192")
    code, output = invoke(*arguments)
    assert code == 0
    assert "features of 0.037 of the response tokens (feature_bytes=4.0 GiB has no room for 0.125)" in " ".join(output.split())
    found = json.loads(output.splitlines()[-1])
    assert (4 << 30) - 221_184 < found["largest"]["memory"]["features"] <= 4 << 30
    assert found["sample_fraction"] == pytest.approx(0.037, abs=0.001)
    assert last_line(*arguments, "--sample-fraction", "0.03")["sample_fraction"] == 0.03
    # Without router inputs nine times as many tokens fit.
    code, output = invoke(*arguments, "--predictor", "none")
    assert json.loads(output.splitlines()[-1])["sample_fraction"] == 0.125
    assert "features of 0.125 of the response tokens; predictor none" in " ".join(output.split())


def test_plans_that_are_refused() -> None:
    """By the words of training, in one line."""
    assert refused("plan", "--model", "qwen3-30b-a3b", "--tp", "2", "--no-sequence-parallel").startswith(
        "tensor_model_parallel_size=2 with sequence_parallel=False: Megatron-Core does not train MoE layers like that"
    )
    assert "num_layers=61 is not a multiple of" in refused("plan", "--model", "deepseek-v3", "--pp", "4")
    assert refused("plan", "--model", "gpt-2").startswith("--model gpt-2: no such model; expected qwen3-30b-a3b,")
    assert refused("plan", "--model", "mixtral-8x7b", "--seq", "0") == "seq=0: expected at least 1"
    assert refused("plan", "--model", "mixtral-8x7b", "--predictor", "lucky").startswith("pr2.predictor='lucky': expected one of")
    assert refused("plan", "--model", "mixtral-8x7b", "--sample-fraction", "2").startswith("pr2.sample_fraction=2.0")
    assert refused("plan", "--model", "mixtral-8x7b", "--route-delivery", "post").startswith("pr2.route_delivery='post'")


def test_the_documented_plan_is_true() -> None:
    """docs/plan.md: the command prints the tables, and the Python example its numbers."""
    text = (Path(__file__).parents[1] / "docs/plan.md").read_text(encoding="utf-8")
    shell, tables, python = (
        re.search(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL).group(1)  # type: ignore[union-attr]
        for language in ("bash", "text", "python")
    )
    program, *arguments = shlex.split(shell)
    assert program == "megatron-pr2"
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "120"})
    assert [line.rstrip() for line in result.output.splitlines()[:-1]] == tables.splitlines()
    code, *shown = re.split(r"^(?=made\.)", python, flags=re.MULTILINE)
    names: dict[str, Any] = {}
    exec(code, names)
    assert len(shown) == 3
    for line in shown:
        expression, _, value = line.partition("#")
        assert repr(eval(expression, names)) == value.strip()
    options = {name for row in re.findall(r"^\| `(--[^|]*)` \|", text, re.MULTILINE) for name in row.split()}
    known = {option.opts[0] for option in typer.main.get_command(app).commands["plan"].params}  # type: ignore[attr-defined]
    # Refused wherever it matters.
    assert options == known - {"--world", "--sequence-parallel"}
