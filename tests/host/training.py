"""Megatron training steps on the host in any parallel layout, with results in layout-independent form (Hugging Face names).

Every layout sees the same sequences: data-parallel rank d takes sequences d, d + dp, ...
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from megatron_pr2 import host
from megatron_pr2.hf.bridge import export_weights, load_model

Weights = dict[str, torch.Tensor]
Sequences = list[torch.Tensor]


def random_sequences(lengths: tuple[int, ...] = (16, 8, 12, 16), seed: int = 1) -> Sequences:
    """Token ids, one tensor per sequence; every length divides by 4 (context parallelism of 2)."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 260, (length,), generator=generator) for length in lengths]


def _batches(sequences: Sequences, packed: bool) -> list[dict[str, Any]]:
    """This rank's micro-batches: one sequence each, or pairs of sequences packed into one row."""
    from megatron.core import parallel_state
    from megatron.core.packed_seq_params import PackedSeqParams

    from megatron_pr2.host.attention import zigzag_positions

    dp, dp_rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    cp, cp_rank = parallel_state.get_context_parallel_world_size(), parallel_state.get_context_parallel_rank()
    mean_length = sum(map(len, sequences)) / len(sequences)
    mine, rows = sequences[dp_rank::dp], 2 if packed else 1
    batches = []
    for first in range(0, len(mine), rows):
        group = mine[first : first + rows]
        here = [zigzag_positions(len(each) // cp, cp, cp_rank) for each in group]
        batch: dict[str, Any] = {
            "tokens": torch.cat([each[at] for each, at in zip(group, here, strict=True)])[None],
            "labels": torch.cat([each.roll(-1)[at] for each, at in zip(group, here, strict=True)])[None],
            "position_ids": torch.cat(here)[None],
            "packed_seq_params": None,
            # The same for every micro-batch, so that the loss does not depend on who shares a micro-batch with whom.
            "count": mean_length * rows,
        }
        if packed:
            boundaries = torch.tensor([0, *map(len, group)]).cumsum(0).int()
            longest = max(map(len, group))
            batch["packed_seq_params"] = PackedSeqParams(
                qkv_format="thd",
                cu_seqlens_q=boundaries,
                cu_seqlens_kv=boundaries,
                max_seqlen_q=longest,
                max_seqlen_kv=longest,
            )
        batches.append(batch)
    return batches


def _forward_step(iterator: Iterator[dict[str, Any]], model: torch.nn.Module) -> Any:
    batch = next(iterator)

    def loss_func(losses: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        loss = losses.sum() / batch["count"]
        # A copy: the schedule divides the loss in place by the number of micro-batches.
        return loss, {"loss": loss.detach().clone()}

    output = model(
        batch["tokens"],
        batch["position_ids"],
        None,
        labels=batch["labels"],
        packed_seq_params=batch["packed_seq_params"],
    )
    return output, loss_func


def forward_backward(chunks: list[torch.nn.Module], sequences: Sequences, *, packed: bool = False) -> float:
    """One forward and backward pass over all sequences; the mean loss per token on ranks of the last stage, else 0."""
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func

    batches = _batches(sequences, packed)
    losses = get_forward_backward_func()(
        forward_step_func=_forward_step,
        data_iterator=[iter(batches) for _ in chunks],
        model=chunks,
        num_microbatches=len(batches),
        seq_length=len(sequences[0]) * (2 if packed else 1),
        micro_batch_size=1,
        forward_only=False,
    )
    total = sum((each["loss"] for each in losses), torch.zeros(()))
    if losses:
        torch.distributed.all_reduce(total, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    return float(total) / len(sequences) * (2 if packed else 1)


def exported_gradients(bridge: Any, chunks: list[torch.nn.Module]) -> Weights:
    """Reduced gradients (``main_grad``) under Hugging Face names; the model's weights are left as they were."""
    saved = []
    with torch.no_grad():
        for chunk in chunks:
            for parameter in chunk.parameters():
                saved.append((parameter, parameter.clone()))
                parameter.copy_(parameter.main_grad)
        gradients = {name: tensor.clone() for name, tensor in export_weights(bridge, chunks) if "bias" not in name}
        for parameter, weight in saved:
            parameter.copy_(weight)
    return gradients


def gradients(
    path: Path,
    layout: dict[str, Any],
    sequences: Sequences,
    *,
    packed: bool = False,
    extra_config: dict[str, Any] | None = None,
) -> tuple[float, Weights]:
    """Loss and gradients of one step in a layout, on every rank."""
    host.init(**layout)
    bridge, chunks = load_model(
        path,
        dtype=torch.float32,
        ddp_config={"use_distributed_optimizer": False},
        extra_config=with_finalize(extra_config),
    )
    loss = forward_backward(chunks, sequences, packed=packed)
    return loss, exported_gradients(bridge, chunks)


def with_finalize(extra_config: dict[str, Any] | None = None) -> dict[str, Any]:
    """Config fields that make the schedule reduce gradients at the end of the pass."""
    from megatron.core.distributed import finalize_model_grads

    return {"finalize_model_grads_func": finalize_model_grads, **(extra_config or {})}


def train(
    path: Path,
    layout: dict[str, Any],
    sequences: Sequences,
    *,
    steps: int = 3,
    distributed_optimizer: bool = False,
    dtype: torch.dtype = torch.float32,
) -> tuple[list[float], list[float], Weights]:
    """A few steps of Adam: losses, gradient norms and the weights after the last step."""
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    host.init(**layout)
    bridge, chunks = load_model(
        path,
        dtype=dtype,
        ddp_config={"use_distributed_optimizer": distributed_optimizer},
        extra_config=with_finalize(),
    )
    config = OptimizerConfig(
        optimizer="adam",
        lr=1e-2,
        weight_decay=0.01,
        clip_grad=0.5,
        bf16=dtype is torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=distributed_optimizer,
    )
    optimizer = get_megatron_optimizer(config, chunks)
    losses, norms = [], []
    for _ in range(steps):
        for chunk in chunks:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        losses.append(forward_backward(chunks, sequences))
        updated, norm, _ = optimizer.step()
        assert updated
        norms.append(float(norm))
    return losses, norms, {name: tensor.clone() for name, tensor in export_weights(bridge, chunks)}
