"""Tables and verdicts of a comparison, which the page and the Markdown share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_pr2.report import formats
from megatron_pr2.report.comparison.measures import (
    FINAL_REWARD,
    LATER_LIFT,
    LIFT,
    MEASURES,
    Measure,
    against_baseline,
    of_method,
    of_mini_steps,
    over_settings,
)
from megatron_pr2.report.comparison.runs import Setting
from megatron_pr2.report.comparison.stats import BETTER, CONFIDENCE, SAME, UNKNOWN, WORSE, verdict
from megatron_pr2.report.page import Cell, Table, count, table_of

_KINDS = {BETTER: "helped", WORSE: "hurt", SAME: "same", UNKNOWN: "absent"}
_ABOUT_ZERO = {BETTER: "above zero", WORSE: "below zero", SAME: "not different from zero", UNKNOWN: UNKNOWN}


@dataclass(frozen=True)
class Conclusion:
    """The headline of the page; `kind` as in report.summary.Verdict."""

    kind: str
    headline: str
    details: Sequence[str]


def predicts(setting: Setting, method: str) -> bool:
    """Whether the method has a predictor: without one a lift is no verdict on anything."""
    return any(run.method.get("predictor", "none") != "none" for run in setting.methods[method].values())


def reward_verdict(setting: Setting, method: str) -> str:
    """The word for a method's final reward against the baseline's."""
    return verdict(against_baseline(setting, method, FINAL_REWARD))


def lift_verdict(setting: Setting, method: str) -> str:
    """The word for a method's lift against zero."""
    return verdict(of_method(setting, method, LIFT))


def verdicts(setting: Setting) -> Table:
    """Final reward, difference to the baseline and lift of every method of a setting; words first, where a phone shows them."""
    base = setting.baseline

    def against(method: str) -> Cell:
        if method == base:
            return Cell("baseline", "absent")
        word = reward_verdict(setting, method)
        common = set(setting.methods[method]) & set(setting.methods[base])
        why = "one seed: not known" if len(common) == 1 else "no common seed" if not common else "no reward"
        return Cell(why if word == UNKNOWN else word, _KINDS[word])

    def lift_is(method: str) -> Cell:
        if not predicts(setting, method) or not of_method(setting, method, LIFT).count:
            return Cell(formats.ABSENT)
        word = lift_verdict(setting, method)
        return Cell(_ABOUT_ZERO[word], _KINDS[word])

    def minus(method: str) -> Cell | str:
        return formats.ABSENT if method == base else FINAL_REWARD.cell(against_baseline(setting, method, FINAL_REWARD), True)

    columns: list[tuple[str, Callable[[str], Cell | str]]] = [
        ("method", str),
        (f"against {base}", against),
        ("lift is", lift_is),
        _means(setting, FINAL_REWARD),
        (f"minus {base}", minus),
        _means(setting, LIFT),
        ("seeds", lambda method: str(len(setting.methods[method]))),
    ]
    return table_of(setting.methods, columns)


def _means(setting: Setting, measure: Measure) -> tuple[str, Callable[[str], Cell]]:
    """The column of a measure: its mean over seeds by method."""
    return measure.title, lambda method: measure.cell(of_method(setting, method, measure))


def overall(settings: Sequence[Setting]) -> Table:
    """Every method over all settings that have it."""

    def compared(method: str) -> list[Setting]:
        return [setting for setting in settings if method in setting.methods and method != setting.baseline]

    def predicting(method: str) -> list[Setting]:
        return [setting for setting in settings if method in setting.methods and predicts(setting, method)]

    def lift(method: str, measure: Measure) -> Cell | str:
        return measure.cell(over_settings(settings, method, measure, difference=False)) if predicting(method) else formats.ABSENT

    def reward(method: str) -> Cell:
        return FINAL_REWARD.cell(over_settings(settings, method, FINAL_REWARD, difference=True), True)

    columns: list[tuple[str, Callable[[str], Cell | str]]] = [
        ("method", str),
        ("better / no different / worse", lambda m: _tally([reward_verdict(s, m) for s in compared(m)])),
        ("lift above / about / below zero", lambda m: _tally([lift_verdict(s, m) for s in predicting(m)])),
        ("final reward minus baseline", reward),
        ("lift", lambda m: lift(m, LIFT)),
        ("lift, mini-steps 2 to κ", lambda m: lift(m, LATER_LIFT)),
        ("settings", lambda m: str(sum(m in setting.methods for setting in settings))),
    ]
    return table_of(dict.fromkeys(name for setting in settings for name in setting.methods), columns)


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
    bases = " or ".join(dict.fromkeys(setting.baseline for setting in settings))
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
    return table_of(setting.methods, [("method", str), *(_means(setting, measure) for measure in shown)])


def mini_steps(setting: Setting) -> Table:
    """The measures that exist per mini-step, means over seeds."""
    shown = [measure for measure in MEASURES if measure.per_mini_step is not None]
    found = {(method, m.key): of_mini_steps(setting, method, m) for method in setting.methods for m in shown}
    rows = [(method, position) for method in setting.methods for position in range(setting.kappa)]
    columns: list[tuple[str, Callable[[tuple[str, int]], Cell | str]]] = [
        ("method", lambda row: row[0]),
        ("mini-step", lambda row: str(row[1] + 1)),
        *((m.short_title, lambda row, m=m: m.cell(found[row[0], m.key][row[1]])) for m in shown),
    ]
    return table_of(rows, columns)


PAPER = table_of(
    (
        ("changed experts 0 / 1 / 2 / 3 or more, frozen routes, off-2", "76.9 / 19.6 / 2.6 / 0.9 %"),
        ("the same with PR2", "92.2 / 7.7 / 0.1 / 0.0 %"),
        ("top-k agreement", "96 to 99 %, higher with PR2"),
        ("agreement over the mini-steps of off-8", "99.75 % falling to 98.25 %"),
        ("coverage gap per layer", "at most 0.0015, lower with PR2"),
        ("average accuracy off-2, GRPO / R2 / R3 / PR2", "44.6 / 47.2 / 56.5 / 55.6"),
        ("average accuracy off-4, GRPO / R2 / R3 / PR2", "41.4 / 43.8 / 56.6 / 54.3"),
        ("average accuracy off-8, GRPO / R2 / R3 / PR2", "41.3 / 44.0 / - / 50.9"),
    ),
    [("arXiv 2606.00395 (draft)", lambda row: row[0]), ("reported", lambda row: row[1])],
)
