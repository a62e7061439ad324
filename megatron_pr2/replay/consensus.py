"""All ranks of a pass hear of what one of them refuses at its end: else the others wait in the next collective for ever.

What goes wrong inside a pass is raised at once by the rank that sees it and is not agreed upon: the others are in the model's own
collectives then, and the reason would wait behind them unseen.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
import torch.distributed as dist

from megatron_pr2.errors import ReplayError
from megatron_pr2.parallel.groups import gathered
from megatron_pr2.parallel.replica import RankGroup
from megatron_pr2.replay.micro_batch import MicroBatch
from megatron_pr2.replay.token_check import TokenCheck


def agree_on_pass(ranks: RankGroup, micro_batches: Sequence[MicroBatch]) -> None:
    """Refuses a pass that the ranks of a replica cut differently: their transfers would not fit together, or wait for ever.

    Raises:
        ReplayError: on every rank of the replica.
    """
    if ranks.handle is None:
        return
    mine = hashlib.blake2b(b"".join(micro_batch.grid.fingerprint for micro_batch in micro_batches), digest_size=16).digest()
    if len(set(gathered(mine, ranks.handle))) > 1:
        raise ReplayError(
            "the ranks of a replica (tensor x context x pipeline parallel) describe different micro-batches for one pass; each "
            "passes the same whole micro-batches in the same order"
        )


def agree_on_outcome(
    groups: Sequence[dist.ProcessGroup], name: str, incomplete: ReplayError | None, tokens: TokenCheck
) -> None:
    """After the last micro-batch of a pass; one small reduction and one read.

    Args:
        groups: over which it is known everywhere, one after the other.
        name: of the pass.
        incomplete: what this rank refuses of its own micro-batches.
        tokens: whether it ran other tokens.

    Raises:
        ReplayError: on every rank, if any of them refuses.
    """
    groups = [group for group in groups if group.size() > 1]
    elsewhere = 0
    if groups:
        refused = torch.full_like(tokens.wrong, incomplete is not None)
        outcome = torch.maximum(tokens.wrong, refused)
        for group in groups:
            dist.all_reduce(outcome, op=dist.ReduceOp.MAX, group=group)
        elsewhere = int(outcome)
    if incomplete is not None:
        raise incomplete
    if elsewhere or not groups:
        tokens.require(name)
    if elsewhere:
        raise ReplayError(f"{name}: another rank refused this pass; its error says why. Do not apply this update")
