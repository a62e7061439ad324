"""One real SGLang server for the whole session, and the tiny model that it runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from megatron_pr2.errors import RolloutError
from megatron_pr2.rollout.sglang.child_process import ChildProcess
from megatron_pr2.rollout.sglang.config import SGLangConfig
from megatron_pr2.rollout.sglang.engine import SGLangEngine
from tests.sglang.fake_server import SHAPE, FakeServer, serve
from tests.sglang.preload import Preloaded

if TYPE_CHECKING:
    from tests.sglang.plain_server import PlainServer

def ensure_alive(engine: SGLangEngine) -> None:
    """Raises RolloutError, with the last log lines of an own server, unless every server answers."""
    for replica in engine.replicas:
        reason = replica.why_dead()
        if reason is not None:
            raise RolloutError(reason)


@dataclass
class TinyModel:
    """A random Qwen3-MoE in fp32 and the directory that it was saved to."""

    path: str
    model: torch.nn.Module

    def routes_and_logprobs(
        self, token_ids: list[int], gates: dict[str, torch.Tensor] | None = None, temperature: float = 1.0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[T, L, K] sorted expert ids and [T - 1] log-probs of tokens 1.., optionally with other gate weights."""
        from torch.func import functional_call

        with torch.no_grad():
            out = functional_call(self.model, gates or {}, (torch.tensor([token_ids]),), {"output_router_logits": True})
        routes = torch.stack([layer.softmax(-1).topk(SHAPE.topk).indices.sort(-1).values for layer in out.router_logits], dim=1)
        logprobs = (out.logits[0, :-1] / temperature).log_softmax(-1)
        return routes, logprobs.gather(1, torch.tensor(token_ids[1:]).unsqueeze(1)).squeeze(1)

    def gates(self) -> dict[str, torch.Tensor]:
        return {name: p.detach() for name, p in self.model.named_parameters() if name.endswith("mlp.gate.weight")}

    def merged_gates(self, seed: int) -> dict[str, torch.Tensor]:
        """Gate weights W + W_p with a random W_p, large enough to change most routes."""
        generator = torch.Generator().manual_seed(seed)
        return {name: w + 0.3 * torch.randn(w.shape, generator=generator) for name, w in self.gates().items()}


@pytest.fixture
def fake() -> Iterator[FakeServer]:
    with serve(FakeServer()) as server:
        yield server


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    from transformers import Qwen3MoeConfig

    config = Qwen3MoeConfig(
        vocab_size=260,
        hidden_size=64,
        intermediate_size=128,
        moe_intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=16,
        num_experts_per_tok=4,
        norm_topk_prob=True,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
    )
    return random_model(config, tmp_path_factory.mktemp("tiny_qwen3_moe"), 0)


def random_model(config: Any, path: Path, seed: int) -> TinyModel:
    from transformers import Qwen3MoeForCausalLM

    torch.manual_seed(seed)
    model = Qwen3MoeForCausalLM(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("mlp.gate.weight"):
                parameter.normal_(std=0.5)
            elif name.endswith("lm_head.weight"):
                parameter.normal_(std=0.2)  # far from uniform, so that a wrong temperature shows
    model.save_pretrained(path)
    return TinyModel(str(path), model)


def own_server(path: str, log: Path, **changes: object) -> SGLangConfig:
    settings: dict[str, object] = {
        "model_path": path,
        "dtype": "float32",
        "log_path": str(log),
        "weight_bucket_bytes": 256 << 10,
        "start_timeout_s": 400.0,
        "request_timeout_s": 120.0,
    }
    return SGLangConfig(**(settings | changes))  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def preloaded(sglang_python: str) -> Iterator[Preloaded]:
    """Servers on CPU that are forks of a process which has imported SGLang; for tests that start one."""
    if torch.cuda.is_available():
        pytest.skip("these tests compare with fp32 on CPU; hide the GPU with CUDA_VISIBLE_DEVICES=''")
    preloaded = Preloaded()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ChildProcess, "popen", preloaded)
        yield preloaded
    preloaded.close()


@pytest.fixture(scope="session")
def engine(preloaded: Preloaded, tiny: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SGLangEngine]:
    """A running engine on the tiny model; tests that change its weights restore them with `fresh`."""
    engine = SGLangEngine(own_server(tiny.path, tmp_path_factory.mktemp("log") / "sglang.log"), SHAPE)
    engine.start()
    yield engine
    engine.close()


@pytest.fixture(scope="session")
def plain(preloaded: Preloaded, tiny: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[PlainServer]:
    """A server without an engine around it, for tests that replace all of its weights."""
    from tests.sglang.plain_server import plain_server

    with plain_server(tiny.path, tmp_path_factory.mktemp("log") / "sglang.log") as server:
        yield server


@pytest.fixture
def fresh(engine: SGLangEngine, tiny: TinyModel) -> SGLangEngine:
    """The engine, holding the gates of the checkpoint."""
    engine.update_weights(tiny.gates().items(), 1)
    return engine
