"""Jobs of the checkpoint tests: one rollout batch, two mini-steps of the predictor, and a checkpoint between them.

The policy is moved by noise that depends on the layer alone, so that every layout and every resumed run has the same one.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core import parallel_state as mpu
from torch import Tensor

from megatron_pr2 import host
from megatron_pr2.attach import PR2, attach
from megatron_pr2.checkpoint import checkpoint
from megatron_pr2.config import PR2Config
from megatron_pr2.errors import CheckpointError
from megatron_pr2.hf.bridge import load_model
from megatron_pr2.replay.sites import unwrapped
from tests.parallel import batch
from tests.parallel.replay import Case, LogProbs, Run, _noise

LR = 1e-2


@dataclass
class Outcome:
    """What a run had at its end.

    Attributes:
        weights: W_p per layer of this rank.
        report: of the second mini-step.
        logprobs: of the old-log-prob pass.
        held: tokens whose features this rank took from the checkpoint.
        moved: tokens whose features it then got from another rank.
        judged: per layer what hold-back counted in the rollout batch.
    """

    weights: dict[int, Tensor]
    report: dict[str, Any]
    logprobs: LogProbs
    held: int = 0
    moved: int = 0
    judged: dict[int, Tensor] = field(default_factory=dict)


def build(path: Path, case: Case, **settings: Any) -> Run:
    """The model in a layout, with PR2 on it."""
    host.init(**case.layout)
    bridge, chunks = load_model(
        path,
        dtype=torch.float32,
        ddp_config={"use_distributed_optimizer": False},
        extra_config={"calculate_per_token_loss": True, "moe_aux_loss_coeff": 0.0, **case.config},
    )
    # The routes are random ones: no engine's, and some tokens have none.
    tolerant = {"max_missing_share": 1.0, "min_agreement": 0.0}
    config = PR2Config.preset("pr2", **{"sample_fraction": 0.5, "route_delivery": case.delivery, **tolerant, **settings})
    run = Run(attach(chunks, config), bridge, chunks, case, None)
    run.pr2.optimizer = _optimizer(run.pr2)
    return run


def _optimizer(pr2: PR2) -> torch.optim.Adam:
    """An optimizer of the gates that has made steps, the same in every layout."""
    adam = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1)), *(site.router.weight for site in pr2.sites)], lr=0.05)
    for site in pr2.sites:
        squares = _noise(site, 1.0, seed=42).square() + 0.1
        adam.state[site.router.weight] = {
            "step": torch.tensor(3.0), "exp_avg": _noise(site, 1.0, seed=41), "exp_avg_sq": squares
        }  # fmt: skip
    return adam


def drift(pr2: PR2, seed: int) -> None:
    """A step of the policy."""
    with torch.no_grad():
        for site in pr2.sites:
            site.router.weight += _noise(site, 0.1, seed=seed)


def weights(pr2: PR2) -> dict[int, Tensor]:
    predictor = pr2.predictor
    return {} if predictor is None else {site.layer: predictor.weight_LEH[site.local].clone() for site in pr2.sites}


def judged(pr2: PR2) -> dict[int, Tensor]:
    held = pr2.measurement.hold_back
    return {} if held is None else {site.layer: held.state()[site.local].clone() for site in pr2.sites}


def mini_step(run: Run, logprobs: LogProbs) -> dict[str, Any]:
    """Forward and backward on the replayed routes, then the predictor's update."""
    run.training_pass(logprobs)
    return run.pr2.step(lr=LR)


def straight_job(path: Path, case: Case, directory: Path, **settings: Any) -> Outcome:
    """Two mini-steps; a checkpoint is written between them and makes no difference."""
    run = build(path, case, **settings)
    if settings.get("routes") == "actor":
        run.pr2.begin_rollout([batch.replay_sequence(s, None) for s in sequences(run)])
    else:
        run.begin_rollout()
    logprobs, _ = run.old_logprobs()
    drift(run.pr2, 12)
    mini_step(run, logprobs)
    checkpoint.save(run.pr2, directory, rollout=True)
    drift(run.pr2, 13)
    report = mini_step(run, logprobs)
    return Outcome(weights(run.pr2), report, logprobs, judged=judged(run.pr2))


def resumed_job(path: Path, case: Case, directory: Path, logprobs: LogProbs, **settings: Any) -> Outcome:
    """The second mini-step alone, from the checkpoint."""
    run = build(path, case, **settings)
    drift(run.pr2, 12)
    drift(run.pr2, 13)
    checkpoint.load(run.pr2, directory, sequences=sequences(run))
    held = run.pr2.feature_plan.sampled_tokens
    report = mini_step(run, logprobs)
    plan = run.pr2.feature_plan
    return Outcome(weights(run.pr2), report, logprobs, held, plan.moved_tokens, judged(run.pr2))


def sequences(run: Run) -> list[int]:
    """What this rank's replica trains on."""
    return list(batch.LENGTHS)[run.place.dp_rank :: run.place.dp]


def policy_shards(run: Run) -> dict[str, Any]:
    """The policy as a pipeline saves it."""
    group = mpu.get_data_parallel_group(with_context_parallel=True)
    return {"model": unwrapped(run.chunks[0]).sharded_state_dict(metadata={"dp_cp_group": group})}


def learn(pr2: PR2) -> None:
    """Two updates of the predictor, the same in every layout."""
    assert pr2.predictor is not None
    for seed in (31, 32):
        for site in pr2.sites:
            pr2.predictor.grad_sum_LEH[site.local] = _noise(site, 1.0, seed)
            pr2.predictor.token_count_L[site.local] = 5.0
        pr2.predictor.step(LR, None)


@contextmanager
def logged() -> Iterator[list[str]]:
    """What megatron_pr2.checkpoint.checkpoint logs meanwhile."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    target = logging.getLogger("megatron_pr2.checkpoint.checkpoint")
    level = target.level
    target.addHandler(handler)
    target.setLevel(logging.INFO)
    try:
        yield lines
    finally:
        target.removeHandler(handler)
        target.setLevel(level)


def policy_job(path: Path, case: Case, directories: list[Path]) -> None:
    """The policy's checkpoint by Megatron-Core's own writer: without PR2, and with PR2 whose predictor has learned."""
    run = build(path, case)
    run.pr2.detach()
    for number, directory in enumerate(directories):
        if number:
            learn(attach(run.chunks, PR2Config.preset("pr2")))
        dist_checkpointing.save(policy_shards(run), str(directory))


def merged_save_job(path: Path, case: Case, directory: Path) -> dict[int, Tensor]:
    """A pipeline's own save, with PR2 in it."""
    run = build(path, case)
    learn(run.pr2)
    dist_checkpointing.save({**policy_shards(run), "pr2": checkpoint.sharded_state_dict(run.pr2)}, str(directory))
    return weights(run.pr2)


def merged_load_job(path: Path, case: Case, directory: Path) -> tuple[dict[int, Tensor], list[str]]:
    """A pipeline's own load, of a checkpoint with or without PR2 in it, into a predictor that has learned something else."""
    run = build(path, case)
    learn(run.pr2)
    learn(run.pr2)
    with logged() as lines:
        template = {**policy_shards(run), "pr2": checkpoint.sharded_state_dict(run.pr2, load_from=directory)}
        loaded = dist_checkpointing.load(template, str(directory))
        checkpoint.load_sharded_state_dict(run.pr2, loaded.get("pr2"))
    return weights(run.pr2), lines


def load_job(path: Path, case: Case, directory: Path, sequences: list[int] | None = None, **settings: Any) -> tuple[str, list[str]]:
    """(what this rank raised, what it logged)"""
    run = build(path, case, **settings)
    raised = ""
    with logged() as lines:
        try:
            checkpoint.load(run.pr2, directory, sequences=sequences)
        except CheckpointError as error:
            raised = str(error)
    return raised, lines


def not_finite_job(path: Path, case: Case, directory: Path) -> tuple[str, str, bool]:
    """(what saving a W_p of which one layer is not finite raised, what loading one raised, whether W_p then was as before)"""
    run, raised = build(path, case), []
    assert run.pr2.predictor is not None
    run.pr2.predictor.weight_LEH[[site.local for site in run.pr2.sites if site.layer == 2]] = math.nan
    with pytest.MonkeyPatch.context() as patch:
        for step in (checkpoint.save, checkpoint.save, checkpoint.load):
            try:
                step(run.pr2, directory)
            except CheckpointError as error:
                raised.append(str(error))
            if step is checkpoint.save:
                patch.setattr(checkpoint, "_check_predictor", lambda *_: None)
            if (directory / ".metadata").is_file():
                run.pr2.predictor.weight_LEH.fill_(0.5)
    refused_save, refused_load = raised
    return refused_save, refused_load, bool((run.pr2.predictor.weight_LEH == 0.5).all())


def save_job(path: Path, case: Case, directory: Path) -> str:
    """What this rank raised."""
    run = build(path, case)
    try:
        checkpoint.save(run.pr2, directory)
    except CheckpointError as error:
        return str(error)
    return ""
