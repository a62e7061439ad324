"""Whole rollout batches of the toy model whose gates drift in a prescribed way, so that the right prediction is known.

    steady   every update goes the same way: the next drift is the last one again
    noise    every update goes its own way: nothing can be known, and a prediction only adds errors
    flip     every rollout batch takes back what the one before did: what was learned is wrong
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_pr2.attach import PR2, attach
from megatron_pr2.prediction.hold_back import HoldBack
from tests.helpers import toy

KINDS = ("steady", "noise", "flip")
KAPPA = 4
SEQUENCES, LENGTH = 16, 40


@dataclass
class Drift:
    """What happened.

    Attributes:
        pr2: after the last rollout batch.
        reports: per rollout batch, of every mini-step.
        updates: [L, E, H] that the optimizer made last.
        pushed: after every rollout batch, the beta that the next one is rolled out with.
    """

    pr2: PR2
    reports: list[list[dict[str, Any]]] = field(default_factory=list)
    updates: Tensor = field(default_factory=lambda: torch.zeros(0))
    pushed: list[list[float]] = field(default_factory=list)

    def lift(self, since: int = 0) -> float:
        """Mean lift over rollout batches from `since` on, all mini-steps and layers."""
        values = [value for batch in self.reports[since:] for report in batch for value in report["drift"]["lift"]]
        return sum(values) / len(values)

    @property
    def beta(self) -> list[float]:
        """Of the last report's layers, as the next push has it."""
        return hold_back_of(self.pr2).beta


def hold_back_of(pr2: PR2) -> HoldBack:
    """The handle's, which is there."""
    assert isinstance(pr2.measurement.hold_back, HoldBack)
    return pr2.measurement.hold_back


def simulate(
    kind: str,
    *,
    rollouts: int,
    lr: float = 0.01,
    router: str = "softmax",
    known_mini_step: bool = False,
    closes: bool = True,
    groups: bool = False,
    share: slice = slice(None),
    **settings: Any,
) -> Drift:
    """Rolls out under merged gates, replays over KAPPA mini-steps and moves the gates by Adam in between.

    Args:
        lr: of the gates; the predictor's is alpha times that.
        router: one of toy.ROUTERS.
        known_mini_step: tells PR2 in advance which mini-step trains on which sequence.
        closes: whether the trainer calls end_rollout().
        groups: rolls out each mini-step's sequences under gates for its own horizon.
        share: the sequences of each mini-step that this rank has.
        settings: of PR2Config.
    """
    assert kind in KINDS
    torch.manual_seed(0)
    chunk = toy.ToyChunk(toy.toy_config(**toy.ROUTERS[router]))
    if settings.get("predictor") == "lookahead":  # which asks where every trained weight is going
        chunk.requires_grad_(False)
        for trained in toy.routers(chunk):
            trained.weight.requires_grad_(True)
    defaults = {"alpha": 1.0, "sample_fraction": 1.0, "held_out_share": 0.5, "hold_back": True}
    pr2 = attach(chunk, toy.preset("pr2", **{**defaults, **settings}))
    weights = [site.router.weight for site in pr2.sites]
    # Without a first moment an update says nothing but what its own gradient says.
    adam = torch.optim.Adam(weights, lr=lr, betas=(0.0, 0.99))
    pr2.optimizer = adam
    direction = [torch.randn_like(weight) for weight in weights]
    out = Drift(pr2)
    for rollout in range(rollouts):
        ids = np.arange(rollout * SEQUENCES, (rollout + 1) * SEQUENCES).reshape(KAPPA, -1)[:, share]
        lengths = dict.fromkeys(ids.flatten().tolist(), LENGTH)
        data = toy.batches(lengths, ids.shape[1])
        tables = None
        if pr2.config.routes == "engine":
            tables = {}
            for i, part in enumerate([[batch] for batch in data] if groups else [data]):
                gates = pr2.merged_gates(horizon=float(i)) if groups else pr2.merged_gates()
                with torch.no_grad(), gates, pr2.record([b.micro_batch for b in part]) as session:
                    toy.run(session, chunk, part, backward=False)
                tables |= pr2.recorded_tables(session, dict.fromkeys((ids[i] if groups else ids).flatten().tolist(), LENGTH))
        told = toy.sequences(lengths, tables)
        if groups:
            told = [replace(sequence, horizon=float(i // ids.shape[1])) for i, sequence in enumerate(told)]
        if known_mini_step:
            told = [replace(sequence, mini_step=i // ids.shape[1] + 1) for i, sequence in enumerate(told)]
        pr2.begin_rollout(told)
        toy.old_logprobs(pr2, chunk, data)
        reports = []
        for mini_step, batch in enumerate(data, start=1):
            toy.update(pr2, chunk, [batch], mini_step)
            before = [weight.detach().clone() for weight in weights]
            for weight, way in zip(weights, direction, strict=True):
                sign = -1.0 if kind == "flip" and rollout % 2 else 1.0
                weight.grad = torch.randn_like(way) if kind == "noise" else sign * way
            adam.step()
            out.updates = torch.stack([weight.detach() - old for weight, old in zip(weights, before, strict=True)])
            reports.append(pr2.step(lr=lr))
        if pr2.config.looks_ahead:
            pr2.look_ahead([b.micro_batch for b in data], partial(toy.run, chunk=chunk, data=data, backward=False))
        if closes:
            pr2.end_rollout()
        held = pr2.measurement.hold_back
        out.pushed.append(held.beta if isinstance(held, HoldBack) else [])
        out.reports.append(reports)
    return out
