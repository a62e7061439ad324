"""SGLangConfig: how to start or find the SGLang server, and how patient to be with it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import torch

from megatron_pr2.errors import ConfigError

_LOOPBACK = ("127.0.0.1", "localhost", "::1")
# Flags that SGLangServer sets itself; a second value would silently win or contradict what the engine checks.
_OWN_FLAGS = (
    "--model-path", "--host", "--port", "--api-key", "--config", "--weight-version", "--skip-tokenizer-init",
    "--enable-return-routed-experts", "--device", "--dtype", "--tp-size", "--tensor-parallel-size", "--ep-size",
)  # fmt: skip


@dataclass(frozen=True)
class SGLangConfig:
    """One of `model_path` (start an own server) and `url` (attach to a running one) is set.

    Attributes:
        model_path: directory of a Hugging Face checkpoint.
        url: "http://127.0.0.1:PORT" of a running server; only loopback addresses, because weights travel unencrypted.
        device: "cpu", "cuda" or "auto" (CUDA if there is one).
        dtype: dtype that the own server computes in, SGLang's names.
        tp_size, ep_size: tensor and expert parallelism of the own server.
        max_running_requests: requests that the own server decodes together.
        max_total_tokens: KV cache of the own server in tokens; None leaves it to SGLang (required on CPU).
        extra_flags: further SGLang flags for the own server, e.g. ("--mem-fraction-static", "0.7").
        env: further environment variables for the own server.
        log_path: log file of the own server; a temporary file if None.
        api_key_file: file with the API key. An own server without one gets a random key. Never put on a command line or in a log.
        weight_backend: backend of the weight update group: "nccl", "gloo" or "auto" (nccl on CUDA). NCCL needs the server's GPU
            to be another one than the trainer's; gloo also works on a shared GPU.
        weight_bucket_bytes: weights travel in buckets of at most this size (a larger tensor is its own bucket).
        concurrency: requests in flight at once.
        start_timeout_s: from process start to a healthy server.
        request_timeout_s: one attempt of one request; also one weight bucket.
        retries: further attempts after a refused or broken connection or an HTTP 429/5xx, while the server is alive.
        retry_backoff_s: pause before the first retry; doubles with each.
    """

    model_path: str | None = None
    url: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    tp_size: int = 1
    ep_size: int = 1
    max_running_requests: int = 32
    max_total_tokens: int | None = 16384
    extra_flags: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    log_path: str | None = None
    api_key_file: str | None = None
    weight_backend: str = "auto"
    weight_bucket_bytes: int = 256 << 20
    concurrency: int = 64
    start_timeout_s: float = 300.0
    request_timeout_s: float = 600.0
    retries: int = 3
    retry_backoff_s: float = 0.5

    def __post_init__(self) -> None:
        if (self.model_path is None) == (self.url is None):
            raise ConfigError("sglang: set exactly one of model_path (own server) and url (attach to a running server)")
        if self.url is not None:
            parts = urlsplit(self.url)
            if parts.scheme != "http" or parts.hostname not in _LOOPBACK or parts.port is None or parts.path.strip("/"):
                raise ConfigError(f"sglang.url={self.url!r}: expected http://127.0.0.1:PORT; other hosts are not supported")
        for name, allowed in (("device", ("auto", "cpu", "cuda")), ("weight_backend", ("auto", "nccl", "gloo"))):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"sglang.{name}={getattr(self, name)!r}: expected one of {', '.join(allowed)}")
        positive = (
            "tp_size", "ep_size", "max_running_requests", "weight_bucket_bytes", "concurrency",
            "start_timeout_s", "request_timeout_s", "retry_backoff_s",
        )  # fmt: skip
        for name in positive:
            if getattr(self, name) <= 0:
                raise ConfigError(f"sglang.{name}={getattr(self, name)}: expected a positive number")
        if self.retries < 0:
            raise ConfigError(f"sglang.retries={self.retries}: expected 0 or more")
        for flag in self.extra_flags:
            if flag.split("=")[0] in _OWN_FLAGS:
                raise ConfigError(f"sglang.extra_flags: {flag.split('=')[0]} is set by the engine; use the field of SGLangConfig")

    def resolved_device(self) -> str:
        """Where the own server runs: "cpu" or "cuda".

        Raises:
            ConfigError: device="cpu" where CUDA is available (the CPU adapters refuse), or "cuda" where it is not.
        """
        cuda = torch.cuda.is_available()
        if self.device == "auto":
            return "cuda" if cuda else "cpu"
        if (self.device == "cuda") != cuda:
            raise ConfigError(
                f"sglang.device={self.device!r}, but CUDA is {'' if cuda else 'not '}available; use 'auto', "
                "or hide the GPUs with CUDA_VISIBLE_DEVICES='' for a CPU engine"
            )
        return self.device

    def read_api_key(self) -> str | None:
        """The key in `api_key_file`, None without one.

        Raises:
            ConfigError: the file cannot be read or is empty.
        """
        if self.api_key_file is None:
            return None
        try:
            key = Path(self.api_key_file).read_text(encoding="utf-8").strip()
        except OSError as error:
            raise ConfigError(f"sglang.api_key_file={self.api_key_file!r}: {error.strerror}") from error
        if not key:
            raise ConfigError(f"sglang.api_key_file={self.api_key_file!r} is empty")
        return key


def server_environment(config: SGLangConfig) -> dict[str, str]:
    """Environment of the own server: this process's, made to find this package, to stay on loopback and off the network."""
    package_root = str(Path(__file__).resolve().parents[2])
    env = dict(os.environ)
    env["PYTHONPATH"] = os.pathsep.join(filter(None, (package_root, env.get("PYTHONPATH"))))
    env["GLOO_SOCKET_IFNAME"] = "lo"
    if config.model_path is not None and Path(config.model_path).is_dir():
        env["HF_HUB_OFFLINE"] = "1"
    # The trainer's own rendezvous must not leak into the server's process groups.
    for name in ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK"):
        env.pop(name, None)
    for name in [name for name in env if name.startswith(("TORCHELASTIC_", "PET_"))]:
        env.pop(name)
    env.update(config.env)
    return env
