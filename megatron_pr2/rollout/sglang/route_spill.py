"""RouteSpill: route tables beyond a byte budget live in memory-mapped files instead of memory.

A batch of long responses holds tens of gigabytes of routes (1,536 responses of 32K tokens of Qwen3-30B: 19 GB), and nobody reads
them before their micro-batch. Tables beyond the budget are written to a file and come back as views into its read-only mapping,
whose pages the kernel reads and drops as it needs memory. Nothing has to be freed by a call: what counts is which arrays are
alive, and a file has no name, so that its space is released with the last array that looks into it, also after a crash.
"""

from __future__ import annotations

import errno
import logging
import mmap
import os
import subprocess
import tempfile
import threading
import weakref
from collections import deque
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from megatron_pr2.errors import ConfigError, RolloutError
from megatron_pr2.routes.table import RouteTable

logger = logging.getLogger(__name__)

_ALIGNMENT = 64


class RouteSpill:
    """Keeps the tables of a rollout engine within a budget of memory; safe to use from several threads.

    Args:
        budget_bytes: of arrays in memory; 0 writes every table to a file.
        directory: for the files, on a local disk; `tempfile.gettempdir()` if None.
        file_bytes: tables share files of this size; a larger table has its own.

    Attributes:
        spilled_bytes: ever written to files.
    """

    def __init__(self, budget_bytes: int, directory: str | os.PathLike[str] | None = None, *, file_bytes: int = 256 << 20) -> None:
        self.directory = Path(tempfile.gettempdir() if directory is None else directory)
        if not self.directory.is_dir():
            raise ConfigError(f"RouteSpill: directory {str(self.directory)!r} does not exist; create it on a local disk")
        self.spilled_bytes = 0
        self._budget_bytes = budget_bytes
        self._file_bytes = file_bytes
        self._lock = threading.Lock()
        self._file: _File | None = None
        self._memory_bytes = 0
        self._known: weakref.WeakValueDictionary[int, npt.NDArray[Any]] = weakref.WeakValueDictionary()  # by id()
        # Bytes of arrays that died, maybe in the middle of a method of this object: finalizers only leave a note here.
        self._dead: deque[int] = deque()

    @property
    def memory_bytes(self) -> int:
        """Of the tables in memory that are alive."""
        with self._lock:
            return self._settled()

    def keep(self, table: RouteTable) -> RouteTable:
        """The table itself within the budget, or if it was kept before, else an equal one with read-only arrays in a file."""
        owners = {id(owner): owner for owner in map(_owner, (table.experts, table.valid))}
        with self._lock:
            new = [owner for key, owner in owners.items() if self._known.get(key) is not owner]
            size = sum(owner.nbytes for owner in new)
            if new and self._settled() + size > self._budget_bytes:
                return self._spill(table)
            for owner in new:
                self._known[id(owner)] = owner
                weakref.finalize(owner, self._dead.append, owner.nbytes).atexit = False
            self._memory_bytes += size
            return table

    def _settled(self) -> int:
        while self._dead:
            self._memory_bytes -= self._dead.popleft()
        return self._memory_bytes

    def _spill(self, table: RouteTable) -> RouteTable:
        if not self.spilled_bytes:
            kind = _filesystem(self.directory)
            warning = ", which is memory itself; name a directory on a disk" if kind in ("tmpfs", "ramfs") else ""
            told = f"routes exceed their budget of {self._budget_bytes} bytes and go to files in {self.directory} ({kind}){warning}"
            logger.log(logging.WARNING if warning else logging.INFO, "%s", told)
        experts = table.experts
        # Ids and validity of a table lie in one array, which stands for both.
        size = experts.nbytes + table.valid.nbytes
        try:
            mapping = self._file.mapping() if self._file is not None else None
            if self._file is None or mapping is None or self._file.used + size > len(mapping):
                self._file, mapping = _File.create(self.directory, max(size, self._file_bytes))
            offset = self._file.used
            self._file.used += -(-size // _ALIGNMENT) * _ALIGNMENT
            self._file.write(experts, offset)
            self._file.write(table.valid, offset + experts.nbytes)
        except OSError as error:
            self._file = None  # what it holds stays with those who use it
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            raise RolloutError(
                f"routes exceed their budget of {self._budget_bytes} bytes and {size} bytes could not be written to "
                f"{self.directory}: {error.strerror or error}; "
                + ("make room there, name another directory or raise the budget" if full else "name another directory")
            ) from error
        data: npt.NDArray[np.uint8] = np.frombuffer(mapping, dtype=np.uint8, count=size, offset=offset)
        self._known[id(data)] = data
        self.spilled_bytes += size
        ids = data[: experts.nbytes].view(experts.dtype).reshape(experts.shape)
        return RouteTable(ids, data[experts.nbytes :].view(np.bool_), table.num_experts)


class _File:
    """A file without a name, which its mapping keeps: who holds an array in it holds the mapping, and nobody else does."""

    def __init__(self, handle: IO[bytes], mapping: mmap.mmap) -> None:
        self.mapping = weakref.ref(mapping)
        self.used = 0
        self._handle = handle
        weakref.finalize(mapping, handle.close).atexit = False

    @classmethod
    def create(cls, directory: Path, size: int) -> tuple[_File, mmap.mmap]:
        # Closed with the mapping.
        handle = tempfile.TemporaryFile(dir=directory, prefix="megatron-pr2-routes-", buffering=0)  # noqa: SIM115
        try:
            # Sparse: disk is taken as tables are written. They are written as a file, because writing to a mapping of a full disk
            # is no error but the end of the process.
            os.truncate(handle.fileno(), size)
            mapping = mmap.mmap(handle.fileno(), size, access=mmap.ACCESS_READ)
        except BaseException:
            handle.close()
            raise
        return cls(handle, mapping), mapping

    def write(self, array: npt.NDArray[Any], offset: int) -> None:
        left = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
        while left.nbytes:
            written = os.pwrite(self._handle.fileno(), left, offset)
            left, offset = left[written:], offset + written


def _owner(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The array at the end of a chain of views: what has to die before the memory is free."""
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


def _filesystem(directory: Path) -> str:
    """Type of the file system that holds a directory, as stat(1) names it; "unknown file system" where it does not say."""
    try:
        done = subprocess.run(["stat", "-f", "-c", "%T", directory], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown file system"
    return done.stdout.strip()
