"""Each family of models through the whole loop, by each bridge: load, attach, rollout, replay, update, export.

The table of models in docs/bridges.md is MODELS below; a test compares them. Everything of one model happens in one process, by the
trainer's own code; what Transformers computes on the same tiny checkpoint is the reference.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_pr2 import host
from megatron_pr2.errors import ConfigError
from megatron_pr2.hf.model_types import MODEL_TYPES, known_model_types
from megatron_pr2.hf.settings import bridge_config, config_overrides
from megatron_pr2.hf.shape import model_shape
from megatron_pr2.prediction.gates import GATE_NAME
from megatron_pr2.replay.model_settings import moves_routing
from tests.helpers.distributed import pool
from tests.helpers.loop import Monitor, parity
from tests.host.models import SIZES, make_checkpoint, tiny_config

pytestmark = pytest.mark.slow

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "bridges.md"
Tensors = dict[str, Tensor]
EPS = torch.finfo(torch.float32).eps
# A logit is a sum over the hidden size, of what as many sums in each layer have added up: rounding grows at most like this.
LAYERS = 3
TERMS = SIZES["hidden_size"] * LAYERS
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128}
VECTORS = ("q_layernorm.weight", "k_layernorm.weight", "core_attention.softmax_offset", "router.bias", "linear_proj.bias")
SETTINGS = (
    "steps=1", "rollout.prompts=2", "rollout.responses=4", "rollout.max_new_tokens=4", "algorithm.mini_steps=2",
    "algorithm.micro_batch_size=2", "optimizer.lr=0.01", "pr2.sample_fraction=1.0", "pr2.hold_back=false",
)  # fmt: skip


@dataclass(frozen=True)
class Model:
    """A row of the table.

    Attributes:
        name: as people call it.
        family: model_type.
        changes: of the tiny config, for what the row is about.
        note: what the row is about, in the table's words.
    """

    name: str
    family: str
    note: str
    changes: dict[str, Any] = field(default_factory=dict)


MODELS = (
    Model("Qwen3-MoE", "qwen3_moe", "weights of the selected experts normalized; q/k norms"),
    Model("Qwen2-MoE", "qwen2_moe", "weights not normalized; shared expert with a gate; attention bias"),
    Model("Mixtral", "mixtral", "softmax over the selected experts"),
    Model("DeepSeek-V3", "deepseek_v3", "sigmoid with bias, groups, scaled weights; latent attention; shared expert; dense layers"),
    Model(
        "GLM-4.5",
        "glm4_moe",
        "sigmoid with bias, scaled weights; partial rotary, attention bias, q/k norms; shared experts; dense layers",
        {"attention_bias": True},
    ),
    Model("GLM-4.5-Air", "glm4_moe", "the same without q/k norms", {"attention_bias": True, "use_qk_norm": False}),
    Model("GLM-4.5 without attention bias", "glm4_moe", "the same without attention bias", {"attention_bias": False}),
    Model("OLMoE", "olmoe", "weights not normalized; q/k norms over whole projections"),
    Model("gpt-oss", "gpt_oss", "biases of routers and experts; clamped activation; attention sinks, sliding windows; YaRN"),
)


MEGATRON_BRIDGE = pytest.mark.skipif(importlib.util.find_spec("megatron.bridge") is None, reason="megatron-bridge is not installed")
BY_EACH_BRIDGE = [
    pytest.param(model, bridge, id=f"{model.name}-{bridge}", marks=[MEGATRON_BRIDGE] if bridge == "megatron-bridge" else [])
    for model in MODELS
    for bridge, families in MODEL_TYPES.items()
    if model.family in families
]


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(0, SIZES["vocab_size"], (2, 16), generator=torch.Generator().manual_seed(3))


def checkpoint(path: Path, model: Model) -> Path:
    from megatron_pr2.rl.tiny import save_byte_tokenizer

    make_checkpoint(path, tiny_config(model.family, **({"num_hidden_layers": LAYERS, "pad_token_id": 258} | model.changes)))
    save_byte_tokenizer(path, SIZES["max_position_embeddings"])
    return path


def reference(path: Path, tokens: Tensor) -> tuple[Tensor, Tensor, float]:
    """Transformers' logits [B, S, V] and selected experts [B, S, L, K], and how near the next expert was to being selected."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    seen: list[tuple[Any, Any]] = []
    for module in model.modules():
        if type(module).__name__.lower().endswith("topkrouter"):
            module.register_forward_hook(lambda router, _, output: seen.append((router, output)))
    with torch.no_grad():
        logits = model(tokens, use_cache=False).logits
    routes = torch.stack([output[2] for _, output in seen], dim=1).view(*tokens.shape, len(seen), -1)
    return logits, routes.sort(-1).values, min(margin(router, output[0], output[2]) for router, output in seen)


def margin(router: Any, logits_TE: Tensor, experts_TK: Tensor) -> float:
    """The smallest difference of scores by which an expert, or a group of experts, was selected."""
    scores_TE = logits_TE
    if (bias := getattr(router, "e_score_correction_bias", None)) is not None:
        scores_TE = logits_TE.sigmoid() + bias
        groups_TG = scores_TE.unflatten(-1, (router.num_group, -1)).topk(2, dim=-1).values.sum(-1)
        chosen_TG = groups_TG.topk(router.topk_group, dim=-1)
        allowed_TG = torch.zeros_like(groups_TG, dtype=torch.bool).scatter(1, chosen_TG.indices, True)
        scores_TE = scores_TE.masked_fill(~allowed_TG.repeat_interleave(scores_TE.shape[1] // groups_TG.shape[1], 1), -torch.inf)
        rejected = groups_TG.masked_fill(allowed_TG, -torch.inf).amax(1)
        gap = float((chosen_TG.values[:, -1] - rejected).min())
    else:
        gap = float("inf")
    taken_TE = torch.zeros_like(scores_TE, dtype=torch.bool).scatter(1, experts_TK, True)
    worst, best = scores_TE.masked_fill(~taken_TE, torch.inf).amin(1), scores_TE.masked_fill(taken_TE, -torch.inf).amax(1)
    return min(gap, float((worst - best).min()))


def close(actual: Tensor, expected: Tensor) -> None:
    bound = EPS * TERMS * float(expected.abs().max())
    difference = float((actual - expected).abs().max())
    assert difference <= bound, f"{difference:.3g} > {bound:.3g} = eps * {TERMS} * the largest logit"


def loop(path: Path, run: Path, tokens: Tensor, bridge: str) -> dict[str, Any]:
    """One training step on a checkpoint, by the trainer's own code."""
    from transformers import AutoTokenizer

    from megatron_pr2.hf.bridge import export_weights
    from megatron_pr2.rl import trainer as trainer_module
    from megatron_pr2.rl.actor import Actor
    from megatron_pr2.rl.config import load_config
    from megatron_pr2.rl.data import Example
    from megatron_pr2.rollout.embedded import MegatronEngine

    host.init()
    tokenizer = AutoTokenizer.from_pretrained(path)
    actor = Actor(load_config(None, [*SETTINGS, f"run={run}", f"model.bridge={bridge}"]), path, tokenizer.pad_token_id)
    engine = MegatronEngine(actor.model, actor.pr2, pad_id=tokenizer.pad_token_id)
    before = logits_of(actor, tokens)
    tables = [engine.score(row)[0].routes for row in tokens.tolist()]
    monitor = Monitor()
    examples = [Example("1+2=", "3", "generated"), Example("3+4=", "7", "generated")]
    trainer = trainer_module.Trainer(actor._config, actor, engine, engine, examples, tokenizer, monitor)
    with mock.patch.object(trainer_module, "exact_match", parity):
        trainer.run()
    return {
        "moves": moves_routing(actor.model.config),
        "before": before,
        "routes": torch.stack([torch.from_numpy(table.experts.astype(np.int64)) for table in tables]).sort(-1).values,
        "record": monitor.records[0],
        "after": logits_of(actor, tokens),
        "predictions": {site.layer: actor.pr2.predictor.weight(site.local).clone() for site in actor.pr2.sites},
        "plain": copied(export_weights(actor._bridge, actor.chunks)),
        "merged": copied(actor.export(1)),
        "owned": copied(actor.export_owned(1)),
    }


def copied(weights: Iterable[tuple[str, Tensor]]) -> Tensors:
    return {name: tensor.clone() for name, tensor in weights}


def logits_of(actor: Any, tokens: Tensor) -> Tensor:
    actor.model.eval()
    with torch.no_grad():
        logits: Tensor = actor.model(tokens, torch.arange(tokens.shape[1]).expand_as(tokens), None).clone()
    actor.model.train()
    return logits


@pytest.mark.parametrize(("model", "bridge"), BY_EACH_BRIDGE)
def test_the_whole_loop(model: Model, bridge: str, tokens: Tensor, tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "model", model)
    original = load_file(path / "model.safetensors")
    expected_logits, expected_routes, gap = reference(path, tokens)
    assert gap > EPS * TERMS, "two experts are as good as equal: another seed, please"
    (done,) = pool(1).run(loop, path, tmp_path / "run", tokens, bridge)
    assert not done["moves"]

    # Load: the same model, and the same experts.
    close(done["before"], expected_logits)
    assert torch.equal(done["routes"], expected_routes), "other experts than Transformers' router selects"

    # Rollout, old log-probs and the first mini-step are under the same weights and routes.
    record, bound = done["record"], EPS * TERMS * float(expected_logits.abs().max())
    first = record["mini_steps"][0]
    assert record["routes"]["missing"] == 0
    assert record["routes"]["agreement"] > 0.9
    assert record["logprob_gap"]["max"] <= bound
    assert max(first["ratio_max"] - 1.0, 1.0 - first["ratio_min"]) <= bound

    # Update: gates and attention of every layer have learned, the selection bias has not.
    exported = done["plain"]
    assert original.keys() == exported.keys() == done["merged"].keys() == done["owned"].keys()
    same = {name for name, tensor in original.items() if torch.equal(tensor, exported[name])}
    gates = {name: int(match[1]) for name in original if (match := GATE_NAME.search(name))}
    assert gates.keys().isdisjoint(same)
    assert not any("self_attn" in name for name in same)
    assert {name for name in original if "e_score_correction_bias" in name} <= same

    # Export for the engine: the prediction is in the gates and nowhere else.
    for name, tensor in exported.items():
        if name in gates:
            prediction = done["predictions"][gates[name]]
            assert prediction.abs().max() > 0
            tensor = tensor + prediction
        assert torch.equal(done["merged"][name], tensor), name
        assert torch.equal(done["owned"][name], tensor), name

    # The final checkpoint is the model that was trained.
    close(done["after"], reference(tmp_path / "run" / "final", tokens)[0])
    assert float((done["after"] - done["before"]).abs().max()) > bound


def spread(path: Path, layout: dict[str, int], tokens: Tensor) -> dict[str, Any]:
    """Loss of each token [B, S], gradients of this rank's attention and router vectors, and both exports, under a layout."""
    from megatron.core.distributed import finalize_model_grads

    from megatron_pr2.hf.bridge import export_weights, load_model

    host.init(**layout)
    bridge, chunks = load_model(path, dtype=torch.float32, ddp_config={"use_distributed_optimizer": False})
    loss_BS = chunks[0](tokens, torch.arange(tokens.shape[1]).expand_as(tokens), None, labels=tokens.roll(-1, dims=1))
    loss_BS.mean().backward()
    finalize_model_grads(chunks)
    return {
        "loss": loss_BS.detach(),
        "gradients": {name: weight.main_grad.clone() for name, weight in chunks[0].named_parameters() if name.endswith(VECTORS)},
        "whole": copied(export_weights(bridge, chunks)),
        "owned": copied(bridge.export_owned_weights(chunks)),
    }


@pytest.mark.parametrize(
    ("family", "changes", "vectors"),
    [("olmoe", {"clip_qkv": 0.7}, 2 * LAYERS), ("gpt_oss", {}, 3 * LAYERS), ("glm4_moe", {"attention_bias": True}, 2 * LAYERS)],
)
def test_what_tensor_and_expert_parallel_ranks_share(
    family: str, changes: dict[str, Any], vectors: int, tokens: Tensor, tmp_path: Path
) -> None:
    path = checkpoint(tmp_path / "model", Model(family, family, "", changes))
    (alone,) = pool(1).run(spread, path, {}, tokens)
    labels = tokens.roll(-1, dims=1).unsqueeze(-1)
    close(alone["loss"], -reference(path, tokens)[0].log_softmax(-1).gather(-1, labels).squeeze(-1))
    assert len(alone["gradients"]) == vectors
    ranks = pool(2).run(spread, path, {"tensor": 2, "expert": 2, "expert_tensor": 1}, tokens)
    for rank, shared in enumerate(ranks):
        close(shared["loss"], alone["loss"])
        for name, gradient in alone["gradients"].items():
            assert gradient.abs().max() > 0, name
            own = shared["gradients"][name]
            close(own, gradient if own.shape == gradient.shape else gradient.chunk(2)[rank])
    original = load_file(path / "model.safetensors")
    owned = [name for shared in ranks for name in shared["owned"]]
    assert sorted(owned) == sorted(original)
    for shared in (alone, *ranks):
        assert shared["whole"].keys() == original.keys()
        for name, tensor in [*shared["whole"].items(), *shared["owned"].items()]:
            assert torch.equal(tensor, original[name]), name


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("mixtral", {"sliding_window": 6}),
        ("qwen3_moe", {"sliding_window": 6, "use_sliding_window": True}),
        ("qwen2_moe", {"sliding_window": 6, "use_sliding_window": True, "max_window_layers": 2}),
    ],
)
def test_sliding_windows(family: str, changes: dict[str, Any], tokens: Tensor, tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "model", Model(family, family, "", changes))
    labels = tokens.roll(-1, dims=1).unsqueeze(-1)
    (alone,) = pool(1).run(spread, path, {}, tokens)
    close(alone["loss"], -reference(path, tokens)[0].log_softmax(-1).gather(-1, labels).squeeze(-1))


def from_bf16(path: Path) -> Tensors:
    from megatron_pr2.hf.bridge import export_weights, load_model

    host.init()
    return copied(export_weights(*load_model(path, dtype=torch.bfloat16, wrap_with_ddp=False)))


@pytest.mark.parametrize("shard", ["5GB", "50KB"])
def test_deepseek_in_bf16_from_one_file_and_from_many(shard: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = next(model for model in MODELS if model.family == "deepseek_v3")
    path = checkpoint(tmp_path / "model", model)
    whole = load_file(path / "model.safetensors")
    AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).save_pretrained(tmp_path / "half", max_shard_size=shard)
    assert (tmp_path / "half" / "model.safetensors").exists() == (shard == "5GB")
    (exported,) = pool(1).run(from_bf16, tmp_path / "half")
    assert exported.keys() == whole.keys()
    for name, tensor in exported.items():
        assert torch.equal(tensor, whole[name].to(tensor.dtype)), name
        assert tensor.dtype is (torch.float32 if "e_score_correction_bias" in name else torch.bfloat16)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("deepseek_v3", {"norm_topk_prob": False}, "norm_topk_prob=False"),
        ("deepseek_v3", {"num_experts_per_tok": 8}, "two best, Megatron-Core by their 4 best"),
        ("deepseek_v3", {"rope_interleave": False}, "rope_interleave=False"),
        ("glm4_moe", {"num_experts_per_tok": 1}, "each weight is 1"),
        ("mixtral", {"num_experts_per_tok": 1}, "each weight is 1"),
        ("gpt_oss", {"num_experts_per_tok": 1}, "each weight is 1"),
        ("gpt_oss", {"swiglu_alpha": 1.5}, "swiglu_alpha=1.5"),
        ("gpt_oss", {"attention_bias": False}, "attention_bias=False"),
        ("gpt_oss", {"rope_parameters": YARN | {"attention_factor": 2.0}}, "attention_factor=2.0"),
        ("qwen3_moe", {"layer_types": ["chunked_attention"] * 4}, "layer_types"),
        ("qwen3_moe", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ("qwen3_moe", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "rope_type='linear'"),
        ("qwen3_moe", {"quantization_config": {"quant_method": "fp8"}}, "quantized weights are not read"),
    ],
)
def test_what_megatron_would_compute_otherwise_is_refused(family: str, changes: dict[str, Any], message: str) -> None:
    config = tiny_config(family, **changes)
    with pytest.raises(ConfigError, match=message):
        config_overrides(bridge_config(config), model_shape(config))


def test_the_documented_models_are_these() -> None:
    _, _, section = DOCUMENT.read_text(encoding="utf-8").partition("## Models\n")
    lines = [line for line in section.partition("\n## ")[0].splitlines() if line.startswith("| ")]
    table = [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in lines]

    def bridges(family: str) -> str:
        return ", ".join(f"`{name}`" for name, families in MODEL_TYPES.items() if family in families)

    assert table[2:] == [(model.name, f"`{model.family}`", bridges(model.family), model.note) for model in MODELS]
    assert known_model_types() == sorted({model.family for model in MODELS})
