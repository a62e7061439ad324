"""Gates of published models, and Megatron-Core models around them that share one set of weights; for bench_router.

Shape suffixes: S positions, B sequences, H hidden, T tokens (S * B), E experts, K top-k.
"""

from __future__ import annotations

import functools
import importlib.util
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

VOCABULARY = 1024


@dataclass(frozen=True)
class Gate:
    """A router as published, and the expert size (ffn) that goes with it."""

    name: str
    hidden: int
    experts: int
    topk: int
    ffn: int
    score: str = "softmax"
    groups: int | None = None
    group_topk: int | None = None
    expert_bias: bool = False
    scaling: float | None = None

    def shrunk(self, divisor: int) -> Gate:
        """The same rule on a small model, for a check that everything runs."""
        if divisor == 1:
            return self
        hidden, ffn = max(64, self.hidden // divisor // 32 * 32), max(8, self.ffn // divisor // 8 * 8)
        return replace(self, hidden=hidden, ffn=ffn, experts=max(2 * self.topk, self.experts // 8))


GATES = {
    gate.name: gate
    for gate in (
        Gate("qwen3-30b", 2048, 128, 8, 768),
        Gate("mixtral", 4096, 8, 2, 14336),
        Gate("deepseek-v3", 7168, 256, 8, 2048, "sigmoid", 8, 4, True, 2.5),
    )
}


@dataclass(frozen=True)
class Platform:
    """Where and in which precision everything runs."""

    device: torch.device
    dtype: torch.dtype
    router_dtype: str | None

    @property
    def transformer_engine(self) -> bool:
        """Whether the specs that ask for Transformer Engine can be built; on a CPU the host provides them."""
        return self.device.type == "cpu" or importlib.util.find_spec("transformer_engine") is not None


def start(device: str, threads: int) -> torch.device:
    """One process as a whole Megatron world."""
    torch.set_num_threads(threads)
    scratch = tempfile.NamedTemporaryFile(prefix="bench_router_")  # noqa: SIM115  (lives as long as the process group)
    join: dict[str, Any] = {"init_method": f"file://{scratch.name}", "rank": 0, "world_size": 1}
    if device == "cpu":
        from megatron_pr2 import host

        host.init(threads=threads, **join)
        return torch.device("cpu")
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer.moe import moe_utils

    torch.cuda.set_device(0)
    dist.init_process_group("nccl", **join)
    parallel_state.initialize_model_parallel(create_gloo_process_groups=False)
    if not hasattr(moe_utils, "te_general_gemm"):
        # Megatron-Core 0.16 asks a CUDA gate whether it is None, and defines it only where Transformer Engine is.
        moe_utils.te_general_gemm = None
    model_parallel_cuda_manual_seed(0)
    return torch.device("cuda", 0)


def finish() -> None:
    """Undoes start()."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def model_config(gate: Gate, platform: Platform, *, layers: int, ffn: int, own_replay: bool) -> TransformerConfig:
    """Args: own_replay: whether Megatron-Core's RouterReplay is on."""
    settings: dict[str, Any] = {
        "num_layers": layers,
        "hidden_size": gate.hidden,
        "ffn_hidden_size": ffn,
        "num_attention_heads": max(1, gate.hidden // 128),
        "num_query_groups": 1,
        "moe_ffn_hidden_size": ffn,
        "num_moe_experts": gate.experts,
        "moe_router_topk": gate.topk,
        "moe_router_score_function": gate.score,
        "moe_router_num_groups": gate.groups,
        "moe_router_group_topk": gate.group_topk,
        "moe_router_enable_expert_bias": gate.expert_bias,
        "moe_router_topk_scaling_factor": gate.scaling,
        "moe_router_dtype": platform.router_dtype,
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        "moe_token_dispatcher_type": "alltoall",
        "moe_grouped_gemm": platform.device.type == "cuda" and platform.transformer_engine,
        "moe_enable_routing_replay": own_replay,
        "add_bias_linear": False,
        "gated_linear_unit": True,
        "activation_func": nn.functional.silu,
        "normalization": "RMSNorm",
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "perform_initialization": False,  # fill() does it, once for all models
        "params_dtype": platform.dtype,
        "bf16": platform.dtype is torch.bfloat16,
        "calculate_per_token_loss": True,
    }
    if platform.device.type == "cpu":
        from megatron_pr2 import host

        return host.adapt_config(TransformerConfig(use_cpu_initialization=True, **settings))
    return TransformerConfig(**settings)


class _Layer(nn.Module):
    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp


class RouterChunk(nn.Module):
    """A model chunk of routers and nothing else: inputs [S, B, H], one per layer, -> gate weights [T, E], one per layer."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        from megatron.core.transformer.moe.moe_utils import get_default_pg_collection

        self.config = config
        self.decoder = nn.Module()
        self.decoder.layers = nn.ModuleList()
        for number in range(1, config.num_layers + 1):
            mlp = nn.Module()
            mlp.router = TopKRouter(config=config, pg_collection=get_default_pg_collection())
            mlp.router.set_layer_number(number)
            self.decoder.layers.append(_Layer(mlp))

    def forward(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        return [layer.mlp.router(h_SBH)[0] for layer, h_SBH in zip(self.decoder.layers, inputs, strict=True)]


class LayerChunk(nn.Module):
    """A model chunk of one MoELayer: one [S, B, H] -> one [S, B, H]."""

    def __init__(self, config: TransformerConfig, transformer_engine: bool) -> None:
        super().__init__()
        from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
        from megatron.core.transformer.spec_utils import build_module

        self.config = config
        self.decoder = nn.Module()
        spec = get_moe_module_spec(
            use_te=transformer_engine, num_experts=config.num_moe_experts, moe_grouped_gemm=config.moe_grouped_gemm
        )
        # A ModuleSpec, or in later releases a functools.partial of the layer.
        build = spec if isinstance(spec, functools.partial) else functools.partial(build_module, spec)
        moe = build(config=config, layer_number=1)
        moe.set_layer_number(1)
        self.decoder.layers = nn.ModuleList([_Layer(moe)])

    def forward(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        output, _ = self.decoder.layers[0].mlp(*inputs)
        return [output]


def build(scope: str, gate: Gate, platform: Platform, *, layers: int, ffn: int, length: int, own_replay: bool = False) -> nn.Module:
    """A model for a scope: "router", "layer" or "step" (a GPT), with weights that are not filled yet.

    Args:
        length: tokens per sequence.
    """
    config = model_config(gate, platform, layers=layers, ffn=ffn, own_replay=own_replay)
    if scope == "router":
        return RouterChunk(config).to(platform.device)
    if scope == "layer":
        return LayerChunk(config, platform.transformer_engine).to(platform.device)
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

    spec = get_gpt_decoder_block_spec(config, use_transformer_engine=platform.transformer_engine)
    model = GPTModel(config, spec, VOCABULARY, length, position_embedding_type="rope", share_embeddings_and_output_weights=True)
    return model.to(platform.device)


def routers(model: nn.Module) -> list[TopKRouter]:
    """Routers of a model, ascending by layer."""
    return [module for module in model.modules() if isinstance(module, TopKRouter)]


@torch.no_grad()
def fill(model: nn.Module) -> None:
    """Random weights; logits spread by about 1 for inputs of unit variance."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.fill_(1.0)
        else:
            scale = parameter.shape[-1] ** -0.5
            parameter.normal_(0.0, scale if "router" in name else 0.5 * scale)
    for router in routers(model):
        if router.expert_bias is not None:
            router.expert_bias.uniform_(-0.05, 0.05)


def share_weights(model: nn.Module, base: nn.Module) -> None:
    """Makes a model of the same architecture use the very parameters of `base`: one set of weights, gradients, optimizer state."""
    sources = dict(base.named_modules())
    for name, module in model.named_modules():
        source = sources[name]
        for key in list(module._parameters):
            module._parameters[key] = source._parameters[key]
        for key in list(module._buffers):
            module._buffers[key] = source._buffers[key]


def weight_bytes(scope: str, gate: Gate, platform: Platform, layers: int, ffn: int) -> int:
    """Weights, gradients and, for a step, optimizer state of a model; an estimate by its large matrices."""
    experts = 0 if scope == "router" else 3 * gate.experts * gate.hidden * ffn
    dense = 2 * gate.hidden * gate.hidden if scope == "step" else 0
    count = layers * (experts + dense + gate.hidden * gate.experts) + (VOCABULARY * gate.hidden if scope == "step" else 0)
    # A step keeps an fp32 gradient and two Adam moments, and below fp32 a copy of the weights.
    size = platform.dtype.itemsize
    return count * (size * 2 if scope != "step" else size + 12 + (4 if size < 4 else 0))
