"""A plan as people and as programs read it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_pr2.plan.models import LAYOUT_OPTIONS
from megatron_pr2.plan.plan import MEMORY, MOVED, Plan, RankPlan
from megatron_pr2.report.formats import count, size

_SETTINGS = ("predictor", "hold_back", "drift", "sample_fraction", "feature_device", "route_delivery")
WHERE = {"device": "GPU", "host": "host"}


def as_json(plan: Plan) -> dict[str, Any]:
    """Everything that the tables show, in bytes."""
    model, layout, work = plan.model, plan.layout, plan.work
    first, last = plan.tokens[0], plan.tokens[-1]
    return {
        "model": {
            "name": model.name,
            "layers": model.num_hidden_layers,
            "moe_layers": len(model.moe_layers),
            "first_dense_layers": model.moe_layers[0],
            "hidden": model.hidden,
            "experts": model.num_experts,
            "topk": model.topk,
            "score_function": model.score_function,
        },
        "layout": {
            "world": layout.world_size,
            **{option: getattr(layout, LAYOUT_OPTIONS[option]) for option in ("tp", "pp", "vpp", "cp", "dp", "ep", "etp")},
            "alignment": layout.alignment,
            "moe_layers_per_stage": [len(layout.moe_columns(pp)) for pp in range(layout.pipeline)],
        },
        "workload": {**asdict(work), **{name: getattr(plan.config, name) for name in _SETTINGS}},
        "sample_fraction": plan.sample_fraction,
        **({"look_ahead": plan.look_ahead} if plan.config.looks_ahead else {}),
        "sequences_per_replica": [last.sequences, first.sequences],
        "distinct_ranks": plan.distinct_ranks,
        **{name: _rank_as_json(plan, getattr(plan, name)) for name in ("typical", "largest", "total")},
    }


def _rank_as_json(plan: Plan, part: RankPlan) -> dict[str, Any]:
    place = {} if part.place is None else {"rank": part.rank, **part.place._asdict()}
    held = {f"{device}_bytes": plan.held(part, device) for device in WHERE}
    return {**place, **held, "memory": part.memory, "moved": part.moved}


def print_plan(plan: Plan, console: Console | None = None) -> None:
    """The plan as two tables, with what they are about above and what to watch below."""
    console = console or Console()
    model, layout, work = plan.model, plan.layout, plan.work
    dense = model.num_hidden_layers - len(model.moe_layers)
    heads = f", {model.mtp_layers} multi-token-prediction head not counted" if model.mtp_layers else ""
    replica = layout.world_size // layout.data
    config = plan.config
    thinned = config.drift and plan.sample_fraction < config.sample_fraction
    budget = f" (feature_bytes={size(config.feature_bytes)} has no room for {config.sample_fraction:g})" if thinned else ""
    lines = [
        f"{model.name}: {len(model.moe_layers)} MoE layers (and {dense} dense{heads}), hidden {model.hidden}, top-{model.topk} of "
        f"{model.num_experts} experts",
        f"{count(layout.world_size)} ranks: TP {layout.tensor} x PP {layout.pipeline} x CP {layout.context} x DP {layout.data}, "
        f"experts EP {layout.expert} x ETP {layout.expert_tensor}; {count(replica)} ranks (a replica) train the same sequences",
        f"{count(work.batch)} sequences of {count(work.seq)} tokens, {work.mini_steps} mini-steps; features of "
        f"{plan.sample_fraction:.3g} of the response tokens{budget}; predictor {config.predictor}",
    ]
    if config.looks_ahead:
        look = plan.look_ahead
        lines.append(
            f"look-ahead over {count(int(look['sequences']))} sequences, {count(int(look['tokens']))} tokens of responses: its "
            f"{'forward is' if work.watched else 'two forwards are'} {look['share_of_passes']:.2%} of the log-prob and training "
            "passes; regression "
            f"{look['fit_flops'] / 1e12:,.1f} TFLOP in fp32 and {look['solve_flops'] / 1e12:,.1f} in float64, by all ranks together"
        )
    console.print(Text("\n".join(lines)))
    console.print(_table(plan, "Memory", {name: words for name, (_, words) in MEMORY.items()}, "memory"))
    console.print(_table(plan, "Moved per rollout batch", MOVED, "moved"))


def print_run(run: Mapping[str, Any], console: Console | None = None) -> None:
    """What a configuration says beyond the plan: the rollout engines, and the actor's layout as flags of Megatron-LM.

    Args:
        run: `rollout` (VerlRun.rollout) and `megatron_lm`, a flag per entry.
    """
    console = console or Console()
    rollout = run["rollout"]
    gpus, data = rollout["gpus"], rollout["attention_data"]
    engines = f"Rollouts by {count(rollout['engines'])} SGLang engines on {gpus} GPUs each"
    console.print(Text(f"{engines}: attention TP {gpus // data} x DP {data}, experts EP {rollout['expert']}"))
    # Not wrapped: to be copied.
    console.print(Text("The actor's layout as flags of Megatron-LM:"))
    console.print(Text("  " + " \\\n  ".join(run["megatron_lm"])), soft_wrap=True)


def _table(plan: Plan, title: str, words: Mapping[str, str], part: str) -> Table:
    memory, parts = part == "memory", (plan.typical, plan.largest, plan.total)
    table = Table(title=title, title_justify="left")
    table.add_column("", overflow="fold")
    if memory:
        table.add_column("where")
    for heading, each in zip(("typical", "largest", "all ranks"), parts, strict=True):
        place = "" if each.place is None else " ".join(f"{kind}{index}" for kind, index in each.place._asdict().items())
        table.add_column(f"{heading}: rank {each.rank}\n{place}" if place else heading, justify="right")
    for name, meaning in words.items():
        if any(values := [getattr(each, part)[name] for each in parts]):
            table.add_row(meaning, *([WHERE[plan.device_of(name)]] if memory else []), *map(_size, values))
    if memory:
        table.add_section()
        for device, where in WHERE.items():
            table.add_row("together", where, *(_size(plan.held(each, device)) for each in parts))
    return table


def _size(num_bytes: int) -> str:
    return size(num_bytes) if num_bytes else "-"
