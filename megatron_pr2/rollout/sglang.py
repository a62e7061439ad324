"""SGLangEngine: an SGLang server as RolloutEngine, driven from one process.

Lifecycle: start() begins or attaches to a server and proves with a probe that it returns routes; update_weights() pushes
through a process group (sglang_push.py); generate() and score() talk HTTP. An engine whose weights are not what this object
last pushed - the server was restarted, or a push failed half-way - refuses to sample until a push succeeds.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable, Sequence
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
import torch

from megatron_pr2.errors import RolloutError, RouteError
from megatron_pr2.rollout import sglang_wire as wire
from megatron_pr2.rollout.base import ModelShape, RolloutRequest, RolloutResponse, RolloutStats, SamplingParams
from megatron_pr2.rollout.sglang_config import SGLangConfig
from megatron_pr2.rollout.sglang_http import HttpClient
from megatron_pr2.rollout.sglang_info import check_server_info, weight_group_size
from megatron_pr2.rollout.sglang_push import WeightPusher
from megatron_pr2.rollout.sglang_routes import parse_body
from megatron_pr2.rollout.sglang_server import SGLangServer
from megatron_pr2.routes import RouteTable

logger = logging.getLogger(__name__)

_REAP_S = 10.0
_PROBE_IDS = (1, 2, 3, 5, 8, 13)


class SGLangEngine:
    """RolloutEngine on one SGLang server.

    Args:
        config: how to start or find the server.
        shape: of the model, to read its routes.

    Attributes:
        weight_version: of the last push; 0 for an own server's checkpoint, -1 if an attached server does not name a number.
    """

    name = "sglang"
    returns_routes = True

    def __init__(self, config: SGLangConfig, shape: ModelShape) -> None:
        self.config = config
        self.shape = shape
        self.server = SGLangServer(config) if config.model_path is not None else None
        self.weight_version = -1
        self._version_label = ""
        self._unusable: str | None = None
        self._pushed = False
        self._http: HttpClient | None = None
        self._pusher: WeightPusher | None = None
        self._url = config.url or ""

    # Lifecycle

    def start(self) -> None:
        """Starts the own server, or attaches; returns when a probe came back with valid routes.

        Raises:
            RolloutError: no healthy server in time, one that cannot be used, or no usable routes; names the cause.
        """
        if self._http is not None:
            return
        try:
            if self.server is not None:
                self.server.start()
                self._url = self.server.url
            self._connect()
        except BaseException:
            self._stop()
            raise

    def restart(self) -> None:
        """Starts the own server anew (an attached one is connected to anew); push the weights again before sampling.

        Raises:
            RolloutError: as start().
        """
        self._stop()
        self.start()

    def close(self) -> None:
        """Stops an own server and leaves an attached one running; safe to call twice and after a failure."""
        healthy = self._http is not None and self._unusable is None
        self._stop()
        if healthy and self.server is not None:
            self.server.remove_log()

    def ensure_alive(self) -> None:
        """Raises RolloutError, with the last log lines of an own server, unless the server runs and answers."""
        self._client()
        reason = self._why_dead()
        if reason is not None:
            raise RolloutError(f"the rollout engine is not running: {reason}")

    def _connect(self) -> None:
        config = self.config
        self._http = HttpClient(
            self._url,
            api_key=self.server.api_key if self.server is not None else config.read_api_key(),
            concurrency=config.concurrency,
            timeout_s=config.request_timeout_s,
            retries=config.retries,
            backoff_s=config.retry_backoff_s,
            why_dead=self._why_dead,
        )
        where = f"SGLang server {self._url}"
        info = self._get("/server_info", where)
        check_server_info(info, where)
        device = "cpu" if info.get("device") == "cpu" else "cuda"
        backend = config.weight_backend
        self._pusher = WeightPusher(
            self._http,
            world_size=weight_group_size(info, where),
            backend=("gloo" if device == "cpu" else "nccl") if backend == "auto" else backend,
            device=device,
            bucket_bytes=config.weight_bucket_bytes,
            timeout_s=config.request_timeout_s,
        )
        self._version_label = self._read_version(where)
        self.weight_version = wire.parse_version(self._version_label)
        self._unusable = None
        self._probe(where)
        if self._pushed:
            self._unusable = "its server was restarted and does not hold the weights of the last push"

    def _probe(self, where: str) -> None:
        """A server may start and still return no routes: a plugin that failed is only logged, a kernel may skip the capture."""
        ids = [token % self.shape.vocab_size for token in _PROBE_IDS]
        try:
            _, routes = self.score(ids)
        except (RouteError, RolloutError) as error:
            raise RolloutError(f"{where}: the probe after the start failed: {error}{self._log()}") from error
        if routes.num_missing:
            raise RolloutError(
                f"{where}: {routes.num_missing} of {len(ids)} rows of the probe's routes are unusable (duplicate or out-of-range "
                f"expert ids, or layers of zeros); its MoE kernel does not record routes, or ModelShape describes another model."
                f"{self._log()}"
            )

    def _stop(self) -> None:
        pusher, self._pusher = self._pusher, None
        http, self._http = self._http, None
        if pusher is not None:
            pusher.close()
        if http is not None:
            http.close()
        if self.server is not None:
            self.server.stop()

    def _why_dead(self) -> str | None:
        """None while the server runs and answers, else the reason with the last log lines."""
        if self.server is not None and not self.server.alive():
            return self.server.describe_end()
        try:
            # Outside the client's pool, which may be exhausted; /health needs no key.
            status = httpx.get(f"{self._url}/health", timeout=30.0, trust_env=False).status_code
        except httpx.HTTPError as error:
            # A dying server closes its sockets before its process is gone; how it ended says more than that it does not answer.
            deadline = time.monotonic() + _REAP_S
            while self.server is not None and time.monotonic() < deadline:
                if not self.server.alive():
                    return self.server.describe_end()
                time.sleep(0.05)
            return f"{self._url} does not answer ({type(error).__name__}: {error}).{self._log()}"
        return None if status == 200 else f"{self._url}/health answers {status}.{self._log()}"

    def _log(self) -> str:
        return self.server.describe_log() if self.server is not None else ""

    def _client(self) -> HttpClient:
        if self._http is None:
            raise RolloutError("the rollout engine is not running; call start()")
        return self._http

    def _usable_client(self) -> HttpClient:
        client = self._client()
        if self._unusable is not None:
            raise RolloutError(f"the rollout engine cannot sample: {self._unusable}; call update_weights()")
        return client

    def _get(self, path: str, where: str) -> dict[str, Any]:
        client = self._client()
        answer = client.run(client.json("GET", path, where=where))
        if not isinstance(answer, dict):
            raise RolloutError(f"{where}: {path} answered {str(answer)[:200]}, expected an object; is this an SGLang server?")
        return answer

    def _read_version(self, where: str) -> str:
        return str(self._get("/model_info", where).get("weight_version"))

    # Weights

    def update_weights(self, weights: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Pushes tensors by Hugging Face name, in buckets, and drops every cache; a part of the model will do.

        SGLang skips names that it does not know without a word: the handshake after the push has to prove the content.

        Args:
            weights: tensors of any device; SGLang casts to its own dtype, the bytes travel as they are given.
            version: stamped on everything that is sampled from now on.

        Raises:
            RolloutError: any part was refused or the server died; the engine refuses to sample until a push succeeds.
        """
        self._client()
        assert self._pusher is not None
        began = time.monotonic()
        self._unusable = "its last weight update failed and may have replaced a part of the weights"
        sent = self._pusher.push(weights, str(version))
        label = self._read_version("weight update")
        if label != str(version):
            raise RolloutError(f"weight update: the server reports version {label!r} after a push of version {version}")
        self._version_label, self.weight_version = label, version
        self._unusable, self._pushed = None, True
        logger.info("pushed weights of version %d: %.1f MB in %.2f s", version, sent / 1e6, time.monotonic() - began)

    # Sampling

    def generate(
        self, requests: Sequence[RolloutRequest], sampling: SamplingParams, *, return_routes: bool
    ) -> tuple[list[RolloutResponse], RolloutStats]:
        """Samples one response per request, in the order of the requests, `config.concurrency` at a time.

        Seeds are honoured by CPU servers started by this package and by GPU servers with --enable-deterministic-inference.

        Returns:
            Responses, and stats whose `extra` counts `invalid_rows` (of routes, which the live router will decide),
            `cached_tokens` (prompt tokens from the prefix cache), `retractions` and `retries`.

        Raises:
            RolloutError: any response is lost (the server died, refused, timed out, or answered nonsense).
            RouteError: routes of a wrong shape.
        """
        client = self._usable_client()
        for index, request in enumerate(requests):
            wire.check_token_ids(request.prompt_ids, self.shape.vocab_size, f"request {index}")
        began, retried = time.monotonic(), client.retried

        async def one(index: int, request: RolloutRequest) -> wire.ParsedResponse:
            where = f"request {index} of {len(requests)} (seed {request.seed})"
            payload = wire.generate_payload(request, sampling, return_routes=return_routes)
            answer = await self._answer(client, payload, len(request.prompt_ids) + sampling.max_new_tokens, where)
            return wire.parse_generate(
                answer,
                request,
                sampling,
                self.shape,
                return_routes=return_routes,
                version_label=self._version_label,
                version=self.weight_version,
                where=where,
            )

        async def all_of_them() -> list[wire.ParsedResponse]:
            tasks = [asyncio.ensure_future(one(index, request)) for index, request in enumerate(requests)]
            try:
                return list(await asyncio.gather(*tasks))
            finally:
                for task in tasks:
                    task.cancel()

        parsed = client.run(all_of_them())
        stats = RolloutStats(
            seconds=time.monotonic() - began,
            generated_tokens=sum(len(p.response.response_ids) for p in parsed),
            route_bytes=sum(p.route_bytes for p in parsed),
            extra={
                "invalid_rows": float(sum(p.invalid_rows for p in parsed)),
                "cached_tokens": float(sum(p.cached_tokens for p in parsed)),
                "retractions": float(sum(p.retractions for p in parsed)),
                "retries": float(client.retried - retried),
            },
        )
        return [p.response for p in parsed], stats

    def score(self, token_ids: Sequence[int]) -> tuple[npt.NDArray[np.float32], RouteTable]:
        """Handshake probe, computed anew: the prefix cache is flushed first, so the engine has to be idle.

        Returns:
            [len - 1] float32 log-probs of tokens 1.. at temperature 1, and the routes of all tokens.

        Raises:
            RolloutError, RouteError: as generate().
        """
        client = self._usable_client()
        wire.check_token_ids(token_ids, self.shape.vocab_size, "score")
        client.run(client.body("POST", "/flush_cache", where="score"))
        answer = client.run(self._answer(client, wire.score_payload(token_ids), len(token_ids) + 1, "score"))
        return wire.parse_score(answer, token_ids, self.shape, "score")

    async def _answer(self, client: HttpClient, payload: dict[str, Any], num_tokens: int, where: str) -> Any:
        """The parsed answer of /generate, its routes as a view into the body."""
        limit = wire.max_answer_bytes(num_tokens, self.shape)
        body = await client.body("POST", "/generate", payload, where=where, max_bytes=limit)
        return parse_body(body, where)
