"""Model types whose Hugging Face checkpoints can be trained, by the library that reads them.

A table, because a mistyped or unsupported model has to be refused before the libraries are imported, which takes half a minute of a
processor. tests/test_model_types.py compares it with the libraries' own registries.
"""

from __future__ import annotations

# Mixture-of-experts language models; what the libraries know besides (dense models, models that see) has no router to replay, or
# inputs that the trainer does not have.
MODEL_TYPES: dict[str, tuple[str, ...]] = {
    "mbridge": ("deepseek_v3", "glm4_moe", "gpt_oss", "mixtral", "olmoe", "qwen2_moe", "qwen3_moe"),
}


def known_model_types() -> list[str]:
    """All of them, in alphabetical order."""
    return sorted({name for names in MODEL_TYPES.values() for name in names})
