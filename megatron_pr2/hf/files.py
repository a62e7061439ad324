"""Files of a Hugging Face checkpoint: its tensors, and writing a directory so that it is whole or not there."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from megatron_pr2.errors import ConfigError
from megatron_pr2.hf.weight_files import INDEX_NAME, SINGLE_NAME, opened, tensor_files

# What belongs to a model besides config and weights.
_COMPANIONS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
    "generation_config.json",
)


class TensorIndex:
    """The tensors in the files of a directory that :func:`tensor_files` chooses.

    mbridge reads checkpoints through it: its own readers need an index for DeepSeek, set torch's default dtype, and read every
    *.safetensors file of a directory without an index.

    Raises:
        ConfigError: from every method, if the files are not one whole model that all readers understand alike.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)

    def names(self) -> list[str]:
        """All tensor names."""
        return list(self._files)

    def load_some_hf_weight(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """The named tensors on the CPU, as they are in the files; FP8 is refused, since it means nothing without its scales."""
        by_file: dict[Path, list[str]] = {}
        for name in dict.fromkeys(names):
            if name not in self._files:
                raise ConfigError(f"{self.directory}: no tensor {name!r} in its safetensors files")
            by_file.setdefault(self._files[name], []).append(name)
        tensors: dict[str, torch.Tensor] = {}
        for file, wanted in by_file.items():
            with opened(file) as handle:
                for name in wanted:
                    tensors[name] = handle.get_tensor(name)
                    if tensors[name].element_size() == 1 and tensors[name].is_floating_point():
                        raise ConfigError(
                            f"{file}: {name!r} is {tensors[name].dtype}, which is not read; expected a checkpoint in bf16, fp16 "
                            "or fp32 (load it dequantized in Transformers and save it)"
                        )
        return tensors

    def load_one_hf_weight(self, name: str) -> torch.Tensor:
        return self.load_some_hf_weight([name])[name]

    @functools.cached_property
    def _files(self) -> dict[str, Path]:
        return tensor_files(self.directory)


def write_checkpoint(
    path: Path,
    weights: Iterable[tuple[str, torch.Tensor]],
    config: Any,
    tokenizer_from: str | Path | None,
    max_shard_bytes: int,
) -> None:
    """Writes config, weights, tokenizer and generation config to a sibling directory, then renames it to ``path``.

    Args:
        weights: (name, CPU tensor), consumed once; at most one shard is held in memory.
        config: has ``save_pretrained``.

    Raises:
        OSError, SafetensorError: nothing has changed at ``path`` then.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".new", dir=path.parent))
    old = fresh.with_suffix(".old")
    try:
        if tokenizer_from is not None:
            copy_companions(Path(tokenizer_from), fresh)
        config.save_pretrained(str(fresh))
        _write_weights(fresh, weights, max_shard_bytes)
        # mkdtemp and safetensors create for the user alone; a checkpoint is as public as any other directory.
        umask = os.umask(0)
        os.umask(umask)
        for file in fresh.iterdir():
            file.chmod(0o666 & ~umask)
            _sync(file)
        fresh.chmod(0o777 & ~umask)
        _sync(fresh)
        try:
            # Two renames: os.replace does not replace a directory that has files in it.
            if path.exists():
                path.rename(old)
            fresh.rename(path)
        except BaseException:
            if old.exists() and not path.exists():
                old.rename(path)
            raise
        _sync(path.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def copy_companions(source: Path, target: Path) -> None:
    """Copies tokenizer, chat template and generation config files as they are."""
    for pattern in _COMPANIONS:
        for file in sorted(source.glob(pattern)):
            if file.is_file():
                shutil.copyfile(file, target / file.name)


def _write_weights(directory: Path, weights: Iterable[tuple[str, torch.Tensor]], max_shard_bytes: int) -> None:
    files: list[tuple[Path, list[str]]] = []
    total = 0
    for shard in shards(weights, max_shard_bytes):
        file = directory / f"shard-{len(files)}.safetensors"
        save_file(shard, file, metadata={"format": "pt"})
        files.append((file, list(shard)))
        total += sum(tensor.nbytes for tensor in shard.values())
    if len(files) == 1:
        files[0][0].rename(directory / SINGLE_NAME)
        return
    weight_map: dict[str, str] = {}
    for number, (file, names) in enumerate(files, start=1):
        name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        file.rename(directory / name)
        weight_map.update(dict.fromkeys(names, name))
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (directory / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def shards(weights: Iterable[tuple[str, torch.Tensor]], max_bytes: int) -> Iterator[dict[str, torch.Tensor]]:
    """Collects tensors into parts of at most `max_bytes` (a larger tensor is one of its own); the last one may be empty."""
    shard: dict[str, torch.Tensor] = {}
    size = 0
    for name, tensor in weights:
        if shard and size + tensor.nbytes > max_bytes:
            yield shard
            shard, size = {}, 0
        # Its own memory: the source may be a view (one part of a fused weight) or be overwritten before the shard is full.
        shard[name] = tensor.clone(memory_format=torch.contiguous_format)
        size += tensor.nbytes
    yield shard


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        # Some file systems cannot sync a directory.
        with contextlib.suppress(OSError) if path.is_dir() else contextlib.nullcontext():
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
