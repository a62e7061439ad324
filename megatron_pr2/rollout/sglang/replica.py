"""SGLangReplica: one SGLang server, our own or somebody else's, from the first connection to its end.

A replica whose weights are not what was last pushed - it was restarted, or a push failed half-way - is not usable until a push
succeeds. What it is asked while it samples is in fleet.py.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_pr2.errors import RolloutError, RouteError
from megatron_pr2.hf.shape import ModelShape
from megatron_pr2.rollout.base import Probe
from megatron_pr2.rollout.sglang import wire
from megatron_pr2.rollout.sglang.config import SGLangConfig
from megatron_pr2.rollout.sglang.http import HttpClient, LoopThread, ask_health
from megatron_pr2.rollout.sglang.push.session import FLUSH, PushSession, PushTarget, push_target
from megatron_pr2.rollout.sglang.refusals import check_server_info
from megatron_pr2.rollout.sglang.routes import parse_body
from megatron_pr2.rollout.sglang.server import SGLangServer
from megatron_pr2.routes.table import RouteTable

logger = logging.getLogger(__name__)

_REAP_S = 10.0
_PROBE_IDS = (1, 2, 3, 5, 8, 13)


class SGLangReplica:
    """One server behind an SGLangEngine.

    Args:
        url: of a running server, None to start one by `config`.

    Attributes:
        server: the own server, None for one that is attached to.
        url: base URL; that of an own server is known once it was started.
        labels: version labels that the server has stamped on what it sampled; the last one is that of now.
        horizon: of the gates that it holds, as for RolloutRequest; kept while it is restarted.
        unusable: why it must not sample, None if it may.
        load: attempts in flight.
        paused: told to pause for a weight update; its health check fails until it goes on.
        max_length: tokens of prompt and response together that it takes at most; None where it does not report it.
        session, target: what controls its weight updates, and where weights go; while it is connected.
    """

    session: PushSession
    target: PushTarget

    def __init__(self, index: int, config: SGLangConfig, shape: ModelShape, *, url: str | None, api_key: str | None) -> None:
        self.index, self.config, self.shape = index, config, shape
        self.server = SGLangServer(config, api_key) if url is None else None
        self.url = url or ""
        self.api_key = self.server.api_key if self.server is not None else api_key
        self.labels = [""]
        self.horizon: float | None = None
        self.unusable: str | None = "it was not started"
        self.load = 0
        self.paused = False
        self.max_length: int | None = None
        self._pushed = False
        self._http: HttpClient | None = None

    @property
    def name(self) -> str:
        return f"SGLang server {self.url or self.index}"

    @property
    def label(self) -> str:
        """The version label that the server stamps on what it samples now."""
        return self.labels[-1]

    @property
    def connected(self) -> bool:
        """Whether it was started and has not been stopped since."""
        return self._http is not None

    @property
    def http(self) -> HttpClient:
        """Its client; raises RolloutError if it is not started."""
        if self._http is None:
            raise RolloutError("the rollout engine is not running; call start()")
        return self._http

    def start(self, loop: LoopThread) -> None:
        """Starts the own server, or attaches; its client runs on `loop`. Returns when a probe returned valid routes."""
        if self._http is not None:
            return
        try:
            if self.server is not None:
                self.server.start()
                self.url = self.server.url
            self._connect(loop)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Disconnects and stops an own server; safe to call twice and after a failure."""
        http, self._http = self._http, None
        if http is not None:
            http.close()
        if self.server is not None:
            self.server.stop()
        self.unusable = "it was stopped"

    def _connect(self, loop: LoopThread) -> None:
        settings = self.config.client_settings()
        self._http = HttpClient(self.url, api_key=self.api_key, loop=loop, why_dead=self.why_dead, **settings)
        info = self._get("/server_info")
        check_server_info(info, self.name)
        self.session = PushSession(self._http)
        self.target = push_target(self.config, self.url, self.api_key, info, self.name)
        limit = info.get("max_req_input_len")
        self.max_length = limit if type(limit) is int and limit > 0 else None
        self.paused = False
        self.labels.append(self._read_label())
        self.unusable = None
        self._prove_routes()
        if self._pushed:
            self.unusable = "its server was restarted and does not hold the weights of the last push"

    def _prove_routes(self) -> None:
        """A server may start and still return no routes: a plugin that failed is only logged, a kernel may skip the capture."""
        try:
            routes = self.score([token % self.shape.vocab_size for token in _PROBE_IDS]).routes
        except (RouteError, RolloutError) as error:
            raise RolloutError(f"{self.name}: the probe after the start failed: {error}{self._log()}") from error
        if routes.num_missing:
            raise RolloutError(
                f"{self.name}: {routes.num_missing} of {len(_PROBE_IDS)} rows of the probe's routes are unusable (duplicate or "
                "out-of-range expert ids, or layers of zeros); its MoE kernel does not record routes, or ModelShape describes "
                f"another model.{self._log()}"
            )

    def why_dead(self, *, generates: bool = True) -> str | None:
        """None while the server runs and answers, else the reason with the last log lines.

        Args:
            generates: it has to generate a token, which takes SGLang a second; else any answer will do.
        """
        if self.server is not None and not self.server.alive():
            return self.server.describe_end()
        # Outside the client's pool, which may be exhausted. SGLang's /health generates a token, which a paused server does not do;
        # any answer shows that a paused one lives.
        status, problem = ask_health(self.url, 30.0, "/health" if generates and not self.paused else "/model_info")
        # A dying server closes its sockets before its process is gone; how it ended says more than that it does not answer.
        if not status and self.server is not None and self.server.wait(_REAP_S):
            return self.server.describe_end()
        # /model_info needs a key, which a refusal asks for.
        lives = not problem or (status and self.paused) or (not generates and 0 < status < 500)
        return None if lives else f"{problem}.{self._log()}"

    def _log(self) -> str:
        return self.server.describe_log() if self.server is not None else ""

    def _get(self, path: str) -> dict[str, Any]:
        answer = self.http.run(self.http.json("GET", path, where=self.name))
        if not isinstance(answer, dict):
            raise RolloutError(f"{self.name}: {path} answered {str(answer)[:200]}, expected an object; is this an SGLang server?")
        return answer

    def published(self, label: str, horizon: float | None) -> None:
        """After a push: it may sample again if it reports the pushed version, else this raises RolloutError.

        `horizon` is that of the gates.
        """
        reported = self._read_label()
        if reported != label:
            raise RolloutError(f"weight update: {self.name} reports version {reported!r} after a push of version {label}")
        self.labels.append(label)
        self.horizon = horizon
        self.unusable, self._pushed = None, True

    def _read_label(self) -> str:
        return str(self._get("/model_info").get("weight_version"))

    def check_usable(self) -> None:
        """Raises RolloutError unless it may sample."""
        if self._http is not None and self.unusable is not None:
            raise RolloutError(f"the rollout engine cannot sample: {self.unusable}; call update_weights()")

    def score(self, token_ids: Sequence[int]) -> Probe:
        """Handshake probe; the prefix cache is flushed first, so the server has to be idle."""
        http = self.http
        self.check_usable()
        wire.check_token_ids(token_ids, self.shape.vocab_size, "score")
        http.run(http.body("POST", FLUSH, where="score"))
        return Probe(self.name, *score(http, token_ids, self.shape, "score"), self.horizon)


def score(
    http: HttpClient, token_ids: Sequence[int], shape: ModelShape, where: str, **fields: Any
) -> tuple[npt.NDArray[np.float32], RouteTable]:
    """Log-probs and routes of a probe, which is sent with further fields; ids are taken modulo the vocabulary."""
    ids = [token % shape.vocab_size for token in token_ids]
    limit = wire.max_answer_bytes(len(ids) + 1, shape)
    body = http.run(http.body("POST", "/generate", wire.score_payload(ids) | fields, where=where, max_bytes=limit))
    return wire.parse_score(parse_body(body, where), ids, shape, where)
