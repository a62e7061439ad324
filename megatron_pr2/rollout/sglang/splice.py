"""RouteSplice: the routes of a sequence that is sampled in several attempts, joined by token position.

Row i belongs to input token i and is taken from the attempt in which that token was an input for the first time, so it is the
route that the token's successor was sampled with. The last token of an attempt was no input yet: its row comes with the next
attempt, which asks for rows from there on (`routed_experts_start_len`).
"""

from __future__ import annotations

import numpy as np

from megatron_pr2.errors import RouteError
from megatron_pr2.hf.shape import ModelShape
from megatron_pr2.routes.table import RouteTable


class RouteSplice:
    """Collects rows in order, without gaps, each row once.

    Attributes:
        rows: rows known so far, those of tokens 0 .. rows - 1.
    """

    def __init__(self, shape: ModelShape) -> None:
        self._shape = shape
        self._parts: list[RouteTable] = []
        self.rows = 0

    def append(self, start: int, part: RouteTable, where: str) -> None:
        """Adds the rows of tokens start .. start + part.num_tokens - 2.

        Args:
            part: as an attempt returns it: the row of its last token, which was no input, is missing.
            where: names the response in errors.

        Raises:
            RouteError: they do not begin where the known rows end, or are of another model.
        """
        if start != self.rows:
            raise RouteError(
                f"{where}: rows from token {start} on cannot follow {self.rows} known rows; ask for rows from token {self.rows} on"
            )
        found = (part.num_layers, part.topk, part.num_experts)
        expected = (len(self._shape.moe_layers), self._shape.topk, self._shape.num_experts)
        if found != expected:
            raise RouteError(f"{where}: rows of (MoE layers, top-k, experts) = {found}, expected {expected}")
        if part.num_tokens < 1 or part.valid[-1]:
            raise RouteError(f"{where}: the last token of an attempt was no input and has no row, but one was given")
        self._parts.append(part)
        self.rows += part.num_tokens - 1

    def table(self, num_tokens: int, where: str) -> RouteTable:
        """The table of a finished sequence, whose last token has no row.

        Raises:
            RouteError: there are not num_tokens - 1 rows.
        """
        if self.rows != num_tokens - 1:
            raise RouteError(f"{where}: {self.rows} rows for {num_tokens} tokens; expected one less than tokens")
        *earlier, last = self._parts
        if not earlier:
            return last
        experts = [part.experts[:-1] for part in earlier] + [last.experts]
        valid = [part.valid[:-1] for part in earlier] + [last.valid]
        return RouteTable(np.concatenate(experts), np.concatenate(valid), self._shape.num_experts)
