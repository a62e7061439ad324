"""How a bf16 gate should carry a prediction that is smaller than its steps: nearest, carried or stochastic rounding, or fp32.

Gates of Qwen3-30B's size whose entries W lie on the bf16 grid, router inputs with a power-law spectrum, and two kinds of W_p: of
independent entries, and of a span of router inputs, as whatever is learned from them. `carried` keeps what a push rounded away
and adds it to the next one; W_p turns a little and W moves by a bf16 step here and there between pushes. `two products` is
W h + W_p h, as an engine would add it that holds both. Route errors are against TopK((W + W_p) h) in fp32; `changed` is what the
prediction itself changes, and the error of a gate without one.

Prints a table, then one line of JSON. A minute of one CPU core.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from itertools import product
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from megatron_pr2.prediction.rounding import merge_gate

EXPERTS, HIDDEN, TOPK = 128, 2048, 8
STD = 0.02
RMS = (1e-6, 5e-6, 4e-5)
KINDS = ("independent", "of inputs")
PUSHES = 12
# Correlation of W_p from one push to the next.
SAME = 0.9


def main(
    seeds: Annotated[int, typer.Option(min=2, help="Gates, inputs and predictions of so many seeds.")] = 5,
    tokens: Annotated[int, typer.Option(min=1)] = 8192,
) -> None:
    """Measures delivered share and route errors of each way to round."""
    console = Console(stderr=True)
    found: dict[tuple[str, float, str], list[dict[str, float]]] = {}
    for seed in track(range(seeds), description="seeds", console=console):
        generator = torch.Generator().manual_seed(seed)
        gate_EH = (torch.randn(EXPERTS, HIDDEN, generator=generator) * STD).bfloat16()
        basis_HH = torch.linalg.qr(torch.randn(HIDDEN, HIDDEN, generator=generator))[0]
        h_SH, past_SH = (_inputs(tokens, basis_HH, generator) for _ in range(2))
        for kind, rms in product(KINDS, RMS):
            for name, values in _measured(gate_EH, h_SH, _predictions(kind, rms, past_SH, generator), seed, generator):
                found.setdefault((kind, rms, name), []).append(values)
    columns = ("W_p", "rms", "rounding", "delivered", "route error %", "changed by W_p %")
    table = Table(*columns, title=f"{seeds} seeds, {tokens} tokens")
    results = []
    for (kind, rms, name), runs in found.items():
        mean = {key: sum(run[key] for run in runs) / len(runs) for key in runs[0]}
        spread = torch.tensor([run["route_error"] for run in runs]).std().item() / len(runs) ** 0.5
        results.append({"prediction": kind, "rms": rms, "rounding": name, **mean, "route_error_stderr": spread})
        error = f"{100 * mean['route_error']:.3f} ± {100 * spread:.3f}"
        table.add_row(kind, f"{rms:.0e}", name, f"{mean['delivered']:.2f}", error, f"{100 * mean['changed']:.3f}")
    console.print(table)
    shape = {"experts": EXPERTS, "hidden": HIDDEN, "topk": TOPK, "gate_std": STD, "seeds": seeds, "tokens": tokens}
    sys.stdout.write(json.dumps({**shape, "results": results}) + "\n")


def _inputs(tokens: int, basis_HH: Tensor, generator: torch.Generator) -> Tensor:
    """[S, H] of rms 1, whose k-th principal component has a variance of 1/k."""
    spectrum_H = torch.arange(1, HIDDEN + 1).float().rsqrt()
    h_SH = (torch.randn(tokens, HIDDEN, generator=generator) * spectrum_H) @ basis_HH
    return h_SH * h_SH.square().mean(-1, keepdim=True).rsqrt()


def _predictions(kind: str, rms: float, past_SH: Tensor, generator: torch.Generator) -> list[Tensor]:
    """W_p [E, H] of successive pushes."""

    def drawn() -> Tensor:
        w_EH = torch.randn(EXPERTS, HIDDEN, generator=generator)
        # Gradients are sums of d_t h_t^T over tokens, here with d_t = B h_t.
        return w_EH if kind == "independent" else (past_SH @ w_EH.t()).t() @ past_SH

    scaled = [w_EH / w_EH.square().mean().sqrt() for w_EH in (drawn() for _ in range(PUSHES))]
    out = [scaled[0]]
    for w_EH in scaled[1:]:
        out.append(SAME * out[-1] + (1 - SAME**2) ** 0.5 * w_EH)
    return [rms * w_EH for w_EH in out]


def _measured(
    gate_EH: Tensor, h_SH: Tensor, predictions: list[Tensor], seed: int, generator: torch.Generator
) -> Iterator[tuple[str, dict[str, float]]]:
    """The last push under each way to round."""
    gates = [gate_EH]
    for _ in predictions[1:]:
        moves = torch.rand(gate_EH.shape, generator=generator) < 0.05
        gates.append(torch.where(moves, gates[-1] * (1 + 2**-8), gates[-1]))
    carried_EH = torch.zeros_like(predictions[0])
    for before_EH, w_EH in zip(gates, predictions, strict=True):
        exact_EH = before_EH.float() + w_EH + carried_EH
        pushed_EH = exact_EH.bfloat16()
        carried_EH = exact_EH - pushed_EH.float()
    last_EH, w_EH = gates[-1], predictions[-1]
    ways: dict[str, Callable[[], Tensor]] = {
        "fp32": lambda: last_EH.float() + w_EH,
        "nearest": lambda: (last_EH.float() + w_EH).bfloat16(),
        "carried": lambda: pushed_EH,
        "stochastic": lambda: merge_gate(last_EH, w_EH, seed=seed),
    }
    wanted_SE = _chosen(h_SH, last_EH.float() + w_EH)
    changed = _missed(wanted_SE, _chosen(h_SH, last_EH.float()))
    for name, make in ways.items():
        merged_EH = make().float()
        delta_EH = (merged_EH - last_EH.float()).double()
        delivered = float((delta_EH * w_EH.double()).sum() / w_EH.double().square().sum())
        error = _missed(wanted_SE, _chosen(h_SH, merged_EH))
        yield name, {"delivered": delivered, "route_error": error, "changed": changed}
    error = _missed(wanted_SE, _top(h_SH @ last_EH.float().t() + h_SH @ w_EH.t()))
    yield "two products", {"delivered": 1.0, "route_error": error, "changed": changed}


def _chosen(h_SH: Tensor, gate_EH: Tensor) -> Tensor:
    """[S, E] bool."""
    return _top(h_SH @ gate_EH.t())


def _top(logits_SE: Tensor) -> Tensor:
    return torch.zeros_like(logits_SE, dtype=torch.bool).scatter_(1, logits_SE.topk(TOPK).indices, True)


def _missed(wanted_SE: Tensor, chosen_SE: Tensor) -> float:
    """Share of the wanted slots that are not chosen."""
    values: Any = (wanted_SE & ~chosen_SE).sum() / wanted_SE.sum()
    return float(values)


if __name__ == "__main__":
    typer.run(main)
