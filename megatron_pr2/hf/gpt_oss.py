"""GPT-OSS for mbridge, which has no bridge for it: biases, attention sinks, YaRN, and the experts of a layer in one tensor.

A checkpoint holds `experts.gate_up_proj` [E, H, 2 I], whose last axis alternates between gate and up, and `experts.down_proj`
[E, I, H]; Megatron-Core has a weight per expert, gates before ups. mbridge converts parameter by parameter, so an expert's part is
named `<tensor>#<expert>` here until all of them are there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

import torch
from mbridge.core import LLMBridge
from megatron.core.fusions import fused_bias_geglu
from torch import Tensor

_EXPERT = re.compile(r"\.mlp\.experts\.(linear_fc[12])\.(weight|bias)(?:\.weight)?(\d+)$")


class GptOssBridge(LLMBridge):
    """mbridge's bridge for model_type "gpt_oss".

    mbridge finds the number of an expert behind `.weight`; biases are called `bias.weight<expert>` within the bridge.
    """

    _ATTENTION_MAPPING: ClassVar[dict[str, list[str]]] = {
        **LLMBridge._ATTENTION_MAPPING,
        "self_attention.linear_proj.bias": ["model.layers.{layer_number}.self_attn.o_proj.bias"],
        "self_attention.core_attention.softmax_offset": ["model.layers.{layer_number}.self_attn.sinks"],
    }
    _MLP_MAPPING: ClassVar[dict[str, list[str]]] = {
        "pre_mlp_layernorm": ["model.layers.{layer_number}.post_attention_layernorm.weight"],
        "mlp.router.weight": ["model.layers.{layer_number}.mlp.router.weight"],
        "mlp.router.bias": ["model.layers.{layer_number}.mlp.router.bias"],
        "mlp.experts.linear_fc1.weight": ["model.layers.{layer_number}.mlp.experts.gate_up_proj"],
        "mlp.experts.linear_fc1.bias": ["model.layers.{layer_number}.mlp.experts.gate_up_proj_bias"],
        "mlp.experts.linear_fc2.weight": ["model.layers.{layer_number}.mlp.experts.down_proj"],
        "mlp.experts.linear_fc2.bias": ["model.layers.{layer_number}.mlp.experts.down_proj_bias"],
    }

    def _build_config(self) -> Any:
        source = self.hf_config
        config = self._build_base_config(
            num_moe_experts=source.num_local_experts,
            moe_router_topk=source.num_experts_per_tok,
            moe_ffn_hidden_size=source.intermediate_size,
            moe_router_score_function="softmax",
            moe_grouped_gemm=True,
            add_bias_linear=True,
            bias_dropout_fusion=False,
            # x sigmoid(1.702 x), clamped, times the clamped other half plus one.
            activation_func=fused_bias_geglu.quick_gelu,
            activation_func_clamp_value=source.swiglu_limit,
            glu_linear_offset=1.0,
            softmax_type="learnable",
        )
        for name, value in self._yarn().items():
            # Megatron-Core reads them from the config, which has no fields for them.
            setattr(config, f"yarn_{name}", value)
        return config

    def _yarn(self) -> dict[str, Any]:
        rope = self.hf_config.rope_parameters
        if rope.get("rope_type", "default") == "default":
            return {}
        return {
            "rotary_scaling_factor": rope["factor"],
            "original_max_position_embeddings": rope["original_max_position_embeddings"],
            "beta_fast": rope.get("beta_fast") or 32.0,
            "beta_slow": rope.get("beta_slow") or 1.0,
            "mscale": rope.get("mscale") or None,
            "mscale_all_dim": rope.get("mscale_all_dim") or None,
            "correction_range_round_to_int": rope.get("truncate", True),
        }

    def _get_gptmodel_args(self) -> dict[str, Any]:
        return {**super()._get_gptmodel_args(), "position_embedding_type": "yarn" if self._yarn() else "rope"}

    def _weight_name_mapping_mcore_local_to_global(self, model: torch.nn.Module, consider_ep: bool = True) -> dict[str, str]:
        first = self._first_expert() if consider_ep else 0

        def renamed(match: re.Match[str]) -> str:
            kind = "weight" if match[2] == "weight" else "bias.weight"
            return f".mlp.experts.{match[1]}.{kind}{int(match[3]) + first}"

        names = super()._weight_name_mapping_mcore_local_to_global(model, consider_ep=False)
        return {local: _EXPERT.sub(renamed, name) for local, name in names.items()}

    def _first_expert(self) -> int:
        experts: int = self.config.num_moe_experts // self.mpu.ep_size
        return experts * self.mpu.ep_rank

    def _weight_to_mcore_format(self, mcore_weights_name: str, hf_weights: list[Tensor]) -> Tensor:
        if (match := _EXPERT.search(mcore_weights_name)) is None:
            return super()._weight_to_mcore_format(mcore_weights_name, hf_weights)
        # mbridge gives this rank's name here.
        part = hf_weights[0][int(match[3]) + self._first_expert()].to(self.dtype)
        if match[1] == "linear_fc1":
            part = torch.cat((part[..., ::2], part[..., 1::2]), dim=-1)
        return part.t().contiguous()

    def _weight_to_hf_format(self, mcore_weights_name: str, mcore_weights: Tensor) -> tuple[list[str], list[Tensor]]:
        if (match := _EXPERT.search(mcore_weights_name)) is None:
            return super()._weight_to_hf_format(mcore_weights_name, mcore_weights)
        (name,) = self._weight_name_mapping_mcore_to_hf(mcore_weights_name)
        part = mcore_weights.t()
        if match[1] == "linear_fc1":
            part = torch.stack(part.chunk(2, dim=-1), dim=-1).flatten(-2)
        return [f"{name}#{match[3]}"], [part]

    def _weight_merge_across_tp(self, mcore_weights_name: str, mcore_weights: list[Tensor], param: Tensor) -> Tensor:
        if _EXPERT.search(mcore_weights_name) is not None:
            # Megatron-Core allows biases of experts without expert tensor parallelism only.
            (whole,) = mcore_weights
            return whole
        return super()._weight_merge_across_tp(mcore_weights_name, mcore_weights, param)

    def export_weights(self, models: list[torch.nn.Module]) -> Iterator[tuple[str, Tensor]]:
        yield from self.joined(super().export_weights(models))

    def joined(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Stacks the experts' parts; other tensors pass through. Holds the experts of one layer at a time."""
        waiting: dict[str, dict[int, Tensor]] = {}
        for name, tensor in weights:
            whole, separator, expert = name.partition("#")
            if not separator:
                yield name, tensor
                continue
            parts = waiting.setdefault(whole, {})
            parts[int(expert)] = tensor
            if len(parts) == self.config.num_moe_experts:
                yield whole, torch.stack([parts[index] for index in range(len(parts))])
                del waiting[whole]
