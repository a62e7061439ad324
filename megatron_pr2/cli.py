"""The command line: `megatron-pr2 train`, `report`, `doctor` and `plan`."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megatron_pr2.cli_errors import errors
from megatron_pr2.errors import ConfigError
from megatron_pr2.plan.command import plan

if TYPE_CHECKING:
    from megatron_pr2.rollout.doctor.findings import Diagnosis

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Predictive Routing Replay: reinforcement learning of mixture-of-experts models with stable routing.",
)


app.command()(plan)


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
        Path | None, typer.Option(help="JSONL of prompt/answer, or of GSM8K's question/answer. Default: generated arithmetic.")
    ] = None,
) -> None:
    """Trains a MoE policy by GRPO with routes replayed (preset grpo, r2, r3, pr2 or pr2-lookahead).

    A run directory that holds an unfinished run of the same settings is continued from its last checkpoint.
    The last line printed is a JSON object with the results.

    Example: megatron-pr2 train --config examples/quickstart.yaml preset=r3 run=runs/r3
    """
    from megatron_pr2.rl.config import load_config
    from megatron_pr2.rl.launch import train as run_training

    try:
        with errors():
            settings = load_config(config, [*(overrides or []), *([f"data={data}"] if data else [])])
            directory = run_training(settings)
    except KeyboardInterrupt as error:
        typer.secho("interrupted; the same command continues the run from its last checkpoint", err=True)
        raise typer.Exit(130) from error
    _print_result(directory)


@app.command()
def report(
    runs: Annotated[
        list[Path] | None, typer.Argument(metavar="[RUN]...", help="Run directory; several are compared side by side.")
    ] = None,
    routes: Annotated[
        list[Path] | None,
        typer.Option(help="File of saved route tables instead of runs; given twice, the two are compared (engine and actor)."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="HTML file to write. Default: RUN/report.html; comparison.html for several runs; FILE.html for routes."),
    ] = None,
    baseline: Annotated[
        Path | None,
        typer.Option(help="Directory of a run, usually of preset r3, to draw beside the one run and to say the gain over."),
    ] = None,
) -> None:
    """Renders a page that can be read offline: of one run, of several side by side, or of saved route tables.

    The last line printed is a JSON object with its path; for one run also its key figures.

    Examples: megatron-pr2 report runs/pr2

    megatron-pr2 report runs/pr2 --baseline runs/r3

    megatron-pr2 report runs/r3 runs/pr2 --output r3_or_pr2.html

    megatron-pr2 report --routes engine.safetensors --routes actor.safetensors
    """
    with errors():
        page = _write_page(runs or [], routes or [], output, baseline)
        if runs and len(runs) == 1:
            _print_result(runs[0], page)
        else:
            kind, paths = ("runs", runs) if runs else ("routes", routes)
            typer.echo(json.dumps({kind: [str(path) for path in paths or []], "report": str(page)}))


@app.command()
def doctor(
    engine: Annotated[list[str], typer.Option(help="Base URL of a running SGLang server or router; repeat it for several.")],
    model: Annotated[
        Path | None,
        typer.Option(help="Directory of the checkpoint that the engines run: routes and log-probs are compared with Transformers."),
    ] = None,
    api_key_file: Annotated[Path | None, typer.Option(help="File with the engines' API key; never give a key itself.")] = None,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for one answer.", min=0.1)] = 60.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the JSON object only.")] = False,
) -> None:
    """Examines running SGLang engines: can their routes be replayed, and if not, what has to be changed?

    Checks reachability, key, version, flags, routes (shape, validity, repetition), prefix-cache flush, weight version and push,
    and latency. With --model also a handshake: the same prompt through Transformers has to take the same routes.

    Can be run beside other requests: it sends a dozen probes and flushes the prefix cache only while the engine is idle.
    FAIL: replay would be wrong or impossible. WARN: read it. SKIP: could not be checked, and why.
    Exit code 0 if no check failed, else 1. The last line printed is a JSON object with all findings.

    Example: megatron-pr2 doctor --engine http://127.0.0.1:30000 --model checkpoints/qwen3 --api-key-file key.txt
    """
    from megatron_pr2.rollout.doctor.doctor import diagnose
    from megatron_pr2.rollout.sglang.config import read_key

    with errors():
        key = None if api_key_file is None else read_key(api_key_file, "--api-key-file ")
    diagnoses = []
    for url in engine:
        diagnoses.append(diagnose(url, api_key=key, model=model, timeout_s=timeout))
        if not as_json:
            _print_diagnosis(diagnoses[-1])
    healthy = not any(diagnosis.failed for diagnosis in diagnoses)
    typer.echo(json.dumps({"ok": healthy, "engines": [diagnosis.as_json() for diagnosis in diagnoses]}))
    if not healthy:
        raise typer.Exit(1)


def _write_page(runs: list[Path], files: list[Path], output: Path | None, baseline: Path | None) -> Path:
    """The page of a run, of several, or of files of routes."""
    if bool(runs) == bool(files):
        wrong = "both runs and --routes" if runs else "nothing to report on"
        raise ConfigError(f"{wrong}; expected one or more run directories, or --routes FILE (once or twice)")
    if baseline is not None and len(runs) != 1:
        raise ConfigError("--baseline goes with one run; several runs are compared without it")
    if absent := [run for run in [*runs, *([] if baseline is None else [baseline])] if not run.is_dir()]:
        raise ConfigError(f"{absent[0]}: no such run directory")
    if absent := [file for file in files if not file.is_file()]:
        raise ConfigError(f"--routes {absent[0]}: no such file")
    try:
        if files:
            from megatron_pr2.report.routes_page import write_routes_report

            return write_routes_report(files, output)
        if len(runs) > 1:
            from megatron_pr2.report.comparison.comparison import Comparison

            return Comparison(runs).write_page(output or Path("comparison.html"))
        from megatron_pr2.report.html import write_report

        return write_report(runs[0], output, baseline)
    except OSError as error:
        raise ConfigError(f"the page could not be written: {error}; give another --output") from error


def _print_diagnosis(diagnosis: Diagnosis) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    colors = {"OK": "green", "WARN": "yellow", "FAIL": "bold red", "SKIP": "dim"}
    table = Table(title=Text(diagnosis.url), title_justify="left")
    for heading in ("check", "", "found", "what to do"):
        table.add_column(heading, overflow="fold")
    for finding in diagnosis.findings:
        status = Text(finding.status.value, style=colors[finding.status.value])
        table.add_row(Text(finding.check), status, Text(finding.detail), Text(finding.fix))
    Console().print(table)


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
        **({"lift_all": last["lift_all"]} if "lift_all" in last else {}),
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
