"""The table of model types says what the libraries' registries say."""

from __future__ import annotations

from megatron_pr2.errors import ConfigError
from megatron_pr2.model_shape import model_shape
from megatron_pr2.model_types import MODEL_TYPES, known_model_types

# Mixture-of-experts models that see; the trainer has text only.
SEEING = {"glm4v_moe"}


def test_mbridge(host_platform: None) -> None:
    from transformers import CONFIG_MAPPING

    from megatron_pr2.bridge_models import _registry

    def has_router(name: str) -> bool:
        try:
            model_shape(CONFIG_MAPPING[name]())
        except (ConfigError, KeyError):  # a dense model, or one whose code comes with its checkpoint
            return False
        return True

    assert {name for name in _registry() if has_router(name)} - SEEING == set(MODEL_TYPES["mbridge"])


def test_all_of_them_in_order() -> None:
    assert known_model_types() == sorted(set().union(*MODEL_TYPES.values()))
