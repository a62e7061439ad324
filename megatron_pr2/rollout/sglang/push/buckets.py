"""Packing a stream of tensors into buckets of bounded size."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Bucket:
    """Tensors that travel together, as they lie in `flat` ([bytes] uint8); dtypes by torch's names ("bfloat16")."""

    names: list[str]
    dtypes: list[str]
    shapes: list[list[int]]
    flat: torch.Tensor


def buckets(weights: Iterable[tuple[str, torch.Tensor]], max_bytes: int, device: torch.device) -> Iterator[Bucket]:
    """Packs tensors, as they come, into buckets of at most `max_bytes`; a larger tensor is a bucket of its own.

    Wider dtypes come first within a bucket, which keeps every tensor aligned. One bucket, or the tensors that it is made of, are
    held at a time (both while it is packed), never the model.
    """
    pending: list[tuple[str, torch.Tensor]] = []
    size = 0
    for name, tensor in weights:
        if pending and size + tensor.nbytes > max_bytes:
            yield _pack(pending, device)
            size = 0
        pending.append((name, tensor.detach()))
        size += tensor.nbytes
        del tensor
    if pending:
        yield _pack(pending, device)


def _pack(tensors: list[tuple[str, torch.Tensor]], device: torch.device) -> Bucket:
    """Packs tensors and empties the list, so that they need not outlive this."""
    tensors.sort(key=lambda item: -item[1].element_size())
    flat = torch.empty(sum(t.nbytes for _, t in tensors), dtype=torch.uint8, device=device)
    offset = 0
    for _, tensor in tensors:
        flat[offset : offset + tensor.nbytes].view(tensor.dtype).copy_(tensor.reshape(-1))
        offset += tensor.nbytes
    names, dtypes = [name for name, _ in tensors], [str(t.dtype).removeprefix("torch.") for _, t in tensors]
    shapes = [list(t.shape) for _, t in tensors]
    tensors.clear()
    return Bucket(names, dtypes, shapes, flat)
