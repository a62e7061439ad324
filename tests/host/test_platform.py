"""Switching the host on and off: explicit, exact, refused on CUDA."""

from __future__ import annotations

import gc
import importlib
import os
import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch

from megatron_pr2 import host
from megatron_pr2.errors import ConfigError
from megatron_pr2.host import platform
from megatron_pr2.host.patches import PatchSet
from tests.helpers.distributed import pool
from tests.helpers.releases import HAS_TRAINING


def _watched() -> dict[tuple[str, str], Any]:
    """Own attributes of everything that the host touches."""
    names = (
        "torch",
        "torch.cuda",
        "megatron.core.tensor_parallel.random",
        "megatron.core.transformer.moe.moe_utils",
        "megatron.core.transformer.moe.token_dispatcher",
        "megatron.core.transformer.multi_latent_attention",
        "megatron.core.transformer.transformer_block",
        "megatron.core.models.gpt.gpt_layer_specs",
        "megatron.core.models.gpt.moe_module_specs",
        "megatron.core.pipeline_parallel.p2p_communication",
    )
    owners: dict[str, Any] = {name: importlib.import_module(name) for name in names}
    owners["Tensor"] = torch.Tensor
    owners["TopKRouter"] = importlib.import_module("megatron.core.transformer.moe.router").TopKRouter
    owners["P2P"] = owners["megatron.core.pipeline_parallel.p2p_communication"].P2PCommunicator
    owners["AlltoAll"] = owners["megatron.core.transformer.moe.token_dispatcher"].MoEAlltoAllTokenDispatcher
    owners["SharedExpertMLP"] = importlib.import_module("megatron.core.transformer.moe.shared_experts").SharedExpertMLP
    language = importlib.import_module("megatron.core.models.common.language_module.language_module")
    owners["LanguageModule"] = language.LanguageModule
    if HAS_TRAINING:
        names = ("megatron.training.initialize", "megatron.training.arguments")
        owners.update({name: importlib.import_module(name) for name in names})
    return {(owner, name): value for owner, module in owners.items() for name, value in vars(module).items()}


def _toggle() -> dict[str, Any]:
    """Runs in a worker: what differs after off, on, on again, off, off again."""
    host.disable()
    filters = list(warnings.filters)
    before = _watched()
    enable = host.enable_training if HAS_TRAINING else host.enable
    enable()
    enabled = _watched()
    enable()
    again = _watched()
    device = (str(torch.zeros(1, device="cuda").device), torch.ones(1).type(), host.is_enabled())
    host.disable()
    host.disable()
    after = _watched()
    result = {
        "touched": sum(before.get(key) is not value for key, value in enabled.items()),
        "changed by a second enable": [key for key, value in enabled.items() if again.get(key) is not value],
        "left over": sorted({key for key in before.keys() | after.keys() if before.get(key, 0) is not after.get(key, 0)}),
        "filters": filters == list(warnings.filters),
        "device": device,
        "off": (host.is_enabled(), torch.ones(1).type()),
    }
    host.enable()
    gc.collect()
    return result


def test_disable_restores_every_attribute() -> None:
    (result,) = pool(1).run(_toggle)
    assert result["touched"] > 30
    assert result["changed by a second enable"] == []
    assert result["left over"] == []
    assert result["filters"]
    assert result["device"] == ("cpu", "torch.cuda.FloatTensor", True)
    assert result["off"] == (False, "torch.FloatTensor")


def test_refused_where_cuda_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    was_enabled = host.is_enabled()
    monkeypatch.setattr(platform, "_active", None)
    with pytest.raises(ConfigError, match="CUDA is available"):
        host.enable()
    monkeypatch.undo()
    assert host.is_enabled() == was_enabled


def test_a_failure_half_way_leaves_nothing_behind() -> None:
    class Owner:
        kept = 1

    class Derived(Owner):
        pass

    patches = PatchSet()
    patches.set(Derived, "kept", 2)
    patches.set(Derived, "fresh", 3)
    patches.set(Derived, "kept", 4)
    assert (Derived.kept, Derived.fresh) == (4, 3)  # type: ignore[attr-defined]
    patches.undo()
    assert Derived.kept == 1
    assert set(vars(Derived)) & {"kept", "fresh"} == set()


def _devices_under_meta() -> list[str]:
    # Transformers loads through this context; the wrapped factory functions must not hide from it.
    with torch.device("meta"):
        return [tensor.device.type for tensor in (torch.arange(3), torch.empty(2), torch.tensor([1.0]), torch.full((1,), 2))]


def test_device_contexts_reach_wrapped_factories() -> None:
    assert pool(1).run(_devices_under_meta) == [["meta"] * 4]


class _Config:
    """The fields of TransformerConfig that adapt_config looks at."""

    fp8 = None
    fp4 = None
    tp_comm_overlap = False
    num_moe_experts = 8
    moe_token_dispatcher_type = "alltoall"


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("fp8", "e4m3", "fp8='e4m3' needs a GPU"),
        ("tp_comm_overlap", True, "tp_comm_overlap=True needs a GPU"),
        ("moe_token_dispatcher_type", "flex", "use 'alltoall' or 'allgather'"),
    ],
)
def test_settings_that_need_a_gpu_are_refused(field: str, value: Any, message: str) -> None:
    config = _Config()
    setattr(config, field, value)
    with pytest.raises(ConfigError, match=message):
        host.adapt_config(config)


def test_adapt_config_turns_fusions_off() -> None:
    config = host.adapt_config(_Config())
    assert config.use_cpu_initialization is True
    assert not any(value for name, value in vars(config).items() if "fusion" in name)


def _uneven_world() -> str:
    with pytest.raises(ConfigError) as caught:
        host.init(tensor=2, expert=3)
    host.init(tensor=2)
    return str(caught.value)


def test_a_world_that_does_not_divide_is_refused() -> None:
    assert "2 processes do not divide into expert_tensor*expert*pipeline=6" in pool(2).run(_uneven_world)[0]


def test_enabling_is_quiet() -> None:
    code = "from megatron_pr2 import host; host.enable(); import megatron.core.optimizer"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
