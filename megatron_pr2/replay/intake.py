"""Checks of a new rollout batch: its sequences and routes, on all ranks that work on it together."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_pr2.config import PR2Config
from megatron_pr2.errors import RouteError
from megatron_pr2.parallel.consensus import attempt, digest
from megatron_pr2.parallel.groups import communication_device, gathered, summed
from megatron_pr2.parallel.replica import RankGroup, Replica
from megatron_pr2.parallel.tokens import TokenIndex
from megatron_pr2.replay.sequences import ReplaySequence, check_push, check_sequences, checked_table, listed, sampled_tokens
from megatron_pr2.routes.repeats import longest_repeat, most_repeats
from megatron_pr2.routes.table import RouteTable

logger = logging.getLogger(__name__)

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Intake:
    """A rollout batch that was accepted.

    Attributes:
        sequences: as a list.
        tokens: its tokens as one axis.
        tables: by sequence, on the rank that owns them; empty elsewhere, and where routes do not come with the rollout.
        valid: which tokens have a route, by flat token index; none where routes do not come with the rollout.
        sampled: whose router inputs are kept.
        missing, total: tokens of this rank's replica without a route, and that could have one.
    """

    sequences: list[ReplaySequence]
    tokens: TokenIndex
    tables: dict[int, RouteTable]
    valid: Mask
    sampled: Mask
    missing: int
    total: int


def take_in(
    sequences: Iterable[ReplaySequence],
    version: Any,
    config: PR2Config,
    model: TransformerConfig,
    num_layers: int,
    replica: Replica,
    *,
    is_owner: bool,
    token_group: dist.ProcessGroup | None,
    device: torch.device,
) -> Intake:
    """Checks a rollout batch; collective over the replica and over `token_group`.

    Args:
        version: of the weights that sequences were rolled out with that do not say so themselves.
        num_layers: MoE layers of the whole model.
        is_owner: whether this rank must have been given the tables.
        device: where the token group communicates.

    Raises:
        RouteError: on all of these ranks, if any of them refuses.
    """
    from_engine = config.routes == "engine"

    def checked() -> tuple[list[ReplaySequence], dict[int, RouteTable]]:
        check_push("begin_rollout", version)
        found = listed(sequences)
        check_sequences(found)
        shape = num_layers, model.moe_router_topk, model.num_moe_experts
        tables = {s.id: checked_table(s, *shape) for s in found} if from_engine and is_owner else {}
        _refuse_empty_layers(list(tables.values()))
        return found, tables

    taken, failure = attempt(checked)
    if taken is not None:
        _warn_of_repeats(*taken)
    batch, tables = taken or ([], {})
    tokens = TokenIndex({s.id: s.length for s in batch})
    valid = np.zeros(tokens.total, dtype=bool)
    for sid, table in tables.items():
        valid[tokens.span(sid)] = table.valid
    failure, valid = _agreed(replica.ranks, failure, tokens, valid, is_owner=is_owner)
    by_sequence = _missing(valid, tokens) if from_engine else {}
    missing, total = sum(by_sequence.values()), sum(max(0, length - 1) for length in tokens.lengths.values())
    all_missing, all_tokens, failures = summed([missing, total, failure is not None], token_group, device)
    if failure is not None:
        raise RouteError(failure)
    if failures:
        raise RouteError(f"{failures} other rank(s) refused the routes of their sequences; their errors say why")
    if all_missing > config.max_missing_share * all_tokens:
        # Each rank of a pipeline stage counted the sequences of the whole replica.
        counts = all_missing // replica.tp_cp.size, all_tokens // replica.tp_cp.size
        message = _too_many_missing(*counts, config.max_missing_share, by_sequence, tokens)
        if config.strict:
            raise RouteError(message)
        logger.warning(message)
    sampled = np.zeros(tokens.total, dtype=bool)
    if config.drift:
        sampled = sampled_tokens(batch, tokens, valid if from_engine else None, config.seed, config.sample_fraction)
    return Intake(batch, tokens, tables, valid, sampled, missing, total)


def _refuse_empty_layers(tables: list[RouteTable]) -> None:
    """With top-1 zero may be a real choice: a layer of zeros shows over the batch, not in a table of a few rows."""
    if not tables or tables[0].topk > 1 or tables[0].num_experts < 2:
        return
    rows = sum(int(table.valid.sum()) for table in tables)
    zero_L = np.all([(table.experts[table.valid] == 0).all(axis=(0, 2)) for table in tables], axis=0)
    if rows >= 32 and zero_L.any() and not zero_L.all():
        raise RouteError(
            f"the MoE layers {np.nonzero(zero_L)[0].tolist()} (0-based among themselves) send all {rows} tokens of the batch "
            "to expert 0, other layers do not: the engine did not record their routes; run the handshake, check its MoE backend"
        )


def _warn_of_repeats(sequences: list[ReplaySequence], tables: dict[int, RouteTable]) -> None:
    """Rows that are repeated over different tokens are valid, but no engine takes them; needs the token ids."""
    known = [(s, tables[s.id]) for s in sequences if s.id in tables and s.token_ids is not None and s.length > 1]
    runs = {s.id: longest_repeat(table, s.token_ids) for s, table in known if s.token_ids is not None}
    wrong = [s.id for s, table in known if runs[s.id] > most_repeats(s.length, table.num_layers)]
    if wrong:
        logger.warning(
            "the routes of %d sequences repeat one row over different tokens: %d rows in sequence %d; the engine returns a stale "
            "buffer",
            len(wrong), runs[wrong[0]], wrong[0],
        )  # fmt: skip


def _agreed(
    ranks: RankGroup, failure: str | None, tokens: TokenIndex, valid: Mask, *, is_owner: bool
) -> tuple[str | None, Mask]:
    """The first failure within a replica, and which tokens have a route, from the ranks that own the tables; collective over it.

    Args:
        valid: which tokens have a route, by flat token index; read on owners.
    """
    if ranks.handle is None:
        return failure, valid
    told = digest(repr(list(tokens.lengths.items())).encode())
    packed = np.packbits(valid)
    parts = gathered((failure, told, digest(packed.tobytes()) if is_owner else None), ranks.handle)
    failures, everyones_sequences, marks = zip(*parts, strict=True)
    failure = next((each for each in failures if each is not None), None)
    if failure is not None:
        return failure, valid
    if len(set(everyones_sequences)) > 1:
        failure = (
            "the ranks of a replica (tensor x context x pipeline parallel) were told of different sequences; pass the same ones, "
            "in the same order, to begin_rollout() on all of them"
        )
    elif len(set(marks) - {None}) > 1:
        failure = "the ranks of a replica have different routes for the same sequences; give them the same tables"
    elif None in marks:
        # One bit per token, once per rollout batch, from the owner to the others.
        bits = torch.from_numpy(packed).to(communication_device())
        dist.broadcast(bits, group=ranks.handle, group_src=ranks.owner)
        valid = np.unpackbits(bits.cpu().numpy(), count=tokens.total).astype(bool)
    return failure, valid


def _missing(valid: Mask, tokens: TokenIndex) -> dict[int, int]:
    """Tokens without a valid route per sequence; the last one was never an engine's input and is not counted."""
    return {sid: int((~valid[tokens.span(sid)][:-1]).sum()) for sid in tokens.lengths}


def _too_many_missing(missing: int, total: int, share: float, by_sequence: dict[int, int], tokens: TokenIndex) -> str:
    where = "all on other ranks"
    if by_sequence and by_sequence[worst := max(by_sequence, key=by_sequence.__getitem__)]:
        where = f"worst of this rank is sequence {worst} with {by_sequence[worst]} of {tokens.lengths[worst]}"
    return (
        f"{missing} of {total} tokens ({missing / total:.1%}) have no valid route, more than max_missing_share={share:.1%}; "
        f"{where}. The engine returns duplicate, all-zero or out-of-range expert ids: run the handshake, check its version and MoE "
        "backend. To go on, with these tokens on the model's own router: raise max_missing_share, or set strict=False"
    )
