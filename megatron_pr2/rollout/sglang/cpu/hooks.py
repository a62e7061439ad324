"""What SGLang's CPU engine lacks on the way of an MoE model with returned routes, as hooks of its plugin registry.

Each hook replaces or wraps one function at the seam named beside it; nothing here runs on a GPU. Checked with SGLang 0.5.19
and 0.5.23, whose seams are the same but for the `device` of the host cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from megatron_pr2.rollout.sglang.cpu.seeds import fill_sampling_seeds, sample_filtered, sample_with_seeds


def init_host_cache(cache: Any, num_tokens: int, num_layers: int, topk_size: int, name: str, device: str = "cpu") -> None:
    """REPLACE `BaseHostCache.__init__`: the same int32 [tokens, layers, top-k] buffer without pinning memory, which needs CUDA."""
    cache.buffer = torch.zeros((num_tokens, num_layers, topk_size), dtype=torch.int32)
    cache.num_tokens = num_tokens
    cache.num_layers = num_layers
    cache.topk_size = topk_size
    cache.name = name
    cache._log_allocation()


def skip_foreign_experts(
    native: Callable[..., torch.Tensor], layer: torch.nn.Module, x: torch.Tensor, topk_output: Any, moe_runner_config: Any
) -> torch.Tensor:
    """AROUND `moe_forward_native`: leaves out id -1, an expert of another rank, which the native kernel would index with.

    What remains of a row has no fixed number of experts, so every (token, expert) pair goes in as a token with one expert.
    """
    mine = topk_output.topk_ids >= 0
    if bool(mine.all()):
        return native(layer, x, topk_output, moe_runner_config)
    tokens = mine.nonzero()[:, 0]
    total = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    if tokens.numel():
        pairs = topk_output._replace(
            topk_ids=topk_output.topk_ids[mine].unsqueeze(1), topk_weights=topk_output.topk_weights[mine].unsqueeze(1)
        )
        total.index_add_(0, tokens, native(layer, x[tokens], pairs, moe_runner_config).float())
    return total.to(x.dtype)


def set_seq_len_fill_value(_result: None, backend: Any, *args: Any, **kwargs: Any) -> None:
    """AFTER `TorchNativeAttnBackend.__init__`: the sequence length of padding rows, which DP attention asks the backend for."""
    if not hasattr(type(backend), "get_cpu_graph_seq_len_fill_value"):
        backend.get_cpu_graph_seq_len_fill_value = lambda: 1


def reduce_scatterv(
    group: Any, input_: torch.Tensor, output: torch.Tensor | None = None, sizes: Sequence[int] | None = None
) -> torch.Tensor:
    """REPLACE `GroupCoordinator.reduce_scatterv`: all-reduce, then this rank's rows; the original needs NCCL.

    Args:
        input_: [sum(sizes), ...], one block of rows per rank.
        output: [sizes[rank], ...] or None to allocate.
        sizes: rows per rank; equal blocks if None.
    """
    if sizes is None:
        sizes = [input_.shape[0] // group.world_size] * group.world_size
    start = sum(sizes[: group.rank_in_group])
    rows = group.all_reduce(input_)[start : start + sizes[group.rank_in_group]]
    return rows.clone() if output is None else output.copy_(rows)


def register_hooks() -> None:
    """Registers all of the above with SGLang's HookRegistry."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register("sglang.srt.state_capturer.base.BaseHostCache.__init__", init_host_cache, HookType.REPLACE)
    HookRegistry.register("sglang.srt.layers.moe.fused_moe_native.moe_forward_native", skip_foreign_experts, HookType.AROUND)
    HookRegistry.register(
        "sglang.srt.layers.attention.torch_native_backend.TorchNativeAttnBackend.__init__",
        set_seq_len_fill_value,
        HookType.AFTER,
    )
    HookRegistry.register(
        "sglang.srt.distributed.parallel_state.GroupCoordinator.reduce_scatterv", reduce_scatterv, HookType.REPLACE
    )
    HookRegistry.register(
        "sglang.srt.sampling.sampling_batch_info.SamplingBatchInfo.from_schedule_batch", fill_sampling_seeds, HookType.AFTER
    )
    HookRegistry.register("sglang.srt.layers.sampler.multinomial_with_seed", sample_with_seeds, HookType.REPLACE)
    HookRegistry.register(
        "sglang.srt.layers.sampler.top_k_top_p_min_p_sampling_from_probs_torch", sample_filtered, HookType.REPLACE
    )
