"""What replay and prediction cost: Megatron-Core's router, its own RouterReplay, and ours in every mode, in one process.

Forward and backward of a router, of a whole MoE layer, and a whole training step (forward, backward, optimizer, predictor) of a
small GPT, for the gates of Qwen3-30B, Mixtral and DeepSeek-V3. All variants share one set of weights and take turns in rounds;
ratios are taken within a round and their median is reported, so that a busy machine disturbs all alike; on one CPU thread they are
of the process's CPU time. In the scopes "router" and "layer" what is timed is what runs per micro-batch; opening a pass and ending
a mini-step is timed within "step" only. Memory is taken in a pass of its own: on CUDA torch's peak of allocated bytes, on a CPU the
bytes of the tensors that operators make. Operators are counted there too: small ones cost a GPU little and its host a lot.
"""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import asdict
from typing import Annotated, Any

import torch
import typer
from bench_router_gates import GATES, Gate, Platform, finish, start, weight_bytes
from bench_router_measure import footprint, quartiles, ratios, take_turns
from bench_router_variants import Batch, subjects, variants
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

SCOPES = ("router", "layer", "step")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
console = Console(stderr=True)


def targets(scope: str) -> dict[str, dict[str, Any]]:
    """Per variant: the largest ratio that it may have, and to what."""
    learning = 1.15 if scope == "router" else 1.01
    return {
        "live": {"to": "plain", "at_most": 1.01, "at_least": 0.99},
        "replay": {"to": "mcore-replay", "at_most": 1.0},
        "replay+drift": {"to": "plain", "at_most": learning},
        "learn": {"to": "plain", "at_most": learning},
        "learn+hold-back": {"to": "plain", "at_most": learning},
        "momentum": {"to": "plain", "at_most": learning},
    }


def measure(
    scope: str, gate: Gate, platform: Platform, *, tokens: int, length: int, count: int, layers: int, ffn: int, fraction: float,
    repeats: int, warm_up: int, clock: str, progress: Progress,
) -> dict[str, Any]:  # fmt: skip
    """One case: every variant in one scope, for one gate and one number of tokens."""
    task = progress.add_task(f"{gate.name} {scope} {tokens}", total=repeats + warm_up + 1)
    batch = Batch(scope, gate, platform, tokens=tokens, length=length, count=count, layers=layers)
    made, same = subjects(scope, gate, platform, variants(fraction), batch, layers=layers, ffn=ffn)
    # A training step is one thing, whatever is in it; routers and layers are counted one by one.
    runs = count if scope == "step" else count * layers
    progress.advance(task)
    times = take_turns(made, platform.device, repeats, warm_up, lambda: progress.advance(task))
    clocks = [each.cpu if clock == "cpu" else each.wall for each in times]
    names = [subject.variant.name for subject in made]
    rows = {}
    for index, subject in enumerate(made):
        peak, operators = footprint(subject, platform.device)
        ratio, low, high = ratios(clocks[index], clocks[0])
        row: dict[str, Any] = {
            "ms": quartiles(times[index].wall)[0] * 1e3 / runs,
            "ms_host": quartiles(times[index].host)[0] * 1e3 / runs,
            "ms_cpu": quartiles(times[index].cpu)[0] * 1e3 / runs,
            "ratio": ratio,
            "ratio_q1": low,
            "ratio_q3": high,
            "peak_bytes": peak,
            "operators": operators / runs,
            "feature_bytes": 0 if subject.pr2 is None else subject.pr2.features.nbytes,
            "same_output_as_plain": same[names[index]],
        }
        if (goal := targets(scope).get(names[index])) is not None:
            found, least, most = ratios(clocks[index], clocks[names.index(goal["to"])])
            floor = goal.get("at_least", 0.0)
            # Within the noise: the quartiles reach into the target.
            near = least <= goal["at_most"] and most >= floor
            row["target"] = {**goal, "found": found, "met": floor <= found <= goal["at_most"], "within_spread": near}
        rows[names[index]] = row
    progress.remove_task(task)
    learner = next(subject for subject in made if subject.variant.name == "learn")
    assert learner.pr2 is not None
    return {
        "scope": scope,
        "gate": gate.name,
        "tokens": tokens,
        "micro_batches": count,
        "sampled_tokens": sum(len(segment.tokens) for segment in learner.pr2.features.segments),
        "layers": layers,
        "ffn": None if scope == "router" else ffn,
        "ffn_true": gate.ffn,
        "variants": rows,
    }


def show(case: dict[str, Any], clock: str) -> None:
    """A table of one case."""
    size = "" if case["ffn"] is None else f", experts {case['ffn']} of {case['ffn_true']}"
    where = f"{case['gate']}, {case['scope']}, {case['tokens']} tokens x {case['micro_batches']}, layers: {case['layers']}"
    title = f"{where}{size} (ratios of {clock} time)"
    table = Table("variant", "ms", "/ plain", "quartiles", "peak MiB", "operators", "target", title=title, title_justify="left")
    for name, row in case["variants"].items():
        target = row.get("target")
        text = ""
        if target is not None:
            verdict = "met" if target["met"] else "within the spread" if target["within_spread"] else "missed"
            low = f"{target['at_least']:.2f} to " if "at_least" in target else "<= "
            text = f"{low}{target['at_most']:.2f}x {target['to']}: {target['found']:.3f} {verdict}"
        table.add_row(
            name, f"{row['ms']:.2f}", f"{row['ratio']:.3f}", f"{row['ratio_q1']:.3f} .. {row['ratio_q3']:.3f}",
            f"{row['peak_bytes'] / 2**20:.1f}", f"{row['operators']:.0f}", text,
        )  # fmt: skip
    console.print(table)


def chosen_device(name: str) -> str:
    """`cpu` or `cuda`; typer.BadParameter if it cannot be used."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda"):
        raise typer.BadParameter(f"{name!r}: expected auto, cpu or cuda", param_hint="--device")
    if name == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("torch sees no CUDA device; use --device cpu", param_hint="--device")
    if name == "cpu" and torch.cuda.is_available():
        raise typer.BadParameter("hide the GPU first: CUDA_VISIBLE_DEVICES= (empty)", param_hint="--device")
    return name


def listed(value: str, allowed: tuple[str, ...], option: str) -> list[str]:
    """A comma-separated list of known names."""
    names = [name.strip() for name in value.split(",") if name.strip()]
    if unknown := [name for name in names if name not in allowed]:
        raise typer.BadParameter(f"{', '.join(unknown)}: expected some of {', '.join(allowed)}", param_hint=option)
    return names


def main(
    gates: Annotated[str, typer.Option(help="Comma-separated, of qwen3-30b, mixtral, deepseek-v3.")] = ",".join(GATES),
    scopes: Annotated[
        str, typer.Option(help="Comma-separated: router alone, whole MoE layer, whole training step of a 2-layer GPT.")
    ] = ",".join(SCOPES),
    tokens: Annotated[str, typer.Option(help="Tokens of a micro-batch for the router alone, comma-separated.")] = "4096,16384",
    layer_tokens: Annotated[
        int | None, typer.Option(help="Tokens of a micro-batch in layer and step. Default: 512 on a CPU, 16384 on CUDA.")
    ] = None,
    sequence: Annotated[int, typer.Option(help="Tokens of a sequence; each has one token without a route, its last.")] = 1024,
    sample_fraction: Annotated[float, typer.Option(help="Share of the tokens whose features are kept.")] = 0.125,
    layers: Annotated[
        int, typer.Option(help="MoE layers for the router alone, whose times are per router: what is done for several is shared.")
    ] = 4,
    repeats: Annotated[int, typer.Option(help="Rounds; every variant runs once in each.")] = 9,
    layer_repeats: Annotated[int | None, typer.Option(help="Rounds in layer and step. Default: as --repeats.")] = None,
    warm_up: Annotated[int, typer.Option(help="Rounds that are not counted.")] = 2,
    micro_batches: Annotated[
        int | None, typer.Option(help="Micro-batches per sample; times are per micro-batch. Default: 1 on a CPU, 8 on CUDA.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[
        str, typer.Option(help="Of weights and activations: fp32 or bf16. Default: fp32 on a CPU, bf16 on CUDA.")
    ] = "",
    router_dtype: Annotated[
        str, typer.Option(help="moe_router_dtype: fp32 (as large MoE models are trained) or same (as --dtype).")
    ] = "fp32",
    threads: Annotated[int, typer.Option(help="Threads of torch's CPU operators.")] = 1,
    ffn_divisor: Annotated[
        int | None,
        typer.Option(help="Divides the experts' size in layer and step; 1 is the true size. Default: 16 on a CPU, 1 on CUDA."),
    ] = None,
    memory_gib: Annotated[
        float | None,
        typer.Option(help="Budget for weights, gradients and optimizer; the divisor grows until it fits. Default: 6, CUDA: 100."),
    ] = None,
    shrink: Annotated[
        int, typer.Option(help="Divides every gate's hidden and expert size, and its experts by 8: for a check, not a result.")
    ] = 1,
) -> None:
    """Measures what record, replay and prediction cost, against Megatron-Core's plain router and its own replay.

    Progress and tables go to stderr; the last line of stdout is one JSON object with every number.

    \b
    A minute on one core:  python tools/bench_router.py --gates qwen3-30b --scopes router --tokens 4096
    Does it run at all:    python tools/bench_router.py --shrink 32 --tokens 64 --layer-tokens 64 --sequence 32 --repeats 2
    On a GPU:              python tools/bench_router.py --device cuda
    """
    place = chosen_device(device)
    on_cpu = place == "cpu"
    wanted = [GATES[name].shrunk(shrink) for name in listed(gates, tuple(GATES), "--gates")]
    wanted_scopes = listed(scopes, SCOPES, "--scopes")
    dtype = dtype or ("fp32" if on_cpu else "bf16")
    listed(dtype, tuple(DTYPES), "--dtype")
    listed(router_dtype, ("fp32", "same"), "--router-dtype")
    counts = [int(each) for each in tokens.split(",")]
    layer_tokens = layer_tokens or (512 if on_cpu else 16384)
    count = micro_batches or (1 if on_cpu else 8)
    divisor = ffn_divisor or (16 if on_cpu else 1)
    budget = (memory_gib or (6 if on_cpu else 100)) * 2**30
    platform = Platform(start(place, threads), DTYPES[dtype], None if router_dtype == "same" else router_dtype)
    # On a shared machine, seconds that this process computed are far steadier than seconds that passed.
    clock = "cpu" if on_cpu and threads == 1 else "wall"
    cases, skipped = [], []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        for gate in wanted:
            for scope in wanted_scopes:
                depth = {"router": layers, "layer": 1, "step": 2}[scope]
                ffn = gate.ffn if scope == "router" else max(8, gate.ffn // divisor)
                while scope != "router" and ffn > 8 and weight_bytes(scope, gate, platform, depth, ffn) > budget:
                    ffn //= 2
                if weight_bytes(scope, gate, platform, depth, ffn) > budget:
                    skipped.append({"gate": gate.name, "scope": scope, "reason": f"more than {budget / 2**30:g} GiB of weights"})
                    continue
                for size in counts if scope == "router" else [layer_tokens]:
                    case = measure(
                        scope, gate, platform, tokens=size, length=min(sequence, size), count=count, layers=depth,
                        ffn=ffn, fraction=sample_fraction, repeats=repeats if scope == "router" else layer_repeats or repeats,
                        warm_up=warm_up, clock=clock, progress=progress,
                    )  # fmt: skip
                    cases.append(case)
                    show(case, clock)
    finish()
    report = {
        "bench": "router",
        "device": "cpu" if on_cpu else torch.cuda.get_device_name(0),
        "torch": torch.__version__,
        "dtype": dtype,
        "router_dtype": router_dtype,
        "threads": threads,
        "experts_module": "TEGroupedMLP" if not on_cpu and platform.transformer_engine else "SequentialMLP",
        "ratios_of": "CPU time of the process" if clock == "cpu" else "wall time",
        "memory": "peak of tensors made by operators" if on_cpu else "torch.cuda.max_memory_allocated",
        "sample_fraction": sample_fraction,
        "shrink": shrink,
        "gates": [asdict(gate) for gate in wanted],
        "variants": {variant.name: variant.what for variant in variants(sample_fraction)},
        "cases": cases,
        "skipped": skipped,
    }
    sys.stdout.write(json.dumps(report) + "\n")


if __name__ == "__main__":
    # Warnings of a handle that is attached dozens of times would bury the table.
    logging.getLogger("megatron_pr2").setLevel(logging.ERROR)
    typer.run(main)
