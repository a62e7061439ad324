"""Model types whose Hugging Face checkpoints can be trained, by the library that reads them, and which library is used.

A table, because an unsupported model has to be refused before the libraries are imported, which takes half a minute.
tests/hf/test_model_types.py compares it with the libraries' own registries.
"""

from __future__ import annotations

import importlib.util
from typing import Any

from megatron_pr2.errors import ConfigError

# Mixture-of-experts language models. Of Megatron-Bridge's those that tests compare with Transformers.
MODEL_TYPES: dict[str, tuple[str, ...]] = {
    "mbridge": ("deepseek_v3", "glm4_moe", "gpt_oss", "mixtral", "olmoe", "qwen2_moe", "qwen3_moe"),
    "megatron-bridge": ("deepseek_v3", "glm4_moe", "qwen3_moe"),
}
BRIDGES = ("auto", *MODEL_TYPES)

# What SGLang (0.5.19 and 0.5.23) keeps fp32 gates of, whatever the model's dtype.
_FP32_GATES = ("glm4_moe",)


def keeps_gates_in_fp32(hf_config: Any) -> bool:
    """Whether SGLang keeps the gates of a model that can be trained here in fp32 when it runs in bf16."""
    # DeepSeek's are in the model's dtype unless its config says otherwise, which 0.5.19 does not read: it rounds what it gets.
    return hf_config.model_type in _FP32_GATES or bool(getattr(hf_config, "router_fp32", False))


def known_model_types(bridge: str = "auto") -> list[str]:
    """Those of a bridge, or of all of them, in alphabetical order."""
    return sorted({name for key, names in MODEL_TYPES.items() if bridge in ("auto", key) for name in names})


def choose_bridge(model_type: str | None, wanted: str = "auto") -> str:
    """`mbridge` or `megatron-bridge`: the one that is wanted, or with `auto` mbridge where it knows the model type.

    Raises:
        ConfigError: a model type that the bridge, or with `auto` neither, can train; a bridge that is unknown or not installed.
    """
    if wanted not in BRIDGES:
        raise ConfigError(f"model.bridge={wanted!r}: expected one of {', '.join(BRIDGES)}")
    chosen = next((name for name, types in MODEL_TYPES.items() if wanted in ("auto", name) and model_type in types), None)
    if chosen is None:
        each = "; ".join(f"{', '.join(sorted(types))} (model.bridge={name})" for name, types in MODEL_TYPES.items())
        raise ConfigError(
            f"model_type={model_type!r} cannot be trained here with model.bridge={wanted}; expected a mixture-of-experts model of "
            f"type {each}"
        )
    if chosen == "megatron-bridge" and not has_megatron_bridge():
        raise ConfigError(
            f"model_type={model_type!r} with model.bridge={wanted} needs Megatron-Bridge, which is not installed: "
            "pip install megatron-bridge (Python 3.12)"
        )
    return chosen


def has_megatron_bridge() -> bool:
    """Whether the package is installed; it is not imported."""
    return importlib.util.find_spec("megatron") is not None and importlib.util.find_spec("megatron.bridge") is not None
