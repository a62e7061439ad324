"""Who trains the same sequences: the tensor x context x pipeline parallel ranks of one data-parallel index, and what each computes.

Every rank asks the others once, when PR2 is attached, instead of deriving it from rank numbers: Megatron-Core's order of parallel
dimensions is a setting.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist
from megatron.core import parallel_state as mpu

from megatron_pr2.parallel.grid import TokenGrid, cut
from megatron_pr2.parallel.groups import communication_device, gathered


@dataclass(frozen=True)
class Member:
    """One rank's share of a micro-batch.

    Attributes:
        cp_rank: which zigzag share of every sequence it holds.
        tp_rank: which share of the token axis it holds under sequence parallelism; 0 without.
        columns: the MoE layers that it computes, as indices among all MoE layers of the model.
        first: whether it is the first rank of the replica, which owns the routes.
    """

    cp_rank: int
    tp_rank: int
    columns: tuple[int, ...]
    first: bool


@dataclass(frozen=True)
class RankGroup:
    """Ranks that know each other's shares.

    Attributes:
        handle: the process group, in the order of `members`; None for one rank.
        members: what each rank computes.
        me: this rank's index among them.
        cp_size, tp_size: what cuts the tokens (tp_size is 1 without sequence parallelism).
    """

    handle: dist.ProcessGroup | None
    members: tuple[Member, ...]
    me: int
    cp_size: int
    tp_size: int

    @property
    def size(self) -> int:
        return len(self.members)

    @property
    def owner(self) -> int:
        """Index of the member that owns the routes."""
        return next(i for i, member in enumerate(self.members) if member.first)

    def rows(self, grid: TokenGrid, member: int | None = None) -> TokenGrid:
        """The rows of a whole micro-batch that a member's routers see; this rank's by default.

        Raises:
            ConfigError: a length that context or sequence parallelism cannot cut.
        """
        who = self.members[self.me if member is None else member]
        return cut(grid, cp_size=self.cp_size, cp_rank=who.cp_rank, tp_size=self.tp_size, tp_rank=who.tp_rank)


@dataclass(frozen=True)
class Replica:
    """The groups that routes and features travel in.

    Attributes:
        ranks: all that train the same sequences: tensor x context x pipeline.
        tp_cp: of these, the ranks that hold other tokens of the same layers: context x tensor, context only without sequence
            parallelism.
        created: process groups made for it, to be destroyed with it.
    """

    ranks: RankGroup
    tp_cp: RankGroup
    created: tuple[dist.ProcessGroup, ...] = ()

    def release(self) -> None:
        """Destroys the process groups that were made for it."""
        for group in self.created:
            dist.destroy_process_group(group)


def find_replica(columns: Sequence[int], sequence_parallel: bool) -> Replica:
    """This rank's replica; collective over all ranks.

    Args:
        columns: MoE layers of this rank, as indices among all MoE layers of the model.
    """
    if not mpu.model_parallel_is_initialized():
        alone = RankGroup(None, (Member(0, 0, tuple(columns), True),), 0, 1, 1)
        return Replica(alone, alone)
    cp_size, cp_rank = mpu.get_context_parallel_world_size(), mpu.get_context_parallel_rank()
    tp_rank, pp_rank = mpu.get_tensor_model_parallel_rank(), mpu.get_pipeline_model_parallel_rank()
    tp_size = mpu.get_tensor_model_parallel_world_size() if sequence_parallel else 1
    me = Member(cp_rank, tp_rank if sequence_parallel else 0, tuple(columns), tp_rank == cp_rank == pp_rank == 0)
    created: tuple[dist.ProcessGroup, ...] = ()
    tokens, stages = mpu.get_tensor_and_context_parallel_group(), mpu.get_pipeline_model_parallel_group()
    everyone = tokens
    if stages.size() > 1:
        if tokens.size() == 1:
            everyone = stages
        else:
            everyone = _joined(tokens, stages)
            created = (everyone,)
    tp_cp = tokens if sequence_parallel else mpu.get_context_parallel_group()
    return Replica(_introduced(me, everyone, cp_size, tp_size), _introduced(me, tp_cp, cp_size, tp_size), created)


def _joined(tokens: dist.ProcessGroup, stages: dist.ProcessGroup) -> dist.ProcessGroup:
    """A group of tensor x context x pipeline parallel ranks, which Megatron-Core does not have.

    Every rank makes the groups of all replicas, as Megatron-Core makes its own. A group that only its members make
    (use_local_synchronization) is named after the number of groups that a rank knows, which differs between pipeline stages: the
    ranks would wait for each other under different names.
    """
    first = min(min(part) for part in gathered(dist.get_process_group_ranks(tokens), stages))
    firsts = gathered(first, dist.group.WORLD)
    timeout = timeout_of(stages)
    groups = {}
    for each in sorted(set(firsts)):
        ranks = [rank for rank, its in enumerate(firsts) if its == each]
        groups[each] = dist.new_group(ranks, timeout=timeout, group_desc="PR2_REPLICA_GROUP")
    return groups[first]


def timeout_of(group: dist.ProcessGroup) -> timedelta | None:
    """How long a collective of a group may take: what Megatron-Core was given as distributed_timeout_minutes.

    None, which is torch's default, for backends other than gloo and NCCL that do not say it.
    """
    options = getattr(group._get_backend(communication_device()), "options", None)
    return getattr(options, "_timeout", None)


def _introduced(me: Member, group: dist.ProcessGroup, cp_size: int, tp_size: int) -> RankGroup:
    if group.size() == 1:
        return RankGroup(None, (me,), 0, cp_size, tp_size)
    return RankGroup(group, tuple(gathered(me, group)), group.rank(), cp_size, tp_size)
