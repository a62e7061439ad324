"""Tables and verdicts of a comparison, as texts that the page and the Markdown share."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from megatron_pr2.report import formats
from megatron_pr2.report.comparison import measures
from megatron_pr2.report.comparison.measures import MEASURES, Measure, against_baseline, of_method, over_settings
from megatron_pr2.report.comparison.runs import Setting
from megatron_pr2.report.comparison.stats import BETTER, CONFIDENCE, SAME, UNKNOWN, WORSE, Interval, interval, verdict
from megatron_pr2.report.page import count
from megatron_pr2.report.records import Array, mean

_KINDS = {BETTER: "helped", WORSE: "hurt", SAME: "same", UNKNOWN: "absent"}
_ABOUT_ZERO = {BETTER: "above zero", WORSE: "below zero", SAME: "not different from zero", UNKNOWN: UNKNOWN}


@dataclass(frozen=True)
class Cell:
    """A text and the tone in which the page shows it."""

    text: str
    kind: str = ""

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Table:
    headings: Sequence[str]
    rows: Sequence[Sequence[Cell]]


@dataclass(frozen=True)
class Conclusion:
    """The headline of the page; `kind` as in report.summary.Verdict."""

    kind: str
    headline: str
    details: Sequence[str] = field(default_factory=tuple)


def estimate(value: Interval, form: Callable[[float], str], form_half: Callable[[float], str] | None = None) -> str:
    """ "0.512 ± 0.031", or the mean alone where there is one seed."""
    if not math.isfinite(value.mean):
        return formats.ABSENT
    if not value.known:
        return form(value.mean)
    return f"{form(value.mean)} ± {(form_half or form)(value.half).lstrip('+')}"


def predicts(setting: Setting, method: str) -> bool:
    """Whether the method has a predictor: without one a lift is no verdict on anything."""
    return any(run.method.get("predictor", "none") != "none" for run in setting.methods[method].values())


def reward_verdict(setting: Setting, method: str) -> str:
    """The word for a method's final reward against the baseline's."""
    return verdict(against_baseline(setting, method, measures.FINAL_REWARD))


def lift_verdict(setting: Setting, method: str, measure: Measure = measures.LIFT) -> str:
    """The word for a method's lift against zero."""
    return verdict(of_method(setting, method, measure))


def verdicts(setting: Setting) -> Table:
    """Final reward, difference to the baseline and lift of every method of a setting; words first, where a phone shows them."""
    rows = []
    for method in setting.methods:
        reward, lift = (of_method(setting, method, m) for m in (measures.FINAL_REWARD, measures.LIFT))
        against, lift_is = Cell("baseline", "absent"), Cell(formats.ABSENT)
        difference = Cell(formats.ABSENT)
        if method != setting.baseline:
            word = reward_verdict(setting, method)
            against = Cell(_word(word, setting, method), _KINDS[word])
            difference = _cell(against_baseline(setting, method, measures.FINAL_REWARD), measures.FINAL_REWARD, True)
        if predicts(setting, method) and lift.count:
            word = lift_verdict(setting, method)
            lift_is = Cell(_ABOUT_ZERO[word], _KINDS[word])
        numbers_of = (_cell(reward, measures.FINAL_REWARD), difference, _cell(lift, measures.LIFT))
        rows.append([Cell(method), against, lift_is, *numbers_of, Cell(str(len(setting.methods[method])))])
    base = setting.baseline
    return Table(["method", f"against {base}", "lift is", "final reward", f"minus {base}", "lift", "seeds"], rows)


def _word(word: str, setting: Setting, method: str) -> str:
    if word != UNKNOWN:
        return word
    common = set(setting.methods[method]) & set(setting.methods[setting.baseline])
    return "one seed: not known" if len(common) == 1 else "no common seed" if not common else "no reward"


def overall(settings: Sequence[Setting]) -> Table:
    """Every method over all settings that have it."""
    rows = []
    for method in dict.fromkeys(name for setting in settings for name in setting.methods):
        where = [setting for setting in settings if method in setting.methods]
        compared = [setting for setting in where if method != setting.baseline]
        predicting = [setting for setting in where if predicts(setting, method)]
        reward = over_settings(compared, method, measures.FINAL_REWARD, difference=True)
        lifts = [Cell(formats.ABSENT)] * 2
        if predicting:
            lifts = [_cell(over_settings(where, method, m, difference=False), m) for m in (measures.LIFT, measures.LATER_LIFT)]
        words = (
            Cell(_tally([reward_verdict(s, method) for s in compared])),
            Cell(_tally([lift_verdict(s, method) for s in predicting])),
        )
        rows.append([Cell(method), *words, _cell(reward, measures.FINAL_REWARD, True), *lifts, Cell(str(len(where)))])
    headings = ["method", "better / no different / worse", "lift above / about / below zero", "final reward minus baseline", "lift"]
    return Table([*headings, "lift, mini-steps 2 to κ", "settings"], rows)


def _tally(words: Sequence[str]) -> str:
    if not words:
        return formats.ABSENT
    counts = Counter(words)
    text = f"{counts[BETTER]} / {counts[SAME]} / {counts[WORSE]}"
    return f"{text} ({counts[UNKNOWN]} not known)" if counts[UNKNOWN] else text


def conclude(settings: Sequence[Setting]) -> Conclusion:
    """How many comparisons went which way; all of them are counted, and how many would by chance."""
    pairs = [(setting, method) for setting in settings for method in setting.methods]
    rewards = Counter(reward_verdict(s, m) for s, m in pairs if m != s.baseline)
    lifts = Counter(lift_verdict(s, m) for s, m in pairs if predicts(s, m))
    known, known_lifts = rewards.total() - rewards[UNKNOWN], lifts.total() - lifts[UNKNOWN]
    bases = " or ".join(dict.fromkeys(setting.baseline for setting in settings))
    details = []
    if known_lifts:
        details.append(
            f"Lift of predicted over frozen routes: above zero in {lifts[BETTER]}, not different from zero in {lifts[SAME]}, "
            f"below zero in {lifts[WORSE]} of {count(known_lifts, 'measurement')}."
        )
    if not known:
        headline = "Rewards cannot be compared: a difference needs two common seeds" if rewards else "No other method to compare"
        return Conclusion("early", headline, details)
    chance = (1 - CONFIDENCE) * known
    details.append(
        f"An interval of {100 * CONFIDENCE:.0f} % excludes the truth once in {1 / (1 - CONFIDENCE):.0f} times: of "
        f"{count(known, 'comparison')} about {formats.fixed(chance, 1)} would look better or worse by chance alone."
    )
    if rewards[UNKNOWN]:
        details.append(f"{count(rewards[UNKNOWN], 'comparison')} had fewer than two common seeds.")
    headline = f"Final reward against {bases}: {rewards[BETTER]} better, {rewards[SAME]} no different, {rewards[WORSE]} worse"
    kind = "same"
    if rewards[BETTER] > chance and not rewards[WORSE]:
        kind = "helped"
    elif rewards[WORSE] > chance and not rewards[BETTER]:
        kind = "hurt"
    return Conclusion(kind, headline, details)


def numbers(setting: Setting) -> Table:
    """Every measure of every method; measures without any number are left out."""
    shown = [m for m in MEASURES if any(of_method(setting, name, m).count for name in setting.methods)]
    rows = [[Cell(name), *(_cell(of_method(setting, name, m), m) for m in shown)] for name in setting.methods]
    return Table(["method", *(measure.title for measure in shown)], rows)


def mini_steps(setting: Setting) -> Table:
    """Shares of changed experts and the measures that exist per mini-step, means over seeds."""
    shown = [m for m in MEASURES if m.mini_step is not None]
    headings = ["method", "mini-step", "0 changed", "1", "2", "3 or more", *(m.title.split(",")[0] for m in shown)]
    rows = []
    for method, replicates in setting.methods.items():
        data = [setting.data[method, seed] for seed in replicates]
        shares = [_rows(d.changed_means(), setting.kappa) for d in data]
        columns = {m.key: [_rows(m.mini_step(d), setting.kappa) for d in data] for m in shown if m.mini_step is not None}
        for position in range(setting.kappa):
            row = [Cell(method), Cell(str(position + 1))]
            row += [Cell(formats.percent(float(mean([s[position, c] for s in shares])), 2)) for c in range(4)]
            for measure in shown:
                row.append(_cell(interval([float(column[position]) for column in columns[measure.key]]), measure))
            rows.append(row)
    return Table(headings, rows)


def _rows(values: Array, count_of: int) -> Array:
    """The first axis padded with NaN to `count_of`."""
    missing = count_of - len(values)
    return np.concatenate([values, np.full((missing, *values.shape[1:]), np.nan)]) if missing else values


def wall_seconds(setting: Setting) -> float:
    """Time that the compared rollouts took, summed over runs."""
    return sum(float(np.nansum(setting.data[name, seed].column("wall_seconds"))) for name, seed, _ in setting.runs())


def _cell(value: Interval, measure: Measure, difference: bool = False) -> Cell:
    return Cell(estimate(value, measure.form_difference if difference else measure.form, measure.form_difference))


PAPER = Table(
    ["arXiv 2606.00395 (draft)", "reported"],
    [
        [Cell("changed experts 0 / 1 / 2 / 3 or more, frozen routes, off-2"), Cell("76.9 / 19.6 / 2.6 / 0.9 %")],
        [Cell("the same with PR2"), Cell("92.2 / 7.7 / 0.1 / 0.0 %")],
        [Cell("top-k agreement"), Cell("96 to 99 %, higher with PR2")],
        [Cell("agreement over the mini-steps of off-8"), Cell("99.75 % falling to 98.25 %")],
        [Cell("coverage gap per layer"), Cell("at most 0.0015, lower with PR2")],
        [Cell("average accuracy off-2, GRPO / R2 / R3 / PR2"), Cell("44.6 / 47.2 / 56.5 / 55.6")],
        [Cell("average accuracy off-4, GRPO / R2 / R3 / PR2"), Cell("41.4 / 43.8 / 56.6 / 54.3")],
        [Cell("average accuracy off-8, GRPO / R2 / R3 / PR2"), Cell("41.3 / 44.0 / - / 50.9")],
    ],
)
