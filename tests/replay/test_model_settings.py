"""Settings of the model: what replay cannot follow is refused by name, in every release that has it, and the rest attaches."""

from __future__ import annotations

import dataclasses
import logging
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import nn

from megatron_pr2 import host
from megatron_pr2.attach import attach
from megatron_pr2.errors import AttachError, ReplayError
from megatron_pr2.replay.hook import knows_score_function
from megatron_pr2.replay.micro_batch import MicroBatch
from megatron_pr2.replay.model_settings import REFUSED
from tests.helpers import toy
from tests.helpers.distributed import pool

pytestmark = pytest.mark.usefixtures("host_platform")

PR2_CONFIG = toy.preset("pr2")
FIELDS = {field.name for field in dataclasses.fields(TransformerConfig)}
# What a release calls the parts of a layer that it captures.
PARTS = [name for name in ("cuda_graph_scope", "cuda_graph_modules") if name in FIELDS]
SETTINGS_PAGE = Path(__file__).parents[2] / "docs" / "attach.md"


def refused(config: TransformerConfig, message: str) -> None:
    chunk = toy.ToyChunk(config)
    with pytest.raises(AttachError, match=message):
        attach(chunk, PR2_CONFIG)
    assert type(toy.routers(chunk)[0]) is TopKRouter


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("moe_expert_capacity_factor", 1.0, "moe_expert_capacity_factor=1.0 drops tokens from experts, .* set it to None"),
        ("moe_expert_rank_capacity_factor", 1.5, "moe_expert_rank_capacity_factor=1.5 .*'deepep' drops tokens .* set it to None"),
        ("overlap_moe_expert_parallel_comm", True, "overlap_moe_expert_parallel_comm=True"),
        ("moe_router_force_load_balancing", True, "moe_router_force_load_balancing=True replaces router logits by noise"),
        ("moe_router_force_biased", -0.5, "moe_router_force_biased=-0.5 replaces router logits by noise"),
        ("moe_n_hash_layers", 3, "moe_n_hash_layers=3 makes hash layers, which choose experts by token id"),
        ("moe_num_hash_layers", 3, "moe_num_hash_layers=3 makes hash layers, which choose experts by token id"),
        ("hybrid_context_parallel", True, "hybrid_context_parallel=True changes the context-parallel size"),
        ("mlp_chunks_for_training", 2, "mlp_chunks_for_training=2 calls each router several times .* set it to 1"),
        ("moe_paged_stash", True, "moe_paged_stash=True runs a whole schedule again .* set it to False"),
        ("gtp_weight_remat_size", 2, "^gtp_weight_remat_size=2 adds an axis .* leave tensor_parallel_num_weight_shards out"),
        ("expert_gtp_weight_remat_size", 2, "expert_gtp_weight_remat_size=2 .* leave expert_tensor_parallel_num_weight_shards out"),
    ],
)
def test_settings_that_replay_cannot_follow(setting: str, value: Any, message: str) -> None:
    config = toy.toy_config()
    setattr(config, setting, value)
    refused(config, message)
    for off in (None, type(value)(1) if setting.endswith("_size") or "chunks" in setting else None):
        setattr(config, setting, off)  # and nothing was changed
        attach(toy.ToyChunk(config), PR2_CONFIG)


MOVING: list[tuple[str, float, dict[str, Any]]] = [
    ("moe_aux_loss_coeff", 0.01, {"moe_router_load_balancing_type": "aux_loss"}),
    ("moe_z_loss_coeff", 0.001, {}),
    ("moe_router_bias_update_rate", 0.001, toy.ROUTERS["sigmoid-bias"]),
    ("moe_input_jitter_eps", 0.01, {}),
    ("hidden_dropout", 0.1, {}),
    ("attention_dropout", 0.1, {}),
]


@pytest.mark.parametrize(("name", "value", "others"), MOVING)
def test_what_moves_routing_besides_the_policy_gradient_is_warned_of_once(
    name: str, value: float, others: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    attach(toy.ToyChunk(toy.toy_config(**{**others, name: value})), PR2_CONFIG)
    (record,) = caplog.records
    assert f"{name}={value} (" in record.getMessage()
    caplog.clear()
    attach(toy.ToyChunk(toy.toy_config(**{**others, name: 0.0})), PR2_CONFIG)
    attach(toy.ToyChunk(toy.toy_config(moe_router_load_balancing_type="none", moe_aux_loss_coeff=0.01)), PR2_CONFIG)
    assert not caplog.records


def warned_job() -> list[str]:
    """What attach() says on this rank of a model of two layers with all of these settings."""
    settings: dict[str, Any] = {}
    for name, value, others in MOVING:
        settings |= {**others, name: value}
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("megatron_pr2")
    logger.addHandler(handler)
    host.init()
    attach(toy.ToyChunk(toy.toy_config(**settings)), PR2_CONFIG)
    logger.removeHandler(handler)
    return lines


def test_such_a_warning_comes_from_one_rank() -> None:
    (line,), others = pool(2).run(warned_job)
    assert all(f"{name}=" in line for name, *_ in MOVING)
    assert not others


def test_every_refused_setting_is_tried() -> None:
    (tried,) = test_settings_that_replay_cannot_follow.pytestmark  # type: ignore[attr-defined]
    assert {name for name, *_ in tried.args[1]} >= set(REFUSED)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mlp_chunks_for_training": 2}, "mlp_chunks_for_training=2"),
        ({"tensor_parallel_num_weight_shards": 2}, "gtp_weight_remat_size=2"),
        ({"expert_tensor_parallel_num_weight_shards": 2}, "expert_gtp_weight_remat_size=2"),
        (
            {
                "moe_expert_rank_capacity_factor": 2.0, "moe_flex_dispatcher_backend": "hybridep",
                "moe_token_dispatcher_type": "flex", "use_transformer_engine_op_fuser": True,
            },
            "moe_expert_rank_capacity_factor=2.0 with moe_flex_dispatcher_backend='hybridep' drops tokens",
        ),
        ({"moe_router_force_biased": 0.5}, "moe_router_force_biased=0.5"),
    ],
    ids=lambda each: next(iter(each)) if isinstance(each, dict) else "",
)  # fmt: skip
def test_as_this_releases_config_takes_them(settings: dict[str, Any], message: str) -> None:
    """What the config derives from what a user sets: sizes of GTP are made of shards."""
    if absent := settings.keys() - FIELDS:
        pytest.skip(f"this release has no {', '.join(sorted(absent))}")
    refused(toy.toy_config(**settings), message)


def test_a_budget_that_stops_the_run_is_not_one_that_drops_tokens() -> None:
    """NCCL EP needs a capacity of each rank to size its buffers, and ends with an error where it is too small."""
    config = toy.toy_config()
    for name, value in {"moe_expert_rank_capacity_factor": 4.0, "moe_flex_dispatcher_backend": "ncclep"}.items():
        setattr(config, name, value)
    attach(toy.ToyChunk(config), PR2_CONFIG)


def test_score_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    config = toy.toy_config()
    chunk = toy.ToyChunk(config)
    config.moe_router_score_function = "tanh"
    with pytest.raises(AttachError, match=r"='tanh': PR2 knows no divergence .* use softmax or sigmoid or"):
        attach(chunk, PR2_CONFIG)
    assert [knows_score_function(name) for name in ("softmax", "sigmoid", "tanh")] == [True, True, False]
    config.moe_router_score_function = "sqrtsoftplus"
    monkeypatch.setattr("megatron_pr2.replay.model_settings.knows_score_function", lambda name: False)
    with pytest.raises(AttachError, match="'sqrtsoftplus': this release of Megatron-Core does not route by it"):
        attach(chunk, PR2_CONFIG)


def test_layers_that_run_in_parts_are_named() -> None:
    """As mlp_chunks_for_prefill makes them do under an inference context, which the settings alone do not tell."""
    chunk = toy.ToyChunk(toy.toy_config())
    pr2 = attach(chunk, toy.preset("r2"))
    mlp = chunk.decoder.layers[0].mlp
    chunk.decoder.layers[0].forward = lambda h_SBH: torch.cat([mlp(part) for part in h_SBH.chunk(2)])
    message = "the router sees 3 rows, .* has 6 on this rank; .*mlp_chunks_for_prefill above 1, .* set it to 1"
    with pytest.raises(ReplayError, match=message), pr2.record([MicroBatch.packed([0], [6])]):
        chunk(torch.zeros(6, 1, toy.HIDDEN))


# ---- CUDA graphs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("parts", ["attn", ["attn"]], ids=str)
def test_graphs_of_attention_alone(name: str, parts: Any) -> None:
    """Later releases move the scope to another field when the config is made, and leave None behind."""
    attach(toy.ToyChunk(toy.toy_config(cuda_graph_impl="transformer_engine", **{name: parts})), PR2_CONFIG)


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("parts", [["moe_router"], ["attn", "moe_router"], []], ids=str)
def test_graphs_that_hold_the_router(name: str, parts: list[str]) -> None:
    config = toy.toy_config(cuda_graph_impl="transformer_engine", **{name: parts})
    refused(config, f"with {PARTS[-1]}={','.join(parts) or 'the whole layer'} captures the routers.* set .* to others")


def test_graphs_of_a_whole_iteration() -> None:
    implementation = {"cuda_graph_impl": "local", PARTS[0]: "full_iteration"}
    refused(toy.toy_config(**implementation), r"cuda_graph_impl='(local|full_iteration)' with .* captures the routers")
    config = toy.toy_config()
    config.cuda_graph_impl = "full_iteration"
    refused(config, "cuda_graph_impl='full_iteration' with .*the whole layer captures the routers")


def test_graphs_of_blocks_are_for_inference() -> None:
    if "inference_cuda_graph_scope" not in FIELDS:
        pytest.skip("this release has no inference_cuda_graph_scope")
    graphs: dict[str, Any] = {"cuda_graph_impl": "local", "cuda_graph_modules": []}
    attach(toy.ToyChunk(toy.toy_config(**graphs, inference_cuda_graph_scope="block")), PR2_CONFIG)
    refused(toy.toy_config(**graphs), "with cuda_graph_modules=the whole layer")


def test_megatrons_own_attention_graphs_hold_the_whole_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its code takes a layer with attention and experts as one graph where `attn` is named: found in the built model."""
    config = toy.toy_config(cuda_graph_impl="local", **{PARTS[-1]: "attn"})
    chunk = toy.ToyChunk(config)
    monkeypatch.setattr("megatron.core.transformer.cuda_graphs.CudaGraphManager", lambda config: nn.Module())
    layer = chunk.decoder.layers[1]
    layer.config, layer.is_moe_layer = config, True
    layer.submodules_config = SimpleNamespace(self_attention=nn.Module, mlp=nn.Module)
    TransformerLayer.create_mcore_cudagraph_manager(layer, config)
    with pytest.raises(AttachError, match=r"decoder\.layers\.1\.mlp\.router: cuda_graph_impl='local' captures decoder\.layers\.1 "):
        attach(chunk, PR2_CONFIG)
    assert all(type(router) is TopKRouter for router in toy.routers(chunk))
    del layer.cudagraph_manager
    attach(chunk, PR2_CONFIG)


# ---- what was looked at ----------------------------------------------------------------------------------------------


def test_every_setting_of_this_release_that_concerns_routing_was_looked_at() -> None:
    """A later release's new setting fails here until somebody says what it does to replay."""
    concern = re.compile(r"moe_|router|expert|gtp|_chunks_|cuda_graph|paged_stash|hash_layers|weight_shards")
    page = SETTINGS_PAGE.read_text()
    said = set(re.findall(r"`(\w+)`", page[page.index("## Settings of Megatron-Core") :]))
    assert {name for name in FIELDS if concern.search(name)} <= said
