"""A rank's share of a rollout batch, told to PR2; and its rows, found again when they come back in mini-batches."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_pr2.attach import PR2, ReplaySequence
from megatron_pr2.errors import RouteError
from megatron_pr2.integrations.verl.identity import LIVE, SequenceBook
from megatron_pr2.integrations.verl.rows import read_rows, route_rows, route_table
from megatron_pr2.integrations.verl.settings import WHERE
from megatron_pr2.routes.table import RouteTable


def begin_rollout(pr2: PR2, data: Any) -> SequenceBook:
    """Tells PR2 of the rows of a TensorDict, with the routes that the rollout returned; collective as PR2.begin_rollout is.

    Raises:
        RouteError: routes are wanted and absent, of another model, or too many of them are missing.
    """
    rows, routes = read_rows(data), _routes(pr2, data)
    if routes is None and pr2.config.routes == "engine":
        raise RouteError(
            "routes='engine', but the batch has no `routed_experts`: set "
            "actor_rollout_ref.rollout.enable_rollout_routing_replay=true (router_replay.mode stays 'disabled'), or "
            f"{WHERE}.preset=r2"
        )
    book = SequenceBook(rows, routes)
    # With route_delivery="scatter" the first rank of a replica sends the others their share.
    owned = routes if pr2.routes.is_owner else None
    pr2.begin_rollout(
        [
            ReplaySequence(
                number,
                row.length,
                *row.loss_span,
                routes=None if owned is None else _table(pr2, owned[number], row.length, number),
                loss_mask=row.loss_mask,
                token_ids=row.token_ids,
            )
            for number, row in zip(book.ids, rows, strict=True)
            if number != LIVE
        ]
    )
    return book


def find_rows(pr2: PR2, book: SequenceBook, data: Any) -> list[int]:
    """The sequence ids of a mini-batch's rows, LIVE for those that have no part in replay.

    Raises:
        ReplayError: a row that is not of this rollout batch.
    """
    return book.find(read_rows(data), _routes(pr2, data))


def _routes(pr2: PR2, data: Any) -> list[npt.NDArray[np.integer]] | None:
    return route_rows(data) if pr2.config.routes == "engine" else None


def _table(pr2: PR2, ids_TLK: npt.NDArray[np.integer], length: int, number: int) -> RouteTable:
    config = pr2.model_config
    return route_table(
        ids_TLK,
        length,
        layers=pr2.layers,
        topk=config.moe_router_topk,
        num_experts=config.num_moe_experts,
        where=f"row {number} of the batch",
    )
