"""Hold-back: a prediction is used where it was measured to help, and only there; beta = 0 is r3."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megatron_pr2.attach import attach
from megatron_pr2.config import PR2Config
from megatron_pr2.errors import ConfigError
from megatron_pr2.parallel.tokens import TokenIndex
from megatron_pr2.prediction.hold_back import HoldBack
from megatron_pr2.prediction.learned import LearnedPredictor
from megatron_pr2.prediction.predictor import BETAS
from megatron_pr2.prediction.rounding import merge_gate
from megatron_pr2.replay.router import select_experts
from megatron_pr2.replay.sequences import held_out_tokens, sampled_tokens
from tests.helpers import drifting, toy
from tests.helpers.distributed import pool
from tests.helpers.drifting import hold_back_of, simulate
from tests.helpers.rounding import assert_near

pytestmark = pytest.mark.usefixtures("host_platform")

STRATEGIES = ("learned", "momentum", "learned+momentum")
SLOTS = 1000


def hold_back(layers: int = 1, decay: float = 0.9, confidence: float = 2.0) -> HoldBack:
    return HoldBack(layers, decay=decay, confidence=confidence, device=torch.device("cpu"))


def observe(held: HoldBack, gains: list[float], layer: int = 0) -> None:
    """One rollout batch in which beta_j kept so many more of 1000 experts than beta = 0."""
    held._kept_LJ[layer] += torch.tensor([900.0, *(900.0 + gain for gain in gains), SLOTS], dtype=torch.float64)
    held.read(None)
    held.close_batch()


# ---- the decision ----------------------------------------------------------------------------------------------------


def test_nothing_is_used_before_it_was_measured() -> None:
    held = hold_back(3)
    assert held.beta == [0.0, 0.0, 0.0]
    for _ in range(2):
        observe(held, [10.0, 20.0, 30.0, 40.0, 50.0])
        assert held.beta[0] == 0.0
        assert math.isnan(held.report()["lift"][0])
    observe(held, [10.0, 20.0, 30.0, 40.0, 50.0])
    assert held.beta == [1.0, 0.0, 0.0]


def test_the_best_beta_is_taken() -> None:
    held = hold_back()
    for noise in (1.0, -1.0, 0.5, -0.5, 0.0):
        observe(held, [5.0, 20.0 + noise, 12.0, 3.0, -30.0])
    assert held.beta == [BETAS[2]]
    report = held.report()
    assert report["beta"] == [BETAS[2]]
    assert report["lift"][0] == pytest.approx(0.02, rel=0.05)
    assert 0.0 < report["lift_error"][0] < 0.001


def test_a_gain_within_the_noise_does_not_count() -> None:
    held = hold_back()
    for gain in (30.0, -25.0, 28.0, -24.0, 31.0, -26.0):
        observe(held, [gain] * 5)
    assert held.beta == [0.0]
    assert held.report()["lift"] == [0.0]


def test_of_equal_betas_the_smallest_is_taken() -> None:
    held = hold_back()
    for _ in range(4):
        observe(held, [10.0] * 5)
    assert held.beta == [BETAS[1]]


def test_a_prediction_that_goes_bad_is_held_back_again() -> None:
    held = hold_back()
    for _ in range(6):
        observe(held, [1.0, 2.0, 3.0, 4.0, 5.0])
    assert held.beta == [1.0]
    for _ in range(8):
        observe(held, [-1.0, -2.0, -3.0, -4.0, -5.0])
    assert held.beta == [0.0]


def test_a_batch_without_a_held_out_token_ages_nothing() -> None:
    held = hold_back()
    for _ in range(4):
        observe(held, [10.0] * 5)
    before, beta = held.state().clone(), held.beta
    held.read(None)
    held.close_batch()
    assert torch.equal(held.state(), before)
    assert held.beta == beta


@given(gains=st.lists(st.floats(-50, 50), min_size=3, max_size=12), decay=st.floats(0.5, 0.99))
def test_mean_and_error_are_those_of_weighted_observations(gains: list[float], decay: float) -> None:
    held = hold_back(decay=decay)
    for gain in gains:
        observe(held, [0.0, 0.0, 0.0, 0.0, gain])
    weights = decay ** np.arange(len(gains) - 1, -1, -1.0)
    x = np.array(gains) / SLOTS
    mean = np.average(x, weights=weights)
    effective = weights.sum() ** 2 / (weights**2).sum()
    error = math.sqrt(max(0.0, np.average((x - mean) ** 2, weights=weights)) / (effective - 1))
    found_mean, found_error = held._estimate()
    assert float(found_mean[0, -1]) == pytest.approx(mean, rel=1e-6, abs=1e-9)
    assert float(found_error[0, -1]) == pytest.approx(error, rel=1e-3, abs=1e-8)


def test_mini_steps_of_a_batch_are_one_observation() -> None:
    together, apart = hold_back(), hold_back()
    for gain in (4.0, 6.0, 5.0):
        observe(together, [gain] * 5)
        for share in (0.25, 0.75):
            apart._kept_LJ[0] += share * torch.tensor([900.0, *[900.0 + gain] * 5, SLOTS], dtype=torch.float64)
            apart.read(None)
        apart.close_batch()
    torch.testing.assert_close(apart.state(), together.state())


def test_counting_is_agreement_under_every_beta() -> None:
    """Against sets of Python integers."""
    torch.manual_seed(0)
    config = toy.toy_config()
    router = toy.routers(toy.ToyChunk(config))[0]
    p_old, shift, p = (torch.randn(50, toy.EXPERTS) for _ in range(3))
    held = hold_back()
    current, frozen = select_experts(router, p), select_experts(router, p_old)
    select = partial(select_experts, router)
    steps_J11 = torch.tensor(BETAS[1:]).view(-1, 1, 1)
    held.add(0, select, steps_J11 * shift, current, frozen, p_old)
    wanted = [set(row) for row in current.tolist()]
    for j, beta in enumerate(BETAS):
        chosen = (p_old + beta * shift).topk(toy.TOPK).indices.tolist()
        assert float(held._kept_LJ[0, j]) == sum(len(w & set(c)) for w, c in zip(wanted, chosen, strict=True))
    assert float(held._kept_LJ[0, -1]) == 50 * toy.TOPK


def test_state_continues() -> None:
    first, second = hold_back(2), hold_back(2)
    for gain in (4.0, 6.0, 5.0, 7.0):
        observe(first, [gain] * 5, layer=1)
    second.load_state(first.state().clone())
    assert second.beta == first.beta == [0.0, BETAS[1]]
    second.load_state(None)
    assert second.beta == [0.0, 0.0]


# ---- on drifts whose right answer is known ---------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_on_a_steady_drift_prediction_is_used_and_helps(strategy: str) -> None:
    found = simulate("steady", rollouts=16, predictor=strategy, alpha=0.1)
    assert min(found.beta) > 0.0
    assert found.lift(since=8) > 1e-3
    report = found.reports[-1][-1]["hold_back"]
    assert all(lift > 2.0 * error > 0.0 for lift, error in zip(report["lift"], report["lift_error"], strict=True))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kind", ["noise", "flip"])
def test_where_nothing_can_be_known_the_prediction_is_held_back(kind: str, strategy: str) -> None:
    """Without hold-back it does harm; with it every rollout batch is r3's."""
    free = simulate(kind, rollouts=8, predictor=strategy, hold_back=False)
    assert free.lift(since=2) < -0.005
    held = simulate(kind, rollouts=8, predictor=strategy)
    assert held.beta == [0.0] * toy.LAYERS
    assert held.lift() == 0.0


def test_the_momentum_of_a_steady_drift_is_its_direction() -> None:
    found = simulate("steady", rollouts=2, predictor="momentum", hold_back=False, momentum=2.0)
    assert found.pr2.predictor is not None
    expected = 2.0 * (drifting.KAPPA - 1) / 2 * found.updates
    torch.testing.assert_close(found.pr2.predictor.weight_LEH, expected, rtol=0.05, atol=1e-5)


def test_a_known_mini_step_predicts_for_its_own_horizon() -> None:
    """The first mini-step, in which nothing has drifted, is predicted exactly; later ones better than by the average."""
    settings: dict[str, Any] = {"rollouts": 6, "predictor": "momentum", "routes": "actor", "hold_back": False}
    average, known = simulate("steady", **settings), simulate("steady", known_mini_step=True, **settings)
    first = [batch[0]["drift"] for batch in known.reports[2:]]
    assert all(value == 1.0 for drift in first for value in drift["agreement"])
    assert any(value < 1.0 for batch in average.reports[2:] for value in batch[0]["drift"]["agreement"])
    assert known.lift(since=2) > average.lift(since=2) > 0.0


@pytest.mark.parametrize("kind", toy.ROUTERS)
def test_every_kind_of_router_can_be_predicted_and_held_back(kind: str) -> None:
    found = simulate("noise", rollouts=4, router=kind, predictor="learned+momentum")
    assert found.beta == [0.0] * toy.LAYERS
    assert all(math.isfinite(v) for v in found.reports[-1][-1]["hold_back"]["lift"])


# ---- what is learned from, and what is pushed ------------------------------------------------------------------------


def test_held_out_tokens_are_not_learned_from() -> None:
    """The predictor's token count is that of the other sampled tokens; together they are all."""
    config = toy.preset("pr2", sample_fraction=0.7, hold_back=True, held_out_share=0.3)
    model_config = toy.toy_config()
    chunk = toy.ToyChunk(model_config)
    pr2 = attach(chunk, config)
    lengths = {0: 40, 1: 30}
    sequences = toy.sequences(lengths, toy.random_tables(lengths, model_config))
    pr2.begin_rollout(sequences)
    tokens = TokenIndex(lengths)
    valid = np.concatenate([s.routes.valid for s in sequences if s.routes is not None])
    sampled = sampled_tokens(sequences, tokens, valid, config.seed, 0.7)
    held = held_out_tokens(sequences, tokens, sampled, config.seed, 0.3)
    assert not (held & ~sampled).any()
    assert 0.1 < held.sum() / sampled.sum() < 0.5
    data = toy.batches(lengths, 2)
    toy.old_logprobs(pr2, chunk, data)
    toy.drift(chunk)
    toy.update(pr2, chunk, data, 2)
    assert pr2.predictor is not None
    assert pr2.predictor.token_count_L.tolist() == [int((sampled & ~held).sum())] * toy.LAYERS
    hold = pr2.measurement.hold_back
    assert hold is not None
    assert hold._kept_LJ[:, -1].tolist() == [int(held.sum()) * toy.TOPK] * toy.LAYERS


def test_what_is_pushed_is_scaled_and_zero_is_exactly_r3() -> None:
    pr2 = attach(toy.ToyChunk(toy.toy_config()), PR2Config.preset("pr2"))
    assert pr2.predictor is not None
    assert pr2.measurement.hold_back is not None
    pr2.predictor.weight_LEH.normal_(0.0, 0.1)
    pr2.measurement.hold_back.beta = [0.0, 0.25]
    gates = [site.router.weight.detach().clone() for site in pr2.sites]
    names = [f"model.layers.{site.layer}.mlp.gate.weight" for site in pr2.sites]
    pushed = dict(pr2.engine_weights(zip(names, gates, strict=True)))
    assert torch.equal(pushed[names[0]], gates[0])
    assert torch.equal(pushed[names[1]], merge_gate(gates[1], 0.25 * pr2.predictor.weight_LEH[1]))
    with pr2.merged_gates():
        assert all(torch.equal(site.router.weight, pushed[name]) for site, name in zip(pr2.sites, names, strict=True))


def test_the_pushed_prediction_is_judged_and_not_what_was_learned_since() -> None:
    """W_p = 0 was pushed, so that every beta takes the same experts, whatever W_p is by the time that they are counted."""
    config = toy.toy_config()
    chunk = toy.ToyChunk(config)
    pr2 = attach(chunk, toy.preset("pr2", sample_fraction=1.0, hold_back=True, held_out_share=0.5))
    assert pr2.predictor is not None
    lengths = {0: 40, 1: 30}
    data = toy.batches(lengths, 2)
    counts = []
    for _ in range(2):
        pr2.begin_rollout(toy.sequences(lengths, toy.random_tables(lengths, config)))
        toy.old_logprobs(pr2, chunk, data)
        pr2.predictor.weight_LEH.normal_(0.0, 1.0)  # learned since; pushed before the second batch
        toy.update(pr2, chunk, data, 2)
        kept = hold_back_of(pr2)._kept_LJ[:, :-1].clone()
        counts.append(kept)
        pr2.step(0.0)
    assert torch.equal(counts[0], counts[0][:, :1].expand_as(counts[0]))
    assert (counts[1][:, -1] < counts[1][:, 0]).all()


@pytest.mark.parametrize("closes", [True, False])
def test_the_reported_beta_is_the_one_that_was_rolled_out_with(closes: bool) -> None:
    """Also by a trainer that never calls end_rollout(): its decisions come one batch later."""
    found = simulate("steady", rollouts=10, predictor="momentum", closes=closes)
    used = [[0.0] * toy.LAYERS, *found.pushed[:-1]]
    told = [[report["hold_back"]["beta"] for report in batch] for batch in found.reports]
    assert told == [[beta] * drifting.KAPPA for beta in used]
    assert max(map(max, used)) > 0.0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_held_back_is_r3_also_for_a_prediction_that_is_not_finite(bad: float) -> None:
    pr2 = attach(toy.ToyChunk(toy.toy_config()), PR2Config.preset("pr2"))
    assert pr2.predictor is not None
    pr2.predictor.weight_LEH.fill_(bad)
    gates = [site.router.weight.detach().clone() for site in pr2.sites]
    with pr2.merged_gates():
        assert all(torch.equal(site.router.weight, gate) for site, gate in zip(pr2.sites, gates, strict=True))


def test_a_gradient_that_is_not_finite_is_reported_and_not_taken(caplog: pytest.LogCaptureFixture) -> None:
    pr2 = attach(toy.ToyChunk(toy.toy_config()), toy.preset("pr2"))
    assert isinstance(pr2.predictor, LearnedPredictor)
    pr2.predictor.grad_sum_LEH[0, 1, 2] = math.nan
    pr2.predictor.grad_sum_LEH[1] = 1.0
    pr2.predictor.token_count_L.fill_(4.0)
    report = pr2.predictor.step(0.1, None)
    assert math.isnan(report["grad_norm"])
    assert "not finite" in caplog.text
    assert not pr2.predictor.weight_LEH[0].any()
    torch.testing.assert_close(pr2.predictor.weight_LEH[1], torch.full((toy.EXPERTS, toy.HIDDEN), -0.1))


@pytest.mark.parametrize("strategy", ["learned", "momentum"])
def test_a_small_feature_budget_leaves_something_of_every_mini_step(strategy: str) -> None:
    """Sequences are told in the order of their mini-steps; the first ones alone would teach nothing, and judge wrongly."""
    per_token = toy.LAYERS * (toy.HIDDEN * 2 + toy.EXPERTS * 4)
    room = drifting.SEQUENCES * drifting.LENGTH // 2 * per_token
    found = simulate("steady", rollouts=16, predictor=strategy, alpha=0.1, feature_bytes=room)
    for batch in found.reports:
        assert all(min(report["drift"]["tokens"]) > 0 for report in batch)
        assert all(report["predictor"]["tokens"] > 0 for report in batch[1:]) or strategy == "momentum"
    assert max(found.beta) > 0.0


def two_ranks_job(kind: str, strategy: str) -> tuple[list[list[float]], list[float], Tensor]:
    from megatron_pr2 import host

    host.init()
    half = slice(dist.get_rank(), None, 2)
    found = simulate(kind, rollouts=8, predictor=strategy, share=half, routes="actor", known_mini_step=True)
    assert found.pr2.predictor is not None
    return found.pushed, found.reports[-1][-1]["drift"]["agreement"], found.pr2.predictor.weight_LEH


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_ranks_decide_as_one_process_does(strategy: str) -> None:
    """Each has half of every mini-step's sequences."""
    results = pool(2).run(two_ranks_job, "steady", strategy)
    alone = simulate("steady", rollouts=8, predictor=strategy, routes="actor", known_mini_step=True)
    assert alone.pr2.predictor is not None
    assert max(map(max, alone.pushed)) > 0.0
    for pushed, agreement, weight in results:
        assert pushed == alone.pushed
        assert agreement == pytest.approx(alone.reports[-1][-1]["drift"]["agreement"], abs=1e-9)
        assert_near(weight, alone.pr2.predictor.weight_LEH, drifting.SEQUENCES * drifting.LENGTH, factor=32)


def test_without_hold_back_nothing_is_kept_or_reported() -> None:
    found = simulate("steady", rollouts=1, predictor="learned", hold_back=False)
    assert found.pr2.measurement.hold_back is None
    assert found.pr2.predictor is not None
    assert "hold_back" not in found.reports[0][0]


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"held_out_share": 0.0}, "held_out_share"),
        ({"held_out_share": 1.0}, "no sampled token to learn from"),
        ({"hold_back_decay": 1.0}, "hold_back_decay"),
        ({"hold_back_confidence": -1.0}, "hold_back_confidence"),
        ({"momentum": -1.0}, "pr2.momentum"),
        ({"horizon": -0.5}, "pr2.horizon"),
        ({"hold_back": "yes"}, "true or false"),
        ({"drift": False}, "it learns from drift"),
        ({"drift": False, "predictor": "momentum"}, "set pr2.hold_back=false"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        PR2Config.preset("pr2", **settings)


def test_all_sampled_tokens_may_be_held_out_where_nothing_learns() -> None:
    assert PR2Config.preset("pr2", predictor="momentum", held_out_share=1.0).held_out_share == 1.0

