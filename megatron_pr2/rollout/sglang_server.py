"""SGLangServer: one SGLang server process of our own, from start to its certain end.

The server dies with this process however that ends: close() and interpreter exit stop it, and the kernel kills it when this
process is killed (PR_SET_PDEATHSIG in the launcher; SGLang's own children set the same on theirs). It runs in a process group
of its own, so that stopping it touches nothing else and a Ctrl-C in the terminal reaches only the trainer.
"""

from __future__ import annotations

import atexit
import logging
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import httpx

from megatron_pr2.errors import RolloutError
from megatron_pr2.rollout.sglang_config import SGLangConfig, server_environment

logger = logging.getLogger(__name__)

LAUNCHER = "megatron_pr2.rollout.sglang_cpu.launch"
# SGLang looks for a SIGTERM every 5 s and then releases GPU memory and shared memory, which a SIGKILL would leave behind.
_STOP_GRACE_S = 15.0
_LOG_LINES = 20
# Lines that follow every end of SGLang and would push its last words out of an error message.
_LOG_NOISE = ("nanobind:", " - leaked ", " - ... skipped", "See https://nanobind", "Ignore import error")


def free_port() -> int:
    """A TCP port on 127.0.0.1 that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class SGLangServer:
    """Starts, watches and stops one server.

    Attributes:
        url: base URL, valid after start().
        api_key: what clients have to present.
        log_path: where its output goes, a temporary file from start() on if the config names none; a restart appends.
    """

    def __init__(self, config: SGLangConfig) -> None:
        self.config = config
        self.device = config.resolved_device()
        self.url = ""
        self.api_key = config.read_api_key() or secrets.token_urlsafe(24)
        self.log_path = Path(config.log_path) if config.log_path else None
        self._process: subprocess.Popen[bytes] | None = None
        self._ended = threading.Event()

    @property
    def pid(self) -> int | None:
        """Process id (and process group id) of the server, None if it was never started or was stopped."""
        return self._process.pid if self._process is not None else None

    def alive(self) -> bool:
        """Whether the process runs; says nothing of whether it answers."""
        return self._process is not None and not self._ended.is_set()

    def command(self, port: int) -> list[str]:
        """The command line; holds no secret."""
        config = self.config
        assert config.model_path is not None
        flags = [
            "--model-path", config.model_path, "--host", "127.0.0.1", "--port", str(port), "--device", self.device,
            "--dtype", config.dtype, "--tp-size", str(config.tp_size), "--ep-size", str(config.ep_size),
            "--max-running-requests", str(config.max_running_requests), "--skip-tokenizer-init",
            "--enable-return-routed-experts", "--weight-version", "0", "--log-level-http", "warning",
            # On shared cores an idle scheduler would otherwise poll away the trainer's time.
            *(["--sleep-on-idle"] if self.device == "cpu" else []),
        ]  # fmt: skip
        if config.max_total_tokens is not None:
            flags += ["--max-total-tokens", str(config.max_total_tokens)]
        if self.device == "cpu":
            # First, so that extra_flags can override: argparse takes the last value.
            flags += ["--attention-backend", "torch_native", "--sampling-backend", "pytorch", "--chunked-prefill-size", "512"]
        return [sys.executable, "-m", LAUNCHER, *flags, *config.extra_flags]

    def start(self) -> None:
        """Starts the server and returns when it is healthy.

        Raises:
            RolloutError: it ended or was not healthy in time; the message holds its last log lines. Nothing is left running.
        """
        if self.alive():
            return
        self.stop()
        if self.log_path is None:
            self.log_path = _temporary_log()
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        began = time.monotonic()
        self._spawn(port)
        atexit.register(self.stop)
        try:
            self._wait_until_healthy(began)
        except BaseException:
            self.stop()
            raise
        logger.info("SGLang server ready at %s after %.1f s, log in %s", self.url, time.monotonic() - began, self.log_path)

    def _spawn(self, port: int) -> None:
        env = server_environment(self.config)
        env["MEGATRON_PR2_SGLANG_API_KEY"] = self.api_key
        env["MEGATRON_PR2_SGLANG_PARENT"] = str(os.getpid())
        log_path = self.log_path
        assert log_path is not None
        started = threading.Event()
        failure: list[OSError] = []
        self._ended = ended = threading.Event()

        def run() -> None:
            # PR_SET_PDEATHSIG fires when the *thread* that forked ends: this one lives exactly as long as the server.
            try:
                with log_path.open("ab") as log:
                    process = subprocess.Popen(
                        self.command(port),
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        env=env,
                        start_new_session=True,
                    )
            except OSError as error:
                failure.append(error)
                started.set()
                return
            self._process = process
            started.set()
            # Not reaped until its group is swept: while the leader is a zombie its group id cannot be given to anybody else.
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
            _signal_group(process.pid, signal.SIGKILL)
            process.wait()
            ended.set()

        threading.Thread(target=run, name=f"sglang-server-{port}", daemon=True).start()
        started.wait()
        if failure:
            raise RolloutError(f"could not start the SGLang server ({' '.join(self.command(port)[:3])} ...): {failure[0]}")

    def _wait_until_healthy(self, began: float) -> None:
        deadline = began + self.config.start_timeout_s
        with httpx.Client(trust_env=False, timeout=5.0) as client:
            while time.monotonic() < deadline:
                if self._ended.wait(0.25):
                    raise RolloutError(self.describe_end())
                try:
                    if client.get(f"{self.url}/health").status_code == 200:
                        return
                except httpx.HTTPError:
                    continue
        raise RolloutError(
            f"SGLang server was not healthy {self.config.start_timeout_s:g} s after its start; look at its log or raise "
            f"start_timeout_s.{self.describe_log()}"
        )

    def describe_end(self) -> str:
        """Why the server is not running, with its last log lines."""
        code = self._process.returncode if self._process is not None else None
        how = "was not started" if code is None else f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
        return f"SGLang server {how}.{self.describe_log()}"

    def describe_log(self, lines: int = _LOG_LINES) -> str:
        """The last lines of the log, ready to be appended to an error message."""
        if self.log_path is None:
            return ""
        tail = log_tail(self.log_path, lines).replace(self.api_key, "<redacted>")
        return f" Last lines of {self.log_path}:\n{tail}" if tail else f" Its log {self.log_path} is empty."

    def stop(self) -> None:
        """Stops the server and all its children; safe to call twice, from any thread and at interpreter exit."""
        process, self._process = self._process, None
        if process is None:
            return
        atexit.unregister(self.stop)
        if self._ended.is_set():
            return
        try:
            os.kill(process.pid, signal.SIGTERM)
            self._ended.wait(_STOP_GRACE_S)
        finally:  # also when the user does not want to wait
            if not self._ended.is_set():
                _signal_group(process.pid, signal.SIGKILL)
                self._ended.wait(_STOP_GRACE_S)

    def remove_log(self) -> None:
        """Removes the log if it is a temporary one."""
        if self.config.log_path is None and self.log_path is not None:
            self.log_path.unlink(missing_ok=True)
            self.log_path = None


def _signal_group(pgid: int, number: signal.Signals) -> None:
    """Signals our own server's process group; its leader is alive or not yet reaped, so the id is still ours."""
    try:
        os.killpg(pgid, number)
    except ProcessLookupError:
        logger.debug("process group %d has already ended", pgid)


def _temporary_log() -> Path:
    handle, name = tempfile.mkstemp(prefix="megatron_pr2_sglang_", suffix=".log")
    os.close(handle)
    return Path(name)


def log_tail(path: Path, lines: int) -> str:
    """Last `lines` telling lines of a file, each cut at 400 characters; "" if there is none."""
    try:
        with path.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - 64 * 1024))
            text = file.read().decode("utf-8", errors="replace")
    except OSError:
        return ""
    telling = [line for line in text.splitlines() if line.strip() and not any(noise in line for noise in _LOG_NOISE)]
    return "\n".join(line[:400] for line in telling[-lines:])
