"""What is sent to SGLang's /generate, and the checks of its responses; pure functions. Routes: routes.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_pr2.errors import RolloutError, RouteError
from megatron_pr2.hf.shape import ModelShape
from megatron_pr2.rollout.base import SamplingParams
from megatron_pr2.rollout.sglang.routes import AnswerError, decode_table
from megatron_pr2.routes.repeats import repeated_rows
from megatron_pr2.routes.table import RouteTable

# [log-prob, token id, null] in JSON, with room for another spelling of the numbers.
_BYTES_PER_LOGPROB = 80
_FIXED_BYTES = 64 << 10


@dataclass(frozen=True)
class Ask:
    """What one attempt asks of the server.

    Attributes:
        rid: names the attempt; the response must carry it.
        first_row: routes are asked for from this token on; None if they are not asked for.
        cache_key: prefixes are shared among attempts of the same key only, so that none comes from other weights.
    """

    rid: str
    input_ids: list[int]
    first_row: int | None
    max_new_tokens: int
    seed: int
    cache_key: str


@dataclass(frozen=True)
class Sampled:
    """What one attempt returned.

    Attributes:
        token_ids: sampled; may be empty after an abort.
        logprobs, versions: [len(token_ids)] float32 and int64, of the weights that sampled each.
        routes: rows of tokens first_row .. to the last, whose own is missing; None if there are none.
        finish: "stop", "length" or "abort".
        route_bytes: as received.
        invalid_rows: that fall back to the current router, the last token not counted.
        cached_tokens: input tokens taken from the prefix cache.
        retractions: times that the server pre-empted and recomputed it.
    """

    token_ids: list[int]
    logprobs: npt.NDArray[np.float32]
    versions: npt.NDArray[np.int64]
    routes: RouteTable | None
    finish: str
    route_bytes: int = 0
    invalid_rows: int = 0
    cached_tokens: int = 0
    retractions: int = 0


def check_token_ids(token_ids: Sequence[int], vocab_size: int, where: str) -> None:
    """Raises RolloutError for an empty prompt and ids outside the vocabulary, which would crash the server's scheduler."""
    if not token_ids:
        raise RolloutError(f"{where}: the prompt is empty; at least one token id is needed")
    if min(token_ids) < 0 or max(token_ids) >= vocab_size:
        raise RolloutError(
            f"{where}: token ids span {min(token_ids)}..{max(token_ids)}, the model has 0..{vocab_size - 1}; "
            "check that tokenizer and model belong together"
        )


def generate_payload(ask: Ask, sampling: SamplingParams) -> dict[str, Any]:
    """JSON body of one attempt. Every sampling parameter is given, so that no default of server or model applies."""
    return {
        "rid": ask.rid,
        "input_ids": ask.input_ids,
        "extra_key": ask.cache_key,
        "sampling_params": {
            "max_new_tokens": ask.max_new_tokens,
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
            "sampling_seed": ask.seed % (1 << 63),
        },
        "return_logprob": True,
        "return_routed_experts": ask.first_row is not None,
        "routed_experts_start_len": ask.first_row or 0,
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
    """Upper bound for a valid response about `num_tokens` tokens: base64 of the routes, log-probs, ids and metadata."""
    routes = -(-num_tokens * shape.num_hidden_layers * shape.topk * 4 // 3) * 4
    return _FIXED_BYTES + routes + 4 + num_tokens * _BYTES_PER_LOGPROB


def parse_generate(answer: Any, ask: Ask, shape: ModelShape, versions: Mapping[str, int], where: str) -> Sampled:
    """Checks one response of /generate.

    Args:
        versions: the labels that tokens may carry, and the versions that they stand for; more than one if weights were replaced
            while the attempt was paused.
        where: names the request in errors.

    Raises:
        AnswerError: fields are missing or contradict each other.
        RouteError: routes of a wrong shape, or routes that were recomputed under weights other than those that sampled. Single
            bad rows, and rows that repeat longer than chance explains, are no error: they come back invalid and are counted.
        RolloutError: sampled from weights that this engine did not push.
    """
    meta, token_ids = _meta_and_ids(answer, where)
    if meta.get("id") != ask.rid:
        raise AnswerError(f"{where}: the response is that of request {str(meta.get('id'))[:80]!r}, not of {ask.rid!r}")
    finish = meta.get("finish_reason") or {}
    reason = finish.get("type") if isinstance(finish, Mapping) else None
    if reason not in ("stop", "length", "abort"):
        raise AnswerError(f"{where}: finish_reason is {str(finish)[:200]!r}, expected stop or length; the response is lost")
    if not token_ids and reason != "abort":
        raise AnswerError(f"{where}: the response has no output_ids: {str(answer)[:200]}")
    if len(token_ids) > ask.max_new_tokens:
        raise AnswerError(f"{where}: {len(token_ids)} tokens sampled, at most {ask.max_new_tokens} were asked for")
    if reason == "abort" and ask.first_row is not None and meta.get("routed_experts") is None:
        # Aborted in the queue, e.g. after a retraction: SGLang returns the tokens of before, but not their routes.
        meta, token_ids = {**meta, "output_token_logprobs": [], "weight_versions": None}, []
    logprobs = _logprobs(meta, "output_token_logprobs", token_ids, where)
    if any(not 0 <= token < shape.vocab_size for token in token_ids):
        raise AnswerError(f"{where}: sampled token ids {str(token_ids)[:200]} are outside 0..{shape.vocab_size - 1}")
    of_token = _versions(meta, len(token_ids), versions, where)
    retractions, cached_tokens = (_count(meta, name, where) for name in ("num_retractions", "cached_tokens"))
    if ask.first_row is None or not token_ids:
        return Sampled(token_ids, logprobs, of_token, None, reason, cached_tokens=cached_tokens, retractions=retractions)
    if retractions and len(np.unique(of_token)) > 1:
        raise RouteError(
            f"{where}: pre-empted {retractions} times while weights changed: routes of tokens from version {of_token[0]} were "
            f"recomputed under version {of_token[-1]}. Pause engines with mode in_place or abort, never retract"
        )
    encoded: Any = meta.get("routed_experts")
    num_tokens = len(ask.input_ids) + len(token_ids) - ask.first_row
    routes = decode_table(encoded, num_tokens=num_tokens, shape=shape, where=where, first_row=ask.first_row)
    repeated = repeated_rows(routes, [*ask.input_ids, *token_ids][ask.first_row :])
    routes.experts[repeated], routes.valid[repeated] = 0, False
    return Sampled(
        token_ids, logprobs, of_token, routes, reason, len(encoded), routes.num_missing - 1, cached_tokens, retractions
    )


def parse_score(answer: Any, token_ids: Sequence[int], shape: ModelShape, where: str) -> tuple[npt.NDArray[np.float32], RouteTable]:
    """Log-probs [len - 1] of tokens 1.. and the routes of all tokens; raises as parse_generate does."""
    meta, _ = _meta_and_ids(answer, where)
    logprobs = _logprobs(meta, "input_token_logprobs", token_ids, where, skip=1)
    # One token was sampled after them; it has no row.
    table = decode_table(meta.get("routed_experts"), num_tokens=len(token_ids) + 1, shape=shape, where=where)
    return logprobs, RouteTable.checked(table.experts[:-1], table.valid[:-1], shape.num_experts)


def parse_version(label: Any) -> int:
    """The version that a label stands for; -1 for a label that this package did not write (SGLang's "default")."""
    try:
        return int(label)
    except (TypeError, ValueError):
        return -1


def _meta_and_ids(answer: Any, where: str) -> tuple[Mapping[str, Any], list[int]]:
    meta, ids = (answer.get("meta_info"), answer.get("output_ids")) if isinstance(answer, Mapping) else (None, None)
    if not isinstance(meta, Mapping) or not isinstance(ids, list):
        raise AnswerError(f"{where}: the response has no meta_info or no output_ids: {str(answer)[:200]}")
    # 7.0 and True equal integers and pass every comparison below.
    if any(type(token) is not int for token in ids):
        raise AnswerError(f"{where}: output_ids holds something else than integers: {str(ids)[:200]}")
    return meta, ids


def _logprobs(
    meta: Mapping[str, Any], name: str, token_ids: Sequence[int], where: str, skip: int = 0
) -> npt.NDArray[np.float32]:
    """[len(token_ids) - skip] float32 of [[log-prob, token id, text], ...], which must name the same tokens."""
    entries = meta.get(name)
    if not isinstance(entries, list) or len(entries) != len(token_ids):
        got = len(entries) if isinstance(entries, list) else None
        raise AnswerError(f"{where}: {got} entries in {name}, expected {len(token_ids)}, one per token")
    try:
        values = np.array([entry[0] for entry in entries[skip:]], dtype=np.float32)
        ids = [entry[1] for entry in entries[skip:]]
    except (TypeError, ValueError, LookupError, OverflowError) as error:
        raise AnswerError(f"{where}: {name} is malformed: {error}") from error
    if ids != list(token_ids[skip:]):
        raise AnswerError(f"{where}: {name} names other tokens than those that were sampled or sent")
    if not np.isfinite(values).all() or (values > 1e-4).any():
        raise AnswerError(f"{where}: {name} holds values that are no log-probabilities (not finite, or above 0)")
    return values


def _versions(meta: Mapping[str, Any], num_tokens: int, allowed: Mapping[str, int], where: str) -> npt.NDArray[np.int64]:
    """[num_tokens] version per sampled token, from spans where the server reports them, else from its one label."""
    out = np.empty(num_tokens, dtype=np.int64)
    if not num_tokens:
        return out
    spans = meta.get("weight_versions")
    if not isinstance(spans, list) or not spans:
        if len(allowed) > 1:
            raise AnswerError(f"{where}: weights were replaced meanwhile and the response does not say which token is from which")
        spans = [{"version": meta.get("weight_version"), "start": 0, "end": num_tokens}]
    found = {str(span.get("version")) for span in spans if isinstance(span, Mapping)}
    if found - set(allowed):
        raise RolloutError(
            f"{where}: sampled from weights of version {', '.join(sorted(found))}, expected {', '.join(allowed)}; "
            "somebody else updates this server, or the last push did not reach it"
        )
    at = 0
    for span in spans:
        start, end = (span.get("start"), span.get("end")) if isinstance(span, Mapping) else (None, None)
        if type(start) is not int or start != at or type(end) is not int or not start <= end <= num_tokens:
            break
        out[start:end] = allowed[str(span["version"])]
        at = end
    else:
        if at == num_tokens:
            return out
    raise AnswerError(f"{where}: weight_versions {str(spans)[:200]} do not cover {num_tokens} sampled tokens")


def _count(meta: Mapping[str, Any], name: str, where: str) -> int:
    value = meta.get(name) or 0
    if not isinstance(value, int) or value < 0:
        raise AnswerError(f"{where}: {name} is {str(value)[:80]!r}, expected a count")
    return value
