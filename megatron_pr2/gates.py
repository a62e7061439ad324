"""Merging W_p into the gates among weights in Hugging Face names (design decision 2)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

from torch import Tensor

from megatron_pr2.errors import AttachError
from megatron_pr2.predictor import merge_gate

# Hugging Face names of MoE gates: Qwen2/3-MoE, OLMoE, DeepSeek, GLM (mlp.gate), Mixtral (block_sparse_moe.gate), gpt-oss
# (mlp.router) and Llama 4 (feed_forward.router). Layers of multi-token-prediction heads count from 0 again (Qwen3-Next:
# mtp.layers.0).
GATE_NAME = re.compile(r"(?:^|(?<!mtp)\.)layers\.(\d+)\.(?:mlp|block_sparse_moe|feed_forward)\.(?:gate|router)\.weight$")


def merge_gates(weights: Iterable[tuple[str, Tensor]], w_by_layer: Mapping[int, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Passes weights through and adds W_p [E, H] of each layer (0-based) to its gate.

    Raises:
        AttachError: after the last weight, if not every layer's gate came by (another naming would lose the prediction silently).
    """
    merged = set()
    for name, tensor in weights:
        match = GATE_NAME.search(name)
        if match and int(match.group(1)) in w_by_layer:
            layer = int(match.group(1))
            merged.add(layer)
            tensor = merge_gate(tensor, w_by_layer[layer])
        yield name, tensor
    if merged != set(w_by_layer):
        why = "if the weights are those of one pipeline stage only, say own_stage=True"
        if not merged:
            why = "their names do not follow Hugging Face's '...layers.N.mlp.gate.weight' or '...block_sparse_moe.gate.weight'"
        raise AttachError(
            f"engine_weights: merged the gates of layers {sorted(merged)}, the model has MoE layers {sorted(w_by_layer)}; {why}"
        )
