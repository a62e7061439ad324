"""The few places where Megatron-Core itself assumes a GPU or Transformer Engine."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable
from typing import Any

import torch

from megatron_pr2.host import cuda
from megatron_pr2.host.patches import PatchSet


class _NoFP8:
    """The part of Transformer Engine's FP8GlobalStateManager that recomputation asks."""

    @staticmethod
    def is_fp8_enabled() -> bool:
        return False


def _to_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """maybe_move_tensor_to_cpu for tensors that are on the CPU already, for which Megatron's own ignores as_numpy."""
    return tensor.detach().numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def _share_storage(output: torch.Tensor, recomputed: torch.Tensor) -> None:
    """Fills the storage of an output that was released with what was computed again; every view of it sees the numbers."""
    source = recomputed.untyped_storage()
    storage = output.untyped_storage()
    storage.resize_(source.nbytes())
    storage.copy_(source)


def _communicate_shapes(self: Any, tensor_send_next: Any, tensor_send_prev: Any, recv_prev: bool, recv_next: bool) -> Any:
    """P2PCommunicator._communicate_shapes in the order of its unbatched sends and receives."""
    p2p = importlib.import_module("megatron.core.pipeline_parallel.p2p_communication")
    sent = {"tensor_send_prev": tensor_send_prev, "tensor_send_next": tensor_send_next}
    shapes = {name: None if tensor is None else torch.tensor(tensor.shape) for name, tensor in sent.items()}
    received = {
        "tensor_recv_prev": torch.zeros(3, dtype=torch.int64) if recv_prev else None,
        "tensor_recv_next": torch.zeros(3, dtype=torch.int64) if recv_next else None,
    }
    ranks = {"prev_pipeline_rank": self.prev_rank, "next_pipeline_rank": self.next_rank}
    requests = p2p._p2p_ops(**shapes, **received, **ranks, group=self.pp_group)
    for request in requests.values():
        request.wait()
    return tuple([0, 0, 0] if tensor is None else tensor.tolist() for tensor in received.values())


def _gather_rows(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def gather(
        input_: torch.Tensor, group: Any, output_split_sizes: list[int] | None = None, use_global_buffer: bool = False
    ) -> torch.Tensor:
        size = group.size()
        if output_split_sizes is None or size == 1:
            return original(input_, group, output_split_sizes, use_global_buffer)
        output = input_.new_empty(sum(output_split_sizes), *input_.shape[1:])
        sent = torch.cat([input_] * size)
        torch.distributed.all_to_all_single(output, sent, output_split_sizes, [len(input_)] * size, group=group)
        return output

    return gather


def _reduce_scatter_rows(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def reduce_scatter(
        input_: torch.Tensor, group: Any, input_split_sizes: list[int] | None = None, use_global_buffer: bool = False
    ) -> torch.Tensor:
        size = group.size()
        if input_split_sizes is None or size == 1:
            return original(input_, group, input_split_sizes, use_global_buffer)
        own = input_split_sizes[group.rank()]
        received = input_.new_empty(size * own, *input_.shape[1:])
        torch.distributed.all_to_all_single(received, input_.contiguous(), [own] * size, input_split_sizes, group=group)
        return received.view(size, own, *input_.shape[1:]).sum(0)

    return reduce_scatter


def patch_megatron(patches: PatchSet) -> None:
    """Applies everything of this module."""
    random = importlib.import_module("megatron.core.tensor_parallel.random")
    moe_utils = importlib.import_module("megatron.core.transformer.moe.moe_utils")
    dispatcher = importlib.import_module("megatron.core.transformer.moe.token_dispatcher")
    router = importlib.import_module("megatron.core.transformer.moe.router")
    shared_experts = importlib.import_module("megatron.core.transformer.moe.shared_experts")
    p2p = importlib.import_module("megatron.core.pipeline_parallel.p2p_communication")
    language = importlib.import_module("megatron.core.models.common.language_module.language_module")

    # These two go to torch.cuda.default_generators, which is empty without a driver.
    patches.set(random, "_get_cuda_rng_state", cuda.get_rng_state)
    patches.set(random, "_set_cuda_rng_state", cuda.set_rng_state)
    # CheckpointWithoutOutput (selective recomputation of layernorm, moe_act, ...) takes fp8=False for FP8 and then uses names
    # that exist only with Transformer Engine (megatron-core 0.16.1).
    patches.set(random, "FP8GlobalStateManager", _NoFP8)
    patches.set(random, "fp8_autocast", lambda **kwargs: contextlib.nullcontext())
    patches.set(random, "activation_recompute_forward", lambda **kwargs: contextlib.nullcontext())
    # Later releases share storages by a C++ extension that they compile on first use; the host copies, and needs no compiler.
    if hasattr(random, "_get_share_storage"):
        patches.set(random, "_get_share_storage", lambda: _share_storage)
    # Used without Transformer Engine, but defined only with it (megatron-core 0.16.1); None selects torch.mm.
    patches.set(moe_utils, "te_general_gemm", None)
    # all_to_all needs its split sizes as numbers, not as tensors.
    for module in (moe_utils, dispatcher):
        patches.set(module, "maybe_move_tensor_to_cpu", _to_cpu)
    # Both are created on first use and kept on the class; undoing must drop the host's streams.
    patches.set(dispatcher.MoEAlltoAllTokenDispatcher, "cuda_dtoh_stream", None)
    patches.set(shared_experts.SharedExpertMLP, "stream", None)
    # Compiled with torch.compile at import; the host runs them as they are, a compiler is not required.
    geglu = importlib.import_module("megatron.core.fusions.fused_bias_geglu")
    patches.set(geglu, "quick_gelu", getattr(geglu.quick_gelu, "_torchdynamo_orig_callable", geglu.quick_gelu))
    compiled = router.TopKRouter._apply_expert_bias
    patches.set(router.TopKRouter, "_apply_expert_bias", getattr(compiled, "_torchdynamo_orig_callable", compiled))
    # With expert tensor parallelism every rank holds another number of an expert's tokens; gloo gathers equal shapes only.
    mappings = importlib.import_module("megatron.core.tensor_parallel.mappings")
    patches.set(mappings, "_gather_along_first_dim", _gather_rows(mappings._gather_along_first_dim))
    patches.set(mappings, "_reduce_scatter_along_first_dim", _reduce_scatter_rows(mappings._reduce_scatter_along_first_dim))
    # Writes environment variables that choose Transformer Engine's kernels and fails if a model built earlier chose others.
    patches.set(language.LanguageModule, "_set_attention_backend", lambda self: None)
    # gloo matches messages between two ranks by order alone. With two pipeline stages the previous and the next rank are
    # one, and a batch of sends and receives pairs activations with gradients: under an interleaved schedule the gradients
    # are corrupt and nothing fails. The unbatched functions order them by the parity of the rank.
    patches.set(p2p, "_batched_p2p_ops", lambda **kwargs: list(p2p._p2p_ops(**kwargs).values()))
    patches.set(p2p.P2PCommunicator, "_communicate_shapes", _communicate_shapes)
