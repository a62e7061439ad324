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
        # The file that is being filled. Its mapping keeps it: who holds an array in it holds the mapping, and nobody else does.
        self._file: IO[bytes] | None = None
        self._mapping: weakref.ref[mmap.mmap] | None = None
        self._used = 0
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
            file, mapping, offset = self._room(size)
            _write(file, experts, offset)
            _write(file, table.valid, offset + experts.nbytes)
        except OSError as error:
            self._mapping = None  # what it holds stays with those who use it
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
        return RouteTable.checked(ids, data[experts.nbytes :].view(np.bool_), table.num_experts)


    def _room(self, size: int) -> tuple[IO[bytes], mmap.mmap, int]:
        """A file without a name, its mapping, and where in it there is room."""
        file, mapping = self._file, self._mapping() if self._mapping is not None else None
        if file is None or mapping is None or self._used + size > len(mapping):
            # Closed with its mapping. Sparse: disk is taken as tables are written. They are written as a file, because writing to
            # a mapping of a full disk is no error but the end of the process.
            file = self._file = tempfile.TemporaryFile(dir=self.directory, prefix="megatron-pr2-routes-", buffering=0)  # noqa: SIM115
            os.truncate(file.fileno(), max(size, self._file_bytes))
            mapping = mmap.mmap(file.fileno(), max(size, self._file_bytes), access=mmap.ACCESS_READ)
            weakref.finalize(mapping, file.close).atexit = False
            self._mapping, self._used = weakref.ref(mapping), 0
        offset = self._used
        self._used += -(-size // _ALIGNMENT) * _ALIGNMENT
        return file, mapping, offset


def _write(file: IO[bytes], array: npt.NDArray[Any], offset: int) -> None:
    left = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
    while left.nbytes:
        written = os.pwrite(file.fileno(), left, offset)
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
