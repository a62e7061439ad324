"""What horizon groups in turns cost on one SGLang server (`rollout.groups=turns`), against one set of gates for all.

Two runs of the same settings. Prints a table, then one line of JSON: bytes and seconds of a push of all weights and of a push of
the gates alone, and tokens per second while the server samples, with all requests at once and a turn at a time. Medians over
batches, the first left out.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Annotated

import typer
from bench_mismatch import records
from rich.console import Console
from rich.table import Table


def main(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Settings of `megatron-pr2 train`, e.g. rollout.prompts=64."),
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file of settings.")] = None,
    steps: Annotated[int, typer.Option(help="Rollout batches of each run, two at least.")] = 6,
) -> None:
    """Measures both ways; a few minutes on two CPU cores."""
    console = Console(stderr=True)
    ahead = ["preset=pr2", "pr2.predictor=lookahead", "pr2.hold_back=false", "rollout.engine=sglang", f"steps={max(2, steps)}"]
    runs = {}
    with tempfile.TemporaryDirectory() as scratch:
        for groups in ("1", "turns"):
            with console.status(f"rollout.groups={groups}"):
                settings = [*ahead, f"rollout.groups={groups}", *(overrides or [])]
                runs[groups] = records(settings, config, Path(scratch) / groups)[1:]
    one, turns = runs["1"], runs["turns"]
    pushes = len(turns[0]["mini_steps"]) - 1
    report = {
        "turns": pushes + 1,
        "weights_bytes": one[0]["bytes"]["weights"],
        "gates_bytes": turns[0]["bytes"]["gates"] // (pushes + 1),
        "weights_push_seconds": median(record["seconds"]["push"] for record in one),
        "gates_push_seconds": median(record["seconds"]["gates"] / pushes for record in turns),
        "tokens_per_second_at_once": median(record["rollout_tokens_per_second"] for record in one),
        "tokens_per_second_in_turns": median(record["rollout_tokens_per_second"] for record in turns),
        "rollout_seconds_at_once": median(record["seconds"]["rollout"] for record in one),
        "rollout_seconds_in_turns": median(record["seconds"]["rollout"] for record in turns),
        "handshake_seconds_in_turns": median(record["seconds"]["handshake"] for record in turns),
    }
    table = Table("", "all weights, at once", "gates, in turns", title=f"one server, {pushes + 1} turns")
    for name, at_once, in_turns in (
        ("bytes of a push", "weights_bytes", "gates_bytes"),
        ("seconds of a push", "weights_push_seconds", "gates_push_seconds"),
        ("tokens per second", "tokens_per_second_at_once", "tokens_per_second_in_turns"),
        ("seconds of a rollout", "rollout_seconds_at_once", "rollout_seconds_in_turns"),
    ):
        table.add_row(name, *(f"{report[each]:.3g}" for each in (at_once, in_turns)))
    console.print(table)
    sys.stdout.write(json.dumps(report) + "\n")


if __name__ == "__main__":
    typer.run(main)
