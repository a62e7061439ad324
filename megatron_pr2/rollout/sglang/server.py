"""SGLangServer: one SGLang server process of our own, from start to its certain end (child_process.py).

What it listens on is `config.bind` (loopback unless told otherwise), its key comes through the environment, and it loads
safetensors only. Settings under which routes would be wrong are refused before anything is started.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from megatron_pr2.errors import ConfigError
from megatron_pr2.rollout.sglang.child_process import ChildProcess, base_url, reserved_port
from megatron_pr2.rollout.sglang.config import SGLangConfig, is_loopback, server_environment
from megatron_pr2.rollout.sglang.http import ask_health
from megatron_pr2.rollout.sglang.python import check_module, find_python
from megatron_pr2.rollout.sglang.refusals import refusals, settings_from_flags

logger = logging.getLogger(__name__)

LAUNCHER = "megatron_pr2.rollout.sglang.cpu.launch"
# SGLang looks for a SIGTERM every 5 s and then releases GPU memory and shared memory, which a SIGKILL would leave behind.
_STOP_GRACE_S = 15.0
# Lines that follow every end of SGLang and would push its last words out of an error message.
LOG_NOISE = ("nanobind:", " - leaked ", " - ... skipped", "See https://nanobind", "Ignore import error")
# SGLang takes abbreviations of its flags, too.
_SECRET_FLAGS = ("--api-key", "--admin-api-key", "--ssl-keyfile-password")
_PICKLED_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt")


class SGLangServer(ChildProcess):
    """One server.

    Args:
        api_key: that servers behind one router share; by default that of `config.api_key_file`, or a random one.

    Attributes:
        url: base URL, valid after start().
    """

    def __init__(self, config: SGLangConfig, api_key: str | None = None) -> None:
        _check_flags(config.extra_flags)
        self.config = config
        self.device = config.resolved_device()
        self.url = ""
        self.api_key = api_key or config.read_api_key() or secrets.token_urlsafe(24)
        super().__init__("SGLang server", log_path=config.log_path, secrets=[self.api_key], noise=LOG_NOISE)
        self._store: Path | None = None

    def command(self, port: int) -> list[str]:
        """The command line; holds no secret."""
        config = self.config
        assert config.model_path is not None
        flags = [
            "--model-path", config.model_path, "--load-format", "safetensors", "--host", config.bind, "--port", str(port),
            "--device", self.device, "--dtype", config.dtype, "--tp-size", str(config.tp_size), "--ep-size", str(config.ep_size),
            "--max-running-requests", str(config.max_running_requests), "--skip-tokenizer-init",
            "--enable-return-routed-experts", "--weight-version", "0", "--log-level-http", "warning",
        ]  # fmt: skip
        if config.max_total_tokens is not None:
            flags += ["--max-total-tokens", str(config.max_total_tokens)]
        if self.device == "cuda":
            flags += ["--base-gpu-id", str(config.first_gpu)]
        else:
            # Before extra_flags, which can override: argparse takes the last value. An idle scheduler would otherwise poll away the
            # trainer's time on shared cores.
            flags += ["--attention-backend", "torch_native", "--sampling-backend", "pytorch"]
            flags += ["--chunked-prefill-size", "512", "--sleep-on-idle"]
        return [find_python(config.python), "-m", LAUNCHER, *flags, *config.extra_flags]

    def start(self) -> None:
        """Starts the server and returns when it is healthy; nothing is left running after a failure."""
        if self.alive():
            return
        self.stop()
        assert self.config.model_path is not None
        check_weight_files(self.config.model_path)
        bind, limit_s = self.config.bind, self.config.start_timeout_s
        late = f"SGLang server was not healthy {limit_s:g} s after its start; look at its log or raise start_timeout_s"
        with contextlib.ExitStack() as until_healthy:
            try:
                port = until_healthy.enter_context(reserved_port(bind))
            except OSError as error:
                raise ConfigError(f"sglang.bind={bind!r} is no address of this machine: {error.strerror or error}") from error
            check_module(find_python(self.config.python), "sglang", "`make sglang` makes an environment that has it")
            self.url = base_url(bind, port)
            began = time.monotonic()
            try:
                self.spawn(self.command(port), self._environment())
                self.await_ready(lambda: not ask_health(self.url, 5.0)[1], began + limit_s, lambda: late)
            except BaseException:
                self.stop()
                raise
        logger.info("SGLang server ready at %s after %.1f s, log in %s", self.url, time.monotonic() - began, self.log_path)

    def _environment(self) -> dict[str, str]:
        env = server_environment(self.config)
        env["MEGATRON_PR2_SGLANG_API_KEY"] = self.api_key
        if is_loopback(self.config.bind):
            # SGLang's ranks meet through a TCP store that torch lets listen on every interface; a file does as well on one machine.
            self._store = Path(tempfile.mkdtemp(prefix="megatron_pr2_store_"))
            env.setdefault("SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE", f"file://{self._store / 'ranks'}")
        return env

    def stop(self, grace_s: float = _STOP_GRACE_S) -> None:
        super().stop(grace_s)
        if self._store is not None:
            shutil.rmtree(self._store, ignore_errors=True)


def _check_flags(flags: Sequence[str]) -> None:
    for flag in flags:
        name = flag.partition("=")[0]
        if len(name) > len("--a") and any(secret.startswith(name) for secret in _SECRET_FLAGS):
            raise ConfigError(f"sglang.extra_flags: {name} would show a secret to every user of the machine; use api_key_file")
    if refused := refusals(settings_from_flags(flags)):
        raise ConfigError(f"sglang.extra_flags: {'; and '.join(refused)}")


def check_weight_files(model_path: str) -> None:
    """Raises ConfigError for a model directory without safetensors; a path that is no directory is left to SGLang."""
    directory = Path(model_path)
    if not directory.is_dir() or any(directory.glob("*.safetensors")):
        return
    pickled = sorted(path.name for path in directory.iterdir() if path.suffix in _PICKLED_WEIGHTS)
    found = f"only {', '.join(pickled[:4])}{' ...' if len(pickled) > 4 else ''}" if pickled else "no weights"
    raise ConfigError(
        f"sglang.model_path={model_path!r} holds {found}; only safetensors are loaded, because other formats can run code: save "
        "the model again with save_pretrained (Transformers writes safetensors)"
    )
