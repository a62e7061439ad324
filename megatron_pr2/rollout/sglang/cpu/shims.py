"""install() and uninstall(): the import shims that SGLang needs in a process without a GPU."""

from __future__ import annotations

import torch

from megatron_pr2.rollout.sglang.cpu import kernel_stub, torchvision_ops


def install() -> tuple[str, ...]:
    """Installs what is missing, before SGLang, and Transformers with it, is imported.

    Returns:
        Names of the shims installed by this call; empty with CUDA, where nothing is touched, and on a second call.
    """
    if torch.cuda.is_available():
        return ()
    done = {"torchvision_ops": torchvision_ops.install(), "kernel_stub": kernel_stub.install()}
    return tuple(name for name, installed in done.items() if installed)


def uninstall() -> None:
    """Undoes install(); modules that were imported in between stay imported."""
    torchvision_ops.uninstall()
    kernel_stub.uninstall()
