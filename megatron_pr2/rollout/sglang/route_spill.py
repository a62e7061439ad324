"""RouteSpill: route tables beyond a byte budget live in memory-mapped files instead of memory.

A batch of long responses holds tens of gigabytes of routes (1,536 responses of 32K tokens of Qwen3-30B: 19 GB), and nobody reads
them before their micro-batch. Tables within the budget are kept as they are. Later ones are written to a file and come back as
views into its read-only mapping, whose pages the kernel reads and drops as it needs memory.

Nothing has to be freed by a call: what counts is which arrays are alive, and a file is unlinked as soon as it is open and its space
is released with the last array that looks into it, also after a crash.
"""

from __future__ import annotations

import errno
import logging
import mmap
import os
import tempfile
import threading
import weakref
from collections import deque
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from megatron_pr2.errors import ConfigError, RolloutError
from megatron_pr2.routes.table import RouteTable

logger = logging.getLogger(__name__)

_ALIGNMENT = 64
_IN_MEMORY_FILESYSTEMS = ("tmpfs", "ramfs")


@dataclass
class SpillCounts:
    """What a RouteSpill did.

    Attributes:
        memory_bytes: of the tables in memory that are alive.
        spilled_bytes, spilled_tables: in files, alive.
        total_spilled_bytes, total_spilled_tables: ever written to files.
    """

    memory_bytes: int = 0
    spilled_bytes: int = 0
    spilled_tables: int = 0
    total_spilled_bytes: int = 0
    total_spilled_tables: int = 0


class RouteSpill:
    """Keeps the tables of a rollout engine within a budget of memory; safe to use from several threads.

    Args:
        budget_bytes: of arrays in memory; 0 writes every table to a file.
        directory: for the files, on a local disk; `tempfile.gettempdir()` if None.
        file_bytes: tables share files of this size; a larger table has its own.

    Raises:
        ConfigError: a size is negative, or the directory does not exist.
    """

    def __init__(self, budget_bytes: int, directory: str | os.PathLike[str] | None = None, *, file_bytes: int = 256 << 20) -> None:
        if budget_bytes < 0 or file_bytes < 1:
            raise ConfigError(f"RouteSpill: budget_bytes={budget_bytes}, file_bytes={file_bytes}; expected >= 0 and >= 1")
        self.directory = Path(tempfile.gettempdir() if directory is None else directory)
        if not self.directory.is_dir():
            raise ConfigError(f"RouteSpill: directory {str(self.directory)!r} does not exist; create it on a local disk")
        self._budget_bytes = budget_bytes
        self._file_bytes = file_bytes
        self._lock = threading.Lock()
        self._file: _File | None = None
        self._counts = SpillCounts()
        self._counted: weakref.WeakValueDictionary[int, npt.NDArray[Any]] = weakref.WeakValueDictionary()  # by id()
        # (bytes, whether in a file). An array may die in the middle of a method of this object: finalizers only leave a note here.
        self._dead: deque[tuple[int, bool]] = deque()

    def keep(self, table: RouteTable) -> RouteTable:
        """The table itself within the budget, else an equal one with read-only arrays in a file.

        A table that was kept before comes back as it is and is not counted twice.

        Raises:
            RolloutError: the file cannot be written, e.g. because the disk is full.
        """
        owners = {id(owner): owner for owner in map(_owner, (table.experts, table.valid))}
        with self._lock:
            self._settle()
            new = [owner for key, owner in owners.items() if self._counted.get(key) is not owner]
            size = sum(owner.nbytes for owner in new)
            if new and self._counts.memory_bytes + size > self._budget_bytes:
                return self._spill(table)
            for owner in new:
                self._count(owner, in_file=False)
            self._counts.memory_bytes += size
            return table

    def counts(self) -> SpillCounts:
        with self._lock:
            self._settle()
            return replace(self._counts)

    def _spill(self, table: RouteTable) -> RouteTable:
        counts, experts = self._counts, table.experts
        if not counts.total_spilled_tables:
            filesystem = _filesystem(self.directory)
            warning = ", which is memory itself; name a directory on a disk" if filesystem in _IN_MEMORY_FILESYSTEMS else ""
            logger.log(
                logging.WARNING if warning else logging.INFO,
                "routes exceed their budget of %d bytes and go to files in %s (%s)%s",
                self._budget_bytes, self.directory, filesystem or "unknown file system", warning,
            )  # fmt: skip
        # Ids and validity of a table lie in one array, which stands for both.
        size = experts.nbytes + table.valid.nbytes
        try:
            mapping, offset = self._room(size)
            assert self._file is not None
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
        self._count(data, in_file=True)
        counts.spilled_bytes += size
        counts.spilled_tables += 1
        counts.total_spilled_bytes += size
        counts.total_spilled_tables += 1
        ids = data[: experts.nbytes].view(experts.dtype).reshape(experts.shape)
        return RouteTable(ids, data[experts.nbytes :].view(np.bool_), table.num_experts)

    def _room(self, size: int) -> tuple[mmap.mmap, int]:
        """A mapping and where in it there is room."""
        mapping = self._file.mapping() if self._file is not None else None
        if self._file is None or mapping is None or self._file.used + size > self._file.size:
            self._file, mapping = _File.create(self.directory, max(size, self._file_bytes))
        offset = self._file.used
        self._file.used += -(-size // _ALIGNMENT) * _ALIGNMENT
        return mapping, offset

    def _count(self, owner: npt.NDArray[Any], *, in_file: bool) -> None:
        self._counted[id(owner)] = owner
        weakref.finalize(owner, self._dead.append, (owner.nbytes, in_file)).atexit = False

    def _settle(self) -> None:
        """Subtracts the arrays that died."""
        while self._dead:
            nbytes, in_file = self._dead.popleft()
            if in_file:
                self._counts.spilled_bytes -= nbytes
                self._counts.spilled_tables -= 1
            else:
                self._counts.memory_bytes -= nbytes


@dataclass
class _File:
    """A file without a name, which its mapping keeps: who holds an array in it holds the mapping, and nobody else does."""

    handle: IO[bytes]
    mapping: weakref.ref[mmap.mmap]
    size: int
    used: int = 0

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
        weakref.finalize(mapping, handle.close).atexit = False
        return cls(handle, weakref.ref(mapping), size), mapping

    def write(self, array: npt.NDArray[Any], offset: int) -> None:
        left = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
        while left.nbytes:
            written = os.pwrite(self.handle.fileno(), left, offset)
            left, offset = left[written:], offset + written


def _owner(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The array at the end of a chain of views: what has to die before the memory is free."""
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


def _filesystem(directory: Path) -> str | None:
    """Type of the file system that holds a directory, None where the kernel does not say."""
    try:
        device = os.stat(directory).st_dev
        for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines():
            major, minor = line.split()[2].split(":")
            if os.makedev(int(major), int(minor)) == device:
                return line.partition(" - ")[2].split()[0]
    except (OSError, ValueError, IndexError):
        pass
    return None
