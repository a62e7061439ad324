"""A verl batch as sequences: lengths, loss-bearing positions, identity and routes of its rows.

verl hands its engines a TensorDict without padding: `input_ids` is jagged, [B, j]. The rest comes in two forms, and both are read:

    trainer with TransferQueue   `loss_mask` is jagged, an entry per response token
    trainer with DataProto       `loss_mask` [B, R] is padded on the right, `attention_mask` [B, P + R] on both sides

`routed_experts` [B, j, layers, K] has a row per token, of which the last token's holds zeros (it was never an engine's input), or
one row less. A row without loss-bearing token (verl pads batches with such, and filters leave them) has no part in replay; verl
leaves it out of its own replay, too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from megatron_pr2.errors import RouteError
from megatron_pr2.parallel.decoder_layers import DecoderLayers
from megatron_pr2.routes.table import RouteTable

ROUTES_KEY = "routed_experts"


@dataclass(frozen=True)
class Row:
    """One row of a batch.

    Attributes:
        length: its tokens, prompt and response.
        loss_mask: [response tokens] bool, which of them bear loss.
        fingerprint: equal for rows of the same tokens and prompt length only.
        token_ids: [length] int64, prompt and response.
    """

    length: int
    loss_mask: npt.NDArray[np.bool_]
    fingerprint: bytes
    token_ids: npt.NDArray[np.int64]

    @property
    def bears_loss(self) -> bool:
        return bool(self.loss_mask.any())

    @property
    def loss_span(self) -> tuple[int, int]:
        """Input positions whose outputs are the response."""
        return self.length - 1 - len(self.loss_mask), self.length - 1


def read_rows(data: Any) -> list[Row]:
    """The rows of a TensorDict; RouteError for a response without a prompt, or `input_ids` that still have padding."""
    tokens = jagged_parts(data["input_ids"], "input_ids")
    rows = []
    for index, (ids, mask) in enumerate(zip(tokens, _loss_masks(data), strict=True)):
        if len(mask) >= len(ids):
            raise RouteError(
                f"row {index}: {len(mask)} response tokens in a sequence of {len(ids)}; expected a prompt of at least one token "
                "(`loss_mask` has an entry per response token)"
            )
        digest = hashlib.blake2b(len(mask).to_bytes(8, "little"), digest_size=16)
        token_ids = np.ascontiguousarray(ids.numpy(), dtype=np.int64)
        digest.update(token_ids.data)
        rows.append(Row(len(ids), mask, digest.digest(), token_ids))
    return rows


def jagged_parts(values: Tensor, name: str) -> list[Tensor]:
    """The rows of a jagged tensor [B, j, ...], on the host; RouteError if it is not jagged."""
    if not values.is_nested:
        raise RouteError(f"{name} has shape {list(values.shape)}; verl's engines take a jagged tensor (left_right_2_no_padding)")
    return list(values.values().detach().cpu().split(values.offsets().diff().tolist()))


def _loss_masks(data: Any) -> list[npt.NDArray[np.bool_]]:
    loss_mask = data["loss_mask"]
    if loss_mask.is_nested:
        return [part.numpy().astype(bool) for part in jagged_parts(loss_mask, "loss_mask")]
    width = loss_mask.shape[1]
    lengths = data["attention_mask"][:, -width:].sum(dim=1).tolist()
    return [mask[:length].detach().cpu().numpy().astype(bool) for mask, length in zip(loss_mask, lengths, strict=True)]


def route_rows(data: Any) -> list[npt.NDArray[np.integer]] | None:
    """`routed_experts` per row, [tokens, layers, K] integers on the host; None where the batch has none."""
    values = data.get(ROUTES_KEY, None)
    if values is None:
        return None
    parts = jagged_parts(values, ROUTES_KEY) if values.is_nested else list(values.detach().cpu())
    return [part.numpy() for part in parts]


def route_table(
    ids_TLK: npt.NDArray[np.integer], length: int, *, layers: DecoderLayers, topk: int, num_experts: int, where: str
) -> RouteTable:
    """The table of one row.

    Args:
        ids_TLK: `length` or `length - 1` rows of all hidden layers (SGLang), of all decoder layers (Nemotron-H has the same) or of
            the MoE layers only. RouteError for another shape.
    """
    if len(ids_TLK) not in (length, length - 1):
        raise RouteError(
            f"{where}: {len(ids_TLK)} rows of {ROUTES_KEY} for {length} tokens; expected one per token, or all but the last"
        )
    moe_layers: Sequence[int] = layers.hidden_moe
    num_layers = layers.hidden_count
    given = ids_TLK.shape[1] if ids_TLK.ndim == 3 else num_layers
    if given == layers.count:
        moe_layers, num_layers = layers.moe, given
    elif given == len(moe_layers):
        moe_layers, num_layers = range(given), given
    return RouteTable.from_engine(
        ids_TLK[: length - 1],
        num_tokens=length,
        moe_layers=moe_layers,
        num_hidden_layers=num_layers,
        topk=topk,
        num_experts=num_experts,
        where=where,
    )
