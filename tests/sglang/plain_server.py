"""A real SGLang server on CPU without anything of the engine around it, for tests of the parts below."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_pr2.rollout.sglang.http import HttpClient
from megatron_pr2.rollout.sglang.push.session import PushTarget
from megatron_pr2.rollout.sglang.server import SGLangServer
from tests.helpers.rounding import LOGPROB
from tests.sglang.conftest import SHAPE, TinyModel, own_server

IDS = [5, 17, 99, 200, 3, 44, 71, 128, 250, 9, 33, 64]


@dataclass
class PlainServer:
    """Where it is, and a client."""

    url: str
    api_key: str
    http: HttpClient

    def post(self, path: str, payload: Mapping[str, Any] | None = None) -> bytes:
        return bytes(self.http.run(self.http.body("POST", path, payload or {}, where="test")))

    def json(self, path: str, payload: Mapping[str, Any] | None = None) -> Any:
        return self.http.run(self.http.json("POST", path, payload or {}, where="test"))

    def version(self) -> str:
        return self.http.run(self.http.json("GET", "/model_info", where="test"))["weight_version"]

    def target(self, **changes: Any) -> PushTarget:
        fields: dict[str, Any] = {
            "world_size": 2,
            "backend": "gloo",
            "device": "cpu",
            "bucket_bytes": 64 << 10,
            "timeout_s": 60.0,
        }
        return PushTarget(self.url, self.api_key, **(fields | changes))

    def routes_and_logprobs(self, ids: list[int]) -> tuple[torch.Tensor, np.ndarray, str]:
        """[T, L, K] sorted expert ids, [T - 1] log-probs of tokens 1.., and the version that computed them."""
        answer = self.json(
            "/generate",
            {
                "input_ids": ids,
                "sampling_params": {"max_new_tokens": 1, "temperature": 1.0},
                "return_logprob": True,
                "logprob_start_len": 0,
                "return_routed_experts": True,
            },
        )
        meta = answer["meta_info"]
        rows = np.frombuffer(base64.b64decode(meta["routed_experts"]), dtype="<i4")
        rows = rows.reshape(-1, SHAPE.num_hidden_layers, SHAPE.topk)
        logprobs = np.array([entry[0] for entry in meta["input_token_logprobs"][1:]])
        return torch.from_numpy(np.sort(rows, axis=-1)), logprobs, meta["weight_version"]

    def assert_serves(self, tiny: TinyModel, version: str, gates: dict[str, torch.Tensor] | None = None) -> None:
        """Routes and log-probs of a prompt are those of Transformers."""
        routes, logprobs = tiny.routes_and_logprobs(IDS, gates)
        got_routes, got_logprobs, got_version = self.routes_and_logprobs(IDS)
        assert got_version == version
        assert torch.equal(got_routes, routes.to(got_routes.dtype))
        np.testing.assert_allclose(got_logprobs, logprobs.numpy(), atol=LOGPROB)


@contextmanager
def plain_server(path: str, log: Path, **changes: object) -> Iterator[PlainServer]:
    """Starts a server on a model directory and stops it when the block ends."""
    server = SGLangServer(own_server(path, log, **changes))
    server.start()
    http = HttpClient(
        server.url,
        api_key=server.api_key,
        concurrency=8,
        timeout_s=120.0,
        retries=0,
        backoff_s=0.1,
        why_dead=lambda: None if server.alive() else server.describe_end(),
    )
    try:
        yield PlainServer(server.url, server.api_key, http)
    finally:
        http.close()
        server.stop()


def other_model(tiny: TinyModel, path: Path, seed: int) -> TinyModel:
    """A model of the same sizes with other random weights, saved to `path`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = type(tiny.model)(tiny.model.config).float().eval()  # type: ignore[operator]
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("mlp.gate.weight"):
                    parameter.normal_(std=0.5)
                elif name.endswith("lm_head.weight"):
                    parameter.normal_(std=0.2)
    model.save_pretrained(path)
    return TinyModel(str(path), model)
