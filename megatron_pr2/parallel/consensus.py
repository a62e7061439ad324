"""What one rank refuses, every rank hears of: the others would wait for it in the next collective for ever."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch.distributed as dist
from torch import Tensor

from megatron_pr2.errors import PR2Error
from megatron_pr2.parallel.groups import gathered

T = TypeVar("T")


def described(error: BaseException) -> str:
    """An error as the other ranks are told of it: its message, and its class where it is none of this package's."""
    return str(error) if isinstance(error, PR2Error) else f"{type(error).__name__}: {error}"


def attempt(action: Callable[[], T]) -> tuple[T | None, str | None]:
    """(what a step of this rank alone gave, why it failed); whatever went wrong, the other ranks are waiting to hear of it."""
    try:
        return action(), None
    except Exception as error:
        return None, described(error)


def failures_of_all(known: Mapping[int, str]) -> dict[int, str]:
    """Every failure by rank; collective over all ranks.

    Args:
        known: the failures that this rank knows of, by rank. torch.distributed.checkpoint tells every rank of every failure by its
            number, and where it does not communicate, a rank of its own as number 0: where all ranks know of the same, it is taken
            for the former.
    """
    told: list[Mapping[int, str]] = gathered(known, dist.group.WORLD)
    if all(each == told[0] for each in told):
        return dict(told[0])
    return {rank: "; ".join(each.values()) for rank, each in enumerate(told) if each}


def raise_together(failure: PR2Error | None) -> None:
    """Raises on every rank the failure of the first rank that has one, of its class; collective over all ranks."""
    told = gathered(None if failure is None else (type(failure), str(failure)), dist.group.WORLD)
    if (first := next((each for each in told if each is not None), None)) is not None:
        kind, message = first
        raise kind(message)


def digest(*parts: bytes) -> bytes:
    """16 bytes that stand for what ranks compare: gathering objects pads every rank's to the longest."""
    return hashlib.blake2b(b"".join(parts), digest_size=16).digest()


def largest(value: Tensor, groups: Sequence[dist.ProcessGroup]) -> Tensor:
    """The largest value over several groups, one after the other, on the device; in place, and not read."""
    for group in groups:
        dist.all_reduce(value, op=dist.ReduceOp.MAX, group=group)
    return value
