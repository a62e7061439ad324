"""PushSession: the controlling side of one server's weight updates: opens one, drops caches and stamps the version at its end."""

from __future__ import annotations

import logging
from typing import Any

from megatron_pr2.errors import RolloutError
from megatron_pr2.rollout.sglang.http import HttpClient, RefusedError

logger = logging.getLogger(__name__)

WHERE = "weight update"
# SGLang waits so long for what is still running: of a request whose client went away it learns seconds later.
FLUSH = "/flush_cache?timeout=30"
# A server that is stuck in a transfer answers nothing until the transfer times out.
_ABANDON_TIMEOUT_S = 10.0


class PushSession:
    """The controlling side of one server's weight updates; every reply is checked.

    Args:
        http: client of the server.
        where: names the update in errors.
    """

    def __init__(self, http: HttpClient, where: str = WHERE) -> None:
        self._http = http
        self._where = where
        self._has_sessions = True

    def begin(self) -> None:
        """Opens SGLang's weight update session, without which current releases refuse tensors; older ones have none.

        Raises:
            RolloutError: the server refused or died.
        """
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
        """After the last bucket of the last sender: closes SGLang's session; see :meth:`publish`.

        Raises:
            RolloutError: the server refused or died; its weights may be new, or partly.
        """
        if self._has_sessions:
            self._checked("/end_weight_update")
        self.publish(label, flush_cache=flush_cache)

    def load_directory(self, path: str) -> None:
        """Has the server load a model directory, instead of begin(), senders and finish(); :meth:`publish` follows.

        Raises:
            RolloutError: the server could not load it, or died.
        """
        # SGLang would flush and stamp along with it, but 0.5.19 dies if requests are in flight then.
        payload = {"model_path": path, "load_format": "safetensors", "flush_cache": False, "abort_all_requests": False}
        self._checked("/update_weights_from_disk", payload)

    def publish(self, label: str, *, flush_cache: bool) -> None:
        """Names the new weights; the server samples from them when this returns.

        Args:
            label: weight version from now on.
            flush_cache: drop everything that was computed with the old weights. False where requests are in flight (paused in
                place): SGLang flushes an idle server only, and what they have computed so far must stay.

        Raises:
            RolloutError: the server refused or died; its weights are new nevertheless.
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
        if not self._has_sessions:
            return
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
