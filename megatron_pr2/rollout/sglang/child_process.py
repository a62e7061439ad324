"""ChildProcess: a server process of our own, from its start to its certain end, with its log.

It dies with this process however that ends: stop() and interpreter exit end it, and the kernel kills it when this process is
killed (PR_SET_PDEATHSIG, requested by :func:`die_with_parent` in the child). It runs in a process group of its own, so that
stopping it touches nothing else and a Ctrl-C in the terminal reaches only the trainer.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import ClassVar

from megatron_pr2.errors import RolloutError

PARENT_VARIABLE = "MEGATRON_PR2_PARENT_PID"
_PR_SET_PDEATHSIG = 1
_LOG_LINES = 20
_POLL_S = 0.25
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


@contextlib.contextmanager
def reserved_port(address: str = "127.0.0.1") -> Iterator[int]:
    """A free TCP port that nobody else is given until the block ends, so that a server may take minutes until it listens.

    SO_REUSEADDR, which servers set as well, lets a server listen on a port that is bound here; the kernel gives a bound port
    to no outgoing connection and to nobody who asks for a free one.

    Raises:
        OSError: the address is none of this machine's.
    """
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as reservation:
        reservation.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        reservation.bind((address, 0))
        yield int(reservation.getsockname()[1])


def base_url(address: str, port: int) -> str:
    """Where this machine reaches a server that listens on an address; a wildcard is reached over loopback."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address, address)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def die_with_parent() -> None:
    """In a child of ChildProcess, first of all: asks the kernel to kill it when the thread that started it ends (Linux)."""
    parent = os.environ.pop(PARENT_VARIABLE, None)
    if parent is None or not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(parent):  # it ended before the request was in place
        sys.exit("the process that started this server is gone")


class ChildProcess:
    """Starts, watches and stops one process and its children.

    Args:
        log_path: where its output goes; a temporary file from spawn() on if None. A restart appends.
        secrets: strings that describe_log() replaces.
        noise: lines with one of these in them are left out of describe_log().
    """

    # The tests replace it by one that forks a process with SGLang imported.
    popen: ClassVar[Callable[..., subprocess.Popen[bytes]]] = subprocess.Popen

    def __init__(
        self, name: str, *, log_path: str | Path | None = None, secrets: Sequence[str | None] = (), noise: Sequence[str] = ()
    ) -> None:
        self.name = name
        self.log_path = Path(log_path) if log_path is not None else None
        self._own_log = log_path is None
        self._secrets = tuple(filter(None, secrets))
        self._noise = noise
        self._process: subprocess.Popen[bytes] | None = None
        self._ended = threading.Event()

    @property
    def pid(self) -> int | None:
        """Process id, which is also its process group's; None if it was never started or was stopped."""
        return self._process.pid if self._process is not None else None

    def alive(self) -> bool:
        """Whether the process runs; not whether it answers."""
        return self._process is not None and not self._ended.is_set()

    def wait(self, timeout_s: float) -> bool:
        """Waits for its end; whether it has ended."""
        return self._ended.wait(timeout_s)

    def await_ready(self, ready: Callable[[], bool], deadline: float, late: Callable[[], str]) -> None:
        """Returns when it is ready; raises RolloutError, with the last log lines, if it ends before or not until a deadline."""
        while time.monotonic() < deadline:
            if self.wait(_POLL_S):
                raise RolloutError(self.describe_end())
            if ready():
                return
        raise RolloutError(f"{late()}.{self.describe_log()}")

    def spawn(self, command: Sequence[str], env: Mapping[str, str]) -> None:
        """Starts the process with that whole environment; returns as soon as it exists.

        Args:
            command: visible to every user of the machine: no secrets.
        """
        if self.alive():
            raise RolloutError(f"{self.name} already runs as process {self.pid}; stop() it first")
        if self.log_path is None:
            handle, path = tempfile.mkstemp(prefix="megatron_pr2_", suffix=".log")
            os.close(handle)
            self.log_path = Path(path)
        log_path = self.log_path
        started: Future[None] = Future()
        self._ended = ended = threading.Event()

        def run() -> None:
            # PR_SET_PDEATHSIG fires when the *thread* that forked ends: this one lives exactly as long as the process.
            try:
                with log_path.open("ab") as log:
                    process = self.popen(
                        command,
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        env={**env, PARENT_VARIABLE: str(os.getpid())},
                        start_new_session=True,
                    )
            except Exception as error:  # also a TypeError, say
                started.set_exception(error)
                return
            self._process = process
            started.set_result(None)
            # Not reaped until its group is swept: while the leader is a zombie its group id cannot be given to anybody else.
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
            _kill_group(process.pid)
            process.wait()
            ended.set()

        threading.Thread(target=run, name=f"watch {self.name}", daemon=True).start()
        try:
            started.result()
        except Exception as error:
            raise RolloutError(f"could not start {self.name} ({' '.join(command[:3])} ...): {error}") from error
        atexit.register(self.stop)

    def stop(self, grace_s: float = 15.0) -> None:
        """Ends the process and its children: SIGTERM, after `grace_s` SIGKILL. Safe to call twice and from any thread."""
        process, self._process = self._process, None
        if process is None:
            return
        atexit.unregister(self.stop)
        if self._ended.is_set():
            return
        try:
            with contextlib.suppress(ProcessLookupError):  # reaped a moment ago
                os.kill(process.pid, signal.SIGTERM)
            self._ended.wait(grace_s)
        finally:  # also when the user does not want to wait
            if not self._ended.is_set():
                _kill_group(process.pid)
                self._ended.wait(grace_s)

    def describe_end(self) -> str:
        """Why the process is not running, with its last log lines."""
        code = self._process.returncode if self._process is not None else None
        how = "was not started" if code is None else f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
        return f"{self.name} {how}.{self.describe_log()}"

    def describe_log(self) -> str:
        """The last lines of the log, ready to be appended to an error message."""
        if self.log_path is None:
            return ""
        tail = log_tail(self.log_path, _LOG_LINES, self._noise)
        for secret in self._secrets:
            tail = tail.replace(secret, "<redacted>")
        return f" Last lines of {self.log_path}:\n{tail}" if tail else f" Its log {self.log_path} is empty."

    def remove_log(self) -> None:
        """Removes the log if it is a temporary one."""
        if self._own_log and self.log_path is not None:
            self.log_path.unlink(missing_ok=True)
            self.log_path = None


def _kill_group(pgid: int) -> None:
    """Kills our own child's process group; its leader is alive or not yet reaped, so the id is still ours."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pgid, signal.SIGKILL)


def log_tail(path: Path, lines: int, noise: Sequence[str] = ()) -> str:
    """Last lines of a file that hold something and none of `noise`, each cut at 400 characters; "" if there are none."""
    try:
        with path.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - 64 * 1024))
            text = _COLOUR.sub("", file.read().decode("utf-8", errors="replace"))
    except OSError:
        return ""
    telling = [line for line in text.splitlines() if line.strip() and not any(word in line for word in noise)]
    return "\n".join(line[:400] for line in telling[-lines:])
