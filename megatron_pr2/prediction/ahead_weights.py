"""theta + c u: the weights that the policy's optimizer is heading for, which the model can be run with.

u is the next update of all weights but the experts' (prediction.optimizer_moments); c says how many updates ahead. Everything but
the experts explains nearly all of how routers move, and is a small part of a MoE model. A bf16 weight becomes round(master + c u),
as the optimizer itself would write it: at a small learning rate few of its entries move at all, which is a part of the prediction.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_pr2.errors import AttachError
from megatron_pr2.prediction.optimizer_moments import PartialUpdate, find_holders, partial_updates, sharding_groups
from megatron_pr2.replay.sites import unwrapped


def require_no_gathering(chunks: Sequence[nn.Module], swapped: str, setting: str) -> None:
    """Refuses chunks that gather weights during the forward, which would undo what :func:`swapped_in` writes over them.

    Args:
        swapped: what takes the weights' place, and the `setting` that asks for it; for the message.

    Raises:
        AttachError: they do.
    """
    for chunk in chunks:
        if getattr(getattr(chunk, "ddp_config", None), "overlap_param_gather", False):
            raise AttachError(
                f"overlap_param_gather=True gathers the policy's weights during the forward, over {swapped}; to use {setting} set "
                "it to False in DistributedDataParallelConfig and OptimizerConfig"
            )


def dense_parameters(chunks: Sequence[nn.Module]) -> list[nn.Parameter]:
    """The trained weights that move routers, each once: a model's but its experts', and but an output layer of its own.

    Raises:
        AttachError: the chunks gather weights during the forward.
    """
    require_no_gathering(chunks, "those that look ahead", "predictor=lookahead")
    found = {
        id(parameter): parameter
        for chunk in chunks
        for name, parameter in unwrapped(chunk).named_parameters()
        if parameter.requires_grad and ".experts." not in name and not name.startswith("output_layer.")
    }
    return list(found.values())


@torch.no_grad()
def ahead(optimizer: Any, parameters: Sequence[nn.Parameter], multiple: float) -> Iterator[Tensor]:
    """theta + multiple * u of one parameter after the other, in its own shape and dtype; what was never stepped as it is.

    Each is made when it is asked for, so that no more than one is there besides the weights. Collective over the group that a
    distributed optimizer spreads its weights over: every rank makes its slice, and each parameter is all-reduced.

    Raises:
        AttachError: a parameter's optimizer is not known (optimizer_moments.find_holders), or keeps no fp32 copy of it.
    """
    holders = find_holders(optimizer, parameters)
    for parameter, holder, group in zip(parameters, holders, sharding_groups(holders), strict=True):
        value = torch.zeros(parameter.numel(), dtype=parameter.dtype, device=parameter.device)
        for part in partial_updates([holder], [parameter]):
            value[part.span] = _ahead_of(part, multiple).to(value)
        if group is not None:
            # Bytes that are zero on every other rank: exact in any dtype, also in those that a backend cannot sum.
            dist.all_reduce(value.view(torch.uint8), group=group)
        yield value.view_as(parameter)


def _ahead_of(part: PartialUpdate, multiple: float) -> Tensor:
    if part.update is None:
        return part.weight
    if not part.weight.is_floating_point() or part.weight.element_size() < 4:
        raise AttachError(
            f"the policy's optimizer keeps its weights as {part.weight.dtype}, not as an fp32 copy, from which an update would "
            "be predicted; set store_param_remainders=False (OptimizerConfig)"
        )
    return torch.add(part.weight.float(), part.update.to(part.weight.device), alpha=multiple)


@contextmanager
def swapped_in(parameters: Iterable[nn.Parameter], values: Iterable[Tensor]) -> Iterator[None]:
    """The model runs with `values`, rounded to its weights' dtype; afterwards with its own weights, bit by bit, whatever happened.

    Its own are kept where the values are, each of which is asked for when those before it are in place. Weights are exchanged in
    place: they may be views of a buffer of DistributedDataParallel, which must stay where they are. No forward of before may be
    waiting for its backward.
    """
    exchanged: list[tuple[Tensor, Tensor]] = []
    try:
        for parameter, value in zip(parameters, values, strict=True):
            own = parameter.detach().to(value.device, copy=True)
            exchanged.append((parameter.data, own))
            parameter.data.copy_(value)
        yield
    finally:
        for data, own in exchanged:
            data.copy_(own)
