"""The report of a run: one HTML page that needs nothing but itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_pr2.errors import DataError
from megatron_pr2.report import formats, hold_back_plots, plots, route_plots, theme
from megatron_pr2.report.figures import Plot
from megatron_pr2.report.metrics_log import FILE_NAME, first_and_last_fifth, read_records, replace_atomically
from megatron_pr2.report.page import Card, count, render_page
from megatron_pr2.report.records import Record, RunData, mean, number
from megatron_pr2.report.summary import Verdict, held_back, judge, predicted, standard_error, what_ran

NO_REPLAY = "Nothing was replayed in this run (live routes), so there are no routes to compare."
NO_MINI_STEPS = "No mini-step of this run reports routes."

# anchor, title, introduction, plots
SECTIONS: tuple[tuple[str, str, str, tuple[Callable[[RunData], Plot | None], ...]], ...] = (
    ("learning", "Learning", "", (plots.reward, plots.response_length, plots.turns)),
    (
        "routes",
        "Routes",
        "KL and coverage gap are means over the mini-steps from the second on, where the policy is newer than its routes.",
        (
            route_plots.lift,
            hold_back_plots.expected,
            route_plots.mismatch,
            route_plots.agreement,
            route_plots.changed,
            route_plots.divergence,
            route_plots.coverage,
            plots.predictor,
        ),
    ),
    (
        "layers",
        "Layers",
        "Layer 1 is the first MoE layer of the model; means over the mini-steps from the second on where nothing else is said.",
        (
            hold_back_plots.layer_interval,
            hold_back_plots.beta,
            route_plots.layer_profile,
            route_plots.layer_agreement,
            route_plots.layer_lift,
        ),
    ),
    ("policy", "Policy update", "", (plots.importance_ratio, plots.clip_fraction, plots.gradient_norm)),
    ("engine", "Engine and actor", "", (plots.logprob_gap, plots.missing_routes)),
    ("cost", "Cost", "", (plots.seconds, plots.transferred)),
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
    """Renders metrics.jsonl and config.yaml of a run into one self-contained page.

    Args:
        run_dir: directory of the run; it may still be training.
        path: where to write; `run_dir`/report.html by default.

    Returns:
        The path written. The file is replaced atomically.

    Raises:
        DataError: no records yet, or a damaged metrics.jsonl.
    """
    run_dir = Path(run_dir)
    records = read_records(run_dir)
    if not records:
        raise DataError(f"{run_dir / FILE_NAME} holds no records yet; the report needs one finished rollout step")
    target = Path(path) if path is not None else run_dir / "report.html"
    target.parent.mkdir(parents=True, exist_ok=True)
    config = run_dir / "config.yaml"
    text = config.read_text(encoding="utf-8", errors="replace") if config.exists() else None
    replace_atomically(target, render(run_dir.resolve().name, records, text).encode())
    return target


def render(name: str, records: Sequence[Record], config: str | None) -> str:
    """The page of a run as text.

    Args:
        name: of the run.
        records: at least one.
        config: text of the resolved configuration, None if there is none.
    """
    data = RunData(records)
    with theme.style():
        sections = [
            {
                "anchor": anchor,
                "title": title,
                "introduction": introduction,
                "plots": [plot for draw in draws if (plot := draw(data)) is not None],
            }
            for anchor, title, introduction, draws in SECTIONS
        ]
    presets = what_ran(records)
    verdict = judge(records)
    live = all(preset == "grpo" for preset, _ in presets)
    return render_page(
        "report.html.j2",
        name=name,
        presets=presets,
        verdict=verdict,
        cards=cards(records, data, verdict),
        sections=sections,
        absent={"routes": NO_REPLAY if live else NO_MINI_STEPS, "layers": NO_REPLAY if live else NO_MINI_STEPS},
        bin_size=data.bin_size,
        table=mini_step_table(data) if data.kappa else None,
        config=config,
    )


def cards(records: Sequence[Record], data: RunData, verdict: Verdict) -> list[Card]:
    """The numbers of the headline."""
    fifths = first_and_last_fifth(records)
    each = f"first and last {count(fifths['rollouts'], 'rollout')}" if len(records) > 1 else "only rollout"
    cut_off = formats.percent(_mean(records, "truncated"), 1)
    out = [
        Card("Reward", f"{formats.fixed(fifths['first'])} → {formats.fixed(fifths['last'])}", f"mean of the {each}"),
        Card("Response length", _ends(records, "response_length"), f"tokens; {cut_off} cut off"),
        Card("Steps", formats.count(len(records)), _pace(records)),
    ]
    agreement, frozen = _mean(records, "agreement"), _mean(records, "frozen_agreement")
    if math.isfinite(agreement):
        out.append(Card("Agreement", formats.percent(agreement), f"frozen routes {formats.percent(frozen)}"))
        out += lift_cards(records, verdict)
    missing, tokens = data.total("routes", "missing"), data.total("routes", "tokens")
    replayed = f"{formats.percent(missing / tokens, 3)} of {formats.count(tokens)} tokens" if tokens > 0 else "nothing was replayed"
    worst = max((number(r, "logprob_gap", "max") for r in records), key=lambda v: v if math.isfinite(v) else -math.inf)
    out += [
        Card("Missing routes", formats.count(missing) if tokens > 0 else formats.ABSENT, replayed),
        Card("Log-prob gap", formats.scientific(_mean(records, "logprob_gap", "mean")), f"mean; max {formats.scientific(worst)}"),
        Card("Throughput", f"{formats.count(_mean(records, 'tokens_per_second'))}", "tokens per second, mean"),
    ]
    return out


def lift_cards(records: Sequence[Record], verdict: Verdict) -> list[Card]:
    """What prediction was worth, over all mini-steps and where routes are stale; and how much of it was used."""
    later = np.array([v for r in records if math.isfinite(v := number(r, "lift"))])
    name = "Lift over R3" if predicted(records) else "Lift"
    out = [Card(name, formats.points(verdict.lift, 3), f"{_spread(verdict.error)}; all mini-steps")]
    if later.size:
        value, error = float(later.mean()), standard_error(later)
        out.append(Card("Lift on stale routes", formats.points(value, 3), f"{_spread(error)}; mini-steps from the second on"))
    held = held_back(records)
    if held is not None:
        layers = count(held.layers, "layer")
        out.append(Card("Beta, last rollout", f"{held.beta:.2f}", f"0 is R3; {held.zero} of {layers} held back entirely"))
    return out


def mini_step_table(data: RunData) -> dict[str, Any]:
    """Means over the run, one row per mini-step; columns without any number are left out."""
    columns = [(heading, data.mini_step_means(key), form) for heading, key, form in MINI_STEP_TABLE]
    columns = [column for column in columns if any(math.isfinite(v) for v in column[1])]
    rows = [[str(i + 1), *(form(float(values[i])) for _, values, form in columns)] for i in range(data.kappa)]
    return {"headings": ["mini-step", *(heading for heading, _, _ in columns)], "rows": rows}


def _spread(error: float) -> str:
    return f"± {100 * error:.3f} standard error" if math.isfinite(error) else "one rollout, no error bar"


def _pace(records: Sequence[Record]) -> str:
    times = [sum(v for k in s if math.isfinite(v := number(r, "seconds", k))) for r in records if (s := r.get("seconds"))]
    if not times:
        return "no times recorded"
    return f"{formats.duration(sum(times))} in all, {formats.duration(sum(times) / len(times))} each"


def _ends(records: Sequence[Record], key: str) -> str:
    fifth = max(1, len(records) // 5)
    return f"{formats.fixed(_mean(records[:fifth], key), 1)} → {formats.fixed(_mean(records[-fifth:], key), 1)}"


def _mean(records: Sequence[Record], *keys: str) -> float:
    return float(mean([number(r, *keys) for r in records]))
