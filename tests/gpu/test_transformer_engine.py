"""Replay in models of Transformer Engine's modules: layer spec, grouped experts, FP8, fused router, fused permutation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.experts import TEGroupedMLP

from tests.gpu import models
from tests.gpu.needs import needs
from tests.gpu.test_models import check_i1_i2
from tests.helpers import toy

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("one_rank")]

Detail = Callable[[str, Any], None]
# The format that Transformer Engine's recipe of that name is made for, and the first release that Megatron-Core uses it with.
FP8 = {"tensorwise": ("hybrid", "2.2.0"), "blockwise": ("e4m3", "2.3.0")}


def check_modules(model: torch.nn.Module) -> None:
    """Grouped experts in every layer."""
    layers = model.module.module.decoder.layers
    assert len(layers) == 2
    assert all(type(layer.mlp.experts) is TEGroupedMLP for layer in layers)


def check_fused_router(spec: str, *, on_gpu: bool) -> str:
    """Live routing calls the fused kernel, replay does not and is exact, live routing afterwards does again.

    Args:
        spec: of a model whose `moe_utils.fused_topk_with_score_function` works.
    """
    fused = models.build(spec, models.model_config(spec, on_gpu=on_gpu, moe_router_fusion=True))
    plain = models.build(spec, models.model_config(spec, on_gpu=on_gpu))
    kernel = moe_utils.fused_topk_with_score_function
    with mock.patch.object(moe_utils, "fused_topk_with_score_function", side_effect=kernel) as spy:
        before = models.live(fused)
        calls = spy.call_count
        assert calls == 2 * len(before)  # layers x micro-batches
        pr2, tables = models.begin(fused, toy.preset("r3", max_missing_share=1.0))
        assert all(torch.equal(a, b) for a, b in zip(models.live(fused), before, strict=True))
        assert spy.call_count == 2 * calls
        items = models.items_of()
        with models.observed(fused) as seen, pr2.actor_update([item["micro_batch"] for item in items], 1) as session:
            models.run(session, fused, items)
        assert spy.call_count == 2 * calls
        wrong, rows = models.wrong_routes(seen, items, tables)
        assert (wrong, rows > 300) == (0, True)
        after = models.live(fused)
        assert spy.call_count == 3 * calls
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    distance = models.relative_distance(before, models.live(plain))
    assert distance < 0.05
    return f"live losses of the fused and the unfused router differ by {distance:.0e}"


def check_permute_fusion(spec: str, dispatcher: str, *, on_gpu: bool, **fusion: Any) -> str:
    """The fused permutation gives what the unfused one gives, on exact routes."""
    plain = models.replay(spec, models.model_config(spec, on_gpu=on_gpu, moe_token_dispatcher_type=dispatcher))
    fused = models.replay(spec, models.model_config(spec, on_gpu=on_gpu, moe_token_dispatcher_type=dispatcher, **fusion))
    assert plain.wrong == fused.wrong == 0
    assert plain.rows == fused.rows > 300
    losses = models.relative_distance(fused.losses, plain.losses)
    gradients = models.relative_distance(fused.gradients, plain.gradients)
    assert losses < 0.01
    assert gradients < 0.05
    return f"losses off by {losses:.0e}, gradients by {gradients:.0e}"


def check_fp8(recipe: str, option: str) -> str:
    """FP8 changes results by its own rounding only: routes are exact under either name of the padding option."""
    exact = models.replay("te", models.model_config("te", on_gpu=True))
    rounded = models.replay("te", models.model_config("te", on_gpu=True, **fp8_settings(recipe), **{option: True}))
    assert exact.wrong == rounded.wrong == 0
    assert exact.rows == rounded.rows > 300
    losses = models.relative_distance(rounded.losses, exact.losses)
    gradients = models.relative_distance(rounded.gradients, exact.gradients)
    assert 0.0 < losses < 0.1  # zero would mean that FP8 was not on
    assert 0.0 < gradients < 0.5
    return f"losses off by {losses:.0e}, gradients by {gradients:.0e}"


def fp8_settings(recipe: str) -> dict[str, Any]:
    """Fields of TransformerConfig."""
    return {"fp8": FP8[recipe][0], "fp8_recipe": recipe}


def unsupported(recipe: str) -> str | None:
    """Why Transformer Engine cannot run a recipe on this GPU, or None."""
    from transformer_engine import pytorch

    asked = "is_fp8_block_scaling_available" if recipe == "blockwise" else "is_fp8_available"
    if hasattr(pytorch, asked):
        available, reason = getattr(pytorch, asked)(return_reason=True)
    else:  # older releases
        from transformer_engine.pytorch.fp8 import FP8GlobalStateManager

        available, reason = getattr(FP8GlobalStateManager, asked)()
    return None if available else f"FP8 {recipe}: {reason or 'not available here'}"


@needs(te="1.9.0")
@pytest.mark.usefixtures("deterministic")
def test_layer_spec_i1_i2(record_property: Detail) -> None:
    """get_gpt_layer_with_transformer_engine_spec, with I1 and I2 bit by bit."""
    record_property("detail", check_i1_i2("te", on_gpu=True))


@needs(te="1.9.0")
def test_experts_are_grouped() -> None:
    """What the other checks of this file run on is TEGroupedMLP."""
    check_modules(models.build("te", models.model_config("te", on_gpu=True)))


@pytest.mark.parametrize("option", ["moe_router_padding_for_quantization", "moe_router_padding_for_fp8"])
@needs(te=FP8["tensorwise"][1])
def test_fp8_tensorwise_with_router_padding(option: str, record_property: Detail) -> None:
    if reason := unsupported("tensorwise"):
        pytest.skip(reason)
    record_property("detail", check_fp8("tensorwise", option))


@pytest.mark.parametrize("option", ["moe_router_padding_for_quantization", "moe_router_padding_for_fp8"])
@needs(te=FP8["blockwise"][1])
def test_fp8_blockwise_with_router_padding(option: str, record_property: Detail) -> None:
    if reason := unsupported("blockwise"):
        pytest.skip(reason)
    record_property("detail", check_fp8("blockwise", option))


@needs(te="2.7.0")
def test_the_router_is_fused_live_and_unfused_while_replaying(record_property: Detail) -> None:
    record_property("detail", check_fused_router("te", on_gpu=True))


@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
@needs(te="2.1.0")
def test_permute_fusion(dispatcher: str, record_property: Detail) -> None:
    record_property("detail", check_permute_fusion("te", dispatcher, on_gpu=True, moe_permute_fusion=True))
