"""tools/bench_router.py runs on the GPU; its ratios go into the table and are not judged here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.gpu.needs import needs

pytestmark = [pytest.mark.gpu, needs()]

ROOT = Path(__file__).resolve().parent.parent.parent


def bench(*arguments: str, timeout: float = 200.0) -> dict[str, Any]:
    """Runs the benchmark in a process of its own; its report is the last line of its output."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    # Made for bits that repeat, and slower: the benchmark measures what training runs.
    for name in ("CUBLAS_WORKSPACE_CONFIG", "NVTE_ALLOW_NONDETERMINISTIC_ALGO"):
        environment.pop(name, None)
    command = [sys.executable, str(ROOT / "tools/bench_router.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment, check=False)
    assert done.returncode == 0, f"exit code {done.returncode}:\n{done.stderr[-2000:]}"
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return report


def ratios(report: dict[str, Any]) -> str:
    """Per case, what every variant takes as a multiple of Megatron-Core's plain router."""
    parts = []
    for case in report["cases"]:
        rows = [f"{name} {row['ratio']:.2f}" for name, row in case["variants"].items() if row["ratio"] != 1.0]
        parts.append(f"{case['gate']} {case['scope']} {case['tokens']}: {', '.join(rows)}")
    return "; ".join(parts)


def test_bench_router_runs(record_property: Callable[[str, Any], None]) -> None:
    """The router alone, of Qwen3-30B and of DeepSeek-V3."""
    settings = ["--device", "cuda", "--scopes", "router", "--gates", "qwen3-30b,deepseek-v3", "--tokens", "4096"]
    report = bench(*settings, "--repeats", "5", "--warm-up", "2", "--micro-batches", "4")
    assert len(report["cases"]) == 2
    assert all(row["ms"] > 0 for case in report["cases"] for row in case["variants"].values())
    record_property("detail", ratios(report))
