"""How methods look in the plots of a comparison."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megatron_pr2.report.comparison.runs import Setting
from megatron_pr2.report.theme import WIDTH, new_figure

PALETTE = ("grey", "red", "blue", "purple", "orange", "green")
FEW = ("blue", "orange", "green", "purple")
LINES = ("-", ":", "-.")
HOLD = "+hold"
_NAME_WIDTH = 26
_LEGEND_ROW = 0.2  # inches


@dataclass(frozen=True)
class Look:
    """How a method is drawn, the same in every plot."""

    colour: str
    line: str = "-"


def looks(settings: Sequence[Setting]) -> dict[str, Look]:
    """A look per method; one that only adds hold-back to another is drawn in its colour, dashed."""
    names = list(dict.fromkeys(name for setting in settings for name in setting.methods))
    baselines = {setting.baseline for setting in settings}
    bases = [name for name in dict.fromkeys(name.removesuffix(HOLD) for name in names) if name not in baselines]
    palette = FEW if len(bases) <= len(FEW) else PALETTE
    colours = {base: Look(palette[i % len(palette)], LINES[i // len(palette) % len(LINES)]) for i, base in enumerate(bases)}
    out = {}
    for name in names:
        base = name.removesuffix(HOLD)
        look = colours.get(base, Look("ink"))
        out[name] = Look(look.colour, "--") if base != name else look
    return out


def short_name(name: str) -> str:
    """A name that fits beside a plot."""
    return name if len(name) <= _NAME_WIDTH else f"{name[: _NAME_WIDTH - 9]}…{name[-8:]}"


def figure_for(names: Sequence[str], height: float) -> Figure:
    """A figure whose axes are `height` minus the margins high, with room for a legend of `names` above them."""
    return new_figure(height + _LEGEND_ROW * _rows(names))


def legend(axes: Axes, names: Sequence[str]) -> None:
    """Legend of `names` above the axes, over the whole width of the figure: names of methods are long."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    top = 1 - (0.12 + _LEGEND_ROW * _rows(names)) / figure.get_figheight()
    figure.subplots_adjust(top=top)
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(0.1 / WIDTH, top),
        bbox_transform=figure.transFigure,
        ncols=_columns(names),
        borderaxespad=0.2,
        borderpad=0.1,
        handlelength=1.2,
        columnspacing=1.2,
    )


def _columns(names: Sequence[str]) -> int:
    longest = max((len(short_name(name)) for name in names), default=0)
    return 1 if longest > 22 else 2 if longest > 14 else 3


def _rows(names: Sequence[str]) -> int:
    return math.ceil(len(names) / _columns(names))
