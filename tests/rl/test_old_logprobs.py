"""The sources of old log-probs: what is refused, which passes run, and what each pass replays, keeps and leaves alone."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from megatron_pr2 import host
from megatron_pr2.attach import PR2, attach
from megatron_pr2.config import PRESETS
from megatron_pr2.errors import AttachError, ConfigError, RolloutError
from megatron_pr2.rl import checkpoint, losses
from megatron_pr2.rl.batch import Sample
from megatron_pr2.rl.config import load_config
from megatron_pr2.rl.proximal import ProximalPolicy
from megatron_pr2.rollout.base import RolloutResponse
from tests.helpers import toy
from tests.helpers.distributed import pool
from tests.helpers.loop import digest, train_job
from tests.helpers.rounding import LOGPROB, assert_near, rounding

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("host_platform")]

# ---- rules -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "importance", "preset", "message"),
    [
        ("recomputed", "none", "r3", "old_logprobs='recomputed': expected one of recompute, rollout, ewma"),
        ("rollout", "none", "r2", "set old_logprobs=recompute, or pr2.routes=engine"),
        ("rollout", "tis", "r3", "they are the same; set importance=none"),
        ("ewma", "none", "pr2", "needs algorithm.importance=tis or mis"),
    ],
)
def test_what_contradicts_itself_is_refused(source: str, importance: str, preset: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(None, [f"preset={preset}", f"algorithm.old_logprobs={source}", f"algorithm.importance={importance}"])


@pytest.mark.parametrize(
    ("source", "overrides", "needed"),
    [
        *(("recompute", [f"preset={preset}"], True) for preset in PRESETS),
        ("rollout", ["preset=grpo"], False),
        ("rollout", ["preset=r3"], False),
        ("rollout", ["preset=pr2"], True),
        ("ewma", ["preset=grpo"], False),
        ("ewma", ["preset=r2"], True),
        ("ewma", ["preset=r3"], False),
        ("ewma", ["preset=pr2"], True),
        ("ewma", ["preset=pr2", "pr2.predictor=momentum", "pr2.held_out_share=1.0"], True),  # it is judged by features
        ("ewma", ["preset=pr2", "pr2.predictor=momentum", "pr2.hold_back=false"], False),
    ],
)
def test_which_combinations_need_the_snapshot(source: str, overrides: list[str], needed: bool) -> None:
    """recompute always; the others where features or the actor's routes would be absent otherwise."""
    importance = "tis" if source == "ewma" else "none"
    given = [f"algorithm.old_logprobs={source}", f"algorithm.importance={importance}", *overrides]
    assert load_config(None, given).needs_snapshot_pass == needed


# ---- the engine's log-probs ------------------------------------------------------------------------------------------


def sample(logprobs: list[float], *, loss_mask: list[bool] | None = None, versions: list[int] | None = None) -> Sample:
    count = 4
    mask = np.array(loss_mask or [True] * count)
    response = RolloutResponse(
        prompt_ids=(1, 2),
        response_ids=tuple(range(count)),
        logprobs=np.array(logprobs, dtype=np.float32),
        routes=None,
        finish_reason="stop",
        weight_versions=np.array(versions or [3] * count),
        loss_mask=mask,
    )
    return Sample(7, response, 1.0, 0.5)


def test_a_partial_rollout_keeps_what_each_token_was_sampled_with() -> None:
    """Two tokens of weights that are one push older: the weights of their tokens, and of no others, say so."""
    newest = np.array([-1.0, -2.0, -0.5, -0.7], dtype=np.float32)
    continued = sample([-1.3, -1.9, -0.5, -0.7], versions=[2, 2, 3, 3])
    log_ratio = losses.behaviour_log_ratio(
        torch.from_numpy(newest)[None], torch.from_numpy(continued.rollout_logprobs())[None], torch.ones(1, 4)
    )
    weighted = losses.behaviour_weights(log_ratio, torch.ones(1, 4), kind="tis", cap=1.2)
    np.testing.assert_allclose(weighted.weights[0], [1.2, np.exp(-0.1), 1.0, 1.0], rtol=rounding(2))
    assert continued.rollout_logprobs().tolist() == continued.response.logprobs.tolist()


@pytest.mark.parametrize(
    ("logprobs", "message"),
    [
        ([-1.0, np.nan, -1.0, -np.inf], "sample 7: the engine's log-prob of response token 1 is nan, and 2 of 4"),
        ([], r"sample 7: \(0,\) log-probs for 4 response tokens"),
    ],
)
def test_an_engine_without_log_probs_is_refused(logprobs: list[float], message: str) -> None:
    with pytest.raises(RolloutError, match=message):
        sample(logprobs).rollout_logprobs()


def test_tokens_of_an_environment_need_none() -> None:
    sample([-1.0, np.nan, -1.0, -1.0], loss_mask=[True, False, True, True]).rollout_logprobs()


# ---- the moving average ----------------------------------------------------------------------------------------------


def model_in_a_buffer(dtype: torch.dtype = torch.float32) -> tuple[torch.nn.Module, torch.Tensor]:
    """Two layers whose weights are views of one buffer, as DistributedDataParallel has them."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)).to(dtype)
    buffer = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    start = 0
    for parameter in model.parameters():
        parameter.data = buffer[start : start + parameter.numel()].view(parameter.shape)
        start += parameter.numel()
    return model, buffer


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9])
def test_the_average_is_the_weighted_mean_of_all_weights_so_far(decay: float) -> None:
    torch.manual_seed(0)
    model, buffer = model_in_a_buffer()
    proximal = ProximalPolicy([model], decay)
    history = [buffer.double()]
    for _ in range(6):
        buffer += 0.1 * torch.randn_like(buffer)
        proximal.update()
        history.append(buffer.double())
    shares = torch.tensor([decay ** (len(history) - 1 - k) for k in range(len(history))], dtype=torch.float64)
    expected = (torch.stack(history) * (shares / shares.sum())[:, None]).sum(0)
    before, addresses = buffer.clone(), [parameter.data_ptr() for parameter in model.parameters()]
    with proximal.swapped_in():
        assert_near(buffer.double(), expected, len(history), dtype=torch.float32)
        assert torch.equal(buffer, before) == (decay == 0.0)
        assert [parameter.data_ptr() for parameter in model.parameters()] == addresses
    assert torch.equal(buffer, before)


def test_the_weights_come_back_after_an_error() -> None:
    model, buffer = model_in_a_buffer(torch.bfloat16)
    proximal = ProximalPolicy([model], 0.9, device=torch.device("cpu"))
    buffer += 1.0
    proximal.update()
    before = buffer.clone()
    seen = []

    def fails() -> None:
        with proximal.swapped_in():
            seen.append(buffer.clone())
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert not torch.equal(seen[0], before)
    assert torch.equal(buffer.view(torch.int16), before.view(torch.int16))


def test_the_average_follows_bf16_weights_that_move_by_one_step_of_their_grid() -> None:
    """Kept in bf16 it would stay where it is for ever: a tenth of a step rounds to none."""
    model, buffer = model_in_a_buffer(torch.bfloat16)
    buffer.fill_(1.0)
    proximal = ProximalPolicy([model], 0.9)
    buffer.fill_(1.0 + 2.0**-7)
    for _ in range(20):
        proximal.update()
    with proximal.swapped_in():
        assert buffer.unique().tolist() == [1.0 + 2.0**-7]
    stuck = torch.tensor(1.0, dtype=torch.bfloat16)
    assert stuck.lerp(torch.tensor(1.0 + 2.0**-7, dtype=torch.bfloat16), 0.1) == stuck


def test_what_the_average_cannot_do_is_refused() -> None:
    model, _ = model_in_a_buffer()
    with pytest.raises(ConfigError, match=r"proximal_decay=1\.0"):
        ProximalPolicy([model], 1.0)
    model.ddp_config = SimpleNamespace(overlap_param_gather=True)
    with pytest.raises(AttachError, match="overlap_param_gather=True gathers the policy's weights during the forward"):
        ProximalPolicy([model], 0.9)


@pytest.mark.parametrize("preset", ["r2", "r3", "pr2"])
def test_a_pass_under_the_average_replays_the_same_routes_and_leaves_nothing_behind(preset: str) -> None:
    """Routes as in the other passes, gate weights of the average; features, agreement, drift and predictor untouched."""
    torch.manual_seed(0)
    lengths = {0: 9, 1: 12}
    config = toy.toy_config()
    chunk = toy.ToyChunk(config)
    pr2 = attach(chunk, toy.preset(preset, sample_fraction=1.0))
    data = toy.batches(lengths, 1)
    tables = toy.random_tables(lengths, config) if preset != "r2" else None
    proximal = ProximalPolicy([chunk], 0.5)

    def routes(calls: list[toy.Call]) -> list[np.ndarray]:
        """Of tokens that have one: not of a sequence's last token or padding, which the current router routes."""
        own = {call.number: np.flatnonzero(data[call.number].micro_batch.grid.rows()[0] >= 0)[:-1] for call in calls}
        return [call.map_TE[own[call.number]].numpy() for call in calls]

    pr2.begin_rollout(toy.sequences(lengths, tables))
    with toy.observed(chunk) as calls:
        toy.old_logprobs(pr2, chunk, data)
    snapshot = routes(calls)
    toy.drift(chunk, size=0.5)
    proximal.update()
    before = left_behind(pr2)
    with toy.observed(chunk) as calls, proximal.swapped_in(), pr2.replay([b.micro_batch for b in data]) as session:
        toy.run(session, chunk, data, backward=False)
    average, gates = routes(calls), [call.probs_TE for call in calls]
    assert left_behind(pr2) == before
    with toy.observed(chunk) as calls:
        toy.update(pr2, chunk, data, 2)
    assert all(map(np.array_equal, snapshot, average))
    assert all(map(np.array_equal, snapshot, routes(calls)))
    assert not any(torch.equal(gate, call.probs_TE) for gate, call in zip(gates, calls, strict=True))
    # Live, the average's routers would have chosen others, so replay decided.
    with toy.observed(chunk) as calls, proximal.swapped_in():
        for batch in data:
            chunk(batch.inputs_SBH)
    assert not all(map(np.array_equal, snapshot, routes(calls)))


def left_behind(pr2: PR2) -> str:
    """Everything that passes are there to leave: features, and sums of drift and of the predictor's gradient."""
    measured = pr2.measurement
    tokens = measured.features.locate(np.arange(pr2.tokens.total), torch.device("cpu"))
    kept = [measured.features.read(site.local, tokens, torch.device("cpu")) for site in pr2.sites] if tokens.count else []
    predictor = None if pr2.predictor is None else [pr2.predictor.grad_sum_LEH, pr2.predictor.token_count_L]
    return digest([kept, pr2.engine_agreement, measured.drift.read(None), predictor])


# ---- whole runs ------------------------------------------------------------------------------------------------------

RUN = ["steps=2", "rollout.prompts=2", "algorithm.mini_steps=2", "algorithm.micro_batch_size=4", "checkpoint_every=1"]
EWMA = ["algorithm.old_logprobs=ewma", "algorithm.importance=tis"]
PR2_ON = ["preset=pr2", "pr2.alpha=3", "pr2.hold_back=false"]
RUNS = {
    "r3": ["preset=r3"],
    "r3 tis": ["preset=r3", "algorithm.importance=tis"],
    "r3 rollout": ["preset=r3", "algorithm.old_logprobs=rollout"],
    "pr2 rollout": [*PR2_ON, "algorithm.old_logprobs=rollout"],
    "r3 ewma": ["preset=r3", *EWMA],
    "pr2 ewma": [*PR2_ON, *EWMA],
    "r2 ewma": ["preset=r2", "algorithm.old_logprobs=ewma", "algorithm.importance=mis", "algorithm.importance_level=sequence"],
    "grpo ewma": ["preset=grpo", *EWMA, "algorithm.importance_cap=1.05", "algorithm.proximal_device=cpu"],
    "r3 ewma of now": ["preset=r3", *EWMA, "algorithm.proximal_decay=0"],
    "pr2 ewma, cut": [*PR2_ON, *EWMA, "steps=1"],
}


@pytest.fixture(scope="module")
def runs(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """Every source on two ranks that share the experts, and the last one interrupted and continued."""
    directory = tmp_path_factory.mktemp("runs")
    jobs = [(directory / name, [*RUN, *overrides], False) for name, overrides in RUNS.items()]
    jobs.append((directory / "pr2 ewma, cut", [*RUN, *PR2_ON, *EWMA], True))
    results = pool(2).run(train_job, tiny_checkpoint, jobs)
    names = [*RUNS, "pr2 ewma, continued"]
    return {name: [result[i] for result in results] for i, name in enumerate(names)}


def test_every_source_trains(runs: dict[str, list[dict[str, Any]]]) -> None:
    for name, ranks in runs.items():
        weights = ranks[0]["weights"]
        assert len(set(weights)) == len(weights) == (2 if "cut" in name or "continued" in name else 4), name
        assert repr(ranks[0]["records"]) == repr(ranks[1]["records"]), name
        for record in ranks[0]["records"]:
            assert ("importance" in record) == any(part in name for part in ("ewma", "tis")), name
            assert np.isfinite(record["policy_loss"]), name
            assert record["routes"]["missing"] == 0, name


def test_truncation_changes_next_to_nothing_where_engine_and_actor_agree(runs: dict[str, list[dict[str, Any]]]) -> None:
    """The embedded engine is the actor: its log-probs are those of the snapshot but for the last bits."""
    for plain, corrected in zip(runs["r3"], runs["r3 tis"], strict=True):
        assert corrected["samples"][:2] == plain["samples"][:2], "old log-probs do not depend on the correction"
        assert corrected["records"][0]["importance"]["weight"] == pytest.approx(1.0, abs=LOGPROB)
        assert corrected["records"][0]["importance"]["kl"] < LOGPROB**2
        for one, other in zip(plain["records"], corrected["records"], strict=True):
            assert one["policy_loss"] == pytest.approx(other["policy_loss"], abs=LOGPROB)


def test_old_log_probs_of_the_rollout_need_no_pass_unless_something_learns(runs: dict[str, list[dict[str, Any]]]) -> None:
    for r3, pr2 in zip(runs["r3 rollout"], runs["pr2 rollout"], strict=True):
        # Against the engine itself there is no gap to speak of; the pass for features measures one.
        assert not any("logprob_gap" in record for record in r3["records"])
        assert 0.0 < pr2["records"][0]["logprob_gap"]["max"] <= LOGPROB
        assert 1e-5 < pr2["records"][1]["logprob_gap"]["mean"] < 0.1, "a prediction is in use"
        # No features without a pass; and I2: with it, learning from them does not touch the policy.
        assert [record["routes"]["sampled"] for record in r3["records"]] == [0, 0]
        assert all(record["routes"]["sampled"] > 0 for record in pr2["records"])
        assert pr2["predictor"] > 0.1
        for name in ("samples", "weights", "optimizer"):
            assert pr2[name][:2] == r3[name][:2], name


def test_the_average_trains_alike_with_and_without_a_predictor(runs: dict[str, list[dict[str, Any]]]) -> None:
    """I2, with features of the snapshot's pass beside log-probs of the average's."""
    for r3, pr2 in zip(runs["r3 ewma"], runs["pr2 ewma"], strict=True):
        assert pr2["predictor"] > 0.1
        for name in ("samples", "weights", "optimizer"):
            assert pr2[name][:2] == r3[name][:2], name
        first, second = pr2["records"][0]["mini_steps"]
        # Before the first update of the run the average is the policy itself; later it stays behind.
        assert first["ratio_min"] == pytest.approx(1.0, abs=LOGPROB)
        assert second["ratio_std"] > 4 * LOGPROB
        assert pr2["records"][1]["mini_steps"][0]["ratio_std"] > 4 * LOGPROB
        assert pr2["records"][1]["importance"]["kl"] > LOGPROB**2
        assert 0.0 < pr2["records"][1]["importance"]["effective_sample_size"] < 1.0
        for record in pr2["records"]:
            assert record["routes"]["features_absent"] == 0
            # Features are of the weights that the first mini-step begins with, not of the average.
            # Zero up to rounding: of logits that two passes computed, and of a KL that is a sum over the experts in fp32.
            before, after = (mini_step["kl_frozen"] for mini_step in record["mini_steps"])
            assert before < rounding(1) < after
            assert before < 0.01 * after


def test_the_average_takes_in_every_update(runs: dict[str, list[dict[str, Any]]]) -> None:
    """With decay 0 it is the policy itself, in every mini-step."""
    for record in runs["r3 ewma of now"][0]["records"]:
        for mini_step in record["mini_steps"]:
            assert (mini_step["ratio_min"], mini_step["ratio_max"]) == pytest.approx((1.0, 1.0), abs=LOGPROB)
        assert record["clip_fraction"] == 0.0


def test_a_cap_that_bites_is_said(runs: dict[str, list[dict[str, Any]]]) -> None:
    record = runs["grpo ewma"][0]["records"][1]
    assert record["importance"]["outside"] > 0.0
    assert record["importance"]["weight"] < 1.05


def test_i6_the_average_is_continued_bit_by_bit(runs: dict[str, list[dict[str, Any]]]) -> None:
    whole, first, second = runs["pr2 ewma"], runs["pr2 ewma, cut"], runs["pr2 ewma, continued"]
    for straight, before, after in zip(whole, first, second, strict=True):
        for name in ("rollouts", "samples", "weights", "optimizer"):
            assert before[name] + after[name] == straight[name], name
        assert repr(before["records"] + after["records"]) == repr(straight["records"])


def average_job(path: Path, directory: Path, ranks: int, load: bool) -> dict[str, str]:
    """The average in Hugging Face names, of a policy that has moved: saved by one layout, loaded by another."""
    from megatron_pr2.rl.actor import Actor

    host.init(expert=ranks)
    actor = Actor(load_config(None, [*EWMA, f"parallel.processes={ranks}", f"parallel.expert={ranks}"]), path, 0)
    assert actor.proximal is not None
    if load:
        actor.load(directory / "step_000001")
    else:
        actor.optimizer.step()  # without gradients: it makes the moments that a checkpoint has
        for parameter in actor.model.parameters():
            parameter.data.mul_(1.5)
        actor.proximal.update()
        checkpoint.save(directory, 1, {"actor": actor.state_dict()})
    own = digest([parameter.data for parameter in actor.model.parameters()])
    with actor.proximal.swapped_in():
        average = {name: digest(tensor) for name, tensor in actor.export(1)}
    assert digest([parameter.data for parameter in actor.model.parameters()]) == own
    return {**average, "updates": str(actor.proximal.updates), "policy": digest(dict(actor.export(1)))}


def test_i6_another_layout_reads_the_same_average(tiny_checkpoint: Path, tmp_path: Path) -> None:
    saved = pool(2).run(average_job, tiny_checkpoint, tmp_path, 2, False)[0]
    assert saved["updates"] == "1"
    loaded = pool(1).run(average_job, tiny_checkpoint, tmp_path, 1, True)[0]
    assert loaded == saved
