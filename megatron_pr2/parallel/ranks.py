"""How Megatron-Core numbers ranks: mixed radix over the kinds of parallelism, the first of an order fastest."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from megatron_pr2.errors import ConfigError

ORDER = "tp-cp-ep-dp-pp"
KINDS = ("tp", "cp", "ep", "dp", "pp")


class RankNumbering:
    """Ranks as digits; the same rule as `megatron.core.parallel_state.RankGenerator`.

    Attributes:
        sizes: ranks of each kind.
        strides: distance in rank numbers between neighbours of each kind.
        world_size: ranks in all.
    """

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
        self._order = [*given, *(kind for kind in KINDS if kind not in given)]
        self.sizes = dict(sizes)
        self.strides: dict[str, int] = {}
        self.world_size = 1
        for kind in self._order:
            if kind not in given and sizes[kind] > 1:
                raise ConfigError(f"order={order!r} leaves out {kind}, whose size is {sizes[kind]}; add {kind} to the order")
            self.strides[kind] = self.world_size
            self.world_size *= sizes[kind]

    def digits(self, rank: int) -> dict[str, int]:
        """Place of a rank within each kind.

        Raises:
            ConfigError: the world has no such rank.
        """
        if not 0 <= rank < self.world_size:
            raise ConfigError(f"rank {rank} of a world of {self.world_size}: expected 0 to {self.world_size - 1}")
        return {kind: rank // self.strides[kind] % self.sizes[kind] for kind in self._order}

    def rank(self, digits: Mapping[str, int]) -> int:
        """The rank at these places; kinds that are absent count as 0.

        Raises:
            ConfigError: a place is not below the size of its kind.
        """
        for kind, digit in digits.items():
            if not 0 <= digit < self.sizes[kind]:
                raise ConfigError(f"{kind}={digit} of {self.sizes[kind]} ranks: expected 0 to {self.sizes[kind] - 1}")
        return sum(digit * self.strides[kind] for kind, digit in digits.items())

    def groups(self, *kinds: str) -> npt.NDArray[np.int64]:
        """Every group of ranks that differ in these kinds only, [groups, ranks], both ascending."""
        varied = [axis for axis, kind in enumerate(reversed(self._order)) if kind in kinds]
        fixed = [axis for axis in range(len(self._order)) if axis not in varied]
        ranks = np.arange(self.world_size).reshape([self.sizes[kind] for kind in reversed(self._order)])
        size = int(np.prod([self.sizes[kind] for kind in kinds], dtype=np.int64))
        return ranks.transpose(fixed + varied).reshape(-1, size)
