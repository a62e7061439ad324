"""How well engines that work agree with the actor: the rule behind every bound on the agreement of routes.

Engine and actor compute a router's logits in another order of operations and, in 16 bits, with other rounding: their logits
differ by a noise whose standard deviation is a share r of the logits' own. An expert of the top-k is exchanged where its logit and
the next one are closer than that. For E independent normal logits the share of exchanged slots is

    d(r) = E / K * phi(z) / sqrt(2 pi) * r,    z = the normal quantile of 1 - K / E,

0.8 r for top-8 of 128. NOISE holds the r that is still accepted, per dtype; tools/bench_agreement.py measures what working
engines reach and what a gate in 8 bits costs (figures in docs/sglang.md). A share of n slots is judged as a count: more exchanged
slots than d n + 4 sqrt(d (1 - d) n) + 3 are refused. The 3 leaves room for a near tie, which moves some more in later layers.
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import Any

# Noise of a router's logits between two engines that work, as a share of the logits' spread.
NOISE = {"float32": 5e-4, "bfloat16": 0.1, "float16": 0.1}
_DEVIATIONS, _TIES = 4.0, 3.0


def least_share(dtype: str, topk: int, num_experts: int) -> float:
    """Share of equal slots that engine and actor reach under the same weights, whatever their kernels.

    Args:
        dtype: of the router's input, by torch's name.
    """
    if topk >= num_experts:
        return 1.0
    normal = NormalDist()
    density = normal.pdf(normal.inv_cdf(1.0 - topk / num_experts))
    return 1.0 - num_experts / topk * density / math.sqrt(2.0 * math.pi) * NOISE.get(dtype, NOISE["bfloat16"])


def least_share_of_older(topk: int, num_experts: int) -> float:
    """The bound where the weights have changed since the routes were taken: half-way to unrelated routes, which agree in K / E."""
    return (1.0 + topk / num_experts) / 2.0


def least_hits(share: Any, slots: Any) -> Any:
    """The equal slots that are expected at least among so many, where `share` of all are; numbers, arrays or tensors."""
    return share * slots - _DEVIATIONS * (share * (1.0 - share) * slots) ** 0.5 - _TIES


def enough_rows(share: float, topk: int, num_experts: int) -> int:
    """Rows of one layer from which on unrelated routes, with their own deviation, are below the bound."""
    chance = topk / num_experts
    if chance >= 1.0:
        return 1
    for rows in range(1, 4096):
        slots = rows * topk
        if chance * slots + _DEVIATIONS * math.sqrt(chance * (1.0 - chance) * slots) < least_hits(share, slots):
            return rows
    return 4096
