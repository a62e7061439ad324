"""Which sequence of the rollout batch a row of a mini-batch is.

verl computes old log-probs of a rank's whole batch and trains on mini-batches of it, which it cuts, shuffles and repeats. Nothing
in a row says where it was before, so rows are known by their tokens: routes that were recorded and features that were kept belong
to tokens, and a row whose tokens were never seen is refused. Rows of equal tokens (short responses to one prompt) are told apart by
their routes, where they have some; where not, they are alike in everything that replay knows of them, and are dealt out in turn.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from megatron_pr2.errors import ReplayError
from megatron_pr2.integrations.verl.rows import Row

Routes = Sequence[npt.NDArray[np.integer]] | None

# Of a row that bears no loss: its tokens are routed live.
LIVE = -1


class SequenceBook:
    """The rows of one rollout batch on one rank."""

    def __init__(self, rows: Sequence[Row], routes: Routes) -> None:
        """Numbers the rows; their order is the order of the ids."""
        self.ids = [index if row.bears_loss else LIVE for index, row in enumerate(rows)]
        self._known: dict[bytes, list[int]] = {}
        for row, number in zip(rows, self.ids, strict=True):
            self._known.setdefault(row.fingerprint, []).append(number)
        self._uses = dict.fromkeys(self.ids, 0)
        # Only twins are looked at more closely: routes are hundreds of bytes per token.
        twins = {number for numbers in self._known.values() if len(numbers) > 1 for number in numbers} - {LIVE}
        self._digests = {} if routes is None else {number: _digest(routes[number], rows[number].length) for number in twins}

    def find(self, rows: Sequence[Row], routes: Routes) -> list[int]:
        """The ids of rows of the same rollout batch, LIVE for those without part in it; every other id at most once.

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
                    "or routes. compute_log_prob and update_actor must get the same rows on the same ranks, as verl's own trainers "
                    "do it"
                )
            found.append(number)
        return found


def _digest(routes_TLK: npt.NDArray[np.integer], length: int) -> bytes:
    # Without the last token's row, which some batches have and others have not.
    return hashlib.blake2b(np.ascontiguousarray(routes_TLK[: length - 1]).data, digest_size=16).digest()
