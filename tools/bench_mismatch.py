"""The mismatch between a low-precision SGLang engine and the trainer, with and without replay of the engine's routes.

One rollout batch by SGLang for each of the presets r3 (routes replayed) and grpo (the trainer's own), from the same weights and
seeds, so that both sample the same responses. Prints a table, then one line of JSON: share of the engine's experts that the
trainer would take too, and |log mu - log pi_old| per response token (mean, max, k3 estimate of the KL).
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table


def main(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Settings of `megatron-pr2 train`, e.g. rollout.prompts=64."),
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file of settings.")] = None,
    dtype: Annotated[str, typer.Option(help="Of engine and trainer.")] = "bfloat16",
) -> None:
    """Measures one batch with and one without replay; about a minute each on two CPU cores."""
    console = Console(stderr=True)
    results = {}
    with tempfile.TemporaryDirectory() as scratch:
        for preset in ("r3", "grpo"):
            with console.status(f"one rollout batch with preset {preset}"):
                results[preset] = _first_record(preset, dtype, config, overrides or [], Path(scratch) / preset)
    replayed, live = results["r3"], results["grpo"]
    report = {
        "dtype": dtype,
        "responses_identical": replayed["reward"] == live["reward"] and replayed["response_length"] == live["response_length"],
        "route_agreement_before_replay": replayed["routes"]["agreement"],
        "missing_routes": replayed["routes"]["missing"],
        "gap_with_replay": replayed["logprob_gap"],
        "gap_without_replay": live["logprob_gap"],
        "handshake": replayed["handshake"],
    }
    table = Table("", "mean", "max", "k3 KL", title=f"{dtype}: |log-prob engine - trainer| per response token")
    for name, key in (("with replay", "gap_with_replay"), ("without", "gap_without_replay")):
        table.add_row(name, *(f"{report[key][column]:.2e}" for column in ("mean", "max", "kl")))
    console.print(table)
    console.print(f"routes equal before replay: {report['route_agreement_before_replay']:.2%}")
    sys.stdout.write(json.dumps(report) + "\n")


def _first_record(preset: str, dtype: str, config: Path | None, overrides: list[str], run: Path) -> dict[str, Any]:
    settings = [f"preset={preset}", f"model.dtype={dtype}", "rollout.engine=sglang", "steps=1", f"run={run}", *overrides]
    command = [sys.executable, "-m", "megatron_pr2.cli", "train", *(["--config", str(config)] if config else []), *settings]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise typer.BadParameter(f"the run failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    record: dict[str, Any] = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    return record


if __name__ == "__main__":
    typer.run(main)
