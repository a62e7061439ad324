"""Advantages, the clipped loss and its off-policy corrections: closed forms, a loop in float64, autograd."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megatron_pr2.errors import ConfigError
from megatron_pr2.rl import losses
from megatron_pr2.rl.losses import DIAGNOSTIC_COLUMNS, LOSS_COLUMNS, group_advantages, policy_loss
from megatron_pr2.rl.rules import KINDS, LEVELS
from tests.helpers.rounding import assert_near, rounding

LOW, HIGH = 0.2, 0.28
CLIP = {"clip_low": LOW, "clip_high": HIGH}
CAP, FLOOR = 1.6, 0.7
SETTINGS = [("none", "token"), *((kind, level) for kind in ("tis", "mis") for level in LEVELS)]


def tokens(seed: int, rows: int, columns: int, *, spread: float = 0.6) -> dict[str, Tensor]:
    """Log-probs under three policies that are not far apart, advantages and a mask."""
    rng = np.random.default_rng(seed)
    mu = -rng.exponential(1.0, (rows, columns))
    prox = mu + rng.normal(0.0, spread, mu.shape)
    arrays = {
        "logprobs": prox + rng.normal(0.0, 0.3, mu.shape),
        "prox_logprobs": prox,
        "rollout_logprobs": mu,
        "advantages": rng.standard_normal(mu.shape),
        "mask": rng.random(mu.shape) < 0.7,
    }
    # Exact in fp32, so that both sides see the same numbers.
    return {name: torch.from_numpy(array.astype(np.float32)) for name, array in arrays.items()}


def loop(data: dict[str, Tensor], kind: str, level: str) -> dict[str, Any]:
    """The module's equations (of the loss DAPO's Eq. 10) token by token, in float64, with the gradient of log theta."""
    x = {name: tensor.double().numpy() for name, tensor in data.items()}
    sums, told = dict.fromkeys(LOSS_COLUMNS, 0.0), dict.fromkeys(DIAGNOSTIC_COLUMNS, 0.0)
    gradient, extremes = np.zeros(x["mask"].shape), [math.inf, -math.inf]
    for b in range(len(gradient)):
        bearing = np.flatnonzero(x["mask"][b])
        log_ratios = {t: x["prox_logprobs"][b, t] - x["rollout_logprobs"][b, t] for t in bearing}
        for t in bearing:
            ratio = math.exp(log_ratios[t] if level == "token" else sum(log_ratios.values()) / len(bearing))
            kept = kind != "mis" or FLOOR <= ratio <= CAP
            weight = {"none": 1.0, "tis": min(ratio, CAP), "mis": ratio * kept}[kind]
            outside = not kept or (kind == "tis" and ratio > CAP)
            kl = math.exp(log_ratios[t]) - 1 - log_ratios[t]
            for name, value in zip(DIAGNOSTIC_COLUMNS, (1, weight, weight**2, outside, kl), strict=True):
                told[name] += value
            if not kept:
                continue
            advantage, r = x["advantages"][b, t], math.exp(x["logprobs"][b, t] - x["prox_logprobs"][b, t])
            clipped = min(max(r, 1 - LOW), 1 + HIGH) * advantage
            values = (1, 1, -weight * min(r * advantage, clipped), clipped < r * advantage, 0, r, r**2, r - 1 - math.log(r), 1)
            for name, value in zip(LOSS_COLUMNS, values, strict=True):
                sums[name] += value
            gradient[b, t] = -weight * advantage * r if r * advantage <= clipped else 0.0
            extremes = [min(extremes[0], r), max(extremes[1], r)]
    return {"sums": sums, "diagnostics": told, "gradient": gradient, "extremes": extremes}


@pytest.mark.parametrize(("kind", "level"), SETTINGS)
@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(1, 3), columns=st.integers(1, 6))
def test_loss_gradient_and_statistics_are_the_loops(kind: str, level: str, seed: int, rows: int, columns: int) -> None:
    data = tokens(seed, rows, columns)
    expected = loop(data, kind, level)
    data["logprobs"].requires_grad_(True)
    loss, sums, extremes, diagnostics = losses.decoupled_loss(**data, **CLIP, kind=kind, level=level, cap=CAP, floor=FLOOR)
    loss.backward()
    bound = rounding(rows * columns, factor=32)
    scale = bound * max(1.0, expected["diagnostics"]["weight_squared"], expected["sums"]["ratio_squared"])
    assert loss.item() == pytest.approx(expected["sums"]["loss"], rel=bound, abs=scale)
    np.testing.assert_allclose(data["logprobs"].grad, expected["gradient"], rtol=bound, atol=bound)
    assert dict(zip(LOSS_COLUMNS, sums.tolist(), strict=True)) == pytest.approx(expected["sums"], rel=bound, abs=scale)
    said = dict(zip(DIAGNOSTIC_COLUMNS, diagnostics.tolist(), strict=True))
    assert said == pytest.approx(expected["diagnostics"], rel=bound, abs=bound)
    assert extremes.tolist() == pytest.approx(expected["extremes"], rel=rounding(16))


def one_token(ratio: float, advantage: float) -> tuple[float, float, float]:
    """(loss, clipped, gradient of the log-prob) of one token."""
    logprob = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    loss, sums, _ = policy_loss(
        logprob, torch.zeros(1, 1), torch.tensor([[advantage]]), torch.ones(1, 1), clip_low=LOW, clip_high=HIGH
    )
    loss.backward()
    return loss.item(), sums[LOSS_COLUMNS.index("clipped")].item(), logprob.grad.item()


@pytest.mark.parametrize(
    ("ratio", "advantage", "clipped"),
    [
        (1.25, 1.0, False),  # beyond 1 + clip_low, within 1 + clip_high: clip-higher
        (1.30, 1.0, True),
        (1.30, -1.0, False),
        (0.85, -1.0, False),
        (0.75, -1.0, True),
        (0.75, 1.0, False),
    ],
)
def test_the_range_is_asymmetric_and_one_sided(ratio: float, advantage: float, clipped: bool) -> None:
    loss, counted, gradient = one_token(ratio, advantage)
    assert counted == clipped
    assert gradient == pytest.approx(0.0 if clipped else -advantage * ratio, rel=rounding(2))
    bound = (1 + HIGH) if advantage > 0 else (1 - LOW)
    assert loss == pytest.approx(-advantage * (bound if clipped else ratio), rel=rounding(2))


def test_masked_positions_have_no_gradient_and_no_say() -> None:
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(3, 20, generator=generator) > 0.4
    values = [torch.randn(3, 20, generator=generator) for _ in range(3)]

    def results(logprobs: Tensor, old: Tensor, advantages: Tensor) -> tuple[Tensor, ...]:
        logprobs = logprobs.clone().requires_grad_(True)
        loss, sums, extremes = policy_loss(logprobs, old, advantages, mask.float(), **CLIP)
        loss.backward()
        return logprobs.grad, loss.detach(), sums, extremes

    plain = results(*values)
    assert (plain[0][mask] != 0).any()
    assert (plain[0][~mask] == 0).all()
    for changed in range(3):
        tampered = [value.clone() for value in values]
        tampered[changed][~mask] = 50.0
        assert all(map(torch.equal, plain, results(*tampered)))
        tampered[changed][mask] += 0.1
        assert not torch.equal(plain[0], results(*tampered)[0])


def test_groups_are_normalised_on_their_own() -> None:
    rewards = np.array([1.0, 0.0, 0.0, 1.0, 5.0, 1.0, 1.0, 1.0])
    advantages = group_advantages(rewards, 4)
    for group in (slice(0, 4), slice(4, 8)):
        part = rewards[group]
        expected = [(r - part.mean()) / (part.std() + 1e-6) for r in part]
        assert advantages[group] == pytest.approx(expected)
        assert advantages[group].std() == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1])
def test_groups_without_variance_carry_no_signal(reward: float) -> None:
    advantages = group_advantages(np.array([reward] * 3 + [0.0, 1.0, 0.0]), 3)
    assert np.abs(advantages[:3]).max() < rounding(3, dtype=torch.float64) / 1e-6  # 1e-6 is added to the deviation
    assert np.abs(advantages[3:]).min() > 0.5


# ---- corrections -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "level"), SETTINGS)
@given(seed=st.integers(0, 2**32 - 1), cap=st.floats(1.0, 10.0), floor=st.floats(0.0, 1.0))
def test_where_behaviour_is_proximal_it_is_the_plain_loss_bit_by_bit(
    kind: str, level: str, seed: int, cap: float, floor: float
) -> None:
    data = tokens(seed, 3, 5)
    data["rollout_logprobs"] = data["prox_logprobs"].clone()
    plain, decoupled = data["logprobs"].clone().requires_grad_(True), data["logprobs"].clone().requires_grad_(True)
    expected = policy_loss(plain, data["prox_logprobs"], data["advantages"], data["mask"], **CLIP)
    actual = losses.decoupled_loss(**{**data, "logprobs": decoupled}, **CLIP, kind=kind, level=level, cap=cap, floor=floor)
    for one, other in zip(expected, actual, strict=False):
        assert torch.equal(one, other)
    expected[0].backward()
    actual[0].backward()
    assert torch.equal(plain.grad, decoupled.grad)
    said = losses.diagnose(actual[3])
    if data["mask"].any():
        assert said == {"weight": 1.0, "outside": 0.0, "kl": 0.0, "effective_sample_size": 1.0}


@pytest.mark.parametrize(
    ("ratio", "truncated", "masked"),
    [(0.25, 0.25, 0.0), (0.5, 0.5, 0.5), (1.0, 1.0, 1.0), (1.5, 1.5, 1.5), (2.0, 2.0, 2.0), (2.5, 2.0, 0.0), (math.inf, 2.0, 0.0)],
)
def test_weights_of_one_ratio(ratio: float, truncated: float, masked: float) -> None:
    hair = rounding(2)
    log_ratio = torch.tensor([[math.log2(ratio)]]) * math.log(2.0)
    weights = losses.behaviour_weights(log_ratio, torch.ones(1, 1), kind="tis", cap=2.0).weights
    assert weights.item() == pytest.approx(truncated, rel=hair)
    # A bound that is met exactly is within: log and exp in fp32 are not exact, so the bounds give way by a hair.
    weights = losses.behaviour_weights(log_ratio, torch.ones(1, 1), kind="mis", floor=0.5 - hair, cap=2.0 + hair).weights
    assert weights.item() == pytest.approx(masked, rel=hair)


def test_the_expected_gradient_under_behaviour_is_the_proximal_policys() -> None:
    """All actions of one state, each as often as mu samples it: sum_a mu(a) w(a) A(a) grad log theta(a), at theta = prox.

    Without a correction it is another gradient; with a cap that bites it is biased towards zero, as it has to be.
    """
    generator = torch.Generator().manual_seed(0)
    mu_logits, logits, value = torch.randn(3, 1, 8, generator=generator)
    mu = torch.log_softmax(mu_logits, -1)

    def gradient(kind: str, cap: float) -> Tensor:
        theta = logits.clone().requires_grad_(True)
        log_theta = torch.log_softmax(theta, -1)
        loss, *_ = losses.decoupled_loss(
            log_theta, log_theta.detach(), mu, mu.exp() * value, torch.ones(1, 8), **CLIP, kind=kind, cap=cap
        )
        loss.backward()
        return theta.grad

    theta = logits.clone().requires_grad_(True)
    (-(torch.softmax(theta, -1) * value).sum()).backward()
    assert_near(gradient("tis", 1e9), theta.grad, 8)
    assert (gradient("none", 1e9) - theta.grad).norm() > 0.1 * theta.grad.norm()
    ratios = (torch.log_softmax(logits, -1) - mu).exp()
    assert ratios.max() > 2.0, "the cap does not bite"
    expected = torch.autograd.functional.jacobian(
        lambda x: -(mu.exp() * ratios.clamp(max=2.0) * value * torch.log_softmax(x, -1)).sum(), logits
    )
    assert_near(gradient("tis", 2.0), expected, 8)


def test_no_gradient_goes_through_a_weight() -> None:
    data = tokens(1, 2, 6)
    for name in ("logprobs", "rollout_logprobs"):
        data[name].requires_grad_(True)
    # Even where the proximal policy is the trained one itself, as in a trainer that forgot to detach it.
    log_ratio = losses.behaviour_log_ratio(data["logprobs"], data["rollout_logprobs"], data["mask"])
    for kind, level in SETTINGS:
        weighted = losses.behaviour_weights(log_ratio, data["mask"], kind=kind, level=level)
        assert not any(t.requires_grad for t in (weighted.weights, weighted.mask, weighted.outside))
    loss, *_ = losses.decoupled_loss(**data, **CLIP, kind="tis")
    loss.backward()
    assert data["rollout_logprobs"].grad is None
    weights = data["logprobs"].detach().clone().requires_grad_(True)
    loss, *_ = policy_loss(data["logprobs"], data["prox_logprobs"], data["advantages"], data["mask"], **CLIP, weights=weights)
    loss.backward()
    assert weights.grad is None


def test_a_sequence_goes_by_its_geometric_mean_over_the_tokens_that_bear_loss() -> None:
    log_ratio = torch.log(torch.tensor([[4.0, 1.0, 100.0], [8.0, 8.0, 1.0], [1.0, 1.0, 1.0]]))
    mask = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
    log_ratio = losses.behaviour_log_ratio(log_ratio, torch.zeros(3, 3), mask)
    means = losses.behaviour_weights(log_ratio, mask, kind="tis", level="sequence", cap=9.0).weights
    torch.testing.assert_close(means, torch.tensor([[2.0, 2.0, 1.0], [4.0, 4.0, 4.0], [1.0, 1.0, 1.0]]))
    kept = losses.behaviour_weights(log_ratio, mask, kind="mis", level="sequence", cap=3.0, floor=0.5)
    assert kept.mask.tolist() == [[1, 1, 0], [0, 0, 0], [0, 0, 0]]
    assert kept.outside.tolist() == [[0, 0, 0], [1, 1, 1], [0, 0, 0]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gap", [-500.0, 500.0])
def test_a_ratio_beyond_fp32_spoils_nothing(kind: str, gap: float) -> None:
    prox = torch.tensor([[-1.0, -1.0]])
    logprobs = torch.tensor([[-1.1, -0.9]], requires_grad=True)
    loss, sums, _, diagnostics = losses.decoupled_loss(
        logprobs, prox, prox - torch.tensor([[gap, 0.0]]), torch.ones(1, 2), torch.ones(1, 2), **CLIP, kind=kind
    )
    loss.backward()
    assert logprobs.grad.isfinite().all()
    assert sums.isfinite().all()
    said = losses.diagnose(diagnostics)
    assert said["weight"] == pytest.approx({"none": 1.0, "tis": 1.5 if gap > 0 else 0.5, "mis": 0.5}[kind])
    assert 0.0 < said["effective_sample_size"] <= 1.0


def test_what_bears_no_loss_may_be_anything() -> None:
    mask = torch.tensor([[1.0, 0.0, 0.0]])
    prox, mu = torch.tensor([[-1.0, math.nan, 0.0]]), torch.tensor([[-1.5, -1.0, -math.inf]])
    assert losses.behaviour_log_ratio(prox, mu, mask).tolist() == [[0.5, 0.0, 0.0]]


def test_diagnostics_add_up_over_micro_batches() -> None:
    data = tokens(3, 4, 8)
    log_ratio = losses.behaviour_log_ratio(data["prox_logprobs"], data["rollout_logprobs"], data["mask"])

    def sums(rows: slice) -> Tensor:
        weighted = losses.behaviour_weights(log_ratio[rows], data["mask"][rows], kind="tis", cap=CAP)
        return losses.diagnostic_sums(log_ratio[rows], weighted, data["mask"][rows])

    whole = sums(slice(0, 4))
    torch.testing.assert_close(sums(slice(0, 1)) + sums(slice(1, 4)), whole)
    said = losses.diagnose(whole)
    bearing = data["mask"] > 0
    weights = log_ratio[bearing].double().exp().clamp(max=CAP)
    assert said["weight"] == pytest.approx(weights.mean().item(), rel=rounding(32))
    assert said["effective_sample_size"] == pytest.approx(
        (weights.sum() ** 2 / weights.square().sum() / len(weights)).item(), rel=rounding(32)
    )
    assert said["outside"] == pytest.approx((log_ratio[bearing].exp() > CAP).double().mean().item())
    assert 0.0 < said["outside"] < 1.0


def test_nothing_left_is_said_as_nothing() -> None:
    log_ratio = torch.full((1, 3), 5.0)
    mask = torch.ones(1, 3)
    weighted = losses.behaviour_weights(log_ratio, mask, kind="mis")
    said = losses.diagnose(losses.diagnostic_sums(log_ratio, weighted, mask))
    assert (said["weight"], said["outside"], said["effective_sample_size"]) == (0.0, 1.0, 0.0)
    assert losses.diagnose(torch.zeros(len(DIAGNOSTIC_COLUMNS)))["weight"] == 0.0


@pytest.mark.parametrize("settings", [{"kind": "vtrace"}, {"kind": "tis", "level": "turn"}])
def test_unknown_corrections_are_refused(settings: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="expected one of none, tis, mis and of token, sequence"):
        losses.behaviour_weights(torch.zeros(1, 1), torch.ones(1, 1), **settings)
