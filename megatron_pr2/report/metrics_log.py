"""MetricsLog: one JSON line per rollout step in metrics.jsonl, mirrored to TensorBoard.

The file survives a crash at any moment: a record is one write, a torn last line is dropped on reading, and a resumed run
removes the records of the steps that it is going to repeat.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from megatron_pr2.errors import DataError
from megatron_pr2.report.records import Record, layer_values, mean, mini_steps_of, number

logger = logging.getLogger(__name__)

FILE_NAME = "metrics.jsonl"

# TensorBoard prefix -> numbers of the record itself that are mirrored under it.
NUMBERS = {
    "": ("reward", "reward_std", "response_length", "truncated", "tokens_per_second"),
    "policy/": ("clip_fraction", "grad_norm", "lr"),
    "routes/": ("agreement", "frozen_agreement", "lift", "lift_all"),
}
# Groups of a record whose every number is mirrored under the group's name.
GROUPS = ("routes", "logprob_gap", "predictor", "seconds", "bytes", "importance")


class MetricsLog(AbstractContextManager["MetricsLog"]):
    """Appends records to `run_dir`/metrics.jsonl and mirrors their numbers to `run_dir`/tensorboard.

    Args:
        run_dir: directory of the run, made if it does not exist.
        resume_step: None for a new run. For a resumed run the first step that will be (re)done: records from there on are
            removed and TensorBoard hides its events from there on. 0 starts over in the same directory.

    Raises:
        DataError: a new run, but the directory already holds records; or the existing file is damaged before its last line.
    """

    def __init__(self, run_dir: str | Path, resume_step: int | None = None) -> None:
        self.path = Path(run_dir) / FILE_NAME
        self.path.parent.mkdir(parents=True, exist_ok=True)
        existing = _read_lines(self.path)
        if resume_step is None and existing:
            raise DataError(
                f"{self.path} already holds {len(existing)} record(s) (last step {existing[-1][1]['step']}); "
                "resume that run, or give the new run a directory of its own"
            )
        self._last_step = -1
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 (lives as long as the log)
        self.truncate(0 if resume_step is None else resume_step)
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(self.path.with_name("tensorboard")), purge_step=resume_step, flush_secs=10)

    def append(self, record: Record) -> None:
        """Writes one record; numbers that are not finite become null, arrays become lists.

        Raises:
            DataError: no integer `step`, a step that is not after the last one, or a value that JSON cannot hold.
        """
        clean = _clean(record, "record")
        step = clean.get("step")
        if not isinstance(step, int) or isinstance(step, bool) or step <= self._last_step:
            raise DataError(f"record: step={step!r}; expected an integer above the last logged step, {self._last_step}")
        line = json.dumps(clean, allow_nan=False, separators=(",", ":")).encode() + b"\n"
        start = os.fstat(self._file.fileno()).st_size
        try:
            if self._file.write(line) != len(line):
                raise OSError(f"{self.path}: the record of step {step} was written only in part; is the disk full?")
        except OSError:
            self._file.truncate(start)  # or the next record would be glued to this one's torn half
            raise
        self._last_step = step
        for tag, value in scalars(clean).items():
            self._writer.add_scalar(tag, value, step)

    def truncate(self, step: int) -> None:
        """Removes the records with step >= `step`, and a torn last line, atomically: the file is either the old or the new one.

        Raises:
            DataError: the file is damaged before its last line.
        """
        lines = _read_lines(self.path)
        kept = [(line, record) for line, record in lines if record["step"] < step]
        self._last_step = max((record["step"] for _, record in kept), default=-1)
        content = b"".join(line + b"\n" for line, _ in kept)
        if self.path.read_bytes() == content:
            return
        if len(kept) < len(lines):
            logger.info("%s: removed %d record(s) from step %d on", self.path, len(lines) - len(kept), step)
        self._file.close()
        replace_atomically(self.path, content)
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 (lives as long as the log)

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._writer.close()


def read_records(run_dir: str | Path) -> list[dict[str, Any]]:
    """The records of a run in order; a torn last line is dropped with a warning.

    Raises:
        DataError: there is no metrics.jsonl, or a line before the last one is not a record.
    """
    path = Path(run_dir) / FILE_NAME
    if not path.exists():
        raise DataError(f"{path} does not exist; expected the directory of a run that has logged at least one step")
    return [record for _, record in _read_lines(path)]


def first_and_last_fifth(records: Sequence[Record]) -> dict[str, float]:
    """Mean reward at the two ends of a run.

    Returns:
        "first", "last": mean reward of the first and the last fifth of the rollouts (at least one); "change": their
        difference; "rollouts": how many rollouts a fifth is. NaN where no rollout has a reward.
    """
    fifth = max(1, len(records) // 5)
    first, last = (float(mean([number(r, "reward") for r in part])) for part in (records[:fifth], records[-fifth:]))
    return {"first": first, "last": last, "change": last - first, "rollouts": float(min(fifth, len(records)))}


def scalars(record: Record) -> dict[str, float]:
    """TensorBoard tags and values of a record; what is absent has no tag. Mini-steps are `mini_step/<name>/<mini-step>`."""
    out = {f"{prefix}{name}": number(record, name) for prefix, names in NUMBERS.items() for name in names}
    out |= {"policy/loss": number(record, "policy_loss"), "turns": number(record, "rollout", "turns")}
    for key in GROUPS:
        group = record.get(key)
        if isinstance(group, Mapping):
            out |= {f"{key}/{name}": number(group, name) for name in group}
    # Hold-back: means over layers, the share of layers whose beta is 0, and beta by layer, from 1.
    lists = {name: layer_values(record, "hold_back", name) for name in ("beta", "lift", "lift_error")}
    out |= {f"hold_back/{name}": float(mean(values)) for name, values in lists.items()}
    known = [beta for beta in lists["beta"] if math.isfinite(beta)]
    out["hold_back/held_layers"] = float(mean([beta == 0 for beta in known]))
    out |= {f"hold_back/beta_by_layer/{layer}": beta for layer, beta in enumerate(lists["beta"], start=1)}
    for position, entry in enumerate(mini_steps_of(record), start=1):
        out |= {f"mini_step/{name}/{position}": number(entry, name) for name in entry if name != "mini_step"}
    return {tag: value for tag, value in out.items() if math.isfinite(value)}


def replace_atomically(path: Path, content: bytes) -> None:
    """Writes `content` next to `path` and moves it there, so that readers see the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _read_lines(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    """(line without newline, record) of every whole line; empty if there is no file."""
    if not path.exists():
        return []
    content = path.read_bytes()
    lines = content.split(b"\n")
    tail = lines.pop()  # empty after a whole last line
    out = []
    for number_of, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}:{number_of} is not JSON ({error}); restore or remove that line") from None
        if not isinstance(record, dict) or not isinstance(record.get("step"), int) or record["step"] < 0:
            raise DataError(f"{path}:{number_of} is not a metrics record: expected an object with an integer step >= 0")
        out.append((line, record))
    if tail:
        logger.warning("%s: line %d is torn (%d bytes without a line end) and is dropped", path, len(lines) + 1, len(tail))
    return out


def _clean(value: Any, where: str) -> Any:
    """The value as JSON can hold it; NaN and infinities become None."""
    if hasattr(value, "tolist"):  # numpy and torch scalars and arrays
        value = value.tolist()
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _clean(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_clean(item, f"{where}[{i}]") for i, item in enumerate(value)]
    raise DataError(f"{where} is a {type(value).__name__}; expected numbers, strings, lists and dictionaries")
