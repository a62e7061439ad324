"""tools/bench_router.py in a minimal size: it measures every variant, gate and scope; its ratios are printed, not judged."""

from __future__ import annotations

import importlib
import math
import sys
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from tests.tools.test_tools import ROOT, run_tool

GATES = ("qwen3-30b", "mixtral", "deepseek-v3")
REPLAYING = {"replay", "replay+drift", "learn", "learn+hold-back", "momentum"}
VARIANTS = {"plain", "mcore-record", "mcore-replay", "live", "record", *REPLAYING}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU measures in tests/gpu; the sizes here are a CPU's"),
]


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    """What one small run prints last; in a process of its own, which it makes a whole Megatron world."""
    small = ["--shrink", "32", "--tokens", "64,128", "--layer-tokens", "64", "--sequence", "32", "--sample-fraction", "0.25"]
    return run_tool("bench_router.py", *small, "--repeats", "2", "--warm-up", "1")


def test_every_gate_scope_and_variant_is_measured(report: dict[str, Any]) -> None:
    measured = {(case["gate"], case["scope"], case["tokens"]) for case in report["cases"]}
    assert measured == {(gate, "router", n) for gate in GATES for n in (64, 128)} | {
        (gate, scope, 64) for gate in GATES for scope in ("layer", "step")
    }
    assert report["skipped"] == []
    assert set(report["variants"]) == VARIANTS
    for case in report["cases"]:
        assert set(case["variants"]) == VARIANTS
        assert 0 < case["sampled_tokens"] < case["tokens"] / 2
        for row in case["variants"].values():
            for name in ("ms", "ms_host", "ms_cpu", "ratio", "ratio_q1", "ratio_q3", "peak_bytes", "operators"):
                assert math.isfinite(row[name]), name
                assert row[name] > 0, name
            assert row["ratio_q1"] <= row["ratio"] <= row["ratio_q3"]
    for case in report["cases"]:
        ratios = {name: round(row["ratio"], 2) for name, row in case["variants"].items()}
        sys.stdout.write(f"{case['gate']}, {case['scope']}, {case['tokens']}: {ratios}\n")


def test_the_variants_route_alike_and_differ_in_what_they_do(report: dict[str, Any]) -> None:
    """Times mean something only if all compute the same gate weights, and if each really does what it is called."""
    for case in report["cases"]:
        rows = case["variants"]
        assert all(row["same_output_as_plain"] for row in rows.values())
        assert all((rows[name]["feature_bytes"] > 0) == (name in REPLAYING - {"replay"}) for name in rows)
        if case["scope"] == "router":
            operators = {name: row["operators"] for name, row in rows.items()}
            assert operators["plain"] == operators["live"] == operators["mcore-record"]
            assert operators["replay"] < operators["replay+drift"] < operators["learn"] < operators["learn+hold-back"]


def test_every_target_is_stated_with_what_was_found(report: dict[str, Any]) -> None:
    for case in report["cases"]:
        stated = {name: row["target"] for name, row in case["variants"].items() if "target" in row}
        assert set(stated) == {"live", *REPLAYING}
        assert stated["replay"]["to"] == "mcore-replay"
        learning = 1.15 if case["scope"] == "router" else 1.01
        assert stated["learn"]["at_most"] == stated["learn+hold-back"]["at_most"] == learning
        for target in stated.values():
            assert target["met"] == (target.get("at_least", 0.0) <= target["found"] <= target["at_most"])


@pytest.mark.parametrize(
    ("options", "status", "said"),
    [
        (["--gates", "gpt-2"], 2, "gpt-2: expected some of qwen3-30b, mixtral, deepseek-v3"),
        (["--scopes", "attention"], 2, "attention: expected some of router, layer, step"),
        (["--device", "cuda"], 2, "torch sees no CUDA device"),
        (["--help"], 0, "Does it run at all"),
    ],
)
def test_what_it_says(monkeypatch: pytest.MonkeyPatch, options: list[str], status: int, said: str) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    app = typer.Typer()
    app.command()(importlib.import_module("bench_router").main)
    result = CliRunner(env={"COLUMNS": "160"}).invoke(app, options)
    assert result.exit_code == status
    assert said in " ".join(result.output.replace("│", " ").split())
