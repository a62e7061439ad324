"""The import shims that SGLang needs in a process without a GPU: operators of torchvision, and a package `sgl_kernel`.

A CUDA build of torchvision cannot load its compiled operators beside a CPU build of torch, and then fails on import with "operator
torchvision::nms does not exist", because it registers fake kernels for operators whose schemas were never declared. Declaring the
schemas is enough: no text model calls the operators.

SGLang imports names from `sgl_kernel`, whose compiled package exists for accelerators only; its CPU path with native kernels never
calls them. Here every name exists and raises NotImplementedError, with the name of the kernel, when it is called.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_KERNELS = "sgl_kernel"

_library: torch.library.Library | None = None


def install() -> None:
    """Installs what is missing, before SGLang is imported; nothing where there is CUDA."""
    if not torch.cuda.is_available():
        declare_operators()
        install_kernel_stub()


def operators_needed() -> bool:
    """Whether torchvision is installed, not yet imported, and built for CUDA while this torch is not."""
    if "torchvision" in sys.modules or torch.version.cuda is not None:
        return False
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return False
    version_py = Path(spec.origin).with_name("version.py")
    return version_py.exists() and "+cu" in version_py.read_text(encoding="utf-8")


def declare_operators() -> bool:
    """Declares the schemas of torchvision's operators if they are needed; returns whether it did."""
    global _library
    if _library is not None or not operators_needed():
        return False
    _library = torch.library.Library("torchvision", "FRAGMENT")  # the schemas live as long as this object
    for schema in _SCHEMAS:
        _library.define(schema)
    return True


def install_kernel_stub() -> bool:
    """Makes `import sgl_kernel` work if it does not; returns whether it did anything."""
    if _KERNELS in sys.modules or importlib.util.find_spec(_KERNELS) is not None:
        return False
    sys.meta_path.append(_StubFinder())
    return True


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
        if fullname == _KERNELS or fullname.startswith(_KERNELS + "."):
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _StubModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Nothing to run: the names come into being when they are looked up."""
