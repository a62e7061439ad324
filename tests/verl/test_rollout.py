"""SGLang's routes under verl: decoded where verl's own server fails, and by verl's real server on a real SGLang."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from megatron_pr2.errors import RouteError
from megatron_pr2.integrations.verl_sglang import ReplicaLoader, register_rollout
from megatron_pr2.integrations.verl_sglang.decoder import RouteDecoder, model_dimensions
from tests.helpers.rounding import LOGPROB

ROOT = Path(__file__).resolve().parents[2]
IDS = np.arange(7 * 3 * 2, dtype="<i4").reshape(7, 3, 2)


class Manager:
    """As much of SGLang's tokenizer manager as verl's server uses."""

    def __init__(self, routes: Any) -> None:
        self.routes, self.server_status = routes, "starting"

    def pause_generation(self) -> str:
        return "paused"

    async def generate_request(self, request: Any, raw: Any = None) -> AsyncIterator[dict[str, Any]]:
        assert raw is None
        yield {"output_ids": [1], "meta_info": {"id": request.rid, "routed_experts": self.routes}}


def answer(routes: Any) -> dict[str, Any]:
    decoder = RouteDecoder(Manager(routes), 3, 2)
    return asyncio.run(anext(decoder.generate_request(SimpleNamespace(rid="r1"), None)))


@pytest.mark.parametrize("kind", [str, bytes])
def test_base64_becomes_what_verl_calls_numpy_on(kind: type) -> None:
    text = base64.b64encode(IDS.tobytes())
    routes = answer(text.decode() if kind is str else text)["meta_info"]["routed_experts"]
    assert routes.dtype == torch.int32
    np.testing.assert_array_equal(routes.numpy(), IDS)


def test_other_answers_pass_as_they_are() -> None:
    assert answer(None) == {"output_ids": [1], "meta_info": {"id": "r1", "routed_experts": None}}
    tensor = torch.zeros(1)
    assert answer(tensor)["meta_info"]["routed_experts"] is tensor


@pytest.mark.parametrize(
    ("routes", "message"),
    [
        (base64.b64encode(IDS.tobytes()[:-4]).decode(), r"request 'r1': .* rows of 3 layers x top-2"),
        ("@@@@", "request 'r1': routed_experts is not valid base64"),
    ],
)
def test_what_is_no_table_is_refused(routes: str, message: str) -> None:
    with pytest.raises(RouteError, match=message):
        answer(routes)


def test_everything_else_is_the_managers() -> None:
    manager = Manager(None)
    decoder: Any = RouteDecoder(manager, 3, 2)
    assert decoder.pause_generation() == "paused"
    decoder.server_status = "up"
    assert manager.server_status == "up"
    with pytest.raises(AttributeError):
        _ = decoder.absent


def test_the_replica_is_registered_once_and_loads_nothing_by_itself() -> None:
    from verl.workers.rollout.replica import RolloutReplicaRegistry

    register_rollout()
    loader = RolloutReplicaRegistry._registry["sglang"]
    assert isinstance(loader, ReplicaLoader)
    register_rollout()
    assert RolloutReplicaRegistry._registry["sglang"] is loader
    assert "sglang" not in sys.modules


def test_dimensions_are_those_of_the_text_model() -> None:
    text = SimpleNamespace(num_hidden_layers=5, num_experts_per_tok=4, model_type="moe")
    assert model_dimensions(text) == (5, 4)
    assert model_dimensions(SimpleNamespace(get_text_config=lambda: text)) == (5, 4)
    with pytest.raises(RouteError, match="model_type='dense' has no num_experts_per_tok"):
        model_dimensions(SimpleNamespace(num_hidden_layers=5, model_type="dense"))


@pytest.mark.skipif(
    not Path(os.environ.get("MEGATRON_PR2_SGLANG_0519", "absent")).exists(),
    reason="needs a second environment with SGLang 0.5.19: make sglang-0.5.19, MEGATRON_PR2_SGLANG_0519=its python",
)
def test_verls_server_returns_the_routes_of_a_real_engine(tmp_path: Path) -> None:
    import verl

    from megatron_pr2.rl.tiny import TinyModelConfig, make_tiny_checkpoint
    from megatron_pr2.rollout.doctor.reference import read_shape, score

    settings = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "router_std": 0.2}
    model = make_tiny_checkpoint(tmp_path / "model", TinyModelConfig(**settings, **experts, max_position_embeddings=128), seed=1)
    output, packages = tmp_path / "answer.json", Path(verl.__file__).parents[1]
    command = [os.environ["MEGATRON_PR2_SGLANG_0519"], str(Path(__file__).with_name("sglang_script.py"))]
    done = subprocess.run(
        [*command, str(ROOT), str(packages), str(model), str(output)], capture_output=True, text=True, timeout=300, check=False
    )
    assert output.exists(), done.stderr[-3000:]
    found = json.loads(output.read_text(encoding="utf-8"))
    tokens = [5, 6, 7, 8, *found["token_ids"]]
    assert len(found["token_ids"]) == len(found["log_probs"]) == 12
    expected = score(model, tokens, read_shape(model), torch.float32)
    assert found["dtype"] == "int32"
    routes = np.sort(np.array(found["routed_experts"]), axis=-1)
    np.testing.assert_array_equal(routes, np.sort(expected.routes.experts[: len(tokens) - 1], axis=-1))
    np.testing.assert_allclose(found["log_probs"], expected.logprobs[3:], atol=LOGPROB)
