"""Probes: what a server does with a prompt - routes, their repetition, the handshake with a checkpoint, latency.

Axes in names: T tokens of the probe, L layers, K top-k.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from megatron_pr2.errors import ConfigError, RolloutError, RouteError
from megatron_pr2.hf.shape import ModelShape
from megatron_pr2.rollout.base import Probe
from megatron_pr2.rollout.doctor import reference
from megatron_pr2.rollout.doctor.client import EngineClient
from megatron_pr2.rollout.doctor.findings import Finding, Status
from megatron_pr2.rollout.handshake import PROBE_TOKENS, compare
from megatron_pr2.rollout.sglang.refusals import TESTED
from megatron_pr2.rollout.sglang.routes import decode_ids, parse_body
from megatron_pr2.rollout.sglang.wire import parse_score, parse_version
from megatron_pr2.routes.ids import replayable

# The length of the routes of a probe: prompt + 1 sampled - 1.
_ROWS = PROBE_TOKENS
_SHORT_TOKENS, _SHORT_REPEATS, _LONG_TOKENS = 8, 5, 256
# A batch-dependent kernel moves near ties; whatever moves more is no rounding.
_LEAST_REPEATED = 0.9
_USE_TESTED = f"use SGLang {TESTED}"
_OTHER_MODEL = "give the checkpoint that the engine runs as --model"
_LOG = "look at the server's log"


class Probes:
    """Sends probes; flushes the prefix cache only while the server is idle.

    Args:
        shape: of the server's model, None if it is not known.
        router: whether it is a router in front of several servers.

    Attributes:
        label: weight version of the last response.
    """

    def __init__(self, client: EngineClient, shape: ModelShape | None, *, router: bool) -> None:
        self._client, self._shape, self._router = client, shape, router
        self._busy = 0
        self.label: Any = None
        # Ids beyond the vocabulary kill SGLang's scheduler: without a config, only small ones. Not the last ones of a vocabulary
        # either, which may be padding: SGLang reports ids beyond the tokenizer's as 0.
        vocabulary = shape.vocab_size // 2 if shape is not None else 100
        self._ids = [3 + 7919 * (index + 1) % max(1, vocabulary - 3) for index in range(PROBE_TOKENS)]

    def _ask(self, *, through_rid: bool, score: bool = False) -> tuple[Any, Mapping[str, Any]]:
        """The parsed response to the probe, and its meta_info; raises RolloutError."""
        reply = self._client.generate(self._ids, 1, score=score, through_rid=through_rid)
        if reply.status != 200:
            raise RolloutError(f"/generate answers {reply}")
        answer = parse_body(bytearray(reply.body), "the probe")
        meta = answer.get("meta_info") if isinstance(answer, Mapping) else None
        if not isinstance(meta, Mapping):
            raise RolloutError(f"/generate answers without meta_info: {reply}")
        self.label = meta.get("weight_version")
        return answer, meta

    def _flush(self) -> str | None:
        """Flushes the prefix cache if the engine is idle; returns why not, None if it did."""
        if not self._router:
            loads = self._client.request("GET", "/v1/loads").parsed().get("loads")
            known = [load for load in loads if isinstance(load, Mapping)] if isinstance(loads, list) else []
            self._busy = sum(int(load.get(name) or 0) for load in known for name in ("num_running_reqs", "num_waiting_reqs"))
            if self._busy:
                return f"{self._busy} other requests are running"
        reply = self._client.request("POST", "/flush_cache", {})
        return None if reply.status == 200 else f"/flush_cache answers {reply.status}: other requests are running"

    def routes(self) -> Finding:
        """Whether routes come back, in the shape of the model, and whether a router can replay them."""
        _, meta = self._ask(through_rid=False)
        if self._router and not meta.get("routed_experts"):
            _, meta = self._ask(through_rid=True)
            if not meta.get("routed_experts"):
                fix = "install megatron-pr2, whose plugin reads the request id, with the engines, or give the engines' own URLs"
                return Finding("routes", Status.FAIL, "the router drops the request for routes, and no plugin restores it", fix)
        if not meta.get("routed_experts"):
            fix = "start the engine with --enable-return-routed-experts"
            return Finding("routes", Status.FAIL, "/generate returns none", fix)
        problem, fix = self._problem_of(meta)
        if problem:
            return Finding("routes", Status.FAIL, problem, fix)
        through = ", asked for in the request id (the engines have the plugin)" if self._router else ""
        if self._shape is None:
            size = f"{_ids_of(meta).size // _ROWS} ids per token (layers x top-k); --model would check them"
        else:
            size = f"{_ROWS} tokens x {self._shape.num_hidden_layers} layers x top-{self._shape.topk}, all valid"
        return Finding("routes", Status.OK, size + through)

    def _problem_of(self, meta: Mapping[str, Any]) -> tuple[str, str]:
        """What is wrong with the routes of a probe, and what to do; "" if nothing is."""
        try:
            ids = _ids_of(meta)
        except RouteError as error:
            return str(error), _USE_TESTED
        shape = self._shape
        wanted = f"{shape.num_hidden_layers} x {shape.topk}" if shape is not None else "a whole number"
        if ids.size % _ROWS or (shape is not None and ids.size != _ROWS * shape.num_hidden_layers * shape.topk):
            found = f"{ids.size} ids for {_ROWS} tokens = {ids.size / _ROWS:g} per token"
            return f"{found}, expected {wanted} (layers x top-k)", _OTHER_MODEL
        if shape is None:
            return "", ""
        return _problem_of_ids(ids.reshape(_ROWS, shape.num_hidden_layers, shape.topk), shape), (
            "is --model the checkpoint that the engine runs? If so: --moe-runner-backend triton, or another release"
        )

    def repetition(self) -> Iterator[Finding]:
        """Whether a flush empties the prefix cache, and whether routes come back the same with and without it."""
        idle = "run the doctor while the engine is idle"
        if (kept := self._flush()) is not None:
            yield Finding("prefix cache", Status.SKIP, f"not flushed: {kept}", idle)
            return
        _, first = self._ask(through_rid=self._router)
        _, cached = self._ask(through_rid=self._router)
        kept = self._flush()
        _, again = self._ask(through_rid=self._router)
        if kept is not None:
            yield Finding("prefix cache", Status.SKIP, f"not flushed: {kept}", idle)
        elif from_cache := int(again.get("cached_tokens") or 0):
            fix = f"routes would outlive a weight push: {_USE_TESTED}"
            yield Finding("prefix cache", Status.FAIL, f"{from_cache} tokens came from it after a flush", fix)
        else:
            held = cached.get("cached_tokens") or 0
            yield Finding("prefix cache", Status.OK, f"a flush empties it; before it held {held} tokens of the probe")
        equal = min(_equal_share(first, other) for other in (cached, again))
        share = f"{equal:.1%} of a repeated prompt's routes are the same"
        if equal == 1.0:
            detail = "the same routes for the same prompt, from the prefix cache and recomputed"
            yield Finding("repetition", Status.OK, detail)
        elif equal >= _LEAST_REPEATED:
            fix = "kernels depend on the rest of the batch: --enable-deterministic-inference if reruns must repeat"
            yield Finding("repetition", Status.WARN, share, fix)
        else:
            fix = f"the engine returns other routes than it took: {_USE_TESTED}"
            yield Finding("repetition", Status.FAIL, f"only {share}", fix)

    def handshake(self, model: Path, dtype_name: str) -> Finding:
        """Compares routes and log-probs with Transformers on a checkpoint, by the trainer's thresholds for SGLang's dtype name."""
        assert self._shape is not None
        dtype = torch.float32 if dtype_name in ("float32", "float") else torch.bfloat16
        lacking = reference.missing_memory(model, dtype)
        if lacking is not None:
            return Finding("handshake", Status.SKIP, lacking, "run the doctor where the model fits")
        self._flush()
        answer, _ = self._ask(through_rid=self._router, score=True)
        fix = _OTHER_MODEL
        try:
            logprobs, routes = parse_score(answer, self._ids, self._shape, "the probe")
            expected = reference.score(model, self._ids, self._shape, dtype)
            if parse_version(self.label) > 0:
                fix = f"weights of version {self.label} were pushed: compare with a checkpoint of them"
            name = "float32" if dtype is torch.float32 else "bfloat16"
            report = compare(Probe("the engine", logprobs, routes), expected, name, self._shape.moe_layers)
        except (RouteError, ConfigError, RolloutError) as error:
            return Finding("handshake", Status.FAIL, str(error), fix)
        layers = f"at least {report.least_layer_agreement:.2%} in every layer"
        agreement = f"{report.route_agreement:.2%} of the routes as {expected.name}, {layers}"
        return Finding("handshake", Status.OK, f"{agreement}, log-probs to {report.logprob_mean:.1e}")

    def latency(self) -> Finding:
        """Median time of short responses, and tokens per second of a long one; one request at a time."""
        ids = self._ids[:16]
        short = [self._client.generate(ids, _SHORT_TOKENS, routes=False) for _ in range(_SHORT_REPEATS)]
        if refused := [reply for reply in short if reply.status != 200]:
            return Finding("latency", Status.FAIL, f"/generate answers {refused[0]}", _LOG)
        long = self._client.generate(ids, _LONG_TOKENS, routes=False)
        sampled = len(long.parsed().get("output_ids") or ())
        median = statistics.median(reply.seconds for reply in short)
        detail = f"{_SHORT_TOKENS} tokens in {median * 1e3:.0f} ms (median of {_SHORT_REPEATS})"
        if not sampled:
            return Finding("latency", Status.WARN, f"{detail}; a long response failed: {long}", _LOG)
        speed = f"{sampled} tokens in {long.seconds:.2f} s = {sampled / long.seconds:.0f} tokens/s for one request"
        beside = f", beside {self._busy} others" if self._busy else ""
        return Finding("latency", Status.OK, f"{detail}; {speed}{beside}")


def _problem_of_ids(ids_TLK: npt.NDArray[np.int32], shape: ModelShape) -> str:
    """What is wrong with the ids of all layers of a model, "" if nothing is."""
    dense = [layer for layer in range(shape.num_hidden_layers) if layer not in shape.moe_layers]
    if dense and ids_TLK[:, dense].any():
        return f"layers {dense[:4]} are dense in the model and hold routes"
    moe_TLK = ids_TLK[:, list(shape.moe_layers)]
    bad = int((~replayable(moe_TLK, shape.num_experts)).sum())
    if bad:
        empty = [layer for layer in shape.moe_layers if not ids_TLK[:, layer].any()]
        zeros = f"; layers {empty[:4]} hold zeros only" if empty and shape.topk > 1 else ""
        return f"{bad} of {len(moe_TLK)} tokens have duplicate or out-of-range expert ids{zeros}"
    if (moe_TLK == moe_TLK[0]).all():
        return "all tokens have the same routes: they were not recorded"
    return ""


def _ids_of(meta: Mapping[str, Any]) -> npt.NDArray[np.int32]:
    """All ids of a response, whatever its model is; raises RouteError."""
    return decode_ids(meta.get("routed_experts"), 1, 1, "the probe").reshape(-1)


def _equal_share(one: Mapping[str, Any], other: Mapping[str, Any]) -> float:
    """Share of ids that two responses to the same prompt have in common, position by position."""
    try:
        first, second = _ids_of(one), _ids_of(other)
    except RouteError:
        return 0.0
    return float((first == second).mean()) if first.size and first.shape == second.shape else 0.0
