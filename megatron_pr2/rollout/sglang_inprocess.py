"""InProcessServer: SGLang's engine as part of this process, for weights that go in by tensor instead of through a network.

SGLang's tokenizer side lives here, its schedulers are children. Requests go through SGLang's own HTTP application without a
network (ASGI), so that whatever talks to a server over HTTP talks to this one with :meth:`InProcessServer.client`, word for word.

`sglang.Engine` takes the process for its own: it replaces log handlers, environment variables, the way in which multiprocessing
starts children, and the SIGQUIT handler, has its children import the user's main module, kills every child of this process when it
is shut down, and the process itself when a scheduler dies. All of that is undone or kept from happening here.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import importlib
import logging
import multiprocessing as mp
import multiprocessing.connection
import os
import signal
import sys
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping
from types import FrameType
from typing import Any, TypeVar

import httpx
import torch

from megatron_pr2.errors import RolloutError
from megatron_pr2.rollout.sglang_channel import WHERE, Bucket, buckets, check_reply
from megatron_pr2.rollout.sglang_config import SGLangConfig, server_environment
from megatron_pr2.rollout.sglang_http import EngineDiedError, HttpClient, LoopThread
from megatron_pr2.rollout.sglang_refusals import refusals
from megatron_pr2.rollout.sglang_server import LAUNCHER, SGLangServer, check_weight_files

logger = logging.getLogger(__name__)

T = TypeVar("T")
_URL = "http://in-process"
_SHARED_MEMORY = "/dev/shm"
_JOIN_S = 15.0
# SGLang's part in this process asks for it as long as it lives.
_KEPT = ("SGLANG_USE_CPU_ENGINE",)


class InProcessServer:
    """Starts, watches and stops SGLang's engine in this process; one at a time.

    Attributes:
        url: stands for it in messages; nothing listens there.
        api_key: always None, because nobody else can reach it.
        loop: where all of its requests run, valid after start().
    """

    api_key: str | None = None

    def __init__(self, config: SGLangConfig) -> None:
        """Args: `config` as for SGLangServer; python, bind, engines and log_path have no meaning here.

        Raises:
            ConfigError: `config.extra_flags` ask for something under which routes are wrong; says what and why.
        """
        self.config = config
        self.url = _URL
        self.loop: LoopThread | None = None
        self._flags = SGLangServer(config).command(0)[3:]  # without python -m module
        self._engine: Any = None
        self._processes: list[Any] = []
        self._ended = asyncio.Event()
        self._why = "it was not started"
        self._previous_handler: Any = None

    def start(self) -> None:
        """Makes the engine and returns when it can be asked.

        Raises:
            ConfigError: the model directory holds no safetensors.
            RolloutError: called outside the main thread, another one runs, or SGLang could not start; nothing is left running then.
        """
        if self.alive():
            return
        if threading.current_thread() is not threading.main_thread():
            raise RolloutError("an in-process engine can only be started by the main thread: SGLang's children signal it")
        self.stop()
        assert self.config.model_path is not None
        check_weight_files(self.config.model_path)
        before = set(mp.active_children())
        self._previous_handler = signal.getsignal(signal.SIGQUIT)
        try:
            with _as_sglang_wants_it(self.config):
                self._engine = self._make_engine()
        except BaseException as error:
            self._processes = [child for child in mp.active_children() if child not in before]
            self.stop()
            if isinstance(error, Exception | SystemExit):
                raise RolloutError(f"SGLang could not start in this process: {type(error).__name__}: {error}") from error
            raise
        atexit.unregister(self._engine.shutdown)  # it kills every child of this process
        atexit.register(self.stop)
        self._processes = [child for child in mp.active_children() if child not in before]
        self.loop = LoopThread("sglang-inprocess")
        self._ended = asyncio.Event()
        threading.Thread(target=self._watch, args=(self._processes, self.loop, self._ended), daemon=True).start()
        logger.info("SGLang runs in this process, %d processes beside it", len(self._processes))

    def _make_engine(self) -> Any:
        from sglang.srt.entrypoints import http_server
        from sglang.srt.entrypoints.engine import Engine
        from sglang.srt.managers.tokenizer_manager import ServerStatus
        from sglang.srt.plugins import load_plugins
        from sglang.srt.server_args import prepare_server_args

        load_plugins()
        level = [] if "--log-level" in self._flags else ["--log-level", "error"]
        arguments = prepare_server_args([*self._flags, *level])
        arguments.custom_sigquit_handler = _child_failed
        arguments.resolve_once()
        if refused := refusals(arguments.resolved_dict()):
            raise RolloutError("; and ".join(refused))
        engine = Engine(server_args=arguments)
        engine.tokenizer_manager.server_status = ServerStatus.Up
        state = http_server._GlobalState(
            tokenizer_manager=engine.tokenizer_manager,
            template_manager=engine.template_manager,
            scheduler_info=engine._scheduler_init_result.scheduler_infos[0],
        )
        http_server.set_global_state(state)
        return engine

    def _watch(self, processes: list[Any], loop: LoopThread, ended: asyncio.Event) -> None:
        """Tells waiting requests when a process of SGLang's ends: nothing else would."""
        multiprocessing.connection.wait([process.sentinel for process in processes])
        if self._processes is processes:  # else stop() did it
            codes = {process.name: process.exitcode for process in processes if not process.is_alive()}
            self._why = f"SGLang's processes in this process ended: exit codes {codes}"

        async def tell() -> None:
            ended.set()

        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.submit(tell())

    def alive(self) -> bool:
        """Whether all its processes run."""
        return self._engine is not None and all(process.is_alive() for process in self._processes)

    def describe_end(self) -> str:
        """Why it is not running."""
        return self._why

    def describe_log(self) -> str:
        """Nothing: it writes to this process's standard error."""
        return ""

    def remove_log(self) -> None:
        """Nothing to remove."""

    def why_dead(self) -> str | None:
        """None while it runs, else the reason."""
        return None if self.alive() else self.describe_end()

    def client(self, **settings: Any) -> HttpClient:
        """A client of it, in place of HttpClient(url, ...); runs on `loop`.

        Args:
            settings: of HttpClient beside url, api_key and loop.

        Raises:
            RolloutError: it is not running.
        """
        if self.loop is None:
            raise RolloutError("the in-process engine is not running; call start()")
        from sglang.srt.entrypoints.http_server import app

        return _InProcessClient(self, app, settings)

    def update_from_tensor(self, bucket: Bucket) -> None:
        """Has all ranks load one bucket through shared memory (CUDA: through memory handles); within a PushSession.

        Raises:
            RolloutError: it is not running, refused, or ended meanwhile.
        """
        if self._engine is None or self.loop is None:
            raise RolloutError("the in-process engine is not running; call start()")
        request = _tensor_request(bucket, self.config.tp_size)
        manager = self._engine.tokenizer_manager
        success, message = self.loop.run(self.unless_ended(manager.update_weights_from_tensor(request, None)))
        check_reply("update_weights_from_tensor", {"success": success, "message": message})

    async def unless_ended(self, work: Coroutine[Any, Any, T]) -> T:
        """Awaits something that its processes do; they may end without a word.

        Raises:
            EngineDiedError: they ended.
        """
        task, ended = asyncio.ensure_future(work), asyncio.ensure_future(self._ended.wait())
        try:
            await asyncio.wait({task, ended}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise EngineDiedError(self.describe_end())
            return task.result()
        finally:
            task.cancel()
            ended.cancel()

    def stop(self) -> None:
        """Ends its processes and leaves this one as it was; safe to call twice and at interpreter exit."""
        engine, self._engine = self._engine, None
        processes, self._processes = self._processes, []
        loop, self.loop = self.loop, None
        self._why = "it was stopped"
        if engine is not None:
            atexit.unregister(self.stop)
            watchdog = getattr(engine.tokenizer_manager, "_subprocess_watchdog", None)
            if watchdog is not None:
                watchdog.stop()
            if engine.send_to_rpc is not None:
                engine.send_to_rpc.close(linger=0)
        _kill(processes)
        if loop is not None:
            loop.close()
        if self._previous_handler is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGQUIT, self._previous_handler)
            self._previous_handler = None


class TensorSender:
    """Pushes weights into an in-process engine; stands where a WeightSender stands for servers."""

    def __init__(self, server: InProcessServer, bucket_bytes: int) -> None:
        """Args: `bucket_bytes` must fit into shared memory, beside whatever else is in it."""
        self._server = server
        self._bucket_bytes = bucket_bytes

    def push(self, weights: Iterable[tuple[str, torch.Tensor]]) -> int:
        """Sends tensors by Hugging Face name in buckets and returns their bytes.

        Raises:
            RolloutError: a bucket was refused, shared memory is too small, or the engine died.
        """
        device = torch.device(self._server.config.resolved_device())
        sent = 0
        for bucket in buckets(weights, self._bucket_bytes, device):
            if device.type == "cpu":
                _require_shared_memory(bucket.flat.numel())
            self._server.update_from_tensor(bucket)
            sent += bucket.flat.numel()
            del bucket  # before the next one is packed
        return sent

    def close(self) -> None:
        """Nothing is kept between pushes."""


class _InProcessClient(HttpClient):
    """HttpClient whose requests go to an ASGI application in this process."""

    def __init__(self, server: InProcessServer, app: Any, settings: Mapping[str, Any]) -> None:
        super().__init__(server.url, api_key=None, loop=server.loop, **settings)
        self._server = server
        self._client = httpx.AsyncClient(transport=httpx.ASGITransport(app=app), timeout=None)

    async def _attempt(
        self,
        method: str,
        path: str,
        payload: Mapping[str, Any] | None,
        max_bytes: int,
        reserve: Callable[[int], Awaitable[None]] | None,
    ) -> tuple[int, bytearray]:
        try:
            return await self._server.unless_ended(super()._attempt(method, path, payload, max_bytes, reserve))
        except EngineDiedError as error:  # what a connection would say that breaks
            raise httpx.ReadError(str(error)) from error


@contextlib.contextmanager
def _as_sglang_wants_it(config: SGLangConfig) -> Iterator[None]:
    """What SGLang's start needs of this process, and this process as it was afterwards."""
    root = logging.getLogger()
    main, handlers, level = sys.modules["__main__"], root.handlers[:], root.level
    environment, method = dict(os.environ), mp.get_start_method(allow_none=True)
    policy = asyncio.get_event_loop_policy()
    try:
        # Spawned children import the main module: theirs is the launcher, which installs what they need, and not the user's.
        # Imported here, it prepares this process in the same way.
        sys.modules["__main__"] = importlib.import_module(LAUNCHER)
        root.handlers.clear()  # or SGLang closes them
        wanted = server_environment(config)
        os.environ.clear()
        os.environ.update(wanted)
        yield
    finally:
        sys.modules["__main__"] = main
        root.handlers[:] = handlers
        root.setLevel(level)
        kept = {name: os.environ[name] for name in _KEPT if name in os.environ}
        os.environ.clear()
        os.environ.update(environment | kept)
        mp.set_start_method(method, force=True)
        asyncio.set_event_loop_policy(policy)


def _child_failed(signum: int, frame: FrameType | None) -> None:
    """SGLang's children send SIGQUIT when they fail, which would end this process; that they ended is seen by the watcher."""
    logger.error("a process of the in-process SGLang engine failed; its own messages say why")


def _tensor_request(bucket: Bucket, ranks: int) -> Any:
    from sglang.srt.managers.io_struct import UpdateWeightsFromTensorReqInput
    from sglang.srt.utils import MultiprocessingSerializer
    from sglang.srt.weight_sync.tensor_bucket import FlattenedTensorMetadata

    metadata, offset = [], 0
    for name, dtype_name, dims in zip(bucket.names, bucket.dtypes, bucket.shapes, strict=True):
        dtype, shape = getattr(torch, dtype_name), torch.Size(dims)
        nbytes = shape.numel() * dtype.itemsize
        metadata.append(
            FlattenedTensorMetadata(name=name, shape=shape, dtype=dtype, start_idx=offset, end_idx=offset + nbytes, numel=nbytes)
        )
        offset += nbytes
    content = {"flattened_tensor": bucket.flat, "metadata": metadata}
    # Once per rank: a handle can be opened once.
    payloads = [MultiprocessingSerializer.serialize(content) for _ in range(ranks)]
    return UpdateWeightsFromTensorReqInput(
        serialized_named_tensors=payloads, load_format="flattened_bucket", flush_cache=False
    )


def _require_shared_memory(nbytes: int) -> None:
    """A container's shared memory may be tiny, and writing beyond it kills the process without an exception."""
    try:
        state = os.statvfs(_SHARED_MEMORY)
    except OSError:
        return
    free = state.f_bavail * state.f_frsize
    if nbytes > free:
        raise RolloutError(
            f"{WHERE}: a bucket of {nbytes} bytes does not fit into {_SHARED_MEMORY} ({free} bytes free); lower "
            "weight_bucket_bytes or enlarge it (docker: --shm-size)"
        )


def _kill(processes: list[Any]) -> None:
    """Ends processes and what they started."""
    import psutil

    found = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            found += psutil.Process(process.pid).children(recursive=True)
    for process in [*processes, *found]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    for process in processes:
        process.join(_JOIN_S)
    psutil.wait_procs(found, timeout=_JOIN_S)
