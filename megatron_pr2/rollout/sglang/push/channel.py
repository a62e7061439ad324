"""WeightChannel: moves tensors from this process into SGLang's ranks through a process group of their own.

SGLang offers four ways in. `update_weights_from_disk` writes every byte twice; `_from_tensor` passes pickled handles of shared
memory and kills the server when they come from an unrelated process on CPU; `_from_ipc` needs CUDA. `_from_distributed` needs
nothing but a network, is bounded in memory by its bucket, works the same with gloo on CPU and NCCL on GPU, and no pickle is
involved: so that is the one.

The group has 1 + tp_size ranks, this process is rank 0. This end is built from torch's process group classes directly, on the
stores that SGLang's end expects (`init_custom_process_group` in its utils), because torch's helper for it would register the
group with this process's default group and, where that is bound to a GPU, split it. It listens on one address only.

Several processes may each have a channel to one server: SGLang keeps its groups by name and takes one bucket at a time, in the
order in which the requests arrive, on all its ranks alike; the others wait in their broadcast.
"""

from __future__ import annotations

import logging
import socket
import threading
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

WHERE = "weight update"
_JOIN = "/init_weights_update_group"
_UPDATE = "/update_weights_from_distributed"
_POLL_S = 0.001
# A server lets one sender join at a time, and not in the middle of a bucket of another one.
_CONNECT_TIMEOUT_S = 300.0
_CAUSE_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Bucket:
    """Tensors that travel together.

    Attributes:
        names, dtypes, shapes: of the tensors, in the order in which they lie in `flat`; dtypes as torch names ("bfloat16").
        flat: [bytes] uint8.
    """

    names: list[str]
    dtypes: list[str]
    shapes: list[list[int]]
    flat: torch.Tensor


def buckets(weights: Iterable[tuple[str, torch.Tensor]], max_bytes: int, device: torch.device) -> Iterator[Bucket]:
    """Packs tensors, as they come, into buckets of at most `max_bytes`; a larger tensor is a bucket of its own.

    Wider dtypes come first within a bucket, which keeps every tensor aligned. One bucket, or the tensors that it is made of, are
    held at a time (both while it is packed), never the model.
    """
    pending: list[tuple[str, torch.Tensor]] = []
    size = 0
    for name, tensor in weights:
        nbytes = tensor.numel() * tensor.element_size()
        if pending and size + nbytes > max_bytes:
            yield _pack(pending, device)
            size = 0
        pending.append((name, tensor.detach()))
        size += nbytes
        del tensor
    if pending:
        yield _pack(pending, device)


def _pack(tensors: list[tuple[str, torch.Tensor]], device: torch.device) -> Bucket:
    """Packs tensors and empties the list, so that they need not outlive this."""
    tensors.sort(key=lambda item: -item[1].element_size())
    flat = torch.empty(sum(t.numel() * t.element_size() for _, t in tensors), dtype=torch.uint8, device=device)
    offset = 0
    for _, tensor in tensors:
        nbytes = tensor.numel() * tensor.element_size()
        flat[offset : offset + nbytes].view(tensor.dtype).copy_(tensor.reshape(-1))
        offset += nbytes
    bucket = Bucket(
        names=[name for name, _ in tensors],
        dtypes=[str(t.dtype).removeprefix("torch.") for _, t in tensors],
        shapes=[list(t.shape) for _, t in tensors],
        flat=flat,
    )
    tensors.clear()
    return bucket


class WeightChannel:
    """One connected weight update group.

    Args:
        post: sends one POST to the server without waiting: (path, payload) to a future of the parsed reply.
        world_size: 1 + number of SGLang ranks.
        backend: "gloo" or "nccl".
        timeout_s: for one bucket; also for connecting, if it is less than five minutes.
        address: of this process, as the server reaches it.
        where: names the update in errors.

    Attributes:
        broken: a transfer failed; the group is closed and a new channel is needed.
    """

    def __init__(
        self,
        post: Callable[[str, dict[str, Any]], Future[Any]],
        *,
        world_size: int,
        backend: str,
        timeout_s: float,
        address: str = "127.0.0.1",
        where: str = WHERE,
    ) -> None:
        self._post = post
        self._timeout_s = timeout_s
        self._where = where
        self._backend = backend
        self.broken = False
        self._group: Any = None
        self._store: Any = None
        if backend == "nccl" and not dist.is_nccl_available():
            raise RolloutError(f"{where}: this torch has no NCCL; set weight_backend='gloo'")
        # A new name each time: a server that did not notice the end of the previous group must not confuse the two.
        self._name = f"megatron_pr2_{uuid.uuid4().hex[:12]}"
        connect_s = min(timeout_s, _CONNECT_TIMEOUT_S)
        try:
            port, empty = self._listen(address, connect_s)
            joined = post(
                _JOIN,
                {
                    "master_address": address,
                    "master_port": port,
                    "rank_offset": 1,
                    "world_size": world_size,
                    "group_name": self._name,
                    "backend": backend,
                },
            )
            self._await_peer(joined, empty, connect_s)
            self._group = self._connect(backend, world_size, timedelta(seconds=timeout_s), address)
            check_reply(_JOIN, joined.result(connect_s), where)
        except FutureTimeoutError as error:
            self._drop()
            raise RolloutError(f"{where}: no reply to {_JOIN} within {connect_s:g} s") from error
        except (RuntimeError, OSError) as error:  # RolloutError is a RuntimeError
            self._drop()
            if isinstance(error, RolloutError):
                raise
            raise RolloutError(f"{where}: no {backend} connection between {address} and the server: {error}") from error

    def _listen(self, address: str, connect_s: float) -> tuple[int, int]:
        """Opens the store that the server comes to; returns its port and how many keys it holds while nobody has come."""
        with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as listener:
            listener.bind((address, 0))
            port = listener.getsockname()[1]
            # The store takes the descriptor over; without one it would listen on every interface.
            store = dist.TCPStore(
                address,
                port,
                is_master=True,
                wait_for_workers=False,
                timeout=timedelta(seconds=connect_s),
                master_listen_fd=listener.detach(),
            )
        self._store = store
        return port, store.num_keys()

    def _await_peer(self, joined: Future[Any], empty: int, connect_s: float) -> None:
        """Returns when the server has written to the store; connecting without it would block, whatever its reply says."""
        deadline = time.monotonic() + connect_s
        while self._store.num_keys() == empty:
            if joined.done():
                check_reply(_JOIN, joined.result(), self._where)
            if time.monotonic() > deadline:
                raise RolloutError(f"{self._where}: the server did not connect within {connect_s:g} s")
            time.sleep(_POLL_S)

    def _connect(self, backend: str, world_size: int, timeout: timedelta, address: str) -> Any:
        # SGLang prefixes the name, torch's helper prefixes it again and then adds the device: three nested stores.
        store = dist.PrefixStore(f"{self._name}/", dist.PrefixStore(self._name, self._store))
        if backend == "nccl":
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = timeout
            return dist.ProcessGroupNCCL(dist.PrefixStore("cuda/", store), 0, world_size, options)
        # torch makes one gloo group for all device types and names its store after the first of them.
        first_device = next(iter(dist.BackendConfig(dist.Backend(backend)).get_device_backend_map()))
        gloo = dist.ProcessGroupGloo._Options()
        gloo._devices = [dist.ProcessGroupGloo.create_device(hostname=address)]
        gloo._timeout = timeout
        return dist.ProcessGroupGloo(dist.PrefixStore(f"{first_device}/", store), 0, world_size, gloo)

    def start(self, bucket: Bucket) -> Transfer:
        """Starts sending one bucket; another may not be started before the transfer's wait() has returned."""
        payload: dict[str, Any] = {
            "names": bucket.names,
            "dtypes": bucket.dtypes,
            "shapes": bucket.shapes,
            "group_name": self._name,
            "load_format": "flattened_bucket",
            # Refused while requests are in flight (0.5.19 even dies of it): PushSession.finish() does it where it is wanted.
            "flush_cache": False,
        }
        reply = self._post(_UPDATE, payload)
        options = dist.BroadcastOptions()
        options.rootRank = options.rootTensor = 0
        try:
            work = self._group.broadcast([bucket.flat], options)
        except RuntimeError as error:
            self._drop()
            return Transfer(self, bucket.names[0], None, reply, self._refusal(bucket.names[0], error, reply))
        return Transfer(self, bucket.names[0], work, reply)

    def _finish(self, transfer: Transfer) -> str | None:
        """Waits for a transfer; returns why it failed.

        A message and not an exception: the frames of an exception would keep the group's connections open.
        """
        work, transfer.work = transfer.work, None
        if transfer.failure is not None:
            return transfer.failure
        try:
            self._wait(work, transfer.reply)
            check_reply(_UPDATE, transfer.reply.result(self._timeout_s), self._where)
        except FutureTimeoutError:
            self._drop()
            return f"{self._where}: no reply within {self._timeout_s:g} s of a bucket that was taken"
        except (RolloutError, RuntimeError) as error:
            # Before the reply is waited for: a server that is in the broadcast notices by the closed connection.
            self._drop(work)
            return self._refusal(transfer.first, error, transfer.reply)
        except BaseException:
            self._drop(work)
            raise
        return None

    def _wait(self, work: Any, reply: Future[Any]) -> None:
        """Waits for the broadcast; a reply that comes before its end means that the server does not take part."""
        deadline = time.monotonic() + self._timeout_s
        while not work.is_completed():
            if reply.done() and not work.is_completed():
                check_reply(_UPDATE, reply.result(), self._where)
            if time.monotonic() > deadline:
                raise RolloutError(f"not within {self._timeout_s:g} s")
            time.sleep(_POLL_S)
        work.wait()

    def _refusal(self, first: str, error: Exception, reply: Future[Any]) -> str:
        return f"{self._where}: the bucket from {first} on was not taken: {_cause(error, reply, self._where)}"

    def close(self) -> None:
        """Leaves the group; the server is asked to leave too unless the channel is broken."""
        if self.broken:
            return
        self._leave(wait_s=10.0)
        self._drop()

    def _leave(self, wait_s: float | None = None) -> None:
        """Asks the server to leave as well; it may be gone, and so may the client."""
        try:
            reply = self._post("/destroy_weights_update_group", {"group_name": self._name})
            if wait_s is not None:
                reply.result(wait_s)
        except Exception as error:  # a closed client raises what it likes
            logger.info("the server did not leave the weight update group: %s: %s", type(error).__name__, error)

    def _drop(self, work: Any = None) -> None:
        """Closes this end's connections, so that a server that waits for us in a broadcast gives up at once."""
        self.broken = True
        held = [work, self._group, self._store]
        self._group = self._store = None
        if held[1] is not None and self._backend == "nccl":
            held[1].abort()
        if work is not None and not work.is_completed():
            # gloo's destructor waits for what is under way, up to the timeout, unless the server closes its end.
            self._leave()
            threading.Thread(target=held.clear, name="weight-channel-end", daemon=True).start()


class Transfer:
    """One bucket on its way through one channel."""

    def __init__(
        self, channel: WeightChannel, first: str, work: Any, reply: Future[Any], failure: str | None = None
    ) -> None:
        self._channel = channel
        self.first = first
        self.work = work
        self.reply = reply
        self.failure = failure

    def abandon(self) -> None:
        """Gives it up, and the channel with it."""
        self._channel._drop(self.work)

    def wait(self) -> str | None:
        """Returns when the server has loaded the bucket, or why it has not: it refused, died or did not take it in time.

        The channel is broken after a failure.
        """
        return self._channel._finish(self)


def _cause(error: Exception, reply: Future[Any], where: str) -> Exception:
    """What the server's reply says, where there is one: a broken connection alone does not tell why it broke."""
    try:
        check_reply(_UPDATE, reply.result(_CAUSE_TIMEOUT_S), where)
    except (RolloutError, FutureTimeoutError) as told:
        return told if isinstance(told, RolloutError) else error
    return error


def check_reply(path: str, reply: Any, where: str = WHERE) -> None:
    """Raises RolloutError unless the server says that it succeeded."""
    if not isinstance(reply, dict) or reply.get("success") is not True:
        message = reply.get("message", reply) if isinstance(reply, dict) else reply
        raise RolloutError(f"{where}: {path} was refused: {str(message)[:500]}")
