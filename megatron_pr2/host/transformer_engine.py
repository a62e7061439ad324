"""Stand-ins for Transformer Engine while a package is imported that cannot be imported without it."""

from __future__ import annotations

import contextlib
import importlib.machinery
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

_MODULES = ("transformer_engine", "transformer_engine.pytorch")
_CLASSES = ("GroupedLinear", "LayerNormLinear", "Linear", "TransformerLayer")


@contextlib.contextmanager
def transformer_engine_stand_ins() -> Iterator[None]:
    """Within it, `import transformer_engine` finds modules with the few names that are subclassed or looked up at import.

    Megatron-Bridge asks at import whether Transformer Engine is there, and builds by its layer specs if it is; there the host has
    its own modules. Import Megatron-Core before: it would take the stand-ins for the real ones. Nothing can be computed with them,
    and they are gone on leaving.
    """
    if "transformer_engine" in sys.modules:
        yield
        return
    modules: dict[str, Any] = {name: ModuleType(name) for name in _MODULES}
    for name, module in modules.items():
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    top, pytorch = (modules[name] for name in _MODULES)
    top.pytorch = pytorch
    for name in _CLASSES:
        setattr(pytorch, name, type(name, (torch.nn.Module,), {}))
    pytorch.ops = SimpleNamespace(Sequential=type("Sequential", (torch.nn.Module,), {}))
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name, module in modules.items():
            if sys.modules.get(name) is module:
                del sys.modules[name]
