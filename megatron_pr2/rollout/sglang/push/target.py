"""PushTarget: what a sender has to know of a server; the controlling process hands it to the others."""

from __future__ import annotations

import ipaddress
import socket
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from megatron_pr2.errors import RolloutError
from megatron_pr2.rollout.sglang.config import SGLangConfig
from megatron_pr2.rollout.sglang.info import weight_group_size
from megatron_pr2.rollout.sglang.push.session import WHERE


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
        connection: differs from one connection with the server to the next: senders then open new channels.
    """

    url: str
    api_key: str | None = field(repr=False)
    world_size: int
    backend: str
    device: str
    bucket_bytes: int
    timeout_s: float
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
