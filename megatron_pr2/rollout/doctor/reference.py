"""What the doctor compares an engine with: a checkpoint's shape, and what Transformers computes from it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from megatron_pr2.errors import ConfigError
from megatron_pr2.hf.shape import ModelShape, model_shape
from megatron_pr2.rollout.base import Probe
from megatron_pr2.routes.table import RouteTable


def read_shape(model: Path) -> ModelShape:
    """The shape of the model in a directory, from its config.json alone."""
    if not (model / "config.json").is_file():
        raise ConfigError(f"{model} is no model directory: it holds no config.json")
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(model, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{model}/config.json cannot be used: {error}") from error
    return model_shape(config)


def missing_memory(model: Path, dtype: torch.dtype) -> str | None:
    """Why the model does not fit where Transformers would run it, None if it does (or if the free memory is not known)."""
    stored = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    need = stored * max(1.0, dtype.itemsize / _stored_bytes(model)) * 1.2
    free = _free_bytes()
    if free is None or need <= free:
        return None
    return f"Transformers would need about {need / 1e9:.0f} GB and {free / 1e9:.0f} GB are free"


def score(model: Path, token_ids: Sequence[int], shape: ModelShape, dtype: torch.dtype) -> Probe:
    """Log-probs and routes of given tokens from Transformers, on CUDA where there is one; loads safetensors only.

    Routes are the ids that every block hands to its experts, so they are right for any kind of router.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as progress

    device = "cuda" if torch.cuda.is_available() else "cpu"
    shows_progress = progress.is_progress_bar_enabled()
    progress.disable_progress_bar()
    try:
        network = AutoModelForCausalLM.from_pretrained(
            model, dtype=dtype, use_safetensors=True, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ConfigError(f"{model} cannot be loaded: {error}") from error
    finally:
        if shows_progress:
            progress.enable_progress_bar()
    network = network.to(device).eval()
    ids: list[torch.Tensor] = []
    hooks = [
        module.register_forward_pre_hook(lambda _module, args: ids.append(args[1].detach().cpu()))
        for name, module in network.named_modules()
        if name.rpartition(".")[2] == "experts"
    ]
    try:
        with torch.no_grad():
            logits = network(torch.tensor([list(token_ids)], device=device)).logits[0].float().cpu()
    finally:
        for hook in hooks:
            hook.remove()
    if [tuple(layer.shape) for layer in ids] != [(len(token_ids), shape.topk)] * len(shape.moe_layers):
        raise ConfigError(
            f"{model}: Transformers called {len(ids)} blocks of experts with ids of {[tuple(i.shape) for i in ids[:2]]} ..., "
            f"expected {len(shape.moe_layers)} with ({len(token_ids)}, {shape.topk})"
        )
    wanted = torch.tensor(list(token_ids[1:])).unsqueeze(1)
    logprobs = logits[:-1].log_softmax(-1).gather(1, wanted).squeeze(1)
    routes = RouteTable.from_ids(torch.stack(ids, dim=1).numpy().astype(np.int64), shape.num_experts)
    return Probe(f"Transformers on {device}", logprobs.numpy().astype(np.float32), routes)


def _stored_bytes(model: Path) -> int:
    """Bytes per value of the checkpoint, by the header of one file; 2 where it cannot be read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(min(model.glob("*.safetensors")), framework="pt") as tensors:
            return 4 if tensors.get_slice(next(iter(tensors.keys()))).get_dtype() == "F32" else 2
    except (OSError, SafetensorError, ValueError, StopIteration):
        return 2


def _free_bytes() -> int | None:
    if torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[0])
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None
