"""A real SGLang server on CPU without anything of the engine around it, for tests of the parts below."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_pr2.rollout.sglang.http import HttpClient
from megatron_pr2.rollout.sglang.push.session import PushTarget
from megatron_pr2.rollout.sglang.replica import score
from megatron_pr2.rollout.sglang.server import SGLangServer
from tests.helpers.rounding import LOGPROB
from tests.sglang.conftest import SHAPE, TinyModel, own_server, random_model

IDS = [5, 17, 99, 200, 3, 44, 71, 128, 250, 9, 33, 64]


@dataclass
class PlainServer:
    """Where it is, and a client."""

    url: str
    api_key: str
    http: HttpClient

    def post(self, path: str, payload: Mapping[str, Any] | None = None) -> bytes:
        return bytes(self.http.run(self.http.body("POST", path, payload or {}, where="test")))

    def version(self) -> str:
        return self.http.run(self.http.json("GET", "/model_info", where="test"))["weight_version"]

    def target(self, **changes: Any) -> PushTarget:
        fields = {"world_size": 2, "backend": "gloo", "device": "cpu", "bucket_bytes": 64 << 10, "timeout_s": 60.0}
        return PushTarget(self.url, self.api_key, **(fields | changes))

    def assert_serves(self, tiny: TinyModel, version: str, gates: dict[str, torch.Tensor] | None = None) -> None:
        """Routes and log-probs of a prompt are those of Transformers."""
        routes, logprobs = tiny.routes_and_logprobs(IDS, gates)
        got_logprobs, table = score(self.http, IDS, SHAPE, "test")
        assert self.version() == version
        assert (np.sort(table.experts, axis=-1) == routes.numpy()).all()
        np.testing.assert_allclose(got_logprobs, logprobs.numpy(), atol=LOGPROB)


@contextmanager
def plain_server(path: str, log: Path, **changes: object) -> Iterator[PlainServer]:
    """Starts a server on a model directory and stops it when the block ends."""
    server = SGLangServer(own_server(path, log, **changes))
    server.start()
    http = HttpClient(server.url, api_key=server.api_key, timeout_s=120.0)
    try:
        yield PlainServer(server.url, server.api_key, http)
    finally:
        http.close()
        server.stop()


def other_model(tiny: TinyModel, path: Path, seed: int) -> TinyModel:
    """A model of the same sizes with other random weights, saved to `path`."""
    with torch.random.fork_rng(devices=[]):
        return random_model(tiny.model.config, path, seed)
