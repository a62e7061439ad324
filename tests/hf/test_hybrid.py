"""Models whose attention and experts are layers of their own (HybridModel): layers, stages, gates, checkpoints of toy models.

The real HybridModel is in tests/parallel/test_hybrid.py.
"""

from __future__ import annotations

import importlib
import re
from contextlib import suppress
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from megatron_pr2.attach import PR2, attach
from megatron_pr2.checkpoint.checkpoint import load_sharded_state_dict, sharded_state_dict
from megatron_pr2.errors import AttachError, ConfigError
from megatron_pr2.hf.shape import model_shape
from megatron_pr2.parallel.decoder_layers import DecoderLayers, hybrid_pattern
from megatron_pr2.parallel.layout import ParallelLayout
from megatron_pr2.parallel.stages import cut_layers
from megatron_pr2.prediction.gates import GATE_NAME, merge_gates
from tests.helpers import toy
from tests.helpers.distributed import pool
from tests.helpers.simulated import group

pytestmark = pytest.mark.usefixtures("host_platform")

PR2_CONFIG = toy.preset("pr2", sample_fraction=0.5)
LENGTHS = {0: 30, 1: 50}


# ---- layers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "count", "moe", "hidden_count", "hidden_moe"),
    [
        ("*E*E", 4, (1, 3), 2, (0, 1)),
        ("*-|*E|GE|ME", 8, (3, 5, 7), 4, (1, 2, 3)),  # pipeline stages are no layers
        ("+-+E/+E/+E", 4, (3,), 2, (1,)),  # nor are multi-token-prediction heads
        ("MEM*EME", 7, (1, 4, 6), 7, (1, 4, 6)),  # Nemotron-H: a hidden layer each
        ("E*E*", 4, (0, 2), 4, (0, 2)),
        ("*E*", 3, (1,), 3, (1,)),
        ("**EE", 4, (2, 3), 4, (2, 3)),
        ("M*", 2, (), 2, ()),
    ],
)
def test_layers_of_a_pattern(
    pattern: str, count: int, moe: tuple[int, ...], hidden_count: int, hidden_moe: tuple[int, ...]
) -> None:
    layers = DecoderLayers.of_pattern(pattern)
    assert (layers.count, layers.moe, layers.hidden_count, layers.hidden_moe) == (count, moe, hidden_count, hidden_moe)
    assert layers.of_hidden == dict(zip(hidden_moe, moe, strict=True))


@pytest.mark.parametrize("name", ["hybrid_layer_pattern", "hybrid_override_pattern"])
def test_a_model_says_what_its_pattern_is(name: str) -> None:
    chunk = toy.ToyChunk(toy.toy_config(num_layers=4, moe_layer_freq=[0, 1, 0, 1]))
    assert hybrid_pattern(chunk) is None
    assert DecoderLayers.of_model(chunk) == DecoderLayers(4, (1, 3))
    setattr(chunk, name, "*E*E")
    assert DecoderLayers.of_model(chunk) == DecoderLayers(4, (1, 3), per_hidden_layer=2)
    setattr(chunk, name, None)  # MambaModel without a pattern
    assert hybrid_pattern(chunk) is None


def test_hugging_faces_config_says_the_same() -> None:
    """Nemotron-H: the engine's rows are those of the layers that its pattern calls experts, and that have a gate."""
    transformers = pytest.importorskip("transformers")
    pattern = "MEM*E-E"
    config = transformers.NemotronHConfig(
        hybrid_override_pattern=pattern, hidden_size=32, vocab_size=64, moe_intermediate_size=16, intermediate_size=16,
        moe_shared_expert_intermediate_size=16, mamba_num_heads=8, mamba_head_dim=8, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    gates = [int(found[1]) for name, _ in model.named_parameters() if (found := GATE_NAME.search(name))]
    layers, shape = DecoderLayers.of_pattern(pattern), model_shape(config)
    assert list(layers.hidden_moe) == list(shape.moe_layers) == gates == [1, 4, 6]
    assert layers.hidden_count == shape.num_hidden_layers


# ---- stages -----------------------------------------------------------------------------------------------------------


def selection() -> Any:
    """Megatron-Core's own choice of a stage's layers, HybridModel's or that of MambaModel before it."""
    for name in ("models.hybrid.hybrid_layer_allocation", "ssm.mamba_hybrid_layer_allocation"):
        with suppress(ModuleNotFoundError, AttributeError):
            return importlib.import_module(f"megatron.core.{name}").select_pipeline_segment
    pytest.skip("patterns of this Megatron-Core have no pipeline stages")


def megatron_stage(
    pattern: str, pipeline: int, stage: int, chunk: int | None, first: int | None = None, last: int | None = None
) -> tuple[str, int]:
    """Symbols of the layers that HybridModel builds on a stage, and the number of layers before them."""
    select = selection()
    answers = {"get_rank": lambda group: group.rank(), "get_world_size": lambda group: group.size()}
    with patch.multiple("torch.distributed", **answers), patch(f"{select.__module__}.log_on_each_pipeline_stage"):
        kinds, before = select(pattern.split("/")[0], group(pipeline, stage), chunk, first, last)
    return "".join(kinds), before


@given(st.data())
def test_stages_are_those_that_megatron_builds(data: st.DataObject) -> None:
    selection()
    pipeline, chunks = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 3))
    first = last = None
    if piped := pipeline > 1 and data.draw(st.booleans()):
        segments = data.draw(st.lists(st.text("M*-E", max_size=3), min_size=pipeline * chunks, max_size=pipeline * chunks))
        pattern = "|".join(segments)
    else:
        kinds = data.draw(st.text("M*-E", min_size=1, max_size=12))
        pattern, chunks = kinds, 1
        if pipeline > 2:
            first, last = data.draw(st.sampled_from([(None, None), (1, None), (None, 1), (1, 1)]))
    count = DecoderLayers.of_pattern(pattern).count
    assume(count)
    pattern += data.draw(st.sampled_from(["", "/*E", "/M/M"]))
    sizes: dict[str, Any] = {"num_layers": count, "pipeline": pipeline, "layers_in_first": first, "layers_in_last": last}
    try:
        layout = ParallelLayout(**sizes, hybrid_pattern=pattern)
    except ConfigError:
        assume(False)
        return
    assert (layout.virtual_pipeline or 1) == chunks
    whole = "".join(pattern.split("/")[0].split("|"))
    for stage in range(pipeline):
        for chunk in range(chunks):
            kinds, before = megatron_stage(pattern, pipeline, stage, chunk if piped else None, first, last)
            assert layout.layers(stage)[chunk] == tuple(range(before, before + len(kinds)))
            assert kinds == "".join(whole[layer] for layer in layout.layers(stage)[chunk])
    assert layout.moe_layers == DecoderLayers.of_pattern(pattern).moe
    columns = [column for stage in range(pipeline) for column in layout.moe_columns(stage)]
    assert sorted(columns) == list(range(len(layout.moe_layers)))


def test_a_layout_from_a_config_that_knows_nothing_of_the_pattern() -> None:
    config = toy.toy_config(num_layers=2, pipeline_model_parallel_size=2, pipeline_dtype=torch.float32)
    layout = ParallelLayout.of(config, world_size=2, hybrid_pattern="*-|*E|*E|*E")
    assert (layout.num_layers, layout.virtual_pipeline, layout.moe_layers) == (8, 2, (3, 5, 7))
    assert (layout.stages, layout.moe_columns(0)) == ((((0, 1), (4, 5)), ((2, 3), (6, 7))), (1,))


@pytest.mark.parametrize(
    ("pattern", "pipeline", "settings", "told", "theirs"),
    [
        ("*E*", 2, {}, "num_layers=3 is not a multiple of pipeline_model_parallel_size=2", "evenly divisible"),
        ("*E|*E|*E", 2, {}, "has 3 segments between '|', pipeline_model_parallel_size=2: expected a multiple", "evenly divisible"),
        ("*E*E", 2, {"virtual_pipeline": 2}, "expected 4 segments", "Virtual pipeline parallelism"),
        ("*E|*E", 2, {"in_first": 2}, "its '|' alone place all layers; drop the numbers", "Cannot specify"),
        ("*E|*E", 2, {"virtual_pipeline": 2}, "1 chunks per stage .* virtual_pipeline_model_parallel_size=2", "out of range"),
        # What Megatron-Core would silently build a part of.
        ("*E|*E", 1, {}, "has 2 segments between '|', pipeline_model_parallel_size=1: expected one", None),
        ("*E|*E|*E|*E", 2, {}, "2 chunks per stage .* virtual_pipeline_model_parallel_size=None", None),
        ("*E*E", 2, {"in_first": 1, "in_last": 1}, "of num_layers=4 leave 2 layers", None),
        ("*E|*E", 2, {"layout": "Et*2|t*2L"}, "HybridModel ignores the latter; cut the pattern", None),
        ("*E*E", 2, {"account_for_loss": True}, "account_for_loss_in_pipeline_split=True: HybridModel ignores", None),
    ],
)
def test_patterns_that_do_not_fit(pattern: str, pipeline: int, settings: dict[str, Any], told: str, theirs: str | None) -> None:
    layers = DecoderLayers.of_pattern(pattern).count
    with pytest.raises(ConfigError, match=told):
        cut_layers(layers, pipeline, **settings, hybrid_pattern=pattern)
    if theirs is not None:
        chunk = settings["virtual_pipeline"] - 1 if "virtual_pipeline" in settings else None
        with pytest.raises(ValueError, match=theirs):
            megatron_stage(pattern, pipeline, 1, chunk, settings.get("in_first"))


def test_a_pattern_of_another_length() -> None:
    with pytest.raises(ConfigError, match=re.escape("hybrid_layer_pattern='*E*E' has 4 layers, num_layers is 2")):
        ParallelLayout(num_layers=2, hybrid_pattern="*E*E")


# ---- attach() ---------------------------------------------------------------------------------------------------------


def hybrid_chunk(pattern: str, layers: list[int] | None = None) -> toy.ToyChunk:
    """A chunk with routers where the pattern has experts, whose config says nothing of it, as HybridModel's."""
    known = DecoderLayers.of_pattern(pattern)
    freq = [int(layer in known.moe) for layer in range(known.count)]
    chunk = toy.ToyChunk(toy.toy_config(num_layers=known.count, moe_layer_freq=freq), layers=layers)
    chunk.config.moe_layer_freq, chunk.config.is_hybrid_model = 1, True
    chunk.hybrid_layer_pattern = pattern
    return chunk


def gpt_chunk() -> toy.ToyChunk:
    return toy.ToyChunk(toy.toy_config(num_layers=2))


def trained(chunk: toy.ToyChunk, pr2: PR2) -> dict[str, Any]:
    """One batch with two mini-steps; the report of the second."""
    layers = len(pr2.moe_layers)
    tables = toy.random_tables(LENGTHS, toy.toy_config(num_layers=layers))
    pr2.begin_rollout(toy.sequences(LENGTHS, tables))
    data = toy.batches(LENGTHS, 1)
    toy.old_logprobs(pr2, chunk, data)
    toy.drift(chunk)
    toy.update(pr2, chunk, data, mini_step=2)
    return pr2.step(lr=1e-2)


def test_replays_as_the_gpt_model_with_the_same_routers() -> None:
    """Routes, features, drift and W_p go by the order of the MoE layers, not by their numbers."""
    gpt, hybrid = gpt_chunk(), hybrid_chunk("*E*E")
    hybrid.load_state_dict(
        {re.sub(r"layers\.(\d)", lambda m: f"layers.{2 * int(m[1]) + 1}", name): value for name, value in gpt.state_dict().items()}
    )
    one, other = attach(gpt, PR2_CONFIG), attach(hybrid, PR2_CONFIG)
    assert (one.moe_layers, other.moe_layers, other.layers.hidden_moe) == ((0, 1), (1, 3), (0, 1))
    assert [(site.layer, site.hidden_layer, site.column) for site in other.sites] == [(1, 0, 0), (3, 1, 1)]
    assert trained(gpt, one) == trained(hybrid, other)
    assert one.predictor is not None
    assert other.predictor is not None
    assert one.predictor.weight_LEH.any()
    assert torch.equal(one.predictor.weight_LEH, other.predictor.weight_LEH)
    other.detach()
    assert all(type(router) is TopKRouter for router in toy.routers(hybrid))


def test_chunks_that_do_not_hold_what_the_pattern_says() -> None:
    with pytest.raises(AttachError, match=r"no router found for the MoE layers \[3\] \(0-based\) of 2"):
        attach(hybrid_chunk("*E*E", layers=[1, 2]), PR2_CONFIG)
    chunk = hybrid_chunk("*E*E")
    chunk.hybrid_layer_pattern = "*EE*"
    with pytest.raises(AttachError, match=re.escape("layer_number 4 is not a MoE layer of hybrid_layer_pattern='*EE*'")):
        attach(chunk, PR2_CONFIG)
    chunk.hybrid_layer_pattern = "*-*-"
    with pytest.raises(AttachError, match=re.escape("hybrid_layer_pattern='*-*-' of the model has no MoE layer")):
        attach(chunk, PR2_CONFIG)
    assert all(type(router) is TopKRouter for router in toy.routers(chunk))
    chunk.hybrid_layer_pattern = "*E*E"
    assert attach(chunk, PR2_CONFIG).moe_layers == (1, 3)


def test_chunks_of_an_interleaved_pipeline() -> None:
    pattern = "*-|*E|*E|*E"
    chunks = [hybrid_chunk(pattern, layers) for layers in ([1, 2, 3, 4], [5, 6, 7, 8])]
    pr2 = attach(chunks, PR2_CONFIG)
    assert [(site.chunk, site.layer, site.column) for site in pr2.sites] == [(0, 3, 0), (1, 5, 1), (1, 7, 2)]


# ---- names and checkpoints --------------------------------------------------------------------------------------------


def gates(names: list[str]) -> dict[str, Tensor]:
    return {name: torch.zeros(toy.EXPERTS, toy.HIDDEN) for name in names}


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("*E*E", ["model.layers.0.mlp.gate.weight", "model.layers.1.mlp.gate.weight"]),
        ("*-*EGE", ["model.layers.1.mlp.gate.weight", "model.layers.2.mlp.gate.weight"]),
        ("ME*E", ["model.layers.0.block_sparse_moe.gate.weight", "model.layers.1.block_sparse_moe.gate.weight"]),
        # Nemotron-H: a number for each layer of the pattern, also where they take turns.
        ("MEM*E", ["backbone.layers.1.mixer.gate.weight", "backbone.layers.4.mixer.gate.weight"]),
        ("ME*E", ["model.layers.1.mixer.gate.weight", "model.layers.3.mixer.gate.weight"]),
    ],
)
def test_each_gate_gets_its_own_layers_prediction(pattern: str, names: list[str]) -> None:
    chunk = hybrid_chunk(pattern)
    pr2 = attach(chunk, PR2_CONFIG)
    assert pr2.predictor is not None
    for column in range(2):
        pr2.predictor.weight_LEH[column] = column + 1.0
    others = ["mtp.layers.0.mixer.gate.weight", "model.layers.0.self_attn.q_proj.weight"]
    merged = dict(pr2.engine_weights(gates(names + others).items()))
    assert list(merged) == names + others
    assert [float(tensor.mean()) for tensor in merged.values()] == [1.0, 2.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("*E*E", ["model.layers.1.mlp.gate.weight", "model.layers.3.mlp.gate.weight"]),  # the decoder's numbers
        ("MEM*E", ["model.layers.0.mlp.gate.weight", "model.layers.1.mlp.gate.weight"]),  # layers that the pattern does not pair
        ("MEM*E", ["backbone.layers.1.mixer.gate.weight"]),
    ],
)
def test_gates_under_other_numbers_are_refused(pattern: str, names: list[str]) -> None:
    pr2 = attach(hybrid_chunk(pattern), PR2_CONFIG)
    assert pr2.predictor is not None
    with pytest.raises(AttachError, match=r"engine_weights: merged the gates of layers .*, the model has MoE layers"):
        list(pr2.engine_weights(gates(names).items()))


def test_gates_of_a_stage() -> None:
    w = torch.ones(toy.EXPERTS, toy.HIDDEN)
    layers = DecoderLayers.of_pattern("*E|*E")
    merged = dict(merge_gates(gates(["model.layers.1.mlp.gate.weight"]).items(), {3: w}, layers))
    assert torch.equal(merged["model.layers.1.mlp.gate.weight"], w)


def moved_job() -> list[float]:
    """A GPTModel's W_p in the HybridModel that takes its place, in one with other layers, and back."""
    from megatron_pr2 import host

    host.init()
    gpt, hybrid = attach(gpt_chunk(), PR2_CONFIG), attach(hybrid_chunk("*E*E"), PR2_CONFIG)
    assert gpt.predictor is not None
    assert hybrid.predictor is not None
    gpt.predictor.weight_LEH[0], gpt.predictor.weight_LEH[1] = 1.0, 2.0
    state = sharded_state_dict(gpt)
    assert state.keys() == sharded_state_dict(hybrid).keys()
    assert state.keys().isdisjoint(sharded_state_dict(attach(hybrid_chunk("*-M-*E*E"), PR2_CONFIG)).keys())
    load_sharded_state_dict(hybrid, {key: shard.data for key, shard in state.items()})
    return [float(w.mean()) for w in hybrid.predictor.weight_LEH]


def test_the_checkpoint_of_a_gpt_model_fits_the_hybrid_model() -> None:
    assert pool(1).run(moved_job) == [[1.0, 2.0]]
