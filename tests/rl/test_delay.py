"""rollout.delay: what is trained on was sampled under the weights before the last training step, also after an interruption."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch.distributed as dist
from megatron.core import parallel_state as mpu

from megatron_pr2 import host
from megatron_pr2.checkpoint import files
from megatron_pr2.errors import CheckpointError, RolloutError
from megatron_pr2.rl.batch import Sample
from megatron_pr2.rl.pending import pending_shards, read_pending
from megatron_pr2.rollout.base import RolloutResponse
from megatron_pr2.rollout.collective import share
from megatron_pr2.routes.table import RouteTable
from tests.helpers.distributed import pool
from tests.helpers.loop import digest, train

pytestmark = pytest.mark.slow

DELAYED = ["rollout.delay=1", "optimizer.lr=0.001"]
# Both of what a checkpoint has to bring back: pushes that hold-back judges, and pushes for several horizons.
METHODS = {
    "held back": ["pr2.held_out_share=0.5"],
    "groups": ["pr2.predictor=lookahead", "pr2.hold_back=false", "rollout.groups=0"],
}


def delay_job(
    path: Path, runs: list[tuple[Path, list[str], bool]], fails_at: int = 0
) -> list[tuple[dict[str, Any], list[list[Any]]]]:
    """Per run what happened, and per mini-step of a rank (id, versions of the weights, horizon) of its samples.

    Args:
        fails_at: the rollout that an engine's failure interrupts, from 1.
    """
    from megatron_pr2.rl.actor import Actor
    from megatron_pr2.rollout.embedded import MegatronEngine

    host.init(expert=2)
    seen: list[list[Any]] = []
    actors: list[Actor] = []
    calls = 0
    update, generate = Actor.update, MegatronEngine.generate

    def observed(actor: Actor, samples: list[Sample], mini_step: int) -> dict[str, Any]:
        rows = [(s.id, sorted(set(s.response.weight_versions.tolist())), s.replay_sequence().horizon) for s in samples]
        seen.append(rows)
        actors.append(actor)
        return update(actor, samples, mini_step)

    def failing(engine: MegatronEngine, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == fails_at:
            raise RolloutError("the engine died")
        return generate(engine, *args, **kwargs)

    out = []
    with mock.patch.object(Actor, "update", observed), mock.patch.object(MegatronEngine, "generate", failing):
        for run, overrides, resume in runs:
            seen.clear()
            result = train(path, run, [*DELAYED, *overrides], resume=resume)
            hold_back = actors[-1].pr2.measurement.hold_back
            result["gains"] = None if hold_back is None else digest(hold_back.state())
            out.append((result, list(seen)))
    return out


def test_each_batch_is_sampled_a_step_before_it_is_trained_on(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Versions count training steps: batches 0 and 1 are of the initial weights, batch t of those after t - 1 steps."""
    jobs = [(tmp_path / "delayed", ["steps=4", "preset=r3"], False)]
    for rank, ((result, seen),) in enumerate(pool(2).run(delay_job, tiny_checkpoint, jobs)):
        for step, version in enumerate([0, 0, 1, 2]):
            of_step = [row for rows in seen[4 * step : 4 * step + 4] for row in rows]
            first = 16 * step + 8 * rank
            assert sorted(number for number, _, _ in of_step) == list(range(first, first + 8))
            assert {tuple(versions) for _, versions, _ in of_step} == {(version,)}
        records = result["records"]
        assert [record["rollout"]["older_tokens"] for record in records] == [0.0, 1.0, 1.0, 1.0]
        # The log-probs really are of older weights.
        assert records[0]["logprob_gap"]["mean"] < 1e-5
        assert all(record["logprob_gap"]["mean"] > 1e-4 for record in records[1:])
        assert records[0]["mini_steps"][0]["agreement"] == 1.0 > records[2]["mini_steps"][0]["agreement"]
        assert len(result["rollouts"]) == 5, "one ahead, also of the last step: the run may be continued"


def test_predictions_reach_over_the_delay(tiny_checkpoint: Path, tmp_path: Path) -> None:
    ahead = ["steps=3", "pr2.predictor=lookahead", "pr2.hold_back=false"]
    jobs = [
        (tmp_path / "groups", [*ahead, "rollout.groups=0"], False),
        (tmp_path / "one", [*ahead, "rollout.groups=1"], False),
        (tmp_path / "actor", [*ahead, "pr2.routes=actor"], False),
    ]
    for (groups, rows), (one, _), (actor, _) in pool(2).run(delay_job, tiny_checkpoint, jobs):
        assert [{horizon for _, _, horizon in each} for each in rows[-4:]] == [{4.0}, {5.0}, {6.0}, {7.0}]
        # The first batch after a look-ahead is trained on in step 2.
        assert groups["records"][2]["mini_steps"][0]["kl_predicted"] != groups["records"][2]["mini_steps"][0]["kl_frozen"]
        assert one["predictor"] > 0
        # What the actor records is of the present weights: nothing has moved in the first mini-step.
        assert all(record["mini_steps"][0]["lift"] == 0.0 for record in actor["records"])


@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_has_the_same_numbers(method: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    run, given = tmp_path / "run", [*METHODS[method], "rollout.oversample=1.5"]
    jobs = [
        (tmp_path / "straight", [*given, "steps=5"], False),
        (run, [*given, "steps=3"], False),
        (run, [*given, "steps=5"], True),
    ]
    for (straight, rows), (first, _), (second, rows_after) in pool(2).run(delay_job, tiny_checkpoint, jobs):
        assert digest([*first["records"], *second["records"]]) == digest(straight["records"])
        assert rows_after == rows[12:]
        assert second["rollouts"] == straight["rollouts"][4:], "what was sampled before is not sampled again"
        for name in ("samples", "weights", "optimizer"):
            assert second[name] == straight[name][12:]
        assert straight["predictor"] == second["predictor"] > 0
        # What is judged by the pushes that the checkpoint brought back:
        resumed = second["records"][0]
        if method == "held back":
            assert second["gains"] == straight["gains"] != first["gains"]
        else:
            assert resumed["mini_steps"][-1]["kl_predicted"] != resumed["mini_steps"][-1]["kl_frozen"]


def test_an_engine_that_fails_is_asked_again_for_the_same(tiny_checkpoint: Path, tmp_path: Path) -> None:
    straight = pool(2).run(delay_job, tiny_checkpoint, [(tmp_path / "straight", ["steps=3"], False)])
    failed = pool(2).run(delay_job, tiny_checkpoint, [(tmp_path / "failed", ["steps=3"], False)], 3)
    for ((one, _),), ((other, _),) in zip(straight, failed, strict=True):
        assert digest(one) == digest(other)


# ---- samples in a checkpoint ---------------------------------------------------------------------------------------------

PROMPTS, RESPONSES = 4, 3


def samples(experts: int | None) -> list[Sample]:
    """All of a batch, by number."""
    out = []
    for number in range(PROMPTS * RESPONSES):
        rng = np.random.default_rng(number)
        prompt, length = int(rng.integers(1, 4)), int(rng.integers(1, 6))
        table = None
        if experts is not None:
            table = RouteTable.missing(prompt + length, 2, 2, experts)
            first = rng.integers(0, experts, (prompt + length, 2))
            table.experts[:] = np.stack([first, (first + 1) % experts], axis=-1)
            table.valid[:-1] = rng.random(prompt + length - 1) < 0.9
        mask = rng.random(length) < 0.8
        response = RolloutResponse(
            prompt_ids=tuple(rng.integers(0, 9, prompt).tolist()),
            response_ids=tuple(rng.integers(0, 9, length).tolist()),
            logprobs=np.where(mask, -rng.random(length), 0.0).astype(np.float32),
            routes=table,
            finish_reason="stop" if number % 2 else "length",
            weight_versions=np.where(mask, number % 3, -1),
            loss_mask=mask,
            turns=1 + number % 2,
            horizon=None if number % 4 else 1.5,
        )
        out.append(Sample(100 + number, response, number / 3, -number / 7))
    return out


def fields(sample: Sample) -> list[Any]:
    response, routes = sample.response, sample.response.routes
    arrays = [response.logprobs, response.weight_versions, response.loss_mask]
    arrays += [] if routes is None else [routes.experts, routes.valid]
    plain = [response.prompt_ids, response.response_ids, response.finish_reason, response.turns, response.horizon]
    return [sample.id, sample.reward, sample.advantage, *plain, *((each.dtype, each.tolist()) for each in arrays)]


def round_trip(directory: Path, experts: int | None, write: bool) -> None:
    host.init()
    group = mpu.get_data_parallel_group()
    everything = samples(experts)
    mine = everything[share(len(everything), dist.get_world_size(), dist.get_rank())]
    if write:
        files.together(lambda: directory.mkdir() if dist.get_rank() == 0 else None)
        files.write({"samples": pending_shards(mine[::-1], group)}, directory)
    found = read_pending(directory, group, experts or 16)
    assert [fields(sample) for sample in found] == [fields(sample) for sample in mine]


@pytest.mark.parametrize("experts", [None, 16, 300])
def test_samples_come_back_on_any_number_of_ranks(experts: int | None, tmp_path: Path) -> None:
    pool(2).run(round_trip, tmp_path / "saved", experts, True)
    for processes in (1, 2):
        pool(processes).run(round_trip, tmp_path / "saved", experts, False)


def absent_job(directory: Path) -> str:
    host.init()
    files.write({"other": 1}, directory)
    with pytest.raises(CheckpointError) as error:
        read_pending(directory, mpu.get_data_parallel_group(), 16)
    return str(error.value)


def test_a_checkpoint_without_samples_says_so(tmp_path: Path) -> None:
    (message,) = pool(1).run(absent_job, tmp_path)
    assert "holds no samples that wait for training" in message
