"""Plots of lines that do not have the same points."""

from __future__ import annotations

import pandas as pd
import pytest

from megatron_pr2.report.figures import Line, Panel, chart


@pytest.mark.parametrize("kind", ["line", "error", "bar", "area"])
def test_lines_may_lack_points_that_others_have(kind: str) -> None:
    """One of two methods has no second mini-step: each value stays at its own place, and the gap stays a gap."""
    whole = pd.Series([1.0, 2.0, 3.0], index=[1, 2, 3])
    lines = [Line(pd.Series([5.0, 6.0], index=[1, 3]), "blue", "a", pd.Series([0.1, 0.1], index=[1, 3])), Line(whole, "green", "b")]
    plot = chart("name", Panel("y", lines, kind=kind))
    assert plot is not None
