"""Switching the host on and off, and the settings that it needs."""

from __future__ import annotations

import importlib
import logging
import warnings
from typing import Any

import torch

from megatron_pr2.errors import ConfigError
from megatron_pr2.host.cuda import patch_cuda
from megatron_pr2.host.patches import PatchSet

logger = logging.getLogger(__name__)

# What Megatron-Core says on import and construction about packages and settings that mean nothing without a GPU.
_NOISE = (
    "Apex is not installed",
    "full scope is deprecated",
    "will be removed in this file",
    "Transformer Engine and Apex are not installed",
    "When using sequence parallelism it is recommended to set the environment variable",
    "When using async grad allreduce it is recommended to set the environment variable",
    # A docstring of Megatron's, found when it is compiled for the first time.
    "invalid escape sequence",
)

_active: PatchSet | None = None
_training = False


def is_enabled() -> bool:
    """Whether this process runs Megatron-Core on the host."""
    return _active is not None


def enable() -> None:
    """Makes unmodified Megatron-Core run on the CPU of this process. Calling it again changes nothing.

    Call it before a model is built; modules imported earlier are fine.

    Raises:
        ConfigError: CUDA is available. Megatron-Core runs there as it is.
    """
    global _active
    if _active is not None:
        return
    if torch.cuda.is_available():
        raise ConfigError(
            "host.enable(): CUDA is available; Megatron-Core runs on it as it is. "
            "Set CUDA_VISIBLE_DEVICES= (empty) to use the CPU on purpose"
        )
    patches = PatchSet()
    try:
        patches.set(warnings, "filters", list(warnings.filters))
        for message in _NOISE:
            warnings.filterwarnings("ignore", message=f".*{message}.*")
        _import_quietly("torch.utils.cpp_extension")
        # Imported here and not above: what they import of Megatron warns on import.
        from megatron_pr2.host.mamba import patch_mamba
        from megatron_pr2.host.megatron import patch_megatron
        from megatron_pr2.host.spec import patch_hybrid, patch_specs

        patch_cuda(patches)
        patch_megatron(patches)
        patch_specs(patches)
        patch_hybrid(patches)
        patch_mamba(patches)
    except BaseException:
        patches.undo()
        raise
    _active = patches
    logger.info("Megatron-Core runs on the CPU of this process (gloo, plain torch modules)")


def enable_training() -> None:
    """:func:`enable`, and the same for Megatron-LM's `megatron.training`, which the megatron-core package has from 0.17.1 on.

    Then `initialize_megatron()`, `setup_model_and_optimizer()`, `train_step()`, `save_checkpoint()` and what they call run on
    the CPU, with `--distributed-backend gloo` and a model whose config went through :func:`adapt_config`. Calling it again changes
    nothing; :func:`disable` undoes it, too.

    Raises:
        ConfigError: CUDA is available, or there is no megatron.training of the same release as megatron.core.
    """
    global _training
    enable()
    if _training or _active is None:
        return
    from megatron_pr2.host.training import patch_training

    patch_training(_active)
    _training = True


def _import_quietly(module: str) -> None:
    """Imports a module of torch that would warn that a CUDA toolkit is installed and no GPU."""
    log = logging.getLogger(module)
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        importlib.import_module(module)
    finally:
        log.setLevel(level)


def disable() -> None:
    """Undoes :func:`enable` exactly. Models that were built in between must not be used any more."""
    global _active, _training
    if _active is not None:
        _active.undo()
    _active, _training = None, False


def config_overrides() -> dict[str, Any]:
    """Fields of TransformerConfig that have only one right value on the host: parameters on the CPU, no fused kernels."""
    return {
        "use_cpu_initialization": True,
        "gradient_accumulation_fusion": False,
        "masked_softmax_fusion": False,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "apply_rope_fusion": False,
        "persist_layer_norm": False,
        "cross_entropy_loss_fusion": False,
        "moe_permute_fusion": False,
        "moe_router_fusion": False,
        # Overlap needs streams, and on one stream it only reorders.
        "moe_shared_expert_overlap": False,
        # Mamba's fused kernel needs a GPU.
        "use_mamba_mem_eff_path": False,
    }


def adapt_config(config: Any) -> Any:
    """Sets the host's fields on a TransformerConfig in place and returns it.

    Raises:
        ConfigError: the config asks for what a CPU does not have (FP8, FP4, a flex dispatcher, CUDA graphs).
    """
    impossible = {
        "fp8": (config.fp8, None),
        "fp4": (getattr(config, "fp4", None), None),
        "cuda_graph_impl": (getattr(config, "cuda_graph_impl", "none"), "none"),
        "tp_comm_overlap": (config.tp_comm_overlap, False),
    }
    for name, (value, expected) in impossible.items():
        if value != expected:
            raise ConfigError(f"{name}={value!r} needs a GPU; expected {expected!r} on the host")
    if config.num_moe_experts and config.moe_token_dispatcher_type == "flex":
        raise ConfigError("moe_token_dispatcher_type='flex' needs a GPU; use 'alltoall' or 'allgather' on the host")
    for name, value in config_overrides().items():
        setattr(config, name, value)
    return config
