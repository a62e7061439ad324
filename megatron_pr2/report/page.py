"""What the pages of the report share: cards of a headline, tables made from columns, the template environment."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib import rc_context

from megatron_pr2.report import formats, theme
from megatron_pr2.report.figures import Form, Plot
from megatron_pr2.report.records import Array

Row = TypeVar("Row")


@dataclass(frozen=True)
class Card:
    """A number of the headline: what it is, the number, and what it is to be compared with."""

    label: str
    value: str
    note: str


@dataclass(frozen=True)
class Cell:
    """A text and the tone in which the page shows it: a kind of verdict, or none."""

    text: str
    kind: str = ""


@dataclass(frozen=True)
class Table:
    headings: Sequence[str]
    rows: Sequence[Sequence[Cell]]


def table_of(rows: Iterable[Row], columns: Sequence[tuple[str, Callable[[Row], Cell | str]]]) -> Table:
    """A table from its columns: a heading, and what a cell says of its row."""
    texts = [[cell if isinstance(cell := read(row), Cell) else Cell(cell) for _, read in columns] for row in rows]
    return Table([heading for heading, _ in columns], texts)


def numbered(name: str, columns: Sequence[tuple[str, Array, Form]]) -> Table:
    """A row per position (mini-step, layer), counted from 1; columns are (heading, values, format of a value)."""
    shown = [(name, lambda i: str(i + 1)), *((title, lambda i, v=v, f=f: f(float(v[i]))) for title, v, f in columns)]
    return table_of(range(len(columns[0][1]) if columns else 0), shown)


def drawn(plots: Iterable[Plot | None]) -> list[Plot]:
    """The plots that there are; drawn in the report's style."""
    with rc_context(theme.STYLE):
        return [plot for plot in plots if plot is not None]


def render_page(template: str, **values: Any) -> str:
    """A page as text, from a template beside this file that extends base.html.j2."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(colours=theme.css(), **values)


def count(number_of: float, noun: str) -> str:
    """ "1 rollout", "12 rollouts"."""
    return f"{formats.count(number_of)} {noun}{'' if round(number_of) == 1 else 's'}"
