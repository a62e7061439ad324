"""Real SGLang servers without the seconds of CPU time that each of their processes spends on imports.

One process for each interpreter imports SGLang, Transformers and torch once; every server is a fork of it, and so are the server's
own processes. From the launcher's first line on all is as in a server of its own: its command line, environment, log, process
group, signals and exit code; it is a child of the process that asked for it. What a fork cannot show is proven where servers are
started by their command line: a start from nothing (test_lifecycle.py), and the whole training runs (tests/rl/test_train.py).

    Preloaded    in the tests' process: a stand-in for subprocess.Popen that ChildProcess.popen is set to
    main()       in the process that is forked, run by the server environment's interpreter
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

LAUNCHER = "megatron_pr2.rollout.sglang.cpu.launch"
ROOT = Path(__file__).resolve().parents[2]
_PR_SET_CHILD_SUBREAPER = 36
_READY_S = 500.0


class Preloaded:
    """Starts the launcher's command lines as forks, everything else as subprocess.Popen does."""

    def __init__(self) -> None:
        self._servers: dict[str, tuple[subprocess.Popen[bytes], socket.socket]] = {}
        self._lock = threading.Lock()

    def __call__(self, command: Sequence[str], *, env: Mapping[str, str], stdout: IO[bytes], **kwargs: Any) -> Any:
        if tuple(command[1:3]) != ("-m", LAUNCHER):
            return subprocess.Popen(command, env=env, stdout=stdout, **kwargs)
        return self._fork(command, {"argv": [LAUNCHER, *command[3:]]}, env, stdout)

    def run(self, python: str, code: str, env: Mapping[str, str]) -> tuple[int, str]:
        """Exit code and output of code that wants SGLang imported."""
        with tempfile.TemporaryFile() as log:
            code = self._fork([python, "-c"], {"argv": ["-c"], "code": code}, env, log).wait()
            log.seek(0)
            return code, log.read().decode(errors="replace").strip()

    def _fork(self, command: Sequence[str], task: Mapping[str, Any], env: Mapping[str, str], stdout: IO[bytes]) -> _Forked:
        with self._lock:
            _, link = self._servers.get(command[0]) or self._preload(command[0])
            # The title is what `ps` shows of a server that was started by its command line.
            extra = {"title": " ".join(command), "env": dict(env), "parent": os.getpid()}
            request = json.dumps({**task, **extra}).encode()
            # A process whose parent ends is given to the nearest ancestor that asks for it: this one, for a moment.
            _subreaper(True)
            try:
                link.sendall(len(request).to_bytes(4, "big"))
                socket.send_fds(link, [request], [stdout.fileno()])
                pid = int.from_bytes(_exactly(link, 4), "big")
                deadline = time.monotonic() + 60
                while _parent(pid) not in (os.getpid(), None) and time.monotonic() < deadline:
                    time.sleep(0.001)
            finally:
                _subreaper(False)
        return _Forked(pid)

    def _preload(self, python: str) -> tuple[subprocess.Popen[bytes], socket.socket]:
        from megatron_pr2.rollout.sglang.python import package_environment

        ours, theirs = socket.socketpair()
        env = package_environment(os.environ)
        env |= {"PYTHONPATH": os.pathsep.join((str(ROOT), env["PYTHONPATH"])), "SGLANG_USE_CPU_ENGINE": "1", "HF_HUB_OFFLINE": "1"}
        with tempfile.TemporaryFile() as log:
            command = [python, "-m", "tests.sglang.preload", str(theirs.fileno())]
            process = subprocess.Popen(command, env=env, pass_fds=[theirs.fileno()], stdout=log, stderr=log)
            theirs.close()
            ours.settimeout(_READY_S)
            try:
                _exactly(ours, 1)
            except OSError as error:
                process.kill()
                log.seek(0)
                raise RuntimeError(f"{python} could not import SGLang: {log.read().decode(errors='replace')[-3000:]}") from error
        self._servers[python] = process, ours
        return process, ours

    def close(self) -> None:
        """Ends the processes that are forked; servers that run are not their concern."""
        for process, link in self._servers.values():
            link.close()
            process.wait(60)
        self._servers.clear()


class _Forked:
    """What ChildProcess uses of a Popen."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None

    def wait(self) -> int:
        if self.returncode is None:
            _, status = os.waitpid(self.pid, 0)
            self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode


def _subreaper(on: bool) -> None:
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, int(on))


def _parent(pid: int) -> int | None:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return None


def _exactly(link: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        piece = link.recv(size - len(data))
        if not piece:
            raise ConnectionError("the process that is forked has ended")
        data += piece
    return data


# ---- in the server environment ---------------------------------------------------------------------------------------------


def main(link: socket.socket) -> None:
    """Imports SGLang and forks for every request, until the tests' process hangs up."""
    import multiprocessing

    import setproctitle

    from megatron_pr2.rollout.sglang.cpu import shims

    setproctitle.getproctitle()  # it finds the room for titles only while the environment is as it came
    # SGLang asks for "spawn", whose children would import everything again.
    multiprocessing.set_start_method("fork")
    multiprocessing.set_start_method = lambda *args, **kwargs: None
    shims.install()
    _import_sglang()
    link.sendall(b".")
    while True:
        try:
            size = int.from_bytes(_exactly(link, 4), "big")
        except ConnectionError:
            return
        body, fds = b"", []
        while len(body) < size:
            piece, more, _, _ = socket.recv_fds(link, size - len(body), 1)
            body, fds = body + piece, fds + more
        request = json.loads(body)
        middle = os.fork()
        if middle == 0:
            server = os.fork()
            if server == 0:
                link.close()
                _become_server(request, fds[0])
            link.sendall(server.to_bytes(4, "big"))
            os._exit(0)
        os.waitpid(middle, 0)
        os.close(fds[0])


def _import_sglang() -> None:
    import importlib

    for name in (
        "sglang.launch_server", "sglang.srt.entrypoints.http_server", "sglang.srt.managers.scheduler",
        "sglang.srt.managers.detokenizer_manager", "sglang.srt.managers.data_parallel_controller", "sglang.srt.models.registry",
        "sglang.srt.models.qwen3_moe", "sglang.srt.layers.attention.torch_native_backend", "sglang.srt.layers.moe.fused_moe_native",
    ):  # fmt: skip
        # Not all of them are there in every release.
        with contextlib.suppress(ModuleNotFoundError):
            importlib.import_module(name)


def _become_server(request: Mapping[str, Any], log: int) -> None:
    """Turns this fork into what the command line would have started."""
    import runpy

    import setproctitle

    code = 1
    try:
        os.setsid()
        for stream in (1, 2):
            os.dup2(log, stream)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.close(log)
        deadline = time.monotonic() + 60
        while os.getppid() != request["parent"] and time.monotonic() < deadline:
            time.sleep(0.001)
        imported_by = os.environ["PYTHONPATH"].split(os.pathsep)
        sys.path[:] = [entry for entry in sys.path if entry not in imported_by]
        sys.path[1:1] = filter(None, request["env"].get("PYTHONPATH", "").split(os.pathsep))
        os.environ.clear()
        os.environ.update(request["env"])
        setproctitle.setproctitle(request["title"])
        sys.argv = list(request["argv"])
        for name in [name for name in sys.modules if name == LAUNCHER or name.startswith("tests")]:
            del sys.modules[name]
        if "code" in request:
            exec(compile(request["code"], "<string>", "exec"), {"__name__": "__main__"})
        else:
            runpy.run_module(LAUNCHER, run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
        if isinstance(error.code, str):
            sys.stderr.write(f"{error.code}\n")
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main(socket.socket(fileno=int(sys.argv[1])))
