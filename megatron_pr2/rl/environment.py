"""What a run is made of: its model, hardware and versions, written when it starts and shown by its report."""

from __future__ import annotations

import json
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from megatron_pr2.hf.shape import model_shape
from megatron_pr2.report.environment import FILE_NAME
from megatron_pr2.report.metrics_log import replace_atomically

PACKAGES = ("megatron-pr2", "megatron-core", "transformers", "sglang", "transformer-engine", "mbridge")


def write_environment(run: str | Path, hf_config: Any, dtype: str, processes: int) -> None:
    """Writes RUN/environment.json, in place of an earlier one: a resumed run may have moved.

    Args:
        hf_config: the model's, of Hugging Face.
        dtype: in which it is trained.
    """
    shape = model_shape(hf_config)
    text = hf_config.get_text_config()
    found = {
        "model": {
            "type": hf_config.model_type,
            "layers": shape.num_hidden_layers,
            "moe_layers": len(shape.moe_layers),
            "hidden": text.hidden_size,
            "experts": shape.num_experts,
            "topk": shape.topk,
            "dtype": dtype,
        },
        "hardware": {"processes": processes, "device": _device(), "cores": os.cpu_count()},
        "versions": {"python": platform.python_version(), "torch": str(torch.__version__), **_versions()},
    }
    replace_atomically(Path(run) / FILE_NAME, json.dumps(found, indent=1).encode() + b"\n")


def _device() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.machine()


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found | ({"cuda": torch.version.cuda} if torch.version.cuda and torch.cuda.is_available() else {})
