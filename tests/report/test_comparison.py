"""Runs side by side: known effects get the right verdict, intervals are scipy's, and the page needs nothing but itself."""

from __future__ import annotations

import json
import math
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import numpy as np
import pandas as pd
import pytest
import scipy.stats

from megatron_pr2.errors import DataError
from megatron_pr2.report import theme
from megatron_pr2.report.comparison.comparison import BEGIN, END, Comparison
from megatron_pr2.report.comparison.numbers import BETTER, SAME, UNKNOWN, WORSE, Interval, interval
from megatron_pr2.report.comparison.runs import load, short
from megatron_pr2.report.measures import BY_KEY, FINAL_REWARD
from tests.report.page import Page
from tests.report.synthetic import run

STEPS = 10


def make(
    directory: Path,
    preset: str,
    seed: int = 0,
    *,
    kappa: int = 4,
    lr: float = 1e-4,
    bonus: float = 0.0,
    gain: float = 0.3,
    steps: int = STEPS,
    pr2: str = "",
    **settings: Any,
) -> Path:
    """A run directory: synthetic records whose rewards are those of r3 with this seed plus `bonus`."""
    records = run(steps, preset=preset, kappa=kappa, layers=3, gain=gain, seed=seed)
    for record in records:
        record["reward"] = 0.3 + 0.1 * seed + 0.01 * record["step"] + bonus
    return write(directory, records, preset, seed, kappa, lr, pr2, **settings)


def write(
    directory: Path, records: Sequence[Any], preset: str, seed: int, kappa: int, lr: float, pr2: str = "", **settings: Any
) -> Path:
    directory.mkdir(parents=True)
    (directory / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    extra = "".join(f"{key}: {value}\n" for key, value in settings.items())
    (directory / "config.yaml").write_text(
        f"preset: {preset}\nseed: {seed}\nrun: {directory}\npr2: {{{pr2}}}\nalgorithm: {{mini_steps: {kappa}}}\n"
        f"optimizer: {{lr: {lr}}}\n{extra}"
    )
    return directory


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three seeds of each method at off-4, with effects on the reward that are large, absent and negative, and two at off-8."""
    root = tmp_path_factory.mktemp("runs")
    out = []
    for seed in range(3):
        wobble = 0.01 * (seed - 1)
        out += [
            make(root / f"r3-{seed}", "r3", seed),
            make(root / f"grpo-{seed}", "grpo", seed, bonus=-0.2 + wobble),
            make(root / f"post-{seed}", "pr2", seed, bonus=0.2 + wobble, gain=0.3),
            make(root / f"delta-{seed}", "pr2", seed, bonus=wobble, gain=-0.3, pr2="target: delta"),
            make(root / f"r3-8-{seed}", "r3", seed, kappa=8),
            make(root / f"post-8-{seed}", "pr2", seed, kappa=8, bonus=wobble),
        ]
    return out


# ---- statistics ----------------------------------------------------------------------------------------------------------


def test_intervals_are_those_of_scipy() -> None:
    for values in ([0.3, 0.5], [0.1, -0.4, 0.7], list(np.random.default_rng(0).normal(size=9))):
        low, high = scipy.stats.t.interval(0.95, len(values) - 1, np.mean(values), scipy.stats.sem(values))
        found = interval(pd.Series([*values, math.nan]))
        assert (found.mean - found.half, found.mean + found.half) == (pytest.approx(low), pytest.approx(high))
        assert found.seeds == len(values)


def test_paired_differences_are_those_of_scipy(tmp_path: Path) -> None:
    """Seeds differ by far more than methods, and pairs see through it."""
    rng = np.random.default_rng(1)
    level, effect = rng.normal(0, 10, 6), rng.normal(0.5, 0.2, 6)
    paths = []
    for seed in range(6):
        for name, preset, reward in (("a", "r3", level[seed]), ("b", "pr2", level[seed] + effect[seed])):
            paths.append(write(tmp_path / f"{name}{seed}", [{"step": 0, "reward": reward}], preset, seed, 4, 1e-4))
    paths.append(write(tmp_path / "alone", [{"step": 0, "reward": 99.0}], "pr2", 9, 4, 1e-4))
    expected = scipy.stats.ttest_rel(level + effect, level).confidence_interval(0.95)
    comparison = Comparison(paths)
    found = comparison.numbers.against_baseline(comparison.settings[0], "pr2", FINAL_REWARD)
    assert (found.mean - found.half, found.mean + found.half) == (pytest.approx(expected.low), pytest.approx(expected.high))
    assert (found.seeds, found.verdict()) == (6, BETTER)
    unpaired = scipy.stats.ttest_ind(level + effect, level).confidence_interval(0.95)
    assert unpaired.low < 0 < unpaired.high


@pytest.mark.parametrize(
    ("values", "better", "word"),
    [
        ([0.7], 1, UNKNOWN),
        ([math.nan], 1, UNKNOWN),
        ([], 1, UNKNOWN),
        ([0.2, 0.2, 0.2], 1, BETTER),
        ([-0.2, -0.21], -1, BETTER),
        ([-0.2, -0.21], 1, WORSE),
        ([0.0, 0.0], 1, SAME),
        ([-0.1, 0.1], 1, SAME),
    ],
)
def test_an_interval_beside_zero_is_a_verdict(values: list[float], better: int, word: str) -> None:
    assert interval(pd.Series(values, dtype=float)).verdict(better) == word


# ---- sorting -------------------------------------------------------------------------------------------------------------


def test_runs_are_sorted_by_setting_method_and_seed(runs: list[Path]) -> None:
    off4, off8 = load(runs)
    assert (off4.label, off8.label) == ("off-4, lr 1e-4", "off-8, lr 1e-4")
    assert list(off4.methods) == ["r3", "grpo", "pr2 post", "pr2 delta"]
    assert all(list(replicates) == [0, 1, 2] for replicates in off4.methods.values())
    assert off4.baseline == off8.baseline == "r3"


def test_given_names_take_the_place_of_derived_ones(runs: list[Path]) -> None:
    names = {path: (f"method {path.name.split('-')[0]}", "") for path in runs}
    off4, _ = load(runs, names)
    assert set(off4.methods) == {"method r3", "method grpo", "method post", "method delta"}
    assert off4.baseline == "method r3"


def test_a_word_makes_a_setting_of_its_own(runs: list[Path]) -> None:
    names = {path: (path.name.split("-")[0], "eager" if path.name.endswith("2") else "") for path in runs if "-8-" not in path.name}
    plain, eager = load(names, names)
    assert (plain.label, eager.label) == ("off-4, lr 1e-4", "off-4, lr 1e-4, eager")
    assert [list(seeds) for seeds in plain.methods.values()] == [[0, 1]] * 4
    assert list(eager.methods["post"]) == [2]


def test_settings_without_effect_make_no_difference(tmp_path: Path) -> None:
    """alpha means nothing to r3, and where a run is kept means nothing to anybody."""
    paths = [make(tmp_path / "a", "r3", 0, pr2="alpha: 3.0"), make(tmp_path / "b", "r3", 1, steps_=1, checkpoint_every=2)]
    (tmp_path / "b" / "config.yaml").write_text((tmp_path / "b" / "config.yaml").read_text().replace("steps_", "steps"))
    (setting,) = load(paths)
    assert {name: list(seeds) for name, seeds in setting.methods.items()} == {"r3": [0, 1]}


def test_names_say_what_differs_and_has_an_effect(tmp_path: Path) -> None:
    given = {
        "a": "predictor: momentum, hold_back: false",
        "b": "predictor: momentum, hold_back: true, alpha: 7.0",
        "c": "predictor: learned, target: delta, hold_back: false, momentum: 5.0, held_out_share: 0.5",
        "d": "predictor: learned, hold_back: false, alpha: 10.0",
    }
    (setting,) = load([make(tmp_path / name, "pr2", pr2=text) for name, text in given.items()])
    assert list(setting.methods) == [
        "pr2 momentum hold_back=false",
        "pr2 momentum hold_back=true",
        "pr2 learned delta alpha=0.1 hold_back=false",
        "pr2 learned post alpha=10 hold_back=false",
    ]


def test_the_same_seed_twice_is_no_replicate(tmp_path: Path) -> None:
    (setting,) = load([make(tmp_path / "a", "r3"), make(tmp_path / "b", "r3")])
    assert list(setting.methods) == ["r3 [a]", "r3 [b]"]
    assert set(setting.methods["r3 [a]"]) == {0}


def test_another_temperature_is_another_setting(tmp_path: Path) -> None:
    paths = [make(tmp_path / name, "r3", rollout=f"{{temperature: {name}}}") for name in ("0.7", "1.0")]
    assert [setting.label for setting in load(paths)] == ["off-4, lr 1e-4, temperature 0.7", "off-4, lr 1e-4, temperature 1"]
    assert len({setting.slug for setting in load(paths)}) == 2


def test_without_r3_the_first_method_is_the_baseline(tmp_path: Path) -> None:
    (setting,) = load([make(tmp_path / "a", "pr2"), make(tmp_path / "b", "grpo")])
    assert setting.baseline == "pr2"


def test_values_read_as_they_are_typed() -> None:
    assert [short(v) for v in (1e-4, 0.00015, 3e-05, 0.5, 1.0, True, None, "post", 4)] == [
        "1e-4", "1.5e-4", "3e-5", "0.5", "1", "true", "None", "post", "4",
    ]  # fmt: skip


# ---- verdicts ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def comparison(runs: list[Path]) -> Comparison:
    return Comparison(runs, title="Does <it> pay?", facts=[("Machine", "a & b")])


def rows_of(table: pd.DataFrame) -> dict[str, list[str]]:
    return {name: texts for name, *texts in table.itertuples(index=False)}


def test_known_effects_get_the_right_verdict(comparison: Comparison) -> None:
    """Also a hopeless lift shows; without a predictor there is no verdict on lift."""
    off4, off8 = (rows_of(comparison.tables.verdicts(setting)) for setting in comparison.settings)
    assert {name: texts[:2] for name, texts in off4.items()} == {
        "r3": ["baseline", "-"],
        "grpo": [WORSE, "-"],
        "pr2 post": [BETTER, "above zero"],
        "pr2 delta": [SAME, "below zero"],
    }
    assert off8["pr2 post"][:2] == [SAME, "above zero"]
    assert off4["pr2 post"][3] == "+0.200 ± 0.025"
    difference = comparison.numbers.against_baseline(comparison.settings[0], "pr2 post", FINAL_REWARD)
    assert difference.mean == pytest.approx(0.2)
    assert difference.half == pytest.approx(scipy.stats.t.ppf(0.975, 2) * 0.01 / math.sqrt(3))


def test_every_comparison_is_counted(comparison: Comparison) -> None:
    conclusion = comparison.tables.conclude()
    assert conclusion.headline == "Final reward against r3: 1 better, 2 no different, 1 worse"
    text = " ".join(conclusion.details)
    assert "above zero in 2, not different from zero in 0, below zero in 1 of 3 measurements" in text
    assert "of 4 comparisons about 0.2 would look better or worse by chance alone" in text


def test_over_all_settings_a_seed_counts_once(comparison: Comparison, runs: list[Path]) -> None:
    together = comparison.numbers.over_settings("pr2 post", FINAL_REWARD, difference=True)
    assert (together.seeds, together.mean) == (3, pytest.approx(0.1))
    rows = rows_of(comparison.tables.overall())
    assert rows["pr2 post"][:2] == ["1 / 1 / 0", "2 / 0 / 0"]
    assert (rows["grpo"][1], rows["r3"][0]) == ("-", "-")
    # A seed that one setting lacks is left out.
    fewer = Comparison([path for path in runs if path.name != "post-8-2"])
    together = fewer.numbers.over_settings("pr2 post", FINAL_REWARD, difference=True)
    assert (together.seeds, together.mean) == (2, pytest.approx(((0.19 - 0.01) / 2 + 0.2 / 2) / 2))


def test_one_seed_has_no_interval(tmp_path: Path) -> None:
    comparison = Comparison([make(tmp_path / "r3", "r3"), make(tmp_path / "pr2", "pr2", bonus=0.5)])
    row = rows_of(comparison.tables.verdicts(comparison.settings[0]))["pr2"]
    assert row[0] == "one seed: not known"
    assert not any("±" in text for text in row)
    assert comparison.tables.conclude().kind == "early"
    page = Page(comparison.write_page(tmp_path / "page.html"))
    assert "One seed and therefore no interval: r3, pr2." in page.text


def test_lengths_are_cut_to_what_all_have(tmp_path: Path) -> None:
    comparison = Comparison([make(tmp_path / "short", "r3", steps=5), make(tmp_path / "long", "pr2", steps=20)])
    (setting,) = comparison.settings
    assert setting.lengths == (5, 20)
    assert comparison.numbers.of_method(setting, "pr2", FINAL_REWARD).mean == pytest.approx(0.3 + 0.01 * 4)
    page = Page(comparison.write_page(tmp_path / "page.html"))
    assert "5 to 20 rollouts: every number and plot is of the first 5" in page.text


def test_missing_values_are_left_out_not_zero(tmp_path: Path) -> None:
    records = run(4, preset="pr2", kappa=2, layers=2)
    for record in records[1:]:
        record["lift"] = record["reward"] = record["hold_back"] = None
        record["mini_steps"][1]["approx_kl"] = None
        del record["logprob_gap"], record["seconds"]
    paths = [write(tmp_path / "holes", records, "pr2", 0, 2, 1e-4), write(tmp_path / "bare", [{"step": 0}], "r3", 0, 2, 1e-4)]
    comparison = Comparison(paths)
    (setting,) = comparison.settings
    assert comparison.numbers.of_method(setting, "r3", FINAL_REWARD) == Interval(ANY, ANY, 0)
    assert comparison.numbers.against_baseline(setting, "pr2", FINAL_REWARD).verdict() == UNKNOWN
    Page(comparison.write_page(tmp_path / "page.html"))
    alone = Comparison(paths[:1])
    means = {key: alone.numbers.of_method(alone.settings[0], "pr2", BY_KEY[key]).mean for key in ("reward_mean", "approx_kl")}
    assert means["reward_mean"] == pytest.approx(records[0]["reward"])
    assert means["approx_kl"] == pytest.approx(records[0]["mini_steps"][1]["approx_kl"])


def test_runs_that_cannot_be_compared_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no run to compare"):
        load([])
    with pytest.raises(DataError, match="does not exist"):
        load([tmp_path])
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(DataError, match="holds no records yet"):
        load([tmp_path])
    (tmp_path / "metrics.jsonl").write_text('{"step":0}\n')
    (tmp_path / "config.yaml").write_text("preset: [")
    with pytest.raises(DataError, match=r"config\.yaml cannot be read"):
        load([tmp_path])


def test_a_run_without_configuration_is_known_by_its_records(tmp_path: Path) -> None:
    path = make(tmp_path / "run", "pr2", 5, kappa=2)
    (path / "config.yaml").unlink()
    (setting,) = load([path])
    assert (setting.label, list(setting.methods), list(setting.methods["pr2"])) == ("off-2, lr 3e-4", ["pr2"], [5])


@pytest.mark.parametrize(("logged", "lr"), [(0.0, 0.0), (None, math.nan)])
def test_a_rate_that_starts_at_0_or_was_not_finite(tmp_path: Path, logged: float | None, lr: float) -> None:
    path = make(tmp_path / "a", "pr2", 5)
    (path / "config.yaml").unlink()
    records = [json.loads(line) | {"lr": logged} for line in (path / "metrics.jsonl").read_text().splitlines()]
    (path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (setting,) = load([path])
    assert setting.lr == pytest.approx(lr, nan_ok=True)


# ---- page, Markdown, CSV -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def page(comparison: Comparison, tmp_path_factory: pytest.TempPathFactory) -> Page:
    target = tmp_path_factory.mktemp("page") / "deep" / "comparison.html"
    assert comparison.write_page(target) == target
    return Page(target)


def test_page_says_what_happened(page: Page) -> None:
    assert "Does <it> pay?" in page.text
    assert "a & b" in page.text
    assert "18 runs: 4 methods, 2 settings" in page.text
    assert page.text.index("1 better, 2 no different, 1 worse") < page.text.index("off-8, lr 1e-4 method")
    assert "76.9 / 19.6 / 2.6 / 0.9 %" in page.text
    assert "92.2 / 7.7 / 0.1 / 0.0 %" in page.text
    for phrase in ("99.75 % falling to 98.25 %", "at most 0.0015", "96 to 99 %"):
        assert phrase in page.text
    assert "All settings together" in page.text


def test_page_has_every_plot_with_a_caption(page: Page) -> None:
    expected = {
        "reward", "reward_final-difference", "lift_all", "lift-curve", "changed", "agreement-mini-steps", "reward_mean-difference",
        "lift", "lift_all-mini-steps", "kl_predicted", "coverage_gap", "ratio_variance-mini-steps", "clip_fraction-mini-steps",
        "approx_kl-mini-steps", "logprob_gap", "time",
    }  # fmt: skip
    assert page.plots == {f"{slug}-{name}" for slug in ("off-4-lr-1e-4", "off-8-lr-1e-4") for name in expected}


def test_runs_without_replay_have_no_agreement(tmp_path: Path) -> None:
    paths = [make(tmp_path / f"grpo-{seed}", "grpo", seed) for seed in range(2)]
    found = Page(Comparison(paths).write_page(tmp_path / "page.html"))
    assert "off-4-lr-1e-4-reward" in found.plots
    assert not [name for name in found.plots if "lift" in name or "agreement" in name or "changed" in name]
    assert "No other method to compare" in found.text


def test_hold_back_is_drawn_where_there_is_some(tmp_path: Path) -> None:
    records = run(6, preset="pr2", kappa=2, layers=2)
    for record in records:
        record["hold_back"] = {"beta": [0.25, 0.75], "lift": [0.0, 0.0], "lift_error": [0.0, 0.0]}
    comparison = Comparison([write(tmp_path / "held", records, "pr2", 0, 2, 1e-4)])
    assert comparison.numbers.of_method(comparison.settings[0], "pr2", BY_KEY["hold_back_beta"]).mean == pytest.approx(0.5)
    assert "off-2-lr-1e-4-beta" in Page(comparison.write_page(tmp_path / "page.html")).plots


def test_markdown_keeps_what_people_wrote(comparison: Comparison, tmp_path: Path) -> None:
    target = tmp_path / "docs" / "results.md"
    target.parent.mkdir()
    target.write_text(f"# Mine\n\nbefore\n\n{BEGIN}\nold\n{END}\n\nafter\n", encoding="utf-8")
    assert comparison.write_markdown(target) == target
    text = target.read_text(encoding="utf-8")
    assert text.startswith("# Mine\n\nbefore\n")
    assert text.endswith("after\n")
    assert "\nold\n" not in text
    assert "| pr2 post | 1 / 1 / 0 | 2 / 0 / 0 |" in re.sub(" +", " ", text)
    assert "- Machine: a & b" in text
    images = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text)
    assert {f"results/{file.name}" for file in (tmp_path / "docs" / "results").glob("*.svg")} == set(images)
    names = ["reward_final-difference", "lift_all", "agreement-mini-steps", "ratio_variance-mini-steps"]
    expected = [f"off-4-lr-1e-4-{name}" for name in names[:2]] + [f"off-8-lr-1e-4-{name}" for name in names]
    assert images == [f"results/{name}.svg" for name in expected]
    rows = pd.read_csv(tmp_path / "docs" / "results" / "mini_steps.csv")
    rows = rows.query("measure == 'agreement' and setting == 'off-8, lr 1e-4' and method == 'r3'")
    assert rows["mini_step"].tolist() == list(range(1, 9))
    assert (tmp_path / "docs" / "results" / "summary.csv").exists()
    for image in images:
        content = (target.parent / image).read_text(encoding="utf-8")
        assert len(content) < 150_000
        root = ElementTree.fromstring(content)
        assert root.tag.endswith("svg")
        assert root.attrib["width"]
        assert set(re.findall(r"var\(--(\w+)\)", content)) <= set(theme.COLOURS) | set(theme.PAGE)
        assert "https" not in content


def test_markdown_of_others_is_not_overwritten(comparison: Comparison, tmp_path: Path) -> None:
    target = tmp_path / "results.md"
    target.write_text("precious\n")
    with pytest.raises(DataError, match="has no lines"):
        comparison.write_markdown(target)
    assert target.read_text() == "precious\n"


def test_csv_holds_the_numbers_of_the_page(comparison: Comparison, tmp_path: Path) -> None:
    comparison.write_cells(tmp_path / "cells.csv")
    comparison.write_summary(tmp_path / "summary.csv")
    cells = pd.read_csv(tmp_path / "cells.csv")
    off4 = comparison.settings[0]
    mine = cells[(cells["run"] == "post-1") & cells["mini_step"].notna()].set_index(["measure", "mini_step"])["value"]
    expected = [np.mean([r["mini_steps"][i]["agreement"] for r in off4.methods["pr2 post"][1].records]) for i in range(4)]
    assert mine["agreement"].tolist() == pytest.approx(expected)
    assert sum(mine[f"changed_{c}", 2] for c in range(4)) == pytest.approx(1.0)
    summary = pd.read_csv(tmp_path / "summary.csv").set_index(["mini_steps", "method", "measure"])
    row = summary.loc[(4, "pr2 post", "reward_final")]
    found = comparison.numbers.against_baseline(off4, "pr2 post", FINAL_REWARD)
    assert row["difference_low"] == pytest.approx(found.mean - found.half)
    assert (row["common_seeds"], row["verdict"]) == (3, BETTER)
    assert summary.loc[(4, "r3", "reward_final")][["common_seeds", "difference", "verdict"]].isna().all()
    assert (4, "grpo", "agreement") not in summary.index


def test_methods_without_a_common_seed_have_0_of_them(tmp_path: Path) -> None:
    """An empty cell would be that of the baseline."""
    comparison = Comparison([make(tmp_path / "r3", "r3", seed=0), make(tmp_path / "pr2", "pr2", seed=7)])
    comparison.write_summary(tmp_path / "summary.csv")
    summary = pd.read_csv(tmp_path / "summary.csv").set_index(["method", "measure"])
    assert summary.loc[("pr2", "reward_final"), "common_seeds"] == 0
    assert math.isnan(summary.loc[("r3", "reward_final"), "common_seeds"])
