"""The pages in a real browser: nothing to complain of, nothing asked of the network, readable on a phone, light and dark."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_pr2.report.comparison.comparison import Comparison
from megatron_pr2.report.html import write_report
from megatron_pr2.report.routes_page import write_routes_report
from megatron_pr2.routes.files import save_routes
from tests.report.browser import Browser, find_browser
from tests.report.synthetic import route_tables, run

pytestmark = pytest.mark.skipif(find_browser() is None, reason="no Chromium on PATH (Debian: apt install chromium)")

LOOKS = [
    pytest.param(390, False, id="phone-light"),
    pytest.param(390, True, id="phone-dark"),
    pytest.param(1280, False, id="desktop-light"),
    pytest.param(1280, True, id="desktop-dark"),
]
PAGES = ("run", "old-run", "routes", "two-routes", "comparison")

# Text of a plot that lies outside of it is cut off; half a pixel is rounding.
CUT_OFF = """
[...document.querySelectorAll('figure svg text')].filter(text => {
    const box = text.getBoundingClientRect(), plot = text.closest('svg').getBoundingClientRect();
    return box.width && (box.left < plot.left - .5 || box.right > plot.right + .5 || box.top < plot.top - .5
        || box.bottom > plot.bottom + .5);
}).map(text => text.closest('figure').id + ': ' + text.textContent)
"""
# Elements that stick out of the window, unless they scroll within something.
STICKS_OUT = """
[...document.querySelectorAll('main *')].filter(element => {
    const box = element.getBoundingClientRect();
    return !element.closest('svg, .scroll, pre') && (box.left < -.5 || box.right > innerWidth + .5);
}).map(element => element.outerHTML.slice(0, 80))
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    executable = find_browser()
    assert executable is not None
    with Browser(executable) as browser:
        yield browser


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A page of every kind."""
    directory = tmp_path_factory.mktemp("pages")
    save_run(directory / "run", run(30, hold_back=True))
    old = run(30, kappa=2, gain=-0.3)
    for record in old:
        del record["lift_all"]
    save_run(directory / "old", old)
    save_routes(directory / "engine.safetensors", route_tables(0, sequences=4), "engine")
    save_routes(directory / "actor.safetensors", route_tables(0, sequences=4, drift=0.2), "actor")
    files = [directory / "engine.safetensors", directory / "actor.safetensors"]
    return {
        "run": write_report(directory / "run"),
        "old-run": write_report(directory / "old"),
        "routes": write_routes_report(files[:1]),
        "two-routes": write_routes_report(files, directory / "two.html"),
        "comparison": comparison(directory),
    }


def save_run(directory: Path, records: list[dict]) -> None:
    directory.mkdir()
    (directory / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (directory / "config.yaml").write_text("preset: pr2\nvery_long: " + "x" * 400 + "\n")


def comparison(directory: Path) -> Path:
    runs = []
    for preset in ("r3", "pr2"):
        for seed in range(3):
            runs.append(directory / f"{preset}-{seed}")
            save_run(runs[-1], run(12, preset=preset, seed=seed))
            (runs[-1] / "config.yaml").write_text(f"preset: {preset}\nseed: {seed}\nalgorithm:\n  mini_steps: 4\n")
    return Comparison(runs).write_page(directory / "comparison.html")


@pytest.mark.parametrize(("width", "dark"), LOOKS)
@pytest.mark.parametrize("name", PAGES)
def test_page(browser: Browser, pages: dict[str, Path], name: str, width: int, dark: bool) -> None:
    with browser.open(pages[name], width=width, dark=dark) as page:
        assert page.complaints() == []
        assert page.requests() == []
        assert page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches") == dark
        assert page.evaluate("innerWidth") == width
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate(STICKS_OUT) == []
        assert page.evaluate(CUT_OFF) == []
        # Complete: every plot has a size, every picture inside of them was decoded, and there is a background of the right kind.
        assert page.evaluate("document.querySelectorAll('figure').length") >= 3
        assert page.evaluate("[...document.querySelectorAll('figure svg')].every(s => s.getBoundingClientRect().height > 50)")
        paper = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
        assert (sum(paper) < 200) == dark
        # Also unfolded: the tables scroll within themselves.
        page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate(STICKS_OUT) == []


BAD = """<!DOCTYPE html><html><head><meta charset="utf-8"><link rel="stylesheet" href="https://example.org/style.css"></head><body><main>
<figure id="plot"><svg viewBox="0 0 100 100" width="100" height="100"><text x="90" y="50">cut off here</text></svg></figure>
<p style="width: 2000px">wide</p></main><script>console.error("said"); throw new Error("thrown")</script></body></html>"""


def test_a_bad_page_is_found_out(browser: Browser, tmp_path: Path) -> None:
    """Otherwise the test above could not fail."""
    (tmp_path / "bad.html").write_text(BAD)
    with browser.open(tmp_path / "bad.html", width=390) as page:
        told = " | ".join(page.complaints())
        assert "console.error: ['said']" in told
        assert "exception" in told
        assert "ERR_NAME_NOT_RESOLVED" in told
        assert page.requests() == ["https://example.org/style.css"]
        assert page.evaluate("document.documentElement.scrollWidth") > 390
        assert len(page.evaluate(STICKS_OUT)) == 1
        assert page.evaluate(CUT_OFF) == ["plot: cut off here"]
