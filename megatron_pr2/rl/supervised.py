"""What a warm start is made of: batches, load balancing, and measurements of the result.

Shape suffixes: B sequences, S positions, T tokens (B * S), E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron_pr2.rl.rewards import exact_match
from megatron_pr2.rl.sampling import sample_responses
from megatron_pr2.rl.task import Problem
from megatron_pr2.rl.tokenizer import EOS_ID, PAD_ID, prompt_bytes

if TYPE_CHECKING:
    from transformers import Qwen3MoeForCausalLM

    from megatron_pr2.rollout.base import Environment

# The label that torch's cross-entropy skips.
IGNORED = -100
# What is learned from: one turn of the policy, or the policy's turns with an environment's replies between them.
Response = str | tuple[str, ...]


def supervised_batch(pairs: Sequence[tuple[str, Response]]) -> tuple[Tensor, Tensor]:
    """Token ids and labels [B, S] int64 of (prompt, response) pairs, padded on the right; only the policy's turns bear loss."""
    rows = [_tokens_and_labels(prompt, response) for prompt, response in pairs]
    width = max(len(tokens) for tokens, _ in rows)
    input_ids = torch.full((len(pairs), width), PAD_ID)
    labels = torch.full((len(pairs), width), IGNORED)
    for row, (tokens, targets) in enumerate(rows):
        input_ids[row, : len(tokens)] = torch.tensor(tokens)
        labels[row, : len(tokens)] = torch.tensor(targets)
    return input_ids, labels


def _tokens_and_labels(prompt: str, response: Response) -> tuple[list[int], list[int]]:
    turns = (response,) if isinstance(response, str) else response
    tokens = list(prompt_bytes(prompt))
    labels = [IGNORED] * len(tokens)
    for index, turn in enumerate(turns):
        ids = list(turn.encode())
        tokens += ids
        labels += ids if index % 2 == 0 else [IGNORED] * len(ids)
    return [*tokens, EOS_ID], [*labels, EOS_ID]


def balance_loss(router_logits: Sequence[Tensor], real: Tensor, topk: int) -> Tensor:
    """Mean over layers of E * sum_e f_e P_e: f_e the share of routes that expert e gets, P_e its mean probability; 1 at balance.

    Transformers' own loss pools all layers, so that an unused expert in one layer may be balanced by an expert of another.

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
    """Per layer, over prompts and worked responses: is routing collapsed, uniform, or in between?

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


def exact_match_rate(
    model: Qwen3MoeForCausalLM, problems: Sequence[Problem], seed: int, environment: Environment | None = None
) -> float:
    """Share of correct responses at temperature 1, one per prompt; of several turns, the last one has to be correct."""
    responses = sample_responses(model, [p.prompt for p in problems], seed, environment)
    return sum(exact_match(response[-1], p.answer) for response, p in zip(responses, problems, strict=True)) / len(problems)
