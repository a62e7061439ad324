"""Moments of predicted and true drift, against their definitions in float64."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_pr2.attach import attach
from megatron_pr2.drift.metrics import COLUMNS, DriftMetrics
from megatron_pr2.drift.moments import MOMENTS, drift_moments, explained
from tests.helpers import toy
from tests.helpers.distributed import pool
from tests.helpers.drifting import hold_back_of
from tests.helpers.rounding import rounding

LENGTHS = {0: 40, 1: 30}


def drifts(seed: int = 0, tokens: int = 12) -> tuple[Tensor, Tensor, Tensor]:
    predicted, true, gate = torch.randn(3, tokens, toy.EXPERTS, generator=torch.Generator().manual_seed(seed))
    return predicted, true + predicted, gate


def by_definition(predicted_SE: Tensor, true_SE: Tensor, gate_SE: Tensor) -> dict[str, float]:
    x, d, g = (values.double() - values.double().mean(-1, keepdim=True) for values in (predicted_SE, true_SE, gate_SE))
    return {name: float(each.sum()) for name, each in zip(MOMENTS, (x * x, x * d, d * d, g * g, g * d), strict=True)}


def named(moments: Tensor) -> dict[str, float]:
    return dict(zip(MOMENTS, moments.tolist(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_moments_are_the_products_summed(dtype: torch.dtype) -> None:
    predicted, true, gate = drifts()
    assert named(drift_moments(predicted, true.to(dtype), gate)) == pytest.approx(by_definition(predicted, true, gate), rel=1e-12)


def test_a_shift_of_all_experts_alike_is_no_drift() -> None:
    values = drifts()
    shifted = [each.double() + torch.randn(len(each), 1).double() for each in values]
    assert named(drift_moments(*shifted)) == pytest.approx(named(drift_moments(*values)), rel=1e-9)
    alike = torch.ones(3, toy.EXPERTS)
    assert not drift_moments(alike, alike, alike).any()


def test_moments_add_up() -> None:
    parts = [drift_moments(*(each[part] for each in drifts())) for part in (slice(0, 5), slice(5, 5), slice(5, 12))]
    torch.testing.assert_close(sum(parts), drift_moments(*drifts()), rtol=1e-12, atol=0.0)


def test_what_moments_explain() -> None:
    """R^2 from the residual, the correlation as numpy's, the best multiple's R^2 its square, the gate's share from variances."""
    x, d, g = (values.double() - values.double().mean(-1, keepdim=True) for values in drifts())
    found = {name: values[0] for name, values in explained({n: [v] for n, v in named(drift_moments(*drifts())).items()}).items()}
    assert found["r_squared"] == pytest.approx(1 - float((d - x).square().sum() / d.square().sum()))
    assert found["correlation"] == pytest.approx(np.corrcoef(x.flatten(), d.flatten())[0, 1])
    best = float((x * d).sum() / x.square().sum())
    scaled = by_definition(best * x, d, g)
    assert explained({n: [v] for n, v in scaled.items()})["r_squared"] == [pytest.approx(found["correlation"] ** 2)]
    assert found["gate_share"] == pytest.approx(float(g.var() / d.var()))
    assert found["hidden_share"] == pytest.approx(float((d - g).var() / d.var()))


def test_without_drift_or_prediction_nothing_is_explained() -> None:
    predicted, true, gate = drifts()
    still = explained({n: [v] for n, v in named(drift_moments(predicted, 0 * true, 0 * gate)).items()})
    assert all(math.isnan(values[0]) for values in still.values())
    silent = explained({n: [v] for n, v in named(drift_moments(0 * predicted, true, gate)).items()})
    assert silent["r_squared"] == [0.0]
    assert math.isnan(silent["correlation"][0])


def summed(parts: list[tuple[Tensor, Tensor, Tensor]], group: dist.ProcessGroup | None) -> dict[str, list[float]]:
    metrics = DriftMetrics(2, torch.device("cpu"), moments=True)
    for layer in (0, 1):
        for part in parts:
            columns = torch.zeros(len(COLUMNS), dtype=torch.float64)
            columns[0] = len(part[0])
            metrics.add(layer, torch.cat((columns, (layer + 1) * drift_moments(*part))))
    return metrics.read(group)


def split_job() -> dict[str, list[float]]:
    """12 tokens, 5 of them on rank 0 in one micro-batch, the others on rank 1 in two."""
    cuts = [slice(0, 5)] if dist.get_rank() == 0 else [slice(5, 6), slice(6, 12)]
    return summed([tuple(each[cut] for each in drifts()) for cut in cuts], dist.group.WORLD)  # type: ignore[misc]


def test_means_are_over_the_tokens_of_all_ranks_and_micro_batches() -> None:
    first, second = pool(2).run(split_job)
    whole = summed([drifts()], None)
    assert first.keys() == second.keys() == whole.keys()
    for name in (*MOMENTS, "r_squared", "correlation", "gate_share", "hidden_share"):
        assert first[name] == second[name] == pytest.approx(whole[name], rel=1e-12)
    assert whole["true_squared"][0] == pytest.approx(by_definition(*drifts())["true_squared"] / 12)


# ---- of a model ------------------------------------------------------------------------------------------------------


def rolled_out(versions: dict[int, Any], pushed: dict[int, Tensor], beta: float = 0.0, **config: Any) -> tuple[Any, dict[str, Any]]:
    """A rollout batch whose tokens are of several pushes, and whose routers and their inputs drift before its mini-step."""
    chunk = toy.ToyChunk(toy.toy_config(**config))
    pr2 = attach(chunk, toy.preset("pr2", sample_fraction=1.0, held_out_share=0.5, hold_back=True))
    hold_back_of(pr2).beta = [beta] * toy.LAYERS
    assert pr2.predictor is not None
    for version, w_LEH in pushed.items():
        pr2.predictor.weight_LEH.copy_(w_LEH)
        pr2.measurement.pushes.push(version)
    data = toy.batches(LENGTHS, 1)
    routes = toy.random_tables(LENGTHS, pr2.model_config)
    pr2.begin_rollout([replace(each, versions=versions[each.id]) for each in toy.sequences(LENGTHS, routes)])
    toy.old_logprobs(pr2, chunk, data)
    before = [{name: value.detach().clone() for name, value in site.router.named_parameters()} for site in pr2.sites]
    for number, layer in enumerate(chunk.decoder.layers):
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
    inputs: list[list[Tensor]] = [[], []]
    for calls, site in zip(inputs, pr2.sites, strict=True):
        site.router.register_forward_pre_hook(lambda _, given, calls=calls: calls.append(given[0].detach().flatten(0, -2)))
    toy.update(pr2, chunk, data, 2)
    return {"pr2": pr2, "before": before, "inputs": inputs, "data": data}, pr2.step(0.0)


def expected_moments(run: dict[str, Any], versions: dict[int, Any], pushed: dict[int, Tensor], layer: int) -> dict[str, float]:
    """From the stored features, the inputs that the routers saw, and the weights before and now, in float64."""
    pr2, total = run["pr2"], dict.fromkeys(MOMENTS, 0.0)
    router, before = pr2.sites[layer].router, run["before"][layer]
    bias = [0.0 if router.bias is None else each.detach().double() for each in (router.bias, before.get("bias"))]
    old = {int(token): place for place, token in enumerate(pr2.features.segments[0].tokens)}
    h_old, p_old = (values[layer].double() for values in (pr2.features.segments[0].h_LSH, pr2.features.segments[0].p_LSE))
    for batch, h in zip(run["data"], run["inputs"][layer], strict=True):
        for row, (sid, position) in enumerate(zip(*batch.micro_batch.grid.rows(), strict=True)):
            first = 2  # prompts of 3 tokens
            if sid < 0 or not first <= position < LENGTHS[int(sid)] - 1:
                continue
            version = versions[int(sid)][position - first]
            if version not in pushed:
                continue
            place = old[pr2.tokens.span(int(sid)).start + int(position)]
            true = h[row].double() @ router.weight.detach().double().t() + bias[0] - p_old[place]
            gate = h_old[place] @ (router.weight.detach().double() - before["weight"].double()).t() + bias[0] - bias[1]
            found = by_definition(*(v[None] for v in (h_old[place] @ pushed[version][layer].double().t(), true, gate)))
            total = {name: total[name] + found[name] for name in MOMENTS}
    return total


def predictions() -> dict[int, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {version: 0.05 * torch.randn(toy.LAYERS, toy.EXPERTS, toy.HIDDEN, generator=generator) for version in (1, 2)}


SPANS = {sid: length - 3 for sid, length in LENGTHS.items()}
VERSIONS = {
    "one push": {sid: np.ones(n, dtype=int) for sid, n in SPANS.items()},
    "two pushes and one that is not known": {0: np.array([1] * 10 + [2] * 27), 1: np.array([2] * 20 + [99] * 7)},
}


@pytest.mark.parametrize("kind", VERSIONS)
@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_each_token_is_judged_by_the_whole_prediction_of_its_push(kind: str, beta: float, host_platform: object) -> None:
    """Also where hold-back uses none of it: that is what hold-back has to know."""
    run, report = rolled_out(VERSIONS[kind], predictions(), beta)
    tokens = report["drift"]["tokens"][0]
    assert tokens == sum(SPANS.values())
    for layer in range(toy.LAYERS):
        wanted = expected_moments(run, VERSIONS[kind], predictions(), layer)
        found = {name: tokens * report["drift"][name][layer] for name in MOMENTS}
        # The true drift is a difference of fp32 logits.
        assert found == pytest.approx(wanted, rel=1e-4), layer
        assert report["drift"]["gate_share"][layer] > 0.0


def test_a_routers_bias_is_part_of_the_gate(host_platform: object) -> None:
    run, report = rolled_out(VERSIONS["one push"], predictions(), add_bias_linear=True)
    wanted = expected_moments(run, VERSIONS["one push"], predictions(), 0)
    without = expected_moments({**run, "before": [{**each, "bias": 0 * each["bias"]} for each in run["before"]]},
                               VERSIONS["one push"], predictions(), 0)  # fmt: skip
    found = report["drift"]["tokens"][0] * report["drift"]["gate_squared"][0]
    assert found == pytest.approx(wanted["gate_squared"], rel=1e-4)
    assert found != pytest.approx(without["gate_squared"], rel=1e-2)


def test_all_drift_of_the_first_routers_is_their_gates(host_platform: object) -> None:
    """Nothing before them has moved."""
    _, report = rolled_out(VERSIONS["one push"], predictions())
    drift = report["drift"]
    assert drift["gate_share"][0] == pytest.approx(1.0, abs=1e-2)  # h_old is kept in bf16
    assert drift["hidden_share"][0] < 1e-3 < drift["hidden_share"][1]


def test_scalars_and_what_keeps_no_inputs(host_platform: object) -> None:
    run, report = rolled_out(VERSIONS["one push"], predictions())
    metrics = run["pr2"].metrics()
    assert metrics["pr2/correlation"] == pytest.approx(sum(report["drift"]["correlation"]) / toy.LAYERS, rel=rounding(1))
    assert {"pr2/r_squared", "pr2/gate_share", "pr2/hidden_share"} <= metrics.keys()
    assert not {f"pr2/{name}" for name in MOMENTS} & metrics.keys()
    chunk = toy.ToyChunk(toy.toy_config())
    assert "r_squared" not in attach(chunk, toy.preset("r3")).step(0.0)["drift"]
