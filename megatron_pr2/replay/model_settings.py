"""Settings of a model under which replay would be wrong or impossible: refused by name when PR2 attaches.

Settings are asked for by name, since every release of Megatron-Core has others: what an earlier one does not have must not be
overlooked in a later one. docs/attach.md lists those that were looked at and found to be harmless.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_pr2.errors import AttachError
from megatron_pr2.replay.hook import knows_score_function
from megatron_pr2.replay.scores import SCORE_FUNCTIONS

logger = logging.getLogger(__name__)

# What a setting does, and what to do instead: refused unless it is None or as in OFF.
REFUSED = {
    "moe_expert_capacity_factor": "drops tokens from experts, also from replayed ones; set it to None for RL",
    "overlap_moe_expert_parallel_comm": (
        "runs layers of two micro-batches interleaved, outside the chunk's forward; replay cannot follow it: set it to False"
    ),
    "moe_router_force_load_balancing": "replaces router logits by noise (for benchmarks); switch it off",
    "moe_router_force_biased": "replaces router logits by noise (for benchmarks); switch it off",
    "moe_n_hash_layers": "makes hash layers, which choose experts by token id and have no route to replay; set it to 0",
    "moe_num_hash_layers": "makes hash layers, which choose experts by token id and have no route to replay; set it to 0",
    "hybrid_context_parallel": (
        "changes the context-parallel size from sequence to sequence, and with it which rank computes which token; replay cannot "
        "follow it: set it to False"
    ),
    "mlp_chunks_for_training": (
        "calls each router several times per micro-batch, once for each chunk of its rows; set it to 1 (recompute_modules=moe "
        "saves the memory, too)"
    ),
    "moe_paged_stash": (
        "runs a whole schedule again when its buffers overflow, with the same micro-batches, which replay takes for more "
        "micro-batches than the pass has; set it to False (recompute_modules=moe saves the memory, too)"
    ),
    "gtp_weight_remat_size": (
        "adds an axis of ranks that hold other tokens (generalised tensor parallelism), over which PR2 neither sends routes nor "
        "sums gradients; leave tensor_parallel_num_weight_shards out"
    ),
    "expert_gtp_weight_remat_size": (
        "adds an axis of ranks that hold other tokens (generalised tensor parallelism of experts), over which PR2 neither sends "
        "routes nor sums gradients; leave expert_tensor_parallel_num_weight_shards out"
    ),
}
# Where a setting is off: flags and numbers at 0, sizes at 1; a capacity of 0 is one, too.
SIZES = ("mlp_chunks_for_training", "gtp_weight_remat_size", "expert_gtp_weight_remat_size")
OFF = dict.fromkeys(REFUSED, 0) | dict.fromkeys(SIZES, 1) | {"moe_expert_capacity_factor": None}
# What moves routing besides the policy gradient: warned of unless it is 0 or None.
MOVES_ROUTING = {
    "moe_aux_loss_coeff": "an auxiliary router loss sees live logits, also under replay, and trains the routers",
    "moe_z_loss_coeff": "an auxiliary router loss sees live logits, also under replay, and trains the routers",
    "moe_router_bias_update_rate": (
        "Megatron-Core moves expert biases after every update, by how many tokens each expert got; padding and replayed tokens are "
        "not counted, so that biases move under live routing (grpo) only"
    ),
    "moe_input_jitter_eps": "noise in the routers' input, other in every pass",
    "hidden_dropout": "noise in the routers' input, other in every training pass",
    "attention_dropout": "noise in the routers' input, other in every training pass",
}
# Parts of a layer that hold the router when a CUDA graph is made of them.
_ROUTING_PARTS = {"moe", "moe_router", "moe_preprocess", "full_iteration"}


def check_config(config: TransformerConfig) -> None:
    """Refuses settings of the model under which replay would be wrong or impossible.

    Raises:
        AttachError: naming the setting and what to set it to.
    """
    if not config.num_moe_experts:
        raise AttachError("the model has no experts (num_moe_experts is not set): nothing to route; attach() needs a MoE model")
    for name, why in REFUSED.items():
        value = getattr(config, name, None)
        if value is not None and value != OFF[name]:
            raise AttachError(f"{name}={value} {why}")
    # A budget of tokens per expert rank: HybridEP drops what is beyond it, NCCL EP stops with an error of its own.
    factor = getattr(config, "moe_expert_rank_capacity_factor", None)
    if factor is not None and config.moe_flex_dispatcher_backend != "ncclep":
        raise AttachError(
            f"moe_expert_rank_capacity_factor={factor} with moe_flex_dispatcher_backend={config.moe_flex_dispatcher_backend!r} "
            "drops tokens beyond the budget of an expert rank, also from replayed experts; set it to None for RL"
        )
    name = config.moe_router_score_function
    if name not in SCORE_FUNCTIONS:
        raise AttachError(
            f"moe_router_score_function={name!r}: PR2 knows no divergence between such scores; use {' or '.join(SCORE_FUNCTIONS)}"
        )
    if not knows_score_function(name):
        raise AttachError(
            f"moe_router_score_function={name!r}: this release of Megatron-Core does not route by it; use a later release"
        )
    _check_cuda_graphs(config)
    # Once per model, not on every rank.
    if (moving := moves_routing(config)) and not (dist.is_initialized() and dist.get_rank()):
        logger.warning(
            "routing moves by more than the policy gradient, and drift counts it; set to 0 for RL: %s",
            "; ".join(f"{name}={value} ({MOVES_ROUTING[name]})" for name, value in moving.items()),
        )


def moves_routing(config: Any) -> dict[str, Any]:
    """The settings of MOVES_ROUTING that are in effect, with their values."""
    without = {"moe_aux_loss_coeff"} if config.moe_router_load_balancing_type == "none" else set()
    if not config.moe_router_enable_expert_bias:
        without.add("moe_router_bias_update_rate")
    values = {name: getattr(config, name, None) for name in MOVES_ROUTING if name not in without}
    return {name: value for name, value in values.items() if any(value if isinstance(value, list) else [value])}


def check_not_captured(chunk: torch.nn.Module, name: str) -> None:
    """Refuses a router within a layer that Megatron-Core captures as a whole, whatever parts are named in the config.

    Its own graphs (cuda_graph_impl="local") take all of a layer that has both attention and experts where `attn` is named.

    Args:
        name: of the router in the chunk, `decoder.layers.3.mlp.router`.

    Raises:
        AttachError: naming the layer.
    """
    path = name.split(".")
    for end in range(3, len(path)):
        layer = chunk.get_submodule(".".join(path[:end]))
        if any(hasattr(layer, graphs) for graphs in ("cudagraph_manager", "cudagraph_manager_router")):
            raise AttachError(
                f"{name}: cuda_graph_impl='local' captures {'.'.join(path[:end])} with its router, also where only attn is named; "
                "a captured router repeats the routes of the micro-batch that it was captured with; use "
                "cuda_graph_impl='transformer_engine'"
            )


def _check_cuda_graphs(config: Any) -> None:
    """A captured router repeats the routes of the micro-batch that it was captured with, whatever is replayed."""
    implementation = getattr(config, "cuda_graph_impl", "none")
    if implementation == "none":
        return
    # Later releases move `cuda_graph_scope` to `cuda_graph_modules` when the config is made, and leave None behind.
    name = "cuda_graph_modules" if hasattr(config, "cuda_graph_modules") else "cuda_graph_scope"
    # Parts of a layer that are captured in training; none for the whole layer, unless only blocks are captured, for inference.
    parts = {getattr(part, "name", str(part)) for part in getattr(config, name) or ()}
    scope = getattr(config, "inference_cuda_graph_scope", None)
    inference_only = getattr(scope, "name", scope) == "block"
    if implementation != "full_iteration" and not parts & _ROUTING_PARTS and (parts or inference_only):
        return
    captured = ",".join(sorted(parts)) or "the whole layer"
    raise AttachError(
        f"cuda_graph_impl={implementation!r} with {name}={captured} captures the routers: a captured router repeats the routes of "
        f"the micro-batch that it was captured with; set cuda_graph_impl='transformer_engine' and {name} to others (attn, mlp)"
    )
