"""WeightChannel: moves tensors from this process into the ranks of one SGLang server, through a process group of their own.

Of SGLang's ways in, `update_weights_from_distributed` needs nothing but a network, is bounded in memory by its bucket, works the
same with gloo and NCCL, and involves no pickle. The group has 1 + tp_size ranks, this process is rank 0. This end is built from
torch's process group classes directly, on the stores that SGLang's end expects (`init_custom_process_group` in its utils), because
torch's helper for it would register the group with this process's default group and, where that is bound to a GPU, split it.

Several processes may each have a channel to one server: SGLang keeps its groups by name and takes one bucket at a time, in the
order in which the requests arrive, on all its ranks alike; the others wait in their broadcast.
"""

from __future__ import annotations

import ipaddress
import logging
import socket
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import torch.distributed as dist

from megatron_pr2.errors import RolloutError
from megatron_pr2.rollout.sglang.http import HttpClient, ask_health
from megatron_pr2.rollout.sglang.push.session import WHERE, PushTarget, check_reply

if TYPE_CHECKING:
    from megatron_pr2.rollout.sglang.push.distributed import Bucket

logger = logging.getLogger(__name__)

_JOIN = "/init_weights_update_group"
_UPDATE = "/update_weights_from_distributed"
_POLL_S = 0.001
# A server lets one sender join at a time, and not in the middle of a bucket of another one.
_CONNECT_TIMEOUT_S = 300.0
_CAUSE_TIMEOUT_S = 10.0
_HEALTH_TIMEOUT_S = 5.0


def own_address(url: str) -> str:
    """The IP address at which the host of `url` reaches this process: 127.0.0.1 for loopback, else our interface towards it."""
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


class WeightChannel:
    """One sender's way to one server: a client (the caller's, else its own), and a group that is given up after a failure."""

    def __init__(self, target: PushTarget, client: HttpClient | None = None) -> None:
        self.target = target
        self._where = f"{WHERE}: {target.url}"
        self._own_client = client is None
        self._http = client or HttpClient(
            target.url,
            api_key=target.api_key,
            timeout_s=target.timeout_s,
            why_dead=lambda: ask_health(target.url, _HEALTH_TIMEOUT_S)[1] or None,
        )
        self._name = ""
        self._group: Any = None
        self._store: Any = None
        # Of the bucket on its way: its first tensor, the broadcast, the server's reply, and why it failed before it began.
        self._first = ""
        self._work: Any = None
        self._reply: Future[Any]
        self._failure: str | None = None

    def open(self) -> None:
        """Forms a group with the server unless there is one; raises RolloutError if it refuses, dies or is late."""
        if self._group is not None:
            return
        target = self.target
        if target.backend == "nccl" and not dist.is_nccl_available():
            raise RolloutError(f"{self._where}: this torch has no NCCL; set weight_backend='gloo'")
        # A new name each time: a server that did not notice the end of the previous group must not confuse the two.
        self._name = f"megatron_pr2_{uuid.uuid4().hex[:12]}"
        address = own_address(target.url)
        connect_s = min(target.timeout_s, _CONNECT_TIMEOUT_S)
        try:
            port, empty = self._listen(address, connect_s)
            payload = {"master_address": address, "master_port": port, "rank_offset": 1, "world_size": target.world_size}
            joined = self._post(_JOIN, payload | {"group_name": self._name, "backend": target.backend})
            # Connecting before the server has written to the store would block, whatever its reply says.
            late = f"{self._where}: the server did not connect within {connect_s:g} s"
            self._await(lambda: self._store.num_keys() != empty, _JOIN, joined, connect_s, late)
            self._group = self._connect(address)
            check_reply(_JOIN, joined.result(connect_s), self._where)
        except BaseException as error:
            self.abandon()
            if isinstance(error, FutureTimeoutError):
                raise RolloutError(f"{self._where}: no reply to {_JOIN} within {connect_s:g} s") from error
            if isinstance(error, RolloutError) or not isinstance(error, RuntimeError | OSError):
                raise
            raise RolloutError(
                f"{self._where}: no {target.backend} connection between {address} and the server: {error}"
            ) from error

    def _listen(self, address: str, connect_s: float) -> tuple[int, int]:
        """Opens the store that the server connects to; returns its port and the number of its keys before that."""
        with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as listener:
            listener.bind((address, 0))
            port = listener.getsockname()[1]
            # The store takes the descriptor over; without one it would listen on every interface.
            options: dict[str, Any] = {"timeout": timedelta(seconds=connect_s), "master_listen_fd": listener.detach()}
            self._store = dist.TCPStore(address, port, is_master=True, wait_for_workers=False, **options)
        return port, self._store.num_keys()

    def _await(self, happened: Callable[[], bool], path: str, reply: Future[Any], limit_s: float, late: str) -> None:
        """Returns when something happened that the server has to take part in; a refusal that comes before is raised."""
        deadline = time.monotonic() + limit_s
        while not happened():
            if reply.done() and not happened():
                check_reply(path, reply.result(), self._where)
            if time.monotonic() > deadline:
                raise RolloutError(late)
            time.sleep(_POLL_S)

    def _connect(self, address: str) -> Any:
        world_size, timeout = self.target.world_size, timedelta(seconds=self.target.timeout_s)
        # SGLang prefixes the name, torch's helper prefixes it again and then adds the device: three nested stores.
        store = dist.PrefixStore(f"{self._name}/", dist.PrefixStore(self._name, self._store))
        if self.target.backend == "nccl":
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = timeout
            return dist.ProcessGroupNCCL(dist.PrefixStore("cuda/", store), 0, world_size, options)
        # torch makes one gloo group for all device types and names its store after the first of them.
        first_device = next(iter(dist.BackendConfig(dist.Backend("gloo")).get_device_backend_map()))
        gloo = dist.ProcessGroupGloo._Options()
        gloo._devices = [dist.ProcessGroupGloo.create_device(hostname=address)]
        gloo._timeout = timeout
        return dist.ProcessGroupGloo(dist.PrefixStore(f"{first_device}/", store), 0, world_size, gloo)

    def start(self, bucket: Bucket) -> None:
        """Starts sending one bucket; wait() or abandon() comes before the next one."""
        self._first, self._failure = bucket.names[0], None
        payload: dict[str, Any] = {
            "names": bucket.names,
            "dtypes": bucket.dtypes,
            "shapes": bucket.shapes,
            "group_name": self._name,
            "load_format": "flattened_bucket",
            # Refused while requests are in flight (0.5.19 even dies of it): PushSession.finish() does it where it is wanted.
            "flush_cache": False,
        }
        self._reply = self._post(_UPDATE, payload)
        options = dist.BroadcastOptions()
        options.rootRank = options.rootTensor = 0
        try:
            self._work = self._group.broadcast([bucket.flat], options)
        except RuntimeError as error:
            self.abandon()
            self._failure = self._refusal(error)

    def wait(self) -> str | None:
        """Returns when the server has loaded the bucket, or why it has not: it refused, died or did not take it in time.

        A message and not an exception: the frames of an exception would keep the group's connections open.
        """
        if self._failure is not None:
            return self._failure
        try:
            work, limit_s = self._work, self.target.timeout_s
            if work is None:  # by another thread
                raise RolloutError("the channel was closed")
            self._await(work.is_completed, _UPDATE, self._reply, limit_s, f"not within {limit_s:g} s")
            work.wait()
            check_reply(_UPDATE, self._reply.result(limit_s), self._where)
        except FutureTimeoutError:
            self.abandon()
            return f"{self._where}: no reply within {limit_s:g} s of a bucket that was taken"
        except (RolloutError, RuntimeError) as error:
            # Before the reply is waited for: a server that is in the broadcast notices by the closed connection.
            self.abandon()
            return self._refusal(error)
        except BaseException:
            self.abandon()
            raise
        self._work = None
        return None

    def _refusal(self, error: Exception) -> str:
        """Says what the server's reply says, where there is one: a broken connection alone does not tell why it broke."""
        cause = str(error)
        try:
            check_reply(_UPDATE, self._reply.result(_CAUSE_TIMEOUT_S), self._where)
        except RolloutError as told:
            cause = str(told)
        except FutureTimeoutError:
            pass
        return f"{self._where}: the bucket from {self._first} on was not taken: {cause}"

    def close(self) -> None:
        """Leaves the group and asks the server to leave it, too; safe to call twice and with a dead server."""
        if self._group is not None:
            self._leave(wait_s=10.0)
            self.abandon()
        if self._own_client:
            self._http.close()

    def _post(self, path: str, payload: dict[str, Any]) -> Future[Any]:
        request = self._http.json("POST", path, payload, where=self._where, retry=False, timeout_s=self.target.timeout_s)
        try:
            return self._http.submit(request)
        except BaseException:  # a client of the caller's may have been closed
            request.close()
            raise

    def _leave(self, wait_s: float | None = None) -> None:
        """Asks the server to leave as well; it may be gone, and so may the client."""
        try:
            reply = self._post("/destroy_weights_update_group", {"group_name": self._name})
            if wait_s is not None:
                reply.result(wait_s)
        except Exception as error:  # a closed client raises what it likes
            logger.info("the server did not leave the weight update group: %s: %s", type(error).__name__, error)

    def abandon(self) -> None:
        """Closes this end's connections, so that a server that waits in a broadcast gives up; the next open() forms a new group."""
        held = [self._work, self._group, self._store]
        self._work = self._group = self._store = None
        if held[1] is not None and self.target.backend == "nccl":
            held[1].abort()
        if held[0] is not None and not held[0].is_completed():
            # gloo's destructor waits for what is under way, up to the timeout, unless the server closes its end.
            self._leave()
            threading.Thread(target=held.clear, name="weight-channel-end", daemon=True).start()
