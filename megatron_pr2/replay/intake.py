"""A rollout batch on its way in: its sequences and routes are checked, and all ranks that work on it agree."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_pr2.config import PR2Config
from megatron_pr2.errors import RouteError
from megatron_pr2.parallel.replica import Replica
from megatron_pr2.parallel.tokens import TokenIndex
from megatron_pr2.replay.sequences import (
    ReplaySequence,
    RolloutReport,
    agree_on_rollout,
    check_sequences,
    checked_table,
    count_missing,
    too_many_missing,
)
from megatron_pr2.routes.table import RouteTable

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Intake:
    """A rollout batch that was accepted.

    Attributes:
        tokens: its tokens as one axis.
        tables: by sequence, on the rank that owns them; empty elsewhere, and where routes do not come with the rollout.
        valid: which tokens have a route, by flat token index; None where routes do not come with the rollout.
        missing, total: tokens of this rank's replica without a route, and that could have one.
    """

    tokens: TokenIndex
    tables: dict[int, RouteTable]
    valid: npt.NDArray[np.bool_] | None
    missing: int
    total: int

    def report(self, route_bytes: int) -> RolloutReport:
        """What `begin_rollout` returns."""
        return RolloutReport(self.total, self.missing, route_bytes)


def take_in(
    sequences: Sequence[ReplaySequence],
    config: PR2Config,
    model: TransformerConfig,
    num_layers: int,
    replica: Replica,
    *,
    is_owner: bool,
    sum_over_ranks: Callable[[Sequence[int]], list[int]],
) -> Intake:
    """Checks a rollout batch; collective over the replica and over the ranks that `sum_over_ranks` reduces over.

    Args:
        num_layers: MoE layers of the whole model.
        is_owner: whether this rank must have been given the tables.

    Raises:
        RouteError: on all of these ranks, if any of them refuses.
    """
    from_engine = config.routes == "engine"
    tables: dict[int, RouteTable] = {}
    failure: str | None = None
    try:
        check_sequences(sequences)
        if from_engine and is_owner:
            shape = num_layers, model.moe_router_topk, model.num_moe_experts
            tables = {s.id: checked_table(s, *shape) for s in sequences}
    except Exception as error:  # whatever it is, the other ranks are waiting to hear of it
        failure = str(error) if isinstance(error, RouteError) else f"{type(error).__name__}: {error}"
        sequences = ()
    tokens = TokenIndex({s.id: s.length for s in sequences})
    valid = np.zeros(tokens.total, dtype=bool)
    for sid, table in tables.items() if failure is None else ():
        valid[tokens.span(sid)] = table.valid
    failure, valid = agree_on_rollout(replica.ranks, failure, tokens, valid, is_owner=is_owner)
    by_sequence = count_missing(valid, tokens) if from_engine else {}
    missing, total = sum(by_sequence.values()), sum(max(0, s.length - 1) for s in sequences)
    all_missing, all_tokens, failures = sum_over_ranks([missing, total, failure is not None])
    if failure is not None:
        raise RouteError(failure)
    if failures:
        raise RouteError(f"{failures} other rank(s) refused the routes of their sequences; their errors say why")
    if all_missing > config.max_missing_share * all_tokens:
        # Each rank of a stage counted the sequences of the whole replica.
        counts = all_missing // replica.tp_cp.size, all_tokens // replica.tp_cp.size
        message = too_many_missing(*counts, config.max_missing_share, by_sequence, tokens)
        if config.strict:
            raise RouteError(message)
        logger.warning(message)
    return Intake(tokens, tables, valid if from_engine else None, missing, total)
