"""What a check needs, and the reason to skip it where that is absent."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from megatron.core.transformer.moe import moe_utils
from megatron.core.utils import get_te_version, is_te_min_version


def has(package: str) -> bool:
    """Whether a package is installed; it is not imported."""
    return importlib.util.find_spec(package) is not None


def unmet(*, gpus: int = 1, te: str | None = None, packages: tuple[str, ...] = ()) -> str | None:
    """What is missing here, or None. A package that is installed but broken is not missing: its checks run, and fail.

    Args:
        gpus: CUDA devices.
        te: the oldest Transformer Engine that will do.
        packages: other packages, as they are imported.
    """
    if not torch.cuda.is_available():
        return "needs a CUDA device"
    if torch.cuda.device_count() < gpus:
        return f"needs {gpus} CUDA devices, {torch.cuda.device_count()} here"
    if te is not None and not has("transformer_engine"):
        return f"needs Transformer Engine >= {te}, which is not installed"
    if te is not None and get_te_version() is not None and not is_te_min_version(te):
        return f"needs Transformer Engine >= {te}, {get_te_version()} here"
    if absent := [package for package in packages if not has(package)]:
        return f"needs {', '.join(absent)}, which {'is' if len(absent) == 1 else 'are'} not installed"
    return None


def needs(*, gpus: int = 1, te: str | None = None, packages: tuple[str, ...] = ()) -> pytest.MarkDecorator:
    """Marks tests that are skipped where something is missing; arguments as for :func:`unmet`."""
    reason = unmet(gpus=gpus, te=te, packages=packages)
    return pytest.mark.skipif(reason is not None, reason=reason or "")


def name_general_gemm() -> None:
    """Lets the routers of Megatron-Core 0.16.1 run on a GPU without Transformer Engine, as the host platform does on a CPU.

    Their gate asks whether `te_general_gemm` is None, a name that is defined only with Transformer Engine: NameError without.
    """
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None
