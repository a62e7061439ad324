"""The trainer's handshake: its probe fits into every context, and all ranks end it alike, whichever of them refuses."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist
from torch import nn

from megatron_pr2.errors import ConfigError, PR2Error
from megatron_pr2.rl.data import Example
from megatron_pr2.rl.trainer import Trainer
from megatron_pr2.rollout.base import Probe
from megatron_pr2.rollout.collective import CollectiveEngine
from megatron_pr2.routes.table import RouteTable
from tests.helpers.distributed import pool
from tests.helpers.ids import random_ids


class Scoring:
    """Answers probes; `valid` rows of its tables are valid."""

    name = "scoring"

    def __init__(self, seed: int = 0, valid: int = 1000, error: Exception | None = None) -> None:
        self.seed, self.valid, self.error = seed, valid, error
        self.asked: list[int] = []

    def score(self, token_ids: Any, horizon: float | None = None) -> list[Probe]:
        self.asked.append(len(token_ids))
        if self.error is not None:
            raise self.error
        ids = random_ids(len(token_ids), 3, 4, 16, self.seed)
        ids[min(self.valid, len(ids) - 1) :] = -1
        return [Probe(self.name, np.zeros(len(token_ids) - 1, dtype=np.float32), RouteTable.from_ids(ids, 16))]


def handshake(engine: Any, reference: Scoring, *, context: int = 1000, sglang: dict[str, Any] | None = None) -> dict[str, Any]:
    """The record of a trainer's handshake."""
    model = nn.Module()
    model.max_sequence_length = context  # type: ignore[assignment]
    trainer: Any = SimpleNamespace(
        _examples=[Example("1+1=", "2", "train.jsonl:1")],
        _tokenizer=SimpleNamespace(encode=lambda text, add_special_tokens: list(text.encode())),
        _config=SimpleNamespace(rollout=SimpleNamespace(sglang=sglang or {}), model=SimpleNamespace(dtype="float32")),
        _actor=SimpleNamespace(model=model, pr2=SimpleNamespace(moe_layers=(0, 2, 4))),
        _engine=engine,
        _reference=reference,
        _record={},
    )
    Trainer._handshake(trainer)
    return dict(trainer._record["handshake"])


def job(kind: str) -> tuple[str, str, int]:
    """(what this rank raised, its message, a collective after it)"""
    rank = dist.get_rank()
    own = Scoring(error=ConfigError("no route return") if kind == "engine" else None)
    engine: Any = CollectiveEngine(own if rank == 0 else None, data_parallel_rank=rank, data_parallel_size=2, name="scoring")  # type: ignore[arg-type]
    reference = Scoring(seed=int(kind == "routes" and rank == 1), valid=3 if kind == "rows" and rank == 1 else 1000)
    raised = message = ""
    try:
        assert handshake(engine, reference)["route_agreement"] == 1.0
    except PR2Error as error:
        raised, message = type(error).__name__, str(error)
    own.error = None
    return raised, message, len(engine.score([1, 2, 3]))


@pytest.mark.parametrize(
    ("kind", "raised", "message"),
    [
        ("fine", "", ""),
        ("routes", "RolloutError", "handshake with scoring failed"),
        ("rows", "ConfigError", "too few to tell one layer's routes"),  # another engine would not help
        ("engine", "ConfigError", "no route return"),
    ],
)
def test_all_ranks_end_a_handshake_alike(kind: str, raised: str, message: str) -> None:
    for found, said, after in pool(2).run(job, kind, timeout=60.0):
        assert (found, after) == (raised, 1)
        assert message in said


def lengths_job() -> list[list[int]]:
    settings: list[dict[str, Any]] = [
        {}, {"context": 50}, {"sglang": {"max_total_tokens": 60}}, {"sglang": {"extra_flags": ["--context-length", "40"]}}
    ]  # fmt: skip
    engines = [Scoring() for _ in settings]
    for engine, changes in zip(engines, settings, strict=True):
        handshake(engine, engine, **changes)
    return [engine.asked for engine in engines]


def test_the_probe_fits_into_every_context() -> None:
    """One token is sampled after it, and SGLang keeps six."""
    assert pool(1).run(lengths_job) == [[[256] * 2, [43] * 2, [53] * 2, [33] * 2]]
