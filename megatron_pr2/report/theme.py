"""Colours of the report, and plots as inline SVG that follow the page's light or dark colours and its font.

A figure is drawn in the light colours; in its SVG every one of them becomes a CSS variable that the page defines twice.
"""

from __future__ import annotations

import io
import re
from typing import Any

from matplotlib.figure import Figure

# name -> (light, dark). Every light colour occurs once: it is the key by which a variable is found in the SVG.
COLOURS: dict[str, tuple[str, str]] = {
    "ink": ("#1b2430", "#e6eaf0"),
    "muted": ("#5d6878", "#9aa6b6"),
    "grid": ("#dfe4ea", "#2d3642"),
    "blue": ("#2b6cd4", "#74a7ff"),
    "orange": ("#d9730d", "#ffac5c"),
    "green": ("#188a55", "#4fd096"),
    "red": ("#c8344f", "#ff7c8f"),
    "purple": ("#7b4cc2", "#b793f7"),
    "grey": ("#8d97a5", "#7d8998"),
    # An ordinal ramp for mini-steps 1, 2, ...: from pale to strong on either background.
    "ramp0": ("#a9c4ee", "#3b5f96"),
    "ramp1": ("#86abe8", "#4a78bd"),
    "ramp2": ("#6391de", "#5c92e0"),
    "ramp3": ("#4678ce", "#7dadf5"),
    "ramp4": ("#2f5fb6", "#a3c6fb"),
    "ramp5": ("#1f4791", "#cbdffd"),
}
PAGE = {"paper": ("#ffffff", "#12171e"), "card": ("#f4f6f9", "#1b222b")}
LIGHT = {name: pair[0] for name, pair in COLOURS.items()}
STACK = ("blue", "orange", "green", "purple", "red", "grey")
WIDTH = 5.2  # inches: as wide as a phone's screen at 72 points, so that a figure's text stays readable there

STYLE: Any = {
    "svg.fonttype": "none",  # text stays text: small files, the page's font, selectable
    "svg.hashsalt": "megatron-pr2",  # the same records give the same page, byte for byte
    "font.size": 11,
    "font.family": "DejaVu Sans",
    "text.color": LIGHT["ink"],
    "axes.labelcolor": LIGHT["muted"],
    "axes.edgecolor": LIGHT["grid"],
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "grid.color": LIGHT["grid"],
    "xtick.color": LIGHT["muted"],
    "ytick.color": LIGHT["muted"],
    "xtick.labelsize": 10,
    "ytick.labelsize": 10,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "figure.constrained_layout.use": True,
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "legend.frameon": False,
    "legend.fontsize": 10,
    "lines.linewidth": 1.8,
}


def ramp(position: int, count: int) -> str:
    """Name of the colour of the `position`-th of `count` ordered things."""
    return f"ramp{5 if count <= 1 else round(position * 5 / (count - 1))}"


def css() -> str:
    """Declarations of every colour, for the light and the dark scheme."""
    light, dark = (" ".join(f"--{name}: {pair[i]};" for name, pair in {**PAGE, **COLOURS}.items()) for i in (0, 1))
    return f":root {{ {light} }}\n@media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}"


def to_svg(figure: Figure, name: str) -> str:
    """The figure as an <svg> element in the page's colours, without ids that clash with other figures and without any link."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = buffer.getvalue()
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg[svg.index("<svg") :])
    for colour, value in LIGHT.items():
        svg = svg.replace(value, f"var(--{colour})")
    return svg.strip()
