"""Weights through a directory that trainers and servers share: the way where no network group can be opened.

Every byte is written and read once more than by a group, and a server loads a whole model or nothing. Any number of senders write
their parts side by side, as safetensors; the controlling process then checks that all parts together are the model that the
directory started from, name by name, because SGLang would silently keep old weights for what is missing.
"""

from __future__ import annotations

import functools
import json
import re
import shutil
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from megatron_pr2.errors import ConfigError, RolloutError
from megatron_pr2.hf.files import TensorIndex, copy_companions, shards
from megatron_pr2.hf.weight_files import INDEX_NAME
from megatron_pr2.rollout.sglang.push.session import WHERE, PushSession, PushTarget

# Names that a checkpoint may hold and that no trainer exports: cached rotary frequencies of old releases.
_IGNORED = re.compile(r"rotary_emb\.inv_freq$")


@dataclass(frozen=True)
class DiskTarget:
    """Where senders put their parts: a directory that all processes see, in files of at most `shard_bytes` or one tensor."""

    directory: str
    shard_bytes: int


def write_part(target: DiskTarget, part: int, weights: Iterable[tuple[str, torch.Tensor]]) -> int:
    """Writes one process's tensors by Hugging Face name and returns their bytes; at most one file's tensors are held.

    Args:
        part: differs from sender to sender, e.g. the rank.
    """
    total = 0
    directory = Path(target.directory)
    on_cpu = ((name, tensor.detach().cpu()) for name, tensor in weights)
    for count, shard in enumerate(shards(on_cpu, target.shard_bytes)):
        total += sum(tensor.nbytes for tensor in shard.values())
        name = f"part-{part:05d}-{count:05d}.safetensors"
        partial = directory / f".{name}.partial"
        try:
            if shard:
                save_file(shard, partial, metadata={"format": "pt"})
                partial.chmod(directory.stat().st_mode & 0o666)  # safetensors writes for the user alone
                partial.rename(directory / name)  # whole or not there
        except Exception as error:  # safetensors has errors of its own
            partial.unlink(missing_ok=True)
            raise RolloutError(f"{WHERE}: {directory / name} could not be written: {type(error).__name__}: {error}") from error
        shard.clear()  # before the next one is collected
    return total


class DiskPush:
    """Both sides in the controlling process.

    Args:
        model_path: directory that the servers were started from; gives config.json, tokenizer and the names of the weights.
        parent: existing directory that all processes and servers see, for the directories of single pushes.
    """

    def __init__(self, model_path: str | Path, parent: str | Path, *, shard_bytes: int = 1 << 30) -> None:
        self._model_path = Path(model_path)
        self._parent = Path(parent)
        self._shard_bytes = shard_bytes
        self._target: DiskTarget | None = None

    @functools.cached_property
    def _required(self) -> set[str]:
        # Once for all pushes: it opens every file of the model.
        return _required_names(self._model_path)

    def begin(self, sessions: Sequence[PushSession] = (), targets: Sequence[PushTarget] = ()) -> DiskTarget:
        """Makes a new directory; the servers are not involved before finish()."""
        self.close()
        if not (self._model_path / "config.json").is_file():
            raise ConfigError(f"{self._model_path}: no config.json; expected a Hugging Face model directory")
        directory = self._parent / f"push-{uuid.uuid4().hex}"
        target = self._target = DiskTarget(str(directory), self._shard_bytes)
        try:
            directory.mkdir()
            shutil.copyfile(self._model_path / "config.json", directory / "config.json")
            copy_companions(self._model_path, directory)
        except OSError as error:
            self.close()
            raise RolloutError(f"{WHERE}: no directory for the weights in {self._parent}: {error}") from error
        return target

    def push(self, weights: Iterable[tuple[str, torch.Tensor]], targets: object = None) -> int:
        """Writes this process's part, that of rank 0; all servers load the same."""
        return write_part(self._opened(), 0, weights)

    def finish(self, sessions: Sequence[PushSession], label: str, *, flush_cache: bool) -> None:
        """Checks that the model is complete, has every server load it, and removes the directory."""
        directory = self._opened().directory
        _write_index(Path(directory), self._required)
        for session in sessions:
            session.load_directory(directory)
        for session in sessions:
            session.publish(label, flush_cache=flush_cache)
        self.close()

    def abandon(self, sessions: Sequence[PushSession] = ()) -> None:
        """Removes the directory of a push that failed; safe to call at any time."""
        self.close()

    def close(self) -> None:
        """Removes what a push left behind."""
        target, self._target = self._target, None
        if target is not None:
            shutil.rmtree(target.directory, ignore_errors=True)

    def _opened(self) -> DiskTarget:
        if self._target is None:
            raise RolloutError(f"{WHERE}: begin() was not called, or the engine was closed meanwhile")
        return self._target


def _required_names(model_path: Path) -> set[str]:
    """Names that a whole export of this model has."""
    config = json.loads((model_path / "config.json").read_text(encoding="utf-8"))
    layers = int(config["num_hidden_layers"])
    names = {name for name in TensorIndex(model_path).names() if not _IGNORED.search(name)}
    if config.get("tie_word_embeddings"):
        names.discard("lm_head.weight")
    # Multi-token prediction layers follow the decoder's; they are not trained.
    return {name for name in names if not (found := re.match(r"model\.layers\.(\d+)\.", name)) or int(found.group(1)) < layers}


def _write_index(directory: Path, required: set[str]) -> None:
    """Joins the parts by an index; raises RolloutError if they are not the whole model."""
    weight_map: dict[str, str] = {}
    twice: set[str] = set()
    total = 0
    for file in sorted(directory.glob("*.safetensors")):
        total += file.stat().st_size
        with safe_open(file, framework="pt") as opened:
            names = set(opened.keys())
        twice |= names & set(weight_map)
        weight_map.update(dict.fromkeys(names, file.name))
    problems = {"missing": required - set(weight_map), "unknown": set(weight_map) - required, "there twice": twice}
    told = [f"{len(names)} {what} (first {sorted(names)[:3]})" for what, names in problems.items() if names]
    if told:
        raise RolloutError(
            f"{WHERE}: the parts in {directory} are not the model: {', '.join(told)}. By disk a whole model is pushed or nothing; "
            "check that every rank exports what it owns, and that all ranks see the same directory"
        )
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (directory / INDEX_NAME).write_text(json.dumps(index), encoding="utf-8")
