"""Front: the router between the client and the replicas, our own or one that already runs, and the proof that routes pass it."""

from __future__ import annotations

import uuid
from collections.abc import Sequence

from megatron_pr2.errors import RolloutError, RouteError
from megatron_pr2.hf.shape import ModelShape
from megatron_pr2.rollout.sglang import wire
from megatron_pr2.rollout.sglang.config import SGLangConfig
from megatron_pr2.rollout.sglang.gateway.router import SGLangRouter
from megatron_pr2.rollout.sglang.http import HttpClient, LoopThread
from megatron_pr2.rollout.sglang.plugin import encode_rid
from megatron_pr2.rollout.sglang.replica import SGLangReplica
from megatron_pr2.rollout.sglang.routes import parse_body


class Front:
    """Starts or attaches to the router that `config.router` names; `replicas` are started and behind it."""

    def __init__(self, config: SGLangConfig, shape: ModelShape, replicas: Sequence[SGLangReplica], loop: LoopThread) -> None:
        self._config, self._shape, self._replicas, self._loop = config, shape, replicas, loop
        self._router: SGLangRouter | None = None
        self._http: HttpClient | None = None
        self._url_of: dict[int, str] = {}

    def start(self) -> HttpClient:
        """Returns a client of the router after a probe has brought routes back; raises RolloutError if none come through it."""
        config = self._config
        url, key = config.router, self._replicas[0].api_key
        if url == "own":
            self._url_of = {replica.index: replica.url for replica in self._replicas}
            self._router = SGLangRouter(
                list(self._url_of.values()),
                api_key=key,
                python=config.python,
                bind=config.bind,
                log_path=f"{config.log_path}.router" if config.log_path else None,
            )
            self._router.start()
            url = self._router.url
        self._http = HttpClient(url, api_key=key, why_dead=self._why_dead, loop=self._loop, **config.client_settings())
        self._prove(self._http, f"router {url}")
        return self._http

    def alive(self) -> bool:
        """Whether an own router runs; of one that was attached to, whether start() succeeded."""
        return self._router.alive() if self._router is not None else self._http is not None

    def moved(self, replica: SGLangReplica) -> None:
        """To be called when a server is back, maybe under another address."""
        old_url = self._url_of.get(replica.index, replica.url)
        if self._router is not None and self._router.alive() and old_url != replica.url:
            self._router.replace_worker(old_url, replica.url)
            self._url_of[replica.index] = replica.url

    def stop(self) -> None:
        """Closes the client and stops an own router; safe to call twice."""
        if self._http is not None:
            self._http.close()
            self._http = None
        if self._router is not None:
            self._router.stop()
            self._router = None

    def _why_dead(self) -> str | None:
        router = self._router
        return router.describe_end() if router is not None and not router.alive() else None

    def _prove(self, http: HttpClient, where: str) -> None:
        """Routers drop what they do not know: whether routes come through is seen by asking for some."""
        ids = [token % self._shape.vocab_size for token in range(1, 9)]
        payload = {**wire.score_payload(ids), "rid": encode_rid(uuid.uuid4().hex, 0)}
        limit = wire.max_answer_bytes(len(ids) + 1, self._shape)
        body = http.run(http.body("POST", "/generate", payload, where=where, max_bytes=limit))
        try:
            wire.parse_score(parse_body(body, where), ids, self._shape, where)
        except (RolloutError, RouteError) as error:
            raise RolloutError(
                f"{where}: no usable routes come through it ({error}). SGLang's router drops the request for routes; it is "
                "repeated in the request id, which this package's SGLang plugin reads: install megatron-pr2 in the engines' "
                "environment, or use router='none'"
            ) from error
