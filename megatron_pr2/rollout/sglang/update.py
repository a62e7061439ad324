"""How new weights get into the servers of an engine: through process groups or by disk.

    distributed   every sender broadcasts its buckets to the servers; no rank and no disk ever holds the whole model
    disk          every sender writes its part to a directory that all servers read; for servers that no process group reaches
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import torch

from megatron_pr2.rollout.sglang.config import SGLangConfig
from megatron_pr2.rollout.sglang.http import HttpClient
from megatron_pr2.rollout.sglang.push.disk import DiskPush, DiskSender, DiskTarget
from megatron_pr2.rollout.sglang.push.session import PushTarget, WeightSender
from megatron_pr2.rollout.sglang.replica import SGLangReplica


class WeightUpdate(Protocol):
    """One way; begin, then push, then finish or abandon."""

    def begin(self, replicas: Sequence[SGLangReplica]) -> list[PushTarget] | DiskTarget:
        """Opens an update; returns where tensors go."""

    def push(self, weights: Iterable[tuple[str, torch.Tensor]]) -> int:
        """Sends this process's tensors; returns their bytes."""

    def finish(self, replicas: Sequence[SGLangReplica], label: str, *, flush_cache: bool) -> None:
        """The servers sample from the new weights when this returns; raises RolloutError otherwise."""

    def abandon(self, replicas: Sequence[SGLangReplica]) -> None:
        """Closes a failed update as far as the servers still can."""

    def close(self) -> None:
        """Lets go of what is kept between updates."""


class DistributedUpdate:
    """Buckets by broadcast."""

    def __init__(self, client: Callable[[PushTarget], HttpClient]) -> None:
        """Args: `client` gives the client of a target."""
        self._sender = WeightSender(client=client)

    def begin(self, replicas: Sequence[SGLangReplica]) -> list[PushTarget]:
        """Opens the sessions."""
        for replica in replicas:
            replica.session.begin()
        targets = [replica.target for replica in replicas]
        self._sender.retarget(targets)
        return targets

    def push(self, weights: Iterable[tuple[str, torch.Tensor]]) -> int:
        """Broadcasts this process's tensors."""
        return self._sender.push(weights)

    def finish(self, replicas: Sequence[SGLangReplica], label: str, *, flush_cache: bool) -> None:
        """Closes the sessions, drops caches and stamps the version."""
        for replica in replicas:
            replica.session.finish(label, flush_cache=flush_cache)

    def abandon(self, replicas: Sequence[SGLangReplica]) -> None:
        """Closes the sessions as far as the servers still can."""
        for replica in replicas:
            replica.session.abandon()

    def close(self) -> None:
        """Leaves the process groups."""
        self._sender.close()


class DiskUpdate:
    """Safetensors in a directory that every server reads."""

    def __init__(self, config: SGLangConfig) -> None:
        assert config.model_path is not None
        parent = config.push_directory or tempfile.gettempdir()
        self._push = DiskPush(config.model_path, parent, shard_bytes=config.weight_bucket_bytes)
        self._target: DiskTarget | None = None

    def begin(self, replicas: Sequence[SGLangReplica]) -> DiskTarget:
        """Makes the directory."""
        self._target = self._push.begin()
        return self._target

    def push(self, weights: Iterable[tuple[str, torch.Tensor]]) -> int:
        """Writes this process's tensors."""
        assert self._target is not None
        return DiskSender(self._target, 0).push(weights)

    def finish(self, replicas: Sequence[SGLangReplica], label: str, *, flush_cache: bool) -> None:
        """Has every server load the directory, and removes it."""
        self._push.finish([replica.session for replica in replicas], label, flush_cache=flush_cache)

    def abandon(self, replicas: Sequence[SGLangReplica]) -> None:
        """Removes the directory."""
        self._push.abandon()

    def close(self) -> None:
        """Removes what a push left behind."""
        self._push.abandon()


def make_update(config: SGLangConfig, replicas: Sequence[SGLangReplica]) -> WeightUpdate:
    """The way that `config.push` names."""
    if config.push == "disk":
        return DiskUpdate(config)
    return DistributedUpdate(lambda target: next(replica.http for replica in replicas if replica.url == target.url))
