"""The doctor: examines a running SGLang server (or router) and reports what prevents replaying its routes, and what to do.

Safe beside other requests: it sends a dozen probes, changes no weights, and flushes the prefix cache only while the server is idle
(SGLang refuses a flush otherwise, too).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_pr2.errors import ConfigError, PR2Error, RolloutError
from megatron_pr2.hf.shape import ModelShape
from megatron_pr2.rollout.doctor import reference
from megatron_pr2.rollout.doctor.client import EngineClient, Reply
from megatron_pr2.rollout.doctor.findings import Diagnosis
from megatron_pr2.rollout.doctor.probes import Probes
from megatron_pr2.rollout.sglang.info import FIRST_RELEASE, TESTED, TESTED_RELEASES, weight_group_size
from megatron_pr2.rollout.sglang.refusals import refusals
from megatron_pr2.rollout.sglang.wire import parse_release, parse_version

_GIVE_KEY = "give the file with its key as --api-key-file"
_NOT_SGLANG = "this is no SGLang server: check host and port"
_OWN_URLS = "run the doctor on the engines' own URLs too"


def diagnose(url: str, *, api_key: str | None = None, model: Path | None = None, timeout_s: float = 60.0) -> Diagnosis:
    """Examines one server; never raises for anything that the server does.

    Args:
        model: directory of the checkpoint that it runs; compares against Transformers if given.
        timeout_s: for one request.
    """
    diagnosis = Diagnosis(url)
    try:
        with EngineClient(url, api_key=api_key, timeout_s=timeout_s) as client:
            _Examination(client, diagnosis, model).run()
    except ConfigError as error:
        diagnosis.fail("reachable", str(error), "correct the URL")
    return diagnosis


class _Examination:
    """The checks, in order; each relies on what the earlier ones found."""

    def __init__(self, client: EngineClient, diagnosis: Diagnosis, model: Path | None) -> None:
        self._client = client
        self._ok, self._warn, self._fail, self._skip = diagnosis.ok, diagnosis.warn, diagnosis.fail, diagnosis.skip
        self._diagnosis = diagnosis
        self._model = model
        self._router = False
        self._info: dict[str, Any] = {}

    def run(self) -> None:
        try:
            if not self._reachable() or not self._identified():
                return
        except RolloutError as error:
            self._fail("reachable", f"no answer: {error}", "start the engine, or correct the address")
            return
        if self._router:
            self._skip("version", "a router does not tell", _OWN_URLS)
            self._skip("weight push", "weights go to the engines themselves", _OWN_URLS)
        else:
            self._version()
            self._settings()
            self._weight_push()
        shape = self._shape()
        probes = Probes(self._client, self._diagnosis, shape, router=self._router)
        try:
            probes.routes()
            self._weight_version(probes.label)
            if probes.routes_fit:
                probes.repetition()
                if shape is not None and self._model is not None:
                    probes.handshake(self._model, str(self._info.get("dtype")))
                else:
                    self._skip("handshake", "there is nothing to compare with", "--model DIR compares routes and log-probs")
            probes.latency()
        except PR2Error as error:
            self._fail("probes", str(error), "look at the server's log")

    def _reachable(self) -> bool:
        reply = self._client.request("GET", "/health")
        if reply.status not in (200, 401):
            fix = _NOT_SGLANG if reply.status == 404 else "the engine is starting, paused or dead: wait, or look at its log"
            self._fail("reachable", f"/health answers {reply}", fix)
            return False
        if self._client.private:
            self._ok("reachable", "/health answers")
        else:
            self._warn("reachable", "another host, without encryption", "https (TLS in front of it), or a tunnel")
        return True

    def _identified(self) -> bool:
        """Whether it is an SGLang server or router that accepts our key."""
        reply = self._client.request("GET", "/server_info")
        self._info = reply.parsed()
        if "version" in self._info:
            self._ok("key", "accepted" if self._client.has_key else "none is needed")
            return True
        refused = "refuses the key" if self._client.has_key else "wants a key"
        if reply.status in (401, 403):
            self._fail("key", f"the server {refused}", _GIVE_KEY)
            return False
        workers = self._client.request("GET", "/workers")
        self._router = "router_manager" in self._client.request("GET", "/get_server_info").parsed() or workers.status in (200, 401)
        if not self._router:
            self._fail("reachable", f"/server_info answers {reply}", _NOT_SGLANG)
        elif workers.status != 200:
            self._fail("key", f"an SGLang router, which {refused}", _GIVE_KEY)
        else:
            return self._has_engines(workers)
        return False

    def _has_engines(self, workers: Reply) -> bool:
        listed = workers.parsed().get("workers")
        engines = [worker for worker in listed if isinstance(worker, Mapping)] if isinstance(listed, list) else []
        sick = [str(engine.get("url")) for engine in engines if not engine.get("is_healthy")]
        text = f"an SGLang router in front of {len(engines)} engines: {', '.join(str(e.get('url')) for e in engines[:8])}"
        if not engines or sick:
            self._fail("router", f"{text}; not healthy: {', '.join(sick[:8]) or 'none registered'}", "start the engines")
            return False
        self._ok("router", text)
        return True

    def _version(self) -> None:
        text = f"SGLang {self._info.get('version')}"
        untested = f"tested: {TESTED}; trust the handshake (--model)"
        try:
            release = parse_release(self._info.get("version"), "the server")[:3]
        except RolloutError as error:
            self._warn("version", str(error), untested)
            return
        if release < FIRST_RELEASE:
            self._fail("version", f"{text}: releases of that age return wrong routes silently", f"use {TESTED}")
        elif release not in TESTED_RELEASES:
            self._warn("version", f"{text} was not tested", untested)
        else:
            self._ok("version", text)

    def _settings(self) -> None:
        info = self._info
        before = len(self._diagnosis.findings)
        for refused in refusals(info):
            setting, _, remedy = refused.partition("; use ")
            self._fail("settings", setting, f"use {remedy}")
        if not info.get("enable_return_routed_experts"):
            self._fail("settings", "the engine does not record routes", "start it with --enable-return-routed-experts")
        seeds_ignored = info.get("device") != "cpu" and not info.get("enable_deterministic_inference")
        other_weights = f"quantization={info.get('quantization')}: the engine computes with other weights than the trainer's"
        for warned, detail, fix in (
            (not info.get("skip_tokenizer_init"), "every response is decoded to text, which nobody reads", "--skip-tokenizer-init"),
            (info.get("load_format") == "dummy", "load_format=dummy: random weights until the first push", "push before comparing"),
            (info.get("quantization"), other_weights, "run it unquantized, or expect less agreement"),
            (seeds_ignored, "seeds of requests are ignored", "--enable-deterministic-inference if reruns must repeat"),
        ):
            if warned:
                self._warn("settings", detail, fix)
        if len(self._diagnosis.findings) == before:
            self._ok("settings", f"dtype={info.get('dtype')}, moe_runner_backend={info.get('moe_runner_backend')}")

    def _weight_push(self) -> None:
        try:
            ranks = weight_group_size(self._info, "the server") - 1
        except RolloutError as error:
            self._fail("weight push", str(error), f"use {TESTED}")
            return
        detail = f"a group of this process and {ranks} {'rank' if ranks == 1 else 'ranks'} of the engine"
        detail += ", gloo" if self._info.get("device") == "cpu" else ", nccl"
        if self._client.private:
            self._ok("weight push", detail)
        else:
            self._warn("weight push", f"{detail}, unencrypted over the network", "only in a network that you trust")

    def _shape(self) -> ModelShape | None:
        """The shape from --model, else from the server's own path if it can be read here."""
        served = self._info.get("model_path")
        path = self._model or (Path(served) if isinstance(served, str) and Path(served).is_dir() else None)
        if path is None:
            self._skip("model", f"its config cannot be read here ({served})", "--model DIR checks layers and experts")
            return None
        try:
            shape = reference.read_shape(path)
        except ConfigError as error:
            self._fail("model", str(error), "give the directory of the checkpoint that the engine runs")
            return None
        layers = f"{shape.num_hidden_layers} layers, {len(shape.moe_layers)} with experts"
        self._ok("model", f"{layers}; {shape.num_experts} experts, top-{shape.topk} ({path}/config.json)")
        return shape

    def _weight_version(self, label: Any) -> None:
        if label is None:
            self._fail("weight version", "responses carry none", f"use SGLang {TESTED}")
        elif parse_version(label) < 0:
            fix = "nothing to do before the first push; after one, somebody else updates this server"
            self._warn("weight version", f"{label!r}: no weights of this package", fix)
        else:
            self._ok("weight version", f"{label}, on every response")
