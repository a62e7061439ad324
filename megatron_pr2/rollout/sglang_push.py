"""WeightPusher: one weight update of one server, from the open session to the stamped version."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from concurrent.futures import Future
from typing import Any

import torch

from megatron_pr2.errors import RolloutError
from megatron_pr2.rollout.sglang_channel import WeightChannel, buckets, check_reply
from megatron_pr2.rollout.sglang_http import HttpClient, RefusedError

logger = logging.getLogger(__name__)

_WHERE = "weight update"
# A server that is stuck in a transfer answers nothing until the transfer times out.
_ABANDON_TIMEOUT_S = 10.0


class WeightPusher:
    """Pushes weights through a channel that it opens when first needed and again after a failure.

    Args:
        http: client of the server.
        world_size: this process and the server's ranks.
        backend: "gloo" or "nccl".
        device: where the server receives.
        bucket_bytes: see SGLangConfig.weight_bucket_bytes.
        timeout_s: for one bucket.
    """

    def __init__(
        self, http: HttpClient, *, world_size: int, backend: str, device: str, bucket_bytes: int, timeout_s: float
    ) -> None:
        self._http = http
        self._world_size = world_size
        self._backend = backend
        self._device = torch.device(device)
        self._bucket_bytes = bucket_bytes
        self._timeout_s = timeout_s
        self._channel: WeightChannel | None = None
        self._has_sessions = True

    def push(self, weights: Iterable[tuple[str, torch.Tensor]], label: str) -> int:
        """Sends all tensors, has the caches flushed and the version stamped; returns the bytes sent.

        Raises:
            RolloutError: no tensors were given, any part was refused, or the server died. Some weights may be new then.
        """
        self._begin_session()
        sent = 0
        try:
            channel = self._open_channel()
            for bucket in buckets(weights, self._bucket_bytes, self._device):
                channel.send(bucket, weight_version=label, flush_cache=bucket.last)
                sent += bucket.flat.numel()
            if not sent:
                raise RolloutError(f"{_WHERE}: no tensors were given")
        except BaseException:
            self._abandon_session()
            raise
        if self._has_sessions:
            check_reply("/end_weight_update", self._call("/end_weight_update"))
        return sent

    def close(self) -> None:
        """Leaves the group; safe to call twice and with a dead server."""
        channel, self._channel = self._channel, None
        if channel is not None:
            channel.close()

    def _open_channel(self) -> WeightChannel:
        if self._channel is None or self._channel.broken:
            self.close()
            self._channel = WeightChannel(
                self._post,
                world_size=self._world_size,
                backend=self._backend,
                timeout_s=self._timeout_s,
            )
        return self._channel

    def _begin_session(self) -> None:
        """Opens SGLang's weight update session, without which current releases refuse tensors; older ones have none."""
        if not self._has_sessions:
            return
        try:
            reply = self._call("/begin_weight_update")
        except RefusedError as error:
            if error.status == 404:
                self._has_sessions = False
                return
            if "already open" not in error.body:
                raise
            # Left behind by somebody who died in the middle.
            check_reply("/end_weight_update", self._call("/end_weight_update"))
            reply = self._call("/begin_weight_update")
        check_reply("/begin_weight_update", reply)

    def _abandon_session(self) -> None:
        """Closes the session after a failure if the server still can; the failure itself is what the caller hears of."""
        if not self._has_sessions:
            return
        try:
            check_reply("/end_weight_update", self._call("/end_weight_update", timeout_s=_ABANDON_TIMEOUT_S))
        except RolloutError as error:
            logger.info("the weight update session stays open: %s", error)

    def _call(self, path: str, timeout_s: float | None = None) -> Any:
        return self._http.run(self._http.json("POST", path, {}, where=_WHERE, retry=False, timeout_s=timeout_s))

    def _post(self, path: str, payload: dict[str, Any]) -> Future[Any]:
        return self._http.submit(self._http.json("POST", path, payload, where=_WHERE, retry=False, timeout_s=self._timeout_s))
