"""Operator schemas that let a CUDA build of torchvision be imported on a CPU build of torch.

Such a torchvision cannot load its compiled operators, and then fails on import with "operator torchvision::nms does not
exist", because it registers fake kernels for operators whose schemas were never declared. Declaring the schemas is enough: no
text model calls the operators. Nothing is done where torchvision is absent or matches the torch build.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import torch

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)

_library: torch.library.Library | None = None


def needed() -> bool:
    """Whether torchvision is installed, not yet imported, and built for CUDA while this torch is not."""
    if "torchvision" in sys.modules or torch.version.cuda is not None:
        return False
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return False
    version_py = Path(spec.origin).with_name("version.py")
    return version_py.exists() and "+cu" in version_py.read_text(encoding="utf-8")


def install() -> bool:
    """Declares the schemas if they are needed; returns whether it did. Safe to call twice."""
    global _library
    if _library is not None or not needed():
        return False
    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in _SCHEMAS:
        library.define(schema)
    _library = library
    return True


def uninstall() -> None:
    """Removes the schemas. A torchvision that was imported meanwhile keeps its Python side and loses the operators."""
    global _library
    if _library is not None:
        _library._destroy()
        _library = None
