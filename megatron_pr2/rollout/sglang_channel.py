"""WeightChannel: moves tensors from this process into SGLang's ranks through a process group of their own.

SGLang offers four ways in. `update_weights_from_disk` writes every byte twice; `_from_tensor` passes pickled handles of shared
memory and kills the server when they come from an unrelated process on CPU; `_from_ipc` needs CUDA. `_from_distributed` needs
nothing but a network, is bounded in memory by its bucket, works the same with gloo on CPU and NCCL on GPU, and no pickle is
involved: so that is the one.

The group has 1 + tp_size ranks, this process is rank 0. This end is built from torch's process group classes directly, on the
stores that SGLang's end expects (`init_custom_process_group` in its utils), because torch's helper for it would register the
group with this process's default group and, where that is bound to a GPU, split it. Everything listens on 127.0.0.1 only.
"""

from __future__ import annotations

import logging
import socket
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from megatron_pr2.errors import RolloutError

logger = logging.getLogger(__name__)

_JOIN = "/init_weights_update_group"
_UPDATE = "/update_weights_from_distributed"
_POLL_S = 0.001
_CONNECT_TIMEOUT_S = 60.0
_CAUSE_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Bucket:
    """Tensors that travel together.

    Attributes:
        names, dtypes, shapes: of the tensors, in the order in which they lie in `flat`; dtypes as torch names ("bfloat16").
        flat: [bytes] uint8.
        last: no bucket follows.
    """

    names: list[str]
    dtypes: list[str]
    shapes: list[list[int]]
    flat: torch.Tensor
    last: bool


def buckets(weights: Iterable[tuple[str, torch.Tensor]], max_bytes: int, device: torch.device) -> Iterator[Bucket]:
    """Packs tensors, as they come, into buckets of at most `max_bytes`; a larger tensor is a bucket of its own.

    Wider dtypes come first within a bucket, which keeps every tensor aligned. One bucket and the tensors that it is made of are
    held at a time, never the model.
    """
    pending: list[tuple[str, torch.Tensor]] = []
    size = 0
    for name, tensor in weights:
        nbytes = tensor.numel() * tensor.element_size()
        if pending and size + nbytes > max_bytes:
            yield _pack(pending, device, last=False)
            pending, size = [], 0
        pending.append((name, tensor.detach()))
        size += nbytes
    if pending:
        yield _pack(pending, device, last=True)


def _pack(tensors: list[tuple[str, torch.Tensor]], device: torch.device, last: bool) -> Bucket:
    tensors = sorted(tensors, key=lambda item: -item[1].element_size())
    flat = torch.empty(sum(t.numel() * t.element_size() for _, t in tensors), dtype=torch.uint8, device=device)
    offset = 0
    for _, tensor in tensors:
        nbytes = tensor.numel() * tensor.element_size()
        flat[offset : offset + nbytes].view(tensor.dtype).copy_(tensor.reshape(-1))
        offset += nbytes
    return Bucket(
        names=[name for name, _ in tensors],
        dtypes=[str(t.dtype).removeprefix("torch.") for _, t in tensors],
        shapes=[list(t.shape) for _, t in tensors],
        flat=flat,
        last=last,
    )


class WeightChannel:
    """One connected weight update group.

    Args:
        post: sends one POST to the server without waiting: (path, payload) to a future of the parsed reply.
        world_size: 1 + number of SGLang ranks.
        backend: "gloo" or "nccl".
        timeout_s: for one bucket; also for connecting, if it is less than a minute.
    """

    def __init__(
        self,
        post: Callable[[str, dict[str, Any]], Future[Any]],
        *,
        world_size: int,
        backend: str,
        timeout_s: float,
    ) -> None:
        self._post = post
        self._timeout_s = timeout_s
        self.broken = False
        if backend == "nccl" and not dist.is_nccl_available():
            raise RolloutError("weight update: this torch has no NCCL; set weight_backend='gloo'")
        # A new name each time: a server that did not notice the end of the previous group must not confuse the two.
        self._name = f"megatron_pr2_{uuid.uuid4().hex[:12]}"
        connect_s = min(timeout_s, _CONNECT_TIMEOUT_S)
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
            # The store takes the descriptor over; without one it would listen on every interface.
            self._store = dist.TCPStore(
                "127.0.0.1",
                port,
                is_master=True,
                wait_for_workers=False,
                timeout=timedelta(seconds=connect_s),
                master_listen_fd=listener.detach(),
            )
        empty = self._store.num_keys()
        joined = post(
            _JOIN,
            {
                "master_address": "127.0.0.1",
                "master_port": port,
                "rank_offset": 1,
                "world_size": world_size,
                "group_name": self._name,
                "backend": backend,
            },
        )
        try:
            self._await_peer(joined, empty, connect_s)
            self._group = self._connect(backend, world_size, timedelta(seconds=timeout_s))
            check_reply(_JOIN, joined.result(connect_s))
        except FutureTimeoutError as error:
            self.broken = True
            raise RolloutError(f"weight update: no reply to {_JOIN} within {connect_s:g} s") from error
        except RuntimeError as error:  # RolloutError is one
            self.broken = True
            if isinstance(error, RolloutError):
                raise
            raise RolloutError(f"weight update: no {backend} connection to the server: {error}") from error

    def _await_peer(self, joined: Future[Any], empty: int, connect_s: float) -> None:
        """Returns when the server has written to the store; connecting without it would block, whatever its reply says."""
        deadline = time.monotonic() + connect_s
        while self._store.num_keys() == empty:
            if joined.done():
                check_reply(_JOIN, joined.result())
            if time.monotonic() > deadline:
                raise RolloutError(f"weight update: the server did not connect within {connect_s:g} s")
            time.sleep(_POLL_S)

    def _connect(self, backend: str, world_size: int, timeout: timedelta) -> Any:
        # SGLang prefixes the name, torch's helper prefixes it again and then adds the device: three nested stores.
        store = dist.PrefixStore(f"{self._name}/", dist.PrefixStore(self._name, self._store))
        if backend == "nccl":
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = timeout
            return dist.ProcessGroupNCCL(dist.PrefixStore("cuda/", store), 0, world_size, options)
        # torch makes one gloo group for all device types and names its store after the first of them.
        first_device = next(iter(dist.BackendConfig(dist.Backend(backend)).get_device_backend_map()))
        gloo = dist.ProcessGroupGloo._Options()
        gloo._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
        gloo._timeout = timeout
        return dist.ProcessGroupGloo(dist.PrefixStore(f"{first_device}/", store), 0, world_size, gloo)

    def send(self, bucket: Bucket, *, weight_version: str, flush_cache: bool) -> None:
        """Sends one bucket and waits until the server has loaded it.

        Args:
            bucket: what to send.
            weight_version: the server's label of its weights from the last bucket on; ignored before.
            flush_cache: drop everything that was computed with the old weights.

        Raises:
            RolloutError: the server refused, died or did not take the bucket in time; the channel is broken then.
        """
        payload: dict[str, Any] = {
            "names": bucket.names,
            "dtypes": bucket.dtypes,
            "shapes": bucket.shapes,
            "group_name": self._name,
            "load_format": "flattened_bucket",
            "flush_cache": flush_cache,
        }
        if bucket.last:
            payload["weight_version"] = weight_version
        reply = self._post(_UPDATE, payload)
        try:
            options = dist.BroadcastOptions()
            options.rootRank = options.rootTensor = 0
            self._wait(self._group.broadcast([bucket.flat], options), reply)
        except (RolloutError, RuntimeError) as error:
            self.broken = True
            raise RolloutError(
                f"weight update: the bucket from {bucket.names[0]} on was not taken: {_cause(error, reply)}"
            ) from error
        try:
            check_reply(_UPDATE, reply.result(self._timeout_s))
        except FutureTimeoutError as error:
            self.broken = True
            raise RolloutError(f"weight update: no reply within {self._timeout_s:g} s of a bucket that was taken") from error

    def _wait(self, work: Any, reply: Future[Any]) -> None:
        """Waits for the broadcast; a reply that comes before its end means that the server does not take part."""
        deadline = time.monotonic() + self._timeout_s
        while not work.is_completed():
            if reply.done() and not work.is_completed():
                check_reply(_UPDATE, reply.result())
            if time.monotonic() > deadline:
                raise RolloutError(f"not within {self._timeout_s:g} s")
            time.sleep(_POLL_S)
        work.wait()

    def close(self) -> None:
        """Leaves the group; the server is asked to leave too unless the channel is broken."""
        if self.broken:
            return
        self.broken = True
        try:
            self._post("/destroy_weights_update_group", {"group_name": self._name}).result(10.0)
        except (RolloutError, FutureTimeoutError) as error:
            logger.info("the server did not leave the weight update group: %s", error)


def _cause(error: Exception, reply: Future[Any]) -> Exception:
    """What the server's reply says, where there is one: a broken connection alone does not tell why it broke."""
    try:
        check_reply(_UPDATE, reply.result(_CAUSE_TIMEOUT_S))
    except (RolloutError, FutureTimeoutError) as told:
        return told if isinstance(told, RolloutError) else error
    return error


def check_reply(path: str, reply: Any) -> None:
    """Raises RolloutError unless the server says that it succeeded."""
    if not isinstance(reply, dict) or reply.get("success") is not True:
        message = reply.get("message", reply) if isinstance(reply, dict) else reply
        raise RolloutError(f"weight update: {path} was refused: {str(message)[:500]}")
