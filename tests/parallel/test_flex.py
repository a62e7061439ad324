"""The flex dispatcher under replay: it needs GPU kernels, so the step of it that replay could break runs as a function.

With the backends DeepEP and NCCL EP (0.19 on) it forgets the routing map and finds the experts again as topk(probs). A replayed
expert whose probability underflows to zero is lost there: some other expert gets the token, with weight zero. These tests say when
that happens and that it changes neither outputs nor gradients. (The HybridEP backend dispatches by the routing map.)

Suffixes: T tokens, E experts, K top-k.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from megatron.core.transformer.moe import token_dispatcher
from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function
from megatron.core.transformer.moe.token_dispatcher import MoEFlexTokenDispatcher
from torch import Tensor

from tests.helpers.ids import random_ids

TOKENS, EXPERTS, TOPK = 64, 16, 4
KINDS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "pre-softmax": {"use_pre_softmax": True},
    "sigmoid-bias": {"score_function": "sigmoid", "expert_bias": torch.linspace(-0.5, 0.5, EXPERTS)},
}


class Replay:
    """Megatron-Core's replay hook with fixed ids."""

    def __init__(self, ids_TK: Tensor) -> None:
        self.ids_TK = ids_TK

    def get_replay_topk(
        self, scores: Tensor, topk: int, num_groups: int | None, group_topk: int | None, default: Callable[..., Any]
    ) -> tuple[Tensor, Tensor]:
        return scores.gather(1, self.ids_TK), self.ids_TK


def replayed(kind: str, gap: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Random routes whose last expert's logit lies `gap` below the others': logits, ids [T, K], probs [T, E], map [T, E]."""
    ids_TK = torch.from_numpy(random_ids(TOKENS, 1, TOPK, EXPERTS)[:, 0])
    logits_TE = torch.randn(TOKENS, EXPERTS, generator=torch.Generator().manual_seed(0)).to(dtype)
    top = 0.0 if kind == "sigmoid-bias" else gap / 2
    logits_TE = (logits_TE + top).scatter(1, ids_TK[:, -1:], top - gap).requires_grad_()
    settings = {name: value.to(dtype) if torch.is_tensor(value) else value for name, value in KINDS[kind].items()}
    probs_TE, map_TE = topk_routing_with_score_function(logits_TE, TOPK, router_replay=Replay(ids_TK), **settings)
    return logits_TE, ids_TK, probs_TE, map_TE


# The backends of this release that do so.
BACKENDS = [name for name in ("_DeepepManager", "_NCCLEPManager") if hasattr(token_dispatcher, name)]


def rebuilt(backend: str, probs_TE: Tensor, map_TE: Tensor, tp: int, ep: int) -> tuple[Tensor, Tensor]:
    """What the dispatcher sends where, as Megatron-Core's own code finds it: expert ids and probabilities, [T, tp * K]."""
    dispatcher = object.__new__(MoEFlexTokenDispatcher)
    dispatcher.tp_size, dispatcher.ep_size, dispatcher.num_local_experts = tp, ep, EXPERTS // ep
    manager = object.__new__(getattr(token_dispatcher, backend))
    manager.router_topk, manager.num_experts, manager.capacity_factor = tp * TOPK, tp * EXPERTS, None
    manager.setup_metadata(*dispatcher._initialize_metadata(map_TE, probs_TE))
    # Slots are numbered (expert rank, tensor rank, local expert).
    local = EXPERTS // ep
    ids = manager.token_indices
    return ids // (local * tp) * local + ids % local, manager.token_probs


def as_sets(ids: Tensor) -> list[set[int]]:
    return [set(row) for row in ids.tolist()]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("tp", "ep"), [(1, 4), (2, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_experts_far_down_the_ranking_are_found_again(kind: str, dtype: torch.dtype, tp: int, ep: int, backend: str) -> None:
    gap = 9.0 if dtype is torch.float16 else 80.0
    _, ids_TK, probs_TE, map_TE = replayed(kind, gap, dtype)
    experts, _ = rebuilt(backend, probs_TE, map_TE, tp, ep)
    assert as_sets(experts) == as_sets(ids_TK)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("dtype", "gap"), [(torch.float32, 115.0), (torch.bfloat16, 105.0), (torch.float16, 28.0)])
@pytest.mark.parametrize("kind", KINDS)
def test_an_expert_whose_probability_is_zero_is_lost_and_weighs_nothing(
    kind: str, dtype: torch.dtype, gap: float, backend: str
) -> None:
    logits_TE, ids_TK, probs_TE, map_TE = replayed(kind, gap, dtype)
    assert not probs_TE.gather(1, ids_TK[:, -1:]).any()
    # The map still has the expert: the dispatchers that go by it are not affected.
    assert as_sets(map_TE.nonzero()[:, 1].view(TOKENS, TOPK)) == as_sets(ids_TK)
    experts, weights = rebuilt(backend, probs_TE, map_TE, 1, 4)
    kept, found = as_sets(ids_TK[:, :-1]), as_sets(experts)
    assert any(was != now for was, now in zip(as_sets(ids_TK), found, strict=True))
    # Still K different experts per row, all that carry weight among them.
    assert all(len(now) == TOPK and was <= now for was, now in zip(kept, found, strict=True))
    # outputs_TE: what each expert would answer; the layer's output is the weighted sum.
    outputs_TE = torch.randn(TOKENS, EXPERTS, generator=torch.Generator().manual_seed(1)).to(dtype)
    by_map = (probs_TE * outputs_TE).sum(1)
    by_ids = (weights * outputs_TE.gather(1, experts)).sum(1)
    (wanted,) = torch.autograd.grad(by_map.sum(), logits_TE, retain_graph=True)
    (gradient,) = torch.autograd.grad(by_ids.sum(), logits_TE)
    smallest = torch.finfo(dtype).smallest_normal
    assert float((gradient.float() - wanted.float()).abs().max()) <= smallest
    resolution = torch.finfo(dtype).eps
    torch.testing.assert_close(by_ids, by_map, rtol=4 * resolution, atol=4 * resolution)
