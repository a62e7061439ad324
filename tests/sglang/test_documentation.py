"""docs/sglang.md is true: flags, commands, settings that are refused, files, releases."""

from __future__ import annotations

import dataclasses
import re
import shlex
import sys
from pathlib import Path

import pytest
import typer

from megatron_pr2.cli import app
from megatron_pr2.rl.config import load_config
from megatron_pr2.rollout.sglang import refusals as sglang_refusals
from megatron_pr2.rollout.sglang.config import SGLangConfig
from megatron_pr2.rollout.sglang.refusals import TESTED_RELEASES, release_text
from megatron_pr2.rollout.sglang.server import SGLangServer
from tests.sglang.conftest import SHAPE
from tests.sglang.fake_server import FakeServer, serve

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs/sglang.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    return TEXT.partition(f"## {title}\n")[2].partition("\n## ")[0]


def table(title: str) -> list[list[str]]:
    """Cells of the rows of a section's tables, headings left out."""
    lines = [line for line in section(title).splitlines() if line.startswith("|") and not set(line) <= set("|- ")]
    assert len(lines) > 1, title
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[1:]]


@pytest.mark.parametrize("cuda", [False, True])
def test_every_flag_that_is_set_is_explained(cuda: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: cuda)
    command = SGLangServer(SGLangConfig(model_path="m", python=sys.executable)).command(1)
    explained = " ".join(cells[0] for cells in table("Flags that own servers get"))
    for flag in (word for word in command if word.startswith("--")):
        if flag not in ("--model-path", "--port", "--log-level-http"):
            assert flag in explained, flag


def test_every_refusal_is_documented() -> None:
    documented = " ".join(cells[0] for cells in table("Settings under which routes are wrong"))
    for name in [rule[0] for rule in sglang_refusals._RULES] + list(sglang_refusals.RUNNERS_PAST_CAPTURE) + ["dp_size"]:
        assert f"`{name}`" in documented, name


def test_the_releases_are_those_that_are_tested() -> None:
    heading = section("What is verified on which release").split("\n| ")[1]
    assert re.findall(r"\d+\.\d+\.\d+", heading) == [release_text(release) for release in TESTED_RELEASES]


def test_files_exist_and_commands_are_accepted() -> None:
    for name in re.findall(r"`((?:megatron_pr2|tests|tools|docs|examples)/[\w./-]*)`", TEXT):
        assert (ROOT / name).exists(), name
    subcommands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    blocks = "".join(re.findall(r"^```bash\n(.*?)^```$", TEXT, flags=re.MULTILINE | re.DOTALL)).replace("\\\n", " ")
    lines = [words for line in blocks.splitlines() if (words := shlex.split(line, comments=True))]
    found = [words[1:] for words in lines if words[0] == "megatron-pr2"]
    assert {words[0] for words in found} == {"doctor", "train"}
    for subcommand, *arguments in found:
        parsed = subcommands[subcommand].make_context(subcommand, list(arguments)).params
        if subcommand == "train":
            load_config(None, parsed["overrides"])
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for words in (words for words in lines if words[0] == "make"):
        assert re.search(rf"^{re.escape(words[1])}:", makefile, flags=re.MULTILINE), words


def test_settings_in_the_text_are_settings() -> None:
    for name in re.findall(r"(?<!megatron_pr2\.)rollout\.sglang\.(\w+)", TEXT):
        assert name in {field.name for field in dataclasses.fields(SGLangConfig)}, name


def test_the_python_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = re.findall(r"^```python\n(.*?)^```$", TEXT, flags=re.MULTILINE | re.DOTALL)
    with serve(FakeServer()) as fake:
        exec(example, {"config": SGLangConfig(urls=(fake.url,)), "shape": SHAPE, "prompts": [(3, 4, 5)] * 16})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8  # one group of two was enough
    assert all(line.endswith(" 64 (67, 4, 4) {4}") for line in lines)  # 3 + 64 tokens, layers, top-k; the fake's version
