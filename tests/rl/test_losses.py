"""Advantages and the clipped loss against a plain loop over tokens."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_pr2.rl.losses import LOSS_COLUMNS, group_advantages, policy_loss
from tests.helpers.rounding import rounding

LOW, HIGH = 0.2, 0.28


def loop(logprobs: np.ndarray, old: np.ndarray, advantages: np.ndarray, mask: np.ndarray) -> dict[str, float]:
    """DAPO's Eq. 10 token by token."""
    out = dict.fromkeys(LOSS_COLUMNS, 0.0) | {"low": math.inf, "high": -math.inf}
    for index in np.ndindex(mask.shape):
        if not mask[index]:
            continue
        ratio = math.exp(logprobs[index] - old[index])
        advantage = advantages[index]
        clipped = min(max(ratio, 1 - LOW), 1 + HIGH) * advantage
        out["tokens"] += 1
        out["loss"] -= min(ratio * advantage, clipped)
        out["clipped"] += clipped < ratio * advantage
        out["ratio"] += ratio
        out["ratio_squared"] += ratio**2
        out["approx_kl"] += ratio - 1 - math.log(ratio)
        out["low"], out["high"] = min(out["low"], ratio), max(out["high"], ratio)
    return out


@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.integers(1, 6), st.floats(0.0, 1.0))
def test_loss_and_statistics_are_the_loops(seed: int, rows: int, columns: int, density: float) -> None:
    rng = np.random.default_rng(seed)
    logprobs, old = -rng.exponential(1.0, (2, rows, columns))
    advantages = rng.standard_normal((rows, columns))
    mask = (rng.random((rows, columns)) < density).astype(np.float64)
    expected = loop(logprobs, old, advantages, mask)
    tensors = [torch.from_numpy(a) for a in (logprobs, old, advantages, mask)]
    loss, sums, extremes = policy_loss(*tensors, clip_low=LOW, clip_high=HIGH)
    bound = rounding(rows * columns)
    scale = max(1.0, expected["ratio_squared"])  # what is added up and cancels
    assert loss.item() == pytest.approx(expected["loss"], rel=bound, abs=bound * scale)
    for name, value in zip(LOSS_COLUMNS, sums.tolist(), strict=True):
        assert value == pytest.approx(expected[name], rel=bound, abs=bound * scale), name
    assert extremes.tolist() == pytest.approx([expected["low"], expected["high"]], rel=rounding(16))  # exp of at most 16 or so


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


def test_tokens_without_loss_have_no_gradient_and_no_say_in_the_extremes() -> None:
    logprobs = torch.tensor([[-1.0, -50.0, -3.0]], requires_grad=True)
    mask = torch.tensor([[1.0, 0.0, 0.0]])
    loss, _, extremes = policy_loss(logprobs, torch.zeros(1, 3), torch.ones(1, 3), mask, clip_low=LOW, clip_high=HIGH)
    loss.backward()
    assert logprobs.grad[0, 1:].tolist() == [0.0, 0.0]
    assert extremes.tolist() == pytest.approx([math.exp(-1.0)] * 2, rel=rounding(2))


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
