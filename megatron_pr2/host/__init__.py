"""Megatron-Core on a machine without a GPU.

``enable()`` lets unmodified Megatron-Core build and train GPT models on CPU with gloo: calls to ``torch.cuda`` become
no-ops or go to the CPU, and whatever Megatron would take from Transformer Engine (``use_transformer_engine=True``) is built
from plain torch modules whose parameters carry the same names, so that weight bridges and checkpoints see one naming.

It is a platform, not an option of the algorithm: one explicit call per process, refused where CUDA works, undone by
``disable()``. No other module of the package depends on it.
"""

from __future__ import annotations

from megatron_pr2.host.platform import adapt_config, config_overrides, disable, enable, enable_training, is_enabled
from megatron_pr2.host.runtime import init, shutdown
from megatron_pr2.host.transformer_engine import transformer_engine_stand_ins

__all__ = [
    "adapt_config",
    "config_overrides",
    "disable",
    "enable",
    "enable_training",
    "init",
    "is_enabled",
    "shutdown",
    "transformer_engine_stand_ins",
]
