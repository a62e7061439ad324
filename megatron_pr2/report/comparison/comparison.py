"""Several runs side by side: one HTML page that needs nothing but itself, or Markdown with its plots as files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_pr2.report import formats, theme
from megatron_pr2.report.comparison import measures, rows, tables
from megatron_pr2.report.comparison import plots as curves
from megatron_pr2.report.comparison.looks import Look, looks
from megatron_pr2.report.comparison.runs import Setting, load
from megatron_pr2.report.comparison.tables import Cell, Table
from megatron_pr2.report.figures import Plot
from megatron_pr2.report.metrics_log import replace_atomically
from megatron_pr2.report.page import count, render_page

TITLE = "Comparison of runs"
Facts = Sequence[tuple[str, str]]


@dataclass(frozen=True)
class SettingPlots:
    """What is shown of a setting at once, and what on demand."""

    first: Sequence[Plot]
    more: Sequence[Plot]


def write_comparison(
    runs: Sequence[str | Path],
    output: str | Path,
    *,
    groups: Mapping[Path, tuple[str, str]] | None = None,
    title: str = TITLE,
    facts: Facts = (),
) -> Path:
    """Renders runs side by side into one self-contained page.

    Runs that differ in their seed only are one method's replicates: shown are means and 95 % t intervals. A method is compared with
    r3 (or the first method, where there is no r3) of the same setting, seed by seed.

    Args:
        runs: run directories; they may still be training. Numbers are of the rollouts that all runs of a setting have.
        output: HTML file; replaced atomically.
        groups: run directory -> (name of its method, word for its setting); by default the method is named after preset and the pr2
            settings that differ, and a setting after mini-steps, learning rate and whatever else differs.
        facts: (name, value) about how the runs were made, shown at the end.

    Returns:
        `output`.

    Raises:
        DataError: no run, or a run without records.
    """
    settings = load(runs, groups)
    target = Path(output)
    target.parent.mkdir(parents=True, exist_ok=True)
    replace_atomically(target, render(settings, title, facts).encode())
    return target


def render(settings: Sequence[Setting], title: str = TITLE, facts: Facts = ()) -> str:
    """The page as text."""
    shown = []
    look = looks(settings)
    for setting in settings:
        drawn = plots_of(setting, look)
        shown.append(
            {
                "label": setting.label,
                "anchor": setting.slug,
                "note": note(setting),
                "verdicts": tables.verdicts(setting),
                "numbers": tables.numbers(setting),
                "mini_steps": tables.mini_steps(setting),
                "plots": drawn.first,
                "more": drawn.more,
            }
        )
    return render_page(
        "comparison.html.j2",
        title=title,
        what=what(settings),
        conclusion=tables.conclude(settings),
        settings=shown,
        overall=tables.overall(settings),
        paper=tables.PAPER,
        facts=facts,
        runs=table_of_runs(settings),
    )


def plots_of(setting: Setting, look: Mapping[str, Look]) -> SettingPlots:
    """Every plot that a setting has numbers for."""
    with theme.style():
        first = [
            curves.reward(setting, look),
            rows.difference(setting, look),
            rows.values(setting, look, measures.LIFT, LIFT_CAPTION, zero=True),
            curves.lift_curve(setting, look),
            rows.changed(setting, look),
            curves.per_mini_step(setting, look, measures.AGREEMENT, AGREEMENT_CAPTION, band=_paper_band(setting)),
        ]
        return SettingPlots([p for p in first if p is not None], [p for p in _more(setting, look) if p is not None])


LIFT_CAPTION = (
    "Agreement of the replayed routes minus that of frozen ones in the same run, all mini-steps: small dots are seeds, "
    "the line is the 95 % interval of their mean. Above zero prediction helps."
)
AGREEMENT_CAPTION = (
    "Share of the replayed experts that the updated router would choose too, higher is better; whiskers are 95 % intervals over "
    "seeds. The paper reports 96 to 99 %, and 99.75 % falling to 98.25 % over the mini-steps of off-8."
)


def _more(setting: Setting, look: Mapping[str, Look]) -> Iterator[Plot | None]:
    yield curves.beta_curve(setting, look)
    yield rows.difference(setting, look, measures.MEAN_REWARD)
    caption = "Lift without the first mini-step, in which nothing has drifted yet and prediction can only cost."
    yield rows.values(setting, look, measures.LATER_LIFT, caption, zero=True)
    caption = "Lift by mini-step: predicted routes are the same in all of them, so that the first pay and the later ones gain."
    yield curves.per_mini_step(setting, look, measures.LIFT, caption)
    yield rows.divergence(setting, look)
    yield rows.coverage(setting, look)
    caption = (
        "How differently the updated policy scores the sampled tokens: a variance that grows from step to step is instability."
    )
    yield curves.per_mini_step(setting, look, measures.RATIO_VARIANCE, caption)
    caption = "Share of tokens whose ratio was clipped: they do not teach the policy."
    yield curves.per_mini_step(setting, look, measures.CLIP, caption)
    caption = "Estimated KL of the updated policy from the one that sampled."
    yield curves.per_mini_step(setting, look, measures.POLICY_KL, caption)
    caption = "Mean |log-prob of the engine - log-prob of the actor| of the same tokens before any update, lower is better."
    yield rows.values(setting, look, measures.GAP, caption)
    yield rows.time(setting, look)


def _paper_band(setting: Setting) -> tuple[float, float] | None:
    return curves.PAPER_AGREEMENT_OFF_8 if setting.mini_steps == 8 else None


def what(settings: Sequence[Setting]) -> str:
    """How much is compared."""
    runs = sum(len(list(setting.runs())) for setting in settings)
    methods = len({name for setting in settings for name in setting.methods})
    seconds = sum(tables.wall_seconds(setting) for setting in settings)
    return (
        f"{count(runs, 'run')}: {count(methods, 'method')}, {count(len(settings), 'setting')}; {formats.duration(seconds)} of "
        "training in all."
    )


def note(setting: Setting) -> str:
    """What the numbers of a setting are of."""
    text = f"{count(len(list(setting.runs())), 'run')} of {count(setting.rollouts, 'rollout')} each."
    shortest, longest = setting.lengths
    if shortest != longest:
        text += (
            f" Runs differ in length, {shortest} to {longest} rollouts: every number and plot is of the first {shortest}, which "
            "all of them have."
        )
    seeds = {name: len(replicates) for name, replicates in setting.methods.items()}
    if single := [name for name, number_of in seeds.items() if number_of == 1]:
        text += f" One seed and therefore no interval: {', '.join(single)}."
    return text


def table_of_runs(settings: Sequence[Setting]) -> Table:
    """Where every number comes from."""
    listed = [
        [Cell(run.name), Cell(setting.label), Cell(name), Cell(str(seed)), Cell(str(len(run.records)))]
        for setting in settings
        for name, seed, run in setting.runs()
    ]
    return Table(["run", "setting", "method", "seed", "rollouts"], listed)
