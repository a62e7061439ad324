"""SGLang plugin for CPU engines: what they lack for an MoE model with returned routes, as hooks in SGLang's own registry.

SGLang loads it in every one of its processes through the entry point group `sglang.srt.plugins`; where this package is not
installed as a distribution, `launch` calls `register` itself, with the same result.
Nothing here runs on a GPU. Checked with SGLang 0.5.19 and 0.5.23.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch

from megatron_pr2.rollout.sglang.cpu.seeds import fill_sampling_seeds, sample_filtered, sample_with_seeds

logger = logging.getLogger(__name__)

_registered = False


def register() -> None:
    """Registers the hooks once per process; does nothing unless SGLang runs its CPU engine on a machine without CUDA."""
    global _registered
    if _registered or torch.cuda.is_available():
        return
    from sglang.srt.utils import is_cpu

    if not is_cpu():
        return
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    for target, hook, kind in (
        ("state_capturer.base.BaseHostCache.__init__", init_host_cache, HookType.REPLACE),
        ("layers.moe.fused_moe_native.moe_forward_native", skip_foreign_experts, HookType.AROUND),
        ("layers.attention.torch_native_backend.TorchNativeAttnBackend.__init__", set_seq_len_fill_value, HookType.AFTER),
        ("distributed.parallel_state.GroupCoordinator.reduce_scatterv", reduce_scatterv, HookType.REPLACE),
        ("sampling.sampling_batch_info.SamplingBatchInfo.from_schedule_batch", fill_sampling_seeds, HookType.AFTER),
        ("layers.sampler.multinomial_with_seed", sample_with_seeds, HookType.REPLACE),
        ("layers.sampler.top_k_top_p_min_p_sampling_from_probs_torch", sample_filtered, HookType.REPLACE),
    ):
        HookRegistry.register(f"sglang.srt.{target}", hook, kind)
    _registered = True
    logger.info("megatron_pr2: hooks for SGLang's CPU engine are registered")


def init_host_cache(cache: Any, num_tokens: int, num_layers: int, topk_size: int, name: str, device: str = "cpu") -> None:
    """REPLACE `BaseHostCache.__init__`: the same int32 [tokens, layers, top-k] buffer without pinning memory, which needs CUDA."""
    buffer = torch.zeros((num_tokens, num_layers, topk_size), dtype=torch.int32)
    vars(cache).update(buffer=buffer, num_tokens=num_tokens, num_layers=num_layers, topk_size=topk_size, name=name)
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
