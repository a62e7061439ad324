"""Which safetensors files of a directory are the model, and which tensors lie where. Imports no torch."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from megatron_pr2.errors import ConfigError

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"


def tensor_files(directory: Path) -> dict[str, Path]:
    """The file of every tensor, after reading the header of every file that is used.

    Which files are used is Transformers' choice: `model.safetensors` alone, else what the index names; without either, all
    *.safetensors files.

    Raises:
        ConfigError: the files are not one whole model that all readers understand alike.
    """
    single, index = directory / SINGLE_NAME, directory / INDEX_NAME
    if not index.is_file():
        return _found(directory, [single] if single.is_file() else sorted(directory.glob("*.safetensors")))
    indexed = _indexed(index)
    if absent := sorted({file.name for file in indexed.values() if not file.is_file()}):
        raise ConfigError(
            f"{directory} lacks {len(absent)} of the files that its index names, first {absent[0]}; finish the download"
        )
    if single.is_file() and set(indexed.values()) - {single}:
        raise ConfigError(
            f"{directory} has {SINGLE_NAME} and an index of other files: Transformers reads the one, engines may read the "
            "others; remove what is old"
        )
    for file in sorted(set(indexed.values())):
        held = _names(file)
        if lost := sorted(name for name, named in indexed.items() if named == file and name not in held):
            raise ConfigError(f"{index} names {file.name} for {lost[0]!r}, which is not in it; copy index and files from one place")
    return indexed


@contextlib.contextmanager
def opened(file: Path, framework: str = "pt") -> Iterator[Any]:
    """A safetensors file, its header checked against the size of the file; ConfigError if it cannot be read or is cut off."""
    try:
        with safe_open(file, framework=framework) as handle:
            yield handle
    except OSError as error:
        raise ConfigError(f"{file} cannot be read ({error})") from error
    except SafetensorError as error:
        raise ConfigError(
            f"{file} ({file.stat().st_size} bytes) cannot be read ({error}); an interrupted download, or a pointer of Git LFS? "
            "Download or write it again"
        ) from error


def _names(file: Path) -> list[str]:
    with opened(file, "numpy") as handle:
        return list(handle.keys())


def _found(directory: Path, files: list[Path]) -> dict[str, Path]:
    """By the headers of the files alone."""
    if not files:
        others = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth", "*.gguf") for file in directory.glob(pattern))
        found = f" (found {', '.join(others[:3])}: convert it with Transformers)" if others else ""
        raise ConfigError(f"{directory}: no *.safetensors files there{found}; expected the model's weights")
    tensors: dict[str, Path] = {}
    for file in files:
        for name in _names(file):
            if name in tensors:
                raise ConfigError(
                    f"{directory}: {name!r} is in {tensors[name].name} and in {file.name}, and no {INDEX_NAME} says "
                    "which counts; keep one set of files"
                )
            tensors[name] = file
    return tensors


def _indexed(index: Path) -> dict[str, Path]:
    try:
        names: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = {name: index.parent / file for name, file in names.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(
            f"{index} is not an index of safetensors files ({type(error).__name__}: {error}); expected a JSON object with "
            "'weight_map', from tensor names to files"
        ) from error
    if not files:
        raise ConfigError(f"{index}: its 'weight_map' is empty")
    return files
