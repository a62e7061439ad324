"""The doctor: nothing wrong with a real engine, and by name what is wrong with servers that are broken in one way each."""

from __future__ import annotations

import base64
import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from megatron_pr2.cli import app
from megatron_pr2.rollout.doctor import reference as doctor_reference
from megatron_pr2.rollout.doctor.doctor import diagnose
from megatron_pr2.rollout.doctor.findings import Diagnosis, Finding, Status
from megatron_pr2.rollout.sglang.engine import SGLangEngine
from megatron_pr2.rollout.sglang.plugin import decode_rid
from tests.helpers.rounding import LOGPROB
from tests.sglang.conftest import SHAPE, TinyModel
from tests.sglang.fake_server import FakeServer, serve


@pytest.fixture
def fake() -> Iterator[FakeServer]:
    server = FakeServer()
    server.info |= {"skip_tokenizer_init": True, "dtype": "float32"}
    with serve(server):
        yield server


def the(diagnosis: Diagnosis, check: str) -> Finding:
    """The only finding of a check; the first problem where there are several."""
    found = [finding for finding in diagnosis.findings if finding.check == check]
    assert found, [finding.check for finding in diagnosis.findings]
    return found[0]


def expect(diagnosis: Diagnosis, check: str, status: Status, words: str = "", fix: str = "") -> None:
    finding = the(diagnosis, check)
    assert (finding.status, words in finding.detail, fix in finding.fix) == (status, True, True), finding


def statuses(diagnosis: Diagnosis) -> dict[str, str]:
    return {finding.check: finding.status.value for finding in diagnosis.findings}


def with_rows(fake: FakeServer, change: Callable[[np.ndarray, int], np.ndarray]) -> None:
    """From now on /generate returns changed routes; `change` gets [rows, layers, top-k] and the number of the call."""

    def override(body: dict[str, Any], call: int) -> tuple[int, Any]:
        answer = fake.generation(body)
        rows = np.frombuffer(base64.b64decode(answer["meta_info"]["routed_experts"]), "<i4").reshape(-1, 4, 4).copy()
        answer["meta_info"]["routed_experts"] = base64.b64encode(change(rows, call).astype("<i4").tobytes()).decode()
        return 200, answer

    fake.overrides["/generate"] = override


def with_meta(fake: FakeServer, **fields: Any) -> None:
    def override(body: dict[str, Any], call: int) -> tuple[int, Any]:
        answer = fake.generation(body)
        answer["meta_info"] |= fields
        return 200, answer

    fake.overrides["/generate"] = override


@pytest.mark.sglang
def test_nothing_is_wrong_with_a_real_engine(engine: SGLangEngine, tiny: TinyModel, tmp_path: Path) -> None:
    engine.update_weights(tiny.gates().items(), 1)
    replica = engine.replicas[0]
    key = tmp_path / "key"
    key.write_text(f"{replica.api_key}\n")
    result = CliRunner().invoke(app, ["doctor", "--engine", replica.url, "--model", tiny.path, "--api-key-file", str(key)])
    assert result.exit_code == 0, result.output
    report = json.loads(result.output.splitlines()[-1])
    assert report["ok"] is True
    found = {finding["check"]: finding for finding in report["engines"][0]["findings"]}
    assert {finding["status"] for finding in found.values()} == {"OK"}, found
    assert list(found) == [
        "reachable", "key", "version", "settings", "weight push", "model", "routes", "weight version",
        "prefix cache", "repetition", "handshake", "latency",
    ]  # fmt: skip
    assert "100.00% of the routes" in found["handshake"]["detail"]
    assert "it held 255 tokens" in found["prefix cache"]["detail"]
    assert "tokens/s" in found["latency"]["detail"]
    assert replica.api_key not in result.output


@pytest.mark.sglang
def test_a_real_engine_with_other_weights_fails_the_handshake(engine: SGLangEngine, tiny: TinyModel) -> None:
    replica = engine.replicas[0]
    engine.update_weights(tiny.merged_gates(seed=3).items(), 4)
    try:
        diagnosis = diagnose(replica.url, api_key=replica.api_key, model=Path(tiny.path))
    finally:
        engine.update_weights(tiny.gates().items(), 5)
    expect(diagnosis, "handshake", Status.FAIL, "of the probe's routes agree", "version 4 were pushed")


@pytest.mark.sglang
def test_the_key_is_asked_for_by_a_real_engine(engine: SGLangEngine) -> None:
    for key, said in ((None, "wants a key"), ("wrong", "refuses the key")):
        finding = the(diagnose(engine.replicas[0].url, api_key=key), "key")
        assert finding.status is Status.FAIL
        assert said in finding.detail
        assert "--api-key-file" in finding.fix


def test_transformers_routes_are_those_that_its_experts_were_handed(tiny: TinyModel) -> None:
    import torch

    ids = [3 + 11 * i % 250 for i in range(40)]
    probe = doctor_reference.score(Path(tiny.path), ids, SHAPE, torch.float32)
    routes, logprobs = tiny.routes_and_logprobs(ids)
    assert (np.sort(probe.routes.experts, axis=-1) == routes.numpy()).all()
    np.testing.assert_allclose(probe.logprobs, logprobs, atol=LOGPROB)
    assert doctor_reference.read_shape(Path(tiny.path)) == SHAPE


def test_nobody_answers() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
        result = CliRunner().invoke(app, ["doctor", "--engine", url])
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
    report = json.loads(result.output.splitlines()[-1])
    (finding,) = report["engines"][0]["findings"]
    assert (finding["check"], finding["status"]) == ("reachable", "FAIL")
    assert "ConnectError" in finding["detail"]
    assert "start the engine" in finding["fix"]


@pytest.mark.parametrize("url", ["127.0.0.1:30000", "ftp://127.0.0.1:1", "http://127.0.0.1", "http://user:secret@127.0.0.1:1"])
def test_a_malformed_url_is_a_finding_and_keeps_its_password(url: str) -> None:
    finding = the(diagnose(url), "reachable")
    assert finding.status is Status.FAIL
    assert "secret" not in finding.detail


def test_another_kind_of_server(fake: FakeServer) -> None:
    for status in (200, 404):
        fake.overrides["/health"] = lambda body, call, status=status: (status, b"<html>welcome</html>")
        for path in ("/server_info", "/get_server_info", "/workers"):
            fake.overrides[path] = lambda body, call: (200, b"<html>welcome</html>")
        fake.overrides["/workers"] = lambda body, call: (404, b"")
        diagnosis = diagnose(fake.url)
        assert diagnosis.failed
        assert diagnosis.findings[-1].check == "reachable"
        assert "no SGLang server" in diagnosis.findings[-1].fix


def test_an_engine_that_is_not_ready(fake: FakeServer) -> None:
    fake.overrides["/health"] = lambda body, call: (503, b"")
    expect(diagnose(fake.url), "reachable", Status.FAIL, "503", "starting")


def test_a_server_that_hangs_does_not_hang_the_doctor(fake: FakeServer) -> None:
    import time

    fake.overrides["/generate"] = lambda body, call: time.sleep(1.0)
    expect(diagnose(fake.url, timeout_s=0.2), "probes", Status.FAIL, "no answer within")


def test_a_key_file_that_cannot_be_used(fake: FakeServer, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.write_text("\n")
    for file in (tmp_path / "absent", empty):
        result = CliRunner().invoke(app, ["doctor", "--engine", fake.url, "--api-key-file", str(file)])
        assert result.exit_code == 1
        assert "--api-key-file" in result.output


@pytest.mark.parametrize(
    ("info", "check", "status", "words"),
    [
        ({}, "settings", Status.OK, "dtype=float32"),
        ({"version": "0.5.15"}, "version", Status.FAIL, "0.5.15"),
        ({"version": "0.6.1"}, "version", Status.WARN, "was not tested"),
        ({"version": "main"}, "version", Status.WARN, "'main'"),
        ({"enable_return_routed_experts": False}, "settings", Status.FAIL, "does not record routes"),
        ({"moe_runner_backend": "flashinfer_trtllm"}, "settings", Status.FAIL, "moe_runner_backend=flashinfer_trtllm"),
        ({"speculative_algorithm": "EAGLE"}, "settings", Status.FAIL, "speculative_algorithm=EAGLE"),
        ({"pp_size": 2}, "settings", Status.FAIL, "pp_size=2"),
        ({"skip_tokenizer_init": False}, "settings", Status.WARN, "decoded to text"),
        ({"load_format": "dummy"}, "settings", Status.WARN, "random weights"),
        ({"quantization": "fp8"}, "settings", Status.WARN, "quantization=fp8"),
        ({"device": "cuda"}, "settings", Status.WARN, "seeds"),
        ({"device": "cuda", "enable_deterministic_inference": True}, "settings", Status.OK, "dtype"),
        ({"tp_size": 4}, "weight push", Status.OK, "4 ranks of the engine, gloo"),
        ({"tp_size": None}, "weight push", Status.FAIL, "tp_size=None"),
    ],
)
def test_version_and_settings(fake: FakeServer, info: dict[str, Any], check: str, status: Status, words: str) -> None:
    fake.info.update(info)
    diagnosis = diagnose(fake.url)
    finding = the(diagnosis, check)
    assert (finding.status, words in finding.detail) == (status, True), finding
    assert diagnosis.failed == (status is Status.FAIL)
    assert bool(finding.fix) == (status is not Status.OK)


def test_without_a_model_the_size_of_the_routes_is_reported(fake: FakeServer) -> None:
    diagnosis = diagnose(fake.url)
    assert statuses(diagnosis)["model"] == "SKIP"
    assert "16 ids per token" in the(diagnosis, "routes").detail
    # Ids beyond a vocabulary that nobody knows would kill a real scheduler.
    assert max(max(body["input_ids"]) for body in fake.bodies) < 100


def constant(rows: np.ndarray, call: int) -> np.ndarray:
    return np.broadcast_to(np.arange(4), rows.shape)


def zero_layer(rows: np.ndarray, call: int) -> np.ndarray:
    rows[:, 2] = 0
    return rows


def out_of_range(rows: np.ndarray, call: int) -> np.ndarray:
    rows[5, 1, 0] = 16
    return rows


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda rows, call: rows[:, :3], "= 12 per token, expected 4 x 4"),
        (lambda rows, call: rows[:-1], "expected 4 x 4"),
        (out_of_range, "1 of 256 tokens have duplicate or out-of-range"),
        (zero_layer, r"256 of 256 tokens .*layers [2] hold zeros only"),
        (constant, "all tokens have the same routes"),
    ],
)
def test_routes_that_are_none(fake: FakeServer, tiny: TinyModel, change: Callable[..., np.ndarray], words: str) -> None:
    with_rows(fake, change)
    fake.info["model_path"] = tiny.path  # readable here, so --model is not needed for this
    diagnosis = diagnose(fake.url)
    finding = the(diagnosis, "routes")
    assert finding.status is Status.FAIL
    assert all(word in finding.detail for word in words.split(" .*")), finding.detail
    assert "handshake" not in statuses(diagnosis)


def test_dense_layers_must_hold_zeros(fake: FakeServer, tiny: TinyModel, tmp_path: Path) -> None:
    config = json.loads((Path(tiny.path) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"mlp_only_layers": [1]}))
    expect(diagnose(fake.url, model=tmp_path), "routes", Status.FAIL, "layers [1] are dense")

    def honest(rows: np.ndarray, call: int) -> np.ndarray:
        rows[:, 1] = 0
        return rows

    with_rows(fake, honest)
    assert the(diagnose(fake.url, model=tmp_path), "routes").status is Status.OK


def test_routes_of_another_model_fail_the_handshake(fake: FakeServer, tiny: TinyModel) -> None:
    expect(diagnose(fake.url, model=Path(tiny.path)), "handshake", Status.FAIL, "routes agree")


@pytest.mark.parametrize(("share", "status"), [(0.02, Status.WARN), (0.5, Status.FAIL)])
def test_routes_that_do_not_repeat(fake: FakeServer, share: float, status: Status) -> None:
    def change(rows: np.ndarray, call: int) -> np.ndarray:
        if call % 2:
            rows[: max(1, int(share * len(rows)))] += 1
        return rows

    with_rows(fake, change)
    expect(diagnose(fake.url), "repetition", status, "%")


@pytest.mark.parametrize("told", [True, False])
def test_a_busy_engine_is_not_flushed(fake: FakeServer, told: bool) -> None:
    """Whether it tells of its load, or only refuses the flush."""
    if told:
        fake.overrides["/v1/loads"] = lambda body, call: (200, {"loads": [{"num_running_reqs": 2, "num_waiting_reqs": 1}]})
    else:
        fake.overrides["/flush_cache"] = lambda body, call: (400, b"there are running requests")
    diagnosis = diagnose(fake.url)
    expect(diagnosis, "prefix cache", Status.SKIP, fix="idle")
    assert not diagnosis.failed
    assert fake.calls.get("/flush_cache", 0) == (0 if told else 1)
    assert ("beside 3 others" in the(diagnosis, "latency").detail) == told


@pytest.mark.parametrize(
    ("meta", "check", "status", "words"),
    [
        ({"routed_experts": None}, "routes", Status.FAIL, "returns none"),
        ({"routed_experts": "!!!!"}, "routes", Status.FAIL, "not valid base64"),
        ({"cached_tokens": 47}, "prefix cache", Status.FAIL, "47 tokens"),
        ({"weight_version": "7"}, "weight version", Status.OK, "7"),
        ({"weight_version": "default"}, "weight version", Status.WARN, "'default'"),
        ({"weight_version": None}, "weight version", Status.FAIL, ""),
    ],
)
def test_fields_of_answers(fake: FakeServer, meta: dict[str, Any], check: str, status: Status, words: str) -> None:
    with_meta(fake, **meta)
    expect(diagnose(fake.url), check, status, words)


def test_a_model_directory_that_is_none(fake: FakeServer, tmp_path: Path) -> None:
    expect(diagnose(fake.url, model=tmp_path), "model", Status.FAIL, "config.json")


def test_a_model_that_does_not_fit_is_not_loaded(fake: FakeServer, tiny: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_reference, "_free_bytes", lambda: 1000)
    monkeypatch.setattr(doctor_reference, "score", lambda *args: pytest.fail("loaded although it does not fit"))
    expect(diagnose(fake.url, model=Path(tiny.path)), "handshake", Status.SKIP, "GB")


def make_router(fake: FakeServer, *, plugin: bool, healthy: bool = True, key: bool = False) -> None:
    """The fake becomes sglang-router 0.3.2: it knows some paths only, and drops fields that it does not know."""
    fake.overrides["/server_info"] = lambda body, call: (404, b"")
    fake.overrides["/get_server_info"] = lambda body, call: (200, {"router_manager": True, "workers_count": 1})
    workers = {"workers": [{"url": "http://127.0.0.1:9", "is_healthy": healthy}]}
    fake.overrides["/workers"] = lambda body, call: (401, b"") if key else (200, workers)

    def generate(body: dict[str, Any], call: int) -> tuple[int, Any]:
        answer = fake.generation(body)
        if not (plugin and decode_rid(body.get("rid")) is not None):
            answer["meta_info"].pop("routed_experts")
        return 200, answer

    fake.overrides["/generate"] = generate


def test_a_stock_router_is_named_as_the_cause(fake: FakeServer) -> None:
    make_router(fake, plugin=False)
    diagnosis = diagnose(fake.url)
    expect(diagnosis, "routes", Status.FAIL, "router drops", "engines' own URLs")
    assert "http://127.0.0.1:9" in the(diagnosis, "router").detail


def test_a_router_before_engines_with_the_plugin(fake: FakeServer) -> None:
    make_router(fake, plugin=True)
    diagnosis = diagnose(fake.url)
    assert "request id" in the(diagnosis, "routes").detail
    assert not diagnosis.failed
    assert statuses(diagnosis)["weight push"] == "SKIP"


def test_a_router_that_refuses_or_has_no_engines(fake: FakeServer) -> None:
    make_router(fake, plugin=True, key=True)
    assert the(diagnose(fake.url), "key").status is Status.FAIL
    make_router(fake, plugin=True, healthy=False)
    expect(diagnose(fake.url), "router", Status.FAIL, "not healthy: http://127.0.0.1:9")


def test_several_engines_and_json_only(fake: FakeServer) -> None:
    with serve(FakeServer()) as sick:
        sick.overrides["/health"] = lambda body, call: (503, b"")
        result = CliRunner().invoke(app, ["doctor", "--engine", fake.url, "--engine", sick.url, "--json"])
    assert result.exit_code == 1
    (line,) = result.output.splitlines()
    report = json.loads(line)
    assert report["ok"] is False
    assert [(engine["url"], engine["ok"]) for engine in report["engines"]] == [(fake.url, True), (sick.url, False)]


def test_the_table_names_check_status_and_fix(fake: FakeServer) -> None:
    fake.info["version"] = "0.5.15"
    result = CliRunner().invoke(app, ["doctor", "--engine", fake.url])
    assert result.exit_code == 1
    table = result.output[: result.output.rindex('{"ok"')]
    for words in ("check", "what to do", "version", "FAIL", "0.5.15"):
        assert words in table
