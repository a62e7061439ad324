"""SGLangRouter: SGLang's own router (package sglang-router, measured with 0.3.2) in front of several servers, as a child of ours.

What a client has to know of it is in docs/sglang.md. Requests that concern one server (/model_info, /abort_request, pauses, weight
updates) answer 404 here; /flush_cache goes to all servers. When a client closes its connection, it closes the one to the server.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx

from megatron_pr2.errors import ConfigError, RolloutError
from megatron_pr2.rollout.sglang.child_process import ChildProcess, base_url, reserved_port
from megatron_pr2.rollout.sglang.config import is_loopback
from megatron_pr2.rollout.sglang.gateway.launch import API_KEY_VARIABLE
from megatron_pr2.rollout.sglang.python import check_module, find_python, package_environment

logger = logging.getLogger(__name__)

LAUNCHER = "megatron_pr2.rollout.sglang.gateway.launch"


class SGLangRouter(ChildProcess):
    """One router.

    Args:
        worker_urls: base URLs of the servers behind it.
        api_key: what clients have to present to the router, and what it presents to the servers; None if they want none.
        python: interpreter of an environment with sglang-router; found by find_python() if None.
        policy: how a server is chosen: "cache_aware" is the one that has seen the beginning of the prompt, unless it has more to
            do than the others. power_of_two asks for the load under an address that SGLang 0.5.23 no longer has.
        bind: IP address to listen on, or "localhost". An address beyond this machine needs an api_key.
        start_timeout_s: from process start until every server is registered.
    """

    def __init__(
        self,
        worker_urls: Sequence[str],
        *,
        api_key: str | None,
        python: str | None = None,
        policy: str = "cache_aware",
        bind: str = "127.0.0.1",
        log_path: str | Path | None = None,
        start_timeout_s: float = 60.0,
    ) -> None:
        try:
            self._address = str(ipaddress.ip_address("127.0.0.1" if bind == "localhost" else bind))
        except ValueError as error:
            raise ConfigError(f"router: bind={bind!r}: expected an IP address, e.g. 127.0.0.1") from error
        if api_key is None and not is_loopback(self._address):
            raise ConfigError(f"router: bind={bind!r} lets other machines reach it: give an api_key, or use bind='127.0.0.1'")
        self._python = find_python(python, module="sglang_router")
        check_module(self._python, "sglang_router", "pip install sglang-router==0.3.2 there, or use router='none'")
        self.worker_urls = [url.rstrip("/") for url in worker_urls]
        self.policy = policy
        self.url = ""
        self._api_key = api_key
        self._start_timeout_s = start_timeout_s
        super().__init__("SGLang router", log_path=log_path, secrets=[api_key])

    def settings(self, port: int, metrics_port: int) -> dict[str, Any]:
        """The fields of sglang_router's RouterArgs that differ from, or must not depend on, its defaults; no secret."""
        return {
            "worker_urls": self.worker_urls,
            "policy": self.policy,
            "host": self._address,
            "port": port,
            # Its default port is one for the whole machine, and a second router could not start.
            "prometheus_host": "127.0.0.1",
            "prometheus_port": metrics_port,
            # An empty list would let every web page that a browser on this machine shows call the router.
            "cors_allowed_origins": [base_url(self._address, port)],
            # Its log names every request at "info".
            "log_level": "warn",
            "history_backend": "none",
            # With the defaults (0.3, 64, 1.5) 64 prompts with one system message all went to one of four servers; with these 14,
            # 14, 14 and 22.
            "cache_threshold": 0.5,
            "balance_abs_threshold": 8,
            "balance_rel_threshold": 1.1,
            "max_payload_size": 512 * 1024 * 1024,
            # Longer than the client's own deadline, which should be the one that fires: the client knows what it waits for.
            "request_timeout_secs": 4 * 3600,
            "max_concurrent_requests": -1,  # the client bounds its own concurrency, and a queue here would hide it
            # The client retries: it knows what may be repeated. A retry by the router would reach a server that still works on the
            # first attempt, under the same request id.
            "disable_retries": True,
            # /health generates a token, so a server fails it while it is paused for a weight update or in a long prefill.
            # /model_info is answered by the process that ends with its engine.
            "health_check_endpoint": "/model_info",
            "health_check_interval_secs": 5,
            "health_check_timeout_secs": 10,
            "health_failure_threshold": 3,
            "health_success_threshold": 1,
            # A dead server refuses immediately, so it looks idle and attracts every request until its circuit opens. Every status
            # but 2xx counts as a failure, the client's own errors included, so the circuit also closes soon.
            "cb_failure_threshold": 5,
            "cb_success_threshold": 1,
            "cb_timeout_duration_secs": 5,
            "cb_window_duration_secs": 60,
            "worker_startup_timeout_secs": max(1, round(self._start_timeout_s)),
            "worker_startup_check_interval": 1,
            # On SIGTERM it waits this long for requests in flight, which are no longer needed.
            "shutdown_grace_period_secs": 1,
        }

    def start(self) -> None:
        """Starts the router and returns when every server is registered and healthy; nothing is left running after a failure."""
        if self.alive():
            return
        self.stop()
        began = time.monotonic()
        with reserved_port(self._address) as port, reserved_port() as metrics_port:
            self.url = base_url(self._address, port)
            command = [self._python, "-m", LAUNCHER, json.dumps(self.settings(port, metrics_port))]
            try:
                self.spawn(command, _environment(self._api_key))
                self._wait_for(set(self.worker_urls), began + self._start_timeout_s)
            except BaseException:
                self.stop()
                raise
        logger.info(
            "SGLang router ready at %s after %.1f s, %d servers behind it, log in %s",
            self.url, time.monotonic() - began, len(self.worker_urls), self.log_path,
        )  # fmt: skip

    def healthy_workers(self) -> list[str]:
        """Base URLs of the servers that the router takes for healthy; raises RolloutError if it does not answer."""
        return [url for url, worker in self._workers().items() if worker.get("is_healthy")]

    def replace_worker(self, old_url: str, new_url: str) -> None:
        """Takes one server out and another in, as after a restart under another port; waits until the new one is registered."""
        worker = self._workers().get(old_url)
        if worker is not None:
            self._request("DELETE", f"/workers/{quote(str(worker['id']), safe='')}")
        self._request("POST", "/workers", {"url": new_url} | ({"api_key": self._api_key} if self._api_key else {}))
        self.worker_urls[self.worker_urls.index(old_url)] = new_url
        self._wait_for({new_url}, time.monotonic() + self._start_timeout_s)

    def _wait_for(self, urls: set[str], deadline: float) -> None:
        missing = urls

        def registered() -> bool:
            nonlocal missing
            with contextlib.suppress(RolloutError):  # it does not listen yet
                missing = urls - set(self.healthy_workers())
                return not missing
            return False

        def late() -> str:
            return (
                f"SGLang router: not registered after {self._start_timeout_s:g} s: {', '.join(sorted(missing))}; look whether they "
                "run and have the same API key, or raise start_timeout_s"
            )

        self.await_ready(registered, deadline, late)

    def _workers(self) -> dict[str, dict[str, Any]]:
        """What the router says of each server, by base URL."""
        answer = self._request("GET", "/workers")
        workers = answer.get("workers") if isinstance(answer, dict) else None
        if not isinstance(workers, list):
            raise RolloutError(
                f"SGLang router: /workers answered {str(answer)[:200]}, expected a list of servers; use sglang-router 0.3.2"
            )
        return {str(worker.get("url")).rstrip("/"): worker for worker in workers if isinstance(worker, dict)}

    def _request(self, method: str, path: str, payload: dict[str, Any] | None = None) -> Any:
        headers = {"Authorization": f"Bearer {self._api_key}"} if self._api_key else {}
        try:
            # trust_env=False: a proxy of the environment must see neither the requests nor the key.
            with httpx.Client(trust_env=False, timeout=10.0, headers=headers) as client:
                response = client.request(method, self.url + path, json=payload)
            if response.status_code // 100 == 2:
                return response.json() if response.content else None
        except (httpx.HTTPError, ValueError) as error:
            raise RolloutError(f"SGLang router: {method} {path} failed: {type(error).__name__}: {error}") from error
        raise RolloutError(f"SGLang router: {method} {path} was refused with HTTP {response.status_code}: {response.text[:500]}")


def _environment(api_key: str | None) -> dict[str, str]:
    """This process's environment, with the key and without what would lead the router out of this cluster."""
    env = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    # For every model that a server names by a hub id it downloads a tokenizer, which requests made of token ids do not need, and no
    # setting turns that off: so the hub is an address without a listener.
    env["HF_ENDPOINT"] = "http://127.0.0.1:9"
    env["NO_COLOR"] = "1"
    if api_key:
        env[API_KEY_VARIABLE] = api_key
    return package_environment(env)
