"""A rank's share of a rollout batch: given to PR2, and its rows identified when they come back in mini-batches.

verl computes old log-probs of a rank's whole batch and trains on mini-batches of it, which it cuts, shuffles and repeats. Nothing
in a row says where it was before, so rows are identified by their tokens: recorded routes and kept features belong to tokens, and a
row whose tokens were never seen is refused. Rows of equal tokens (short responses to one prompt) are told apart by their routes,
where they have some; otherwise replay knows no difference between them, and they are assigned in turn.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_pr2.attach import PR2, ReplaySequence
from megatron_pr2.errors import ReplayError, RouteError
from megatron_pr2.integrations.verl.rows import Row, read_rows, route_rows, route_table
from megatron_pr2.integrations.verl.settings import WHERE

Routes = Sequence[npt.NDArray[np.integer]] | None

# Id of a row that bears no loss: its tokens use the model's own router.
LIVE = -1


def begin_rollout(pr2: PR2, data: Any) -> SequenceBook:
    """Gives PR2 the rows of a TensorDict, with the routes that the rollout returned; collective as PR2.begin_rollout is.

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
    book, config = SequenceBook(rows, routes), pr2.model_config

    def sequence(number: int, row: Row) -> ReplaySequence:
        table = None
        # With route_delivery="scatter" the first rank of a replica sends the others their share.
        if routes is not None and pr2.routes.is_owner:
            table = route_table(
                routes[number],
                row.length,
                layers=pr2.layers,
                topk=config.moe_router_topk,
                num_experts=config.num_moe_experts,
                where=f"row {number} of the batch",
            )
        return ReplaySequence(
            number, row.length, *row.loss_span, routes=table, loss_mask=row.loss_mask, token_ids=row.token_ids
        )

    pr2.begin_rollout([sequence(number, row) for number, row in zip(book.ids, rows, strict=True) if number != LIVE])
    return book


def find_rows(pr2: PR2, book: SequenceBook, data: Any) -> list[int]:
    """:meth:`SequenceBook.find` of a mini-batch's rows."""
    return book.find(read_rows(data), _routes(pr2, data))


def _routes(pr2: PR2, data: Any) -> list[npt.NDArray[np.integer]] | None:
    return route_rows(data) if pr2.config.routes == "engine" else None


class SequenceBook:
    """The rows of one rollout batch on one rank."""

    def __init__(self, rows: Sequence[Row], routes: Routes) -> None:
        """Numbers the rows; their order is the order of the ids."""
        self.ids = [index if row.bears_loss else LIVE for index, row in enumerate(rows)]
        self._known: dict[bytes, list[int]] = {}
        for row, number in zip(rows, self.ids, strict=True):
            self._known.setdefault(row.fingerprint, []).append(number)
        self._uses = dict.fromkeys(self.ids, 0)
        # Only for rows of equal tokens: routes are hundreds of bytes per token.
        twins = {number for numbers in self._known.values() if len(numbers) > 1 for number in numbers} - {LIVE}
        self._digests = {} if routes is None else {number: _digest(routes[number], rows[number].length) for number in twins}

    def find(self, rows: Sequence[Row], routes: Routes) -> list[int]:
        """The ids of rows of the same rollout batch, LIVE for those that have no part in replay; every other id at most once.

        Raises:
            ReplayError: a row that the old-log-prob pass of this rank did not see, or not as often.
        """
        found: list[int] = []
        taken: set[int] = set()
        for index, row in enumerate(rows):
            known = self._known.get(row.fingerprint, [])
            candidates = [number for number in known if number != LIVE and number not in taken]
            if routes is not None and any(number in self._digests for number in candidates):
                digest = _digest(routes[index], row.length)
                candidates = [number for number in candidates if self._digests[number] == digest]
            if LIVE in known and not row.bears_loss:
                number = LIVE
            elif candidates:
                number = min(candidates, key=lambda each: (self._uses[each], each))
                self._uses[number] += 1
                taken.add(number)
            elif LIVE in known:
                raise ReplayError(
                    f"row {index} of a mini-batch ({row.length} tokens) bears loss, but did not when its old log-probs were "
                    "computed, so that its routes were not taken; loss masks may only lose tokens in between"
                )
            else:
                raise ReplayError(
                    f"row {index} of a mini-batch ({row.length} tokens) is no row of the batch whose old log-probs this rank "
                    f"computed ({len(self.ids)} rows): the trainer moved it to another data-parallel rank, or changed its tokens "
                    "or routes. compute_log_prob and update_actor must get the same rows on the same ranks, as in verl's own "
                    "trainers"
                )
            found.append(number)
        return found


def _digest(routes_TLK: npt.NDArray[np.integer], length: int) -> bytes:
    # Without the last token's row, which some batches have and others have not.
    return hashlib.blake2b(np.ascontiguousarray(routes_TLK[: length - 1]).data, digest_size=16).digest()
