"""Models that mbridge and Megatron-Bridge build: they attach, and their exports give gates merged or plain."""

from __future__ import annotations

import importlib.util
import logging
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from megatron_pr2.errors import AttachError, ConfigError
from megatron_pr2.hf.files import TensorIndex
from megatron_pr2.hf.model_types import choose_bridge
from megatron_pr2.prediction.gates import GATE_NAME, merge_gates
from megatron_pr2.replay.router import PredictiveTopKRouter
from tests.helpers.distributed import pool
from tests.hf.test_owned_export import check_union, experts_of, export_job
from tests.host.models import make_checkpoint, tiny_config

pytestmark = pytest.mark.slow

needs_megatron_bridge = pytest.mark.skipif(
    importlib.util.find_spec("megatron.bridge") is None, reason="megatron-bridge is not installed"
)
BRIDGES = ["mbridge", pytest.param("megatron-bridge", marks=needs_megatron_bridge)]


class HFWeightTuple(NamedTuple):
    """What Megatron-Bridge's export_hf_weights yields; the names of its fields are Megatron-Bridge's."""

    param_name: str
    weight: torch.Tensor


# ---- what an export may look like --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pair", [HFWeightTuple, lambda *values: values, lambda *values: list(values)], ids=["named", "tuple", "list"]
)
def test_any_iterable_of_pairs_is_taken(pair: Any) -> None:
    def export() -> Iterator[Any]:
        yield pair("model.layers.1.mlp.gate.weight", torch.ones(4, 2))
        yield pair("model.layers.1.mlp.gate.e_score_correction_bias", torch.ones(4))

    merged = dict(merge_gates(export(), {1: torch.full((4, 2), 0.5)}))
    assert torch.equal(merged["model.layers.1.mlp.gate.weight"], torch.full((4, 2), 1.5))
    assert torch.equal(merged["model.layers.1.mlp.gate.e_score_correction_bias"], torch.ones(4))


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("model.layers.7.mlp.gate.weight", 7),  # Qwen, DeepSeek, GLM, OLMoE
        ("model.layers.7.block_sparse_moe.gate.weight", 7),  # Mixtral
        ("model.language_model.layers.7.mlp.gate.weight", 7),  # decoders of vision-language models
        ("model.layers.7.mlp.shared_experts.gate.weight", None),
        ("model.layers.7.mlp.shared_expert_gate.weight", None),
        ("model.layers.7.mlp.experts.0.gate_proj.weight", None),
        ("mtp.layers.0.mlp.gate.weight", None),  # heads of Qwen3-Next, which number their layers from 0 again
    ],
)
def test_gates_by_the_names_that_bridges_give_them(name: str, layer: int | None) -> None:
    found = GATE_NAME.search(name)
    assert (int(found.group(1)) if found else None) == layer


def test_megatron_bridge_takes_the_router_for_replicated() -> None:
    """It goes by class name, knows only TopKRouter's, and then asks the module for this attribute."""
    assert PredictiveTopKRouter.tensor_model_parallel is False


# ---- gates merged or plain ---------------------------------------------------------------------------------------------


def gates_job(checkpoint: Path, bridge: str, expert: int, pipeline: int) -> dict[str, Any]:
    from megatron_pr2 import host
    from megatron_pr2.attach import PR2Config, attach
    from megatron_pr2.hf.bridge import load_model

    host.init(expert=expert, pipeline=pipeline)
    loaded, chunks = load_model(checkpoint, dtype=torch.float32, bridge=bridge)

    def plain_export() -> dict[str, torch.Tensor]:
        return {name: tensor.clone() for name, tensor in loaded.export_weights(chunks)}

    before = plain_export()
    pr2 = attach(chunks, PR2Config.preset("pr2", hold_back=False))
    assert pr2.predictor is not None
    for site in pr2.sites:  # the same on every rank that has the layer
        pr2.predictor.weight_LEH[site.local].normal_(generator=torch.Generator().manual_seed(site.layer))
    plain = plain_export()
    merged = dict(pr2.engine_weights(loaded.export_weights(chunks)))
    gates = {name: int(found.group(1)) for name in plain if (found := GATE_NAME.search(name))}

    def w_p(layer: int) -> torch.Tensor:
        shape = plain[f"model.layers.{layer}.mlp.gate.weight"].shape
        return torch.empty(shape).normal_(generator=torch.Generator().manual_seed(layer))

    with pytest.raises(AttachError, match="merged the gates of layers"):
        list(pr2.engine_weights((f"decoder.{name}.x", tensor) for name, tensor in plain.items()))
    # The other direction of the same mapping, while attached.
    with torch.no_grad():
        for parameter in chunks[0].parameters():
            parameter.zero_()
    loaded.load_weights(chunks, TensorIndex(checkpoint))
    again = plain_export()
    pr2.detach()
    after = plain_export()
    return {
        "class": type(loaded).__name__,
        "gates": sorted(gates.values()),
        "unchanged": all(torch.equal(before[name], other[name]) for other in (plain, again, after) for name in before),
        "merged": all(torch.equal(merged[name], plain[name] + w_p(layer)) for name, layer in gates.items()),
        "rest": all(torch.equal(merged[name], plain[name]) for name in plain if name not in gates),
        "same names": list(merged) == list(plain) == list(before),
    }


@pytest.mark.parametrize(("ranks", "expert", "pipeline"), [(1, 1, 1), (2, 2, 1), (2, 1, 2)], ids=["one", "expert", "pipeline"])
@pytest.mark.parametrize("bridge", BRIDGES)
def test_exports_give_gates_merged_or_plain(tiny_checkpoint: Path, bridge: str, ranks: int, expert: int, pipeline: int) -> None:
    name = {"mbridge": "MBridge", "megatron-bridge": "MegatronBridge"}[bridge]
    for found in pool(ranks).run(gates_job, tiny_checkpoint, bridge, expert, pipeline):
        assert found == {"class": name, "gates": [0, 1], "unchanged": True, "merged": True, "rest": True, "same names": True}


# ---- Megatron-Bridge ---------------------------------------------------------------------------------------------------

EP2 = {"expert": 2}
LAYOUTS = [
    ("qwen3_moe", EP2, False),
    ("qwen3_moe", {"tensor": 2, "expert": 2, "expert_tensor": 1}, False),
    ("qwen3_moe", {"pipeline": 2, "virtual_pipeline": 2}, True),
    ("deepseek_v3", EP2, False),
    ("glm4_moe", EP2, False),
]


@needs_megatron_bridge
@pytest.mark.parametrize(("family", "layout", "tied"), LAYOUTS)
def test_ranks_give_an_engine_what_they_own(family: str, layout: dict[str, int], tied: bool, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    path = make_checkpoint(tmp_path / family, tiny_config(family, tie_word_embeddings=tied))
    results = pool(2).run(export_job, path, layout, not tied, "megatron-bridge")
    check_union(results)
    original = load_file(path / "model.safetensors")
    full = results[0][2]
    assert full.keys() == original.keys()
    assert all(torch.equal(full[name], original[name]) for name in original)
    if layout == EP2:
        assert [experts_of(names) for names, _, _ in results] == [set(range(8)), set(range(8, 16))]
        assert all(".experts." in name for name in results[1][0])


def fused_job(path: Path) -> str:
    from megatron_pr2 import host
    from megatron_pr2.hf.bridge import load_model

    host.init(expert=2)
    bridge, chunks = load_model(path, dtype=torch.float32, wrap_with_ddp=False, bridge="megatron-bridge")
    from megatron.bridge.models.conversion.param_mapping import GatedMLPMapping  # which cannot be imported by itself

    GatedMLPMapping.is_grouped_export = True  # as of models whose checkpoints have one tensor for all experts
    try:
        next(bridge.export_owned_weights(chunks))
    except ConfigError as error:
        return str(error)
    finally:
        del GatedMLPMapping.is_grouped_export
    return ""


@needs_megatron_bridge
def test_a_tensor_that_no_rank_owns_is_refused_everywhere(tiny_checkpoint: Path) -> None:
    for error in pool(2).run(fused_job, tiny_checkpoint):
        assert re.search("gate_proj.weight holds the experts of all ranks.*expert_model_parallel_size=2", error)


def refusal_job(path: Path, options: dict[str, Any]) -> str:
    from megatron_pr2 import host
    from megatron_pr2.hf.bridge import load_model

    host.init()
    try:
        load_model(path, dtype=torch.float32, wrap_with_ddp=False, bridge="megatron-bridge", **options)
    except ConfigError as error:
        return str(error)
    return ""


@needs_megatron_bridge
@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"mlp_only_layers": [1]}, {}, r"MoE layers \[0, 2, 3\].*would build layers \[0, 1, 2, 3\].*model.bridge=mbridge"),
        ({"attention_bias": True}, {}, "has no name for .* parameters.*bias"),
        ({}, {"extra_config": {"moe_expert_capcity": 1}}, r"has no fields \['moe_expert_capcity'\]"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, {}, "rope_type='linear'"),
    ],
    ids=["dense layers", "bias", "unknown field", "rope"],
)
def test_what_megatron_bridge_leaves_out_is_refused(
    changes: dict[str, Any], options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = make_checkpoint(tmp_path / "model", tiny_config("qwen3_moe", **changes))
    error = pool(1).run(refusal_job, path, options)[0]
    assert re.search(message, error), error


def traces_job() -> tuple[bool, bool, bool]:
    from megatron_pr2 import host

    host.enable()
    root = logging.getLogger()
    before = (root.level, list(root.handlers), root.manager.disable)
    from megatron_pr2.hf.megatron_bridge_backend import _auto_bridge_class

    _auto_bridge_class.cache_clear()
    _auto_bridge_class()
    loaded = "megatron.bridge" in sys.modules
    return loaded, "transformer_engine" in sys.modules, before == (root.level, list(root.handlers), root.manager.disable)


@needs_megatron_bridge
def test_importing_it_leaves_nothing_behind() -> None:
    """No stand-in for Transformer Engine, and no application's logging."""
    assert pool(1).run(traces_job) == [(True, False, True)]


# ---- the choice --------------------------------------------------------------------------------------------------------


def test_mbridge_is_taken_where_it_knows_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_pr2.hf.model_types.has_megatron_bridge", lambda: True)
    assert choose_bridge("qwen3_moe") == choose_bridge("qwen3_moe", "mbridge") == "mbridge"
    assert choose_bridge("qwen3_moe", "megatron-bridge") == "megatron-bridge"


@pytest.mark.parametrize(
    ("model_type", "wanted", "message"),
    [
        ("mamba", "auto", r"'mamba' cannot be trained.*qwen2_moe.*\(model.bridge=mbridge\).*\(model.bridge=megatron-bridge\)"),
        ("mixtral", "megatron-bridge", "'mixtral' cannot be trained here with model.bridge=megatron-bridge"),
        ("qwen3_moe", "megatron", "model.bridge='megatron': expected one of auto, mbridge, megatron-bridge"),
        ("qwen3_moe", "megatron-bridge", "which is not installed: pip install megatron-bridge"),
    ],
)
def test_what_cannot_be_built_is_told(model_type: str, wanted: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_pr2.hf.model_types.has_megatron_bridge", lambda: False)
    with pytest.raises(ConfigError, match=message):
        choose_bridge(model_type, wanted)
