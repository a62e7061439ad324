"""Whole training runs on the tiny checkpoint, in the processes of a pool, observed from outside of the trainer."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from megatron_pr2 import host
from megatron_pr2.rl.batch import Sample

# What differs from run to run by nature.
TIMES = ("wall_seconds", "seconds", "cpu_seconds", "tokens_per_second", "rollout_tokens_per_second")

SMALL = [
    "rollout.prompts=4",
    "rollout.responses=4",
    "rollout.max_new_tokens=6",
    "algorithm.mini_steps=4",
    "algorithm.micro_batch_size=1",
    "optimizer.lr=0.003",
    "rollout.handshake=false",
    "pr2.sample_fraction=1.0",
]


def digest(value: Any) -> str:
    """A hash of every bit of tensors, arrays and numbers in nested containers."""
    sha = hashlib.sha256()

    def feed(item: Any) -> None:
        if isinstance(item, Tensor):
            item = item.detach().cpu()
            sha.update(f"{item.dtype}{list(item.shape)}".encode())
            sha.update(item.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(item, np.ndarray):
            sha.update(f"{item.dtype}{item.shape}".encode() + np.ascontiguousarray(item).tobytes())
        elif isinstance(item, dict):
            for key in sorted(item, key=str):
                sha.update(str(key).encode())
                feed(item[key])
        elif isinstance(item, list | tuple):
            for element in item:
                feed(element)
        else:
            sha.update(repr(item).encode())

    feed(value)
    return sha.hexdigest()


def parity(text: str, answer: str) -> float:
    """A reward that a random model earns half of the time."""
    return float(sum(text.encode()) % 2)


class Monitor:
    """Keeps what the trainer reports."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []

    def phase(self, name: str) -> None:
        pass

    def detail(self, text: str) -> None:
        pass

    def step(self, record: dict[str, Any]) -> None:
        self.records.append({k: v for k, v in record.items() if k not in TIMES})


def train(path: Path, run: Path, overrides: list[str], *, resume: bool = False, data: Path | None = None) -> dict[str, Any]:
    """Trains in the current parallel state and says what happened, as hashes where every bit counts.

    Args:
        data: JSONL file; sums of two digits if None.

    Returns:
        records: of every step; rollouts: a hash of tokens, log-probs and routes per step; samples: of rewards, advantages and old
        log-probs per mini-step; weights, optimizer: hashes after every mini-step; predictor: the norm of W_p at the end.
    """
    from transformers import AutoTokenizer

    from megatron_pr2.rl import trainer as trainer_module
    from megatron_pr2.rl.actor import Actor
    from megatron_pr2.rl.config import load_config
    from megatron_pr2.rl.data import Example, load_examples
    from megatron_pr2.rollout.embedded import MegatronEngine

    tokenizer = AutoTokenizer.from_pretrained(path)
    config = load_config(None, [*SMALL, f"run={run}", *overrides])
    actor = Actor(config, path, tokenizer.pad_token_id)
    engine = MegatronEngine(actor.model, actor.pr2, pad_id=tokenizer.pad_token_id)
    out: dict[str, Any] = {name: [] for name in ("rollouts", "samples", "weights", "optimizer")}
    generate, update = engine.generate, actor.update

    def observed_generate(*args: Any, **kwargs: Any) -> Any:
        batch = generate(*args, **kwargs)
        out["rollouts"].append(
            digest([(r.response_ids, r.logprobs, r.routes and (r.routes.experts, r.routes.valid)) for r in batch.responses])
        )
        return batch

    def observed_update(samples: list[Sample], mini_step: int) -> dict[str, Any]:
        report = update(samples, mini_step)
        out["samples"].append(digest([(s.id, s.reward, s.advantage, s.old_logprobs) for s in samples]))
        out["weights"].append(digest([chunk.state_dict() for chunk in actor.chunks]))
        out["optimizer"].append(digest(actor.optimizer.state_dict()))
        return report

    engine.generate, actor.update = observed_generate, observed_update  # type: ignore[method-assign]
    monitor = Monitor()
    sums = [Example(f"{a}+{b}=", str(a + b), "generated") for a in range(3) for b in range(3)]
    examples = sums if data is None else load_examples(data)
    trainer = trainer_module.Trainer(config, actor, engine, engine, examples, tokenizer, monitor)
    with mock.patch.object(trainer_module, "exact_match", parity):
        if resume:
            trainer.resume()
        trainer.run()
    out["records"] = monitor.records
    out["predictor"] = 0.0 if actor.pr2.predictor is None else float(actor.pr2.predictor.weight_LEH.norm())
    return out


def train_job(path: Path, runs: list[tuple[Path, list[str], bool]], data: Path | None = None) -> list[dict[str, Any]]:
    """Several runs, one after the other, on two processes that share the experts; runs are (directory, overrides, resume)."""
    host.init(expert=2)
    return [train(path, run, overrides, resume=resume, data=data) for run, overrides, resume in runs]
