"""The report of a run: one HTML page that needs nothing but itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from megatron_pr2.errors import DataError
from megatron_pr2.report import formats, plots
from megatron_pr2.report.metrics_log import FILE_NAME, first_and_last_fifth, read_records, replace_atomically
from megatron_pr2.report.page import Card, Table, count, drawn, numbered, render_page
from megatron_pr2.report.records import Record, RunData, mean, number
from megatron_pr2.report.summary import Verdict, held_back, judge, predicted, standard_error, what_ran

NO_NUMBERS = "This run has no numbers for this section."
NO_REPLAY = "Nothing was replayed in this run (preset grpo), so there are no routes to compare."
NO_MINI_STEPS = "No mini-step of this run reports routes."

LATER = "means over the mini-steps from the second on"
# anchor, title, introduction, plots
SECTIONS: tuple[tuple[str, str, str, Callable[[RunData], plots.Plots]], ...] = (
    ("learning", "Learning", "", plots.learning),
    ("routes", "Routes", f"KL and coverage gap are {LATER}, where the policy is newer than its routes.", plots.routes),
    ("layers", "Layers", f"Layer 1 is the first MoE layer of the model; {LATER} unless a plot says otherwise.", plots.per_layer),
    ("policy", "Policy update", "", plots.policy),
    ("engine", "Engine and actor", "", plots.engine),
    ("cost", "Cost", "", plots.cost),
)
# heading, key, format; the table of mini-steps
MINI_STEP_TABLE: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("agreement", "agreement", formats.percent),
    ("frozen", "frozen_agreement", formats.percent),
    ("lift", "lift", formats.points),
    ("KL(ρ‖q̂)", "kl_predicted", formats.scientific),
    ("KL(ρ‖ρ_old)", "kl_frozen", formats.scientific),
    ("coverage gap", "coverage_gap", formats.scientific),
    ("mass outside", "outside_mass", formats.scientific),
    ("ratio std", "ratio_std", formats.fixed),
    ("clip fraction", "clip_fraction", formats.percent),
    ("policy KL", "approx_kl", formats.scientific),
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
    replace_atomically(target, render(run_dir.resolve().name, records, text).encode())
    return target


def render(name: str, records: Sequence[Record], config: str | None) -> str:
    """The page as text; `config` is that of the resolved configuration."""
    data = RunData(records)
    presets, verdict = what_ran(records), judge(records)
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
        cards=cards(records, data, verdict),
        sections=sections,
        bin_size=data.bin_size,
        config=config,
    )


def cards(records: Sequence[Record], data: RunData, verdict: Verdict) -> list[Card]:
    """The numbers of the headline."""

    def average(*keys: str, of: Sequence[Record] = records) -> float:
        return float(mean([number(r, *keys) for r in of]))

    ends = first_and_last_fifth(records)
    fifth = int(ends["rollouts"])
    each = f"first and last {count(fifth, 'rollout')}" if len(records) > 1 else "only rollout"
    lengths = [formats.fixed(average("response_length", of=part), 1) for part in (records[:fifth], records[-fifth:])]
    cut_off = formats.percent(average("truncated"), 1)
    out = [
        Card("Reward", f"{formats.fixed(ends['first'])} → {formats.fixed(ends['last'])}", f"mean of the {each}"),
        Card("Response length", " → ".join(lengths), f"tokens; {cut_off} cut off"),
        Card("Steps", formats.count(len(records)), _pace(records)),
    ]
    if math.isfinite(agreement := average("agreement")):
        out.append(Card("Agreement", formats.percent(agreement), f"frozen routes {formats.percent(average('frozen_agreement'))}"))
        name = "Lift over R3" if predicted(records) else "Lift"
        out.append(Card(name, formats.points(verdict.lift, 3), f"{_spread(verdict.error)}; all mini-steps"))
        later = np.array([v for r in records if math.isfinite(v := number(r, "lift"))])
        if later.size:
            note = f"{_spread(standard_error(later))}; mini-steps from the second on"
            out.append(Card("Lift on stale routes", formats.points(float(later.mean()), 3), note))
        if (held := held_back(records)) is not None:
            note = f"0 is R3; prediction disabled in {held.zero} of {count(held.layers, 'layer')}"
            out.append(Card("Beta, last rollout", f"{held.beta:.2f}", note))
    missing, tokens = data.total("routes", "missing"), data.total("routes", "tokens")
    replayed = f"{formats.percent(missing / tokens, 3)} of {formats.count(tokens)} tokens" if tokens > 0 else "nothing was replayed"
    gaps = [v for r in records if math.isfinite(v := number(r, "logprob_gap", "max"))]
    worst = formats.scientific(max(gaps, default=math.nan))
    return [
        *out,
        Card("Missing routes", formats.count(missing) if tokens > 0 else formats.ABSENT, replayed),
        Card("Log-prob gap", formats.scientific(average("logprob_gap", "mean")), f"mean; max {worst}"),
        Card("Throughput", formats.count(average("tokens_per_second")), "tokens per second, mean"),
    ]


def mini_step_table(data: RunData) -> Table:
    """Means over the run, one row per mini-step; columns without any number are left out."""
    columns = [(heading, data.mini_step_means(key), form) for heading, key, form in MINI_STEP_TABLE]
    return numbered("mini-step", [column for column in columns if np.isfinite(column[1]).any()])


def _spread(error: float) -> str:
    return f"± {100 * error:.3f} standard error" if math.isfinite(error) else "one rollout, no error bar"


def _pace(records: Sequence[Record]) -> str:
    times = [sum(v for k in s if math.isfinite(v := number(r, "seconds", k))) for r in records if (s := r.get("seconds"))]
    if not times:
        return "no times recorded"
    return f"{formats.duration(sum(times))} in all, {formats.duration(sum(times) / len(times))} each"
