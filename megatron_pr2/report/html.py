"""The report of a run: one HTML page that needs nothing but itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd

from megatron_pr2.errors import DataError
from megatron_pr2.report import formats, plots
from megatron_pr2.report.figures import Plots, drawn
from megatron_pr2.report.measures import MEASURES
from megatron_pr2.report.metrics_log import FILE_NAME, Record, read_records, replace_atomically
from megatron_pr2.report.page import render_page
from megatron_pr2.report.records import RunData
from megatron_pr2.report.summary import judge, what_ran

# By section of the page.
PLOTS: dict[str, Callable[[RunData], Plots]] = {
    "learning": plots.learning,
    "routes": plots.routes,
    "layers": plots.per_layer,
    "policy": plots.policy,
    "engine": plots.engine,
    "cost": plots.cost,
}


def write_report(run_dir: str | Path, path: str | Path | None = None) -> Path:
    """Renders metrics.jsonl and config.yaml of a run, which may still be training, into one self-contained page.

    Args:
        path: where to write; `run_dir`/report.html by default. The file is replaced atomically.

    Raises:
        DataError: no records yet, or a damaged metrics.jsonl.
    """
    run_dir = Path(run_dir)
    records = read_records(run_dir)
    if not records:
        raise DataError(f"{run_dir / FILE_NAME} holds no records yet; the report needs one finished rollout step")
    target = Path(path) if path is not None else run_dir / "report.html"
    config = run_dir / "config.yaml"
    text = config.read_text(encoding="utf-8", errors="replace") if config.exists() else None
    replace_atomically(target, render(run_dir.resolve().name, records, text))
    return target


def render(name: str, records: Sequence[Record], config: str | None) -> bytes:
    """The page; `config` is the text of the resolved configuration."""
    data = RunData(records)
    window = plots.window_of(len(data.points))
    found = [(m.title, m.unit.form(value)) for m in MEASURES if math.isfinite(value := m.read(data))]
    return render_page(
        "report.html.j2",
        name=name,
        presets=what_ran(data),
        verdict=judge(data),
        data=data,
        smoothed=f" Running means of {window * data.bin_size} rollouts." if window > 1 else "",
        plots={name: drawn(section(data)) for name, section in PLOTS.items()},
        numbers=pd.DataFrame(found, columns=["measure", "mean"]),
        mini_steps=mini_step_table(data),
        config=config,
    )


def mini_step_table(data: RunData) -> pd.DataFrame:
    """Means over the run, one row per mini-step; measures without any number are left out."""
    table = pd.DataFrame({m.short_title: each.map(m.unit.form) for m in MEASURES if len(each := m.per_mini_step(data))})
    return table.fillna(formats.ABSENT).rename_axis("mini-step").reset_index()
