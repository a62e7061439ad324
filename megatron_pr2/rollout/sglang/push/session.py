"""Pushing weights into SGLang servers in two phases: one process controls, any number of processes send.

    PushSession   the controlling process, one per server: opens the update, flushes caches and stamps the version at its end
    PushTarget    what a sender has to know of a server; the controlling process hands it to the others
    WeightSender  any process: sends its own tensors to all targets, through channels that it keeps between pushes

Every sender has a process group of its own with each server, and a server takes one bucket at a time, so senders need not agree on
anything but the two phases: nobody sends before begin() or after finish() or abandon().
"""

from __future__ import annotations

import ipaddress
import logging
import socket
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx
import torch

from megatron_pr2.errors import RolloutError
from megatron_pr2.rollout.sglang.config import SGLangConfig
from megatron_pr2.rollout.sglang.http import HttpClient, RefusedError
from megatron_pr2.rollout.sglang.info import weight_group_size
from megatron_pr2.rollout.sglang.push.channel import WHERE, Bucket, WeightChannel, buckets, check_reply

logger = logging.getLogger(__name__)

T = TypeVar("T")
# A server that is stuck in a transfer answers nothing until the transfer times out.
_ABANDON_TIMEOUT_S = 10.0
# SGLang waits so long for what is still running: of a request whose client went away it learns seconds later.
FLUSH = "/flush_cache?timeout=30"
_HEALTH_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class PushTarget:
    """One server, as a sender sees it. Pickles with its key: hand it to processes, never to a log.

    Attributes:
        url: base URL.
        api_key: bearer token, or None for a server without one.
        world_size: of a group of one sender and the server's ranks.
        backend: "gloo" or "nccl".
        device: where the server receives.
        bucket_bytes: see SGLangConfig.weight_bucket_bytes.
        timeout_s: for one bucket, the wait for the buckets of other senders included.
        address: of the sender, as the server reaches it; None lets each sender find its own.
        connection: differs from one connection with the server to the next: senders then open new channels.
    """

    url: str
    api_key: str | None = field(repr=False)
    world_size: int
    backend: str
    device: str
    bucket_bytes: int
    timeout_s: float
    address: str | None = None
    connection: str = field(default_factory=lambda: uuid.uuid4().hex)


def push_target(config: SGLangConfig, url: str, api_key: str | None, info: Mapping[str, Any], where: str) -> PushTarget:
    """The target for one connection with a server.

    Args:
        info: answer of /server_info.
        where: names the server in errors.

    Raises:
        RolloutError: the server does not say how many ranks it has.
    """
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


def own_address(url: str) -> str:
    """The IP address at which the host of `url` reaches this process: 127.0.0.1 for loopback URLs, else our interface towards it.

    Raises:
        RolloutError: the host name is unknown or there is no route to it.
    """
    parts = urlsplit(url)
    host = parts.hostname or ""
    try:
        family, _, _, _, peer = socket.getaddrinfo(host, parts.port or 80, type=socket.SOCK_DGRAM)[0]
        if ipaddress.ip_address(peer[0]).is_loopback:
            return "127.0.0.1"
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(peer)  # sends nothing
            return str(probe.getsockname()[0])
    except OSError as error:
        raise RolloutError(f"{WHERE}: no way to {host!r} of {url}: {error}") from error


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
            reply = self._call("/begin_weight_update")
        except RefusedError as error:
            if error.status == 404:
                self._has_sessions = False
                return
            if "already open" not in error.body:
                raise
            # Left behind by somebody who died in the middle.
            self._checked("/end_weight_update")
            reply = self._call("/begin_weight_update")
        check_reply("/begin_weight_update", reply, self._where)

    def finish(self, label: str, *, flush_cache: bool) -> None:
        """After the last bucket of the last sender: the server samples from the new weights when this returns.

        Args:
            label, flush_cache: see :meth:`publish`.

        Raises:
            RolloutError: the server refused or died; its weights are new all the same, or partly.
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
        """Makes new weights official.

        Args:
            label: the server's name of its weights from now on.
            flush_cache: drop everything that was computed with the old weights. False where requests are in flight (paused in
                place): SGLang flushes an idle server only, and what they have computed so far must stay.

        Raises:
            RolloutError: the server refused or died; its weights are new all the same.
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
        """Closes the session after a failure if the server still can; the failure itself is what the caller hears of."""
        if not self._has_sessions:
            return
        try:
            self._checked("/end_weight_update", timeout_s=_ABANDON_TIMEOUT_S)
        except RolloutError as error:
            logger.info("the weight update session stays open: %s", error)

    def _checked(self, path: str, payload: dict[str, Any] | None = None, timeout_s: float | None = None) -> None:
        check_reply(path, self._call(path, payload, timeout_s), self._where)

    def _call(self, path: str, payload: dict[str, Any] | None = None, timeout_s: float | None = None) -> Any:
        return self._http.run(
            self._http.json("POST", path, payload or {}, where=self._where, retry=False, timeout_s=timeout_s)
        )


class WeightSender:
    """Sends one stream of tensors to all targets at once.

    Args:
        targets: see :meth:`retarget`.
        client: gives the client of a target where the caller has one that knows more of the server (why it died); it stays the
            caller's. By default the sender makes and closes its own.
    """

    def __init__(self, targets: Sequence[PushTarget] = (), *, client: Callable[[PushTarget], HttpClient] | None = None) -> None:
        self._client = client
        self._links: dict[PushTarget, _Link] = {}
        self.retarget(targets)

    @property
    def targets(self) -> list[PushTarget]:
        """Where the next push goes."""
        return list(self._links)

    def retarget(self, targets: Sequence[PushTarget]) -> None:
        """Sets where the next push goes; channels to targets that stay are kept.

        Raises:
            RolloutError: the targets receive on different kinds of device.
        """
        if len({target.device for target in targets}) > 1:
            raise RolloutError(f"{WHERE}: targets on {sorted({t.device for t in targets})}; one push packs for one kind of device")
        for target in [target for target in self._links if target not in targets]:
            self._links.pop(target).close()
        self._links = {target: self._links.get(target) or _Link(target, self._client) for target in targets}

    def push(self, weights: Iterable[tuple[str, torch.Tensor]]) -> int:
        """Sends tensors by Hugging Face name in buckets and returns their bytes (once, however many targets).

        A bucket is packed once and goes to all targets side by side; it is the most that is held beside the tensors that it is
        packed from. Opens channels when the first bucket is ready, none for an empty stream.

        Raises:
            RolloutError: a target refused, died or did not take a bucket in time. The next push() opens its channel anew.
        """
        links = list(self._links.values())
        if not links:
            raise RolloutError(f"{WHERE}: there is no server to push to")
        max_bytes = min(link.target.bucket_bytes for link in links)
        sent = 0
        for bucket in buckets(weights, max_bytes, torch.device(links[0].target.device)):
            self._send(bucket, links)
            sent += bucket.flat.numel()
            del bucket  # before the next one is packed
        return sent

    @staticmethod
    def _send(bucket: Bucket, links: list[_Link]) -> None:
        transfers = [channel.start(bucket) for channel in [link.open() for link in links]]
        try:
            # All of them, before a failure is raised: what is under way needs the bucket and would meet the next push.
            failures = [failure for failure in [transfer.wait() for transfer in transfers] if failure is not None]
        except BaseException:  # the user does not want to wait
            for transfer in transfers:
                transfer.abandon()
            raise
        if failures:
            raise RolloutError("; ".join(failures))

    def close(self) -> None:
        """Leaves all groups; safe to call twice and with dead servers."""
        self.retarget(())


class _Link:
    """A target, its client and its channel."""

    def __init__(self, target: PushTarget, client: Callable[[PushTarget], HttpClient] | None) -> None:
        self.target = target
        self._own: HttpClient | None = None
        if client is not None:
            self._http = client(target)
        else:
            self._http = self._own = HttpClient(
                target.url,
                api_key=target.api_key,
                concurrency=4,
                timeout_s=target.timeout_s,
                retries=0,
                backoff_s=0.5,
                why_dead=lambda: _why_dead(target.url),
            )
        self._where = f"{WHERE}: {target.url}"
        self._channel: WeightChannel | None = None

    def open(self) -> WeightChannel:
        """The channel, opened if there is none or the last one broke."""
        if self._channel is None or self._channel.broken:
            target = self.target
            self._channel = WeightChannel(
                self._post,
                world_size=target.world_size,
                backend=target.backend,
                timeout_s=target.timeout_s,
                address=target.address or own_address(target.url),
                where=self._where,
            )
        return self._channel

    def close(self) -> None:
        channel, self._channel = self._channel, None
        if channel is not None:
            channel.close()
        if self._own is not None:
            self._own.close()

    def _post(self, path: str, payload: dict[str, Any]) -> Future[Any]:
        request = self._http.json("POST", path, payload, where=self._where, retry=False, timeout_s=self.target.timeout_s)
        try:
            return self._http.submit(request)
        except BaseException:  # a lent client may have been closed
            request.close()
            raise


def _why_dead(url: str) -> str | None:
    """None while a server answers, else what happened instead."""
    try:
        with httpx.stream("GET", f"{url}/health", timeout=_HEALTH_TIMEOUT_S, trust_env=False) as answer:
            status = answer.status_code
    except httpx.HTTPError as error:
        return f"{url} does not answer ({type(error).__name__}: {error})"
    return None if status == 200 else f"{url}/health answers {status}"
