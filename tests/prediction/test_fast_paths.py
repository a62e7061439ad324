"""Short cuts give what the long way gives: selection without gate weights, and drift sums without one temporary per column."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from megatron.core.transformer.moe import moe_utils
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_pr2.drift.metrics import COLUMNS, DriftMetrics, drift_columns
from megatron_pr2.errors import AttachError
from megatron_pr2.replay import router as router_module
from megatron_pr2.replay.router import select_experts
from megatron_pr2.replay.scores import SCORE_FUNCTIONS, divergence_terms, score
from tests.helpers import toy
from tests.helpers.divergence import kl
from tests.helpers.rounding import assert_near, rounding

pytestmark = pytest.mark.usefixtures("host_platform")


class Operators(TorchDispatchMode):
    """Names of the operators that are run, views left out."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


# ---- selection -------------------------------------------------------------------------------------------------------


def routing_map(router: Any, logits_TE: Tensor) -> Tensor:
    """[T, E] bool of Megatron-Core's whole routing, gate weights included."""
    config = router.config
    return moe_utils.topk_routing_with_score_function(
        logits_TE,
        router.topk,
        use_pre_softmax=config.moe_router_pre_softmax,
        num_groups=config.moe_router_num_groups,
        group_topk=config.moe_router_group_topk,
        scaling_factor=config.moe_router_topk_scaling_factor,
        score_function=router.score_function,
        expert_bias=router.expert_bias,
    )[1]


@pytest.mark.parametrize("kind", toy.ROUTERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inputs", ["random", "ties", "equal", "saturated"])
def test_selection_is_that_of_the_whole_routing(kind: str, dtype: torch.dtype, inputs: str) -> None:
    """Ties and saturation too: a short cut over logits instead of scores would break them otherwise."""
    router = toy.routers(toy.ToyChunk(toy.toy_config(**toy.ROUTERS[kind])))[0]
    logits = torch.randn(257, toy.EXPERTS, generator=torch.Generator().manual_seed(0))
    if inputs == "ties":
        logits = logits.mul(2).round()
    elif inputs == "equal":
        logits = torch.zeros_like(logits)
    elif inputs == "saturated":
        logits = logits * 60  # sigmoid is 0 or 1 for nearly all
    ids = select_experts(router, logits.to(dtype))
    expected = routing_map(router, logits.to(dtype))
    assert torch.equal(torch.zeros_like(expected).scatter(1, ids, True), expected)
    assert ids.dtype == torch.long
    assert not ids.requires_grad


def test_selection_makes_no_gate_weights_and_no_maps() -> None:
    """A softmax router's experts are the top-k of its logits: one operator, not the ten of the whole routing."""
    router = toy.routers(toy.ToyChunk(toy.toy_config()))[0]
    with Operators() as counter:
        select_experts(router, torch.randn(5, toy.EXPERTS))
    assert [name for name in counter.names if name != "randn"] == ["topk"]


def test_a_routing_that_never_asks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A release whose routing ignores the replay object would otherwise select nothing, silently."""
    router = toy.routers(toy.ToyChunk(toy.toy_config()))[0]
    monkeypatch.setattr(router_module, "topk_routing_with_score_function", lambda *args, **kwargs: (None, None))
    with pytest.raises(AttachError, match=r"did not ask router_replay .* otherwise than"):
        select_experts(router, torch.randn(5, toy.EXPERTS))


# ---- drift -----------------------------------------------------------------------------------------------------------

LAYERS, TOKENS, EXPERTS = 3, 41, 16


def drifted(topk: int) -> tuple[Tensor, ...]:
    """(current, replayed, frozen) ids [L, S, K] and logits (p, p_old, q_hat) [L, S, E] of routers that have drifted a little."""
    generator = torch.Generator().manual_seed(topk)
    p, noise, other = (torch.randn(LAYERS, TOKENS, EXPERTS, generator=generator) for _ in range(3))
    p_old, q_hat = p + 0.4 * noise, p + 0.2 * other
    return *((x.topk(topk).indices) for x in (p, q_hat, p_old)), p, p_old, q_hat


def by_definition(
    current: Tensor, replayed: Tensor, frozen: Tensor, p: Tensor, p_old: Tensor, q_hat: Tensor, function: str
) -> dict[str, float]:
    """Every column of one layer, token by token with sets and in float64."""
    sums = dict.fromkeys(COLUMNS, 0.0)
    rho = score(p.double(), function)
    rho = rho / rho.sum(-1, keepdim=True)
    for token in range(len(p)):
        own, taken, old = (set(ids[token].tolist()) for ids in (current, replayed, frozen))
        changed = len(own - taken)
        sums["tokens"] += 1
        sums[f"changed_{changed}" if changed < 3 else "changed_3+"] += 1
        sums["agreement"] += len(own & taken) / len(own)
        sums["frozen_agreement"] += len(own & old) / len(own)
        mass = {name: rho[token, sorted(ids)].sum().item() for name, ids in (("own", own), ("taken", taken))}
        sums["coverage_gap"] += mass["own"] - mass["taken"]
        sums["outside_mass"] += 1 - mass["taken"]
    sums["kl_predicted"] = kl(p.double(), q_hat.double(), function).sum().item()
    sums["kl_frozen"] = kl(p.double(), p_old.double(), function).sum().item()
    return sums


@pytest.mark.parametrize("function", SCORE_FUNCTIONS)
@pytest.mark.parametrize("topk", [1, 2, 6])
def test_drift_columns_by_their_definitions(function: str, topk: int) -> None:
    """For few and odd top-k as well: with K = 2 no token has three changed experts."""
    tensors = drifted(topk)
    for layer in range(LAYERS):
        of_layer = [each[layer] for each in tensors]
        found = dict(zip(COLUMNS, drift_columns(*of_layer, function).tolist(), strict=True))
        expected = by_definition(*of_layer, function)
        bound = rounding(EXPERTS) * expected["tokens"]
        assert found == pytest.approx(expected, rel=bound, abs=bound)
        whole = [name for name in COLUMNS if name.startswith(("tokens", "changed"))]
        assert [found[name] for name in whole] == [expected[name] for name in whole]
    assert sum(expected[name] > 0 for name in whole) >= min(topk, 2) + 1


@pytest.mark.parametrize("function", SCORE_FUNCTIONS)
def test_several_layers_at_once_are_the_layers_one_by_one(function: str) -> None:
    tensors = drifted(4)
    together = drift_columns(*tensors, function)
    single = torch.stack([drift_columns(*(each[layer] for each in tensors), function) for layer in range(LAYERS)])
    assert_near(together, single, EXPERTS, dtype=torch.float32)
    metrics = [DriftMetrics(LAYERS, torch.device("cpu")) for _ in range(2)]
    metrics[0].add(slice(0, LAYERS), together)
    for layer in range(LAYERS):
        metrics[1].add(layer, single[layer])
    first, second = (each.read(None) for each in metrics)
    assert all(first[name] == pytest.approx(second[name], rel=rounding(EXPERTS), abs=rounding(EXPERTS)) for name in first)


@pytest.mark.parametrize("function", SCORE_FUNCTIONS)
def test_divergences_are_the_predictors(function: str) -> None:
    """Also far apart, where a careless form of the Bernoulli KL overflows."""
    generator = torch.Generator().manual_seed(5)
    p, q, far = (torch.randn(23, EXPERTS, dtype=torch.float64, generator=generator) for _ in range(3))
    for scale in (1.0, 50.0):
        scores, terms = divergence_terms(p * scale, torch.stack((q, far)) * scale, function)
        sums = terms.sum((-2, -1))
        expected = [kl(p * scale, other * scale, function).sum() for other in (q, far)]
        assert_near(sums, torch.stack(expected), 23 * EXPERTS)
        assert sums.isfinite().all()
        torch.testing.assert_close(scores, score(p * scale, function))
    with pytest.raises(ValueError, match="tanh"):
        divergence_terms(p, q, "tanh")


@pytest.mark.parametrize("function", SCORE_FUNCTIONS)
def test_small_drift_is_measured_in_single_precision(function: str) -> None:
    """What is measured in training is a KL of 1e-4 and less; fp32 must not drown it."""
    generator = torch.Generator().manual_seed(6)
    p = torch.randn(512, 64, generator=generator)
    q = p + 0.01 * torch.randn(512, 64, generator=generator)
    found = divergence_terms(p, q, function)[1].sum()
    expected = kl(p.double(), q.double(), function).sum().item()
    assert found.item() == pytest.approx(expected, abs=512 * rounding(1))
    assert expected > 20 * 512 * rounding(1)


def test_drift_is_measured_in_few_operators() -> None:
    """Launching an operator costs a GPU's host as much as the arithmetic; it was 58 of them per layer."""
    of_layer = [each[0] for each in drifted(4)]
    drift_columns(*of_layer, "softmax")
    with Operators() as counter:
        drift_columns(*of_layer, "softmax")
    assert len(counter.names) <= 24, counter.names
    assert not {"lift_fresh_copy", "_local_scalar_dense", "nonzero"} & set(counter.names)
