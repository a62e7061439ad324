"""W_p: closed-form gradient, direction of the KL, its own optimizer, reduction over ranks, merged gates."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_utils import compute_routing_scores_for_aux_loss
from torch import Tensor

from megatron_pr2.prediction.learned import LearnedPredictor, gradient_sum, matching_logits
from megatron_pr2.prediction.predictor import shift_logits
from megatron_pr2.prediction.rounding import merge_gate
from megatron_pr2.replay.hook import knows_score_function
from megatron_pr2.replay.scores import SCORE_FUNCTIONS, divergence_gradient, divergence_terms, score
from tests.helpers.distributed import pool
from tests.helpers.divergence import kl
from tests.helpers.rounding import assert_near, rounding

S, E, H = 11, 6, 5


def divergence(target_SE: Tensor, prediction_SE: Tensor, score_function: str) -> Tensor:
    """Per token."""
    return divergence_terms(target_SE, prediction_SE, score_function)[1].sum(-1)


def features(dtype: torch.dtype = torch.float64, tokens: int = S, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(h_old, p_old, p, W_p)."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((tokens, H), (tokens, E), (tokens, E), (E, H))
    h, p_old, p, w = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)
    return h, p_old, p, w


@pytest.mark.parametrize("score_function", SCORE_FUNCTIONS)
@pytest.mark.parametrize("target", ["post", "delta"])
def test_closed_form_gradient_is_autograd_of_the_mean_kl(target: str, score_function: str) -> None:
    h, p_old, p, w = features()
    w.requires_grad_(True)
    post = target == "post"
    loss = kl(p, p_old + h @ w.t(), score_function).mean() if post else kl(p - p_old, h @ w.t(), "softmax").mean()
    (expected,) = torch.autograd.grad(loss, w)
    actual = gradient_sum(h, p_old, p, shift_logits(h, w.detach()), target=target, score_function=score_function) / S
    assert_near(actual, expected, S * E)


@pytest.mark.parametrize("score_function", SCORE_FUNCTIONS)
def test_the_divergence_is_forward_kl(score_function: str) -> None:
    """KL(rho || q_hat), not the reverse, which one implementation shipped."""
    _, p_old, p, _ = features()
    assert_near(divergence(p, p_old, score_function), kl(p, p_old, score_function), E)
    assert (divergence(p, p_old, score_function) - kl(p_old, p, score_function)).abs().min() > 1e-3


def test_gradient_is_finite_for_extreme_logits() -> None:
    h, p_old, p, w = features(torch.float32)
    for function in SCORE_FUNCTIONS:
        gradient = gradient_sum(h, p_old * 1e4, p * 1e4, shift_logits(h, w), target="post", score_function=function)
        assert gradient.isfinite().all()
        assert divergence(p * 50, p_old * 50, function).isfinite().all()


@pytest.mark.parametrize("target", [-200.0, -60.0, -1.0, 3.0, 200.0])
@pytest.mark.parametrize("prediction", [-200.0, -60.0, -1.0, 3.0, 200.0])
def test_sqrtsoftplus_far_from_zero(target: float, prediction: float) -> None:
    """Where softplus underflows in fp32 its logarithm is the logit, and where it does not, all of it is fp64's to rounding."""
    wide = torch.tensor([[target]], dtype=torch.float64), torch.tensor([[prediction]], dtype=torch.float64, requires_grad=True)
    expected = kl(*wide, "sqrtsoftplus") if prediction < 100 > target else divergence(*wide, "sqrtsoftplus")
    (slope,) = torch.autograd.grad(expected.sum(), wide[1])
    narrow = [x.detach().float() for x in wide]
    scale = float(score(narrow[0], "sqrtsoftplus") + score(narrow[1], "sqrtsoftplus"))
    rounding = 16 * torch.finfo(torch.float32).eps
    tolerance = {"rtol": rounding, "atol": rounding * scale}
    torch.testing.assert_close(divergence(*narrow, "sqrtsoftplus").double(), expected.detach(), **tolerance)
    torch.testing.assert_close(divergence_gradient(*narrow, "sqrtsoftplus").double(), slope, **tolerance)


@pytest.mark.skipif(not knows_score_function("sqrtsoftplus"), reason="no router of this release has these scores")
def test_sqrtsoftplus_scores_are_megatrons() -> None:
    logits = 4.0 * torch.randn(64, E, generator=torch.Generator().manual_seed(0))
    own = score(logits, "sqrtsoftplus")
    map_SE, shares_SE = compute_routing_scores_for_aux_loss(logits, E, "sqrtsoftplus")[:2]
    assert map_SE.all()
    torch.testing.assert_close(own / own.sum(-1, keepdim=True), shares_SE)


def test_sqrtsoftplus_is_not_blind_to_a_common_scale() -> None:
    """Beside an expert bias the scale of the scores decides which experts are chosen; their shares do not tell it."""
    target = torch.tensor([[0.5, 1.0, 2.0]], dtype=torch.float64)
    prediction = torch.log(torch.expm1((2.0 * score(target, "sqrtsoftplus")).square()))  # the logits of twice the scores
    torch.testing.assert_close(score(prediction, "sqrtsoftplus"), 2.0 * score(target, "sqrtsoftplus"))
    assert divergence(target, prediction, "sqrtsoftplus") > 0.1
    assert (divergence_gradient(target, prediction, "sqrtsoftplus") > 0.0).all()


def test_unknown_names_are_refused() -> None:
    h, p_old, p, w = features()
    for call in (
        lambda: score(p, "tanh"),
        lambda: divergence(p, p_old, "tanh"),
        lambda: matching_logits(p_old, p, shift_logits(h, w), "both", "softmax"),
    ):
        with pytest.raises(ValueError, match="expected"):
            call()


def test_scores_are_fp32_whatever_the_routers_dtype() -> None:
    logits = torch.randn(4, E).bfloat16()
    assert score(logits, "softmax").dtype == torch.float32
    torch.testing.assert_close(score(logits, "softmax"), torch.softmax(logits.float(), -1), rtol=0, atol=0)


def make(layers: int = 2, **changes: Any) -> LearnedPredictor:
    settings: dict[str, Any] = {"target": "post", "score_function": "softmax", "betas": (0.9, 0.99), "eps": 1e-8}
    return LearnedPredictor(layers, E, H, **{**settings, **changes}, device=torch.device("cpu"))


def accumulate(predictor: LearnedPredictor, layer: int, h: Tensor, p_old: Tensor, p: Tensor) -> None:
    """What a training pass does: W_p h_old is computed once, for the metrics and for the gradient."""
    predictor.accumulate(layer, h, p_old, p, shift_logits(h, predictor.training_weight(layer)))


def test_step_is_adam_on_the_token_mean_of_each_layer() -> None:
    predictor = make()
    reference = torch.zeros(2, E, H, requires_grad=True)
    adam = torch.optim.Adam([reference], lr=0.3, betas=(0.9, 0.99), eps=1e-8)
    for step in range(3):
        grads = []
        for layer in range(2):
            parts = [features(torch.float32, tokens, seed=10 * step + i) for i, tokens in enumerate((4 + layer, 7))]
            for h, p_old, p, _ in parts:
                accumulate(predictor, layer, h, p_old, p)
            h, p_old, p = (torch.cat([part[i] for part in parts]).double() for i in range(3))
            w = reference[layer].detach().double().requires_grad_(True)
            grads.append(torch.autograd.grad(kl(p, p_old + h @ w.t(), "softmax").mean(), w)[0].float())
        reference.grad = torch.stack(grads)
        adam.step()
        report = predictor.step(0.3, None)
        bound = rounding(11 + 12, factor=32)  # Adam divides by what may be small
        torch.testing.assert_close(predictor.weight_LEH, reference.detach(), rtol=bound, atol=0.3 * bound)
        assert report["tokens"] == 11 + 12
        assert report["grad_norm"] == pytest.approx(float(reference.grad.norm()), rel=bound)
        assert report["weight_norm"] == pytest.approx(float(reference.detach().norm()), rel=bound)
        assert not predictor.grad_sum_LEH.any()
        assert not predictor.token_count_L.any()


def test_learning_lowers_the_kl() -> None:
    h, p_old, _, drift_EH = features(torch.float32, 200)
    p = p_old + 0.5 * h @ drift_EH.t()
    predictor = make(1)
    before = divergence(p, p_old, "softmax").mean()
    for _ in range(100):
        accumulate(predictor, 0, h, p_old, p)
        predictor.step(0.02, None)
    after = divergence(p, p_old + h @ predictor.weight_LEH[0].t(), "softmax").mean()
    assert after < 0.05 * before


def test_without_any_token_nothing_moves() -> None:
    predictor = make()
    h, p_old, p, _ = features(torch.float32)
    accumulate(predictor, 0, h, p_old, p)
    predictor.step(0.1, None)
    before = copy.deepcopy(predictor.state())
    report = predictor.step(0.1, None)
    assert report["tokens"] == 0.0
    assert report["grad_norm"] == 0.0
    after = predictor.state()
    assert before["step"].tolist() == [1.0, 1.0]
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_pipeline_rank_without_layers_steps_too() -> None:
    predictor = make(0)
    assert predictor.step(0.1, None) == {"tokens": 0.0, "grad_norm": 0.0, "weight_norm": 0.0}


def test_state_continues_with_the_same_numbers_and_the_current_learning_rate() -> None:
    """A checkpoint saved during warm-up must not bring its learning rate back (it stayed 0 for ever elsewhere)."""
    first, second = make(), make()
    h, p_old, p, _ = features(torch.float32)
    accumulate(first, 0, h, p_old, p)
    first.step(0.0, None)
    accumulate(first, 1, h, p_old, p)
    first.step(0.1, None)
    accumulate(second, 0, h, p_old, p)  # half a mini-step that the restore has to drop
    second.load_state(copy.deepcopy(first.state()))
    for predictor in (first, second):
        accumulate(predictor, 0, h, p_old, p)
        predictor.step(0.2, None)
    assert torch.equal(first.weight_LEH, second.weight_LEH)
    assert first.weight_LEH[0].abs().max() > 0.1


def reduce_job(parts: list[list[tuple[int, int]]]) -> tuple[Tensor, dict[str, float]]:
    """parts: per rank, (layer, tokens) pieces; seeds count over all ranks."""
    predictor = make()
    seed = sum(len(p) for p in parts[: dist.get_rank()])
    for i, (layer, tokens) in enumerate(parts[dist.get_rank()]):
        accumulate(predictor, layer, *features(torch.float32, tokens, seed=seed + i)[:3])
    report = predictor.step(0.1, dist.group.WORLD)
    return predictor.weight_LEH, report


@pytest.mark.parametrize("parts", [[[(0, 3), (1, 2)], [(0, 9)]], [[], [(0, 4), (1, 5)]], [[(1, 4)], []], [[], []]])
def test_reduction_over_ranks_is_the_single_process_result(parts: list[list[tuple[int, int]]]) -> None:
    """Also with ranks that hold no sampled token at all, which take part in the collective all the same."""
    results = pool(2).run(reduce_job, parts)
    predictor = make()
    for i, (layer, tokens) in enumerate([piece for part in parts for piece in part]):
        accumulate(predictor, layer, *features(torch.float32, tokens, seed=i)[:3])
    expected = predictor.step(0.1, None)
    for weight, report in results:
        bound = rounding(20, factor=32)
        torch.testing.assert_close(weight, predictor.weight_LEH, rtol=bound, atol=0.1 * bound)
        assert report == pytest.approx(expected, rel=bound)
    assert torch.equal(results[0][0], results[1][0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_zero_leaves_the_gate_as_it_is(dtype: torch.dtype) -> None:
    gate = torch.randn(E, H).to(dtype)
    merged = merge_gate(gate, torch.zeros(E, H))
    assert merged.dtype == dtype
    assert torch.equal(merged, gate)
    assert merged.data_ptr() != gate.data_ptr()


def test_merging_adds_in_fp32_and_rounds_once() -> None:
    gate = torch.full((64, 64), 1.0, dtype=torch.bfloat16)
    w = torch.full((64, 64), 2**-7 + 2**-9)  # a bf16 step of 1.0 and a quarter of one
    merged = merge_gate(gate, w).float()
    assert set(merged.unique().tolist()) == {1.0 + 2**-7, 1.0 + 2**-6}
    assert merge_gate(gate, w, torch.float32).unique().tolist() == [1.0 + 2**-7 + 2**-9]
    predictor = make(1)
    predictor.weight_LEH.fill_(0.25)
    torch.testing.assert_close(merge_gate(torch.ones(E, H), predictor.weight(0)), torch.full((E, H), 1.25), rtol=0, atol=0)
