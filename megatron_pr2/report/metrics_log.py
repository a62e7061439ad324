"""MetricsLog: one JSON line per rollout step in metrics.jsonl, mirrored to TensorBoard; what is in a record is read here only.

The file survives a crash at any moment: a record is one write, a torn last line is dropped on reading, and a resumed run
removes the records of the steps that it is going to repeat.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from statistics import fmean
from typing import Any

from megatron_pr2.errors import DataError
from megatron_pr2.routes.files import replacement

logger = logging.getLogger(__name__)

Record = Mapping[str, Any]
FILE_NAME = "metrics.jsonl"

# Names as flat() gives them, and the TensorBoard tag under which they are mirrored.
TAGS = (
    (r"reward|reward_std|response_length|truncated|tokens_per_second", r"\g<0>"),
    (r"clip_fraction|masked_fraction|router_shift_weight|grad_norm|lr", r"policy/\g<0>"),
    (r"policy_(loss)", r"policy/\1"),
    (r"agreement|frozen_agreement|lift|lift_all", r"routes/\g<0>"),
    (r"rollout\.(turns)", r"\1"),
    (r"(routes|logprob_gap|predictor|seconds|bytes|importance)\.([^.]+)", r"\1/\2"),
    (r"hold_back\.beta\.(\d+)", r"hold_back/beta_by_layer/\1"),
    (r"mini_steps\.(\d+)\.(?!mini_step$)([^.]+)", r"mini_step/\2/\1"),
)


def flat(value: Any, name: str = "") -> dict[str, float]:
    """The finite numbers of a record by dotted name; places in lists count from 1: "mini_steps.2.agreement", "hold_back.beta.1"."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return {name: float(value)} if math.isfinite(value) else {}
    parts = value.items() if isinstance(value, Mapping) else enumerate(value, start=1) if isinstance(value, list) else ()
    return {key: number for part, item in parts for key, number in flat(item, f"{name}.{part}" if name else str(part)).items()}


def listed(numbers: Mapping[str, float], name: str) -> list[float]:
    """The numbers that a list of the record holds."""
    return [value for key, value in numbers.items() if re.fullmatch(rf"{re.escape(name)}\.\d+", key)]


def scalars(record: Record) -> dict[str, float]:
    """TensorBoard tags and values of a record; what is absent has no tag."""
    numbers = flat(record)
    matches = ((re.fullmatch(pattern, name), tag, value) for name, value in numbers.items() for pattern, tag in TAGS)
    out = {match.expand(tag): value for match, tag, value in matches if match}
    for name in ("beta", "lift", "lift_error"):
        if values := listed(numbers, f"hold_back.{name}"):
            out[f"hold_back/{name}"] = fmean(values)
    if shares := listed(numbers, "delivered"):
        out["routes/delivered"] = fmean(shares)
    if betas := listed(numbers, "hold_back.beta"):
        out["hold_back/held_layers"] = fmean(beta == 0 for beta in betas)
    return out


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
        self.path, self._last_step = Path(run_dir) / FILE_NAME, -1
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.touch()
        existing = _read_lines(self.path)
        if resume_step is None and existing:
            raise DataError(
                f"{self.path} already holds {len(existing)} record(s) (last step {existing[-1][1]['step']}); "
                "resume that run, or give the new run a directory of its own"
            )
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
        with open(self.path, "ab", buffering=0) as file:
            start = file.tell()
            try:
                if file.write(line) != len(line):
                    raise OSError(f"{self.path}: the record of step {step} was written only in part; is the disk full?")
            except OSError:
                file.truncate(start)  # or the next record would be glued to this one's torn half
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
        if self.path.read_bytes() != content:
            if len(kept) < len(lines):
                logger.info("%s: removed %d record(s) from step %d on", self.path, len(lines) - len(kept), step)
            replace_atomically(self.path, content)

    def __exit__(self, *_: object) -> None:
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
    rewards = [flat(record).get("reward", math.nan) for record in records]
    ends = [[reward for reward in part if math.isfinite(reward)] for part in (rewards[:fifth], rewards[-fifth:])]
    first, last = (fmean(part) if part else math.nan for part in ends)
    return {"first": first, "last": last, "change": last - first, "rollouts": float(min(fifth, len(records)))}


def replace_atomically(path: Path, content: bytes) -> None:
    """Writes `content` next to `path` and moves it there, so that readers see the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacement(path) as temporary:
        temporary.write_bytes(content)


def _read_lines(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    """(line without newline, record) of every whole line."""
    *lines, tail = path.read_bytes().split(b"\n")  # the tail is empty after a whole last line
    out = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}:{number} is not JSON ({error}); restore or remove that line") from None
        if not isinstance(record, dict) or not isinstance(record.get("step"), int) or record["step"] < 0:
            raise DataError(f"{path}:{number} is not a metrics record: expected an object with an integer step >= 0")
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
