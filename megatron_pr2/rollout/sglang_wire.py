"""What SGLang's /generate is sent and what is believed of its answer; pure functions. Routes: sglang_routes.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_pr2.errors import RolloutError
from megatron_pr2.rollout.base import ModelShape, RolloutRequest, RolloutResponse, SamplingParams
from megatron_pr2.rollout.sglang_routes import decode_table
from megatron_pr2.routes import RouteTable

# [log-prob, token id, null] in JSON, with room for another spelling of the numbers.
_BYTES_PER_LOGPROB = 80
_FIXED_BYTES = 64 << 10


@dataclass(frozen=True)
class ParsedResponse:
    """A response and what it says of its own making: bytes of routes as received, rows that the live router must decide
    (the last token not counted), prompt tokens taken from the prefix cache, times the request was pre-empted."""

    response: RolloutResponse
    route_bytes: int = 0
    invalid_rows: int = 0
    cached_tokens: int = 0
    retractions: int = 0


def check_token_ids(token_ids: Sequence[int], vocab_size: int, where: str) -> None:
    """Refuses an empty prompt and ids outside the vocabulary, which would crash the server's scheduler.

    Raises:
        RolloutError: names `where`.
    """
    if not token_ids:
        raise RolloutError(f"{where}: the prompt is empty; at least one token id is needed")
    if min(token_ids) < 0 or max(token_ids) >= vocab_size:
        raise RolloutError(
            f"{where}: token ids span {min(token_ids)}..{max(token_ids)}, the model has 0..{vocab_size - 1}; "
            "check that tokenizer and model belong together"
        )


def generate_payload(request: RolloutRequest, sampling: SamplingParams, *, return_routes: bool) -> dict[str, Any]:
    """JSON body of one request. Every sampling parameter is given, so that no default of server or model applies."""
    return {
        "input_ids": list(request.prompt_ids),
        "sampling_params": {
            "max_new_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": 1.0,
            "top_k": -1,
            "min_p": 0.0,
            "frequency_penalty": 0.0,
            "presence_penalty": 0.0,
            "repetition_penalty": 1.0,
            "stop_token_ids": list(sampling.stop_token_ids),
            # SGLang also stops at the model's own end-of-sequence tokens unless it ignores all stop tokens.
            "ignore_eos": not sampling.stop_token_ids,
            # A signed 64-bit field; any Python integer is folded into it.
            "sampling_seed": request.seed % (1 << 63),
        },
        "return_logprob": True,
        "return_routed_experts": return_routes,
    }


def score_payload(token_ids: Sequence[int]) -> dict[str, Any]:
    """JSON body of a handshake probe. One token is sampled, because the last row of routes comes with the first new token."""
    return {
        "input_ids": list(token_ids),
        "sampling_params": {"max_new_tokens": 1, "temperature": 1.0, "ignore_eos": True},
        "return_logprob": True,
        "logprob_start_len": 0,
        "return_routed_experts": True,
    }


def max_answer_bytes(num_tokens: int, shape: ModelShape) -> int:
    """Upper bound for an honest answer about `num_tokens` tokens: base64 of the routes, log-probs, ids and metadata."""
    routes = -(-num_tokens * shape.num_hidden_layers * shape.topk * 4 // 3) * 4
    return _FIXED_BYTES + routes + 4 + num_tokens * _BYTES_PER_LOGPROB


def parse_generate(
    answer: Any,
    request: RolloutRequest,
    sampling: SamplingParams,
    shape: ModelShape,
    *,
    return_routes: bool,
    version_label: str,
    version: int,
    where: str,
) -> ParsedResponse:
    """Checks one answer of /generate and turns it into a response.

    Args:
        version_label: the label that the server must have stamped on every token.
        version: the same as a number.
        where: names the request in errors.

    Raises:
        RolloutError: fields are missing or contradict each other, aborted, or sampled from other weights.
        RouteError: routes of a wrong shape. Single bad rows are no error: they come back invalid and are counted.
    """
    meta, response_ids = _meta_and_ids(answer, where)
    logprobs = _logprobs(meta.get("output_token_logprobs"), response_ids, "output_token_logprobs", where)
    check_token_ids(response_ids, shape.vocab_size, f"{where}: sampled tokens")
    finish = meta.get("finish_reason") or {}
    reason = finish.get("type") if isinstance(finish, Mapping) else None
    if reason not in ("stop", "length"):
        raise RolloutError(f"{where}: finish_reason is {finish!r}, expected stop or length; the response is lost")
    if len(response_ids) > sampling.max_new_tokens:
        raise RolloutError(f"{where}: {len(response_ids)} tokens sampled, at most {sampling.max_new_tokens} were asked for")
    _check_version(meta, version_label, where)
    routes, route_bytes, invalid_rows = None, 0, 0
    if return_routes:
        num_tokens = len(request.prompt_ids) + len(response_ids)
        encoded: Any = meta.get("routed_experts")
        routes = decode_table(encoded, num_tokens=num_tokens, shape=shape, where=where)
        route_bytes, invalid_rows = len(encoded), routes.num_missing - 1
    return ParsedResponse(
        RolloutResponse(
            prompt_ids=tuple(request.prompt_ids),
            response_ids=tuple(response_ids),
            logprobs=logprobs,
            routes=routes,
            finish_reason=reason,
            weight_version=version,
        ),
        route_bytes=route_bytes,
        invalid_rows=invalid_rows,
        cached_tokens=int(meta.get("cached_tokens") or 0),
        retractions=int(meta.get("num_retractions") or 0),
    )


def parse_score(answer: Any, token_ids: Sequence[int], shape: ModelShape, where: str) -> tuple[npt.NDArray[np.float32], RouteTable]:
    """Log-probs [len - 1] of tokens 1.. and the routes of all tokens; raises as parse_generate does."""
    meta, _ = _meta_and_ids(answer, where)
    entries = meta.get("input_token_logprobs")
    if not isinstance(entries, list) or len(entries) != len(token_ids):
        got = len(entries) if isinstance(entries, list) else None
        raise RolloutError(f"{where}: {got} input log-probs, expected {len(token_ids)} (the first is empty)")
    logprobs = _logprobs(entries[1:], token_ids[1:], "input_token_logprobs", where)
    # One token was sampled after them; it has no row.
    table = decode_table(meta.get("routed_experts"), num_tokens=len(token_ids) + 1, shape=shape, where=where)
    return logprobs, RouteTable(table.experts[:-1], table.valid[:-1], shape.num_experts)


def parse_version(label: Any) -> int:
    """The version that a label stands for; -1 for a label that this package did not write (SGLang's "default")."""
    try:
        return int(label)
    except (TypeError, ValueError):
        return -1


def parse_release(text: Any, where: str) -> tuple[int, ...]:
    """Leading numbers of a version: "0.5.23.post1" is (0, 5, 23).

    Raises:
        RolloutError: the text does not start with a number; names `where`.
    """
    numbers: list[int] = []
    for part in str(text).split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if digits:
            numbers.append(int(digits))
        if digits != part:
            break
    if not numbers:
        raise RolloutError(f"{where} reports version {text!r}; expected numbers such as 0.5.23")
    return tuple(numbers)


def _meta_and_ids(answer: Any, where: str) -> tuple[Mapping[str, Any], list[int]]:
    meta = answer.get("meta_info") if isinstance(answer, Mapping) else None
    ids = answer.get("output_ids") if isinstance(answer, Mapping) else None
    if not isinstance(meta, Mapping) or not isinstance(ids, list) or not ids:
        raise RolloutError(f"{where}: the answer has no meta_info or no output_ids: {str(answer)[:200]}")
    return meta, ids


def _logprobs(entries: Any, token_ids: Sequence[int], name: str, where: str) -> npt.NDArray[np.float32]:
    """[len(token_ids)] float32 of [[log-prob, token id, text], ...], which must name the same tokens."""
    if not isinstance(entries, list) or len(entries) != len(token_ids):
        got = len(entries) if isinstance(entries, list) else None
        raise RolloutError(f"{where}: {got} entries in {name}, expected {len(token_ids)}, one per token")
    try:
        values = np.array([entry[0] for entry in entries], dtype=np.float32)
        ids = [entry[1] for entry in entries]
    except (TypeError, ValueError, IndexError) as error:
        raise RolloutError(f"{where}: {name} is malformed: {error}") from error
    if ids != list(token_ids):
        raise RolloutError(f"{where}: {name} names other tokens than those that were sampled or sent")
    if not np.isfinite(values).all() or (values > 1e-4).any():
        raise RolloutError(f"{where}: {name} holds values that are no log-probabilities (not finite, or above 0)")
    return values


def _check_version(meta: Mapping[str, Any], label: str, where: str) -> None:
    spans = meta.get("weight_versions")
    found = {str(span.get("version")) for span in spans} if isinstance(spans, list) and spans else {str(meta.get("weight_version"))}
    if found != {label}:
        raise RolloutError(
            f"{where}: sampled from weights of version {', '.join(sorted(found))}, expected {label}; "
            "somebody else updates this server, or the last push did not reach it"
        )
