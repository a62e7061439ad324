"""What a run is made of, as its trainer writes it and its report says it."""

from __future__ import annotations

import json
import platform
from pathlib import Path

import pytest
import torch
from transformers import Qwen3MoeConfig

from megatron_pr2.report.environment import in_words, read_environment
from megatron_pr2.rl.environment import write_environment


def test_model_hardware_and_versions(tmp_path: Path) -> None:
    model = Qwen3MoeConfig(num_hidden_layers=5, mlp_only_layers=[0], hidden_size=48, num_experts=12, num_experts_per_tok=3)
    write_environment(tmp_path, model, "bfloat16", 2)
    words = dict(in_words(read_environment(tmp_path)))
    assert words["Model"] == "qwen3_moe, 5 layers (4 with experts), hidden 48, top-3 of 12 experts, bfloat16"
    assert words["Hardware"].startswith("2 processes, ")
    assert f"python {platform.python_version()}" in words["Versions"]
    assert f"torch {torch.__version__}" in words["Versions"]
    assert "megatron-core " in words["Versions"]
    assert str(tmp_path) not in (tmp_path / "environment.json").read_text()


@pytest.mark.parametrize("content", [None, "{", "[1]", '{"model": 3}'])
def test_a_page_does_without_it(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "environment.json").write_text(content)
    assert in_words(read_environment(tmp_path)) == []


def test_what_is_not_known_is_said(tmp_path: Path) -> None:
    (tmp_path / "environment.json").write_text(json.dumps({"model": {"type": "olmoe"}, "versions": {}}))
    ((heading, text),) = in_words(read_environment(tmp_path))
    assert (heading, text.startswith("olmoe, ? layers")) == ("Model", True)
