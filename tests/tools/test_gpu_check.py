"""tools/gpu_check.py: skips everything without a GPU, isolates checks, reads pytest's reports and tells of them."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest
import torch
import typer
from typer.testing import CliRunner

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "gpu_check.py"


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_check", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


gpu_check = load()
NO_GPU = {"gpu": None, "driver": None, "torch": "2", "cuda": None, "date": "2026-01-02"} | dict.fromkeys(gpu_check.PACKAGES)
WITH_GPU = {**NO_GPU, "gpu": "1 x NVIDIA H200, 140 GiB", "driver": "580.1", "cuda": "13.0"}


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    # The tests run without a GPU wherever they run.
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    words = [sys.executable, str(TOOL), *arguments]
    return subprocess.run(words, capture_output=True, text=True, timeout=700, env=environment, check=False)


# ---- the command -----------------------------------------------------------------------------------------------------


def test_without_a_gpu_everything_is_skipped_with_a_reason(tmp_path: Path) -> None:
    document = tmp_path / "gpu.md"
    done = command("--markdown", str(document), "--timeout", "600", "--budget", "600")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    data = json.loads(lines[-1])
    assert data["gpu"] is None
    assert data["torch"] == torch.__version__
    checks = data["checks"]
    assert len(checks) == data["skipped"] == len(gpu_check.find_checks()) + len(gpu_check.ELSEWHERE)
    assert (data["ok"], data["failed"]) == (0, 0)
    for check in checks:
        assert check["status"] == "SKIP"
        assert check["detail"] == "needs a CUDA device"
    assert [line for line in lines if line.startswith("| invariants: i1")]
    assert len([line for line in lines if line.startswith("| ")]) == len(checks) + 2
    # Skips are no evidence: a table that a GPU gave is not replaced by them.
    assert not document.exists()
    assert f"{document} stays as it is" in done.stderr


def test_help_teaches_and_mistakes_are_explained() -> None:
    application = typer.Typer()
    application.command()(gpu_check.main)
    runner = CliRunner(env={"COLUMNS": "200", "TERM": "dumb"})
    told = runner.invoke(application, ["--help"])
    assert told.exit_code == 0
    for name in ("--only", "--markdown", "--timeout", "--budget", "--jobs", "Exit code 1"):
        assert name in told.output
    wrong = runner.invoke(application, ["--only", "warp drive"])
    assert wrong.exit_code == 2
    assert "no check has 'warp drive' in its name" in wrong.output
    partial = runner.invoke(application, ["--only", "fp8", "--markdown", "gpu.md"])
    assert partial.exit_code == 2
    assert "leave out --only" in partial.output


def test_checks_have_names_for_people() -> None:
    nodes = gpu_check.find_checks()
    titles = [gpu_check.title(node) for node in nodes]
    assert "invariants: i2 a learning predictor does not touch the policy" in titles
    assert len(set(titles)) == len(titles) >= 20
    for node in gpu_check.ELSEWHERE:
        file, name = node.split("::")
        assert f"def {name}(" in (ROOT / file).read_text(encoding="utf-8")


# ---- running ---------------------------------------------------------------------------------------------------------

CHECKS = {
    "test_good": "def test_first(record_property):\n    record_property('detail', 'ratio 1.05')\n\ndef test_second():\n    pass\n",
    "test_bad": "def test_fails():\n    assert 1 == 2, 'one is not two'\n",
    "test_dies": "import os\n\ndef test_ends_its_process():\n    os.abort()\n",
    "test_broken": "import no_such_module\n\ndef test_never_runs():\n    pass\n",
    "test_absent": "import pytest\n\n@pytest.mark.skip(reason='needs more')\ndef test_skips():\n    pass\n",
}


def test_no_check_stops_another(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nodes = []
    for name, source in CHECKS.items():
        (tmp_path / f"{name}.py").write_text(source)
        nodes += [f"{name}.py::{line[4:].split('(')[0]}" for line in source.splitlines() if line.startswith("def ")]
    results = gpu_check.run_all(nodes, isolated=True, jobs=2, timeout=200, budget=600, root=tmp_path)
    assert [result.check for result in results] == nodes
    status = {result.check.split("::")[1]: (result.status, result.detail) for result in results}
    assert status["test_first"] == ("OK", "ratio 1.05")
    assert status["test_second"] == ("OK", "")
    assert status["test_fails"][0] == "FAIL"
    assert "one is not two" in status["test_fails"][1]
    assert status["test_ends_its_process"][0] == "FAIL"
    assert "exit code -6" in status["test_ends_its_process"][1]
    assert status["test_never_runs"][0] == "FAIL"
    assert "no_such_module" in status["test_never_runs"][1]
    assert status["test_skips"] == ("SKIP", "needs more")
    assert capsys.readouterr().err.count("FAIL") == 3


HANGS = """import os, pathlib, subprocess, sys

def test_waits():
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    pathlib.Path("child").write_text(str(child.pid))
    child.wait()
"""


def test_a_check_that_hangs_is_stopped_with_all_that_it_started(tmp_path: Path) -> None:
    (tmp_path / "test_hangs.py").write_text(HANGS)
    seconds, child = 3.0, tmp_path / "child"
    while not child.exists():  # on a busy machine pytest may not have come as far
        seconds *= 2
        (result,) = gpu_check.run(["test_hangs.py::test_waits"], seconds, root=tmp_path)
        assert result.status == "FAIL"
        assert result.detail.startswith(f"stopped after {seconds:.0f} s without an end: ")
    with contextlib.suppress(psutil.NoSuchProcess):
        assert psutil.Process(int(child.read_text())).status() == psutil.STATUS_ZOMBIE


def test_a_budget_that_is_used_up_is_a_failure(tmp_path: Path) -> None:
    results = gpu_check.run_all(["test_a.py::test_b"], isolated=True, jobs=1, timeout=10, budget=0.0, root=tmp_path)
    assert [(result.status, result.detail) for result in results] == [("FAIL", "not started: the 0 s for all checks were used up")]


# ---- reading and telling ---------------------------------------------------------------------------------------------

JUNIT = """<?xml version="1.0" encoding="utf-8"?>
<testsuites><testsuite name="pytest" errors="1" failures="1" skipped="2" tests="6">
<testcase classname="tests.gpu.test_a" name="test_one[softmax]" time="1.5">
  <properties><property name="detail" value="off by 2e-06"/></properties></testcase>
<testcase classname="tests.gpu.test_a" name="test_one[groups]" time="0.5">
  <skipped type="pytest.skip" message="FP8 blockwise: not here">file:1</skipped></testcase>
<testcase classname="tests.gpu.test_a" name="test_two[3]" time="0.25">
  <failure message="AssertionError: gate | gradient&#10;second line">traceback</failure></testcase>
<testcase classname="tests.gpu.test_a" name="test_two[4]" time="0.25"/>
<testcase classname="tests.gpu.test_a" name="test_three" time="0.0">
  <skipped type="pytest.skip" message="needs a CUDA device">file:1</skipped></testcase>
<testcase classname="tests.gpu.test_a" name="test_four" time="0.1">
  <error message="failed on setup with &quot;RuntimeError: NCCL&quot;">traceback</error></testcase>
</testsuite></testsuites>"""
NODES = [f"tests/gpu/test_a.py::test_{name}" for name in ("one", "two", "three", "four", "five")]


@pytest.fixture
def results(tmp_path: Path) -> Any:
    junit = tmp_path / "junit.xml"
    junit.write_text(JUNIT)
    return gpu_check.read_junit(junit, NODES, otherwise="pytest ended with exit code 3: no output")


def test_reports_are_read(results: Any) -> None:
    assert [(result.status, result.seconds) for result in results] == [
        ("OK", 2.0), ("FAIL", 0.5), ("SKIP", 0.0), ("FAIL", 0.1), ("FAIL", 0.0)
    ]  # fmt: skip
    one, two, three, four, five = (result.detail for result in results)
    assert one == "1 cases; off by 2e-06; 1 skipped: FP8 blockwise: not here"
    assert two == "1 of 2: test_two[3]: AssertionError: gate | gradient"
    assert three == "needs a CUDA device"
    assert four == '1 of 1: test_four: failed on setup with "RuntimeError: NCCL"'
    assert five == "pytest ended with exit code 3: no output"


def test_a_report_that_is_not_there_or_cut_off_fails_every_check(tmp_path: Path) -> None:
    cut = tmp_path / "cut.xml"
    cut.write_text(JUNIT[:300])
    for file in (tmp_path / "absent.xml", cut):
        found = gpu_check.read_junit(file, NODES, otherwise="stopped after 9 s without an end: ...")
        assert {(result.status, result.detail) for result in found} == {("FAIL", "stopped after 9 s without an end: ...")}


def test_a_failure_is_told_and_is_exit_code_1(results: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = tmp_path / "gpu.md"
    document.write_text(f"# GPU\n\nBefore.\n\n{gpu_check.BEGIN}\nNot run yet.\n{gpu_check.END}\n\nAfter.\n")
    assert gpu_check.report(results, WITH_GPU, 61.2, document) == 1
    output = capsys.readouterr().out.splitlines()
    data = json.loads(output[-1])
    assert (data["ok"], data["failed"], data["skipped"], data["seconds"]) == (1, 3, 1, 61.2)
    assert data["gpu"] == "1 x NVIDIA H200, 140 GiB"
    assert data["checks"][1]["status"] == "FAIL"
    assert data["checks"][1]["node"] == NODES[1]
    assert output[-2] == "1 OK, 3 failed, 1 skipped in 61 s"
    row = "| a: two | FAIL | 0.5 | 1 of 2: test_two[3]: AssertionError: gate \\| gradient |"
    assert row in output
    text = document.read_text()
    assert text.startswith("# GPU\n\nBefore.\n\n")
    assert text.endswith("\n\nAfter.\n")
    assert "Not run yet" not in text
    assert row in text
    assert "1 x NVIDIA H200, 140 GiB; driver 580.1; torch 2, cuda 13.0, megatron core not installed" in text
    assert "2026-01-02" in text
    # Again: what is there is replaced, nothing else.
    assert gpu_check.report([r for r in results if r.status != "FAIL"], WITH_GPU, 3.0, document) == 0
    assert document.read_text().count(gpu_check.BEGIN) == document.read_text().count("| Check |") == 1


def test_a_table_goes_nowhere_where_it_has_no_place(tmp_path: Path, results: Any) -> None:
    document = tmp_path / "readme.md"
    document.write_text("# Something else\n")
    with pytest.raises(typer.BadParameter, match="has no <!-- gpu_check: begin -->"):
        gpu_check.report(results, WITH_GPU, 1.0, document)
    assert document.read_text() == "# Something else\n"
    new = tmp_path / "new.md"
    gpu_check.report(results, WITH_GPU, 1.0, new)
    assert new.read_text().startswith(gpu_check.BEGIN)


# ---- the documentation -----------------------------------------------------------------------------------------------


def test_the_document_knows_every_file_of_checks() -> None:
    text = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
    assert text.count(gpu_check.BEGIN) == text.count(gpu_check.END) == 1
    for file in sorted((ROOT / "tests" / "gpu").glob("test_*.py")):
        assert f"`{file.name}`" in text, file.name
    for option in ("CUBLAS_WORKSPACE_CONFIG", "NVTE_ALLOW_NONDETERMINISTIC_ALGO", "use_deterministic_algorithms"):
        assert option in text
