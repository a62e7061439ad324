"""SGLangConfig: how to start or find the SGLang servers, time limits, retries and budgets."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from megatron_pr2.errors import ConfigError
from megatron_pr2.rollout.sglang.python import find_python, package_environment

# Flags that SGLangServer sets itself; a second value would silently win or contradict what the engine checks.
_OWN_FLAGS = (
    "--model-path", "--model", "--load-format", "--base-gpu-id", "--host", "--port", "--api-key", "--config", "--weight-version",
    "--skip-tokenizer-init", "--tp", "--ep", "--expert-parallel-size",
    "--enable-return-routed-experts", "--device", "--dtype", "--tp-size", "--tensor-parallel-size", "--ep-size",
)  # fmt: skip


def is_loopback(host: str) -> bool:
    """Whether an address or host name stays on this machine: 127.0.0.0/8, ::1 or "localhost"; other names are not resolved."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_url(url: str, *, allow_remote: bool, has_key: bool) -> None:
    """Raises ConfigError for a URL that is malformed, holds a password or a path, or names another host without leave or a key."""
    parts = urlsplit(url)
    try:
        port = parts.port
    except ValueError:
        port = None
    if parts.username or parts.password:
        raise ConfigError("sglang.url holds a user name or password; give the server's key as api_key_file")
    schemes = ("http", "https") if allow_remote else ("http",)
    shape = parts.scheme in schemes and parts.hostname and not (parts.path.strip("/") or parts.query or parts.fragment)
    if not shape or (port is None and parts.scheme == "http"):
        raise ConfigError(f"sglang.url={url!r}: expected http://127.0.0.1:PORT, with allow_remote also https://HOST[:PORT]")
    if is_loopback(str(parts.hostname)):
        return
    if not allow_remote:
        raise ConfigError(
            f"sglang.url={url!r}: other hosts are not supported without allow_remote=true, because tokens, routes and weights "
            "would cross a network; set it and api_key_file if that network is trusted, or use http://127.0.0.1:PORT"
        )
    if not has_key:
        raise ConfigError(f"sglang.url={url!r} is another host: set api_key_file to the file that holds its key")


@dataclass(frozen=True)
class SGLangConfig:
    """Exactly one of `model_path` (start own servers) and `urls` (attach to running ones) is set.

    Attributes:
        model_path: directory of the Hugging Face checkpoint of own servers.
        urls: `http://127.0.0.1:PORT` of running servers; other hosts, and https, only with `allow_remote`.
        engines: number of own servers; each takes `tp_size` GPUs, one after the other from `first_gpu` on.
        router: `none` (the client chooses the server), `own` (SGLang's router is started in front; needs the package
            sglang-router), or the URL of a running one. Engines behind a router need this package's plugin to return routes.
        device: `cpu`, `cuda`, or `auto`: CUDA if there is one.
        dtype: what own servers compute in, by SGLang's names.
        tp_size: tensor-parallel ranks of an own server.
        ep_size: expert-parallel ranks of an own server; divides `tp_size`.
        python: interpreter of own servers and of an own router; `null` looks for one (docs/sglang.md). Its environment needs SGLang
            and torch, not Megatron-Core; this package is found through PYTHONPATH.
        bind: address that own servers listen on. Other machines reach them only if it is not loopback, which needs `api_key_file`.
        first_gpu: first GPU of own servers (SGLang's --base-gpu-id). Give the trainer the others.
        allow_remote: whether `urls` may name other hosts; needs `api_key_file`. Whoever can read the network between the two reads
            tokens, weights and, without https, the key.
        max_running_requests: requests that a server decodes together.
        max_total_tokens: KV cache of a server in tokens; `null` leaves it to SGLang (not on CPU). Prompts and responses of all
            running requests must fit.
        extra_flags: further SGLang flags for own servers, for example `[--mem-fraction-static, "0.7"]`.
        env: further environment variables for own servers.
        log_path: log file of own servers; a temporary file if `null`.
        api_key_file: file with the API key. Own servers without one get a random key. Never on a command line or in a log.
        push: how weights are sent: `distributed` (a process group of each sender and the servers) or, for own servers only, `disk`
            (a directory that all processes and servers see; whole models only).
        push_directory: where `disk` writes; the system's temporary directory if `null`.
        weight_backend: backend of the weight update group: `nccl`, `gloo`, or `auto` (nccl on CUDA). NCCL needs the server's GPU to
            be another one than the trainer's; gloo also works on a shared GPU.
        weight_bucket_bytes: weights travel in buckets of at most this size (a larger tensor is its own bucket).
        concurrency: responses in progress at once, over all engines.
        start_timeout_s: from process start to a healthy server. Raise it for large checkpoints.
        request_timeout_s: one attempt of one request; also one weight bucket.
        retries: further attempts after a refused or broken connection or an HTTP 429/5xx, while the server is alive.
        retry_backoff_s: pause before the first retry; doubles with each.
        rerolls: how often a response is retried after an invalid answer or a time-out.
        deadline_s: for a whole response: all turns, retries and waits for new weights; not the time before it is first sent.
        interrupt: what a weight update does to responses in progress: `abort` stops them and continues them under the new weights
            from what they have; `in_place` only pauses them, and they keep the old weights' KV cache.
        answer_bytes: answers that are being received or decoded at once, in bytes; engines wait beyond it.
        route_bytes: decoded routes kept in memory, in bytes; beyond it they go to a memory-mapped file.
        spill_directory: where that file lies (deleted with its last table); the system's temporary directory if `null`.
    """

    model_path: str | None = None
    urls: tuple[str, ...] = ()
    engines: int = 1
    router: str = "none"
    device: str = "auto"
    dtype: str = "auto"
    tp_size: int = 1
    ep_size: int = 1
    python: str | None = None
    bind: str = "127.0.0.1"
    first_gpu: int = 0
    allow_remote: bool = False
    max_running_requests: int = 32
    max_total_tokens: int | None = 16384
    extra_flags: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict, repr=False)
    log_path: str | None = None
    api_key_file: str | None = None
    push: str = "distributed"
    push_directory: str | None = None
    weight_backend: str = "auto"
    weight_bucket_bytes: int = 256 << 20
    concurrency: int = 64
    start_timeout_s: float = 300.0
    request_timeout_s: float = 600.0
    retries: int = 3
    retry_backoff_s: float = 0.5
    rerolls: int = 3
    deadline_s: float = 7200.0
    interrupt: str = "abort"
    answer_bytes: int = 1 << 30
    route_bytes: int = 8 << 30
    spill_directory: str | None = None

    def __post_init__(self) -> None:
        if (self.model_path is None) == (not self.urls):
            raise ConfigError("sglang: set exactly one of model_path (own servers) and urls (attach to running servers)")
        if self.push != "distributed" and self.urls:
            raise ConfigError(f"sglang.push={self.push!r} is for own servers; running ones get their weights by push='distributed'")
        if len(set(self.urls)) != len(self.urls):
            raise ConfigError(f"sglang.urls={list(self.urls)}: the same server is named twice")
        if self.urls and self.engines != 1:
            raise ConfigError(f"sglang.engines={self.engines}: the number of own servers; running ones are counted by urls")
        for url in (*self.urls, *({self.router} - {"none", "own"})):
            check_url(url, allow_remote=self.allow_remote, has_key=self.api_key_file is not None)
        if not is_loopback(self.bind) and self.api_key_file is None:
            raise ConfigError(
                f"sglang.bind={self.bind!r} lets other machines reach the server: set api_key_file, or use bind='127.0.0.1'"
            )
        if self.python is not None:
            find_python(self.python)
        for name, allowed in (
            ("device", ("auto", "cpu", "cuda")),
            ("weight_backend", ("auto", "nccl", "gloo")),
            ("interrupt", ("abort", "in_place")),
            ("push", ("distributed", "disk")),
        ):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"sglang.{name}={getattr(self, name)!r}: expected one of {', '.join(allowed)}")
        for setting in fields(self):
            name, value = setting.name, getattr(self, setting.name)
            if not _is_number(setting.default) or name == "max_total_tokens":
                continue
            least = "0 or more" if name in ("retries", "rerolls", "first_gpu") else "a positive number"
            if not _is_number(value) or value < 0 or (value == 0 and least != "0 or more"):
                raise ConfigError(f"sglang.{name}={value!r}: expected {least}")
        for flag in self.extra_flags:
            name = flag.split("=")[0]
            # argparse takes abbreviations: "--hos" would be a second --host. Those of secrets are refused by SGLangServer.
            longer = [own for own in _OWN_FLAGS if own.startswith(name) and own != "--api-key"]
            if name in _OWN_FLAGS or (len(name) > 3 and longer):
                raise ConfigError(f"sglang.extra_flags: {name} is set by the engine; use the field of SGLangConfig")

    def resolved_device(self) -> str:
        """What own servers run on; ConfigError for "cpu" where CUDA is available (the CPU adapters refuse), or "cuda" where not."""
        import torch  # only here: settings are checked before torch is imported

        cuda = torch.cuda.is_available()
        if self.device == "auto":
            return "cuda" if cuda else "cpu"
        if (self.device == "cuda") != cuda:
            raise ConfigError(
                f"sglang.device={self.device!r}, but CUDA is {'' if cuda else 'not '}available; use 'auto', "
                "or hide the GPUs with CUDA_VISIBLE_DEVICES='' for a CPU engine"
            )
        return self.device

    def client_settings(self) -> dict[str, Any]:
        """HttpClient's arguments of the same meaning."""
        return {
            "concurrency": self.concurrency,
            "timeout_s": self.request_timeout_s,
            "retries": self.retries,
            "backoff_s": self.retry_backoff_s,
        }

    def read_api_key(self) -> str | None:
        """The key in `api_key_file`, None without one; raises ConfigError if there is no key in it."""
        return None if self.api_key_file is None else read_key(self.api_key_file, "sglang.api_key_file=")


def read_key(file: str | Path, setting: str) -> str:
    """The key in a file; raises ConfigError if it cannot be read or holds no key."""
    try:
        key = Path(file).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{setting}{file}: {getattr(error, 'strerror', None) or 'not a text file'}") from error
    if not key or any(character.isspace() or not character.isascii() for character in key):
        raise ConfigError(f"{setting}{file} is empty, or more than one key; expected one, without blanks")
    return key


def server_environment(config: SGLangConfig) -> dict[str, str]:
    """Environment of the own server: this process's, made to find this package, to stay on loopback and off the network."""
    env = dict(os.environ)
    if is_loopback(config.bind):
        env["GLOO_SOCKET_IFNAME"] = "lo"
    if config.model_path is not None and Path(config.model_path).is_dir():
        env["HF_HUB_OFFLINE"] = "1"
    # The trainer's own rendezvous must not leak into the server's process groups.
    for name in ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK"):
        env.pop(name, None)
    for name in [name for name in env if name.startswith(("TORCHELASTIC_", "PET_"))]:
        env.pop(name)
    return package_environment({**env, **config.env})
