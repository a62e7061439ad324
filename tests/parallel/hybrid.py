"""HybridModels with the weights of a Hugging Face checkpoint, whose layers are attention and a feed-forward part each.

The k-th attention layer of the pattern and its k-th feed-forward layer are the checkpoint's layer k. Mamba layers have no
counterpart in it: `add_mamba` writes theirs under Megatron-Core's names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_pr2 import host
from megatron_pr2.hf.files import TensorIndex
from megatron_pr2.hf.mbridge_backend import MBridge
from megatron_pr2.hf.shape import model_shape
from megatron_pr2.parallel.decoder_layers import DecoderLayers, pattern_segments

MAMBA = {"mamba_state_dim": 8, "mamba_head_dim": 8, "mamba_num_groups": 2}


def hybrid_model() -> Any:
    """Megatron-Core's HybridModel; skips the test in releases that have none."""
    return pytest.importorskip("megatron.core.models.hybrid.hybrid_model", reason="this Megatron-Core has no HybridModel")


def add_mamba(path: Path, pattern: str, hidden: int, seed: int = 3) -> Path:
    """Adds random Mamba layers to a checkpoint, in the places that they have in the pattern."""
    weights = load_file(path / "model.safetensors")
    generator = torch.Generator().manual_seed(seed)
    inner, state, groups = 2 * hidden, MAMBA["mamba_state_dim"], MAMBA["mamba_num_groups"]
    heads, channels = inner // MAMBA["mamba_head_dim"], inner + 2 * groups * state
    shapes: dict[str, tuple[int, ...]] = {
        "conv1d_weight": (channels, 1, 4),
        "conv1d_bias": (channels,),
        "dt_bias": (heads,),
        "A_log": (heads,),
        "D": (heads,),
        "in_proj.weight": (inner + channels + heads, hidden),
        "in_proj.layer_norm_weight": (hidden,),
        "norm.weight": (inner,),
        "out_proj.weight": (hidden, inner),
    }
    for layer, kind in enumerate("".join(pattern_segments(pattern))):
        for name, shape in shapes.items() if kind == "M" else ():
            around, spread = 1.0 if "norm" in name else 0.0, 0.05 if name == "out_proj.weight" else 0.2
            tensor = around + spread * torch.randn(shape, generator=generator)
            # Earlier releases have a module for the convolution.
            for spelling in {name, name.replace("conv1d_", "conv1d.")}:
                weights[f"decoder.layers.{layer}.mixer.{spelling}"] = tensor.clone()
    # Next to them the experts keep their say, so that routers that move are felt in the log-probs.
    weights |= {name: 4 * tensor for name, tensor in weights.items() if ".experts." in name and "down_proj" in name}
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    return path


class _HybridNames:
    """mbridge's class of a model family for a HybridModel with its weights; mixed in before that class."""

    pattern: str

    def _weight_name_mapping_mcore_local_to_global(self, model: Any, consider_ep: bool = True) -> dict[str, str]:
        names: dict[str, str] = super()._weight_name_mapping_mcore_local_to_global(model, consider_ep)  # type: ignore[misc]
        kinds = "".join(pattern_segments(self.pattern))

        def of_checkpoint(match: re.Match[str]) -> str:
            layer = int(match[1])
            same = "-E" if kinds[layer] in "-E" else kinds[layer]
            return match[0] if kinds[layer] == "M" else f"layers.{sum(kind in same for kind in kinds[:layer])}."

        renamed = {local: re.sub(r"layers\.(\d+)\.", of_checkpoint, name) for local, name in names.items()}
        return {local: name.replace("decoder.final_norm", "decoder.final_layernorm") for local, name in renamed.items()}

    def _weight_name_mapping_mcore_to_hf(self, name: str) -> list[str]:
        return [name] if ".mixer." in name else super()._weight_name_mapping_mcore_to_hf(name)  # type: ignore[misc]

    def _weight_to_hf_format(self, name: str, weight: Tensor) -> tuple[list[str], list[Tensor]]:
        return ([name], [weight]) if ".mixer." in name else super()._weight_to_hf_format(name, weight)  # type: ignore[misc]

    def _model_provider(self: Any, callbacks: Any) -> Any:
        from megatron.core.models.hybrid import hybrid_layer_specs
        from megatron.core.models.hybrid.hybrid_model import HybridModel

        def provider(pre_process: bool, post_process: bool, vp_stage: int | None = None) -> torch.nn.Module:
            return HybridModel(
                self.config,
                hybrid_layer_specs.hybrid_stack_spec,
                **self._get_gptmodel_args(),
                hybrid_layer_pattern=self.pattern,
                pre_process=pre_process,
                post_process=post_process,
                vp_stage=vp_stage,
            )

        return provider


def load_hybrid(
    path: Path, pattern: str, *, ddp_config: Mapping[str, Any], extra_config: Mapping[str, Any]
) -> tuple[MBridge, list[torch.nn.Module]]:
    """As megatron_pr2.hf.bridge.load_model, in fp32."""
    from transformers import AutoConfig

    source = AutoConfig.from_pretrained(path)
    # HybridModel asks for neither of the two: its pattern says both.
    layers = {"num_layers": DecoderLayers.of_pattern(pattern).count, "moe_layer_freq": 1, "is_hybrid_model": True}
    extra = {**extra_config, **layers, **MAMBA, **host.config_overrides()}
    bridge = MBridge(source, model_shape(source), torch.float32, extra)
    host.adapt_config(bridge.config)
    inner = type(bridge.inner)
    bridge.inner.__class__ = type(f"Hybrid{inner.__name__}", (_HybridNames, inner), {"pattern": pattern})
    chunks = bridge.build(
        wrap_with_ddp=True, ddp_config={"grad_reduce_in_fp32": True, "use_distributed_optimizer": True, **ddp_config}
    )
    bridge.load_weights(chunks, TensorIndex(path))
    return bridge, chunks
