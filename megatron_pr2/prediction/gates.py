"""Merging W_p into the gates among weights in Hugging Face names (design decision 2)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from megatron_pr2.errors import AttachError
from megatron_pr2.parallel.decoder_layers import DecoderLayers
from megatron_pr2.prediction.rounding import merge_gate
from megatron_pr2.replay.sites import RouterSite

# Hugging Face names of MoE gates: Qwen2/3-MoE, OLMoE, DeepSeek, GLM (mlp.gate), Mixtral (block_sparse_moe.gate), gpt-oss
# (mlp.router), Llama 4 (feed_forward.router) and Nemotron-H (mixer.gate). Layers of multi-token-prediction heads count from 0
# again (Qwen3-Next, Nemotron-H: mtp.layers.0).
GATE_NAME = re.compile(r"(?:^|(?<!mtp)\.)layers\.(\d+)\.(mlp|block_sparse_moe|feed_forward|mixer)\.(?:gate|router)\.weight$")
# What Nemotron-H calls the one part of a layer: its attention and its experts have a number each, as in HybridModel.
_ONLY_PART = "mixer"


@contextmanager
def gates_in_place(sites: Sequence[RouterSite], gates: Sequence[Tensor]) -> Iterator[None]:
    """The routers with other gates, whose own come back bit-identical."""
    saved = [site.router.weight.data for site in sites]
    try:
        for site, gate_EH in zip(sites, gates, strict=True):
            site.router.weight.data = gate_EH
        yield
    finally:
        for site, data in zip(sites, saved, strict=True):
            site.router.weight.data = data


def merge_gates(
    weights: Iterable[tuple[str, Tensor]],
    w_by_layer: Mapping[int, Tensor],
    layers: DecoderLayers | None = None,
    *,
    seed: int = 0,
    routers: torch.dtype | None = None,
    pushed: torch.dtype | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Passes weights through and adds to each decoder layer's (0-based) gate what is predicted for it, [E, H] fp32.

    Args:
        layers: of the model; None where Hugging Face numbers layers as Megatron-Core does (GPTModel).
        seed: of the rounding (prediction.rounding).
        routers: what W is kept in; None for any.
        pushed: in which gates are sent; None is that in which they come.

    Raises:
        AttachError: a gate of another dtype than the router's, which was rounded elsewhere; after the last weight, if not every
            layer's gate came by (another naming would lose the prediction silently).
    """
    of_hidden = {layer: layer for layer in w_by_layer} if layers is None else layers.of_hidden
    merged = set()
    failure: str | None = None  # raised behind the last weight: other ranks take part in the export
    for name, tensor in weights:
        if match := GATE_NAME.search(name):
            number = int(match.group(1))
            layer = number if match.group(2) == _ONLY_PART else of_hidden.get(number)
            if layer is not None and layer in w_by_layer:
                merged.add(layer)
                if routers is not None and tensor.dtype != routers:
                    failure = (
                        f"engine_weights: {name} comes in {tensor.dtype}, the router has {routers}, so that what arrives would not "
                        "be what is judged; export gates as they are, and say gate_dtype= for a push in another dtype"
                    )
                tensor = merge_gate(tensor, w_by_layer[layer], pushed, seed=seed, layer=layer)
        yield name, tensor
    if failure is not None:
        raise AttachError(failure)
    if merged != set(w_by_layer):
        why = "if the weights are those of one pipeline stage only, say own_stage=True"
        if not merged:
            why = (
                "their names do not follow Hugging Face's '...layers.N.mlp.gate.weight', '...block_sparse_moe.gate.weight' or, "
                "with a number for every layer of a pattern, '...layers.N.mixer.gate.weight'"
            )
        raise AttachError(
            f"engine_weights: merged the gates of layers {sorted(merged)}, the model has MoE layers {sorted(w_by_layer)}; {why}"
        )


def set_aside(weights: Iterable[tuple[str, Tensor]], gates: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Passes weights through but for the gates, copies of which are left in `gates` instead of what it held."""
    gates.clear()
    for name, tensor in weights:
        if GATE_NAME.search(name):
            gates[name] = tensor.detach().clone()
        else:
            yield name, tensor


def refused(weights: Iterable[tuple[str, Tensor]], failure: str) -> Iterator[tuple[str, Tensor]]:
    """Passes weights through, whose export other ranks take part in, and raises an AttachError behind the last one."""
    yield from weights
    raise AttachError(failure)
