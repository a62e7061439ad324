"""Plots of lines that do not have the same points."""

from __future__ import annotations

import re

import pandas as pd
import pytest

from megatron_pr2.report import formats
from megatron_pr2.report.figures import Line, Panel, chart, heat_map


@pytest.mark.parametrize("kind", ["line", "error", "bar", "area"])
def test_lines_may_lack_points_that_others_have(kind: str) -> None:
    """One of two methods has no second mini-step: each value stays at its own place, and the gap stays a gap."""
    whole = pd.Series([1.0, 2.0, 3.0], index=[1, 2, 3])
    lines = [Line(pd.Series([5.0, 6.0], index=[1, 3]), "blue", "a", pd.Series([0.1, 0.1], index=[1, 3])), Line(whole, "green", "b")]
    plot = chart("name", Panel("y", lines, kind=kind))
    assert plot is not None


@pytest.mark.parametrize("spread", [0.0, 1e-6, 1e-4, 0.3])
def test_ticks_of_a_colour_bar_differ(spread: float) -> None:
    """Agreement of 99.99 % and 99.991 % reads alike."""
    table = pd.DataFrame({1: [0.5, 0.5 + spread], 2: [0.5, 0.5 + spread / 2]}, index=pd.Index([0, 1], name="rollout step"))
    plot = heat_map("name", table, None, None, formats.percent)
    assert plot is not None
    labels = re.findall(r"[\d.]+ %", plot.svg)
    assert labels
    assert len(set(labels)) == len(labels)
