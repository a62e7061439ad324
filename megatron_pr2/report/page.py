"""What the pages of the report share: the template environment, the cards of a headline, writing a page."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from megatron_pr2.report import formats, theme


@dataclass(frozen=True)
class Card:
    """A number of the headline: what it is, the number, and what it is to be compared with."""

    label: str
    value: str
    note: str


def render_page(template: str, **values: Any) -> str:
    """A page as text; the colours of both schemes are among the values.

    Args:
        template: name of a template beside this file, which extends base.html.j2.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    light, dark = theme.css_variables(dark=False), theme.css_variables(dark=True)
    return environment.get_template(template).render(light=light, dark=dark, **values)


def count(number_of: float, noun: str) -> str:
    """ "1 rollout", "12 rollouts"."""
    return f"{formats.count(number_of)} {noun}{'' if round(number_of) == 1 else 's'}"
