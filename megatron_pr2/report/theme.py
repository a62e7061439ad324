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
RAMP = 6
WIDTH = 5.2  # inches

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
    "grid.linewidth": 0.8,
    "xtick.color": LIGHT["muted"],
    "ytick.color": LIGHT["muted"],
    "xtick.labelsize": 10,
    "ytick.labelsize": 10,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "legend.frameon": False,
    "legend.fontsize": 10,
    "lines.linewidth": 1.8,
    "path.simplify": True,
}


def new_figure(height: float = 3.0) -> Figure:
    """A figure as wide as a phone's screen (5.2 inches at 72 points), so that its text stays readable there.

    Margins are fixed: a layout engine would draw every figure twice, and axes of neighbouring plots would not line up.
    """
    figure = Figure(figsize=(WIDTH, height))
    figure.subplots_adjust(left=0.98 / WIDTH, right=1 - 0.12 / WIDTH, bottom=0.48 / height, top=1 - 0.1 / height, hspace=0.18)
    return figure


def ramp(position: int, count: int) -> str:
    """Colour of the `position`-th of `count` ordered things."""
    return LIGHT[f"ramp{RAMP - 1 if count <= 1 else round(position * (RAMP - 1) / (count - 1))}"]


def css() -> str:
    """Declarations of every colour, for the light and the dark scheme."""
    light, dark = (" ".join(f"--{name}: {pair[i]};" for name, pair in {**PAGE, **COLOURS}.items()) for i in (0, 1))
    return f":root {{ {light} }}\n@media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}"


def to_svg(figure: Figure, name: str) -> str:
    """The figure as an inline <svg> element: scalable, without ids that clash with other figures, without any URL."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = buffer.getvalue()
    head, body = svg[svg.index("<svg") :].split(">", 1)
    view_box = re.search(r'viewBox="[^"]+"', head)
    head = f'<svg {view_box.group(0) if view_box else ""} aria-hidden="true" focusable="false"'
    body = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', body)
    body = re.sub(r'href="#([^"]+)"', rf'href="#{name}-\1"', body)
    body = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", body)
    body = re.sub(r"<!--.*?-->\s*", "", body, flags=re.S)
    for colour, value in LIGHT.items():
        body = body.replace(value, f"var(--{colour})")
    return f"{head}>{body}".strip()
