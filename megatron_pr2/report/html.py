"""The report of a run: one HTML page that needs nothing but itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from megatron_pr2.errors import DataError
from megatron_pr2.report import formats, plots
from megatron_pr2.report.alarms import alarms
from megatron_pr2.report.environment import in_words, read_environment
from megatron_pr2.report.figures import Plots, drawn
from megatron_pr2.report.measures import MEASURES
from megatron_pr2.report.metrics_log import FILE_NAME, read_records, replace_atomically
from megatron_pr2.report.moments import Explained
from megatron_pr2.report.page import render_page
from megatron_pr2.report.records import RunData
from megatron_pr2.report.summary import against, judge, what_ran

# By section of the page.
PLOTS: dict[str, Callable[[RunData], Plots]] = {
    "learning": plots.learning,
    "routes": plots.routes,
    "prediction": plots.prediction,
    "layers": plots.per_layer,
    "policy": plots.policy,
    "engine": plots.engine,
    "cost": plots.cost,
}


def write_report(run_dir: str | Path, path: str | Path | None = None, baseline: str | Path | None = None) -> Path:
    """Renders what a run, which may still be training, has written into one self-contained page.

    Args:
        path: where to write; `run_dir`/report.html by default. The file is replaced atomically.
        baseline: directory of a run to draw beside it and to say the gain over.

    Raises:
        DataError: no records yet, or a damaged metrics.jsonl.
    """
    run_dir = Path(run_dir)
    other = None if baseline is None else (Path(baseline).resolve().name, _records(Path(baseline)))
    data = RunData(_records(run_dir), baseline=other)
    target = Path(path) if path is not None else run_dir / "report.html"
    config = run_dir / "config.yaml"
    text = config.read_text(encoding="utf-8", errors="replace") if config.exists() else None
    replace_atomically(target, render(run_dir.resolve().name, data, text, read_environment(run_dir)))
    return target


def _records(run_dir: Path) -> list[dict[str, Any]]:
    if records := read_records(run_dir):
        return records
    raise DataError(f"{run_dir / FILE_NAME} holds no records yet; the report needs one finished rollout step")


def render(name: str, data: RunData, config: str | None, environment: Mapping[str, Any]) -> bytes:
    """The page; `config` is the text of the resolved configuration, `environment` what the run is made of."""
    window = plots.window_of(len(data.points))
    found = [(m.title, m.unit.form(value)) for m in MEASURES if math.isfinite(value := m.read(data))]
    return render_page(
        "report.html.j2",
        name=name,
        presets=what_ran(data),
        verdict=judge(data),
        against="" if data.baseline is None else against(data, data.baseline, data.name),
        alarms=alarms(data, str(environment.get("model", {}).get("dtype", ""))),
        environment=in_words(environment),
        one_gate=Explained.of(data).one_gate(),
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
