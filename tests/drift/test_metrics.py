"""Drift metrics on mismatches that are known by construction."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from torch.distributions import Categorical, Poisson, kl_divergence

from megatron_pr2.drift.metrics import COLUMNS, DriftMetrics, drift_columns
from tests.helpers.distributed import pool
from tests.helpers.rounding import rounding

E = 8
CURRENT = torch.tensor([[0, 1, 2, 3]] * 4)
# 0, 1, 2 and 4 of the four experts are replaced; the order must not matter.
REPLAYED = torch.tensor([[3, 2, 1, 0], [0, 1, 2, 7], [6, 1, 2, 7], [4, 5, 6, 7]])
FROZEN = torch.tensor([[0, 1, 2, 4], [0, 1, 5, 4], [0, 6, 5, 4], [0, 1, 2, 3]])
# Relative error of a sum over four tokens and all experts.
SUMS = rounding(4 * E)


def logits(seed: int) -> torch.Tensor:
    return torch.randn(4, E, generator=torch.Generator().manual_seed(seed))


def columns(score_function: str = "softmax", replayed: torch.Tensor = REPLAYED) -> dict[str, float]:
    sums = drift_columns(CURRENT, replayed, FROZEN, logits(0), logits(1), logits(2), score_function)
    return dict(zip(COLUMNS, sums.tolist(), strict=True))


def test_counts_of_changed_experts() -> None:
    found = columns()
    assert [found[f"changed_{n}"] for n in ("0", "1", "2", "3+")] == [1, 1, 1, 1]
    assert found["tokens"] == 4
    assert found["agreement"] == pytest.approx((4 + 3 + 2 + 0) / 4)
    assert found["frozen_agreement"] == pytest.approx((3 + 2 + 1 + 4) / 4)


def test_agreement_is_not_one_for_disjoint_sets() -> None:
    """A top-k accuracy elsewhere was always 1.0, because ids were passed as logits."""
    found = columns(replayed=torch.tensor([[4, 5, 6, 7]] * 4))
    assert found["agreement"] == 0.0
    assert found["changed_3+"] == 4


def test_kl_and_mass_by_their_definitions() -> None:
    found = columns()
    p, p_old, q_hat = logits(0), logits(1), logits(2)
    rho = torch.softmax(p, -1)
    assert found["kl_predicted"] == pytest.approx(kl_divergence(Categorical(rho), Categorical(logits=q_hat)).sum().item(), rel=SUMS)
    assert found["kl_frozen"] == pytest.approx(kl_divergence(Categorical(rho), Categorical(logits=p_old)).sum().item(), rel=SUMS)
    own = sum(rho[t, list(ids)].sum().item() for t, ids in enumerate(CURRENT.tolist()))
    replayed = sum(rho[t, list(ids)].sum().item() for t, ids in enumerate(REPLAYED.tolist()))
    assert found["coverage_gap"] == pytest.approx(own - replayed, rel=SUMS)
    assert found["outside_mass"] == pytest.approx(4 - replayed, rel=SUMS)


@pytest.mark.parametrize("function", ["sigmoid", "sqrtsoftplus"])
def test_masses_of_single_scores_are_shares(function: str) -> None:
    found = columns(function)
    rho = torch.sigmoid(logits(0)) if function == "sigmoid" else torch.nn.functional.softplus(logits(0)).sqrt()
    rho = rho / rho.sum(-1, keepdim=True)
    replayed = sum(rho[t, list(ids)].sum().item() for t, ids in enumerate(REPLAYED.tolist()))
    assert found["outside_mass"] == pytest.approx(4 - replayed, rel=SUMS)


def test_kl_of_poissons() -> None:
    found = columns("sqrtsoftplus")
    p, p_old, q_hat = (Poisson(torch.nn.functional.softplus(logits(seed)).sqrt()) for seed in range(3))
    assert found["kl_predicted"] == pytest.approx(kl_divergence(p, q_hat).sum().item(), rel=SUMS)
    assert found["kl_frozen"] == pytest.approx(kl_divergence(p, p_old).sum().item(), rel=SUMS)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64])
def test_compact_ids_count_alike(dtype: torch.dtype) -> None:
    assert columns(replayed=REPLAYED.to(dtype)) == columns()


def test_reading_gives_means_and_starts_over() -> None:
    metrics = DriftMetrics(2, torch.device("cpu"))
    for _ in range(3):
        metrics.add(0, drift_columns(CURRENT, REPLAYED, FROZEN, logits(0), logits(1), logits(2), "softmax"))
    found = metrics.read(None)
    assert found["tokens"] == [12.0, 0.0]
    assert found["agreement"][0] == pytest.approx(9 / 16)
    assert found["frozen_agreement"][0] == pytest.approx(10 / 16)
    assert found["lift"][0] == pytest.approx(-1 / 16)
    assert all(math.isnan(found[name][1]) for name in (*COLUMNS[1:], "lift"))
    assert metrics.read(None)["tokens"] == [0.0, 0.0]


def read_job() -> dict[str, list[float]]:
    metrics = DriftMetrics(2, torch.device("cpu"))
    tokens = 4 if dist.get_rank() == 0 else 0
    ids = [t[:tokens] for t in (CURRENT, REPLAYED, FROZEN)]
    metrics.add(0, drift_columns(*ids, *(logits(i)[:tokens] for i in range(3)), "softmax"))
    if dist.get_rank() == 1:
        metrics.add(1, drift_columns(*(t[:1] for t in (CURRENT, CURRENT, FROZEN)), *(logits(i)[:1] for i in range(3)), "softmax"))
    return metrics.read(dist.group.WORLD)


def test_means_are_over_the_tokens_of_all_ranks() -> None:
    first, second = pool(2).run(read_job)
    assert first == second
    assert first["tokens"] == [4.0, 1.0]
    assert first["agreement"] == pytest.approx([9 / 16, 1.0])
