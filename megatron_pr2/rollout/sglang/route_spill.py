"""RouteSpill: route tables beyond a byte budget live in memory-mapped files instead of memory.

A batch of long responses holds tens of gigabytes of routes (1,536 responses of 32K tokens of Qwen3-30B: 19 GB), and nobody reads
them before their micro-batch. Tables within the budget are kept as they are. Later ones are written to a file and come back as
views into its read-only mapping: equal, usable wherever a table is, and the kernel drops and reads their pages as it needs memory.

Lifetimes need no call: memory is accounted by what is alive, so that tables that the trainer dropped make room, and a file is
deleted from its directory as soon as it is open and gone with the last array that looks into it, also after a crash.
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
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from megatron_pr2.errors import ConfigError, RolloutError
from megatron_pr2.routes.table import RouteTable

logger = logging.getLogger(__name__)

_ALIGNMENT = 64
_IN_MEMORY_FILESYSTEMS = ("tmpfs", "ramfs")


@dataclass(frozen=True)
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
        self._warned = False
        self._watched: dict[int, _Watched] = {}
        self._ticket_of: dict[int, int] = {}  # by the array's identity, which the next array may have again
        self._tickets = count()
        self._memory_bytes = self._spilled_bytes = self._spilled_tables = 0
        self._total_bytes = self._total_tables = 0
        # An array may die anywhere, also in the middle of a method of this object: finalizers only leave a note here.
        self._dead: deque[int] = deque()

    def keep(self, table: RouteTable) -> RouteTable:
        """The table itself while the budget lasts, else an equal one with read-only arrays in a file.

        A table that was kept before comes back as it is and is not counted twice.

        Raises:
            RolloutError: the file cannot be written, e.g. because the disk is full.
        """
        owners = {id(owner): owner for owner in map(_owner, (table.experts, table.valid))}
        with self._lock:
            self._settle()
            fresh = [owner for key, owner in owners.items() if key not in self._ticket_of]
            size = sum(owner.nbytes for owner in fresh)
            if fresh and self._memory_bytes + size > self._budget_bytes:
                return self._spill(table)
            for owner in fresh:
                self._watch(owner, spilled=False)
            self._memory_bytes += size
            return table

    def counts(self) -> SpillCounts:
        """Bytes and tables that are alive now, and totals."""
        with self._lock:
            self._settle()
            return SpillCounts(
                memory_bytes=self._memory_bytes,
                spilled_bytes=self._spilled_bytes,
                spilled_tables=self._spilled_tables,
                total_spilled_bytes=self._total_bytes,
                total_spilled_tables=self._total_tables,
            )

    def _spill(self, table: RouteTable) -> RouteTable:
        if not self._warned:
            self._warned = True
            filesystem = _filesystem(self.directory)
            logger.log(
                logging.WARNING if filesystem in _IN_MEMORY_FILESYSTEMS else logging.INFO,
                "routes exceed their budget of %d bytes and go to files in %s (%s)%s",
                self._budget_bytes,
                self.directory,
                filesystem or "unknown file system",
                ", which is memory itself; name a directory on a disk" if filesystem in _IN_MEMORY_FILESYSTEMS else "",
            )
        # Ids and validity of a table stay together, so that one array stands for both.
        size = table.experts.nbytes + table.valid.nbytes
        try:
            mapping, offset = self._room(size)
            assert self._file is not None
            self._file.write(table.experts, offset)
            self._file.write(table.valid, offset + table.experts.nbytes)
        except OSError as error:
            self._file = None  # what it holds stays with those who use it
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            raise RolloutError(
                f"routes exceed their budget of {self._budget_bytes} bytes and {size} bytes could not be written to "
                f"{self.directory}: {error.strerror or error}; "
                + ("make room there, name another directory or raise the budget" if full else "name another directory")
            ) from error
        data: npt.NDArray[np.uint8] = np.frombuffer(mapping, dtype=np.uint8, count=size, offset=offset)
        experts = data[: table.experts.nbytes].view(table.experts.dtype).reshape(table.experts.shape)
        valid = data[table.experts.nbytes :].view(np.bool_)
        self._watch(data, spilled=True)
        self._spilled_bytes += size
        self._spilled_tables += 1
        self._total_bytes += size
        self._total_tables += 1
        return RouteTable(experts, valid, table.num_experts)

    def _room(self, size: int) -> tuple[mmap.mmap, int]:
        """A mapping and where in it there is room."""
        mapping = self._file.mapping() if self._file is not None else None
        if self._file is None or mapping is None or self._file.used + size > self._file.size:
            self._file, mapping = _File.create(self.directory, max(size, self._file_bytes))
        offset = self._file.used
        self._file.used += -(-size // _ALIGNMENT) * _ALIGNMENT
        return mapping, offset

    def _watch(self, owner: npt.NDArray[Any], *, spilled: bool) -> None:
        ticket = next(self._tickets)
        self._watched[ticket] = _Watched(id(owner), owner.nbytes, spilled)
        self._ticket_of[id(owner)] = ticket
        weakref.finalize(owner, self._dead.append, ticket).atexit = False

    def _settle(self) -> None:
        """Accounts for the arrays that died."""
        while self._dead:
            ticket = self._dead.popleft()
            dead = self._watched.pop(ticket)
            if self._ticket_of.get(dead.key) == ticket:
                del self._ticket_of[dead.key]
            if dead.spilled:
                self._spilled_bytes -= dead.nbytes
                self._spilled_tables -= 1
            else:
                self._memory_bytes -= dead.nbytes


@dataclass(frozen=True)
class _Watched:
    """An array whose end is awaited."""

    key: int
    nbytes: int
    spilled: bool


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
