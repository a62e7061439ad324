"""SGLang plugin for CPU engines: registers the hooks of :mod:`megatron_pr2.rollout.sglang.cpu.hooks` in SGLang's own registry.

SGLang loads it in every one of its processes through the entry point group `sglang.srt.plugins`; where this package is not
installed as a distribution, `launch` calls `register` itself, with the same result.
"""

from __future__ import annotations

import logging

import torch

logger = logging.getLogger(__name__)

_registered = False


def register() -> None:
    """Registers the CPU hooks once per process; does nothing unless SGLang runs its CPU engine on a machine without CUDA."""
    global _registered
    if _registered or torch.cuda.is_available():
        return
    from sglang.srt.utils import is_cpu

    if not is_cpu():
        return
    from megatron_pr2.rollout.sglang.cpu.hooks import register_hooks

    register_hooks()
    _registered = True
    logger.info("megatron_pr2: hooks for SGLang's CPU engine are registered")
