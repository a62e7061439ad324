"""The page of saved route tables: what one file says of its routes, or how two files of the same sequences differ."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from megatron_pr2.errors import DataError
from megatron_pr2.report import formats
from megatron_pr2.report.figures import PAPER_CHANGED, Line, Panel, Plots, changed_rows, chart, chosen, drawn, heat_map, share
from megatron_pr2.report.formats import count
from megatron_pr2.report.metrics_log import replace_atomically
from megatron_pr2.report.page import render_page
from megatron_pr2.report.route_statistics import CHANGED, RouteDifference, RouteStatistics, compare, describe
from megatron_pr2.routes.files import RouteFile

percent = partial(formats.percent, digits=1)
# column of RouteStatistics.layers or RouteDifference.layers: heading, format
COLUMNS: dict[str, tuple[str, Callable[[float], str]]] = {
    "busiest": ("busiest ÷ mean", partial(formats.fixed, digits=2)),
    "entropy": ("entropy", formats.fixed),
    "unused": ("never used", percent),
    "stickiness": ("stickiness", percent),
    "chance": ("by chance", percent),
    **{name: (name, formats.percent) for name in ("agreement", *CHANGED)},
}


def write_routes_report(files: Sequence[str | os.PathLike[str]], output: str | os.PathLike[str] | None = None) -> Path:
    """Renders one or two files of route tables (megatron_pr2.routes.files) into one self-contained page.

    Args:
        files: one, or two of the same sequences: the engine's and the actor's, or before and after an update.
        output: where to write; by default beside the first file, with its name and `.html` added. Replaced atomically.

    Raises:
        DataError: another number of files, a damaged one, or two that cannot be compared; the message says what is wrong where.
    """
    paths = [Path(file) for file in files]
    if not 1 <= len(paths) <= 2:
        raise DataError(f"{len(paths)} files of routes; expected one, or two of the same sequences to compare")
    target = Path(output) if output is not None else paths[0].with_name(paths[0].name + ".html")
    with ExitStack() as stack:
        page = render_routes([stack.enter_context(RouteFile(path)) for path in paths])
    replace_atomically(target, page)
    return target


def render_routes(files: Sequence[RouteFile]) -> bytes:
    """The page of one or two open files."""
    # Before the long part: files that cannot be compared are refused at once.
    difference = compare(*files) if len(files) == 2 else None
    sections = []
    for number, file in enumerate(files, start=1):
        statistics = describe(file)
        sections.append(
            {
                "anchor": f"file-{number}",
                "title": "Routes" if difference is None else f"File {number}",
                "file": file,
                "statistics": statistics,
                "plots": drawn(file_plots(statistics, f"file-{number}-")),
                "table": _table(statistics.layers),
            }
        )
    compared = None
    if difference is not None:
        kind, headline, detail = verdict(difference)
        compared = {
            "kind": kind,
            "headline": headline,
            "detail": detail,
            "difference": difference,
            "plots": drawn(difference_plots(difference)),
            "table": _table(difference.layers),
        }
    return render_page(
        "routes.html.j2",
        name=" and ".join(file.path.name for file in files),
        files=[(number, file.path.name, file.note) for number, file in enumerate(files, start=1)],
        sections=sections,
        compared=compared,
    )


def _table(layers: pd.DataFrame) -> pd.DataFrame:
    return pd.DataFrame({COLUMNS[name][0]: values.map(COLUMNS[name][1]) for name, values in layers.items()}).reset_index()


def file_plots(statistics: RouteStatistics, prefix: str) -> Plots:
    """Load and stickiness of one file; `prefix` begins the plots' names."""
    load, layers = statistics.load, statistics.layers
    # The 99.5th percentile: one expert that does it all must not make all others look idle.
    high = max(2.0, float(np.nanpercentile(load, 99.5))) if load.notna().any(axis=None) else None
    yield heat_map(f"{prefix}load", load.T, 0.0, high, "{:g}×".format)

    panels = [
        Panel("busiest ÷ mean", [Line(layers["busiest"], "orange")], zero=True, rules={"": 1.0}),
        Panel("entropy", [Line(layers["entropy"])], zero=True, rules={"": 1.0}),
    ]
    yield chart(f"{prefix}balance", *panels, height=3.4)

    if statistics.neighbours:
        chance = Line(layers["chance"], "grey", "by chance, at this load")
        lines = [chance, Line(layers["stickiness"], "purple", "neighbouring tokens")]
        panel = Panel("shared experts", lines, zero=True, form=share)
        yield chart(f"{prefix}sticky", panel)


def verdict(difference: RouteDifference) -> tuple[str, str, str]:
    """(kind, headline, detail) of two files, in words."""
    if not difference.tokens:
        return "absent", "Nothing to compare", "No token has a route in both files."
    unchanged = difference.layers["0 changed"].mean()
    pairs = f"{count(difference.tokens)} tokens in {count(len(difference.layers), 'MoE layer')}"
    if not difference.touched:
        return "same", "The routes are the same", f"All {pairs} took the same experts in both files."
    paper = ", ".join(f"{name.removeprefix('paper: ')} {percent(shares[0])}" for name, shares in PAPER_CHANGED.items())
    detail = f"Of {pairs}. The paper's figures, replayed against current routes in training: {paper}."
    return "info", f"{formats.share(unchanged)} of the routes are the same", detail


def difference_plots(difference: RouteDifference) -> Plots:
    """Where two files differ."""
    rows = {"these two files": difference.layers[list(CHANGED)].mean()}
    yield changed_rows("files-changed", rows, " unchanged")

    mismatch = 1 - difference.layers["agreement"]
    panel = Panel("1 − agreement", [Line(mismatch)], zero=True, form=share)
    yield chart("files-layers", panel)

    positions = 1 - difference.positions
    mean = positions.mean(axis=1)
    mean.loc[difference.end] = mean.iloc[-1]
    line = Line(mean, style={"drawstyle": "steps-post", "marker": ""})
    yield chart("files-positions", Panel("1 − agreement", [line], zero=True, form=share))

    if min(positions.shape) > 1 and difference.tokens:
        edges = [*positions.index, difference.end]
        ticks = {i + 0.5: str(edges[i]) for i in chosen(len(edges))}
        table = positions.set_axis(pd.RangeIndex(1, len(edges), name=positions.index.name))
        high = max(1e-4, float(np.nanmax(positions)))
        yield heat_map("files-layers-positions", table, 0.0, high, percent, ticks=ticks)
