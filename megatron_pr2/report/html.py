"""The report of a run: one HTML page that needs nothing but itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd

from megatron_pr2.errors import DataError
from megatron_pr2.report import formats, plots
from megatron_pr2.report.figures import Plots, drawn
from megatron_pr2.report.formats import count
from megatron_pr2.report.measures import MEASURES
from megatron_pr2.report.metrics_log import FILE_NAME, Record, first_and_last_fifth, read_records, replace_atomically
from megatron_pr2.report.page import Card, render_page
from megatron_pr2.report.records import RunData
from megatron_pr2.report.summary import Verdict, held_back, judge, predicted, standard_error, what_ran

NO_NUMBERS = "This run has no numbers for this section."
NO_REPLAY = "Nothing was replayed in this run (preset grpo), so there are no routes to compare."
NO_MINI_STEPS = "No mini-step of this run reports routes."

LATER = "means over the mini-steps from the second on"
# anchor, title, introduction, plots
SECTIONS: tuple[tuple[str, str, str, Callable[[RunData], Plots]], ...] = (
    ("learning", "Learning", "", plots.learning),
    ("routes", "Routes", f"KL and coverage gap are {LATER}, where the policy is newer than its routes.", plots.routes),
    ("layers", "Layers", f"Layer 1 is the first MoE layer of the model; {LATER} unless a plot says otherwise.", plots.per_layer),
    ("policy", "Policy update", "", plots.policy),
    ("engine", "Engine and actor", "", plots.engine),
    ("cost", "Cost", "", plots.cost),
)


def write_report(run_dir: str | Path, path: str | Path | None = None) -> Path:
    """Renders metrics.jsonl and config.yaml of a run, which may still be training, into one self-contained page.

    Args:
        path: where to write; `run_dir`/report.html by default. The file is replaced atomically.

    Raises:
        DataError: no records yet, or a damaged metrics.jsonl.
    """
    run_dir = Path(run_dir)
    records = read_records(run_dir)
    if not records:
        raise DataError(f"{run_dir / FILE_NAME} holds no records yet; the report needs one finished rollout step")
    target = Path(path) if path is not None else run_dir / "report.html"
    config = run_dir / "config.yaml"
    text = config.read_text(encoding="utf-8", errors="replace") if config.exists() else None
    replace_atomically(target, render(run_dir.resolve().name, records, text))
    return target


def render(name: str, records: Sequence[Record], config: str | None) -> bytes:
    """The page; `config` is the text of the resolved configuration."""
    data = RunData(records)
    presets, verdict = what_ran(data), judge(data)
    no_routes = NO_REPLAY if all(preset == "grpo" for preset, _ in presets) else NO_MINI_STEPS
    sections = [
        {
            "anchor": anchor,
            "title": title,
            "introduction": introduction,
            "plots": drawn(section(data)),
            "absent": no_routes if anchor in ("routes", "layers") else NO_NUMBERS,
            "table": mini_step_table(data) if anchor == "routes" and data.kappa else None,
        }
        for anchor, title, introduction, section in SECTIONS
    ]
    return render_page(
        "report.html.j2",
        name=name,
        presets=presets,
        verdict=verdict,
        cards=cards(data, verdict),
        sections=sections,
        bin_size=data.bin_size,
        config=config,
    )


def cards(data: RunData, verdict: Verdict) -> list[Card]:
    """The numbers of the headline."""
    rollouts = data.rollouts
    ends = first_and_last_fifth(data.records)
    fifth = int(ends["rollouts"])
    each = f"first and last {count(fifth, 'rollout')}" if len(rollouts) > 1 else "only rollout"
    length = rollouts.get("response_length", pd.Series([math.nan]))
    lengths = [formats.fixed(part.mean(), 1) for part in (length[:fifth], length[-fifth:])]
    cut_off = formats.percent(data.mean("truncated"), 1)
    times = rollouts.filter(regex=r"^seconds\.").sum(axis=1, min_count=1)
    pace = f"{formats.duration(times.sum())} in all, {formats.duration(times.mean())} each" if times.any() else "no times recorded"
    out = [
        Card("Reward", f"{formats.fixed(ends['first'])} → {formats.fixed(ends['last'])}", f"mean of the {each}"),
        Card("Response length", " → ".join(lengths), f"tokens; {cut_off} cut off"),
        Card("Steps", count(len(rollouts)), pace),
    ]
    if math.isfinite(agreement := data.mean("agreement")):
        frozen = formats.percent(data.mean("frozen_agreement"))
        out.append(Card("Agreement", formats.percent(agreement), f"frozen routes {frozen}"))
        name = "Lift over R3" if predicted(data) else "Lift"
        out.append(Card(name, formats.points(verdict.lift, 3), f"{_spread(verdict.error)}; all mini-steps"))
        later = data.known("lift")
        if later.size:
            note = f"{_spread(standard_error(later))}; mini-steps from the second on"
            out.append(Card("Lift on stale routes", formats.points(later.mean(), 3), note))
        if len(betas := held_back(data)):
            last = betas.iloc[-1].dropna()
            note = f"0 is R3; prediction disabled in {(last == 0).sum()} of {count(last.size, 'layer')}"
            out.append(Card("Beta, last rollout", f"{last.mean():.2f}", note))
    missing, tokens = (data.known(f"routes.{name}").sum() for name in ("missing", "tokens"))
    replayed = f"{formats.percent(missing / tokens, 3)} of {count(tokens)} tokens" if tokens > 0 else "nothing was replayed"
    worst = formats.scientific(data.known("logprob_gap.max").max())
    return [
        *out,
        Card("Missing routes", count(missing) if tokens > 0 else formats.ABSENT, replayed),
        Card("Log-prob gap", formats.scientific(data.mean("logprob_gap.mean")), f"mean; max {worst}"),
        Card("Throughput", count(data.mean("tokens_per_second")), "tokens per second, mean"),
    ]


def mini_step_table(data: RunData) -> pd.DataFrame:
    """Means over the run, one row per mini-step; measures without any number are left out."""
    table = pd.DataFrame({m.short_title: each.map(m.unit.form) for m in MEASURES if len(each := m.per_mini_step(data))})
    return table.fillna(formats.ABSENT).rename_axis("mini-step").reset_index()


def _spread(error: float) -> str:
    return f"± {100 * error:.3f} standard error" if math.isfinite(error) else "one rollout, no error bar"
