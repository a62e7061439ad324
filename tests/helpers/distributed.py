"""Running a function on N gloo processes: ``results = pool(n).run(fn, *args)``, one result per rank.

``fn`` must be importable (defined at the top level of a module), its arguments and results picklable. It runs with the host
enabled and a fresh gloo process group, without Megatron's parallel state: it calls ``host.init(...)`` with the sizes it wants,
and everything is destroyed after it. Workers are forked from one server that has imported Megatron, live from job to job and
are replaced after a failure; keep no state in them. An error or a time-out on any rank raises WorkerError with the tracebacks;
it never hangs the session.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import multiprocessing as mp
import os
import shutil
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

# Models that were trained under Megatron's DistributedDataParallel are never freed (hooks of autograd nodes), nor are their
# process groups, and each group has three threads. Workers that have gathered more than this are replaced; that is cheap.
MAX_THREADS = 100
# How long the other ranks may still run (most hang in a collective) after one has failed.
GRACE_SECONDS = 5.0


class WorkerError(AssertionError):
    """A function failed, died or timed out on at least one rank; the message has a section per rank."""


def _work(rank: int, world_size: int, pipe: Connection) -> None:
    import torch
    import torch.distributed as dist

    from megatron_pr2 import host

    # Its own process group, so that close() also ends what a function has started.
    os.setsid()
    torch.set_num_threads(1)
    host.enable()
    while True:
        try:
            job = pipe.recv()
        except (EOFError, ConnectionError):
            return
        if job is None:
            return
        store, fn, args, kwargs = job
        try:
            dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
            reply = (True, fn(*args, **kwargs))
        except BaseException:
            reply = (False, traceback.format_exc())
        if reply[0]:
            # After a failure the peers may be gone, and the parent replaces this process anyway.
            host.shutdown()
            # Models are reference cycles, and they hold their process groups.
            gc.collect()
        threads = len(os.listdir("/proc/self/task"))
        try:
            pipe.send((*reply, threads))
        except Exception:
            pipe.send((False, f"the result cannot be pickled:\n{traceback.format_exc()}", threads))


def _fork_server() -> Any:
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["tests.host.preload"])
    root = str(Path(__file__).resolve().parent.parent.parent)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH", ""))))
    os.environ["OMP_NUM_THREADS"] = "1"
    # The host refuses to run where CUDA works; on such a machine these tests hide it from their own workers only.
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    from multiprocessing import forkserver

    forkserver.ensure_running()
    if visible is None:
        del os.environ["CUDA_VISIBLE_DEVICES"]
    else:
        os.environ["CUDA_VISIBLE_DEVICES"] = visible
    return context


class Pool:
    """N persistent processes; see the module's docstring."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._workers: list[tuple[Any, Connection]] = []
        self._jobs = 0
        self._directory = tempfile.mkdtemp(prefix="pr2-pool-")

    def run(self, fn: Callable[..., Any], *args: Any, timeout: float = 300.0, **kwargs: Any) -> list[Any]:
        """Runs ``fn(*args, **kwargs)`` on every rank and returns the results in the order of the ranks.

        Raises:
            WorkerError: it failed on a rank, or did not end within ``timeout`` seconds.
        """
        if not self._workers:
            self._start()
        self._jobs += 1
        store = Path(self._directory) / f"store{self._jobs}"
        for _, pipe in self._workers:
            with contextlib.suppress(BrokenPipeError):  # a dead worker is reported below
                pipe.send((store, fn, args, kwargs))
        replies: dict[int, tuple[bool, Any, int]] = {}
        ranks = {pipe: rank for rank, (_, pipe) in enumerate(self._workers)}
        deadline = time.monotonic() + timeout
        while len(replies) < self.world_size and (left := deadline - time.monotonic()) > 0:
            for pipe in wait([pipe for pipe, rank in ranks.items() if rank not in replies], timeout=left):
                rank = ranks[pipe]  # type: ignore[index]
                try:
                    replies[rank] = pipe.recv()  # type: ignore[union-attr]
                except (EOFError, ConnectionError):
                    process = self._workers[rank][0]
                    process.join(1.0)
                    replies[rank] = (False, f"the process died with exit code {process.exitcode}", 0)
                if not replies[rank][0]:
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        if len(replies) == self.world_size and all(ok for ok, *_ in replies.values()):
            if max(threads for *_, threads in replies.values()) > MAX_THREADS:
                self.close()
            return [replies[rank][1] for rank in range(self.world_size)]
        self.close()
        sections = [
            f"--- rank {rank} of {self.world_size}: " + (replies[rank][1] if rank in replies else "did not finish")
            for rank in range(self.world_size)
            if rank not in replies or not replies[rank][0]
        ]
        raise WorkerError(f"{fn.__module__}.{fn.__qualname__} failed (limit {timeout:g} s)\n" + "\n".join(sections))

    def close(self) -> None:
        """Ends the workers; the next run() starts new ones."""
        for process, pipe in self._workers:
            pipe.close()
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            process.join()
        self._workers = []

    def _start(self) -> None:
        context = _fork_server()
        for rank in range(self.world_size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(rank, self.world_size, theirs))
            process.start()
            theirs.close()
            self._workers.append((process, ours))


_pools: dict[int, Pool] = {}


def pool(world_size: int) -> Pool:
    """The session's pool of this size; it starts with its first job."""
    if world_size not in _pools:
        _pools[world_size] = Pool(world_size)
    return _pools[world_size]


@atexit.register
def close_pools() -> None:
    """Ends all pools; pool() makes new ones."""
    for each in _pools.values():
        with contextlib.suppress(Exception):
            each.close()
        shutil.rmtree(each._directory, ignore_errors=True)
    _pools.clear()
