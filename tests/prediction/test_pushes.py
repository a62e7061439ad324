"""What arrives of a prediction at the engine is what it is judged by: rounding, versions, and what is not finite."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_pr2.attach import PR2, attach
from megatron_pr2.errors import AttachError, RouteError
from megatron_pr2.prediction.predictor import BETAS, KEPT, push_bytes
from megatron_pr2.prediction.pushes import Push, Pushes, make_push
from megatron_pr2.prediction.rounding import merge_gate
from tests.helpers import toy
from tests.helpers.drifting import hold_back_of

pytestmark = pytest.mark.usefixtures("host_platform")

EXPERTS, HIDDEN = 128, 256
LENGTHS = {0: 40, 1: 30}


def gate(seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return (torch.randn(EXPERTS, HIDDEN, generator=torch.Generator().manual_seed(seed)) * 0.02).to(dtype)


def prediction(rms: float, seed: int = 1) -> Tensor:
    return torch.randn(EXPERTS, HIDDEN, generator=torch.Generator().manual_seed(seed)) * rms


def pushed(rms: float, dtype: torch.dtype | None = None, beta: float = 1.0, version: int | None = None) -> Push:
    return make_push(version, [0], [gate()], prediction(rms)[None], [beta], dtype=dtype, seed=7)


def model(dtype: torch.dtype = torch.float32, **settings: Any) -> tuple[toy.ToyChunk, PR2]:
    chunk = toy.ToyChunk(toy.toy_config(params_dtype=dtype))
    return chunk, attach(chunk, toy.preset("pr2", **{"sample_fraction": 1.0, "held_out_share": 0.5, **settings}))


def weights_of(pr2: PR2) -> list[tuple[str, Tensor]]:
    return [(f"model.layers.{site.layer}.mlp.gate.weight", site.router.weight.detach().clone()) for site in pr2.sites]


# ---- rounding --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rms", [1e-6, 5e-6, 4e-5])
def test_a_small_prediction_arrives_on_average(rms: float, dtype: torch.dtype) -> None:
    """In float64; rounding to nearest delivers 3, 14 and 81 % in bf16."""
    w, x = gate(dtype=dtype), prediction(rms)
    delta = merge_gate(w, x, seed=3).double() - w.double()
    share = float((delta * x.double()).sum() / x.double().square().sum())
    assert share == pytest.approx(1.0, abs=0.15)
    nearest = (w.float() + x).to(dtype).double() - w.double()
    if dtype == torch.bfloat16 and rms < 1e-5:
        assert float((nearest * x.double()).sum() / x.double().square().sum()) < 0.2


def test_rounding_is_to_a_neighbour_with_the_probability_of_the_remainder() -> None:
    w = torch.full((64, 1024), 1.0, dtype=torch.bfloat16)
    for sign, step in ((1.0, 2**-7), (-1.0, 2**-8)):  # below 1 the steps are half as long
        merged = merge_gate(w, torch.full(w.shape, sign * step / 4), seed=1).float()
        assert set(merged.unique().tolist()) == {1.0, 1.0 + sign * step}
        assert float((merged != 1.0).float().mean()) == pytest.approx(0.25, abs=0.01)


def test_rounding_depends_on_the_seed_and_the_layer_alone() -> None:
    w, x = gate(), prediction(5e-6)
    first = merge_gate(w, x, seed=1, layer=2)
    torch.manual_seed(99)
    assert torch.equal(merge_gate(w, x, seed=1, layer=2), first)
    assert not torch.equal(merge_gate(w, x, seed=2, layer=2), first)
    assert not torch.equal(merge_gate(w, x, seed=1, layer=3), first)


def test_fp32_gates_get_all_of_it() -> None:
    push = pushed(1e-6, torch.float32)
    assert push.arrived[0].dtype == torch.float32
    assert torch.equal(push.arrived[0], gate().float() + prediction(1e-6))
    assert push.delivered == [pytest.approx(1.0, abs=1e-4)]


def test_without_a_prediction_the_gates_are_the_policys_bit_by_bit() -> None:
    push = pushed(1e-6, beta=0.0)
    assert torch.equal(push.arrived[0].view(torch.int16), gate().view(torch.int16))
    assert math.isnan(push.delivered[0])
    assert not push.delta(0).any()


# ---- what is judged --------------------------------------------------------------------------------------------------


def test_candidates_are_what_a_push_of_each_beta_would_be() -> None:
    push, h = pushed(5e-6, beta=0.5), torch.randn(9, HIDDEN)
    push.make_candidates()
    shift_JSE = push.shifts(0, h)
    for beta, shift_SE in zip(BETAS[1:], shift_JSE, strict=True):
        arrived = pushed(5e-6, beta=beta).arrived[0]
        delta = arrived.double() - gate().double()
        torch.testing.assert_close(shift_SE.double(), h.double() @ delta.t(), rtol=1e-4, atol=1e-7)
    assert torch.equal(push.arrived[0], pushed(5e-6, beta=0.5).arrived[0])
    assert push._candidates
    push.forget_candidates()
    assert not push._candidates


def test_a_prediction_that_never_arrives_has_no_gain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under rounding to nearest, so that nothing arrives: every beta keeps exactly what beta = 0 keeps."""
    monkeypatch.setattr("megatron_pr2.prediction.pushes.merge_gate", lambda g, w, dtype=None, **_: (g.float() + w).to(g.dtype))
    _, pr2 = model(torch.bfloat16, hold_back=True)
    assert pr2.predictor is not None
    pr2.predictor.weight_LEH.normal_(0.0, 1e-7)
    h = torch.randn(5, toy.HIDDEN)
    push = pr2.measurement.pushes.push(1)
    push.make_candidates()
    assert not push.shifts(0, h).any()


def rolled_out(chunk: toy.ToyChunk, pr2: PR2, versions: dict[int, Any] | None = None, **told: Any) -> dict[str, Any]:
    """One rollout batch in which the gates drift, with one mini-step; its report."""
    data = toy.batches(LENGTHS, 2)
    sequences = toy.sequences(LENGTHS, toy.random_tables(LENGTHS, pr2.model_config))
    if versions is not None:
        sequences = [replace(sequence, versions=versions[sequence.id]) for sequence in sequences]
    pr2.begin_rollout(sequences, **told)
    toy.old_logprobs(pr2, chunk, data)
    toy.update(pr2, chunk, data, 2)
    counts = hold_back_of(pr2)._kept_LJ.clone() if pr2.measurement.hold_back is not None else None
    return {**pr2.step(0.0), "counts": counts}


def push_of(pr2: PR2, scale: float, version: Any = None, seed: int = 0, **how: Any) -> None:
    """Pushes a random prediction."""
    assert pr2.predictor is not None
    torch.manual_seed(seed)
    pr2.predictor.weight_LEH.normal_(0.0, 1.0).mul_(scale)
    list(pr2.engine_weights(weights_of(pr2), version=version, **how))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_step_off_is_judged_by_the_push_that_it_was_rolled_out_with(dtype: torch.dtype) -> None:
    """push v1, push v2, begin(v1): as if v2 had never been; begin without a version is judged by v2."""
    found = {}
    for name, later, told in (("only v1", False, {}), ("v1 of two", True, {"version": 1}), ("newest", True, {})):
        chunk, pr2 = model(dtype, hold_back=True)
        hold_back_of(pr2).beta = [1.0] * toy.LAYERS
        push_of(pr2, 0.3, version=1, seed=1)
        if later:
            push_of(pr2, 0.3, version=2, seed=2)
        found[name] = rolled_out(chunk, pr2, **told)
    assert torch.equal(found["v1 of two"]["counts"], found["only v1"]["counts"])
    assert found["v1 of two"]["drift"]["kl_predicted"] == found["only v1"]["drift"]["kl_predicted"]
    assert found["v1 of two"]["delivered"] == found["only v1"]["delivered"]
    assert not torch.equal(found["newest"]["counts"], found["only v1"]["counts"])
    assert found["newest"]["drift"]["kl_predicted"] != found["only v1"]["drift"]["kl_predicted"]


def test_kl_predicted_is_that_of_the_gates_as_pushed() -> None:
    """From the definition, in float64."""
    chunk, pr2 = model(torch.bfloat16, hold_back=False)
    push_of(pr2, 0.01, version="a")
    (push,) = (pr2.measurement.pushes.kept.find("a"),)
    assert push is not None
    assert not torch.equal(push.delta(0), push.w_LEH[0])
    report = rolled_out(chunk, pr2, version="a")
    h_LSH, p_LSE = (pr2.features.segments[0].h_LSH, pr2.features.segments[0].p_LSE)
    rho = torch.log_softmax(p_LSE[0].double(), -1)  # nothing has drifted
    q_hat = torch.log_softmax(p_LSE[0].double() + h_LSH[0].double() @ push.delta(0).double().t(), -1)
    expected = (rho.exp() * (rho - q_hat)).sum(-1).mean()
    assert report["drift"]["kl_predicted"][0] == pytest.approx(float(expected), rel=1e-3)


def test_tokens_of_several_versions_are_judged_each_by_theirs() -> None:
    """Two sequences of two pushes count as each alone under its own; half a sequence of each as well."""
    counts = {}
    spans = {s.id: s.loss_stop - s.loss_start for s in toy.sequences(LENGTHS, None)}
    mixed = {0: [1] * spans[0], 1: [2] * spans[1]}
    split = {sid: [1] * (n // 2) + [2] * (n - n // 2) for sid, n in spans.items()}
    cases: dict[str, dict[int, Any]] = {"mixed": mixed, "split": split}
    for wanted in (1, 2):  # the rest is of an unknown version
        for name, by_sequence in (("mixed", mixed), ("split", split)):
            only = {sid: [v if v == wanted else 99 for v in versions] for sid, versions in by_sequence.items()}
            cases[f"{name} {wanted}"] = only
    for name, versions in cases.items():
        chunk, pr2 = model(hold_back=True)
        hold_back_of(pr2).beta = [1.0] * toy.LAYERS
        push_of(pr2, 0.3, version=1, seed=1)
        push_of(pr2, 0.3, version=2, seed=2)
        report = rolled_out(chunk, pr2, {sid: np.array(v) for sid, v in versions.items()})
        counts[name] = report["counts"]
        assert report["unjudged"] == sum(v == 99 for vs in versions.values() for v in vs)
    for name in ("mixed", "split"):
        assert torch.equal(counts[name], counts[f"{name} 1"] + counts[f"{name} 2"])
        assert counts[f"{name} 1"][:, -1].min() > 0


@pytest.mark.parametrize("versions", [("9", "10"), (2, 1), ("b", "a")])
def test_the_newest_is_what_was_pushed_last_by_any_name(versions: tuple[Any, Any], caplog: pytest.LogCaptureFixture) -> None:
    """Of sequences that say their versions themselves; -1 among text, and an array of it, are no version."""
    _, pr2 = model()
    older, newer = versions
    push_of(pr2, 0.3, version=older, seed=1)
    push_of(pr2, 0.3, version=newer, seed=2)
    sequences = toy.sequences(LENGTHS, toy.random_tables(LENGTHS, pr2.model_config))
    spans = [s.loss_stop - s.loss_start for s in sequences]
    told = [[newer] * (spans[0] - 2) + [older, -1], [older] * (spans[1] - 1) + [-1]]
    pushes = pr2.measurement.pushes
    for given in (told, [np.array(each, dtype=object if older == "b" else None) for each in told]):
        pr2.begin_rollout([replace(s, versions=v) for s, v in zip(sequences, given, strict=True)])
        assert [push.version for push in pushes.in_use] == [older, newer]
        of_token = [pushes.of_token[pr2.tokens.span(s.id)][s.loss_start : s.loss_stop] for s in sequences]
        assert of_token[0][:-1].tolist() == [1] * (spans[0] - 2) + [0]
        assert of_token[1][:-1].tolist() == [0] * (spans[1] - 1)
        assert pushes.unjudged == 0
    assert "none of the last pushes" not in caplog.text
    if versions[0] == "9":  # text is no number
        pr2.begin_rollout([replace(sequences[0], versions=[9] * spans[0])])
        assert not pushes.in_use
        assert "versions [9], which are none of the last pushes ['9', '10']" in caplog.text


def test_an_unknown_version_is_counted_said_and_not_judged(caplog: pytest.LogCaptureFixture) -> None:
    chunk, pr2 = model(hold_back=True)
    push_of(pr2, 0.3, version=1)
    report = rolled_out(chunk, pr2, version=5)
    assert report["unjudged"] == pr2.metrics()["pr2/unjudged"] == pr2.feature_plan.sampled_tokens
    assert not report["counts"].any()
    assert report["drift"]["kl_predicted"] == report["drift"]["kl_frozen"]
    assert all(map(math.isnan, report["delivered"]))
    assert "versions [5], which are none of the last pushes [1]" in caplog.text


def test_versions_of_another_length_are_refused() -> None:
    _, pr2 = model()
    (first, *rest) = toy.sequences(LENGTHS, toy.random_tables(LENGTHS, pr2.model_config))
    with pytest.raises(RouteError, match=r"sequence 0: versions has shape \[3\]"):
        pr2.begin_rollout([replace(first, versions=[1, 2, 3]), *rest])


# ---- what is kept ----------------------------------------------------------------------------------------------------


def test_the_last_pushes_are_kept() -> None:
    kept = Pushes()
    for version in range(KEPT + 2):
        kept.add(pushed(1e-6, version=version))
    assert kept.versions == list(range(2, KEPT + 2))
    assert kept.find(None) is kept.newest is kept.find(KEPT + 1)
    assert kept.find(0) is None
    again = kept.add(pushed(2e-6, version=3))
    assert kept.newest is again is kept.find(3)
    assert len(kept.versions) == KEPT
    kept.add(pushed(1e-6, version=2))
    assert kept.versions == [4, 3, 2]
    assert kept.newest is kept.find(2)
    kept.add(replace(pushed(1e-6, version=4), horizon=1.0))
    kept.add(pushed(1e-6, version=5))
    assert kept.versions == [2, 4, 5], "a version is as new as its last push"


def test_a_push_without_a_version_is_the_last_one_where_nothing_changed() -> None:
    """An actor that scores the probe of a handshake has the gates that were pushed, in their dtype."""
    _, pr2 = model(torch.bfloat16)
    push_of(pr2, 0.01, version=3)
    with pr2.merged_gates():
        assert all(torch.equal(site.router.weight, arrived) for site, arrived in zip(pr2.sites, newest(pr2).arrived, strict=True))
    assert pr2.measurement.pushes.kept.versions == [3]
    pr2.sites[0].router.weight.data.add_(1.0)
    with pr2.merged_gates():
        pass
    assert pr2.measurement.pushes.kept.versions == [3, None]


def test_a_bf16_model_runs_with_the_fp32_gates_that_an_engine_has() -> None:
    chunk, pr2 = model(torch.bfloat16)
    assert pr2.predictor is not None
    pr2.predictor.weight_LEH.normal_(0.0, 0.01)
    list(pr2.engine_weights(weights_of(pr2), version=1, gate_dtype=torch.float32))
    h = torch.randn(3, 1, toy.HIDDEN, dtype=torch.bfloat16)
    plain = chunk(h)
    with pr2.merged_gates():
        assert {site.router.weight.dtype for site in pr2.sites} == {torch.float32}
        merged = chunk(h)
    assert {site.router.weight.dtype for site in pr2.sites} == {torch.bfloat16}
    assert not torch.equal(merged, plain)
    assert torch.equal(chunk(h), plain)


@pytest.mark.parametrize("version", [None, 1])
def test_an_engine_in_another_dtype_is_judged_by_what_it_got(version: int | None, caplog: pytest.LogCaptureFixture) -> None:
    """Of the same gates and prediction: the actor takes them as the engine has them, another push to an engine is its own."""
    _, pr2 = model(torch.bfloat16)
    push_of(pr2, 0.01, version=1, gate_dtype=torch.float32)
    first = newest(pr2)
    with pr2.merged_gates(version):
        assert all(site.router.weight is not None and site.router.weight.dtype == torch.float32 for site in pr2.sites)
    assert newest(pr2) is first
    assert not caplog.text
    sent = dict(pr2.engine_weights(weights_of(pr2), version=version))
    assert newest(pr2) is not first
    assert all(torch.equal(tensor, kept) for tensor, kept in zip(sent.values(), newest(pr2).arrived, strict=True))
    assert newest(pr2).dtypes == {torch.bfloat16}
    assert ("gates of version 1 are pushed in torch.bfloat16, and were pushed in torch.float32" in caplog.text) == (version == 1)


def newest(pr2: PR2) -> Push:
    push = pr2.measurement.pushes.kept.newest
    assert push is not None
    return push


def test_bytes_are_as_planned_for_every_version_and_horizon() -> None:
    chunk, pr2 = model(torch.bfloat16, predictor="lookahead", hold_back=True)
    pr2.optimizer = torch.optim.Adam(chunk.parameters())
    lengths, horizons = {0: 12, 1: 9}, (0.0, 1.0)
    for version in range(KEPT + 1):
        for horizon in horizons:
            push_of(pr2, 0.1, version=version, horizon=horizon)
    sequences = toy.sequences(lengths, toy.random_tables(lengths, pr2.model_config))
    pr2.begin_rollout([replace(s, horizon=horizons[s.id]) for s in sequences], version=KEPT)
    kept = list(pr2.measurement.pushes.kept._kept.values())
    assert len(kept) == KEPT * len(horizons)
    # A hold-back of 0 pushes W itself, once.
    pairs = [pair for push in kept for pair in zip(push.gates, push.arrived, strict=True)]
    twice = sum(gate.nbytes for gate, arrived in pairs if arrived is gate)
    planned = push_bytes(toy.LAYERS, toy.EXPERTS, toy.HIDDEN, "lookahead", hold_back=True, horizons=len(horizons))
    old = sum(site.router.weight.nbytes for site in pr2.sites)  # of the log-prob pass
    assert sum(push.nbytes for push in kept) + twice + old == planned


def test_bytes_are_as_planned() -> None:
    predictor = torch.zeros(2, EXPERTS, HIDDEN).normal_(0.0, 1e-5)
    push = make_push(1, [0, 1], [gate(), gate(1)], predictor, [1.0, 0.5], dtype=None, seed=0)
    old, of_one = sum(each.nbytes for each in push.gates), push.nbytes
    assert KEPT * of_one + old == push_bytes(2, EXPERTS, HIDDEN, "learned", hold_back=False)
    push.make_candidates()
    assert (KEPT - 1) * of_one + push.nbytes + old == push_bytes(2, EXPERTS, HIDDEN, "learned", hold_back=True)
    assert push_bytes(2, EXPERTS, HIDDEN, "none", hold_back=True) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gate_dtype", [None, torch.float32])
def test_the_record_is_what_was_sent_bit_by_bit(dtype: torch.dtype, gate_dtype: torch.dtype | None) -> None:
    _, pr2 = model(dtype)
    assert pr2.predictor is not None
    pr2.predictor.weight_LEH.normal_(0.0, 0.01)
    sent = dict(pr2.engine_weights(weights_of(pr2), version=1, gate_dtype=gate_dtype))
    for (_, arrived), kept in zip(sent.items(), newest(pr2).arrived, strict=True):
        assert arrived.dtype == kept.dtype == (gate_dtype or dtype)
        assert torch.equal(arrived, kept)


def test_gates_that_were_rounded_elsewhere_are_refused() -> None:
    _, pr2 = model()
    with pytest.raises(AttachError, match=r"gate.weight comes in torch.bfloat16, the router has torch.float32"):
        list(pr2.engine_weights((name, tensor.bfloat16()) for name, tensor in weights_of(pr2)))


def test_little_that_arrives_is_said_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_pr2.prediction.pushes.merge_gate", lambda g, w, dtype=None, **_: (g.float() + w).to(g.dtype))
    kept = Pushes()
    with caplog.at_level(logging.WARNING):
        kept.add(pushed(1e-6, version=1))
        kept.add(pushed(1e-6, version=2))
    assert caplog.text.count("of the prediction reach the engine in MoE layer 0 (1 of 1 are below 50 %)") == 1
    assert "pushed in bfloat16" in caplog.text
    assert "gate_dtype=torch.float32" in caplog.text
    assert kept.newest is not None
    assert kept.newest.delivered[0] < 0.1


# ---- what is not finite ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_not_pushed(bad: float) -> None:
    """Also without hold-back; the weights that others export are walked to the end where other ranks are in the middle of it."""
    _, pr2 = model()
    assert pr2.predictor is not None
    pr2.predictor.weight_LEH[1, 2, 3] = bad
    with pytest.raises(AttachError, match=r"engine_weights: .* MoE layers \[1\] is not finite"):
        pr2.engine_weights(weights_of(pr2))
    with pytest.raises(AttachError, match=r"MoE layers \[1\] is not finite"):
        pr2.merged_gates()
    passed: list[str] = []

    def walked() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in weights_of(pr2):
            passed.append(name)
            yield name, tensor

    out = []
    with pytest.raises(AttachError, match="not finite"):
        out += [tensor for _, tensor in pr2.engine_weights(walked(), own_stage=True)]
    assert len(passed) == toy.LAYERS
    assert pr2.measurement.pushes.kept.newest is None
    sequences = toy.sequences(LENGTHS, toy.random_tables(LENGTHS, pr2.model_config))
    assert all(pr2.measurement.pushes.older(sequences, None))


def test_a_layer_that_is_not_finite_after_its_update_starts_over(caplog: pytest.LogCaptureFixture) -> None:
    chunk, pr2 = model()
    assert pr2.predictor is not None
    push_of(pr2, 0.1, version=1)
    pr2.predictor.weight_LEH[0, 0, 0] = math.nan
    report = rolled_out(chunk, pr2, version=1)
    assert not pr2.predictor.weight_LEH[0].any()
    assert pr2.predictor.weight_LEH[1].any()
    assert math.isfinite(report["predictor"]["weight_norm"])
    assert "MoE layers [0] is not finite after its update" in caplog.text
