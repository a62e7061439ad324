"""Both supported releases of SGLang, each against Transformers: what the package relies on is there and right in either.

The older one runs in an environment of its own (`make sglang-0.5.19`): VENV-sglang-0.5.19 for this interpreter's VENV, or what
MEGATRON_PR2_SGLANG_0519 names.
"""

from __future__ import annotations

import base64
import os
import pickle
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from megatron_pr2.rollout.base import RolloutRequest, SamplingParams
from megatron_pr2.rollout.sglang.engine import SGLangEngine
from megatron_pr2.rollout.sglang.python import package_environment
from megatron_pr2.rollout.sglang.refusals import TESTED_RELEASES
from tests.helpers.rounding import LOGPROB
from tests.sglang.conftest import SHAPE, TinyModel, own_server
from tests.sglang.test_engine import assert_matches, make_requests

pytestmark = pytest.mark.sglang

VARIABLE = "MEGATRON_PR2_SGLANG_0519"


def interpreter_of_0519() -> str:
    """The interpreter of the 0.5.19 environment; skips the test where there is none."""
    named = os.environ.get(VARIABLE)
    python = Path(named or f"{sys.prefix}-sglang-0.5.19/bin/python")
    if not python.exists():
        assert not named, f"{VARIABLE}={named}: no such file"
        pytest.skip(f"no environment with SGLang 0.5.19 at {python}; build it with 'make sglang-0.5.19' or set {VARIABLE}")
    return str(python)


class RunsCode:
    """Unpickling it makes a directory."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.path,)


@pytest.fixture(scope="module", params=["0.5.19", "0.5.23"])
def release(request: pytest.FixtureRequest, tiny: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SGLangEngine]:
    """A running engine of either release, holding the gates of the checkpoint at first."""
    if request.param == "0.5.23":
        yield request.getfixturevalue("engine")
        return
    python = interpreter_of_0519()
    request.getfixturevalue("preloaded")
    folder = tmp_path_factory.mktemp("old")
    model = shutil.copytree(tiny.path, folder / "model")
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(RunsCode(str(folder / "it ran"))))
    engine = SGLangEngine(own_server(str(model), folder / "sglang.log", python=python), SHAPE)
    engine.start()
    assert not (folder / "it ran").exists(), "a pickle beside the safetensors was loaded"
    yield engine
    engine.close()


def post(engine: SGLangEngine, path: str, body: dict[str, Any]) -> Any:
    replica = engine.replicas[0]
    headers = {"Authorization": f"Bearer {replica.api_key}"}
    answer = httpx.post(f"{replica.url}{path}", json=body, headers=headers, timeout=120.0, trust_env=False)
    assert answer.status_code == 200, answer.text
    return answer.json() if path == "/generate" else answer.text


def generate(engine: SGLangEngine, prompt: list[int], new_tokens: int, **fields: Any) -> dict[str, Any]:
    sampling = {"max_new_tokens": new_tokens, "temperature": 1.0, "ignore_eos": True, "sampling_seed": 5}
    body = {"input_ids": prompt, "sampling_params": sampling, "return_logprob": True, "return_routed_experts": True}
    answer: dict[str, Any] = post(engine, "/generate", body | fields)
    return answer


def rows(answer: dict[str, Any]) -> np.ndarray:
    """[rows, layers, top-k] sorted ids."""
    raw = base64.b64decode(answer["meta_info"]["routed_experts"])
    return np.sort(np.frombuffer(raw, "<i4").reshape(-1, SHAPE.num_hidden_layers, SHAPE.topk), axis=-1)


def test_the_release_is_the_one_that_is_meant(release: SGLangEngine, request: pytest.FixtureRequest) -> None:
    replica = release.replicas[0]
    info = httpx.get(f"{replica.url}/server_info", headers={"Authorization": f"Bearer {replica.api_key}"}, trust_env=False).json()
    assert info["version"] == request.node.callspec.params["release"]
    assert tuple(map(int, info["version"].split("."))) in TESTED_RELEASES
    assert info["load_format"] == "safetensors"
    assert info["moe_runner_backend"] == "auto"
    assert replica.server is not None
    assert replica.server.log_path is not None
    assert replica.api_key not in replica.server.log_path.read_text()


def test_routes_logprobs_and_seeds(release: SGLangEngine, tiny: TinyModel) -> None:
    release.update_weights(tiny.gates().items(), 1)
    responses = release.generate(make_requests(12), SamplingParams(12), return_routes=True).responses
    assert_matches(responses, tiny)
    again = release.generate(make_requests(12)[:3], SamplingParams(12), return_routes=True).responses
    assert [r.response_ids for r in again] == [r.response_ids for r in responses[:3]]


def test_a_push_arrives_and_nothing_comes_from_the_old_prefix_cache(release: SGLangEngine, tiny: TinyModel) -> None:
    release.update_weights(tiny.gates().items(), 1)
    requests = make_requests(6, seed=3)
    before = release.generate(requests, SamplingParams(8), return_routes=True).responses
    merged = tiny.merged_gates(seed=7)
    release.update_weights(merged.items(), 5)
    after = release.generate(requests, SamplingParams(8), return_routes=True).responses
    assert {r.weight_version for r in after} == {5}
    assert_matches(after, tiny, merged)
    changed = [
        (b.routes.experts[: len(r.prompt_ids)] != a.routes.experts[: len(r.prompt_ids)]).any(-1).mean()
        for a, b, r in zip(after, before, requests, strict=True)
    ]
    assert min(changed) > 0.5
    release.update_weights(tiny.gates().items(), 6)
    again = release.generate(requests, SamplingParams(8), return_routes=True).responses
    assert [r.response_ids for r in again] == [r.response_ids for r in before]


def test_the_handshake_probe_scores_every_token(release: SGLangEngine, tiny: TinyModel) -> None:
    release.update_weights(tiny.gates().items(), 1)
    ids = [3 + 7 * i % 250 for i in range(90)]
    release.generate([RolloutRequest(tuple(ids), 0)], SamplingParams(1), return_routes=False)  # warms the prefix cache
    (probe,) = release.score(ids)
    routes, logprobs = tiny.routes_and_logprobs(ids)
    assert probe.routes.num_missing == 0
    assert (np.sort(probe.routes.experts, axis=-1) == routes.numpy()).all()
    np.testing.assert_allclose(probe.logprobs, logprobs, atol=LOGPROB)


def test_rows_from_a_position_on_and_version_spans(release: SGLangEngine, tiny: TinyModel) -> None:
    release.update_weights(tiny.gates().items(), 3)
    prompt = list(range(20, 40))
    whole = generate(release, prompt, 6)
    part = generate(release, prompt, 6, routed_experts_start_len=13, extra_key="another prefix cache")
    assert part["output_ids"] == whole["output_ids"]
    assert (rows(part) == rows(whole)[13:]).all()
    assert len(rows(whole)) == len(prompt) + 6 - 1
    assert part["meta_info"]["weight_versions"] == [{"version": "3", "start": 0, "end": 6}]
    # The key keeps prefix caches apart: a prompt that was cached under none is computed again under this one.
    assert part["meta_info"]["cached_tokens"] == 0
    assert generate(release, prompt, 1)["meta_info"]["cached_tokens"] > 0


def test_an_abort_returns_what_there_is(release: SGLangEngine, tiny: TinyModel) -> None:
    release.update_weights(tiny.gates().items(), 1)
    prompt, answers = list(range(50, 60)), []
    thread = threading.Thread(target=lambda: answers.append(generate(release, prompt, 480, rid="pr2-abort")))
    thread.start()
    time.sleep(0.3)
    post(release, "/abort_request", {"rid": "pr2-abort"})
    thread.join(60)
    (answer,) = answers
    assert answer["meta_info"]["finish_reason"]["type"] == "abort"
    sampled = len(answer["output_ids"])
    assert 0 < sampled < 480
    routes, _ = tiny.routes_and_logprobs([*prompt, *answer["output_ids"]])
    assert (rows(answer) == routes[:-1].numpy()).all()


def test_an_in_place_pause_keeps_requests_and_their_routes(release: SGLangEngine, tiny: TinyModel) -> None:
    release.update_weights(tiny.gates().items(), 1)
    prompt, answers = list(range(70, 80)), []
    thread = threading.Thread(target=lambda: answers.append(generate(release, prompt, 200)))
    thread.start()
    time.sleep(0.2)
    post(release, "/pause_generation", {"mode": "in_place"})
    thread.join(1.0)
    paused = thread.is_alive()
    post(release, "/continue_generation", {})
    thread.join(60)
    (answer,) = answers
    assert paused
    assert answer["meta_info"]["num_retractions"] == 0
    routes, _ = tiny.routes_and_logprobs([*prompt, *answer["output_ids"]])
    assert (rows(answer) == routes[:-1].numpy()).all()


def test_the_launcher_needs_nothing_of_the_trainer() -> None:
    """It is imported by SGLang's processes in an environment without Megatron-Core."""
    code = """
import sys

class NotThere:
    def find_spec(self, name, path, target=None):
        if name in ("megatron", "mbridge", "omegaconf", "tensorboard", "matplotlib"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, NotThere())
from megatron_pr2.rollout.sglang import refusals as sglang_refusals
from megatron_pr2.rollout.sglang.cpu import launch
print([name for name in sys.modules if name.startswith("megatron_pr2.rollout.sglang.server")])
"""
    done = subprocess.run(
        [interpreter_of_0519(), "-c", code],
        env=package_environment(os.environ | {"CUDA_VISIBLE_DEVICES": ""}),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip().splitlines()[-1] == "[]"
