"""Hugging Face checkpoints <-> Megatron-Core models, through a bridge of :mod:`megatron_pr2.hf.base`.

The library behind the bridge maps names and layouts. This module checks that every tensor of the checkpoint has a place in the
model, and writes complete directories. Routers stay Megatron's own ``TopKRouter``. All functions that take a bridge are collective.
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_pr2 import host
from megatron_pr2.errors import CheckpointError, ConfigError
from megatron_pr2.hf.base import Bridge, Chunks
from megatron_pr2.hf.files import TensorIndex, write_checkpoint
from megatron_pr2.hf.latent_attention import check_query_norm
from megatron_pr2.hf.model_types import choose_bridge
from megatron_pr2.hf.shape import model_shape
from megatron_pr2.parallel.layout import ParallelLayout

logger = logging.getLogger(__name__)

# Cached rotary frequencies, which checkpoints of old releases hold.
_ROTARY = re.compile(r"rotary_emb\.inv_freq$")
_LAYER = re.compile(r"model\.layers\.(\d+)\.")


def load_model(
    hf_path: str | Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    wrap_with_ddp: bool = True,
    ddp_config: Mapping[str, Any] | None = None,
    extra_config: Mapping[str, Any] | None = None,
    require_moe: bool = True,
    bridge: str = "auto",
) -> tuple[Bridge, Chunks]:
    """Builds this rank's part of the model in the current parallel state and fills it from a Hugging Face directory.

    Args:
        hf_path: directory with config.json and safetensors files.
        dtype: of the parameters.
        wrap_with_ddp: wrap each chunk in Megatron's DistributedDataParallel.
        ddp_config: fields of DistributedDataParallelConfig; defaults are ``grad_reduce_in_fp32=True`` and
            ``use_distributed_optimizer=True``.
        extra_config: fields of TransformerConfig that override the bridge's (recompute, dispatcher, dropout, ...).
        require_moe: refuse models without routed experts.
        bridge: `mbridge`, `megatron-bridge`, or `auto`: mbridge where it knows the model type, else Megatron-Bridge.

    Returns:
        The bridge and the model chunks (one, or one per virtual pipeline stage).

    Raises:
        ConfigError: no such directory, a model type or a setting that the bridge does not know, a model without experts, or a
            checkpoint whose tensors do not match the model.
    """
    path = Path(hf_path)
    if not (path / "config.json").is_file():
        raise ConfigError(f"{path}: no config.json; expected a Hugging Face model directory")
    backend = _make_bridge(path, dtype, dict(extra_config or {}), require_moe, bridge)
    chunks = backend.build(
        wrap_with_ddp=wrap_with_ddp,
        ddp_config={"grad_reduce_in_fp32": True, "use_distributed_optimizer": True, **(ddp_config or {})},
    )
    check_query_norm(chunks)
    try:
        mine = backend.parameter_names(chunks)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    files = TensorIndex(path)
    _check_names(backend, mine, files)
    backend.load_weights(chunks, files)
    return backend, chunks


def export_weights(bridge: Bridge, chunks: Chunks) -> Iterator[tuple[str, torch.Tensor]]:
    """(Hugging Face name, full tensor) of every parameter, on every rank, each name once. Collective: consume it everywhere.

    Tensors may alias the model's parameters: copy what must survive the next update.
    """
    seen: set[str] = set()
    with torch.no_grad():
        for name, tensor in bridge.export_weights(chunks):
            # Tied embeddings exist on the first and on the last pipeline stage.
            if name not in seen:
                seen.add(name)
                yield name, tensor.detach()


def save_hf(
    bridge: Bridge,
    chunks: Chunks,
    path: str | Path,
    tokenizer_from: str | Path | None = None,
    *,
    max_shard_bytes: int = 5 << 30,
) -> None:
    """Writes a complete Hugging Face directory and renames it into place; an error leaves what was there unchanged.

    Two renames put it in the place of an older directory: a process that is killed between them leaves the older one beside, as
    `.NAME.*.old`.

    Args:
        path: directory to create or replace.
        tokenizer_from: directory whose tokenizer, chat template and generation config are copied, or None.
        max_shard_bytes: upper limit of one safetensors file (a larger tensor gets its own).

    Raises:
        CheckpointError: on every rank, if rank 0 could not write.
    """
    weights = ((name, tensor.cpu()) for name, tensor in export_weights(bridge, chunks))
    error: str | None = None
    if dist.get_rank() == 0:
        config = copy.deepcopy(bridge.source_config)
        config.dtype = bridge.dtype
        try:
            write_checkpoint(Path(path), weights, config, tokenizer_from, max_shard_bytes)
        except Exception as failure:
            logger.exception("saving to %s failed", path)
            error = f"{type(failure).__name__}: {failure}"
    # The export is collective: the other ranks walk through it, and rank 0 walks through what a failure left.
    for _ in weights:
        pass
    outcome = [error]
    dist.broadcast_object_list(outcome, src=0)
    if outcome[0] is not None:
        raise CheckpointError(f"{path}: the checkpoint could not be written ({outcome[0]}); what was there is unchanged")


def _make_bridge(path: Path, dtype: torch.dtype, extra: dict[str, Any], require_moe: bool, wanted: str) -> Bridge:
    from transformers import AutoConfig

    source = AutoConfig.from_pretrained(str(path))
    try:
        shape = model_shape(source)
    except ConfigError as error:
        if require_moe:
            raise ConfigError(f"{path}: {error}") from None
        shape = None
    if host.is_enabled():
        extra = {**extra, **host.config_overrides()}
    bridge: Bridge
    dense = shape is None and wanted in ("auto", "mbridge")  # mbridge alone has such models, which no table lists
    if dense or choose_bridge(source.model_type, wanted) == "mbridge":
        from megatron_pr2.hf.mbridge_backend import MBridge

        bridge = MBridge(source, shape, dtype, extra)
    else:
        from megatron_pr2.hf.megatron_bridge_backend import MegatronBridge

        bridge = MegatronBridge(path, source, shape, dtype, extra)
    if host.is_enabled():
        host.adapt_config(bridge.config)
    # Refuses, on every rank, what Megatron-Core would refuse later or compute wrongly.
    ParallelLayout.of(bridge.config, world_size=dist.get_world_size())
    return bridge


def _check_names(bridge: Bridge, mine: set[str], files: TensorIndex) -> None:
    """Every tensor that the model needs is in the checkpoint, and every tensor of the checkpoint has a place in the model."""
    everyone: list[set[str]] = [set()] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    needed, present = set().union(*everyone), set(files.names())

    def is_ignored(name: str) -> bool:
        layer = _LAYER.match(name)
        # Multi-token prediction layers follow the decoder's last one (DeepSeek, GLM) and are not built.
        return bool(_ROTARY.search(name) or (layer and int(layer[1]) >= bridge.config.num_layers)) or (
            name == "lm_head.weight" and getattr(bridge.source_config, "tie_word_embeddings", False)
        )

    missing = sorted(needed - present)
    unused = sorted(name for name in present - needed if not is_ignored(name))
    for kind, names in (("lacks", missing), ("has, unknown to the model,", unused)):
        if names:
            raise ConfigError(
                f"{files.directory}: the checkpoint {kind} {len(names)} tensors, first {names[:4]}; "
                f"check that config.json and weights belong together (model_type={bridge.source_config.model_type!r})"
            )
