"""The command line: `megatron-pr2 train`, `megatron-pr2 report`."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Annotated, Any

import typer

from megatron_pr2.errors import PR2Error

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Predictive Routing Replay: reinforcement learning of mixture-of-experts models with stable routing.",
)


@app.callback()
def _logging(verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show log messages too.")] = False) -> None:
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="%(levelname)s %(name)s: %(message)s")


@app.command()
def train(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Settings that override the file, e.g. preset=r3 optimizer.lr=1e-4 seed=1."),
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file of settings; docs/config.md lists them.")] = None,
    data: Annotated[
        Path | None, typer.Option(help="JSONL of prompt/answer, or of GSM8K's question/answer. Default: made-up arithmetic.")
    ] = None,
) -> None:
    """Trains a MoE policy by GRPO with routes replayed (preset grpo, r2, r3 or pr2).

    A run directory that holds an unfinished run of the same settings is continued from its last checkpoint.
    The last line printed is a JSON object with the results.

    Example: megatron-pr2 train --config examples/quickstart.yaml preset=r3 run=runs/r3
    """
    from megatron_pr2.rl.config import load_config
    from megatron_pr2.rl.launch import train as run_training

    try:
        settings = load_config(config, [*(overrides or []), *([f"data={data}"] if data else [])])
        directory = run_training(settings)
    except PR2Error as error:
        typer.secho(f"error: {error}", err=True, fg=typer.colors.RED)
        raise typer.Exit(1) from error
    except KeyboardInterrupt as error:
        typer.secho("interrupted; the same command continues the run from its last checkpoint", err=True)
        raise typer.Exit(130) from error
    _print_result(directory)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="Run directory.")],
    output: Annotated[Path | None, typer.Option(help="HTML file to write; RUN/report.html by default.")] = None,
) -> None:
    """Renders a run's HTML report from its metrics.jsonl; the last line printed is a JSON object with its path and key figures."""
    from megatron_pr2.report.html import write_report

    try:
        path = write_report(run, output)
    except PR2Error as error:
        typer.secho(f"error: {error}", err=True, fg=typer.colors.RED)
        raise typer.Exit(1) from error
    _print_result(run, path)


def _print_result(directory: Path, report_path: Path | None = None) -> None:
    from megatron_pr2.report.metrics_log import first_and_last_fifth, read_records

    records = read_records(directory)
    last = records[-1]
    result: dict[str, Any] = {
        "run": str(directory),
        "report": str(report_path or directory / "report.html"),
        "preset": last["preset"],
        "seed": last["seed"],
        "steps": len(records),
        **first_and_last_fifth(records),
        "agreement": last["agreement"],
        "lift": last["lift"],
        "missing_routes": sum(r["routes"]["missing"] for r in records),
        "seconds": sum(r["wall_seconds"] for r in records),
    }
    if (directory / "final").exists():
        result["checkpoint"] = str(directory / "final")
    # JSON has no NaN: a run without replay has no agreement.
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in result.items()}
    typer.echo(json.dumps(finite, allow_nan=False))


if __name__ == "__main__":
    app()
