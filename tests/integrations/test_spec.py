"""with_pr2_routers(): which routers a spec builds afterwards, what it leaves alone, what it refuses."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from megatron.core.models.gpt import gpt_layer_specs, moe_module_specs
from megatron.core.transformer import multi_token_prediction
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules

from megatron_pr2.errors import AttachError
from megatron_pr2.integrations.spec import with_pr2_routers
from megatron_pr2.replay.router import PredictiveTopKRouter
from tests.helpers.distributed import pool
from tests.integrations.two_ways import build, build_two_ways, contents, gpt_config, moe_submodules

pytestmark = pytest.mark.usefixtures("host_platform")


class CustomRouter(TopKRouter):
    """Somebody's router with a selection of its own."""


class DerivedRouter(PredictiveTopKRouter):
    """Somebody's router on the class that the error message recommends."""


# With use_transformer_engine=True these are Megatron-Core's own functions on the host's stand-ins for Transformer Engine's modules.
def block_spec(use_te: bool, **changes: Any) -> TransformerBlockSubmodules:
    return gpt_layer_specs.get_gpt_decoder_block_spec(gpt_config(**changes), use_transformer_engine=use_te, pp_rank=0)


def layer_spec(use_te: bool, experts: int | None = 4) -> ModuleSpec:
    if use_te:
        return gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec(num_experts=experts, moe_grouped_gemm=True)
    return gpt_layer_specs.get_gpt_layer_local_spec(num_experts=experts)


def router_of(layer: ModuleSpec) -> Any:
    return moe_submodules(layer.submodules.mlp).router


def with_router(spec: ModuleSpec, router: Any) -> ModuleSpec:
    moe_submodules(spec.submodules.mlp).router = router
    return spec


# ---- what is changed -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_te", [False, True])
def test_moe_layers_of_a_block_and_nothing_else(use_te: bool) -> None:
    spec = block_spec(use_te, moe_layer_freq=[0, 1, 0, 1])
    before = copy.deepcopy(spec)
    changed = with_pr2_routers(spec)
    assert contents(spec) == contents(before), "the given spec was changed"
    assert changed is not spec
    assert changed.layer_norm is spec.layer_norm
    routers = [getattr(moe_submodules(layer.submodules.mlp), "router", None) for layer in changed.layer_specs]
    assert routers == [None, PredictiveTopKRouter, None, PredictiveTopKRouter]
    for given, new in zip(spec.layer_specs, changed.layer_specs, strict=True):
        if not hasattr(moe_submodules(new.submodules.mlp), "router"):
            assert new is given
            continue
        assert new.submodules.self_attention is given.submodules.self_attention
        assert moe_submodules(new.submodules.mlp).experts is moe_submodules(given.submodules.mlp).experts
        with_router(new, TopKRouter)
        assert contents(new) == contents(given), "more than the router was changed"
    # Megatron-Core repeats one object for all layers of a kind.
    assert changed.layer_specs[1] is changed.layer_specs[3]


@pytest.mark.parametrize("use_te", [False, True])
@pytest.mark.parametrize("latent", [False, True])
def test_the_specs_of_single_layers(use_te: bool, latent: bool) -> None:
    config = gpt_config(moe_layer_freq=1)
    function = "get_gpt_layer_with_transformer_engine_spec" if use_te else "get_gpt_layer_local_spec"
    layer = getattr(gpt_layer_specs, function)(num_experts=4, multi_latent_attention=latent)
    moe = moe_module_specs.get_moe_module_spec(use_te=use_te, num_experts=4)
    layers = gpt_layer_specs.get_gpt_decoder_layer_specs(config, use_transformer_engine=use_te)
    block = ModuleSpec(module=TransformerBlock, submodules=block_spec(use_te))
    assert router_of(with_pr2_routers(layer)) is PredictiveTopKRouter
    assert moe_submodules(with_pr2_routers(moe)).router is PredictiveTopKRouter
    assert [router_of(each) for each in with_pr2_routers(layers)] == [PredictiveTopKRouter] * 4
    assert router_of(with_pr2_routers(block).submodules.layer_specs[1]) is PredictiveTopKRouter
    assert router_of(layer) is moe_submodules(moe).router is TopKRouter


def test_specs_that_have_them_already() -> None:
    once = with_pr2_routers(block_spec(True))
    assert contents(with_pr2_routers(once)) == contents(once)
    derived = with_router(layer_spec(True), DerivedRouter)
    assert router_of(with_pr2_routers(derived)) is DerivedRouter


def test_heads_for_multi_token_prediction_stay_as_they_are() -> None:
    backend = gpt_layer_specs.TESpecProvider()
    head = multi_token_prediction.get_mtp_layer_spec_for_backend(layer_spec(True), backend=backend)
    heads = multi_token_prediction.MultiTokenPredictionBlockSubmodules(layer_specs=[head])
    before = copy.deepcopy(heads)
    assert with_pr2_routers(heads) is heads
    assert contents(heads) == contents(before)


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_a_model_without_experts() -> None:
    dense = layer_spec(True, experts=None)
    with pytest.raises(AttachError, match=r"the spec has no MoE layer; build it from a config with num_moe_experts"):
        with_pr2_routers(dense)
    with pytest.raises(AttachError, match="no MoE layer"):
        with_pr2_routers(TransformerBlockSubmodules(layer_specs=[]))
    # The first stage of a dense-first model.
    assert with_pr2_routers(dense, require_moe=False) is dense


@pytest.mark.parametrize("router", [CustomRouter, partial(TopKRouter)])
def test_routers_that_cannot_be_replayed(router: Any) -> None:
    spec = block_spec(True)
    with_router(spec.layer_specs[2], router)
    name = "CustomRouter" if router is CustomRouter else "functools.partial"
    with pytest.raises(AttachError, match=rf"spec\.layer_specs\[1\]\.submodules\.mlp\.submodules\.router: .*{name}.* derive it"):
        with_pr2_routers(spec)


@pytest.mark.parametrize(
    ("mlp", "message"),
    [
        (ModuleSpec(module=MoELayer), r"submodules\.mlp: MoELayer is a MoE layer with NoneType as submodules"),
        (MoELayer, r"submodules\.mlp: MoELayer without submodules; expected ModuleSpec"),
        (partial(MoELayer), r"submodules\.mlp: MoELayer is a MoE layer with NoneType as submodules"),
    ],
)
def test_moe_layers_whose_router_is_out_of_reach(mlp: Any, message: str) -> None:
    spec = layer_spec(True)
    spec.submodules.mlp = mlp
    with pytest.raises(AttachError, match=message):
        with_pr2_routers(spec)


@pytest.mark.parametrize("spec", [None, TopKRouter, with_pr2_routers])
def test_what_is_no_spec(spec: Any) -> None:
    with pytest.raises(AttachError, match=r"spec: \w+ is no spec of a GPT decoder; expected TransformerBlockSubmodules"):
        with_pr2_routers(spec)


# ---- models that are built so ----------------------------------------------------------------------------------------


def built_model_job(use_te: bool) -> dict[str, Any]:
    from megatron_pr2 import host
    from megatron_pr2.attach import attach
    from megatron_pr2.config import PR2Config

    host.init()
    by_spec, plain = build_two_ways(use_transformer_engine=use_te)
    tokens = torch.arange(20).view(2, 10)
    positions = torch.arange(10).expand_as(tokens)
    with torch.no_grad():
        before = by_spec(tokens, positions, None)
        same = torch.equal(before, plain(tokens, positions, None))
    pr2 = attach(by_spec, PR2Config.preset("pr2"))
    classes = [type(site.router).__name__ for site in pr2.sites]
    pr2.detach()
    with torch.no_grad():
        restored = torch.equal(by_spec(tokens, positions, None), before)
    after = [type(layer.mlp.router).__name__ for layer in by_spec.decoder.layers if hasattr(layer.mlp, "router")]
    return {"same": same, "classes": classes, "restored": restored, "after": after, "layers": pr2.moe_layers}


@pytest.mark.parametrize("use_te", [False, True])
def test_a_model_built_by_the_spec(use_te: bool) -> None:
    """Without a session it computes what TopKRouters compute; attach() takes it; detach() leaves the class of the spec."""
    (found,) = pool(1).run(built_model_job, use_te)
    assert found["same"]
    assert found["layers"] == (1, 2, 3)
    assert found["classes"] == found["after"] == ["PredictiveTopKRouter"] * 3
    assert found["restored"]


def single_layer_spec_job() -> list[str]:
    """A ModuleSpec of one layer, which TransformerBlock repeats for all."""
    from megatron_pr2 import host

    host.init()
    model = build(gpt_config(moe_layer_freq=1), with_pr2_routers(layer_spec(False, experts=8)))
    return [type(layer.mlp.router).__name__ for layer in model.decoder.layers]


def test_a_model_of_one_repeated_layer() -> None:
    assert pool(1).run(single_layer_spec_job) == [["PredictiveTopKRouter"] * 4]
