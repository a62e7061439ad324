"""One small GPT with experts in two ways: built with replaying routers by its spec, and built as ever for attach() to upgrade."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import torch


def gpt_config(**changes: Any) -> Any:
    """A config for the host platform: four layers, the first one dense."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_pr2 import host

    settings: dict[str, Any] = {
        "num_layers": 4,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "ffn_hidden_size": 48,
        "moe_ffn_hidden_size": 16,
        "num_moe_experts": 8,
        "moe_router_topk": 2,
        "moe_layer_freq": [0, 1, 1, 1],
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        "moe_token_dispatcher_type": "alltoall",
        "normalization": "RMSNorm",
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "params_dtype": torch.float32,
        "pipeline_dtype": torch.float32,
    }
    return host.adapt_config(TransformerConfig(**{**host.config_overrides(), **settings, **changes}))


def build(config: Any, spec: Any) -> torch.nn.Module:
    """A GPTModel of one pipeline stage; process groups must exist (`host.init`)."""
    from megatron.core.models.gpt import GPTModel

    return GPTModel(config, spec, vocab_size=64, max_sequence_length=64, position_embedding_type="rope", parallel_output=False)


def build_two_ways(*, use_transformer_engine: bool = True, **changes: Any) -> tuple[torch.nn.Module, torch.nn.Module]:
    """(built with PredictiveTopKRouters by its spec, built with TopKRouters); the same weights, in fp32."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

    from megatron_pr2.integrations.spec import with_pr2_routers

    config = gpt_config(**changes)
    spec = get_gpt_decoder_block_spec(config, use_transformer_engine=use_transformer_engine)
    by_spec, plain = build(config, with_pr2_routers(spec)), build(config, spec)
    by_spec.load_state_dict(plain.state_dict())
    return by_spec, plain


def moe_submodules(mlp: Any) -> Any:
    """Of a MoE layer, which is a ModuleSpec or, in later releases of Megatron-Core, a functools.partial."""
    return mlp.keywords["submodules"] if isinstance(mlp, partial) else mlp.submodules


def contents(spec: Any) -> Any:
    """What a spec says, comparable: two partials are equal only if they are one object."""
    if isinstance(spec, partial):
        return (spec.func, [contents(part) for part in spec.args], {name: contents(part) for name, part in spec.keywords.items()})
    if isinstance(spec, list | tuple):
        return [contents(part) for part in spec]
    if dataclasses.is_dataclass(spec) and not isinstance(spec, type):
        return (type(spec), {name: contents(part) for name, part in vars(spec).items()})
    return spec
