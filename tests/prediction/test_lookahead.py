"""The look-ahead's parts: the regression against float64, the weights ahead against the optimizer's own step, both undone."""

from __future__ import annotations

import copy
import logging
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_pr2 import host
from megatron_pr2.attach import PR2, attach
from megatron_pr2.config import PR2Config
from megatron_pr2.errors import AttachError
from megatron_pr2.prediction.ahead_weights import ahead, swapped_in
from megatron_pr2.prediction.learned import LearnedPredictor
from megatron_pr2.prediction.lookahead import LookaheadPredictor, reached
from megatron_pr2.prediction.momentum import LearnedMomentumPredictor
from megatron_pr2.prediction.ridge import ridge_fit
from megatron_pr2.replay.session import ReplaySession
from tests.helpers import toy
from tests.helpers.distributed import pool

pytestmark = pytest.mark.usefixtures("host_platform")
LAYERS, TOKENS, EXPERTS, HIDDEN = 3, 40, 8, 16


def data(seed: int = 0) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    inputs = [torch.randn(TOKENS, HIDDEN, generator=generator) for _ in range(LAYERS)]
    return inputs, [torch.randn(TOKENS, EXPERTS, generator=generator) for _ in range(LAYERS)]


def reference(h_SH: Tensor, y_SE: Tensor, ridge: float) -> Tensor:
    """The minimum of the definition, as a least-squares problem in float64: rows for the penalty below those of the tokens."""
    h, y = h_SH.double(), y_SE.double()
    weight = (ridge * (h.t() @ h).diagonal().mean()).sqrt()
    rows = torch.cat([h, weight * torch.eye(HIDDEN, dtype=torch.float64)])
    return torch.linalg.lstsq(rows, torch.cat([y, torch.zeros(HIDDEN, EXPERTS, dtype=torch.float64)])).solution.t()


@pytest.mark.parametrize("gram_bytes", [1 << 30, 0])
@pytest.mark.parametrize("ridge", [1e-2, 1.0])
def test_ridge_is_the_least_squares_solution(gram_bytes: int, ridge: float) -> None:
    inputs, shifts = data()
    fitted = ridge_fit(inputs, shifts, ridge, None, gram_bytes=gram_bytes)
    for h_SH, y_SE, w_EH in zip(inputs, shifts, fitted, strict=True):
        torch.testing.assert_close(w_EH.double(), reference(h_SH, y_SE, ridge), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("gram_bytes", [1 << 30, 0])
def test_without_tokens_nothing_is_predicted(gram_bytes: int) -> None:
    nothing = [torch.zeros(0, HIDDEN)], [torch.zeros(0, EXPERTS)]
    assert not ridge_fit(*nothing, 1e-2, None, gram_bytes=gram_bytes).any()


def _fit_a_part(gram_bytes: int) -> Tensor:
    """Ranks with 25, 0 and 15 tokens."""
    group, rank = dist.group.WORLD, dist.get_rank()
    first, stop = ((0, 25), (25, 25), (25, TOKENS))[rank]
    inputs, shifts = data()
    return ridge_fit([h[first:stop] for h in inputs], [y[first:stop] for y in shifts], 1e-2, group, gram_bytes=gram_bytes)


@pytest.mark.parametrize("gram_bytes", [1 << 30, 0])
def test_ridge_does_not_depend_on_how_tokens_are_spread(gram_bytes: int) -> None:
    whole = ridge_fit(*data(), 1e-2, None, gram_bytes=gram_bytes)
    for fitted in pool(3).run(_fit_a_part, gram_bytes):
        torch.testing.assert_close(fitted, whole, rtol=1e-4, atol=1e-5)


def test_further_updates_count_less() -> None:
    assert [reached(n, 0.6) for n in (0, 1, 2, 3)] == pytest.approx([0.0, 0.6, 0.96, 1.176])
    assert reached(1.5, 0.6) == pytest.approx((reached(1, 0.6) + reached(2, 0.6)) / 2)
    assert reached(5, 1.0) == 5


def trained(dtype: torch.dtype = torch.float32) -> tuple[list[nn.Parameter], torch.optim.Optimizer]:
    generator = torch.Generator().manual_seed(3)
    parameters = [nn.Parameter(torch.randn(4, 3, generator=generator).to(dtype)) for _ in range(2)]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)
    for _ in range(4):
        for parameter in parameters:
            parameter.grad = torch.randn(4, 3, generator=generator).to(dtype)
        optimizer.step()
    return parameters, optimizer


def test_ahead_is_the_step_that_is_made_again() -> None:
    parameters, optimizer = trained()
    before = [p.detach().clone() for p in parameters]
    values = list(ahead(optimizer, parameters, 2.0))
    state = copy.deepcopy(optimizer.state_dict())
    group = optimizer.param_groups[0]
    for parameter, own, value in zip(parameters, before, values, strict=True):
        moments = optimizer.state[parameter]
        mean = moments["exp_avg"] / (1 - 0.9 ** float(moments["step"]))
        spread = (moments["exp_avg_sq"] / (1 - 0.999 ** float(moments["step"]))).sqrt() + group["eps"]
        torch.testing.assert_close(value, own - 2.0 * group["lr"] * (mean / spread + 0.1 * own))
        assert torch.equal(parameter, own)  # only what was returned is ahead
    assert str(state) == str(optimizer.state_dict())


def test_a_weight_that_was_never_stepped_stays() -> None:
    parameter = nn.Parameter(torch.randn(4, 3))
    (value,) = ahead(torch.optim.AdamW([parameter]), [parameter], 1.0)
    assert torch.equal(value, parameter)


@pytest.mark.parametrize("fails", [False, True])
def test_the_swap_is_undone_bit_by_bit(fails: bool) -> None:
    buffer = torch.randn(24).bfloat16()
    parameters = [nn.Parameter(part) for part in buffer.view(2, 4, 3)]
    addresses, before = [p.data_ptr() for p in parameters], buffer.clone()
    try:
        with swapped_in(parameters, [torch.full((4, 3), 1.0 / 3.0), torch.ones(4, 3)]):
            assert torch.equal(parameters[0], torch.full((4, 3), 1.0 / 3.0).bfloat16())
            assert bool((buffer[12:] == 1).all())
            if fails:
                raise RuntimeError
    except RuntimeError:
        assert fails
    assert torch.equal(buffer, before)
    assert addresses == [p.data_ptr() for p in parameters]


def test_a_prediction_for_a_horizon() -> None:
    predictor = LookaheadPredictor(1, EXPERTS, HIDDEN, reach=0.6, device=torch.device("cpu"))
    change = torch.randn(1, EXPERTS, HIDDEN)
    assert not predictor.weight_for(2.0).any()  # nothing was looked at
    predictor.look(change, torch.ones(len(change)), 1.5)
    torch.testing.assert_close(predictor.weight_for(None), reached(1.5, 0.6) * change)
    torch.testing.assert_close(predictor.weight_for(3.0), reached(3, 0.6) * change)
    predictor.look(change * math.nan, torch.ones(len(change)), 1.5)
    assert not predictor.weight_for(0.0).any()


@pytest.mark.parametrize("horizon", [0.0, 3.0])
def test_a_momentum_is_for_the_updates_that_it_was_made_for(horizon: float) -> None:
    """Before the first batch has ended, with pr2.horizon, and where batches have other numbers of mini-steps."""
    chunk = toy.ToyChunk(toy.toy_config())
    config = toy.preset("pr2", predictor="momentum", horizon=horizon)
    pr2 = attach(chunk, config, torch.optim.Adam(chunk.parameters(), lr=1e-2))
    assert pr2.predictor is not None
    for mini_steps in (4, 2, 3):
        data = begun(pr2, chunk, mini_steps)
        for done, batch in enumerate(data, start=1):
            train(pr2, chunk, [batch])
            if (mini_steps, done) != (4, 1) or horizon:  # of one mini-step nothing is predicted
                torch.testing.assert_close(pr2.predictor.weight_for(2.0), 2.0 * pr2.horizon.gate_updates())
        pr2.end_rollout()
        average = horizon or (mini_steps - 1) / 2
        torch.testing.assert_close(pr2.predictor.weight_LEH, average * pr2.horizon.gate_updates())


def test_a_learned_prediction_is_for_the_updates_that_it_was_learned_from() -> None:
    kind = {"target": "post", "score_function": "softmax", "betas": (0.9, 0.999), "eps": 1e-8}
    one, other = (LearnedPredictor(1, EXPERTS, HIDDEN, **kind, device=torch.device("cpu")) for _ in range(2))
    w_LEH = one.weight_LEH.normal_().clone()
    assert torch.equal(one.weight_for(3.0), w_LEH)  # not known yet, which is no reason for none
    one.end_batch(1.5, 9.0)
    one.end_batch(0.0, 9.0)  # one mini-step: nothing was learned
    torch.testing.assert_close(one.weight_for(3.0), 2.0 * w_LEH)
    other.load_state({**one.state()})
    torch.testing.assert_close(other.weight_for(3.0), 2.0 * w_LEH)
    other.load_state({name: part for name, part in one.state().items() if name != "weight_horizon"})
    assert torch.equal(other.weight_for(3.0), w_LEH)


@pytest.mark.parametrize("predictor", ["momentum", "learned+momentum", "lookahead"])
@pytest.mark.parametrize("horizon", [0.0, 3.0])
def test_what_the_actor_records_is_predicted_for_each_sequences_own_updates(predictor: str, horizon: float) -> None:
    """Of four mini-steps it was made, for two it is used."""
    chunk = toy.ToyChunk(toy.toy_config())
    config = toy.preset("pr2", predictor=predictor, horizon=horizon, routes="actor", sample_fraction=1.0)
    pr2 = attach(chunk, config, torch.optim.Adam(chunk.parameters(), lr=1e-2))
    assert pr2.predictor is not None
    train(pr2, chunk, data := begun(pr2, chunk, 4, known=True))
    if predictor == "lookahead":
        look(pr2, chunk, data)
    pr2.end_rollout()
    wanted = [pr2.predictor.weight_for(float(updates)).clone() for updates in range(2)]
    if isinstance(pr2.predictor, LearnedMomentumPredictor):  # what is learned knows nothing of pr2.horizon
        learned, momentum = pr2.predictor.learned.weight_LEH, pr2.predictor.momentum.weight_LEH
        torch.testing.assert_close(wanted[1], learned / 1.5 + momentum / (horizon or 1.5))
    parts = pr2.predictor.momentum_for(1.0)
    begun(pr2, chunk, 2, known=True)
    (push,), shares = pr2.measurement.pushes.in_use, pr2.measurement._horizon
    assert shares is not None
    for sequence, w_LEH in enumerate(wanted):
        own = float(shares[pr2.tokens.span(sequence).start])
        torch.testing.assert_close(own * push.w_LEH, w_LEH)
        if push.momentum_LEH is not None and parts is not None:
            torch.testing.assert_close(own * push.momentum_LEH, sequence * parts)


def rolled_out(config: PR2Config, *, watch: bool = False) -> tuple[PR2, toy.ToyChunk, list[toy.Batch]]:
    """A toy after one batch with two mini-steps, which may be watched."""
    chunk = toy.ToyChunk(toy.toy_config())
    pr2 = attach(chunk, config, torch.optim.Adam(chunk.parameters(), lr=1e-2))
    data = begun(pr2, chunk, 2)
    train(pr2, chunk, data, watch=watch)
    return pr2, chunk, data


def begun(pr2: PR2, chunk: toy.ToyChunk, mini_steps: int, *, known: bool = False) -> list[toy.Batch]:
    """A rollout batch up to its log-prob pass, with a sequence for each mini-step, which it may know."""
    lengths = {number: 12 - number for number in range(mini_steps)}
    tables = toy.random_tables(lengths, chunk.config) if pr2.config.routes == "engine" else None
    told = [replace(s, mini_step=s.id + 1) if known else s for s in toy.sequences(lengths, tables)]
    pr2.begin_rollout(told)
    data = toy.batches(lengths, 1)
    toy.old_logprobs(pr2, chunk, data)
    return data


def train(pr2: PR2, chunk: toy.ToyChunk, data: list[toy.Batch], *, watch: bool = False) -> None:
    """A mini-step with each of them."""
    for batch in data:
        pr2.optimizer.zero_grad()
        with pr2.actor_update([batch.micro_batch], watched=[batch.micro_batch] if watch else []) as session:
            session.begin(chunk, batch.micro_batch)
            chunk(batch.inputs_SBH).square().sum().backward()
        pr2.optimizer.step()
        pr2.step()


def look(pr2: PR2, chunk: toy.ToyChunk, data: list[toy.Batch]) -> None:
    def forward(session: ReplaySession) -> None:
        for batch in data:
            session.begin(chunk, batch.micro_batch)
            chunk(batch.inputs_SBH)

    pr2.look_ahead([batch.micro_batch for batch in data], forward)


def test_gates_are_made_for_a_horizon(caplog: pytest.LogCaptureFixture) -> None:
    """With horizon 0 they are the policy's own, bit by bit; the others are told apart by it, and each is judged by its own."""
    pr2, chunk, data = rolled_out(toy.preset("pr2", predictor="lookahead"))
    look(pr2, chunk, data)
    pr2.end_rollout()
    gates = {f"model.layers.{site.layer}.mlp.gate.weight": site.router.weight.detach().clone() for site in pr2.sites}
    pushed = {h: dict(pr2.engine_weights(gates.items(), version=7, horizon=h)) for h in (0.0, 1.0, None)}
    for site, (name, gate) in zip(pr2.sites, gates.items(), strict=True):
        assert torch.equal(pushed[0.0][name], gate)
        assert not torch.equal(pushed[1.0][name], gate)
        kept = pr2.measurement.pushes.kept
        for horizon, weights in pushed.items():
            push = kept.find(7, horizon)
            assert push is not None
            assert torch.equal(push.arrived[site.local], weights[name])
    lengths = {0: 12, 1: 9}
    told = [replace(s, horizon=float(s.id)) for s in toy.sequences(lengths, toy.random_tables(lengths, pr2.model_config))]
    pr2.begin_rollout(told, version=7)
    assert [push.horizon for push in pr2.measurement.pushes.in_use] == [0.0, 1.0]
    assert pr2.measurement.pushes.of_token.tolist() == [0] * 12 + [1] * 9
    assert "look_ahead()" not in caplog.text


def test_a_forgotten_look_ahead_is_said(caplog: pytest.LogCaptureFixture) -> None:
    pr2, _, _ = rolled_out(toy.preset("pr2", predictor="lookahead"))
    with caplog.at_level(logging.WARNING):
        pr2.end_rollout()
    assert "no look_ahead() in this rollout batch" in caplog.text


def test_what_was_watched_is_run_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under the model's own weights; the logits' shift since the last update is what the regression gets."""
    pr2, chunk, data = rolled_out(toy.preset("pr2", predictor="lookahead"), watch=True)
    fitted: dict[str, list[Tensor]] = {}

    def fit(inputs: list[Tensor], shifts: list[Tensor], *_: object) -> Tensor:
        fitted.update(inputs=inputs, shifts=shifts)
        return ridge_fit(inputs, shifts, 1e-2, None)

    monkeypatch.setattr("megatron_pr2.prediction.lookahead.ridge_fit", fit)
    monkeypatch.setattr("megatron_pr2.prediction.lookahead.swapped_in", None)
    assert pr2._look is not None
    (rows,) = (each.clone() for each in pr2._look._rows.values())
    logits_then = [each.clone() for each in pr2._look._logits.values()]
    logits_now: list[Tensor] = []
    for site in pr2.sites:
        gating = site.router.gating
        monkeypatch.setattr(site.router, "gating", lambda h, gating=gating: logits_now.append(gating(h)) or logits_now[-1])
    look(pr2, chunk, data[-1:])
    updates_LEH = pr2.horizon.gate_updates()
    assert len(logits_now) == len(pr2.sites)
    for layer, (then_SE, now_TE) in enumerate(zip(logits_then, logits_now, strict=True)):
        y_SE = now_TE.detach().view(-1, EXPERTS)[rows] - then_SE - fitted["inputs"][layer] @ updates_LEH[layer].t()
        torch.testing.assert_close(fitted["shifts"][layer], y_SE - y_SE.mean(-1, keepdim=True), rtol=1e-4, atol=1e-5)
        assert bool(y_SE.abs().max() > 1e-4) == (layer > 0)  # the first one's inputs stay
    assert not pr2._look._inputs


def test_what_was_watched_before_another_update_is_not_used() -> None:
    pr2, chunk, _ = rolled_out(toy.preset("pr2", predictor="lookahead"), watch=True)
    assert pr2._look is not None
    assert pr2._look._inputs
    pr2.end_rollout()
    assert not pr2._look._inputs
    for watch, batch in zip((True, False), begun(pr2, chunk, 2), strict=True):
        train(pr2, chunk, [batch], watch=watch)
        assert bool(pr2._look._inputs) == watch


def test_other_predictors_do_not_look_ahead() -> None:
    pr2, chunk, data = rolled_out(toy.preset("pr2", predictor="momentum"))
    with pytest.raises(AttachError, match="predictor='momentum' is not made by a look-ahead"):
        look(pr2, chunk, data)


def test_what_would_undo_it_is_refused() -> None:
    chunk = toy.ToyChunk(toy.toy_config())
    chunk.ddp_config = SimpleNamespace(overlap_param_gather=True)
    with pytest.raises(AttachError, match="overlap_param_gather=True"):
        attach(chunk, toy.preset("pr2", predictor="lookahead"))


def _saved_and_loaded(directory: str, predictor: str) -> list[dict[float | None, Tensor]]:
    """W_p for some horizons of a handle, and of one that has run another batch and loads what the first one saved."""
    host.init()
    found = []
    for mini_steps in (2, 4):
        config = toy.preset("pr2", predictor=predictor, sample_fraction=1.0)
        pr2, chunk, data = rolled_out(config)
        pr2.end_rollout()
        train(pr2, chunk, data := begun(pr2, chunk, mini_steps))
        if predictor == "lookahead":
            look(pr2, chunk, data)
        if mini_steps == 2:
            pr2.end_rollout()
            pr2.save(directory)
        else:
            pr2.load(directory)
            pr2.end_rollout()
        assert pr2.predictor is not None
        found.append({horizon: pr2.predictor.weight_for(horizon).clone() for horizon in (None, 0.5, 2.0)})
    return found


@pytest.mark.parametrize("predictor", ["lookahead", "learned", "momentum", "learned+momentum"])
def test_a_checkpoint_keeps_a_prediction_and_what_it_is_made_for(predictor: str, tmp_path: Path) -> None:
    ((saved, loaded),) = pool(1).run(_saved_and_loaded, str(tmp_path / "pr2"), predictor)
    torch.testing.assert_close(saved[0.5], saved[None])
    assert not torch.equal(saved[2.0], saved[None])
    for horizon, w_LEH in saved.items():
        assert w_LEH.any()
        assert torch.equal(loaded[horizon], w_LEH)


def _resumed(directory: str) -> tuple[Tensor, Tensor, list[bool]]:
    """(W_p of a look-ahead, and of one after a resume from before it; whether those that resumed know that it has run)"""
    host.init()
    pr2, chunk, data = rolled_out(toy.preset("pr2", predictor="lookahead"))
    pr2.save(f"{directory}/before", rollout=True)
    look(pr2, chunk, data)
    pr2.save(f"{directory}/after", rollout=True)
    assert pr2.predictor is not None
    optimizer, expected, looked = pr2.optimizer, pr2.predictor.weight_LEH, []
    for name in ("after", "before"):
        pr2.detach()
        pr2 = attach(chunk, pr2.config, optimizer)
        pr2.load(f"{directory}/{name}", sequences=[0, 1])
        looked.append(pr2.progress.looked)
    look(pr2, chunk, data)
    assert pr2.predictor is not None
    return expected, pr2.predictor.weight_LEH, looked


def test_it_looks_as_far_after_a_resume(tmp_path: Path) -> None:
    ((expected, found, looked),) = pool(1).run(_resumed, str(tmp_path))
    assert expected.any()
    assert torch.equal(found, expected)
    assert looked == [True, False]


@pytest.mark.parametrize("mini_steps", [0, 1])
@pytest.mark.parametrize("horizon", [0.0, 2.0])
def test_a_look_ahead_over_no_update_is_said(mini_steps: int, horizon: float, caplog: pytest.LogCaptureFixture) -> None:
    pr2, chunk, _ = rolled_out(toy.preset("pr2", predictor="lookahead", horizon=horizon))
    train(pr2, chunk, (data := begun(pr2, chunk, 2))[:mini_steps])
    caplog.clear()
    for _ in range(2):
        look(pr2, chunk, data)
    assert pr2.predictor is not None
    assert bool(pr2.predictor.weight_LEH.any()) == bool(horizon)
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(said) == (not horizon)
    assert all(f"look_ahead() after {mini_steps} mini-steps of this rollout batch, and pr2.horizon is 0" in line for line in said)


def test_what_is_not_finite_starts_over(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    pr2, chunk, data = rolled_out(toy.preset("pr2", predictor="lookahead"))
    monkeypatch.setattr("megatron_pr2.prediction.lookahead.ridge_fit", lambda inputs, *_: torch.full((2, EXPERTS, 32), math.inf))
    with caplog.at_level(logging.WARNING):
        look(pr2, chunk, data)
    assert pr2.predictor is not None
    assert not pr2.predictor.weight_LEH.any()
    assert "not finite" in caplog.text
