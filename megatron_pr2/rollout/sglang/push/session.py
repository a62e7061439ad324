"""The controlling side of one server's weight updates (PushSession), and what a sender has to know of a server (PushTarget)."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_pr2.errors import RolloutError
from megatron_pr2.rollout.sglang.config import SGLangConfig
from megatron_pr2.rollout.sglang.http import HttpClient, RefusedError

logger = logging.getLogger(__name__)

WHERE = "weight update"
# SGLang waits so long for what is still running: of a request whose client went away it learns seconds later.
FLUSH = "/flush_cache?timeout=30"
# A server that is stuck in a transfer answers nothing until the transfer times out.
_ABANDON_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class PushTarget:
    """One server, as a sender sees it. Pickles with its key: hand it to processes, never to a log.

    Attributes:
        world_size: of a group of one sender and the server's ranks.
        backend: "gloo" or "nccl".
        device: where the server receives.
        timeout_s: for one bucket, the wait for the buckets of other senders included.
        connection: differs from one connection with the server to the next: senders then open new channels.
        horizon: of the gates that it is to get, as for RolloutRequest.
    """

    url: str
    api_key: str | None = field(repr=False)
    world_size: int
    backend: str
    device: str
    bucket_bytes: int
    timeout_s: float
    connection: str = field(default_factory=lambda: uuid.uuid4().hex)
    horizon: float | None = field(default=None, compare=False)


def targets_of(targets: Any, horizon: float) -> list[PushTarget]:
    """Those of the targets that are to get the gates for a horizon; none where its servers are gone."""
    return [target for target in targets if target.horizon == horizon]


def push_target(config: SGLangConfig, url: str, api_key: str | None, info: Mapping[str, Any], where: str) -> PushTarget:
    """The target for one connection with a server that reports `info`; RolloutError if not of how many ranks."""
    device = "cpu" if info.get("device") == "cpu" else "cuda"
    backend = config.weight_backend
    return PushTarget(
        url=url,
        api_key=api_key,
        world_size=weight_group_size(info, where),
        backend=("gloo" if device == "cpu" else "nccl") if backend == "auto" else backend,
        device=device,
        bucket_bytes=config.weight_bucket_bytes,
        timeout_s=config.request_timeout_s,
    )


def weight_group_size(info: Mapping[str, Any], where: str) -> int:
    """Ranks of the group: the sender and the server's tensor-parallel ranks, DP attention's included; RolloutError if not known."""
    try:
        return 1 + int(info["tp_size"])
    except (KeyError, TypeError, ValueError) as error:
        raise RolloutError(f"{where} reports tp_size={info.get('tp_size')!r}, expected a number of ranks") from error


class PushSession:
    """Opens and closes one server's weight updates; every reply is checked, and all but abandon() raise RolloutError."""

    def __init__(self, http: HttpClient, where: str = WHERE) -> None:
        self._http = http
        self._where = where
        self._has_sessions = True

    def begin(self) -> None:
        """Opens SGLang's weight update session, without which current releases refuse tensors; older ones have none."""
        if not self._has_sessions:
            return
        try:
            self._checked("/begin_weight_update")
        except RefusedError as error:
            if error.status == 404:
                self._has_sessions = False
                return
            if "already open" not in error.body:
                raise
            # Left open by a process that died.
            self._checked("/end_weight_update")
            self._checked("/begin_weight_update")

    def finish(self, label: str, *, flush_cache: bool) -> None:
        """After the last bucket of the last sender; after a failure the weights may be new, or partly."""
        if self._has_sessions:
            self._checked("/end_weight_update")
        self.publish(label, flush_cache=flush_cache)

    def load_directory(self, path: str) -> None:
        """Has the server load a model directory, instead of begin(), senders and finish(); publish() follows."""
        # SGLang would flush and stamp along with it, but 0.5.19 dies if requests are in flight then.
        payload = {"model_path": path, "load_format": "safetensors", "flush_cache": False, "abort_all_requests": False}
        self._checked("/update_weights_from_disk", payload)

    def publish(self, label: str, *, flush_cache: bool) -> None:
        """Stamps the version; the server samples from the new weights when this returns, and has them also after a failure.

        Args:
            flush_cache: drop everything that was computed with the old weights. False where requests are in flight (paused in
                place): SGLang flushes an idle server only, and what they have computed so far must stay.
        """
        if flush_cache:
            try:
                self._http.run(self._http.body("POST", FLUSH, {}, where=self._where, retry=False))
            except RefusedError as error:
                raise RolloutError(
                    f"{self._where}: the cache still holds what the old weights computed: {error.body.strip()[:300]}; push while "
                    "no request runs, or keep the cache on purpose (flush_cache=False)"
                ) from error
        # SGLang aborts everything in flight by default.
        self._checked("/update_weight_version", {"new_version": label, "abort_all_requests": False})

    def abandon(self) -> None:
        """Closes the session after a failure if the server still can; never raises, the caller has the failure to report."""
        if self._has_sessions:
            try:
                self._checked("/end_weight_update", timeout_s=_ABANDON_TIMEOUT_S)
            except RolloutError as error:
                logger.info("the weight update session stays open: %s", error)

    def _checked(self, path: str, payload: dict[str, Any] | None = None, timeout_s: float | None = None) -> None:
        call = self._http.json("POST", path, payload or {}, where=self._where, retry=False, timeout_s=timeout_s)
        check_reply(path, self._http.run(call), self._where)


def check_reply(path: str, reply: Any, where: str) -> None:
    """Raises RolloutError unless the server says that it succeeded."""
    if not isinstance(reply, dict) or reply.get("success") is not True:
        message = reply.get("message", reply) if isinstance(reply, dict) else reply
        raise RolloutError(f"{where}: {path} was refused: {str(message)[:500]}")
