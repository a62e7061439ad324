"""An import-only `sgl_kernel`: SGLang imports names from it at module level that its CPU path with native kernels never calls.

Every name exists and raises NotImplementedError when called, so that a wrong turn is loud and names the kernel.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

_NAME = "sgl_kernel"


class _MissingKernel:
    """Stands for one name of `sgl_kernel` and for any attribute of it; raises when it is called."""

    def __init__(self, qualname: str) -> None:
        self.__name__ = self.__qualname__ = qualname

    def __getattr__(self, name: str) -> _MissingKernel:
        if name.startswith("__"):
            raise AttributeError(f"{self.__name__} (CPU stub) has no attribute {name!r}")
        return _MissingKernel(f"{self.__name__}.{name}")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(
            f"{self.__name__} was called, but this machine has no compiled SGLang kernels (CPU stub); "
            "start SGLang with --attention-backend torch_native --sampling-backend pytorch, or on a GPU"
        )


class _StubModule(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(f"module {self.__name__!r} (CPU stub) has no attribute {name!r}")
        return _MissingKernel(f"{self.__name__}.{name}")


class _StubFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds `sgl_kernel` and whatever submodule of it is imported."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname == _NAME or fullname.startswith(_NAME + "."):
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _StubModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Nothing to run: the names come into being when they are looked up."""


_finder = _StubFinder()


def needed() -> bool:
    """Whether no `sgl_kernel` is installed."""
    return _NAME not in sys.modules and importlib.util.find_spec(_NAME) is None


def install() -> bool:
    """Makes `import sgl_kernel` work if it does not; returns whether it did anything. Safe to call twice."""
    if not needed():
        return False
    sys.meta_path.append(_finder)
    return True


def uninstall() -> None:
    """Removes the finder and every stub module; modules that imported names from the stub keep them."""
    if _finder in sys.meta_path:
        sys.meta_path.remove(_finder)
    for name in [name for name, module in sys.modules.items() if isinstance(module, _StubModule)]:
        del sys.modules[name]
