"""What supervised training of the tiny policy is made of: batches, load balancing, and measurements of the result.

Shape suffixes: B sequences, S positions, T tokens (B * S), E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron_pr2.rl.rewards import exact_match
from megatron_pr2.rl.task import Problem
from megatron_pr2.rl.tokenizer import EOS_ID, NUM_BYTES, PAD_ID

if TYPE_CHECKING:
    from transformers import Qwen3MoeForCausalLM

# The label that torch's cross-entropy skips.
IGNORED = -100
MAX_NEW_TOKENS = 20


def supervised_batch(pairs: Sequence[tuple[str, str]]) -> tuple[Tensor, Tensor]:
    """Token ids [B, S] and labels [B, S] int64 of (prompt, response) pairs, padded on the right; only responses bear loss."""
    encoded = [(list(prompt.encode()), [*response.encode(), EOS_ID]) for prompt, response in pairs]
    width = max(len(prompt) + len(response) for prompt, response in encoded)
    input_ids = torch.full((len(pairs), width), PAD_ID)
    labels = torch.full((len(pairs), width), IGNORED)
    for row, (prompt, response) in enumerate(encoded):
        end = len(prompt) + len(response)
        input_ids[row, :end] = torch.tensor(prompt + response)
        labels[row, len(prompt) : end] = torch.tensor(response)
    return input_ids, labels


def balance_loss(router_logits: Sequence[Tensor], real: Tensor, topk: int) -> Tensor:
    """Mean over layers of E * sum_e f_e P_e: f_e the share of routes that expert e gets, P_e its mean probability; 1 at balance.

    Transformers' own loss pools all layers, which lets an expert die in one layer if its namesake in another makes up for it.

    Args:
        router_logits: per layer [T, E].
        real: [T] bool, False for padding.
        topk: K.
    """
    losses = []
    for logits_TE in router_logits:
        probs_TE = logits_TE[real].float().softmax(dim=-1)
        load_E = torch.zeros_like(probs_TE).scatter_(1, probs_TE.topk(topk, dim=-1).indices, 1.0).mean(dim=0) / topk
        losses.append(probs_TE.shape[1] * (load_E * probs_TE.mean(dim=0)).sum())
    return torch.stack(losses).mean()


@torch.no_grad()
def routing_statistics(model: Qwen3MoeForCausalLM, problems: Sequence[Problem]) -> list[dict[str, float]]:
    """Per layer, over prompts and worked responses: is routing collapsed, uniform noise, or in between?

    `top1` mean largest probability; `topk_mass` mean probability of the selected experts; `entropy` mean entropy over that of
    the uniform distribution; `load_max`, `load_min` largest and smallest expert load, 1 at balance.
    """
    input_ids, _ = supervised_batch([(p.prompt, p.worked) for p in problems])
    real = (input_ids != PAD_ID).flatten()
    layers = []
    for logits_TE in model(input_ids=input_ids, use_cache=False, output_router_logits=True).router_logits:
        probs_TE = logits_TE[real].float().softmax(dim=-1)
        experts, topk = probs_TE.shape[1], model.config.num_experts_per_tok
        best = probs_TE.topk(topk, dim=-1)
        load_E = torch.bincount(best.indices.flatten(), minlength=experts).float() * experts / best.indices.numel()
        entropy = torch.special.entr(probs_TE).sum(dim=-1).mean() / torch.tensor(float(experts)).log()
        layers.append(
            {
                "top1": float(best.values[:, 0].mean()),
                "topk_mass": float(best.values.sum(dim=-1).mean()),
                "entropy": float(entropy),
                "load_max": float(load_E.max()),
                "load_min": float(load_E.min()),
            }
        )
    return layers


@torch.no_grad()
def exact_match_rate(model: Qwen3MoeForCausalLM, problems: Sequence[Problem], seed: int) -> float:
    """Share of correct responses at temperature 1, one per prompt. The global random state is left as it was."""
    prompts = [list(p.prompt.encode()) for p in problems]
    width = max(map(len, prompts))
    input_ids = torch.tensor([[PAD_ID] * (width - len(p)) + p for p in prompts])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        out = model.generate(
            input_ids=input_ids, attention_mask=(input_ids != PAD_ID).long(), max_new_tokens=MAX_NEW_TOKENS
        )
    texts = [bytes(t for t in row if t < NUM_BYTES).decode("utf-8", "replace") for row in out[:, width:].tolist()]
    return sum(exact_match(text, p.answer) for text, p in zip(texts, problems, strict=True)) / len(problems)
