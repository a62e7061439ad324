"""Route tables on disk: many sequences of one model in one safetensors file, to be looked at or compared later.

    metadata      format "megatron-pr2.routes", version "1", num_experts E, note (free text)
    routes.<id>   [T, L, K] uint8 up to 256 experts, else uint16; <id> is the sequence's number
    valid.<id>    [T] bool, False where the row is no route (the last token of a sequence, what an engine did not return)

Shape suffixes (legend in docs/design.md): T tokens, L MoE layers, K top-k, E experts.

Another program may write the same with any integer type and without `valid`: the rows are then checked like an engine's answer
(`RouteTable.from_ids`). Nothing is pickled, so a file of unknown origin can be opened safely.

    save_routes("engine.safetensors", {i: r.routes for i, r in enumerate(batch.responses)}, note="step 12, engine")
    save_routes("actor.safetensors", pr2.routes.tables(), note="step 12, actor")
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from megatron_pr2.errors import DataError, RouteError
from megatron_pr2.routes.ids import expert_dtype, replayable
from megatron_pr2.routes.table import RouteTable

FORMAT = "megatron-pr2.routes"
VERSION = "1"
_NAME = re.compile(r"(routes|valid)\.(0|-?[1-9][0-9]*)")
_INTEGERS = ("U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64")


def save_routes(path: str | os.PathLike[str], tables: Mapping[int, RouteTable], note: str = "") -> None:
    """Writes tables of one model into one file, atomically: readers see the old file or the whole new one.

    Args:
        path: its directory exists; an existing file is replaced.
        tables: by sequence number; all with the same layers, top-k and experts. Copied to the file as they are, one by one.
        note: what the routes are, for whoever opens the file.

    Raises:
        RouteError: there is no table, or they are not of one model.
        DataError: the file could not be written.
    """
    path = Path(path)
    if not tables:
        raise RouteError(f"{path}: no tables to save; expected at least one sequence")
    first_id, first = next(iter(tables.items()))
    arrays: dict[str, npt.NDArray[Any]] = {}
    for sid, table in tables.items():
        if (found := _model(table)) != (expected := _model(first)):
            raise RouteError(
                f"{path}: sequence {sid} has {found}, sequence {first_id} has {expected}; a file holds routes of one model"
            )
        # The id may be numpy's; the arrays may be views into something else.
        arrays[f"routes.{int(sid)}"] = np.ascontiguousarray(table.experts)
        arrays[f"valid.{int(sid)}"] = np.ascontiguousarray(table.valid)
    metadata = {"format": FORMAT, "version": VERSION, "num_experts": str(first.num_experts), "note": note}
    try:
        with replacement(path) as temporary:
            save_file(arrays, temporary, metadata=metadata)
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path}: could not be written ({error}); check that the directory exists and has room") from error


@contextmanager
def replacement(path: Path) -> Iterator[Path]:
    """A file to write beside `path`, which is moved there at the end: readers see the old one or the whole new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_routes(path: str | os.PathLike[str]) -> dict[int, RouteTable]:
    """All tables of a file; `RouteFile` reads them one by one instead.

    Raises:
        DataError: the file is absent, damaged, or not one of route tables; the message names the sequence and the row.
    """
    with RouteFile(path) as file:
        return dict(file)


class RouteFile(Mapping[int, RouteTable]):
    """A file of route tables, read sequence by sequence: in memory is only what is asked for. A context manager.

    Attributes:
        path: as given.
        note: what the writer said of the routes.
        num_layers, topk, num_experts: L, K and E of every table.

    Raises:
        DataError: as `load_routes`; a table's content is checked when it is read.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise DataError(f"{self.path}: no such file; expected a file written by megatron_pr2.routes.files.save_routes")
        try:
            self._file: Any = safe_open(self.path, framework="numpy")
        except (OSError, SafetensorError) as error:
            raise DataError(
                f"{self.path}: not a whole safetensors file of {self.path.stat().st_size} bytes ({error}); "
                "expected one written by save_routes; if it was copied, copy it again"
            ) from error
        try:
            self.note, self.num_experts = self._read_metadata()
            self._lengths, self.num_layers, self.topk = self._read_shapes()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> RouteFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file; tables that were read stay usable."""
        self._file.__exit__(None, None, None)

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        return iter(self._lengths)

    def __getitem__(self, sequence: int) -> RouteTable:
        if sequence not in self._lengths:
            raise KeyError(sequence)
        ids_TLK: npt.NDArray[Any] = self._file.get_tensor(f"routes.{sequence}")
        if f"valid.{sequence}" not in self._names:
            return RouteTable.from_ids(ids_TLK, self.num_experts)
        # Through bytes: a damaged one may hold neither 0 nor 1, and numpy's bool knows no other.
        valid: npt.NDArray[np.bool_] = self._file.get_tensor(f"valid.{sequence}").view(np.uint8) != 0
        replayable_T = replayable(ids_TLK, self.num_experts)
        if (valid & ~replayable_T).any():
            raise self._wrong_row(sequence, ids_TLK, np.flatnonzero(valid & ~replayable_T))
        experts = np.zeros(ids_TLK.shape, dtype=expert_dtype(self.num_experts))
        experts[valid] = ids_TLK[valid]
        return RouteTable.checked(experts, valid, self.num_experts)

    def lengths(self) -> dict[int, int]:
        """Tokens of every sequence, without reading a table."""
        return dict(self._lengths)

    def _wrong_row(self, sequence: int, ids_TLK: npt.NDArray[Any], rows: npt.NDArray[np.intp]) -> DataError:
        row = int(rows[0])
        layers = ids_TLK[row][:, None, :]  # as if they were tokens of one layer
        layer = int(np.flatnonzero(~replayable(layers, self.num_experts))[0])
        return DataError(
            f"{self.path}: routes.{sequence} row {row}, MoE layer {layer} (from 0) holds {ids_TLK[row, layer].tolist()}; expected "
            f"{self.topk} different ids in 0..{self.num_experts - 1} where valid.{sequence} is true ({rows.size} of "
            f"{len(ids_TLK)} rows are wrong): the file is damaged, or its num_experts is"
        )

    def _read_metadata(self) -> tuple[str, int]:
        metadata = self._file.metadata() or {}
        kind, version = metadata.get("format"), metadata.get("version")
        if kind != FORMAT:
            raise DataError(f"{self.path}: metadata says format {kind!r}; expected {FORMAT!r}: this file holds no route tables")
        if version != VERSION:
            raise DataError(f"{self.path}: version {version!r}; this release reads version {VERSION!r}")
        experts = metadata.get("num_experts", "")
        if not re.fullmatch("[1-9][0-9]{0,4}", experts) or int(experts) > 1 << 15:
            raise DataError(f"{self.path}: metadata says num_experts {experts!r}; expected a whole number in 1..32768")
        return metadata.get("note", ""), int(experts)

    def _read_shapes(self) -> tuple[dict[int, int], int, int]:
        """Tokens per sequence in ascending order, L and K."""
        self._names = frozenset(self._file.keys())
        matches = {name: _NAME.fullmatch(name) for name in sorted(self._names)}
        if strange := [name for name, match in matches.items() if match is None]:
            raise DataError(f"{self.path}: holds {strange[0]!r}; expected routes.<sequence> and valid.<sequence> only")
        ids = {(match[1], int(match[2])) for match in matches.values() if match}
        lengths: dict[int, int] = {}
        model: tuple[int, int] | None = None
        for kind, sid in sorted(ids, key=lambda pair: (pair[0], pair[1])):
            part = self._file.get_slice(f"{kind}.{sid}")
            shape, dtype = tuple(part.get_shape()), part.get_dtype()
            what = f"{self.path}: {kind}.{sid} is {dtype}{list(shape)}"
            if kind == "routes":
                if len(shape) != 3 or dtype not in _INTEGERS or min(shape[1:]) < 1 or shape[2] > self.num_experts:
                    raise DataError(f"{what}; expected integers [tokens, MoE layers, top-k], top-k <= {self.num_experts} experts")
                model = model or shape[1:]
                if shape[1:] != model:
                    raise DataError(f"{what}; expected [tokens, {model[0]}, {model[1]}] like the others: a file holds one model's")
                lengths[sid] = shape[0]
            elif lengths.get(sid) != (shape[0] if len(shape) == 1 else None) or dtype != "BOOL":
                expected = f"BOOL[{lengths[sid]}]" if sid in lengths else f"a routes.{sid} beside it"
                raise DataError(f"{what}; expected {expected}")
        if model is None:
            raise DataError(f"{self.path}: holds no routes; expected at least one routes.<sequence>")
        return lengths, *model


def _model(table: RouteTable) -> str:
    return f"{table.num_layers} MoE layers, top-{table.topk} of {table.num_experts} experts"
