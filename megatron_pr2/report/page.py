"""What the pages share: the template environment and the cards of a headline."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from megatron_pr2.report import theme


class Card(NamedTuple):
    """A number of the headline: what it is, the number, and what it is to be compared with."""

    label: str
    value: str
    note: str


def render_page(template: str, **values: Any) -> bytes:
    """A page, from a template beside this file that extends base.html.j2."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(colours=theme.css(), **values).encode()
