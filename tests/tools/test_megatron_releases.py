"""tools/megatron_releases.py: what it reads from a run of pytest, what it compares between releases, and what fails."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("megatron_releases", ROOT / "tools/megatron_releases.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def numbers(**changes: float) -> dict[str, dict[str, torch.Tensor]]:
    """What tests.parallel.reference saves, each kind with one tensor whose largest entry is 4."""
    kinds = ("policy", "predictor", "logprobs")
    return {kind: {"w": torch.tensor([4.0, 1.0 + changes.get(kind, 0.0)]), "idle": torch.zeros(2)} for kind in kinds}


def test_tests_on_the_list_exist(tool: ModuleType) -> None:
    for test in tool.TESTS:
        file, _, function = test.partition("::")
        assert f"def {function}" in (ROOT / file).read_text(encoding="utf-8"), test


def test_outcomes_are_counted_by_file(tool: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(
        "import pytest\n"
        "def test_one(): pass\n"
        "def test_two(): assert False\n"
        "@pytest.mark.skip\n"
        "def test_three(): pass\n"
        "@pytest.fixture\n"
        "def broken(): raise OSError\n"
        "def test_four(broken): pass\n"
    )
    report = tmp_path / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "junit_family=xunit1", f"--junitxml={report}"]
    subprocess.run([*command, "test_some.py"], cwd=tmp_path, capture_output=True, check=False)
    assert tool.counts(report) == {"test_some.py": {"passed": 1, "failed": 2, "skipped": 1}}


def test_numbers_are_compared_with_the_oldest_release(tool: ModuleType, tmp_path: Path) -> None:
    torch.save(numbers(), tmp_path / "0.9.1.pt")
    torch.save(numbers(policy=0.5), tmp_path / "0.16.1.pt")
    lost = numbers()
    del lost["logprobs"]["w"]
    torch.save(lost, tmp_path / "0.17.1.pt")
    found = tool.deviations(tmp_path)
    assert list(found) == ["0.9.1", "0.16.1", "0.17.1"]
    assert found["0.16.1"] == {"policy": 0.125, "predictor": 0.0, "logprobs": 0.0}
    assert found["0.17.1"]["logprobs"] == float("inf")


def test_the_table_names_what_did_not_run(tool: ModuleType, tmp_path: Path) -> None:
    result = {"files": {tool.file_of(tool.TESTS[0]): {"passed": 3, "failed": 1}}, "commit": "abc", "python": "3.12", "torch": "2"}
    (tmp_path / "0.17.1.json").write_text(json.dumps(result))
    torch.save(numbers(), tmp_path / "0.16.1.pt")
    lines = tool.table(tmp_path).splitlines()
    assert f"| `{tool.file_of(tool.TESTS[0])}` | not run | 3 passed, 1 failed |" in lines
    assert f"| `{tool.file_of(tool.TESTS[1])}` | not run | not run |" in lines
    assert "| commit | not run | abc |" in lines


@pytest.mark.parametrize(
    ("status", "files", "deviates", "passes"),
    [
        (0, "all", 0.0, True),
        (1, "all", 0.0, False),
        (0, "all but one", 0.0, False),
        (0, "all", 1.0, False),
    ],
    ids=["passes", "a test fails", "a file ran no test", "other numbers"],
)
def test_what_fails(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int, files: str, deviates: float, passes: bool
) -> None:
    """pytest and the reference run are replaced by what they leave behind."""
    torch.save(numbers(), tmp_path / "0.16.1.pt")
    names = list(dict.fromkeys(map(tool.file_of, tool.TESTS)))[0 if files == "all" else 1 :]

    def leave(command: list[str], **settings: object) -> subprocess.CompletedProcess[str]:
        if "pytest" in command:
            cases = "".join(f'<testcase file="{name}"/>' for name in names)
            (tmp_path / "0.17.1.xml").write_text(f"<testsuite>{cases}</testsuite>")
        elif "tests.parallel.reference" in command:
            torch.save(numbers(policy=deviates), tmp_path / "0.17.1.pt")
        return subprocess.CompletedProcess(command, status if "pytest" in command else 0, "")

    monkeypatch.setattr(tool, "unpacked", lambda release, cache: None)
    monkeypatch.setattr(tool, "check_imported", lambda release, variables: None)
    monkeypatch.setattr(tool.subprocess, "run", leave)
    assert tool.run("0.17.1", tmp_path) is passes
