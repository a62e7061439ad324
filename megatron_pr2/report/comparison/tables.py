"""Tables and verdicts of a comparison, which the page and the Markdown share; frames of texts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import pandas as pd

from megatron_pr2.report import formats
from megatron_pr2.report.comparison.numbers import BETTER, CONFIDENCE, SAME, UNKNOWN, WORSE, Interval, Numbers
from megatron_pr2.report.comparison.runs import Setting
from megatron_pr2.report.formats import ABSENT, count
from megatron_pr2.report.measures import FINAL_REWARD, LATER_LIFT, LIFT, MEASURES, Measure

ABOUT_ZERO = {BETTER: "above zero", WORSE: "below zero", SAME: "not different from zero", UNKNOWN: UNKNOWN}


class Conclusion(NamedTuple):
    """The headline of the page; `kind` as in report.summary.Verdict."""

    kind: str
    headline: str
    details: Sequence[str]


class Tables:
    """What is said of the settings."""

    def __init__(self, settings: Sequence[Setting], numbers: Numbers) -> None:
        self.settings, self.numbers = settings, numbers

    def reward_verdict(self, setting: Setting, method: str) -> str:
        """The word for a method's final reward against the baseline's."""
        return self.numbers.against_baseline(setting, method, FINAL_REWARD).verdict()

    def lift_verdict(self, setting: Setting, method: str) -> str:
        """The word for a method's lift against zero."""
        return self.numbers.of_method(setting, method, LIFT).verdict()

    def verdicts(self, setting: Setting) -> pd.DataFrame:
        """Final reward, difference to the baseline and lift of every method of a setting; words first, where a phone shows them."""
        base, numbers = setting.baseline, self.numbers
        rows = []
        for method, seeds in setting.methods.items():
            lift = numbers.of_method(setting, method, LIFT)
            against, minus = "baseline", ABSENT
            if method != base:
                against = self.reward_verdict(setting, method)
                minus = numbers.against_baseline(setting, method, FINAL_REWARD).text(FINAL_REWARD, FINAL_REWARD.unit.difference)
                if against == UNKNOWN:
                    common = len(set(seeds) & set(setting.methods[base]))
                    against = "one seed: not known" if common == 1 else "no reward" if common else "no common seed"
            rows.append(
                {
                    "method": method,
                    f"against {base}": against,
                    "lift is": ABOUT_ZERO[lift.verdict()] if setting.predicts(method) and lift.seeds else ABSENT,
                    FINAL_REWARD.title: numbers.of_method(setting, method, FINAL_REWARD).text(FINAL_REWARD),
                    f"minus {base}": minus,
                    LIFT.title: lift.text(LIFT),
                    "seeds": str(len(seeds)),
                }
            )
        return pd.DataFrame(rows)

    def overall(self) -> pd.DataFrame:
        """Every method over all settings that have it."""
        rows = []
        for method in dict.fromkeys(name for setting in self.settings for name in setting.methods):
            having = [setting for setting in self.settings if method in setting.methods]
            predicting = [setting for setting in having if setting.predicts(method)]

            def text(measure: Measure, difference: bool, method: str = method) -> str:
                found = self.numbers.over_settings(method, measure, difference=difference)
                return found.text(measure, measure.unit.difference if difference else None)

            rows.append(
                {
                    "method": method,
                    "better / no different / worse": _tally(self.reward_verdict(s, method) for s in having if method != s.baseline),
                    "lift above / about / below zero": _tally(self.lift_verdict(s, method) for s in predicting),
                    "final reward minus baseline": text(FINAL_REWARD, True),
                    "lift": text(LIFT, False) if predicting else ABSENT,
                    "lift, mini-steps 2 to κ": text(LATER_LIFT, False) if predicting else ABSENT,
                    "settings": str(len(having)),
                }
            )
        return pd.DataFrame(rows)

    def conclude(self) -> Conclusion:
        """How many comparisons went which way; all of them are counted, and how many would by chance."""
        pairs = [(setting, method) for setting in self.settings for method in setting.methods]
        rewards = Counter(self.reward_verdict(s, m) for s, m in pairs if m != s.baseline)
        lifts = Counter(self.lift_verdict(s, m) for s, m in pairs if s.predicts(m))
        known, known_lifts = rewards.total() - rewards[UNKNOWN], lifts.total() - lifts[UNKNOWN]
        details = []
        if known_lifts:
            details.append(
                f"Lift of predicted over frozen routes: above zero in {lifts[BETTER]}, not different from zero in {lifts[SAME]}, "
                f"below zero in {lifts[WORSE]} of {count(known_lifts, 'measurement')}."
            )
        if not known:
            headline = "No other method to compare"
            if rewards:
                headline = "Rewards cannot be compared: a difference needs two common seeds"
            return Conclusion("early", headline, details)
        chance = (1 - CONFIDENCE) * known
        details.append(
            f"An interval of {100 * CONFIDENCE:.0f} % excludes the truth once in {1 / (1 - CONFIDENCE):.0f} times: of "
            f"{count(known, 'comparison')} about {formats.fixed(chance, 1)} would look better or worse by chance alone."
        )
        if rewards[UNKNOWN]:
            details.append(f"{count(rewards[UNKNOWN], 'comparison')} had fewer than two common seeds.")
        bases = " or ".join(dict.fromkeys(setting.baseline for setting in self.settings))
        headline = f"Final reward against {bases}: {rewards[BETTER]} better, {rewards[SAME]} no different, {rewards[WORSE]} worse"
        helped, hurt = (rewards[a] > chance and not rewards[b] for a, b in ((BETTER, WORSE), (WORSE, BETTER)))
        return Conclusion("helped" if helped else "hurt" if hurt else "same", headline, details)

    def means(self, setting: Setting) -> pd.DataFrame:
        """Every measure of every method; measures without any number are left out."""
        found = {m: [self.numbers.of_method(setting, name, m) for name in setting.methods] for m in MEASURES}
        columns = {m.title: [value.text(m) for value in values] for m, values in found.items() if any(v.seeds for v in values)}
        return pd.DataFrame({"method": list(setting.methods), **columns})

    def mini_steps(self, setting: Setting) -> pd.DataFrame:
        """The measures that exist per mini-step, means over seeds."""
        rows = []
        for method in setting.methods:
            found = {m: self.numbers.of_mini_steps(setting, method, m) for m in MEASURES}
            for step in sorted({step for table in found.values() for step in table.index}):
                rows.append({"method": method, "mini-step": str(step)})
                for m, table in found.items():
                    if step in table.index:
                        rows[-1][m.short_title] = Interval(*table.loc[step, ["mean", "half", "count"]]).text(m)
        return pd.DataFrame(rows).fillna(ABSENT)


def _tally(found: Iterable[str]) -> str:
    counts = Counter(found)
    text = f"{counts[BETTER]} / {counts[SAME]} / {counts[WORSE]}"
    unknown = f" ({counts[UNKNOWN]} not known)" if counts[UNKNOWN] else ""
    return f"{text}{unknown}" if counts else ABSENT


PAPER = pd.DataFrame(
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
    columns=["arXiv 2606.00395 (draft)", "reported"],
)
