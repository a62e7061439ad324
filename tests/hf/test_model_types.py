"""The table of model types says what the libraries' registries say."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace

import pytest

from megatron_pr2.errors import ConfigError
from megatron_pr2.hf.model_types import MODEL_TYPES, keeps_gates_in_fp32, known_model_types
from megatron_pr2.hf.shape import model_shape
from tests.helpers.distributed import pool

# Mixture-of-experts models that see; the trainer has text only.
SEEING = {"glm4v_moe"}


def test_mbridge(host_platform: None) -> None:
    from transformers import CONFIG_MAPPING

    from megatron_pr2.hf.mbridge_models import _registry

    def has_router(name: str) -> bool:
        try:
            model_shape(CONFIG_MAPPING[name]())
        except (ConfigError, KeyError):  # a dense model, or one whose code comes with its checkpoint
            return False
        return True

    assert {name for name in _registry() if has_router(name)} - SEEING == set(MODEL_TYPES["mbridge"])


def test_all_of_them_in_order() -> None:
    assert known_model_types() == sorted(set().union(*MODEL_TYPES.values()))


def supported_job() -> list[str]:
    from megatron_pr2.hf.megatron_bridge_backend import _auto_bridge_class

    supported: list[str] = _auto_bridge_class().list_supported_models()
    return supported


@pytest.mark.skipif(importlib.util.find_spec("megatron.bridge") is None, reason="megatron-bridge is not installed")
def test_megatron_bridge() -> None:
    """A part of what it knows: the models that are compared with Transformers."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    known = set(pool(1).run(supported_job)[0])
    assert {MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name] for name in MODEL_TYPES["megatron-bridge"]} <= known
    assert not {"MixtralForCausalLM", "Qwen2MoeForCausalLM"} & known, "docs/bridges.md says that it has neither"


def test_gates_that_sglang_keeps_in_fp32() -> None:
    assert keeps_gates_in_fp32(SimpleNamespace(model_type="glm4_moe"))
    assert keeps_gates_in_fp32(SimpleNamespace(model_type="deepseek_v3", router_fp32=True))
    for name in set(known_model_types()) - {"glm4_moe"}:
        assert not keeps_gates_in_fp32(SimpleNamespace(model_type=name)), name
