"""The engine inside a trainer's process: served like a server, fed by tensor, and the process is as it was.

All of it happens in a process of its own (inprocess_script.py), because SGLang cannot be taken out of one again.
"""

from __future__ import annotations

import base64
import importlib.util
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_pr2.errors import ConfigError, RolloutError
from megatron_pr2.rollout import sglang_inprocess
from megatron_pr2.rollout.sglang_config import SGLangConfig
from megatron_pr2.rollout.sglang_inprocess import InProcessServer, TensorSender
from tests.sglang.conftest import SHAPE, TinyModel
from tests.sglang.plain_server import IDS, other_model

ROOT = Path(__file__).parents[2]


def assert_served(served: dict[str, Any], tiny: TinyModel, version: str) -> None:
    routes, logprobs = tiny.routes_and_logprobs(IDS)
    rows = np.frombuffer(base64.b64decode(served["routes"]), dtype="<i4").reshape(-1, SHAPE.num_hidden_layers, SHAPE.topk)
    assert (np.sort(rows, axis=-1) == routes.numpy()).all()
    np.testing.assert_allclose(served["logprobs"], logprobs.numpy(), atol=1e-4)
    assert served["version"] == version


@pytest.mark.sglang
@pytest.mark.skipif(importlib.util.find_spec("sglang") is None, reason="sglang is not installed")
@pytest.mark.skipif(torch.cuda.is_available(), reason="compares with fp32 on CPU")
def test_a_trainer_with_an_engine_inside(tiny: TinyModel, tmp_path: Path) -> None:
    other = other_model(tiny, tmp_path / "other", seed=1)
    script = str(Path(__file__).with_name("inprocess_script.py"))
    done = subprocess.run(
        [sys.executable, script, tiny.path, other.path, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((tmp_path / "result.json").read_text())
    for served, (model, version) in zip(
        result["served"], [(tiny, "0"), (other, "1"), (tiny, "2"), (tiny, "0")], strict=True
    ):
        assert_served(served, model, version)
    assert (tmp_path / "imports").read_text() == "__main__\n"  # SGLang's children did not import the trainer's script
    assert result["changed"] == []
    assert "must run between begin_weight_update() and end_weight_update()" in result["refused"]
    assert "long: " in result["died"]
    assert "engine died: SGLang's processes in this process ended" in result["died"]
    assert result["left"] == []
    assert result["bystander"]  # a child of this process that was not SGLang's


def test_what_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="moe_runner_backend"):
        InProcessServer(SGLangConfig(model_path="m", extra_flags=("--moe-runner-backend", "triton_kernel")))
    server = InProcessServer(SGLangConfig(model_path=str(tmp_path)))
    with pytest.raises(ConfigError, match="only safetensors are loaded"):
        server.start()
    told: list[str] = []

    def start() -> None:
        try:
            server.start()
        except RolloutError as error:
            told.append(str(error))

    thread = threading.Thread(target=start)
    thread.start()
    thread.join()
    assert "only be started by the main thread" in told[0]
    for action in (server.client, lambda: TensorSender(server, 64).push([("w", torch.ones(4))])):
        with pytest.raises(RolloutError, match=r"not running; call start\(\)"):
            action()
    monkeypatch.setattr(sglang_inprocess, "_SHARED_MEMORY", "/proc/self")  # a file system without a free byte
    with pytest.raises(RolloutError, match=r"does not fit into .*lower weight_bucket_bytes"):
        TensorSender(server, 64).push([("w", torch.ones(4))])
    server.stop()
