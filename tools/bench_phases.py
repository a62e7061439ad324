"""Shares of a rollout batch's phases in the trainer's own loop: rollout, old log-probs, mini-steps, look-ahead.

Runs `megatron-pr2 train` and reads what it logs of its steps. Shares are taken within a step, of wall time and of the CPU time of
the first rank's process, and their medians are reported, so that a busy machine disturbs all phases alike. A table, then one line
of JSON.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from bench_mismatch import records
from rich.console import Console
from rich.table import Table

QUICKSTART = Path(__file__).resolve().parents[1] / "examples/quickstart.yaml"


def shares(steps: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Per phase the medians of its seconds and of its share of a step, by wall and by CPU time; checkpoints are left out."""
    out: dict[str, dict[str, float]] = {}
    for clock in ("seconds", "cpu_seconds"):
        for phase in dict.fromkeys(phase for step in steps for phase in step[clock] if phase != "checkpoint"):
            own = [step[clock].get(phase, 0.0) for step in steps]
            whole = [sum(value for name, value in step[clock].items() if name != "checkpoint") for step in steps]
            out.setdefault(phase, {})[clock] = statistics.median(own)
            out[phase][clock.replace("seconds", "share")] = statistics.median(a / b for a, b in zip(own, whole, strict=True))
    return out


def main(
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings of `megatron-pr2 train`.")
    ] = None,
    config: Annotated[Path, typer.Option(help="YAML file of settings.")] = QUICKSTART,
    steps: Annotated[int, typer.Option(help="Rollout batches that are measured; two more come before them.")] = 12,
) -> None:
    """Measures the quickstart with predictor=lookahead; about two minutes on two CPU cores."""
    console = Console(stderr=True)
    fixed = ["pr2.predictor=lookahead", "pr2.hold_back=false", f"steps={steps + 2}", f"checkpoint_every={steps + 2}"]
    with tempfile.TemporaryDirectory() as scratch, console.status(f"{steps + 2} rollout batches"):
        found = shares(records([*fixed, *(overrides or [])], config, Path(scratch) / "run")[2:])
    table = Table("phase", "wall s", "share", "CPU s", "share", title=f"medians of {steps} rollout batches")
    for phase, row in found.items():
        columns = f"{row['seconds']:.3f}", f"{row['share']:.2%}", f"{row['cpu_seconds']:.3f}", f"{row['cpu_share']:.2%}"
        table.add_row(phase.replace("_", " "), *columns)
    console.print(table)
    sys.stdout.write(json.dumps({"steps": steps, "phases": found}) + "\n")


if __name__ == "__main__":
    typer.run(main)
