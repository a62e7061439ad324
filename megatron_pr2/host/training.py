"""megatron.training on the CPU: its set-up asks for a GPU before it calls Megatron-Core.

The wheel of megatron-core has it from 0.17.1 on. Model, optimizer, schedules and checkpoints need nothing beyond the host itself.
"""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType
from typing import Any

import torch

from megatron_pr2.errors import ConfigError
from megatron_pr2.host.patches import PatchSet

# Newer than Hopper: older ones want CUDA_DEVICE_MAX_CONNECTIONS=1 for tensor parallelism, which means nothing here.
_CAPABILITY = (10, 0)


def patch_training(patches: PatchSet) -> None:
    """Applies everything of this module.

    Raises:
        ConfigError: megatron.training is not importable.
    """
    try:
        arguments = importlib.import_module("megatron.training.arguments")
        initialize = importlib.import_module("megatron.training.initialize")
    except ImportError as error:
        raise ConfigError(
            f"megatron.training is not importable ({error}): the megatron-core package has it from release 0.17.1 on; install "
            "one, or put a checkout of Megatron-LM of your release on PYTHONPATH"
        ) from error
    # initialize.py sets up model parallelism and its seeds only where a device is counted. Only this module sees one: torch itself
    # and Megatron-Core would call the driver.
    device = view(torch.cuda, is_available=lambda: True, device_count=lambda: 1, set_device=lambda device: None)
    patches.set(initialize, "torch", view(torch, cuda=device))
    patches.set(arguments, "torch", view(torch, cuda=view(torch.cuda, get_device_capability=lambda *device: _CAPABILITY)))
    patches.set(arguments, "get_device_arch_version", lambda: _CAPABILITY[0])
    # Calls make in megatron/core/datasets and ends the process if that fails; a wheel has the compiled helpers and no Makefile.
    if importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is not None:
        patches.set(initialize, "_compile_dependencies", torch.distributed.barrier)


def view(module: Any, **replaced: Any) -> ModuleType:
    """A module that has everything of another one, except for some names."""
    seen = ModuleType(module.__name__, f"{module.__name__} as the host shows it")
    vars(seen).update(replaced, __getattr__=lambda name: getattr(module, name))
    return seen
