"""examples/calculator as its README says: the command, transcripts, a tool of one's own beside the YAML, and SGLang."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_pr2.errors import ConfigError
from megatron_pr2.rl.config import load_config
from megatron_pr2.rl.tiny import EOS_ID, byte_tokenizer

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "calculator"
README = (EXAMPLE / "README.md").read_text(encoding="utf-8")

def call(*arguments: str | Path, search: Path | None = None) -> str:
    """Runs python with the package, and perhaps one more directory, on its path; returns what it printed."""
    path = os.pathsep.join(str(directory) for directory in (search, ROOT) if directory)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=400,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": path},
        cwd="/",
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def train(
    run: Path, *arguments: str, config: Path = EXAMPLE / "calculator.yaml", search: Path | None = None
) -> list[dict[str, Any]]:
    """The records of a run of the example."""
    call("-m", "megatron_pr2.cli", "train", "--config", config, f"run={run}", *arguments, search=search)
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_the_example_loads_and_warm_starts_have_names() -> None:
    config = load_config(EXAMPLE / "calculator.yaml")
    assert config.model.warm_start == "calculator"
    assert config.rollout.environment == "megatron_pr2.rl.calculator:Calculator"
    assert load_config(None).model.warm_start == "worked"
    with pytest.raises(ConfigError, match=r"model\.warm_start='abacus': expected one of worked, calculator"):
        load_config(EXAMPLE / "calculator.yaml", ["model.warm_start=abacus"])


def readme_block(language: str) -> str:
    """The only block of that language."""
    (block,) = re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
    return str(block)


def test_the_readmes_tool_multiplies() -> None:
    names: dict[str, Any] = {}
    exec(readme_block("python"), names)
    tool = names["Times"](byte_tokenizer())
    for said, reply in {"[8*7]": "=56 ", "[8*7]=56 [56*5]": "=280 ", "[8+7]": "=? ", "]": "=? ", "\xff[1*1]]": "=? "}.items():
        assert bytes(tool.reply((1,), tuple(said.encode()))).decode() == reply
    assert tool.reply((1,), (*b"56", EOS_ID)) is None


def test_the_readmes_settings_and_commands_are_accepted(tmp_path: Path) -> None:
    file = tmp_path / "times.yaml"
    file.write_text(readme_block("yaml"))
    assert load_config(file).rollout.environment == "times:Times"
    for line in re.findall(r"^megatron-pr2 train --config (\S+)(.*)$", README, flags=re.MULTILINE):
        load_config(ROOT / line[0], line[1].split())


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The directory and the records of two steps of the example, its warm start included."""
    directory = tmp_path_factory.mktemp("calculator")
    return directory, train(directory / "run", "steps=2", f"model.cache={directory / 'warmstart'}")


@pytest.mark.slow
def test_the_example_trains_on_turns(example: tuple[Path, list[dict[str, Any]]]) -> None:
    directory, records = example
    warm_start = json.loads((directory / "warmstart" / "calculator_seed_0" / "warm_start.json").read_text())
    rate = warm_start["exact_match"]
    assert 0.0 < rate < 1.0, "there is nothing to learn"
    # The same policy on other prompts: five standard errors of the two means.
    assert abs(records[0]["reward"] - rate) < 5 * math.sqrt(0.25 / 256 + 0.25 / 256)
    for record in records:
        assert 1 < record["rollout"]["turns"] < 4  # guesses have one, demonstrations three or four
        assert record["truncated"] < 0.5
        assert record["routes"]["missing"] == 0
        # Replies bear no loss: fewer sampled tokens than tokens of responses (all but the last have a feature).
        assert record["routes"]["sampled"] < 0.9 * 256 * record["response_length"]
    page = (directory / "run" / "report.html").read_text(encoding="utf-8")
    assert 'id="plot-turns"' in page


@pytest.mark.slow
def test_transcripts_show_calls_and_replies(example: tuple[Path, list[dict[str, Any]]]) -> None:
    directory, _ = example
    models = [directory / "warmstart" / "calculator_seed_0", directory / "run" / "final"]
    text = call(EXAMPLE / "transcripts.py", *models, "--prompts", "12")
    assert text.count("right") + text.count("wrong") == 24
    assert "]=" in text
    assert "~" in text


@pytest.mark.slow
def test_a_tool_of_ones_own_lies_beside_the_yaml(example: tuple[Path, list[dict[str, Any]]], tmp_path: Path) -> None:
    """The README's, with its directory in PYTHONPATH. It multiplies: sums get its error mark, and the policy far less reward."""
    directory, records = example
    own = tmp_path / "my_tool"
    own.mkdir()
    (own / "times.py").write_text(readme_block("python"))
    settings = (EXAMPLE / "calculator.yaml").read_text().replace("megatron_pr2.rl.calculator:Calculator", "times:Times")
    (own / "times.yaml").write_text(settings)
    cache = f"model.cache={directory / 'warmstart'}"
    (record,) = train(tmp_path / "run", "steps=1", cache, config=own / "times.yaml", search=own)
    assert record["rollout"]["turns"] > 1
    assert record["reward"] < 0.5 * records[0]["reward"]


@pytest.mark.exhaustive
@pytest.mark.sglang
def test_the_example_runs_with_sglang(
    host_platform: None, example: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    directory, records = example
    (record,) = train(tmp_path / "run", "steps=1", f"model.cache={directory / 'warmstart'}", "rollout.engine=sglang")
    assert record["routes"]["missing"] == 0
    assert record["handshake"]["route_agreement"] == 1.0
    assert record["rollout"]["turns"] == pytest.approx(records[0]["rollout"]["turns"], abs=0.3)
