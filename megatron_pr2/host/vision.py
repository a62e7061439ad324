"""Importing Transformers where torchvision's wheel does not fit a CPU-only torch.

Transformers (and so mbridge) imports torchvision if it is installed. A torchvision wheel built for CUDA finds none of its
compiled operators on a CPU build of torch and fails on import with "operator torchvision::nms does not exist". No text model
uses these operators; declaring their schemas is enough for the import.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys

import torch

_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
# A library's operators live as long as the object.
_library: torch.library.Library | None = None


def make_torchvision_importable() -> None:
    """Declares the operators that torchvision misses, if it is installed and its import fails for want of them.

    Not undone by ``host.disable()``: torchvision is then imported with them, and they do nothing.
    """
    global _library
    if _library is not None or importlib.util.find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        _library = torch.library.Library("torchvision", "FRAGMENT")
        for name, schema in _SCHEMAS.items():
            if not hasattr(torch.ops.torchvision, name):
                _library.define(schema)
        importlib.import_module("torchvision")
