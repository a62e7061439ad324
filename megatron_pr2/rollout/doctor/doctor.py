"""The doctor: examines a running SGLang server (or router) and reports what prevents replaying its routes, and what to do.

Safe beside other requests: it sends a dozen probes, changes no weights, and flushes the prefix cache only while the server is idle
(SGLang refuses a flush otherwise, too).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_pr2.errors import ConfigError, PR2Error, RolloutError
from megatron_pr2.hf.shape import ModelShape
from megatron_pr2.rollout.doctor import reference
from megatron_pr2.rollout.doctor.client import EngineClient, Reply
from megatron_pr2.rollout.doctor.findings import Diagnosis, Finding, Status
from megatron_pr2.rollout.doctor.probes import Probes
from megatron_pr2.rollout.sglang.push.session import weight_group_size
from megatron_pr2.rollout.sglang.refusals import FIRST_RELEASE, TESTED, TESTED_RELEASES, parse_release, refusals
from megatron_pr2.rollout.sglang.wire import parse_version

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
            diagnosis.findings.extend(_examination(client, model))
    except ConfigError as error:
        diagnosis.findings.append(Finding("reachable", Status.FAIL, str(error), "correct the URL"))
    return diagnosis


def _examination(client: EngineClient, model: Path | None) -> Iterator[Finding]:
    """The checks, in order; each relies on what the earlier ones found."""
    try:
        finding = _reachable(client)
        yield finding
        if finding.status is Status.FAIL:
            return
        reply = client.request("GET", "/server_info")
        info = reply.parsed()
        finding, router = _identified(client, reply)
        yield finding
        if finding.status is Status.FAIL:
            return
    except RolloutError as error:
        yield Finding("reachable", Status.FAIL, f"no answer: {error}", "start the engine, or correct the address")
        return
    if router:
        yield Finding("version", Status.SKIP, "a router does not tell", _OWN_URLS)
        yield Finding("weight push", Status.SKIP, "weights go to the engines themselves", _OWN_URLS)
    else:
        yield _version(info.get("version"))
        yield from _settings(info)
        yield _weight_push(info, client.private)
    finding, shape = _shape(info.get("model_path"), model)
    yield finding
    probes = Probes(client, shape, router=router)
    try:
        finding = probes.routes()
        yield finding
        yield _weight_version(probes.label)
        if finding.status is Status.OK:
            yield from probes.repetition()
            if shape is not None and model is not None:
                yield probes.handshake(model, str(info.get("dtype")))
            else:
                fix = "--model DIR compares routes and log-probs"
                yield Finding("handshake", Status.SKIP, "there is nothing to compare with", fix)
        yield probes.latency()
    except PR2Error as error:
        yield Finding("probes", Status.FAIL, str(error), "look at the server's log")


def _reachable(client: EngineClient) -> Finding:
    reply = client.request("GET", "/health")
    if reply.status not in (200, 401):
        fix = _NOT_SGLANG if reply.status == 404 else "the engine is starting, paused or dead: wait, or look at its log"
        return Finding("reachable", Status.FAIL, f"/health answers {reply}", fix)
    if client.private:
        return Finding("reachable", Status.OK, "/health answers")
    return Finding("reachable", Status.WARN, "another host, without encryption", "https (TLS in front of it), or a tunnel")


def _identified(client: EngineClient, reply: Reply) -> tuple[Finding, bool]:
    """Whether what answered /server_info is an SGLang server or router that accepts our key; and whether it is a router."""
    if "version" in reply.parsed():
        return Finding("key", Status.OK, "accepted" if client.has_key else "none is needed"), False
    refused = "refuses the key" if client.has_key else "wants a key"
    if reply.status in (401, 403):
        return Finding("key", Status.FAIL, f"the server {refused}", _GIVE_KEY), False
    workers = client.request("GET", "/workers")
    router = "router_manager" in client.request("GET", "/get_server_info").parsed() or workers.status in (200, 401)
    if not router:
        return Finding("reachable", Status.FAIL, f"/server_info answers {reply}", _NOT_SGLANG), False
    if workers.status != 200:
        return Finding("key", Status.FAIL, f"an SGLang router, which {refused}", _GIVE_KEY), True
    listed = workers.parsed().get("workers")
    engines = [worker for worker in listed if isinstance(worker, Mapping)] if isinstance(listed, list) else []
    sick = [str(engine.get("url")) for engine in engines if not engine.get("is_healthy")]
    text = f"an SGLang router in front of {len(engines)} engines: {', '.join(str(e.get('url')) for e in engines[:8])}"
    if engines and not sick:
        return Finding("router", Status.OK, text), True
    text += f"; not healthy: {', '.join(sick[:8]) or 'none registered'}"
    return Finding("router", Status.FAIL, text, "start the engines"), True


def _version(version: Any) -> Finding:
    text, untested = f"SGLang {version}", f"tested: {TESTED}; trust the handshake (--model)"
    try:
        release = parse_release(version, "the server")[:3]
    except RolloutError as error:
        return Finding("version", Status.WARN, str(error), untested)
    if release < FIRST_RELEASE:
        return Finding("version", Status.FAIL, f"{text}: releases of that age return wrong routes silently", f"use {TESTED}")
    if release not in TESTED_RELEASES:
        return Finding("version", Status.WARN, f"{text} was not tested", untested)
    return Finding("version", Status.OK, text)


def _settings(info: Mapping[str, Any]) -> list[Finding]:
    found = []
    for refused in refusals(info):
        setting, _, remedy = refused.partition("; use ")
        found.append((Status.FAIL, setting, f"use {remedy}"))
    if not info.get("enable_return_routed_experts"):
        found.append((Status.FAIL, "the engine does not record routes", "start it with --enable-return-routed-experts"))
    if not info.get("skip_tokenizer_init"):
        found.append((Status.WARN, "every response is decoded to text, which nobody reads", "--skip-tokenizer-init"))
    if info.get("load_format") == "dummy":
        found.append((Status.WARN, "load_format=dummy: random weights until the first push", "push before comparing"))
    if quantization := info.get("quantization"):
        detail = f"quantization={quantization}: the engine computes with other weights than the trainer's"
        found.append((Status.WARN, detail, "run it unquantized, or expect less agreement"))
    if info.get("device") != "cpu" and not info.get("enable_deterministic_inference"):
        found.append((Status.WARN, "seeds of requests are ignored", "--enable-deterministic-inference if reruns must repeat"))
    if not found:
        found.append((Status.OK, f"dtype={info.get('dtype')}, moe_runner_backend={info.get('moe_runner_backend')}", ""))
    return [Finding("settings", *each) for each in found]


def _weight_push(info: Mapping[str, Any], private: bool) -> Finding:
    try:
        ranks = weight_group_size(info, "the server") - 1
    except RolloutError as error:
        return Finding("weight push", Status.FAIL, str(error), f"use {TESTED}")
    detail = f"a group of this process and {ranks} {'rank' if ranks == 1 else 'ranks'} of the engine"
    detail += ", gloo" if info.get("device") == "cpu" else ", nccl"
    if private:
        return Finding("weight push", Status.OK, detail)
    return Finding("weight push", Status.WARN, f"{detail}, unencrypted over the network", "only in a network that you trust")


def _shape(served: Any, model: Path | None) -> tuple[Finding, ModelShape | None]:
    """The shape from --model, else from the server's own path if it can be read here."""
    path = model or (Path(served) if isinstance(served, str) and Path(served).is_dir() else None)
    if path is None:
        detail = f"its config cannot be read here ({served})"
        return Finding("model", Status.SKIP, detail, "--model DIR checks layers and experts"), None
    try:
        shape = reference.read_shape(path)
    except ConfigError as error:
        return Finding("model", Status.FAIL, str(error), "give the directory of the checkpoint that the engine runs"), None
    layers = f"{shape.num_hidden_layers} layers, {len(shape.moe_layers)} with experts"
    return Finding("model", Status.OK, f"{layers}; {shape.num_experts} experts, top-{shape.topk} ({path}/config.json)"), shape


def _weight_version(label: Any) -> Finding:
    if label is None:
        return Finding("weight version", Status.FAIL, "responses carry none", f"use SGLang {TESTED}")
    if parse_version(label) < 0:
        fix = "nothing to do before the first push; after one, somebody else updates this server"
        return Finding("weight version", Status.WARN, f"{label!r}: no weights of this package", fix)
    return Finding("weight version", Status.OK, f"{label}, on every response")
