"""The benchmarks run in a minimal size; their times are printed, not judged."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]


def run_tool(name: str, *options: str, timeout: float = 300) -> dict[str, Any]:
    """The JSON that a tool prints last."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore", "COLUMNS": "160"}
    command = [sys.executable, str(ROOT / "tools" / name), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return report


@pytest.mark.exhaustive
def test_bench_scatter_counts_bytes() -> None:
    """Every rank receives 1 / (tp cp pp) of what a broadcast brings, and holds the same afterwards."""
    small = ["--tokens", "512", "--layers", "4", "--topk", "2", "--sequence", "64", "--rows", "128", "--repeats", "1"]
    report = run_tool("bench_scatter.py", *small)
    layouts = {(case["tensor"], case["context"], case["pipeline"]) for case in report["cases"]}
    assert layouts == {(2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 1), (2, 1, 2), (1, 2, 2)}
    assert len({case["tokens"] for case in report["cases"]}) == 3
    for case in report["cases"]:
        assert case["identical"]
        assert case["received_bytes"]["broadcast"] == case["table_bytes"] == case["tokens"] * 4 * 2
        assert case["received_bytes"]["scatter"] * case["ranks"] == case["table_bytes"]
        assert case["received_bytes"]["broadcast_int32"] == 4 * case["table_bytes"]
        assert all(seconds > 0 for seconds in case["seconds"].values())
    ratios = {c["ranks"]: round(c["seconds"]["scatter"] / c["seconds"]["broadcast"], 2) for c in report["cases"]}
    sys.stdout.write(f"scatter against broadcast, by ranks: {ratios}\n")


@pytest.mark.exhaustive
def test_bench_gate_rounding_delivers_what_the_design_says() -> None:
    """What is learned from router inputs: stochastic rounding delivers all of it and gets fewer slots wrong than the nearest."""
    results = run_tool("bench_gate_rounding.py", "--seeds", "2", "--tokens", "1024")["results"]
    found = {(r["prediction"], r["rms"], r["rounding"]): r for r in results}
    for rms, nearest in ((1e-6, 0.03), (5e-6, 0.15), (4e-5, 0.82)):
        stochastic, plain = (found["of inputs", rms, name] for name in ("stochastic", "nearest"))
        assert plain["delivered"] == pytest.approx(nearest, abs=0.04)
        assert stochastic["delivered"] == pytest.approx(1.0, abs=0.05)
        if rms > 1e-6:  # a few slots, of more tokens than these
            assert stochastic["route_error"] < plain["route_error"]
        assert found["of inputs", rms, "fp32"]["route_error"] == 0.0


def test_bench_routes_decodes_the_same() -> None:
    report = run_tool("bench_routes.py", "--tokens", "256", "--layers", "4", "--repeats", "1")
    measured = [(case["tokens"], case["way"]) for case in report["cases"]]
    assert measured == [(n, way) for n in (64, 128, 256) for way in ("ours", "usual")]
    assert all(case["identical"] and case["mb_per_s"] > 0 for case in report["cases"])
    ours, usual = report["cases"][-2:]
    assert usual["result_bytes"] == 4 * ours["result_bytes"]
    sys.stdout.write(f"ours against json + numpy: {ours['mb_per_s'] / usual['mb_per_s']:.1f} times as fast\n")


@pytest.mark.exhaustive
@pytest.mark.sglang
def test_bench_turns_pushes_nothing_but_gates(tiny_checkpoint: Path) -> None:
    options = ["--turns", "2", "--responses", "8", "--repeats", "2"]
    report = run_tool("bench_turns.py", "--model", str(tiny_checkpoint), *options, timeout=900)
    sys.stdout.write(f"{report}\n")
    assert report["gates_bytes"] == 2 * 8 * 32 * 4 < report["weights_bytes"]
    assert min(report["seconds"].values()) > 0


@pytest.mark.exhaustive
@pytest.mark.sglang
@pytest.mark.skipif(torch.cuda.is_available(), reason="the numbers are of a CPU engine")
def test_replay_removes_most_of_the_mismatch_of_a_bf16_engine(tiny_checkpoint: Path) -> None:
    """Engine and trainer compute in bf16: some experts differ before replay, all are replayed, and the gap shrinks."""
    settings = ["rollout.prompts=16", "rollout.responses=4", "rollout.max_new_tokens=24", "algorithm.mini_steps=1"]
    report = run_tool("bench_mismatch.py", *settings, f"model.path={tiny_checkpoint}", timeout=900)
    sys.stdout.write(f"{report}\n")
    assert report["responses_identical"]
    assert 0.9 < report["route_agreement_before_replay"] < 1.0
    assert report["missing_routes"] == 0
    assert report["gap_with_replay"]["kl"] < 0.5 * report["gap_without_replay"]["kl"]
    assert report["gap_with_replay"]["mean"] < report["gap_without_replay"]["mean"]


@pytest.mark.exhaustive
def test_phases_of_a_rollout_batch(tiny_checkpoint: Path) -> None:
    settings = ["rollout.prompts=4", "rollout.responses=4", "algorithm.mini_steps=2", "--steps", "2"]
    phases = run_tool("bench_phases.py", *settings, f"model.path={tiny_checkpoint}", timeout=600)["phases"]
    sys.stdout.write(f"{phases}\n")
    assert {"push", "rollout", "old_logprobs", "update", "look_ahead"} <= set(phases)
    for clock in ("share", "cpu_share"):
        assert sum(phase[clock] for phase in phases.values()) == pytest.approx(1.0, abs=0.2)
        assert 0.0 < phases["look_ahead"][clock] < 0.5
