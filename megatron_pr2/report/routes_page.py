"""The page of saved route tables: what one file says of its routes, or how two files of the same sequences differ."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from megatron_pr2.errors import DataError
from megatron_pr2.report import figures, formats
from megatron_pr2.report.figures import Form, Line, Panel, X, chart
from megatron_pr2.report.metrics_log import replace_atomically
from megatron_pr2.report.page import Card, count, drawn, numbered, render_page
from megatron_pr2.report.plots import Plots
from megatron_pr2.report.records import Array, exists
from megatron_pr2.report.route_statistics import RouteDifference, RouteStatistics, compare, describe
from megatron_pr2.routes.files import RouteFile

# arXiv 2510.11370: tokens whose routes differ between engine and actor in at least one layer, without replay.
R3_TOUCHED = 0.94


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
        text = render_routes([stack.enter_context(RouteFile(path)) for path in paths])
    replace_atomically(target, text.encode())
    return target


def render_routes(files: Sequence[RouteFile]) -> str:
    """The page of one or two open files as text."""
    # Before the long part: files that cannot be compared are refused at once.
    difference = compare(*files) if len(files) == 2 else None
    sections = []
    for number, file in enumerate(files, start=1):
        statistics = describe(file)
        columns: list[tuple[str, Array, Form]] = [
            ("busiest ÷ mean", statistics.imbalance_L(), lambda v: formats.fixed(v, 2)),
            ("entropy", statistics.entropy_L(), formats.fixed),
            ("never used", statistics.unused_L(), _percent),
            ("stickiness", statistics.stickiness_L(), _percent),
            ("by chance", statistics.chance_L(), _percent),
        ]
        sections.append(
            {
                "anchor": f"file-{number}",
                "title": "Routes" if difference is None else f"File {number}",
                "name": file.path.name,
                "cards": file_cards(file, statistics),
                "plots": drawn(file_plots(statistics, number)),
                "table": numbered("MoE layer", columns),
            }
        )
    return render_page(
        "routes.html.j2",
        name=" and ".join(file.path.name for file in files),
        files=[(number, file.path.name, file.note) for number, file in enumerate(files, start=1)],
        sections=sections,
        compared=None if difference is None else _comparison(difference),
    )


def _percent(share: float) -> str:
    return formats.percent(share, 1)


def file_cards(file: RouteFile, statistics: RouteStatistics) -> list[Card]:
    """The numbers of one file."""
    inner = statistics.missing - statistics.missing_last
    last = f"and {count(statistics.missing_last, 'last token')}, which were no input"
    imbalance_L = statistics.imbalance_L()
    out = [
        Card("Tokens", formats.count(statistics.tokens), f"in {count(statistics.sequences, 'sequence')}"),
        Card("Routers", f"{file.num_layers} × top-{file.topk}", f"MoE layers, of {count(file.num_experts, 'expert')} each"),
        Card("Missing rows", formats.count(inner), last if statistics.missing_last else "tokens without a route"),
    ]
    if statistics.routed:
        out += [
            Card("Busiest expert", f"{imbalance_L.max():.2f} ×", f"the mean load, in layer {1 + int(imbalance_L.argmax())}"),
            Card("Entropy of the load", formats.fixed(float(statistics.entropy_L().mean())), "mean of the layers; 1 is even"),
            Card("Never used", _percent(float(statistics.unused_L().mean())), "of the experts, mean of the layers"),
        ]
    if statistics.neighbours:
        sticky, chance = (_percent(float(v.mean())) for v in (statistics.stickiness_L(), statistics.chance_L()))
        out.append(Card("Stickiness", sticky, f"experts shared by neighbours; chance {chance}"))
    return out


def file_plots(statistics: RouteStatistics, number: int) -> Plots:
    """Load and stickiness of one file; `number` is the file's, for the plots' names."""
    share_LE, imbalance_L = statistics.share_LE(), statistics.imbalance_L()
    x = figures.layers(imbalance_L.size)
    if not exists(share_LE):
        return
    # The 99.5th percentile: one expert that does it all must not make all others look idle.
    high = max(2.0, float(np.percentile(share_LE, 99.5)))
    caption = "Tokens that took the expert, relative to an even load (1×): dark ones idle, bright ones are bottlenecks."
    experts = X("expert", np.arange(share_LE.shape[1]))
    words = f"load-{number}", "Load of the experts", caption
    yield figures.heat_map(experts, share_LE, "viridis", 0.0, high, lambda v: f"{v:g}×", *words)

    even = Line(1.0, "muted", style={"linestyle": "--"})
    panels = [
        Panel("busiest ÷ mean", [Line(imbalance_L, "orange"), even], zero=True),
        Panel("entropy", [Line(statistics.entropy_L(), "blue"), even], zero=True),
    ]
    caption = "Above: load of a layer's busiest expert. Below: entropy of the load, 0 if one expert does all. 1 is even in both."
    yield chart(x, panels, f"balance-{number}", "Balance per layer", caption, height=3.4)

    lines = [
        Line(statistics.chance_L(), "grey", "by chance, at this load"),
        Line(statistics.stickiness_L(), "purple", "neighbouring tokens"),
    ]
    caption = "Share of a token's experts that the token before it took too: far above chance, load comes in bursts of neighbours."
    panel = Panel("shared experts", lines, zero=True, percent=True)
    yield chart(x, [panel], f"sticky-{number}", "Stickiness of routes", caption) if statistics.neighbours else None


def _comparison(difference: RouteDifference) -> dict[str, Any]:
    kind, headline, detail = verdict(difference)
    shares_L4 = difference.changed_shares_L4()
    headings = ("0 changed", "1", "2", "3 or more")
    columns: list[tuple[str, Array, Form]] = [("agreement", difference.agreement_L(), formats.percent)]
    columns += [(name, shares_L4[:, c], formats.percent) for c, name in enumerate(headings)]
    return {
        "kind": kind,
        "headline": headline,
        "detail": detail,
        "cards": difference_cards(difference),
        "plots": drawn(difference_plots(difference)),
        "table": numbered("MoE layer", columns),
    }


def verdict(difference: RouteDifference) -> tuple[str, str, str]:
    """(kind, headline, detail) of two files, in words."""
    if not difference.tokens:
        return "absent", "Nothing to compare", "No token has a route in both files."
    unchanged = float(difference.changed()[0])
    pairs = f"{formats.count(difference.tokens)} tokens in {count(len(difference.kept_LP), 'MoE layer')}"
    if unchanged == 1:
        return "same", "The routes are the same", f"All {pairs} took the same experts in both files."
    paper = ", ".join(f"{name.removeprefix('paper: ')} {_percent(shares[0])}" for name, shares in figures.PAPER_CHANGED)
    detail = f"Of {pairs}. The paper's figures, replayed against current routes in training: {paper}."
    return "info", f"{_share(unchanged)} of the routes are the same", detail


def difference_cards(difference: RouteDifference) -> list[Card]:
    """The numbers of two files."""
    alone = f"; {formats.count(difference.only_first)} only in file 1, {formats.count(difference.only_second)} only in file 2"
    only = alone if difference.only_first + difference.only_second else ""
    out = [
        Card("Sequences compared", formats.count(difference.sequences), f"in both files{only}"),
        Card("Tokens compared", formats.count(difference.tokens), f"{formats.count(difference.skipped)} lack a route in one file"),
    ]
    if difference.tokens:
        agreement_L, unchanged = difference.agreement_L(), float(difference.changed()[0])
        touched = _share(difference.touched / difference.tokens)
        frozen = _percent(figures.PAPER_CHANGED[0][1][0])
        r3 = f"differ in some layer; R3's paper: {formats.percent(R3_TOUCHED, 0)} between engine and actor"
        out += [
            Card("Unchanged pairs", _share(unchanged), f"of (token, layer); the paper's frozen routes {frozen}"),
            Card("Agreement", _share(float(agreement_L.mean())), "of the experts, whatever their order"),
            Card("Least alike", _share(float(agreement_L.min())), f"agreement in layer {1 + int(np.argmin(agreement_L))}"),
            Card("Touched tokens", touched, r3),
        ]
    return out


def difference_plots(difference: RouteDifference) -> Plots:
    """Where two files differ."""
    if not difference.tokens:
        return
    caption = (
        "How many of a token's experts the second file lacks, per MoE layer. The paper's rows compare replayed with current routes "
        "in training."
    )
    rows = [("these two files", difference.changed())]
    yield figures.changed_rows(rows, " unchanged", "files-changed", "Changed experts per token and layer", caption)

    mismatch_L, mismatch_LP, edges = 1 - difference.agreement_L(), 1 - difference.agreement_LP(), difference.edges
    caption = "Share of a token's experts that the second file does not have: a high point is a layer whose routes differ most."
    panel = Panel("1 − agreement", [Line(mismatch_L, "blue")], zero=True, percent=True)
    yield chart(figures.layers(mismatch_L.size), [panel], "files-layers", "Difference per layer", caption)

    mean_P = mismatch_LP.mean(axis=0)
    line = Line(np.append(mean_P, mean_P[-1]), "blue", style={"drawstyle": "steps-post", "marker": ""})
    caption = (
        "Mean over layers; every step averages about as many tokens. A rise says that something builds up along the sequence, such "
        "as an engine's numerics; a level line says that the position does not matter."
    )
    panel = Panel("1 − agreement", [line], zero=True, percent=True)
    yield chart(X("position in the sequence", edges), [panel], "files-positions", "Difference by position", caption)

    caption = "1 − agreement by layer and position: a bright column is a place in the sequence, a bright row a layer."
    ticks = {i + 0.5: str(edges[i]) for i in figures.chosen(len(edges))}
    x = X("position in the sequence", np.arange(mean_P.size) + 1.0, ticks=ticks)
    words = "files-layers-positions", "Difference per layer and position", caption
    high = max(1e-4, float(np.nanmax(mismatch_LP)))
    yield figures.heat_map(x, mismatch_LP, "viridis", 0.0, high, _percent, *words) if min(mismatch_LP.shape) > 1 else None


def _share(share: float) -> str:
    """A share that is not all stays below "100 %" in print."""
    return "> 99.99 %" if 0.99995 <= share < 1 else formats.percent(share)
