"""Every loss against its paper's formula in float64, response by response; gradients by autograd on both sides."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megatron_pr2.report.metrics_log import flat
from megatron_pr2.rl import mini_batch_loss, objectives
from megatron_pr2.rl.config import AlgorithmConfig
from megatron_pr2.rl.losses import LOG_RATIO_LIMIT, LOSS_COLUMNS, decoupled_loss
from megatron_pr2.rl.mini_batch_loss import MiniBatchLoss
from megatron_pr2.rl.rules import CLIP
from tests.helpers.distributed import pool
from tests.helpers.rounding import rounding

LOSSES = tuple(objectives.OBJECTIVES)
CAP, FLOOR, THRESHOLD = 1.6, 0.7, 0.02
LOW, HIGH = 0.1, 0.15
Batch = dict[str, Tensor]
# Masks and weights are computed in fp32 from log-ratios of up to 30, the rest in the batch's dtype.
BOUND = rounding(30)


def batch(seed: int, rows: int, columns: int, *, drift: float, gap: float) -> Batch:
    """Right-padded responses, some of them empty: log-probs under mu, prox (`gap` from it) and theta (`drift` from that)."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, columns + 1, (rows, 1))
    mu = -rng.exponential(1.0, (rows, columns)) - 1e-3
    prox = np.minimum(mu + rng.normal(0.0, gap, mu.shape), -1e-3)
    arrays = {
        "logprobs": prox + rng.normal(0.0, drift, mu.shape).clip(-30.0, 30.0),
        "prox_logprobs": prox,
        "rollout_logprobs": mu,
        "advantages": np.where(rng.random((rows, 1)) < 0.1, 0.0, rng.standard_normal((rows, 1))) * np.ones(mu.shape),
        "mask": (np.arange(columns) < lengths) & (rng.random(mu.shape) < 0.9),
    }
    # Exact in fp32, so that whatever is computed in it sees the same numbers.
    return {name: torch.from_numpy(array.astype(np.float32)).double() for name, array in arrays.items()}


def shift_of(data: Batch) -> Tensor:
    return torch.from_numpy(np.random.default_rng(len(data["mask"])).exponential(0.2, data["mask"].shape))


def settings(loss: str, data: Batch, **changes: Any) -> dict[str, Any]:
    weights = objectives.router_shift_weight(shift_of(data), 0.8) if loss == "rspo" else None
    fixed = {"clip_low": LOW, "clip_high": HIGH, "kind": "none", "cap": CAP, "floor": FLOOR, "threshold": THRESHOLD}
    return {**fixed, "loss": loss, "ratio_weights": weights, **changes}


# ---- the papers' formulas ---------------------------------------------------------------------------------------------
# Of one response, 1-D tensors of its loss-bearing tokens and a number A: what is maximised, and how many are clipped and masked.


def clipped_mean(ratio: Tensor, advantage: float) -> tuple[Tensor, Tensor]:
    clipped = ratio.clamp(1 - LOW, 1 + HIGH) * advantage
    return torch.minimum(ratio * advantage, clipped), clipped < ratio * advantage


def of_gspo(x: Batch, advantage: float) -> tuple[Tensor, Any, Any]:
    ratio = (x["logprobs"].sum() - x["prox_logprobs"].sum()).div(len(x["mask"])).exp()
    value, clipped = clipped_mean(ratio, advantage)
    return value, clipped * len(x["mask"]), 0


def of_gmpo(x: Batch, advantage: float) -> tuple[Tensor, Any, Any]:
    if not advantage:
        return 0.0 * x["logprobs"].sum(), 0, 0
    sign = math.copysign(1.0, advantage)
    most = 1 + HIGH if sign > 0 else 1 / (1 - LOW)
    powers = (x["ratio"] if "ratio" in x else (x["logprobs"] - x["prox_logprobs"]).exp()) ** sign
    kept = torch.minimum(powers, powers.clamp(1 / most, most)) ** sign
    return kept.log().mean().exp() * advantage, (powers > most).sum(), 0


def of_rspo(x: Batch, advantage: float) -> tuple[Tensor, Any, Any]:
    weight = x["shift"].neg().exp().clamp(min=0.8)
    return of_gmpo({**x, "ratio": (x["logprobs"] - x["prox_logprobs"]).exp() * weight}, advantage)


def of_icepop(x: Batch, advantage: float) -> tuple[Tensor, Any, Any]:
    k = (x["prox_logprobs"] - x["rollout_logprobs"]).exp()
    inside = (k >= FLOOR) & (k <= CAP)
    value, clipped = clipped_mean((x["logprobs"] - x["prox_logprobs"]).exp(), advantage)
    return (torch.where(inside, k, 0.0) * value).mean(), clipped.sum(), (~inside).sum()


def of_kpop(x: Batch, advantage: float) -> tuple[Tensor, Any, Any]:
    p, q = (torch.distributions.Bernoulli(x[name].exp()) for name in ("prox_logprobs", "rollout_logprobs"))
    both = [torch.distributions.kl_divergence(*pair) <= THRESHOLD for pair in ((p, q), (q, p))]
    value, clipped = clipped_mean((x["logprobs"] - x["prox_logprobs"]).exp(), advantage)
    return (value * (both[0] & both[1])).mean(), clipped.sum(), (~(both[0] & both[1])).sum()


def of_opsm(x: Batch, advantage: float) -> tuple[Tensor, Any, Any]:
    masked = advantage < 0 and (x["rollout_logprobs"] - x["logprobs"]).mean() > THRESHOLD
    value, clipped = clipped_mean((x["logprobs"] - x["prox_logprobs"]).exp(), advantage)
    return value.mean() * (not masked), clipped.sum(), len(x["mask"]) * bool(masked)


def of_grpo(x: Batch, advantage: float) -> tuple[Tensor, Any, Any]:
    value, clipped = clipped_mean((x["logprobs"] - x["prox_logprobs"]).exp(), advantage)
    return value.sum(), clipped.sum(), 0


def of_cispo(x: Batch, advantage: float) -> tuple[Tensor, Any, Any]:
    ratio = (x["logprobs"] - x["prox_logprobs"]).exp()
    weight = ratio.clamp(1 - LOW, 1 + HIGH).detach()
    return (weight * advantage * x["logprobs"]).sum(), (weight != ratio).sum(), 0


FORMULAS: dict[str, Callable[[Batch, float], tuple[Tensor, Any, Any]]] = {
    "grpo": of_grpo, "gspo": of_gspo, "cispo": of_cispo, "gmpo": of_gmpo,
    "icepop": of_icepop, "kpop": of_kpop, "opsm": of_opsm, "rspo": of_rspo,
}  # fmt: skip


def reference(loss: str, data: Batch) -> dict[str, Any]:
    """Sum over responses, gradient of log theta, counts, and what the sum is divided by."""
    logprobs = data["logprobs"].clone().requires_grad_(True)
    total, counts = torch.zeros((), dtype=torch.float64), np.zeros(2)
    rows = []
    for b, bears in enumerate(data["mask"] > 0):
        if not bears.any():
            continue
        x = {name: tensor[b][bears] for name, tensor in {**data, "logprobs": logprobs, "shift": shift_of(data)}.items()}
        value, *of_row = FORMULAS[loss](x, float(x["advantages"][0]))
        total, counts = total - value, counts + np.array([float(each) for each in of_row])
        rows.append(int(bears.sum()))
    (total + 0.0 * logprobs.sum()).backward()
    divisor = sum(rows) if loss in ("grpo", "cispo") else len(rows)
    clipped, masked = counts
    return {"loss": total.item(), "gradient": logprobs.grad, "clipped": clipped, "masked": masked, "divisor": divisor}


def computed(loss: str, data: Batch, **changes: Any) -> tuple[Tensor, Tensor, dict[str, float]]:
    """(loss, gradient, sums)."""
    logprobs = data["logprobs"].clone().requires_grad_(True)
    total, sums, *_ = decoupled_loss(**{**data, "logprobs": logprobs}, **settings(loss, data, **changes))
    total.backward()
    assert logprobs.grad is not None
    return total.detach(), logprobs.grad, dict(zip(LOSS_COLUMNS, sums.tolist(), strict=True))


batches = st.builds(
    batch,
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(1, 4),
    columns=st.integers(1, 7),
    drift=st.sampled_from([0.02, 0.3, 8.0]),
    gap=st.sampled_from([0.0, 0.1, 1.0]),
)


@pytest.mark.parametrize("loss", LOSSES)
@given(data=batches)
def test_values_gradients_and_counts_are_the_papers(loss: str, data: Batch) -> None:
    expected = reference(loss, data)
    total, gradient, sums = computed(loss, data)
    scale = max(1.0, float(expected["gradient"].abs().max()))
    assert total.item() == pytest.approx(expected["loss"], rel=BOUND, abs=BOUND * scale)
    torch.testing.assert_close(gradient, expected["gradient"], rtol=BOUND, atol=BOUND * scale)
    assert {name: sums[name] for name in ("clipped", "masked", "divisor")} == {
        name: pytest.approx(expected[name]) for name in ("clipped", "masked", "divisor")
    }
    assert sums["tokens"] == data["mask"].sum()


@pytest.mark.parametrize("loss", LOSSES)
@given(data=batches, cut=st.integers(1, 3), kind=st.sampled_from(["none", "tis", "mis"]))
def test_micro_batches_add_up_to_the_whole(loss: str, data: Batch, cut: int, kind: str) -> None:
    kind = "none" if loss == "icepop" else kind
    weights = settings(loss, data)["ratio_weights"]
    total, gradient, sums = computed(loss, data, kind=kind)
    parts = []
    for rows in (slice(0, cut), slice(cut, None)):
        part = {name: tensor[rows] for name, tensor in data.items()}
        if len(part["mask"]):
            parts.append(computed(loss, part, kind=kind, ratio_weights=None if weights is None else weights[rows]))
    scale = max(1.0, float(gradient.abs().max()))
    assert sum(part[0].item() for part in parts) == pytest.approx(total.item(), rel=1e-9, abs=1e-9 * scale)
    torch.testing.assert_close(torch.cat([part[1] for part in parts]), gradient, rtol=1e-9, atol=1e-9 * scale)
    for name in ("tokens", "divisor", "clipped", "masked"):
        assert sum(part[2][name] for part in parts) == sums[name], name


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("sign", [-1.0, 1.0])
@pytest.mark.parametrize("gap", [-500.0, 500.0])
def test_log_ratios_beyond_fp32_spoil_nothing(loss: str, sign: float, gap: float) -> None:
    """Nor does what stands where no loss is borne."""
    data = {
        "logprobs": torch.tensor([[-1.0, -1.0 + gap, math.nan]]),
        "prox_logprobs": torch.tensor([[-1.1, -1.0, math.inf]]),
        "rollout_logprobs": torch.tensor([[-1.2, -1.0 - gap, 0.0]]),
        "advantages": torch.full((1, 3), sign),
        "mask": torch.tensor([[1.0, 1.0, 0.0]]),
    }
    total, gradient, sums = computed(loss, data)
    assert total.isfinite()
    assert gradient.isfinite().all()
    assert gradient[0, 2] == 0.0
    assert np.isfinite(list(sums.values())).all()
    assert sums["ratio"] <= 2 * math.exp(LOG_RATIO_LIMIT)


@pytest.mark.parametrize(
    ("p", "q", "kept"),
    [
        (0.5, 0.5, True),
        (0.5, 0.6, False),
        (0.5, 0.55, True),
        (1e-3, 5e-3, True),
        (0.999, 0.95, False),
        (1.0, 1.0, True),
        (1.0, 0.5, False),
    ],
)
def test_kpop_is_wide_for_rare_tokens_and_narrow_for_likely_ones(p: float, q: float, kept: bool) -> None:
    """A factor of 5 between two small probabilities is within a threshold that one of 1.05 between two large ones is not."""
    log_p, log_q = (torch.tensor([[math.log(x)]]) for x in (p, q))
    assert objectives.kpop_mask(log_p, log_q, torch.ones(1, 1), 0.01).item() == kept
    assert objectives.kpop_mask(log_q, log_p, torch.ones(1, 1), 0.01).item() == kept, "it is symmetric"


def test_only_bad_responses_that_drifted_are_masked_by_opsm() -> None:
    mu, mask = torch.full((4, 2), -1.0), torch.ones(4, 2)
    theta = torch.tensor([[-1.5, -1.1], [-1.5, -1.1], [-0.5, -0.9], [-1.1, -1.0]])
    advantages = torch.tensor([[-1.0], [1.0], [-1.0], [-1.0]]).expand(4, 2)
    kept = objectives.opsm_mask(theta, mu, advantages, mask, 0.1)
    assert kept[:, 0].tolist() == [0.0, 1.0, 1.0, 1.0]


def test_a_sequence_is_clipped_as_a_whole_and_gmpos_tokens_one_by_one() -> None:
    """Ratios 1.4, 1.0 and 0.8: their mean 1.04 is within GSPO's bounds, one of them beyond GMPO's; and the other way round."""
    ratios = torch.tensor([[1.4, 1.0, 0.8], [1.12, 1.12, 1.12]], dtype=torch.float64)
    data = {
        "logprobs": ratios.log(), "prox_logprobs": torch.zeros(2, 3), "rollout_logprobs": torch.zeros(2, 3),
        "advantages": torch.ones(2, 3), "mask": torch.ones(2, 3),
    }  # fmt: skip
    gspo, gmpo = (computed(loss, data, clip_high=0.1)[1] for loss in ("gspo", "gmpo"))
    assert (gspo[0] < 0).all()
    assert (gspo[1] == 0).all()
    assert gmpo[0, 0] == 0
    assert (gmpo[0, 1:] < 0).all()
    assert gspo[0, 0] == pytest.approx(-(ratios[0].prod() ** (1 / 3)).item() / 3)


def test_router_shift_weight() -> None:
    weights = objectives.router_shift_weight(torch.tensor([[0.0, 0.1, 3.0]]), 0.8)
    assert weights.tolist() == [pytest.approx([1.0, math.exp(-0.1), 0.8])]


def test_every_loss_has_bounds_and_a_formula() -> None:
    assert set(CLIP) == set(LOSSES) == set(FORMULAS)


# ---- mini-batches over ranks -----------------------------------------------------------------------------------------


def algorithm(loss: str, kind: str = "none") -> AlgorithmConfig:
    correction: dict[str, Any] = {"importance": kind, "importance_cap": CAP, "importance_floor": FLOOR}
    return AlgorithmConfig(loss=loss, clip_low=LOW, clip_high=HIGH, mask_threshold=THRESHOLD, **correction)


def divided(loss: str, data: Batch, kind: str, sizes: tuple[int, ...]) -> tuple[Tensor, dict[str, Any]]:
    """What Megatron-Core makes of this rank's micro-batches: the sum of their gradients over the tokens of all ranks."""
    calculate = MiniBatchLoss(algorithm(loss, kind), torch.device("cpu"), torch.distributed.group.WORLD)
    logprobs = data["logprobs"].clone().requires_grad_(True)
    named = {"old_logprobs": data["prox_logprobs"], **{name: data[name] for name in ("rollout_logprobs", "advantages", "mask")}}
    items = [dict(zip(named, parts, strict=True)) for parts in zip(*(x.split(sizes) for x in named.values()), strict=True)]
    calculate.begin(items)
    results, count = [], torch.zeros((), dtype=torch.int)
    for item, part in zip(items, logprobs.split(sizes), strict=True):
        value, tokens, result = calculate(item, part)
        value.backward(retain_graph=True)
        results.append(result)
        count += tokens
    torch.distributed.all_reduce(count)
    assert logprobs.grad is not None
    return logprobs.grad / count.clamp(min=1), calculate.metrics(results, 1)


def rank_job(cases: list[tuple[str, str]], data: Batch, rows: list[slice], sizes: list[tuple[int, ...]]) -> list[Any]:
    rank = torch.distributed.get_rank()
    own = {name: tensor[rows[rank]] for name, tensor in data.items()}
    return [divided(loss, own, kind, sizes[rank]) for loss, kind in cases]


def test_the_gradient_of_a_mini_batch_does_not_depend_on_how_it_is_spread() -> None:
    """Five responses, one of them empty, in micro-batches of one rank and in others of two."""
    data = batch(11, 5, 6, drift=0.3, gap=0.4)
    data["mask"][1] = 0.0
    cases = [(loss, kind) for loss in LOSSES if loss != "rspo" for kind in ("none", "mis") if (loss, kind) != ("icepop", "mis")]
    (alone,) = pool(1).run(rank_job, cases, data, [slice(0, 5)], [(5,)])
    spread = pool(2).run(rank_job, cases, data, [slice(0, 3), slice(3, 5)], [(1, 2), (1, 1)])
    for i, (loss, kind) in enumerate(cases):
        gradient, metrics = alone[i]
        torch.testing.assert_close(torch.cat([rank[i][0] for rank in spread]), gradient, rtol=1e-6, atol=1e-9)
        for rank in spread:
            assert flat(rank[i][1]) == pytest.approx(flat(metrics), rel=1e-5), (loss, kind)
        assert ("importance" in metrics) == (kind == "mis" or loss == "icepop")
        assert ("masked_fraction" in metrics) == (loss in objectives.MASKING)
        if kind == "none":
            expected = reference(loss, data)
            torch.testing.assert_close(gradient, expected["gradient"] / expected["divisor"], rtol=1e-5, atol=1e-8)
            assert metrics["loss"] == pytest.approx(expected["loss"] / expected["divisor"], rel=1e-5)


def test_grpo_counts_nothing_before_its_passes() -> None:
    with mock.patch.object(mini_batch_loss.dist, "all_reduce", side_effect=AssertionError):
        MiniBatchLoss(algorithm("grpo"), torch.device("cpu"), mock.Mock()).begin([])
