"""Supervised training of the tiny policy in parts: batches, load balancing, sampling, and measurements of the result.

Shape suffixes: B sequences, S positions, T tokens (B * S), E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron_pr2.rl.rewards import exact_match
from megatron_pr2.rl.task import Problem
from megatron_pr2.rl.tokenizer import EOS_ID, NUM_BYTES, PAD_ID, prompt_bytes

if TYPE_CHECKING:
    from transformers import Qwen3MoeForCausalLM

    from megatron_pr2.rollout.base import Environment

# The label that torch's cross-entropy skips.
IGNORED = -100
# Of one sampled turn.
MAX_NEW_TOKENS = 20
MAX_TURNS = 8
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


@torch.no_grad()
def sample_responses(
    model: Qwen3MoeForCausalLM, prompts: Sequence[str], seed: int, environment: Environment | None = None
) -> list[tuple[str, ...]]:
    """One response per prompt at temperature 1: the policy's turns, with the environment's replies between them.

    The global random state is left as it was.

    Args:
        environment: None for a single turn.
    """
    heads = [prompt_bytes(prompt) for prompt in prompts]
    tails: list[tuple[int, ...]] = [()] * len(prompts)
    turns: list[list[str]] = [[] for _ in prompts]
    active = list(range(len(prompts)))
    stops = [EOS_ID, *(environment.stop_token_ids if environment is not None else ())]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for turn in range(MAX_TURNS):
            sampled = _sample_turn(model, [heads[i] + tails[i] for i in active], stops)
            going_on = []
            for i, ids in zip(active, sampled, strict=True):
                tails[i] += ids
                turns[i].append(_text(ids))
                reply = environment.reply(heads[i], tails[i]) if environment is not None and ids[-1:] != (EOS_ID,) else None
                if reply is not None and turn + 1 < MAX_TURNS:
                    tails[i] += reply
                    turns[i].append(_text(reply))
                    going_on.append(i)
            active = going_on
            if not active:
                break
    return [tuple(response) for response in turns]


def _sample_turn(model: Qwen3MoeForCausalLM, rows: Sequence[tuple[int, ...]], stops: Sequence[int]) -> list[tuple[int, ...]]:
    """What the model writes behind each row, up to and with a stop token."""
    width = max(map(len, rows))
    out = model.generate(
        input_ids=torch.tensor([[PAD_ID] * (width - len(row)) + list(row) for row in rows]),
        attention_mask=torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows]),
        max_new_tokens=MAX_NEW_TOKENS,
        eos_token_id=list(stops),
    )
    sampled = []
    for ids in out[:, width:].tolist():
        length = next((index + 1 for index, token in enumerate(ids) if token in stops), len(ids))
        sampled.append(tuple(ids[:length]))
    return sampled


def _text(ids: Sequence[int]) -> str:
    return bytes(t for t in ids if t < NUM_BYTES).decode("utf-8", "replace")


def exact_match_rate(
    model: Qwen3MoeForCausalLM, problems: Sequence[Problem], seed: int, environment: Environment | None = None
) -> float:
    """Share of correct responses at temperature 1, one per prompt; of several turns, the last one has to be correct."""
    responses = sample_responses(model, [p.prompt for p in problems], seed, environment)
    return sum(exact_match(response[-1], p.answer) for response, p in zip(responses, problems, strict=True)) / len(problems)
