"""A model of nothing but routers: h = h + probs @ V in every layer, with Megatron-Core's own TopKRouter.

It needs no process group. Tokens are rows of a fixed table, so that the same (sequence, position) has the same input however a
batch is cut. `T` tokens, `L` layers, `E` experts, `K` top-k, `H` hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from megatron.core import tensor_parallel
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_pr2.attach import PR2, ReplaySequence
from megatron_pr2.config import PR2Config
from megatron_pr2.parallel.grid import TokenGrid, moe_layer_indices, padded
from megatron_pr2.replay.hook import knows_score_function
from megatron_pr2.replay.micro_batch import MicroBatch
from megatron_pr2.replay.session import ReplaySession
from megatron_pr2.routes.table import RouteTable
from tests.helpers.ids import random_ids

HIDDEN, EXPERTS, TOPK, LAYERS = 32, 8, 2, 2

# Every kind of selection that this release's TopKRouter knows.
ROUTERS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "pre-softmax": {"moe_router_pre_softmax": True},
    "sigmoid": {"moe_router_score_function": "sigmoid"},
    "sigmoid-bias": {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True},
    "groups": {
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_num_groups": 4,
        "moe_router_group_topk": 2,
    },
    "softmax-groups": {"moe_router_pre_softmax": True, "moe_router_num_groups": 4, "moe_router_group_topk": 2},
    "scaling": {"moe_router_score_function": "sigmoid", "moe_router_topk_scaling_factor": 2.5},
    "fp32-router": {"moe_router_dtype": "fp32"},
    "top-1": {"moe_router_topk": 1, "moe_router_pre_softmax": True},
}
if knows_score_function("sqrtsoftplus"):
    ROUTERS["sqrtsoftplus"] = {"moe_router_score_function": "sqrtsoftplus"}
    ROUTERS["sqrtsoftplus-bias"] = {"moe_router_score_function": "sqrtsoftplus", "moe_router_enable_expert_bias": True}


def preset(name: str, **overrides: Any) -> PR2Config:
    """A preset under which routes may be random (they agree with no router), and predictions are used immediately."""
    return PR2Config.preset(name, **{"min_agreement": 0.0, "hold_back": False, **overrides})


def toy_config(**changes: Any) -> TransformerConfig:
    """A config of LAYERS MoE layers; the routers' weights are fp32 unless told otherwise."""
    settings: dict[str, Any] = {
        "num_layers": LAYERS,
        "hidden_size": HIDDEN,
        "num_attention_heads": 2,
        "moe_ffn_hidden_size": HIDDEN,
        "num_moe_experts": EXPERTS,
        "moe_router_topk": TOPK,
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "add_bias_linear": False,
        "use_cpu_initialization": True,
        "params_dtype": torch.float32,
    }
    return TransformerConfig(**{**settings, **changes})


class ToyMLP(nn.Module):
    """A router and what its probabilities are multiplied with."""

    def __init__(self, config: TransformerConfig, layer_number: int, router_class: type[TopKRouter]) -> None:
        super().__init__()
        self.router = router_class(config=config, pg_collection=SimpleNamespace(tp=None, cp=None, tp_cp=None, tp_dp_cp=None))
        self.router.set_layer_number(layer_number)
        self.values = nn.Parameter(torch.empty(config.num_moe_experts, config.hidden_size))

    def forward(self, h_SBH: Tensor) -> Tensor:
        probs_TE, _ = self.router(h_SBH)
        return h_SBH + (probs_TE.to(self.values.dtype) @ self.values).view_as(h_SBH)


class ToyLayer(nn.Module):
    """A decoder layer; `mlp` is None where the layer is dense."""

    def __init__(self, config: TransformerConfig, layer_number: int, is_moe: bool, router_class: type[TopKRouter]) -> None:
        super().__init__()
        self.layer_number = layer_number
        self.mlp = ToyMLP(config, layer_number, router_class) if is_moe else nn.Identity()

    def forward(self, h_SBH: Tensor) -> Tensor:
        return self.mlp(h_SBH)


class ToyChunk(nn.Module):
    """A model chunk: [S, B, H] -> [S, B, H]."""

    def __init__(
        self,
        config: TransformerConfig,
        *,
        recompute: bool = False,
        router_class: type[TopKRouter] = TopKRouter,
        seed: int = 0,
        mtp: bool = False,
        layers: Sequence[int] | None = None,
    ) -> None:
        """Args:
        recompute: full activation recomputation, layer by layer.
        router_class: of all routers.
        mtp: adds a multi-token-prediction head, which no forward uses.
        layers: 1-based numbers of the layers of this chunk; None for all.
        """
        super().__init__()
        self.config, self.recompute = config, recompute
        moe = moe_layer_indices(config.num_layers, config.moe_layer_freq)
        self.decoder = nn.Module()
        self.decoder.layers = nn.ModuleList(
            ToyLayer(config, number, number - 1 in moe, router_class)
            for number in (range(1, config.num_layers + 1) if layers is None else layers)
        )
        if mtp:  # restarts the numbering at 1, as Megatron-Core's heads do
            self.mtp = nn.Module()
            self.mtp.layers = nn.ModuleList([ToyLayer(config, 1, True, router_class)])
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_(0.0, 0.2, generator=generator)
            for router in routers(self):
                if router.expert_bias is not None:
                    router.expert_bias.uniform_(-0.3, 0.3, generator=generator)

    def forward(self, h_SBH: Tensor) -> Tensor:
        for layer in self.decoder.layers:
            h_SBH = tensor_parallel.checkpoint(layer, False, h_SBH) if self.recompute else layer(h_SBH)
        return h_SBH


def routers(model: nn.Module) -> list[TopKRouter]:
    """Routers of the decoder, ascending by layer."""
    found = [m for n, m in model.named_modules() if isinstance(m, TopKRouter) and "mtp" not in n]
    return sorted(found, key=lambda router: router.layer_number)


def drift(chunk: nn.Module, size: float = 0.05, seed: int = 7) -> None:
    """Moves the routers, as an update of the policy does."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for router in routers(chunk):
            # Drawn on the CPU, so that every device and dtype drifts alike.
            router.weight += (size * torch.randn(router.weight.shape, generator=generator)).to(router.weight)


@dataclass(frozen=True)
class Batch:
    """A micro-batch with its router inputs."""

    micro_batch: MicroBatch
    inputs_SBH: Tensor


def token_inputs(grid: TokenGrid, hidden: int = HIDDEN, padding: float = 3.0) -> Tensor:
    """Inputs [S, B, H] that depend on (sequence, position) alone; padding is filled with a constant that would be noticed."""
    rows = np.full((grid.num_rows, hidden), padding, dtype=np.float32)
    for row, (sequence, position) in enumerate(zip(*grid.rows(), strict=True)):
        if sequence >= 0:
            rows[row] = np.random.default_rng([int(sequence), int(position)]).standard_normal(hidden)
    return torch.from_numpy(rows).view(*grid.sequence.shape, hidden)


def batches(lengths: dict[int, int], size: int, hidden: int = HIDDEN) -> list[Batch]:
    """Cuts sequences (id -> length) into padded micro-batches of `size`, in order; two rows of padding each."""
    ids = list(lengths)
    out = []
    for start in range(0, len(ids), size):
        chunk = ids[start : start + size]
        counts = [lengths[i] for i in chunk]
        grid = padded(chunk, counts, max(counts) + 2)
        out.append(Batch(MicroBatch(("mb", start), grid), token_inputs(grid, hidden)))
    return out


def random_tables(
    lengths: dict[int, int], config: TransformerConfig, missing: Iterable[tuple[int, int]] = ()
) -> dict[int, RouteTable]:
    """Random routes per sequence; the last token and the (sequence, position) pairs in `missing` have none."""
    layers = len(moe_layer_indices(config.num_layers, config.moe_layer_freq))
    tables = {}
    for sequence, length in lengths.items():
        ids = random_ids(length, layers, config.moe_router_topk, config.num_moe_experts, seed=sequence)
        ids[[length - 1, *[p for s, p in missing if s == sequence]]] = -1
        tables[sequence] = RouteTable.from_ids(ids, config.num_moe_experts)
    return tables


def sequences(lengths: dict[int, int], tables: dict[int, RouteTable] | None, prompt: int = 3) -> list[ReplaySequence]:
    """What begin_rollout takes: prompts of `prompt` tokens, the rest is response."""
    return [
        ReplaySequence(i, n, min(prompt, n) - 1, n - 1, None if tables is None else tables[i]) for i, n in lengths.items()
    ]


@dataclass(eq=False)
class Call:
    """One call of one router.

    Attributes:
        layer: 0-based.
        recomputed: whether it ran inside autograd's backward.
        number: counts the calls of this layer, forward and recomputed ones apart.
        hidden_TH, probs_TE, map_TE: input and outputs.
    """

    layer: int
    recomputed: bool
    number: int
    hidden_TH: Tensor
    probs_TE: Tensor
    map_TE: Tensor


@contextmanager
def observed(model: nn.Module) -> Any:
    """Collects every call of every decoder router: what was really selected, not what a session says."""
    calls: list[Call] = []

    def hook(router: TopKRouter) -> Callable[..., None]:
        def keep(_: nn.Module, inputs: tuple[Tensor, ...], outputs: tuple[Tensor, Tensor]) -> None:
            hidden = inputs[0].detach().reshape(-1, inputs[0].shape[-1]).clone()
            recomputed = torch._C._current_graph_task_id() != -1
            layer = router.layer_number - 1
            number = sum(call.layer == layer and call.recomputed == recomputed for call in calls)
            calls.append(Call(layer, recomputed, number, hidden, outputs[0].detach(), outputs[1].detach()))

        return keep

    handles = [router.register_forward_hook(hook(router)) for router in routers(model)]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def run(session: ReplaySession, chunk: nn.Module, data: Sequence[Batch], *, backward: bool = True) -> list[Tensor]:
    """Runs all micro-batches of a pass, one after the other; returns the outputs."""
    outputs = []
    for batch in data:
        with torch.set_grad_enabled(backward):
            session.begin(chunk, batch.micro_batch)
            output = chunk(batch.inputs_SBH.clone().requires_grad_(backward))
            session.end(chunk, batch.micro_batch, output)
        if backward:
            loss(output).backward()
        outputs.append(output.detach())
    return outputs


def loss(output: Tensor) -> Tensor:
    """Any scalar whose gradient differs from row to row."""
    weights = torch.linspace(-1.0, 1.0, output.numel(), device=output.device)
    return (output.float() * weights.view_as(output)).sum() / output.shape[-1]


def old_logprobs(pr2: PR2, chunk: nn.Module, data: Sequence[Batch]) -> list[Tensor]:
    """The whole old-log-prob pass."""
    with pr2.old_logprobs([b.micro_batch for b in data]) as session:
        return run(session, chunk, data, backward=False)


def update(pr2: PR2, chunk: nn.Module, data: Sequence[Batch], mini_step: int) -> list[Tensor]:
    """Forward and backward of a whole mini-step."""
    with pr2.actor_update([b.micro_batch for b in data], mini_step) as session:
        return run(session, chunk, data)
