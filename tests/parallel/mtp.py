"""A DeepSeek-V3 checkpoint with a multi-token prediction head, which neither Transformers writes nor mbridge loads at this size."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.parallel.case import Case, Result
from tests.parallel.replay import run_case

# Megatron-Core's names of what a head has besides a decoder layer, and DeepSeek-V3's.
HEAD = {
    "mtp.layers.0.enorm.weight": "enorm.weight",
    "mtp.layers.0.hnorm.weight": "hnorm.weight",
    "mtp.layers.0.eh_proj.weight": "eh_proj.weight",
    "mtp.layers.0.final_layernorm.weight": "shared_head.norm.weight",
}


def add_head(path: Path, layers: int, hidden: int) -> Path:
    """Adds layer `layers`, the head, to a checkpoint: a copy of the last decoder layer with other numbers, and HEAD."""
    weights = load_file(path / "model.safetensors")
    generator = torch.Generator().manual_seed(5)
    prefix, head = f"model.layers.{layers - 1}.", f"model.layers.{layers}."
    for name, tensor in list(weights.items()):
        if name.startswith(prefix):
            noise = torch.randn(tensor.shape, generator=generator)
            weights[head + name.removeprefix(prefix)] = tensor + 0.02 * noise
    for name in HEAD.values():
        size = (hidden, 2 * hidden) if "proj" in name else (hidden,)
        weights[head + name] = torch.rand(size, generator=generator) + (0.5 if "norm" in name else -0.5)
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 1}))
    return path


def run_with_head(path: Path, case: Case) -> Result:
    """run_case with mbridge's naming of the head for any number of layers; it knows the published model's 61 only."""
    from mbridge.models.deepseek_v3 import DeepseekV3Bridge

    def names(bridge: DeepseekV3Bridge, name: str) -> list[str]:
        layer = f"layers.{bridge.config.num_layers}"
        if name in HEAD:
            return [f"model.{layer}.{HEAD[name]}"]
        # Its decoder layer has another name from Megatron-Core 0.17 on.
        name = re.sub(r"mtp\.layers\.0\.(transformer_layer|mtp_model_layer)", f"decoder.{layer}", name)
        if "self_attention" in name or "input_layernorm" in name:
            return bridge._weight_name_mapping_attention(name)
        return bridge._weight_name_mapping_mlp(name)

    original = DeepseekV3Bridge._convert_mtp_param
    DeepseekV3Bridge._convert_mtp_param = names
    try:
        return run_case(path, case)
    finally:
        DeepseekV3Bridge._convert_mtp_param = original
