"""Where the routers are: found by walking the live model, never by construction order (design decision 4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from megatron.core.transformer.moe.router import Router, TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_pr2.errors import AttachError
from megatron_pr2.parallel.decoder_layers import DecoderLayers, hybrid_pattern
from megatron_pr2.parallel.groups import gathered, pipeline_group
from megatron_pr2.replay.model_settings import check_not_captured
from megatron_pr2.replay.router import PredictiveTopKRouter


@dataclass(frozen=True)
class RouterSite:
    """One router of this rank.

    Attributes:
        chunk: index of its model chunk (virtual pipeline stage).
        local: 0-based index among the routers of this rank, ascending by layer.
        layer: 0-based index of its decoder layer in the whole model.
        hidden_layer: 0-based index of that layer among Hugging Face's; `layer` in a GPTModel. Checkpoints are keyed by it, so that
            those of a GPTModel fit the HybridModel that takes its place.
        column: its index among all MoE layers of the model, the L axis of a RouteTable.
        router: the module.
        original: the router's class before it was upgraded.
    """

    chunk: int
    local: int
    layer: int
    hidden_layer: int
    column: int
    router: PredictiveTopKRouter
    original: type[TopKRouter]


def unwrapped(chunk: torch.nn.Module) -> torch.nn.Module:
    """The model inside DDP, Float16Module and the like (they keep it in `.module`)."""
    while not hasattr(chunk, "decoder") and hasattr(chunk, "module"):
        chunk = chunk.module
    return chunk


def find_routers(chunks: Sequence[torch.nn.Module]) -> list[tuple[int, str, Router]]:
    """(chunk, name, router) of every router under a decoder; MTP heads and other decoders' heads are not looked into."""
    found = []
    for index, chunk in enumerate(chunks):
        for name, module in unwrapped(chunk).named_modules():
            if isinstance(module, Router) and name.startswith("decoder."):
                found.append((index, name, module))
    return found


def check_router(name: str, router: Router, config: TransformerConfig) -> None:
    """Refuses routers that cannot be replayed.

    Args:
        config: of the whole model, by which routes and features have one shape for all layers.

    Raises:
        AttachError: a custom class, sinkhorn routing, a router that another replay already holds, or one of another kind than the
            model's.
    """
    if isinstance(router, PredictiveTopKRouter) and router.attached:
        raise AttachError(f"{name}: predictive routing replay is already attached; call detach() first")
    if type(router) is not TopKRouter and not isinstance(router, PredictiveTopKRouter):
        raise AttachError(
            f"{name}: router class {type(router).__name__} is not Megatron-Core's TopKRouter; derive it from "
            "megatron_pr2.replay.router.PredictiveTopKRouter or use TopKRouter"
        )
    own = {
        "num_moe_experts": router.weight.shape[0],
        "hidden_size": router.weight.shape[1],
        "moe_router_topk": router.topk,
        "moe_router_score_function": router.score_function,
    }
    for setting, value in own.items():
        if value != getattr(config, setting):
            raise AttachError(
                f"{name}: this layer's router has {setting}={value!r}, the model's config {getattr(config, setting)!r}; routes and "
                "features have one shape and one kind of scores for all layers: such a model is not supported"
            )
    if router.routing_type in ("sinkhorn", "quantile_balancing"):
        raise AttachError(f"{name}: moe_router_load_balancing_type={router.routing_type!r} bypasses replay; use 'none' for RL")
    if router.router_replay is not None:
        raise AttachError(
            f"{name}: Megatron-Core's own router replay is on (moe_enable_routing_replay); set it to False, one replay at a time"
        )


def check_all_found(layers: set[int], moe_layers: Sequence[int]) -> None:
    """Refuses a model of which some MoE layer's router was not found on any pipeline rank: it would silently not be replayed.

    Collective over the pipeline group; a pipeline rank without any MoE layer is fine.

    Raises:
        AttachError: naming the layers.
    """
    stages = pipeline_group()
    found = layers if stages is None else set().union(*gathered(layers, stages))
    if absent := sorted(set(moe_layers) - found):
        raise AttachError(
            f"no router found for the MoE layers {absent} (0-based) of {len(moe_layers)}; attach() looks under the `decoder` of "
            "the model chunks it is given: pass every chunk of this rank, and of a multi-modal model its language model"
        )


def upgrade_routers(chunks: Sequence[torch.nn.Module]) -> tuple[list[RouterSite], DecoderLayers]:
    """Turns every decoder router into a PredictiveTopKRouter in place.

    Returns:
        The sites of this rank in ascending layer order, and the layers of the whole model.

    Raises:
        AttachError: a router that cannot be replayed, a MoE layer whose router is nowhere, or a layer number that neither
            moe_layer_freq nor the pattern of a HybridModel calls MoE. Nothing is changed in that case.
    """
    model = unwrapped(chunks[0])
    layers, pattern = DecoderLayers.of_model(model), hybrid_pattern(model)
    said_by = f"moe_layer_freq={model.config.moe_layer_freq}" if pattern is None else f"hybrid_layer_pattern={pattern!r}"
    if not layers.moe:
        raise AttachError(f"{said_by} of the model has no MoE layer: nothing to route; attach() needs a MoE model")
    found = sorted(find_routers(chunks), key=lambda item: item[2].layer_number)
    seen: dict[int, str] = {}
    for chunk, name, router in found:
        check_router(name, router, model.config)
        check_not_captured(unwrapped(chunks[chunk]), name)
        layer = router.layer_number - 1
        if layer not in layers.moe:
            raise AttachError(f"{name}: layer_number {router.layer_number} is not a MoE layer of {said_by}")
        if layer in seen:
            raise AttachError(f"{name} and {seen[layer]} both claim layer_number {router.layer_number}; is it built twice?")
        seen[layer] = name
    check_all_found(set(seen), layers.moe)
    sites = []
    for local, (chunk, _, router) in enumerate(found):
        # The class is swapped, not the module: optimizers, DDP buffers and checkpoints keep seeing the same parameters.
        original = type(router)
        if original is TopKRouter:
            router.__class__ = PredictiveTopKRouter
        router.attached = True
        layer = router.layer_number - 1
        column = layers.moe.index(layer)
        sites.append(RouterSite(chunk, local, layer, layers.hidden_moe[column], column, router, original))
    return sites, layers


def give_back(sites: Sequence[RouterSite]) -> None:
    """The routers as they were before `upgrade_routers`."""
    for site in sites:
        site.router.set_control(None)
        for name in ("_control", "attached"):
            site.router.__dict__.pop(name, None)
        site.router.__class__ = site.original
