"""Calls that are forgotten, repeated or out of order: one clear warning or error each; mini-steps that count by themselves."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from megatron_pr2 import host
from megatron_pr2.attach import PR2, MicroBatch, attach
from megatron_pr2.errors import AttachError, ReplayError
from tests.helpers import toy
from tests.helpers.distributed import pool

LENGTHS = {0: 40, 1: 60, 2: 30, 3: 50}
DATA = toy.batches(LENGTHS, 2)

pytestmark = pytest.mark.usefixtures("host_platform")


class Loop:
    """A handle in the middle of a rollout batch whose old-log-prob pass has run."""

    def __init__(self, preset: str = "pr2", *, lr: float | None = 0.01, scored: int = 2, **settings: Any) -> None:
        self.config = toy.toy_config()
        self.chunk = toy.ToyChunk(self.config)
        self.optimizer = None if lr is None else torch.optim.SGD(self.chunk.parameters(), lr=lr)
        settings = {"sample_fraction": 1.0, "max_missing_share": 1.0, **settings}
        self.pr2 = attach(self.chunk, toy.preset(preset, **settings), self.optimizer)
        self.begin(scored)

    def begin(self, scored: int = 2) -> None:
        tables = toy.random_tables(LENGTHS, self.config) if self.pr2.config.routes == "engine" else None
        self.pr2.begin_rollout(toy.sequences(LENGTHS, tables))
        if scored:
            toy.old_logprobs(self.pr2, self.chunk, DATA[:scored])

    def update(self, mini_step: int | None = None, data: list[toy.Batch] = DATA) -> None:
        toy.drift(self.chunk)
        with self.pr2.actor_update([b.micro_batch for b in data], mini_step) as session:
            toy.run(session, self.chunk, data)

    @property
    def weight(self) -> torch.Tensor:
        assert self.pr2.predictor is not None
        return self.pr2.predictor.weight_LEH.clone()


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


# ---- the learning rate -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "lr", [math.nan, math.inf, -1e-6, "1e-6", True, [1e-6, 2e-6], torch.tensor([1.0, 2.0]), torch.tensor(math.nan)], ids=repr
)
def test_a_rate_that_is_none_is_refused(lr: Any) -> None:
    """It would go into W_p, and from there into the engine."""
    loop = Loop()
    loop.update(2)
    with pytest.raises(ReplayError, match=r"step\(lr=.*expected the policy's current learning rate, a finite number of at least 0"):
        loop.pr2.step(lr)
    assert not loop.weight.any()
    loop.pr2.step(np.float32(0.01))  # the mini-step is still open
    assert loop.weight.any()


@pytest.mark.parametrize("preset", ["pr2", "r3", "grpo"])
def test_no_rate_and_no_optimizer_is_refused_and_says_what_to_pass(preset: str) -> None:
    loop = Loop(preset, lr=None)
    loop.update()
    with pytest.raises(ReplayError, match=r"pr2\.step\(lr=optimizer\.param_groups.*attach\(model, config, optimizer\), or pr2\."):
        loop.pr2.step()
    loop.pr2.step(0.0)


def test_step_reads_what_the_mini_step_began_with() -> None:
    """A schedule moves on together with the optimizer, before step()."""
    told, read = Loop(lr=None), Loop(lr=0.1)
    for mini_step, lr in enumerate((0.1, 0.03, 0.007), start=1):
        told.update(mini_step)
        told.pr2.step(lr)
        assert read.optimizer is not None
        read.optimizer.param_groups[0]["lr"] = lr
        read.update()
        read.optimizer.param_groups[0]["lr"] = 100.0
        read.pr2.step()
    assert told.weight.any()
    assert torch.equal(told.weight, read.weight)


def test_the_rate_is_that_of_the_gates_group_and_an_override_is_taken() -> None:
    def trained(rates: tuple[float, float], lr: float | None) -> torch.Tensor:
        loop = Loop(lr=None)
        gates = [router.weight for router in toy.routers(loop.chunk)]
        others = [p for p in loop.chunk.parameters() if all(p is not gate for gate in gates)]
        loop.pr2.optimizer = torch.optim.SGD([{"params": others, "lr": rates[0]}, {"params": gates, "lr": rates[1]}])
        for _ in range(2):
            loop.update()
            loop.pr2.step(lr)
        return loop.weight

    expected = trained((0.02, 0.02), None)
    assert expected.any()
    assert torch.equal(trained((5.0, 0.02), None), expected)
    assert torch.equal(trained((5.0, 7.0), 0.02), expected)


def test_frozen_gates_have_the_first_groups_rate() -> None:
    loop = Loop(lr=None)
    for router in toy.routers(loop.chunk):
        router.weight.requires_grad_(False)
    loop.pr2.optimizer = torch.optim.SGD([p for p in loop.chunk.parameters() if p.requires_grad], lr=0.3)
    assert loop.pr2.horizon.rate(None) == 0.3


def test_an_optimizer_of_another_model_is_refused_where_it_is_needed() -> None:
    other = torch.optim.SGD([nn.Parameter(torch.zeros(3))], lr=0.1)
    with pytest.raises(AttachError, match=r"none of the optimizers \(SGD\) given to attach"):
        attach(chunk := toy.ToyChunk(toy.toy_config()), toy.preset("pr2"), other)
    attach(chunk, toy.preset("r3"), other).detach()  # the failed attach() left nothing behind


def sharded_rates_job(path: Path) -> tuple[list[float], bool]:
    """The rate as every rank reads it, and whether this one holds a piece of every gate: shards are of all parameters in a row."""
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    from megatron_pr2.config import PR2Config
    from megatron_pr2.hf.bridge import load_model

    host.init()
    _, chunks = load_model(path, ddp_config={"use_distributed_optimizer": True})
    pr2 = attach(chunks, PR2Config.preset("pr2"))
    settings = OptimizerConfig(lr=1e-2, min_lr=1e-2, weight_decay=0.1, use_distributed_optimizer=True)
    pr2.optimizer = get_megatron_optimizer(settings, chunks)
    found = [pr2.horizon.rate(None)]
    for number, group in enumerate(pr2.optimizer.param_groups):
        group["lr"] = 0.1 * (number + 1)
    pr2.horizon.open()
    found.append(pr2.horizon.rate(None))
    held = [
        any(site.router.weight in part.model_param_group_index_map for part in pr2.optimizer.chained_optimizers)
        for site in pr2.sites
    ]
    return found, all(held)


def test_ranks_of_a_sharded_optimizer_read_the_same_rate(tiny_checkpoint: Path) -> None:
    first, second = pool(2).run(sharded_rates_job, tiny_checkpoint)
    assert first[0] == second[0]
    assert first[0][0] == 1e-2
    assert 0.1 <= first[0][1] <= 0.4
    assert not (first[1] and second[1]), "each rank holds every gate: nothing was shown"


# ---- mini-steps ------------------------------------------------------------------------------------------------------


def test_mini_steps_count_themselves() -> None:
    told, counted = Loop(), Loop()
    reports = []
    for rollout in range(2):
        if rollout:
            told.begin(), counted.begin()
        for mini_step in (1, 2, 3):
            told.update(mini_step)
            counted.update()
            reports.append([loop.pr2.step()["predictor"] for loop in (told, counted)])
            assert counted.pr2.progress.mini_step == mini_step
        told.pr2.end_rollout(), counted.pr2.end_rollout()
    assert all(one == other for one, other in reports)
    assert [one["tokens"] > 0 for one, _ in reports] == [False, True, True] * 2


@pytest.mark.parametrize("mini_step", [0, -1, "1", 1.0, True])
def test_what_is_no_mini_step_is_refused(mini_step: Any) -> None:
    loop = Loop()
    with pytest.raises(ReplayError, match="mini-steps count from 1; leave it out"):
        loop.update(mini_step)
    loop.update(np.int64(1))


CALLS = {
    "the next mini-step": lambda loop: loop.update(),
    "old_logprobs": lambda loop: toy.old_logprobs(loop.pr2, loop.chunk, DATA),
    "begin_rollout": lambda loop: loop.begin(0),
    "end_rollout": lambda loop: loop.pr2.end_rollout(),
    "push": lambda loop: loop.pr2.engine_weights([]),
    "merged_gates": lambda loop: loop.pr2.merged_gates().__enter__(),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_forgotten_step_is_made_up_for(call: str, caplog: pytest.LogCaptureFixture) -> None:
    forgot, right = Loop(), Loop()
    for loop in (forgot, right):
        loop.update(2)
    right.pr2.step()
    CALLS[call](forgot)
    assert right.weight.any()
    assert torch.equal(forgot.weight, right.weight)
    (said,) = [line for line in warnings_of(caplog) if "before step() ended mini-step 2" in line]
    assert "it is ended now. Call pr2.step() after each optimizer.step()" in said
    forgot.pr2.step()
    if call != "the next mini-step":  # then it was not the one to end
        assert torch.equal(forgot.weight, right.weight)


def test_without_optimizer_a_forgotten_step_is_lost_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    loop = Loop(lr=None)
    loop.update()
    loop.pr2.step(0.1)
    loop.pr2.engine_weights([])
    sequences, pushes = loop.pr2.sequences, loop.pr2.measurement.pushes
    assert not any(pushes.older(sequences, None))
    loop.update()
    assert loop.pr2.metrics()["pr2/predictor/tokens"] == 0.0
    for _ in range(2):
        loop.update()
    assert all(pushes.older(sequences, None)), "the policy was updated all the same"
    assert loop.pr2.metrics().keys() == {"pr2/missing_share"}, "those of an earlier mini-step"
    assert len(warnings_of(caplog)) == 1
    assert "before step() ended mini-step 2: what it measured is lost" in caplog.text
    assert loop.pr2.progress.mini_step == 4
    assert loop.pr2.step(0.1)["predictor"]["tokens"] == 2 * sum(n - 3 for n in LENGTHS.values()), "the last one's only"


def test_a_further_pass_of_an_open_mini_step_is_part_of_it(caplog: pytest.LogCaptureFixture) -> None:
    whole, parts = Loop(), Loop()
    whole.update(2)
    toy.drift(parts.chunk)
    for batch in DATA:
        with parts.pr2.actor_update([batch.micro_batch], 2) as session:
            toy.run(session, parts.chunk, [batch])
    reports = [loop.pr2.step() for loop in (whole, parts)]
    assert reports[0]["predictor"]["tokens"] == reports[1]["predictor"]["tokens"] > 0
    torch.testing.assert_close(parts.weight, whole.weight)
    assert not warnings_of(caplog)


@pytest.mark.parametrize("numbers", [(1, 1), (3, 1), (2, 2)])
def test_a_mini_step_that_stays_or_goes_down_is_said_once(numbers: tuple[int, int], caplog: pytest.LogCaptureFixture) -> None:
    loop = Loop()
    for number in (*numbers, numbers[1]):
        loop.update(number)
        loop.pr2.step()
    (said,) = warnings_of(caplog)
    assert f"mini_step={numbers[1]} after mini-step {numbers[0]} of the same rollout batch: it counts the updates" in said


@pytest.mark.parametrize("horizon", [0.0, 2.0])
def test_one_update_per_batch_is_not_extrapolated_and_is_said_once(horizon: float, caplog: pytest.LogCaptureFixture) -> None:
    loop = Loop(lr=None, predictor="momentum", horizon=horizon)
    loop.pr2.optimizer = torch.optim.Adam(loop.chunk.parameters(), lr=0.01)
    for _ in range(2):
        loop.update()
        loop.pr2.step()
        loop.begin()
    said = warnings_of(caplog)
    assert len(said) == (not horizon)
    assert all("momentum is extrapolated over 0 updates, which is no prediction; set pr2.horizon" in line for line in said)


@pytest.mark.parametrize("end", ["end_rollout", "begin_rollout"])
def test_one_update_per_batch_never_learns_and_is_said_once(end: str, caplog: pytest.LogCaptureFixture) -> None:
    loop = Loop()
    for _ in range(2):
        loop.update()
        loop.pr2.step()
        if end == "end_rollout":
            loop.pr2.end_rollout()
        loop.begin()
    (said,) = warnings_of(caplog)
    assert "one update per rollout batch (mini_step stays 1): the predictor learns from the second on, so it never" in said


def test_step_twice_is_said(caplog: pytest.LogCaptureFixture) -> None:
    loop = Loop()
    loop.update(2)
    loop.pr2.step()
    before = loop.weight
    assert not warnings_of(caplog)
    loop.pr2.step()
    assert torch.equal(loop.weight, before)
    assert "step() without a mini-step that it could end" in caplog.text


# ---- passes over the batch -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scored", [0, 1])
def test_what_the_actor_did_not_record_is_refused(scored: int) -> None:
    loop = Loop("r2", scored=scored)
    total, absent = sum(LENGTHS.values()), sum(LENGTHS.values()) - scored * (LENGTHS[0] + LENGTHS[1])
    with pytest.raises(ReplayError, match=rf"{absent} of the {total} tokens of this mini-step were in no old_logprobs\(\) pass"):
        loop.update()
    toy.old_logprobs(loop.pr2, loop.chunk, DATA)
    loop.update()


def test_routes_are_not_predicted_without_a_rollout_batch() -> None:
    chunk = toy.ToyChunk(toy.toy_config())
    pr2 = attach(chunk, toy.preset("pr2", routes="actor"))
    with pytest.raises(ReplayError, match=r"old_logprobs\(\) before begin_rollout\(\)"):
        toy.old_logprobs(pr2, chunk, DATA)


@pytest.mark.parametrize("scored", [0, 1, 2])
@pytest.mark.parametrize(
    ("preset", "settings", "wants"),
    [("pr2", {}, True), ("pr2", {"predictor": "momentum", "hold_back": True}, True), ("pr2", {"predictor": "momentum"}, False),
     ("r3", {}, False), ("grpo", {}, False)],
)  # fmt: skip
def test_missing_features_are_said_where_they_are_wanted(
    preset: str, settings: dict[str, Any], wants: bool, scored: int, caplog: pytest.LogCaptureFixture
) -> None:
    loop = Loop(preset, scored=scored, lr=None, **settings)
    loop.pr2.optimizer = torch.optim.Adam(loop.chunk.parameters(), lr=0.01)
    for _ in range(2):
        loop.update()
        loop.pr2.step()
    said = [line for line in warnings_of(caplog) if "were in no old_logprobs() pass, which keeps what prediction learns" in line]
    assert len(said) == (wants and scored < 2)


def test_old_logprobs_after_an_update_is_said(caplog: pytest.LogCaptureFixture) -> None:
    loop = Loop()
    loop.update()
    loop.pr2.step()
    toy.old_logprobs(loop.pr2, loop.chunk, DATA)
    assert "old_logprobs() after mini-step 1 of the same rollout batch" in caplog.text


def test_begin_rollout_twice_is_said(caplog: pytest.LogCaptureFixture) -> None:
    loop = Loop("r3")
    loop.update()
    loop.pr2.step()
    loop.begin()
    assert not warnings_of(caplog), "a batch may end without end_rollout()"
    loop.begin()
    assert "begin_rollout() again, and nothing was trained on since the last one: its 4 sequences are dropped" in caplog.text


@pytest.mark.parametrize("kind", ["old_logprobs", "actor_update", "replay"])
def test_the_same_sequence_twice_in_a_pass_is_refused(kind: str) -> None:
    loop = Loop()
    again = MicroBatch.padded([3, 1], [50, 60], 60)
    passes = {"old_logprobs": loop.pr2.old_logprobs, "actor_update": loop.pr2.actor_update, "replay": loop.pr2.replay}
    with pytest.raises(ReplayError, match="sequence 1 is twice in this pass"), passes[kind]([DATA[0].micro_batch, again]):
        pass
    loop.update()  # nothing is left open


def test_a_copy_of_length_0_fills_a_batch() -> None:
    loop = Loop("r3")
    grid = MicroBatch.padded([0, 1, 1], [40, 60, 0], 62)
    batch = toy.Batch(grid, toy.token_inputs(grid.grid))
    loop.update(None, [batch])


def test_sequences_that_were_never_trained_on_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    loop = Loop("r3")
    loop.update(None, DATA[:1])
    loop.pr2.step()
    assert "pr2/untrained_sequences" not in loop.pr2.metrics()
    loop.pr2.end_rollout()
    assert loop.pr2.metrics()["pr2/untrained_sequences"] == 2.0
    assert "2 of the 4 sequences of this rank's replica were never trained on" in caplog.text
    loop.begin()
    assert "pr2/untrained_sequences" not in loop.pr2.metrics(), "a resumed run would have another number"
    loop.update()
    loop.pr2.step()
    loop.pr2.end_rollout()
    assert loop.pr2.metrics()["pr2/untrained_sequences"] == 0.0
    loop.pr2.end_rollout()  # nothing has begun
    assert loop.pr2.metrics()["pr2/untrained_sequences"] == 0.0


def test_a_loop_in_order_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    for preset in ("pr2", "r3", "r2", "grpo"):
        loop = Loop(preset)
        for rollout in range(2):
            if rollout:
                loop.begin()
            for _ in range(2):
                loop.update()
                loop.pr2.step()
            loop.pr2.end_rollout()
            loop.pr2.engine_weights([])
    assert not warnings_of(caplog)


# ---- several ranks ---------------------------------------------------------------------------------------------------


def forgetful_job() -> tuple[list[str], torch.Tensor]:
    """A rank that has no micro-batch at that moment; all ranks forget step()."""
    import logging

    host.init()
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("megatron_pr2.replay.progress").addHandler(handler)
    chunk = toy.ToyChunk(toy.toy_config())
    pr2: PR2 = attach(chunk, toy.preset("pr2", sample_fraction=1.0), torch.optim.SGD(chunk.parameters(), lr=0.01))
    mine = LENGTHS if dist.get_rank() == 0 else {}
    tables = toy.random_tables(mine, chunk.config)
    pr2.begin_rollout(toy.sequences(mine, tables))
    data = toy.batches(mine, 2)
    toy.old_logprobs(pr2, chunk, data)
    toy.drift(chunk)
    toy.update(pr2, chunk, data, 2)
    pr2.end_rollout()
    assert pr2.predictor is not None
    return said, pr2.predictor.weight_LEH


def test_all_ranks_end_what_was_left_open_and_the_first_says_so() -> None:
    (first, one), (second, other) = pool(2).run(forgetful_job)
    assert len(first) == 1
    assert "end_rollout() before step() ended mini-step 2: it is ended now" in first[0]
    assert not second
    assert one.any()
    assert torch.equal(one, other)


def resumed_job(directory: Path, preset: str) -> tuple[int, int, float, list[bool]]:
    """(last mini-step, as it is after the next one, sequences never trained on, whether what was scored is the same)"""
    host.init()
    saved = Loop(preset)
    saved.update(None, DATA[:1])
    saved.pr2.step()
    saved.pr2.save(directory, rollout=True)
    resumed = Loop(preset)
    for _ in range(3):
        resumed.update()
        resumed.pr2.step()
    resumed.pr2.engine_weights([])
    resumed.pr2.load(directory, sequences=(sid for sid in LENGTHS))  # walked more than once
    assert all(resumed.pr2.measurement.pushes.older(resumed.pr2.sequences, None)), "what was pushed is of another run"
    assert resumed.pr2.horizon.average() == saved.pr2.horizon.average() == 0.0
    last = resumed.pr2.progress.mini_step
    resumed.update(None, DATA[:1])
    if resumed.pr2.config.learns:
        assert resumed.pr2.step()["predictor"]["tokens"] > 0, "a first mini-step would not learn"
    assert resumed.pr2.horizon.average() == 0.5
    same = [
        np.array_equal(getattr(resumed.pr2.progress, name), getattr(saved.pr2.progress, name)) for name in ("scored", "trained")
    ]
    number = resumed.pr2.progress.mini_step
    resumed.pr2.end_rollout()
    return last, number, resumed.pr2.metrics()["pr2/untrained_sequences"], same


@pytest.mark.parametrize("preset", ["pr2", "r3"])
def test_an_order_in_the_middle_of_a_batch_is_taken_up_again(preset: str, tmp_path: Path) -> None:
    for found in pool(2).run(resumed_job, tmp_path / "pr2", preset):
        assert found == (1, 2, 2.0, [True, True])


def resumed_without_sequences_job(directory: Path) -> tuple[bool, bool, list[float]]:
    """Rank 0 has no sequence of the batch; (pass's bias is there, what was pushed is there, delivered) when resumed."""
    host.init()
    data = DATA if dist.get_rank() else []

    def begun() -> tuple[PR2, toy.ToyChunk]:
        config = toy.toy_config(moe_router_score_function="sigmoid", moe_router_enable_expert_bias=True)
        chunk = toy.ToyChunk(config)
        settings = {"sample_fraction": 1.0, "max_missing_share": 1.0}
        return attach(chunk, toy.preset("pr2", **settings), torch.optim.SGD(chunk.parameters(), lr=0.01)), chunk

    pr2, chunk = begun()
    assert pr2.predictor is not None
    pr2.predictor.weight_LEH.fill_(0.01)
    list(pr2.engine_weights(((f"model.layers.{n}.mlp.gate.weight", r.weight) for n, r in enumerate(toy.routers(chunk))), version=3))
    sequences = toy.sequences(LENGTHS, toy.random_tables(LENGTHS, chunk.config)) if data else []
    pr2.begin_rollout(sequences, version=3)
    toy.old_logprobs(pr2, chunk, data)
    biases_LE = torch.stack([router.expert_bias for router in toy.routers(chunk)])
    pr2.predictor.weight_LEH.fill_(0.02)  # of the next push
    pr2.save(directory, rollout=True)
    resumed, chunk = begun()
    for router in toy.routers(chunk):
        router.expert_bias += 0.5  # it moved with the updates
    resumed.load(directory, sequences=[sequence.id for sequence in sequences])
    found = resumed.features.routers["expert_bias"]
    (push,) = resumed.measurement.pushes.in_use
    return found is not None and torch.equal(found, biases_LE), bool((push.w_LEH == 0.01).all()), push.delivered


def test_what_a_batch_is_judged_by_is_kept_where_the_first_rank_has_no_sequence(tmp_path: Path) -> None:
    for found in pool(2).run(resumed_without_sequences_job, tmp_path / "pr2"):
        assert found == (True, True, [pytest.approx(1.0)] * 2)
