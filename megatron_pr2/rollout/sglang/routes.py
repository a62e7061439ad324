"""SGLang's routes from the bytes of a response straight into a compact RouteTable, without a Python object per token.

The response is JSON with the routes as base64 of C-order little-endian int32 [T - 1, hidden layers, K], 5.3 characters per byte of
table: row i belongs to input token i, dense layers hold zeros, the last sampled token was never an input. `split_routes` cuts that
string out of the body without decoding it, so that only the rest is parsed as JSON; `decode_table` decodes, checks and compacts it
in pieces that stay in the cache. Base64 is pybase64's: the standard library's binascii takes 230 MB/s, less than all the rest.
"""

from __future__ import annotations

import binascii
import json
import re
from typing import Any

import numpy as np
import numpy.typing as npt
import pybase64

from megatron_pr2.errors import RolloutError, RouteError
from megatron_pr2.hf.shape import ModelShape
from megatron_pr2.routes.ids import all_distinct, expert_dtype
from megatron_pr2.routes.table import RouteTable

# An unescaped quote ends a JSON string, so that generated text can never look like this key.
_KEY = re.compile(rb'"routed_experts"\s*:\s*"')
# Rows per piece hold about so many ids: the piece and what is made of it stay in the cache.
_PIECE_IDS = 64 << 10


class AnswerError(RolloutError):
    """An invalid response; another attempt may bring a better one."""


def split_routes(body: bytearray) -> tuple[bytes, memoryview | None]:
    """A response without its routes, and a view of their base64 in `body`; the whole body and None unless there is exactly one."""
    found = list(_KEY.finditer(body))
    start = found[0].end() if len(found) == 1 else len(body)
    stop = body.find(b'"', start)
    if stop < 0:
        return bytes(body), None
    view = memoryview(body)
    return bytes(view[:start]) + bytes(view[stop:]), view[start:stop]


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Of two values under one name, json would silently take the last."""
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("an object names something twice")
    return made


def parse_body(body: bytearray, where: str) -> Any:
    """The JSON of a response, in which `meta_info.routed_experts` is a view into `body`.

    Raises:
        AnswerError: it is not JSON.
    """
    rest, encoded = split_routes(body)
    try:
        answer = json.loads(rest, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise AnswerError(f"{where}: /generate answered with something that is not JSON ({error}): {rest[:200]!r}") from error
    meta = answer.get("meta_info") if isinstance(answer, dict) else None
    if encoded is not None and isinstance(meta, dict) and meta.get("routed_experts") == "":
        meta["routed_experts"] = encoded
    return answer


def decode_table(encoded: Any, *, num_tokens: int, shape: ModelShape, where: str, first_row: int = 0) -> RouteTable:
    """The table [num_tokens, MoE layers, K] of a response; the last token was never an input and has no row.

    Args:
        encoded: base64, as bytes, a view of bytes or text.
        first_row: rows before it were not asked for. A server that does not know `routed_experts_start_len` sends them all the
            same, which their number shows: they are cut off.

    Raises:
        RouteError: absent, not base64, or of another number of rows.
    """
    rows, view = num_tokens - 1, _payload(encoded, where)
    row_bytes = 4 * shape.num_hidden_layers * shape.topk
    if len(view) % 4:
        raise RouteError(f"{where}: routed_experts is not valid base64: {len(view)} characters are no multiple of 4")
    found = len(view) // 4 * 3 - bytes(view[-2:]).count(b"=")
    if first_row and found == (first_row + rows) * row_bytes:
        whole = decode_table(encoded, num_tokens=first_row + num_tokens, shape=shape, where=where)
        return RouteTable.checked(whole.experts[first_row:], whole.valid[first_row:], shape.num_experts)
    if found != rows * row_bytes:
        raise RouteError(
            f"{where}: routed_experts holds {found} bytes = {found / row_bytes:g} rows of {shape.num_hidden_layers} layers x "
            f"top-{shape.topk}, expected {rows} rows ({rows * row_bytes} bytes); check that engine and actor run the same model"
        )
    table = RouteTable.missing(num_tokens, len(shape.moe_layers), shape.topk, shape.num_experts)
    # Three bytes are four characters: pieces of a multiple of three rows begin and end between characters.
    step = 3 * max(1, _PIECE_IDS // (3 * shape.num_hidden_layers * shape.topk))
    layers = np.asarray(shape.moe_layers, dtype=np.int64)
    for first in range(0, rows, step):
        last = min(first + step, rows)
        raw = _decoded(view[first * row_bytes * 4 // 3 : -(-last * row_bytes // 3) * 4], where)
        if len(raw) != (last - first) * row_bytes:
            raise RouteError(f"{where}: routed_experts is not valid base64: padding in the middle")
        ids = np.frombuffer(raw, dtype="<i4").reshape(last - first, shape.num_hidden_layers, shape.topk)
        _take(ids[:, layers] if len(layers) != shape.num_hidden_layers else ids, table, first, last)
    return table


def decode_ids(encoded: Any, num_layers: int, topk: int, where: str) -> npt.NDArray[np.int32]:
    """The ids as they were sent, [rows, num_layers, topk] and unchecked; writable.

    Args:
        encoded: base64, as bytes, a view of bytes or text.
        num_layers: hidden layers of the model, dense ones included.

    Raises:
        RouteError: absent, not base64, or no whole number of rows.
    """
    raw, row_bytes = bytearray(_decoded(_payload(encoded, where), where)), 4 * num_layers * topk
    if len(raw) % row_bytes:
        raise RouteError(
            f"{where}: routed_experts holds {len(raw)} bytes = {len(raw) / row_bytes:g} rows of {num_layers} layers x top-{topk}; "
            "check that engine and actor run the same model"
        )
    return np.frombuffer(raw, dtype="<i4").reshape(-1, num_layers, topk)


def _payload(encoded: Any, where: str) -> memoryview:
    if isinstance(encoded, str):
        try:
            return memoryview(encoded.encode("ascii"))
        except UnicodeEncodeError as error:
            raise RouteError(f"{where}: routed_experts is not valid base64 ({error}), {len(encoded)} characters") from error
    if isinstance(encoded, bytes | bytearray | memoryview):
        return memoryview(encoded)
    raise RouteError(f"{where}: the response holds no routed_experts; start the server with --enable-return-routed-experts")


def _decoded(piece: memoryview, where: str) -> bytes:
    try:
        return pybase64.b64decode(piece, validate=True)
    except (binascii.Error, ValueError) as error:
        raise RouteError(f"{where}: routed_experts is not valid base64 ({error})") from error


def _take(ids_RLK: npt.NDArray[np.int32], table: RouteTable, first: int, last: int) -> None:
    """Checks some rows and copies them into the table; rows that cannot be replayed stay zero and invalid."""
    rows, layers, topk = ids_RLK.shape
    # Negative ids are large as unsigned ones.
    inside = (ids_RLK.view(np.uint32) < table.num_experts).reshape(rows, -1).all(axis=1)
    compact = ids_RLK.astype(expert_dtype(table.num_experts))
    valid = inside & all_distinct(compact.reshape(-1, topk)).reshape(rows, layers).all(axis=1)
    compact[~valid] = 0
    table.experts[first:last] = compact
    table.valid[first:last] = valid
