"""Reading metrics records: one record per rollout, with nulls where a value does not exist (docs: metrics.jsonl).

`number` and `RunData` are the only places that know how absent values look; everything else sees NaN.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Record = Mapping[str, Any]


def _at(record: Record, keys: Sequence[str | int]) -> Any:
    """What is at `record[keys[0]][keys[1]]...`, None if any part is absent."""
    value: Any = record
    for key in keys:
        if isinstance(value, Mapping):
            value = value.get(key)
        else:
            value = value[key] if isinstance(value, list) and isinstance(key, int) and key < len(value) else None
    return value


def _as_float(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan


def number(record: Record, *keys: str | int) -> float:
    """The number at `record[keys[0]][keys[1]]...`, NaN if any part is absent, null or not a number."""
    return _as_float(_at(record, keys))


def mini_steps_of(record: Record) -> list[Record]:
    """The mini-steps of a record in order; empty if it has none."""
    entries = record.get("mini_steps")
    return [entry for entry in entries if isinstance(entry, Mapping)] if isinstance(entries, Sequence) else []


def lift_all(record: Record) -> float:
    """Mean lift over all mini-steps, the first included; from the mini-steps, or the lift of the later ones, in older records."""
    over_all = mean([number(entry, "lift") for entry in mini_steps_of(record)])
    candidates = (number(record, "lift_all"), float(over_all), number(record, "lift"))
    return next((value for value in candidates if math.isfinite(value)), math.nan)


def layer_values(record: Record, *keys: str) -> list[float]:
    """The list at `record[keys[0]][keys[1]]...`, a number per MoE layer; empty if there is none."""
    value = _at(record, keys)
    return [_as_float(v) for v in value] if isinstance(value, list) else []


def mean(values: Array | Sequence[float], axis: int | None = None) -> Any:
    """Mean of the values that exist, NaN where none does."""
    return _quietly(np.nanmean, np.asarray(values, dtype=np.float64), axis)


class RunData:
    """Columns of a run as arrays over rollouts, thinned to at most `limit` points so that long runs plot quickly.

    Attributes:
        steps: [P] step numbers, the middle of each bin.
        rollouts: number of records.
        bin_size: rollouts per point.
        kappa: mini-steps per rollout (the largest that occurs).
    """

    def __init__(self, records: Sequence[Record], limit: int = 400) -> None:
        self.records = records
        self.rollouts = len(records)
        self.bin_size = max(1, math.ceil(len(records) / limit))
        self.kappa = max((len(mini_steps_of(r)) for r in records), default=0)
        self.steps = self._bin(np.array([number(r, "step") for r in records], dtype=np.float64), np.nanmean)

    def series(self, read: Callable[[Record], float], reduce: Callable[..., Any] = np.nanmean) -> Array:
        """[P] what `read` says of every record; `reduce` joins the rollouts of one bin."""
        return self._bin(np.array([read(r) for r in self.records], dtype=np.float64), reduce)

    def column(self, *keys: str, reduce: Callable[..., Any] = np.nanmean) -> Array:
        """[P] values at `keys`."""
        return self.series(lambda r: number(r, *keys), reduce)

    def total(self, *keys: str) -> float:
        """Sum over all rollouts of the values that exist."""
        return float(np.nansum([number(r, *keys) for r in self.records]))

    def mini_steps(self, *keys: str | int) -> Array:
        """[kappa, P] a scalar of every mini-step."""
        return self._bin(self._per_mini_step(*keys), np.nanmean)

    def mini_step_means(self, *keys: str | int) -> Array:
        """[kappa] the scalar's mean over all rollouts."""
        return mean(self._per_mini_step(*keys), axis=1)

    def last_mini_step(self, key: str, reduce: Callable[..., Any] = np.nanmean) -> Array:
        """[P] the scalar in the last, stalest mini-step of each rollout."""
        return self.series(lambda r: number((mini_steps_of(r) or [{}])[-1], key), reduce)

    def later_mini_steps(self, key: str) -> Array:
        """[P] the scalar's mean over the mini-steps from the second on, in which the policy is newer than the routes."""
        return self.series(lambda r: mean([number(entry, key) for entry in mini_steps_of(r)[1:]]))

    def changed_means(self) -> Array:
        """[kappa, 4] mean shares of (token, layer) pairs with 0, 1, 2, 3 or more changed experts."""
        return np.stack([self.mini_step_means("changed", c) for c in range(4)], axis=1)

    def lift_all(self) -> Array:
        """[P] lift over all mini-steps, the first included."""
        return self.series(lift_all)

    def layers(self, key: str) -> Array:
        """[layers, P] a per-layer value, mean over the mini-steps from the second on; [0, P] if there is none."""
        return self._bin(self.layer_series(key, skip=1), np.nanmean)

    def layer_series(self, key: str, skip: int = 0) -> Array:
        """[layers, rollouts] a per-layer value, mean over the mini-steps after the first `skip`; every rollout by itself."""
        per_record = [[layer_values(entry, "per_layer", key) for entry in mini_steps_of(r)[skip:]] for r in self.records]
        num_layers = max((len(values) for entries in per_record for values in entries), default=0)
        return np.stack([mean(_padded(entries, num_layers), axis=0) for entries in per_record], axis=1)

    def layer_columns(self, *keys: str) -> Array:
        """[layers, P] a list of the record itself; [0, P] if there is none."""
        lists = [layer_values(r, *keys) for r in self.records]
        return self._bin(_padded(lists, max(map(len, lists), default=0)).T, np.nanmean)

    def keys_of(self, group: str) -> list[str]:
        """Names under `group` that carry a non-zero number in some record, in order of appearance."""
        names: dict[str, None] = {}
        for record in self.records:
            entries = record.get(group)
            if isinstance(entries, Mapping):
                names |= {str(k): None for k in entries if abs(number(entries, k)) > 0}
        return list(names)

    def _per_mini_step(self, *keys: str | int) -> Array:
        return _padded([[number(entry, *keys) for entry in mini_steps_of(r)] for r in self.records], self.kappa).T

    def _bin(self, values: Array, reduce: Callable[..., Any]) -> Array:
        """Joins `bin_size` neighbours along the last axis; the last bin may be shorter."""
        if self.bin_size == 1:
            return values
        padding = -values.shape[-1] % self.bin_size
        padded = np.concatenate([values, np.full((*values.shape[:-1], padding), np.nan)], axis=-1)
        return _quietly(reduce, padded.reshape(*values.shape[:-1], padded.shape[-1] // self.bin_size, self.bin_size), -1)


def running_mean(values: Array, window: int) -> Array:
    """Mean of the last `window` values that exist, at every position."""
    known = np.isfinite(values)
    sums = np.cumsum(np.where(known, values, 0.0))
    counts = np.cumsum(known)
    sums[window:] = sums[window:] - sums[:-window]
    counts[window:] = counts[window:] - counts[:-window]
    return np.divide(sums, counts, out=np.full(values.shape, np.nan), where=counts > 0)


def exists(*arrays: npt.ArrayLike) -> bool:
    """Whether any value is a finite number."""
    return any(np.isfinite(np.asarray(a, dtype=np.float64)).any() for a in arrays)


def _padded(lists: Sequence[list[float]], length: int) -> Array:
    """[at least 1, length], NaN where a list is shorter."""
    out = np.full((max(1, len(lists)), length), np.nan)
    for row, values in enumerate(lists):
        out[row, : len(values)] = values
    return out


def _quietly(reduce: Callable[..., Any], values: Array, axis: int | None) -> Any:
    """A NaN-aware reduction; an all-NaN slice is an answer here, not something to warn about."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return reduce(values, axis=axis)
