"""Merging W_p into the gates among weights in Hugging Face names (design decision 2)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import Tensor

from megatron_pr2.errors import AttachError
from megatron_pr2.parallel.decoder_layers import DecoderLayers
from megatron_pr2.prediction.predictor import merge_gate
from megatron_pr2.replay.sites import RouterSite

# Hugging Face names of MoE gates: Qwen2/3-MoE, OLMoE, DeepSeek, GLM (mlp.gate), Mixtral (block_sparse_moe.gate), gpt-oss
# (mlp.router), Llama 4 (feed_forward.router) and Nemotron-H (mixer.gate). Layers of multi-token-prediction heads count from 0
# again (Qwen3-Next, Nemotron-H: mtp.layers.0).
GATE_NAME = re.compile(r"(?:^|(?<!mtp)\.)layers\.(\d+)\.(mlp|block_sparse_moe|feed_forward|mixer)\.(?:gate|router)\.weight$")
# What Nemotron-H calls the one part of a layer: its attention and its experts have a number each, as in HybridModel.
_ONLY_PART = "mixer"


@contextmanager
def merged_in_place(sites: Sequence[RouterSite], prediction: Callable[[RouterSite], Tensor | None]) -> Iterator[None]:
    """The routers with what is predicted for them in their own gates, which come back bit-identical; None leaves one alone."""
    saved = [site.router.weight.data for site in sites]
    try:
        for site in sites:
            if (w_EH := prediction(site)) is not None:
                site.router.weight.data = merge_gate(site.router.weight.data, w_EH)
        yield
    finally:
        for site, data in zip(sites, saved, strict=True):
            site.router.weight.data = data


def merge_gates(
    weights: Iterable[tuple[str, Tensor]], w_by_layer: Mapping[int, Tensor], layers: DecoderLayers | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Passes weights through and adds W_p [E, H] of each decoder layer (0-based) to its gate.

    Args:
        layers: of the model; None where Hugging Face numbers layers as Megatron-Core does (GPTModel).

    Raises:
        AttachError: after the last weight, if not every layer's gate came by (another naming would lose the prediction silently).
    """
    of_hidden = {layer: layer for layer in w_by_layer} if layers is None else layers.of_hidden
    merged = set()
    for name, tensor in weights:
        if match := GATE_NAME.search(name):
            number = int(match.group(1))
            layer = number if match.group(2) == _ONLY_PART else of_hidden.get(number)
            if layer is not None and layer in w_by_layer:
                merged.add(layer)
                tensor = merge_gate(tensor, w_by_layer[layer])
        yield name, tensor
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
