"""Responses of the tiny policy by Transformers, turn by turn: to measure a warm start, and to read what a policy writes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from megatron_pr2.rl.tokenizer import EOS_ID, NUM_BYTES, PAD_ID, prompt_bytes

if TYPE_CHECKING:
    from transformers import Qwen3MoeForCausalLM

    from megatron_pr2.rollout.base import Environment

# Of one turn.
MAX_NEW_TOKENS = 20
MAX_TURNS = 8


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
