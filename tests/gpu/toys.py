"""The toy model of tests/helpers/toy.py on any device and in any dtype: its passes, and every bit that they leave behind.

Suffixes: T rows, L layers, E experts, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from megatron.core.transformer.moe.moe_utils import router_gating_linear
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from megatron_pr2.attach import PR2, attach
from megatron_pr2.config import PR2Config
from megatron_pr2.prediction.learned import LearnedPredictor
from tests.helpers import toy
from tests.helpers.loop import digest

LENGTHS = {0: 17, 1: 23, 2: 9}
MISSING = [(0, 5), (1, 20), (1, 8)]
ROUTER_DTYPES = {"fp32": torch.float32, "fp64": torch.float64}

# (layer, sequence, position) -> (router input [H], logits [E])
ByToken = dict[tuple[int, int, int], tuple[Tensor, Tensor]]


def chunk(
    config: Any,
    device: torch.device,
    dtype: torch.dtype,
    *,
    recompute: bool = False,
    router_class: type[TopKRouter] = TopKRouter,
) -> toy.ToyChunk:
    """A ToyChunk on a device; its weights are those of the same chunk on the CPU, rounded to `dtype`."""
    # It draws from a CPU generator, which fills CPU tensors only; Megatron-Core puts a router's buffers on the current CUDA device.
    with mock.patch.object(torch.cuda, "current_device", return_value=torch.device("cpu")):
        made = toy.ToyChunk(config, recompute=recompute, router_class=router_class)
    return made.to(device, dtype)


def batches(
    lengths: dict[int, int], size: int, device: torch.device, dtype: torch.dtype, hidden: int = toy.HIDDEN
) -> list[toy.Batch]:
    """toy.batches on a device."""
    return [toy.Batch(b.micro_batch, b.inputs_SBH.to(device, dtype)) for b in toy.batches(lengths, size, hidden)]


# ---- I1, I2: the policy of one rollout batch, bit by bit -------------------------------------------------------------


@dataclass
class Trace:
    """What one rollout batch did to the policy, as hashes per mini-step, and to the predictor.

    Attributes:
        forward: outputs and routing maps of the old-log-prob pass and of every mini-step.
        gradients, weights, optimizer: of the policy.
        predictor_gradients: norms, per mini-step.
        predictor: the norm of W_p at the end.
        merged_is_own: whether the merged gates are the actor's own at the end, bit by bit.
    """

    forward: list[str] = field(default_factory=list)
    gradients: list[str] = field(default_factory=list)
    weights: list[str] = field(default_factory=list)
    optimizer: list[str] = field(default_factory=list)
    predictor_gradients: list[float] = field(default_factory=list)
    predictor: float = 0.0
    merged_is_own: bool = True

    def policy(self) -> dict[str, list[str]]:
        """What must not depend on a predictor."""
        return {name: getattr(self, name) for name in ("forward", "gradients", "weights", "optimizer")}


def train(
    pr2_config: PR2Config, kind: str, device: torch.device, dtype: torch.dtype, *, recompute: bool = False, mini_steps: int = 3
) -> Trace:
    """One rollout batch with given routes: log-prob pass and mini-steps with Adam."""
    config = toy.toy_config(params_dtype=dtype, **toy.ROUTERS[kind])
    model = chunk(config, device, dtype, recompute=recompute)
    pr2 = attach(model, pr2_config)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    pr2.optimizer = optimizer
    pr2.begin_rollout(toy.sequences(LENGTHS, toy.random_tables(LENGTHS, config, MISSING)))
    data = batches(LENGTHS, 2, device, dtype)
    trace = Trace()

    def keep_forward(outputs: list[Tensor], calls: list[toy.Call]) -> None:
        trace.forward.append(digest([outputs, [(call.probs_TE, call.map_TE) for call in calls]]))

    with toy.observed(model) as calls:
        keep_forward(toy.old_logprobs(pr2, model, data), calls)
    for mini_step in range(1, mini_steps + 1):
        optimizer.zero_grad()
        with toy.observed(model) as calls:
            keep_forward(toy.update(pr2, model, data, mini_step), calls)
        trace.gradients.append(digest([p.grad for p in model.parameters()]))
        optimizer.step()
        report = pr2.step(0.02)
        trace.weights.append(digest(model.state_dict()))
        trace.optimizer.append(digest(optimizer.state_dict()))
        trace.predictor_gradients.append(report["predictor"]["grad_norm"])
    own = [router.weight.detach().clone() for router in toy.routers(model)]
    with pr2.merged_gates():
        trace.merged_is_own = all(torch.equal(a, r.weight) for a, r in zip(own, toy.routers(model), strict=True))
    trace.predictor = 0.0 if pr2.predictor is None else float(pr2.predictor.weight_LEH.norm())
    return trace


# ---- I5: what the routers saw in both passes -------------------------------------------------------------------------


def by_token(calls: list[toy.Call], data: list[toy.Batch], chunk: torch.nn.Module) -> ByToken:
    """Inputs and logits of every token and layer, by the routers' own kernel and in their own dtype."""
    seen: ByToken = {}
    for call in (c for c in calls if not c.recomputed):
        router = toy.routers(chunk)[call.layer]
        dtype = ROUTER_DTYPES.get(router.config.moe_router_dtype, call.hidden_TH.dtype)
        with torch.no_grad():
            logits_TE = router_gating_linear(call.hidden_TH, router.weight, None, dtype)
        for row, (sequence, position) in enumerate(zip(*data[call.number].micro_batch.grid.rows(), strict=True)):
            if sequence >= 0:
                seen[call.layer, int(sequence), int(position)] = call.hidden_TH[row], logits_TE[row]
    return seen


def mini_step(
    config: Any,
    pr2_config: PR2Config,
    lengths: dict[int, int],
    device: torch.device,
    dtype: torch.dtype,
    *,
    recompute: bool = False,
) -> tuple[PR2, LearnedPredictor, ByToken, ByToken, dict[int, Any]]:
    """A rollout batch up to the predictor's gradient: (pr2, its predictor, old and new (h, p) by token, tables).

    The two passes cut micro-batches differently.
    """
    model = chunk(config, device, dtype, recompute=recompute)
    pr2 = attach(model, pr2_config)
    assert isinstance(pr2.predictor, LearnedPredictor)
    noise_LEH = 0.1 * torch.randn(pr2.predictor.weight_LEH.shape, generator=torch.Generator().manual_seed(3))
    pr2.predictor.weight_LEH.copy_(noise_LEH)
    tables = toy.random_tables(lengths, config, [(s, p) for s, p in MISSING if lengths.get(s, 0) > p])
    pr2.begin_rollout(toy.sequences(lengths, tables))
    hidden = config.hidden_size
    first = batches(lengths, 2, device, dtype, hidden)
    second = batches(dict(reversed(lengths.items())), 1, device, dtype, hidden)
    with toy.observed(model) as calls:
        toy.old_logprobs(pr2, model, first)
    old = by_token(calls, first, model)
    toy.drift(model)
    with toy.observed(model) as calls:
        toy.update(pr2, model, second, 2)
    new = by_token(calls, second, model)
    return pr2, pr2.predictor, old, new, tables
