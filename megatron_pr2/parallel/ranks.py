"""How Megatron-Core numbers ranks: mixed radix over the kinds of parallelism, the first of an order fastest."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from megatron_pr2.errors import ConfigError

ORDER = "tp-cp-ep-dp-pp"
KINDS = ("tp", "cp", "ep", "dp", "pp")

# With one expert-parallel rank Megatron-Core 0.16 takes experts for sharded like everything else and reduces their gradients over
# the data x context parallel group, which is wrong unless this group holds the copies of each share (docs/parallelism.md).
LOST_EXPERT_GRADIENTS = (
    "expert_model_parallel_size=1: the ranks that hold the copies of an expert are not the data x context parallel ranks over "
    "which Megatron-Core reduces its gradients: it would lose expert gradients. Set expert_model_parallel_size above 1, or "
    "expert_tensor_parallel_size to tensor_model_parallel_size and the order of ranks to its default"
)


class RankNumbering:
    """The rule of `megatron.core.parallel_state.RankGenerator`, which knows groups but no coordinates, and whose import takes
    longer than a whole plan."""

    def __init__(self, order: str, sizes: Mapping[str, int]) -> None:
        """Args:
            order: kinds joined by "-", fastest first, e.g. ORDER; those of size 1 may be left out.
            sizes: of each of KINDS.

        Raises:
            ConfigError: an unknown or repeated kind, or one of more than one rank that is left out.
        """
        given = order.lower().split("-")
        if len(set(given)) < len(given) or not set(given) <= set(KINDS):
            raise ConfigError(f"order={order!r}: expected each of {', '.join(KINDS)} at most once, joined by '-', as in {ORDER!r}")
        for kind, size in sizes.items():
            if kind not in given and size > 1:
                raise ConfigError(f"order={order!r} leaves out {kind}, whose size is {size}; add {kind} to the order")
        self._sizes = {kind: sizes[kind] for kind in given} | dict(sizes)
        self.world_size = math.prod(sizes.values())

    def digits(self, rank: int) -> dict[str, int]:
        """Place of a rank within each kind.

        Raises:
            ConfigError: the world has no such rank.
        """
        if not 0 <= rank < self.world_size:
            raise ConfigError(f"rank {rank} of a world of {self.world_size}: expected 0 to {self.world_size - 1}")
        digits = {}
        for kind, size in self._sizes.items():
            rank, digits[kind] = divmod(rank, size)
        return digits

    def rank(self, digits: Mapping[str, int]) -> int:
        """The rank at these places; kinds that are absent count as 0.

        Raises:
            ConfigError: a place is not below the size of its kind.
        """
        rank, stride = 0, 1
        for kind, size in self._sizes.items():
            digit = digits.get(kind, 0)
            if not 0 <= digit < size:
                raise ConfigError(f"{kind}={digit} of {size} ranks: expected 0 to {size - 1}")
            rank, stride = rank + digit * stride, stride * size
        return rank

    def groups(self, *kinds: str) -> npt.NDArray[np.int64]:
        """Every group of ranks that differ in these kinds only, [groups, ranks], both ascending."""
        slowest_first = list(reversed(self._sizes))
        axes = sorted(range(len(slowest_first)), key=lambda axis: slowest_first[axis] in kinds)
        ranks = np.arange(self.world_size).reshape([self._sizes[kind] for kind in slowest_first])
        return ranks.transpose(axes).reshape(-1, math.prod(self._sizes[kind] for kind in kinds))
