"""Does prediction help? Trains every method of a grid on the same task and budget, and compares them.

A cell is one `megatron-pr2 train` run: method x mini-steps x learning rate x seed. Cells run side by side, a process each, in
OUT/cells; what is finished is kept, so that the same command goes on after Ctrl-C, a crash or a change of the grid. When all is
done OUT holds comparison.html, cells.csv (tidy: run, measure, mini-step, value) and summary.csv (means, 95 % intervals, differences
to r3). Only settings are checked against finished cells: after changing the code take another OUT.

Exit code 1 if a cell failed (the others are compared), 130 if interrupted. The last line printed is a JSON object.
"""

from __future__ import annotations

import json
import os
import platform
import signal
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import typer
from compare_grid import METHODS, Cell, Grid, expand, read_grid
from compare_runner import Outcome, Runner, jobs_of, locked
from rich.console import Console

from megatron_pr2.errors import PR2Error
from megatron_pr2.report import formats
from megatron_pr2.report.comparison.comparison import Comparison
from megatron_pr2.report.metrics_log import flat, read_records
from megatron_pr2.rl.preflight import examples_model

GRID = Path(__file__).resolve().parents[1] / "examples" / "compare.yaml"
TITLE = "Does prediction help?"
# Two cores, one cell on each, quickstart settings; replaced by what finished cells took.
SECONDS_PER_STEP, SECONDS_PER_CELL, SECONDS_PER_WARM_START = 2.0, 20.0, 60.0


def main(
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings of `megatron-pr2 train` for every cell.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Directory of the results; runs/compare, or runs/compare-SECTION.")] = None,
    grid: Annotated[Path, typer.Option(help="YAML file of grids.")] = GRID,
    section: Annotated[str, typer.Option(help="Section of the grid's file.")] = "full",
    quick: Annotated[bool, typer.Option("--quick", help="The same as --section quick.")] = False,
    methods: Annotated[str | None, typer.Option(help=f"Instead of every group's: some of {', '.join(METHODS)}.")] = None,
    mini_steps: Annotated[str | None, typer.Option(help="Instead of every group's, e.g. 2,4,8.")] = None,
    lr: Annotated[str | None, typer.Option(help="Instead of every group's, e.g. 1e-4,1e-3.")] = None,
    seeds: Annotated[str | None, typer.Option(help="Instead of every group's, e.g. 0,1,2.")] = None,
    steps: Annotated[int | None, typer.Option(help="Rollout batches of every cell.", min=1)] = None,
    jobs: Annotated[int | None, typer.Option(help="Cells at the same time; as many as cores by default.", min=1)] = None,
    markdown: Annotated[
        Path | None, typer.Option(help="Also write a summary into this file, plots and CSV files beside it.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the cells and an estimate of the time; run nothing.")] = False,
    report_only: Annotated[bool, typer.Option("--report-only", help="Compare what is finished; run nothing.")] = False,
) -> None:
    """Trains and compares methods of routing replay; finished cells are kept, and the same command goes on.

    Example: python tools/compare_methods.py --methods r3,pr2-post,momentum --mini-steps 4 --seeds 0,1,2 --out runs/mine
    """
    console = Console(stderr=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    section = "quick" if quick else section
    out = out or Path("runs") / ("compare" if section == "full" else f"compare-{section}")
    slots = jobs or len(os.sched_getaffinity(0))
    try:
        chosen = read_grid(grid, section)
        _replace(chosen, methods, mini_steps, lr, seeds, steps)
        cells = expand(chosen, out, overrides or [])
        todo = [cell for cell in cells if not cell.finished]
        console.print(f"{len(cells)} cells, {len(cells) - len(todo)} of them finished", highlight=False)
        if dry_run:
            _list(cells, slots, console)
            return
        outcome = Outcome()
        if todo and not report_only:
            outcome = _run(todo, chosen.config, out, slots, console)
        result = _compare(cells, out, markdown, overrides or [], console)
    except PR2Error as error:
        typer.secho(f"error: {error}", err=True, fg=typer.colors.RED)
        raise typer.Exit(1) from error
    except KeyboardInterrupt as error:
        typer.secho("interrupted; the same command goes on from the last checkpoint of every cell", err=True)
        raise typer.Exit(130) from error
    for name, reason in outcome.failed.items():
        typer.secho(f"failed: {name}: {reason}", err=True, fg=typer.colors.RED)
    typer.echo(json.dumps({**result, "failed": outcome.failed}))
    if outcome.failed:
        raise typer.Exit(1)


def _replace(grid: Grid, methods: str | None, mini_steps: str | None, lr: str | None, seeds: str | None, steps: int | None) -> None:
    """Axes of the command line take the place of the file's in every group."""
    grid.steps = steps or grid.steps
    for name, text, kind in (("methods", methods, str), ("mini_steps", mini_steps, int), ("lr", lr, float), ("seeds", seeds, int)):
        if text is None:
            continue
        try:
            values = [kind(item.strip()) for item in text.split(",")]
        except ValueError as error:
            hint = f"--{name.replace('_', '-')}"
            raise typer.BadParameter(f"{text!r}: expected {kind.__name__}s separated by commas", param_hint=hint) from error
        for group in grid.groups:
            setattr(group, name, values)


def _run(cells: Sequence[Cell], config: Path, out: Path, slots: int, console: Console) -> Outcome:
    with locked(out) as lock, Runner(jobs_of(cells, config, out), slots, lock, console) as runner:
        return runner.run()


def _compare(cells: Sequence[Cell], out: Path, markdown: Path | None, overrides: Sequence[str], console: Console) -> dict[str, Any]:
    """Writes page and tables of the finished cells."""
    finished = [cell for cell in cells if cell.finished]
    result: dict[str, Any] = {"out": str(out), "cells": len(cells), "finished": len(finished)}
    if not finished:
        return result
    groups = {cell.directory: (cell.method, cell.group) for cell in finished}
    with console.status("drawing the comparison"):
        comparison = Comparison(groups, groups=groups, title=TITLE, facts=_facts(cells, finished, overrides))
        comparison.write_cells(out / "cells.csv")
        comparison.write_summary(out / "summary.csv")
        page = comparison.write_page(out / "comparison.html")
        result |= {"page": str(page), "cells_csv": str(out / "cells.csv"), "summary_csv": str(out / "summary.csv")}
        if markdown is not None:
            result["markdown"] = str(comparison.write_markdown(markdown))
    return result


def _facts(cells: Sequence[Cell], finished: Sequence[Cell], overrides: Sequence[str]) -> list[tuple[str, str]]:
    """What was run, how long and on what; nothing that names a place."""
    config = finished[0].config
    rollout = config.rollout
    seconds = sum(flat(record).get("wall_seconds", 0.0) for cell in finished for record in read_records(cell.directory))
    packages = ("torch", "megatron-core", "megatron-pr2")
    facts = [
        ("Cells", f"{len(finished)} of {len(cells)} finished; missing: {_missing(cells) or 'none'}"),
        ("Budget of a cell", f"{config.steps} rollouts of {rollout.prompts} prompts x {rollout.responses} responses"),
        ("Training time", f"{formats.duration(seconds)} in all, a process and a core per cell"),
        ("Machine", f"{_processor()}, {os.cpu_count()} cores"),
        ("Software", ", ".join(["Python " + platform.python_version(), *(f"{name} {_version(name)}" for name in packages)])),
    ]
    return [*facts, ("Settings of every cell", ", ".join(overrides))] if overrides else facts


def _missing(cells: Sequence[Cell]) -> str:
    return ", ".join(cell.name for cell in cells if not cell.finished)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "(not installed)"


def _list(cells: Sequence[Cell], slots: int, console: Console) -> None:
    """Every cell with its state, and how long the rest will take."""
    times = [flat(r).get("wall_seconds", 0.0) for cell in cells if cell.finished for r in read_records(cell.directory)]
    per_step = sum(times) / len(times) if times else SECONDS_PER_STEP
    for cell in cells:
        state = "finished" if cell.finished else f"{cell.steps_done} of {cell.config.steps} steps done"
        typer.echo(f"{cell.name}: {state}")
    todo = [cell for cell in cells if not cell.finished]
    steps = sum(max(0, cell.config.steps - cell.steps_done) for cell in todo)
    policies = {examples_model(cell.config) for cell in todo if cell.config.model.path is None}
    seconds = (steps * per_step + len(todo) * SECONDS_PER_CELL + len(policies) * SECONDS_PER_WARM_START) / slots
    source = "as finished cells took" if times else "a guess"
    console.print(
        f"{len(todo)} cells, {steps} steps left: about {formats.duration(seconds)} with {slots} at a time "
        f"({per_step:.1f} s per step, {source})",
        highlight=False,
    )
    typer.echo(json.dumps({"cells": len(cells), "left": len(todo), "steps": steps, "seconds": round(seconds, 1)}))


if __name__ == "__main__":
    typer.run(main)
