"""I1, I2 and I5 in bf16 on CUDA, for every kind of router: the policy and the gradients of the toy model, bit by bit.

The same of whole models is in test_models.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.gpu import toys
from tests.gpu.needs import needs
from tests.helpers import toy
from tests.helpers.rounding import assert_near
from tests.test_invariants import autograd_gradient, sampled

pytestmark = [pytest.mark.gpu, needs()]

BF16 = torch.bfloat16
STRATEGIES: dict[str, dict[str, Any]] = {
    "learned": {"alpha": 3.0},
    "everything": {"alpha": 3.0, "predictor": "learned+momentum", "hold_back": True},
}


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("kind", toy.ROUTERS)
def test_i1_a_zero_predictor_is_r3_bit_by_bit(kind: str, recompute: bool, device: torch.device) -> None:
    """Outputs, routing, gradients, weights and optimizer state; the merged gates are the actor's own."""
    zero = toys.train(toy.preset("pr2", alpha=0.0, max_missing_share=1.0), kind, device, BF16, recompute=recompute)
    r3 = toys.train(toy.preset("r3", max_missing_share=1.0), kind, device, BF16, recompute=recompute)
    assert zero.policy() == r3.policy()
    assert len(set(r3.weights)) == len(r3.weights)
    assert min(zero.predictor_gradients[1:]) > 0.0
    assert zero.predictor == 0.0
    assert zero.merged_is_own


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kind", toy.ROUTERS)
def test_i2_a_learning_predictor_does_not_touch_the_policy(kind: str, strategy: str, recompute: bool, device: torch.device) -> None:
    """Nor does one that reads the policy's optimizer, and measures how much of it to hold back."""
    settings = {"max_missing_share": 1.0, **STRATEGIES[strategy]}
    learning = toys.train(toy.preset("pr2", **settings), kind, device, BF16, recompute=recompute)
    r3 = toys.train(toy.preset("r3", max_missing_share=1.0), kind, device, BF16, recompute=recompute)
    assert learning.policy() == r3.policy()
    assert learning.predictor > 0.1
    # One rollout batch is too little for a prediction that can be held back.
    assert learning.merged_is_own == (strategy == "everything")


@pytest.mark.parametrize("target", ["post", "delta"])
@pytest.mark.parametrize("kind", toy.ROUTERS)
def test_i5_the_closed_form_is_autograd_of_the_mean_kl(
    kind: str, target: str, device: torch.device, record_property: Callable[[str, Any], None]
) -> None:
    """A session's gradient from a bf16 model, against float64."""
    config = toy.toy_config(params_dtype=BF16, **toy.ROUTERS[kind])
    record_property("detail", f"off by {largest_error(config, toys.LENGTHS, target, kind == 'groups', device):.0e}")


def test_i5_at_the_size_of_a_large_router(device: torch.device, record_property: Callable[[str, Any], None]) -> None:
    """Qwen3-30B's gate: 128 experts, top-8, hidden 2048; tensor cores would show here if they rounded fp32."""
    config = toy.toy_config(params_dtype=BF16, hidden_size=2048, moe_ffn_hidden_size=64, num_moe_experts=128, moe_router_topk=8)
    error = largest_error(config, {0: 300, 1: 211, 2: 407}, "post", False, device)
    record_property("detail", f"off by {error:.0e}")


def largest_error(config: Any, lengths: dict[int, int], target: str, recompute: bool, device: torch.device) -> float:
    """Checks every layer's gradient; returns the largest deviation as a share of the largest entry."""
    pr2_config = toy.preset("pr2", sample_fraction=0.4, target=target, max_missing_share=1.0, seed=5)
    pr2, predictor, old, new, tables = toys.mini_step(config, pr2_config, lengths, device, BF16, recompute=recompute)
    tokens = sampled(pr2, tables, lengths)
    assert 0 < len(tokens) < sum(lengths.values()) / 2
    assert predictor.token_count_L.tolist() == [len(tokens)] * toy.LAYERS
    errors = []
    for layer in range(toy.LAYERS):
        w_EH = predictor.weight(layer).clone()
        expected = autograd_gradient(layer, w_EH, tokens, old, new, target, config.moe_router_score_function)
        actual = predictor.grad_sum_LEH[layer].double() / len(tokens)
        assert_near(actual, expected, len(tokens) * toy.HIDDEN, dtype=torch.float32)
        errors.append(float((actual - expected).abs().max() / expected.abs().max()))
        assert expected.abs().max() > 1e-3
    return max(errors)
