"""How well the routes of working engines agree, and what a gate in 8 bits costs, against the bounds of routes.agreement.

Two instances of a random Qwen3-MoE in Transformers with the same weights stand for engine and actor. They differ in their attention
kernel (eager and SDPA), in dtype, or in the gates' precision. Gates of a toy (8 experts, top-2), of half of Qwen3-30B's size, and
of its size (128 experts, top-8, hidden size 2048); experts and depth are small, and hidden states are those of random tokens.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from torch import Tensor
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from megatron_pr2.routes.agreement import least_hits, least_share

# Hidden size, experts, top-k.
GATES = {"toy": (64, 8, 2), "half": (1024, 64, 8), "qwen3-30b": (2048, 128, 8)}
VOCABULARY = 1000
console = Console(stderr=True)


def model(gate: str, layers: int, attention: str) -> Qwen3MoeForCausalLM:
    hidden, experts, topk = GATES[gate]
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=hidden, num_hidden_layers=layers, num_attention_heads=8,
        num_key_value_heads=2, head_dim=hidden // 8, num_experts=experts, num_experts_per_tok=topk, moe_intermediate_size=32,
        max_position_embeddings=4096, norm_topk_prob=True,
    )  # fmt: skip
    config._attn_implementation = attention
    torch.manual_seed(0)
    return Qwen3MoeForCausalLM(config).eval()


def routes(of: Qwen3MoeForCausalLM, ids: Tensor) -> Tensor:
    """Experts [T, L, K] of every token."""
    got: list[Tensor] = []
    experts = [module for name, module in of.named_modules() if name.endswith(".experts")]
    hooks = [module.register_forward_pre_hook(lambda _, inputs: got.append(inputs[1].detach())) for module in experts]
    with torch.no_grad():
        of(ids)
    for hook in hooks:
        hook.remove()
    return torch.stack(got, 1)


def in_8_bits(of: Qwen3MoeForCausalLM) -> Qwen3MoeForCausalLM:
    """Its gates rounded to 8 bits, with a scale per expert."""
    for name, parameter in of.named_parameters():
        if name.endswith("mlp.gate.weight"):
            weight = parameter.data.float()
            scale = weight.abs().amax(1, keepdim=True) / 127
            parameter.data = ((weight / scale).round() * scale).to(parameter.dtype)
    return of


def pairs(gate: str, layers: int, ids: Tensor) -> Iterator[tuple[str, str, Tensor, Tensor]]:
    """(case, dtype of the bound, routes of the one, routes of the other)."""
    exact = routes(model(gate, layers, "eager"), ids)
    yield "fp32, other kernel", "float32", exact, routes(model(gate, layers, "sdpa"), ids)
    yield "fp32, gate in 8 bits", "float32", exact, routes(in_8_bits(model(gate, layers, "eager")), ids)
    half = routes(model(gate, layers, "eager").bfloat16(), ids)
    yield "bf16, other kernel", "bfloat16", half, routes(model(gate, layers, "sdpa").bfloat16(), ids)
    yield "bf16 and fp32", "bfloat16", half, exact
    yield "bf16, gate in 8 bits", "bfloat16", half, routes(in_8_bits(model(gate, layers, "eager").bfloat16()), ids)


def compare(one_TLK: Tensor, other_TLK: Tensor, dtype: str, gate: str) -> dict[str, Any]:
    """Shares of equal slots, and whether the check of layers and of the whole refuses them."""
    _, experts, topk = GATES[gate]
    hits_L = (one_TLK.unsqueeze(3) == other_TLK.unsqueeze(2)).any(3).double().sum((0, 2))
    slots = one_TLK.shape[0] * topk
    bound, layers = least_share(dtype, topk, experts), len(hits_L)
    refused = bool((hits_L < least_hits(bound, slots)).any()) or hits_L.sum().item() < least_hits(bound, slots * layers)
    share_L = hits_L / slots
    return {"mean": share_L.mean().item(), "least_layer": share_L.min().item(), "bound": bound, "refused": refused}


def main(
    gates: Annotated[str, typer.Option(help=f"Comma-separated, of {', '.join(GATES)}.")] = ",".join(GATES),
    tokens: Annotated[int, typer.Option(min=1, max=4096, help="Tokens compared.")] = 512,
    layers: Annotated[int, typer.Option(min=1, help="MoE layers of each model.")] = 4,
) -> None:
    """Prints a line per case while it runs, and all of them as JSON last."""
    names = [name.strip() for name in gates.split(",")]
    if unknown := sorted(set(names) - set(GATES)):
        raise typer.BadParameter(f"{', '.join(unknown)}: expected some of {', '.join(GATES)}", param_hint="--gates")
    cases = []
    with Progress(console=console) as progress:
        task = progress.add_task("agreement", total=5 * len(names))
        for gate in names:
            ids = torch.randint(0, VOCABULARY, (1, tokens), generator=torch.Generator().manual_seed(1))
            for case, dtype, one, other in pairs(gate, layers, ids):
                found = compare(one, other, dtype, gate)
                cases.append({"gate": gate, "case": case, **found})
                console.print(
                    f"{gate}, {case}: {found['mean']:.2%}, least layer {found['least_layer']:.2%}, bound {found['bound']:.2%}, "
                    + ("refused" if found["refused"] else "accepted")
                )
                progress.advance(task)
    sys.stdout.write(json.dumps({"tokens": tokens, "layers": layers, "cases": cases}) + "\n")


if __name__ == "__main__":
    typer.run(main)
