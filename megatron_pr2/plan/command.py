"""`megatron-pr2 plan`: its options, from the command line or from a verl configuration."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megatron_pr2.cli_errors import errors
from megatron_pr2.errors import ConfigError

if TYPE_CHECKING:
    from megatron_pr2.config import PR2Config
    from megatron_pr2.plan.verl import VerlRun

# Options that are fields of PR2Config.
_PR2 = ("predictor", "hold_back", "drift", "sample_fraction", "feature_bytes", "feature_device", "route_delivery")


def plan(
    context: typer.Context,
    model: Annotated[
        str | None, typer.Option(help="qwen3-30b-a3b, mixtral-8x7b, deepseek-v3, or a Hugging Face directory or config.json.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="A verl configuration (YAML) to take everything from that is not given as an option.")
    ] = None,
    tp: Annotated[int, typer.Option(help="Tensor-parallel size; its sequence parallelism is on.")] = 1,
    pp: Annotated[int, typer.Option(help="Pipeline stages.")] = 1,
    ep: Annotated[int, typer.Option(help="Expert-parallel size.")] = 1,
    cp: Annotated[int, typer.Option(help="Context-parallel size.")] = 1,
    dp: Annotated[int | None, typer.Option(help="Data-parallel size; 1, or what --world leaves over.")] = None,
    world: Annotated[int | None, typer.Option(help="Ranks in all, instead of --dp.")] = None,
    etp: Annotated[int | None, typer.Option(help="Expert-tensor-parallel size; --tp by default.")] = None,
    vpp: Annotated[int | None, typer.Option(help="Virtual chunks per pipeline stage.")] = None,
    sequence_parallel: Annotated[bool | None, typer.Option(help="On where --tp is above 1, as MoE models need it.")] = None,
    first_stage: Annotated[int | None, typer.Option(help="Decoder layers of the first pipeline stage.")] = None,
    last_stage: Annotated[int | None, typer.Option(help="Decoder layers of the last pipeline stage.")] = None,
    count_embedding: Annotated[bool, typer.Option("--count-embedding", help="The embedding takes a layer's place.")] = False,
    count_loss: Annotated[bool, typer.Option("--count-loss", help="The loss takes a layer's place.")] = False,
    pipeline_layout: Annotated[str | None, typer.Option(help="Megatron-Core's string instead of these, as 'Et*24|t*24L'.")] = None,
    batch: Annotated[int, typer.Option(help="Sequences of a rollout batch (prompts x responses), over all replicas.")] = 256,
    seq: Annotated[int, typer.Option(help="Tokens of a sequence, prompt and response; all are planned equally long.")] = 8192,
    prompt: Annotated[int, typer.Option(help="Of these, tokens of the prompt, which no features are kept of.")] = 1,
    mini_steps: Annotated[int, typer.Option(help="Policy updates per rollout batch (kappa).")] = 4,
    micro_batch: Annotated[int, typer.Option(help="Sequences in one forward pass.")] = 1,
    log_prob_micro_batch: Annotated[
        int | None, typer.Option(help="The same in the old-log-prob pass, if it is cut otherwise: routes and features then move.")
    ] = None,
    padded: Annotated[bool, typer.Option("--padded", help="Padded micro-batches instead of packed ones.")] = False,
    horizons: Annotated[
        int, typer.Option(help="Pushes of each version, for different mini-steps; rollout.groups=n, above 1, makes n + 1.")
    ] = 1,
    look_ahead: Annotated[float, typer.Option(help="Share of the sequences that predictor lookahead runs over.")] = 0.25,
    watched: Annotated[bool, typer.Option(help="They are watched in the last mini-step and run once, not twice.")] = True,
    predictor: Annotated[str, typer.Option(help="none (r3), learned (pr2), momentum, learned+momentum or lookahead.")] = "learned",
    hold_back: Annotated[bool, typer.Option(help="Predictions are disabled until they are measured to help.")] = True,
    drift: Annotated[bool, typer.Option(help="Drift is measured, from features; not for replay alone.")] = True,
    sample_fraction: Annotated[
        float, typer.Option(help="Share of the response tokens that features are kept of, as far as they fit into --feature-bytes.")
    ] = 0.125,
    feature_bytes: Annotated[int, typer.Option(help="Byte budget of the features on a rank.")] = 4 << 30,
    feature_device: Annotated[str, typer.Option(help="device (where they are computed) or cpu (host memory).")] = "device",
    route_delivery: Annotated[
        str, typer.Option(help="scatter (tables on the first rank of a replica) or local (on all of its ranks, as under verl).")
    ] = "scatter",
    as_json: Annotated[bool, typer.Option("--json", help="Print the JSON object only.")] = False,
) -> None:
    """How much memory replay and prediction take on each rank, and what they move, before any GPU is there.

    Computed in seconds by the functions that training runs, for any number of ranks. A layout that cannot be trained is refused
    with the same message. Columns: a typical rank, the one with most memory (usually the first rank of a replica), and the sum of
    all ranks. The last line printed is a JSON object with every number in bytes.

    With --config the layout, the batch and PR2's settings come from a verl configuration; options that are given override it, and
    the same layout is printed as flags of Megatron-LM.

    Examples: megatron-pr2 plan --model qwen3-30b-a3b --tp 2 --ep 8 --dp 8 --batch 512 --seq 16384 --prompt 1024

    megatron-pr2 plan --config examples/clusters/qwen3-30b-a3b.yaml --sample-fraction 0.01
    """
    sources = {name: context.get_parameter_source(name) for name in context.params}
    # By name: Typer has Click's enumeration or, since 0.26, a copy of its own.
    given = {name for name, source in sources.items() if source is not None and source.name not in ("DEFAULT", "DEFAULT_MAP")}
    values = dict(context.params)
    with errors():
        from megatron_pr2.plan.megatron_lm_flags import megatron_lm_flags
        from megatron_pr2.plan.models import LAYOUT_OPTIONS, load_spec, make_layout
        from megatron_pr2.plan.plan import plan as make_plan
        from megatron_pr2.plan.table import as_json as plan_as_json
        from megatron_pr2.plan.table import print_plan, print_run
        from megatron_pr2.plan.tokens import Workload
        from megatron_pr2.plan.verl import read_verl

        run = read_verl(config) if config else None
        if run:
            # The data-parallel size and the ranks in all are alternatives.
            said = given | ({"world"} if "dp" in given else set())
            values |= {name: value for name, value in run.options.items() if name not in said}
        if values["model"] is None:
            raise ConfigError("no model; give --model, or --config with actor_rollout_ref.model.path")
        spec = load_spec(values["model"])
        layout = make_layout(spec, **{name: values[option] for option, name in LAYOUT_OPTIONS.items()})
        work = Workload(**{field.name: values[field.name] for field in fields(Workload)})
        made = make_plan(spec, layout, work, _settings(values, given, run))
        found = plan_as_json(made)
        if run:
            flags = megatron_lm_flags(layout, work, run.transformer, run.preset, run.pr2)
            found |= {"rollout": run.rollout, "megatron_lm": flags}
    if not as_json:
        print_plan(made)
        if run:
            print_run(found)
    typer.echo(json.dumps(found))


def _settings(values: dict[str, Any], given: set[str], run: VerlRun | None) -> PR2Config:
    """PR2's settings: the options, or those of a configuration with the options that were given."""
    from megatron_pr2.config import PR2Config

    if run is None:
        return PR2Config.from_dict({name: values[name] for name in _PR2})
    settings = {**run.pr2, "route_delivery": values["route_delivery"], **{name: values[name] for name in _PR2 if name in given}}
    return PR2Config.from_dict(settings) if run.preset is None else PR2Config.preset(run.preset, **settings)
