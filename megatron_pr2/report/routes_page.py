"""The page of saved route tables: what one file says of its routes, or how two files of the same sequences differ."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from megatron_pr2.errors import DataError
from megatron_pr2.report import formats, route_file_plots, theme
from megatron_pr2.report.metrics_log import replace_atomically
from megatron_pr2.report.page import Card, count, render_page
from megatron_pr2.report.records import Array
from megatron_pr2.report.route_plots import PAPER_CHANGED
from megatron_pr2.report.route_statistics import RouteDifference, RouteStatistics, compare, describe
from megatron_pr2.routes.files import RouteFile

# arXiv 2510.11370: tokens whose routes differ between engine and actor in at least one layer, without replay.
R3_TOUCHED = 0.94


def write_routes_report(files: Sequence[str | os.PathLike[str]], output: str | os.PathLike[str] | None = None) -> Path:
    """Renders one or two files of route tables (megatron_pr2.routes.files) into one self-contained page.

    Args:
        files: one, or two of the same sequences: the engine's and the actor's, or before and after an update.
        output: where to write; by default beside the first file, with its name and `.html` added.

    Returns:
        The path written. The file is replaced atomically.

    Raises:
        DataError: another number of files, a damaged one, or two that cannot be compared; the message says what is wrong where.
    """
    paths = [Path(file) for file in files]
    if not 1 <= len(paths) <= 2:
        raise DataError(f"{len(paths)} files of routes; expected one, or two of the same sequences to compare")
    target = Path(output) if output is not None else paths[0].with_name(paths[0].name + ".html")
    with ExitStack() as stack:
        opened = [stack.enter_context(RouteFile(path)) for path in paths]
        text = render_routes(opened)
    target.parent.mkdir(parents=True, exist_ok=True)
    replace_atomically(target, text.encode())
    return target


def render_routes(files: Sequence[RouteFile]) -> str:
    """The page as text.

    Args:
        files: one or two, open.
    """
    # Before the long part: files that cannot be compared are told at once.
    difference = compare(*files) if len(files) == 2 else None
    statistics = [describe(file) for file in files]
    with theme.style():
        sections = [_section(*each, alone=difference is None) for each in zip(range(1, 3), files, statistics, strict=False)]
        compared = _comparison(difference) if difference is not None else None
    return render_page(
        "routes.html.j2",
        name=" and ".join(file.path.name for file in files),
        files=[(number, file.path.name, file.note) for number, file in enumerate(files, start=1)],
        sections=sections,
        compared=compared,
    )


def _section(number: int, file: RouteFile, statistics: RouteStatistics, alone: bool) -> dict[str, Any]:
    draws = (route_file_plots.load, route_file_plots.balance, route_file_plots.stickiness)
    return {
        "anchor": f"file-{number}",
        "title": "Routes" if alone else f"File {number}",
        "name": file.path.name,
        "cards": file_cards(file, statistics),
        "plots": [plot for draw in draws if (plot := draw(statistics, number)) is not None],
        "table": layer_table(statistics),
    }


def _comparison(difference: RouteDifference) -> dict[str, Any]:
    draws = (
        route_file_plots.changed,
        route_file_plots.agreement,
        route_file_plots.positions,
        route_file_plots.layers_by_position,
    )
    kind, headline, detail = verdict(difference)
    return {
        "kind": kind,
        "headline": headline,
        "detail": detail,
        "cards": difference_cards(difference),
        "plots": [plot for draw in draws if (plot := draw(difference)) is not None],
        "table": difference_table(difference),
    }


def verdict(difference: RouteDifference) -> tuple[str, str, str]:
    """(kind, headline, detail) of two files, in words."""
    if not difference.tokens:
        return "absent", "Nothing to compare", "No token has a route in both files."
    unchanged = float(difference.changed()[0])
    pairs = f"{formats.count(difference.tokens)} tokens in {count(len(difference.kept_L), 'MoE layer')}"
    if unchanged == 1:
        return "same", "The routes are the same", f"All {pairs} took the same experts in both files."
    paper = ", ".join(f"{name.removeprefix('paper: ')} {formats.percent(shares[0], 1)}" for name, shares in PAPER_CHANGED.items())
    detail = f"Of {pairs}. The paper's figures, replayed against current routes in training: {paper}."
    return "told", f"{_share(unchanged)} of the routes are the same", detail


def file_cards(file: RouteFile, statistics: RouteStatistics) -> list[Card]:
    """The numbers of one file."""
    inner = statistics.missing - statistics.missing_last
    told = f"and {count(statistics.missing_last, 'last token')}, which were no input"
    imbalance_L, unused_L, sticky_L = statistics.imbalance_L(), statistics.unused_L(), statistics.stickiness_L()
    out = [
        Card("Tokens", formats.count(statistics.tokens), f"in {count(statistics.sequences, 'sequence')}"),
        Card("Routers", f"{file.num_layers} × top-{file.topk}", f"MoE layers, of {count(file.num_experts, 'expert')} each"),
        Card("Missing rows", formats.count(inner), told if statistics.missing_last else "tokens without a route"),
    ]
    if statistics.routed:
        out += [
            Card("Busiest expert", f"{imbalance_L.max():.2f} ×", f"the mean load, in layer {1 + int(imbalance_L.argmax())}"),
            Card("Entropy of the load", formats.fixed(float(statistics.entropy_L().mean())), "mean of the layers; 1 is even"),
            Card("Never used", formats.percent(float(unused_L.mean()), 1), "of the experts, mean of the layers"),
        ]
    if statistics.neighbours:
        chance = formats.percent(float(statistics.chance_L().mean()), 1)
        out.append(Card("Stickiness", formats.percent(float(sticky_L.mean()), 1), f"experts shared by neighbours; chance {chance}"))
    return out


def difference_cards(difference: RouteDifference) -> list[Card]:
    """The numbers of two files."""
    alone = difference.only_first + difference.only_second
    only = f"; {formats.count(difference.only_first)} only in file 1, {formats.count(difference.only_second)} only in file 2"
    out = [Card("Sequences compared", formats.count(difference.sequences), "in both files" + (only if alone else ""))]
    out.append(
        Card("Tokens compared", formats.count(difference.tokens), f"{formats.count(difference.skipped)} lack a route in one file")
    )
    if difference.tokens:
        agreement_L, changed = difference.agreement_L(), difference.changed()
        worst = 1 + int(np.argmin(agreement_L))
        frozen = formats.percent(next(iter(PAPER_CHANGED.values()))[0], 1)
        out += [
            Card("Unchanged pairs", _share(float(changed[0])), f"of (token, layer); the paper's frozen routes {frozen}"),
            Card("Agreement", _share(float(agreement_L.mean())), "of the experts, whatever their order"),
            Card("Least alike", _share(float(agreement_L.min())), f"agreement in layer {worst}"),
            Card(
                "Touched tokens",
                _share(difference.touched / difference.tokens),
                f"differ in some layer; R3's paper: {formats.percent(R3_TOUCHED, 0)} between engine and actor",
            ),
        ]
    return out


def layer_table(statistics: RouteStatistics) -> dict[str, Any]:
    """One row per layer."""
    columns: list[tuple[str, Array, Any]] = [
        ("busiest ÷ mean", statistics.imbalance_L(), lambda v: formats.fixed(v, 2)),
        ("entropy", statistics.entropy_L(), formats.fixed),
        ("never used", statistics.unused_L(), lambda v: formats.percent(v, 1)),
        ("stickiness", statistics.stickiness_L(), lambda v: formats.percent(v, 1)),
        ("by chance", statistics.chance_L(), lambda v: formats.percent(v, 1)),
    ]
    return _table(columns)


def difference_table(difference: RouteDifference) -> dict[str, Any]:
    """One row per layer."""
    total_L = difference.changed_L4.sum(axis=1)
    shares_L4 = np.divide(
        difference.changed_L4,
        total_L[:, None],
        out=np.full(difference.changed_L4.shape, np.nan),
        where=total_L[:, None] > 0,
    )
    columns: list[tuple[str, Array, Any]] = [("agreement", difference.agreement_L(), formats.percent)]
    columns += [(name, shares_L4[:, c], formats.percent) for c, name in enumerate(("0 changed", "1", "2", "3 or more"))]
    return _table(columns)


def _table(columns: Sequence[tuple[str, Array, Any]]) -> dict[str, Any]:
    layers = columns[0][1].size
    rows = [[str(i + 1), *(form(float(values[i])) for _, values, form in columns)] for i in range(layers)]
    return {"headings": ["MoE layer", *(heading for heading, _, _ in columns)], "rows": rows}


def _share(share: float) -> str:
    """A share that is not all stays below "100 %" in print."""
    return "> 99.99 %" if 0.99995 <= share < 1 else formats.percent(share)
