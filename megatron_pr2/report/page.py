"""The templates beside this file: they hold what the pages say, and get frames and numbers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from megatron_pr2.report import formats, summary, theme


def environment() -> Environment:
    """Templates with the formats of numbers as filters."""
    out = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    every = (formats.fixed, formats.scientific, formats.percent, formats.points, formats.count, formats.duration, formats.share)
    out.filters |= {form.__name__: form for form in (*every, spread, summary.standard_error, summary.predicted, summary.held_back)}
    return out


def spread(error: float) -> str:
    """A standard error of a share, in percentage points."""
    return f"± {100 * error:.3f} standard error" if math.isfinite(error) else "one rollout, no error bar"


def captions() -> dict[str, tuple[str, str]]:
    """Title and caption of every plot."""
    return environment().get_template("captions.html.j2").module.captions  # type: ignore[attr-defined]


def render_page(template: str, **values: Any) -> bytes:
    """A page, from a template that extends base.html.j2."""
    return environment().get_template(template).render(colours=theme.css(), **values).encode()
