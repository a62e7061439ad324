"""Whole GPT models with Megatron-Core's own layer specs, schedule and optimizer, on the device of Megatron's parallel state.

One micro-batch is a padded batch [B, S] of random tokens with random routes. Suffixes: B sequences, S positions, T = S * B rows,
L MoE layers, K top-k.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec, get_gpt_layer_with_transformer_engine_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.moe import token_dispatcher
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_pr2 import host
from megatron_pr2.attach import PR2, attach
from megatron_pr2.config import PR2Config
from megatron_pr2.parallel.grid import padded
from megatron_pr2.replay.micro_batch import MicroBatch
from megatron_pr2.replay.session import ReplaySession
from megatron_pr2.routes.table import RouteTable
from tests.helpers import toy
from tests.helpers.loop import digest

VOCABULARY, WIDTH = 512, 64
# Rows of a micro-batch (2 x 64) and all widths divide by 128, the largest block of the FP8 recipes.
LENGTHS = {0: 61, 1: 40, 2: 55, 3: 64}
SPECS = ("local", "te")
Item = dict[str, Any]


def model_config(spec: str, *, on_gpu: bool, **changes: Any) -> TransformerConfig:
    """A small Qwen3-MoE in bf16.

    Args:
        spec: "local" (plain torch and Megatron-Core modules, sequential experts) or "te" (Transformer Engine, grouped experts).
        on_gpu: otherwise for the host platform, which provides modules for both.
    """
    settings: dict[str, Any] = {
        "num_layers": 2,
        "hidden_size": 256,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "kv_channels": 64,
        "ffn_hidden_size": 512,
        "moe_ffn_hidden_size": 256,
        "num_moe_experts": 16,
        "moe_router_topk": 4,
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        "moe_router_dtype": "fp32",
        "moe_token_dispatcher_type": "alltoall",
        "moe_grouped_gemm": spec == "te",
        "normalization": "RMSNorm",
        "add_bias_linear": False,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "init_method_std": 0.06,  # router logits that spread, so that routes are not decided by rounding
        "bf16": True,
        "params_dtype": torch.bfloat16,
        "pipeline_dtype": torch.bfloat16,
        "calculate_per_token_loss": True,
        "deterministic_mode": True,
        "finalize_model_grads_func": finalize_model_grads,
    }
    # What the host sets is what works without Apex and Transformer Engine, on a GPU as well.
    plain = host.config_overrides()
    if on_gpu and spec == "te":
        del plain["use_cpu_initialization"]
    return TransformerConfig(**{**settings, **plain, **changes})


def build(spec: str, config: TransformerConfig, *, seed: int = 0) -> torch.nn.Module:
    """The model in bf16 under Megatron's DistributedDataParallel, on the current device; the same weights for the same seed."""
    sizes = {"num_experts": config.num_moe_experts, "moe_grouped_gemm": config.moe_grouped_gemm}
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if spec == "te":
            layers = get_gpt_layer_with_transformer_engine_spec(**sizes)
        else:
            layers = get_gpt_layer_local_spec(**sizes, normalization="RMSNorm")
        model = GPTModel(config, layers, VOCABULARY, WIDTH, position_embedding_type="rope")
    model.to(torch.cuda.current_device())
    return DistributedDataParallel(
        config=config,
        ddp_config=DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=False),
        module=Float16Module(config, model),
    )


def optimizer_of(model: torch.nn.Module) -> Any:
    """Adam with fp32 copies of the bf16 parameters, as training has it."""
    config = OptimizerConfig(optimizer="adam", lr=2e-3, weight_decay=0.0, clip_grad=1.0, bf16=True, params_dtype=torch.bfloat16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_megatron_optimizer(config, [model], use_gloo_process_groups=False)


def items_of(size: int = 2) -> list[Item]:
    """Padded micro-batches of random sequences; mask [B, S] is 1 where a next token is predicted."""
    ids, items = list(LENGTHS), []
    for start in range(0, len(ids), size):
        group = ids[start : start + size]
        tokens_BS = torch.zeros(len(group), WIDTH, dtype=torch.long)
        mask_BS = torch.zeros(len(group), WIDTH)
        for row, sequence in enumerate(group):
            length = LENGTHS[sequence]
            generator = torch.Generator().manual_seed(sequence)
            tokens_BS[row, :length] = torch.randint(0, VOCABULARY, (length,), generator=generator)
            mask_BS[row, : length - 1] = 1.0
        grid = padded(group, [LENGTHS[s] for s in group], WIDTH)
        positions_BS = torch.arange(WIDTH).expand(len(group), -1).contiguous()
        items.append(
            {
                "micro_batch": MicroBatch(start, grid),
                "tokens": tokens_BS,
                "labels": tokens_BS.roll(-1, 1),
                "position_ids": positions_BS,
                "mask": mask_BS,
            }
        )
    return items


def tables_of(config: TransformerConfig) -> dict[int, RouteTable]:
    """Random routes; a few tokens have none."""
    return toy.random_tables(LENGTHS, config, [(0, 7), (3, 30)])


def run(
    session: ReplaySession | None, model: torch.nn.Module, items: Sequence[Item], *, forward_only: bool = False
) -> list[Tensor]:
    """All micro-batches through Megatron's schedule; per-token losses [B, S]. Without a session routing is live."""
    step = _forward_step if session is None else session.forward_step(_forward_step)
    results = get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iter(items),
        model=[model],
        num_microbatches=len(items),
        seq_length=WIDTH,
        micro_batch_size=len(items[0]["tokens"]),
        forward_only=forward_only,
    )
    return [result["losses"] for result in results]


def _forward_step(iterator: Iterator[Item], model: torch.nn.Module) -> Any:
    item = next(iterator)
    device = next(model.parameters()).device
    here = {name: value.to(device) for name, value in item.items() if isinstance(value, Tensor)}
    losses_BS = model(here["tokens"], here["position_ids"], None, labels=here["labels"])
    return losses_BS, partial(_loss, here["mask"])


def _loss(mask_BS: Tensor, losses_BS: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    return (losses_BS.float() * mask_BS).sum(), mask_BS.sum().to(torch.int), {"losses": losses_BS.detach().clone()}


@contextmanager
def observed(model: torch.nn.Module) -> Iterator[list[toy.Call]]:
    """toy.observed for whole layers: padding for FP8 adds tokens to a routing map in place, after the router returned it."""
    with toy.observed(model) as calls:

        def keep(*_: Any) -> None:
            calls[-1].map_TE = calls[-1].map_TE.clone()

        handles = [router.register_forward_hook(keep) for router in toy.routers(model)]
        try:
            yield calls
        finally:
            for handle in handles:
                handle.remove()


def wrong_routes(calls: Sequence[toy.Call], items: Sequence[Item], tables: dict[int, RouteTable]) -> tuple[int, int]:
    """(rows whose routing map is not their route, rows that have one), over all layers and micro-batches.

    Args:
        calls: what observed() collected in one pass.
    """
    wrong = total = 0
    for call in calls:
        map_TE = call.map_TE.cpu()
        for row, (sequence, position) in enumerate(zip(*items[call.number]["micro_batch"].grid.rows(), strict=True)):
            if sequence >= 0 and tables[int(sequence)].valid[position]:
                total += 1
                chosen = map_TE[row].nonzero()[:, 0].tolist()
                wrong += chosen != sorted(tables[int(sequence)].experts[position, call.layer].tolist())
    return wrong, total


@dataclass
class Trace:
    """One rollout batch as hashes per pass, and what did not go as it should.

    Attributes:
        forward, gradients, weights, optimizer: hashes of the policy.
        wrong, replayed: rows that took another route than their own, and rows that have one, over all passes.
        losses: means per pass.
        predictor: the norm of W_p at the end.
    """

    forward: list[str] = field(default_factory=list)
    gradients: list[str] = field(default_factory=list)
    weights: list[str] = field(default_factory=list)
    optimizer: list[str] = field(default_factory=list)
    wrong: int = 0
    replayed: int = 0
    losses: list[float] = field(default_factory=list)
    predictor: float = 0.0

    def policy(self) -> dict[str, list[str]]:
        """What must not depend on a predictor."""
        return {name: getattr(self, name) for name in ("forward", "gradients", "weights", "optimizer")}


def begin(model: torch.nn.Module, pr2_config: PR2Config) -> tuple[PR2, dict[int, RouteTable]]:
    """Attaches and takes the rollout batch."""
    pr2 = attach(model, pr2_config)
    tables = tables_of(pr2.model_config)
    pr2.begin_rollout(toy.sequences(LENGTHS, tables))
    return pr2, tables


def train(spec: str, config: TransformerConfig, pr2_config: PR2Config, *, mini_steps: int = 3) -> Trace:
    """Log-prob pass and mini-steps of one rollout batch."""
    model = build(spec, config)
    optimizer = optimizer_of(model)
    pr2, tables = begin(model, pr2_config)
    pr2.optimizer = optimizer
    items, trace = items_of(), Trace()
    micro_batches = [item["micro_batch"] for item in items]

    def keep(losses: list[Tensor], calls: list[toy.Call]) -> None:
        trace.forward.append(digest([losses, [(call.probs_TE, call.map_TE) for call in calls]]))
        trace.losses.append(float(torch.stack([each.float().mean() for each in losses]).mean()))
        wrong, replayed = wrong_routes(calls, items, tables)
        trace.wrong, trace.replayed = trace.wrong + wrong, trace.replayed + replayed

    with observed(model) as calls, pr2.old_logprobs(micro_batches) as session, torch.no_grad():
        losses = run(session, model, items, forward_only=True)
    keep(losses, calls)
    for mini_step in range(1, mini_steps + 1):
        model.zero_grad_buffer()
        optimizer.zero_grad()
        with observed(model) as calls, pr2.actor_update(micro_batches, mini_step) as session:
            losses = run(session, model, items)
        keep(losses, calls)
        trace.gradients.append(digest([p.main_grad for p in model.parameters()]))
        optimizer.step()
        pr2.step(2e-3)
        trace.weights.append(digest([p.data for p in model.parameters()]))
        trace.optimizer.append(digest(optimizer.state_dict()))
    trace.predictor = 0.0 if pr2.predictor is None else float(pr2.predictor.weight_LEH.norm())
    return trace


@dataclass
class Replayed:
    """One mini-step of a fresh model on given routes.

    Attributes:
        losses: per token, per micro-batch. gradients: of all parameters.
        wrong, rows: rows that took another route than their own, and rows that have one.
    """

    losses: list[Tensor]
    gradients: list[Tensor]
    wrong: int
    rows: int


def replay(spec: str, config: TransformerConfig, *, padding: bool = False) -> Replayed:
    """Forward and backward of the first mini-step under r3.

    Args:
        padding: pads every expert's tokens to multiples of 16, as for FP8, which the config allows with FP8 only.
    """
    model = build(spec, config)
    if padding:
        config.moe_router_padding_for_quantization = True
    pr2, tables = begin(model, toy.preset("r3", max_missing_share=1.0))
    items = items_of()
    # From 0.19 on the multiple is 0 without FP8.
    multiple = mock.patch.object(token_dispatcher, "get_align_size_for_quantization", return_value=16)
    with multiple, observed(model) as calls, pr2.actor_update([item["micro_batch"] for item in items], 1) as session:
        losses = run(session, model, items)
    return Replayed(losses, [p.main_grad.clone() for p in model.parameters()], *wrong_routes(calls, items, tables))


def live(model: torch.nn.Module) -> list[Tensor]:
    """Losses under live routing, without gradients."""
    with torch.no_grad():
        return run(None, model, items_of(), forward_only=True)


def relative_distance(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """|a - b| / |b| over all elements."""
    difference = sum(float((x.double() - y.double()).square().sum()) for x, y in zip(a, b, strict=True))
    return (difference / sum(float(y.double().square().sum()) for y in b)) ** 0.5
