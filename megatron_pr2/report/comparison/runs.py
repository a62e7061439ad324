"""Runs to compare, sorted by what differs between them: settings (same task, same budget), methods within one, seeds within these.

What `preset` and `pr2.*` say is the method; every other setting that decides results is the setting; `seed` makes replicates.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from omegaconf import DictConfig, OmegaConf

from megatron_pr2.config import PRESETS, PR2Config
from megatron_pr2.errors import DataError
from megatron_pr2.report.metrics_log import FILE_NAME, Record, read_records
from megatron_pr2.report.records import RunData

BASELINE = "r3"

# Where a run is kept, how far it goes and on how many processes: not what it computes.
_INCIDENTAL = (
    "run", "seed", "steps", "checkpoint_every", "model.cache", "parallel.", "preset", "pr2.", "rollout.restarts",
    "rollout.handshake", "rollout.urls", "rollout.engines", "rollout.router",
)  # fmt: skip
# What has no effect where the predictor's name lacks the word, or without hold-back.
_OF_PREDICTOR = {
    "learned": ("target", "alpha", "betas", "eps"),
    "momentum": ("momentum", "horizon"),
    "lookahead": ("reach", "horizon"),
}
_OF_HOLD_BACK = ("held_out_share", "hold_back_decay", "hold_back_confidence")
_MINI_STEPS, _LR = "algorithm.mini_steps", "optimizer.lr"
_GROUP = "group"


@dataclass(frozen=True)
class Run:
    """A run directory.

    Attributes:
        config: dotted setting -> value, what config.yaml says.
        method: settings of `preset` and PR2Config, defaults included.
        given: the method's name, where the caller gave one.
    """

    path: Path
    seed: int
    config: Mapping[str, Any]
    method: Mapping[str, Any]
    records: Sequence[Record]
    given: str | None = None

    @property
    def name(self) -> str:
        return self.path.resolve().name


@dataclass
class Setting:
    """Runs that differ in method and seed only.

    Attributes:
        label: "off-4, lr 1e-4" and what else differs from other settings.
        methods: name -> seed -> run, in the order in which methods were given.
        slug: the label for file names and anchors.
        baseline: the method that the others are compared with: replay without prediction, or else the first.
        lengths: (shortest, longest) run.
        data: (method, seed) -> the rollouts that every run here has; all numbers are of these.
    """

    label: str
    mini_steps: int
    lr: float
    methods: dict[str, dict[int, Run]]
    slug: str = field(init=False)

    def __post_init__(self) -> None:
        self.slug = re.sub(r"[^\w.]+", "-", self.label)
        lengths = [len(run.records) for _, _, run in self.runs()]
        self.lengths = min(lengths), max(lengths)
        self.data = {(name, seed): RunData(run.records[: self.lengths[0]], limit=200) for name, seed, run in self.runs()}
        r3 = (name for name, seeds in self.methods.items() if all(run.method["preset"] == BASELINE for run in seeds.values()))
        self.baseline = next(r3, next(iter(self.methods)))

    def runs(self) -> Iterator[tuple[str, int, Run]]:
        """(method, seed, run) of all."""
        return ((name, seed, run) for name, replicates in self.methods.items() for seed, run in replicates.items())

    def predicts(self, method: str) -> bool:
        """Whether the method has a predictor: without one a lift is no verdict on anything."""
        return any(run.method.get("predictor", "none") != "none" for run in self.methods[method].values())


def load(paths: Iterable[str | Path], groups: Mapping[Path, tuple[str, str]] | None = None) -> list[Setting]:
    """Reads the runs and sorts them.

    Args:
        paths: run directories; the same one twice counts once.
        groups: (name of the method, word for the setting) of some or all of them. Runs of different words are different settings,
            "" is none. By default names are derived from the settings that differ.

    Raises:
        DataError: no run, or one of them holds no records or a configuration that cannot be read.
    """
    names = {path.resolve(): name for path, name in (groups or {}).items()}
    runs = [_read(path, *names.get(path, (None, ""))) for path in dict.fromkeys(Path(path).resolve() for path in paths)]
    if not runs:
        raise DataError("no run to compare; expected at least one run directory")
    methods = _method_names(runs)
    decisive = [{key: short(value) for key, value in run.config.items() if not key.startswith(_INCIDENTAL)} for run in runs]
    table = pd.DataFrame(decisive, dtype=object).fillna("").sort_index(axis=1)
    differing = [key for key in table if table[key].nunique() > 1 and key not in (_MINI_STEPS, _LR)]
    order = {name: place for place, name in enumerate(dict.fromkeys(methods))}
    out = []
    for _, members in table.groupby(list(table), sort=False):
        ordered = sorted(members.index, key=lambda i: (order[methods[i]], runs[i].seed))
        config = runs[ordered[0]].config
        values = members.iloc[0]
        others = [values[key] if key == _GROUP else f"{key.rsplit('.', 1)[-1]} {values[key]}" for key in differing if values[key]]
        mini_steps, lr = int(config[_MINI_STEPS]), float(config[_LR])
        label = ", ".join([f"off-{mini_steps}", f"lr {short(lr)}", *others])
        out.append(Setting(label, mini_steps, lr, _replicates([(methods[i], runs[i]) for i in ordered])))
    out.sort(key=lambda s: (s.mini_steps, s.lr, s.label))
    for place, setting in enumerate(out, start=1):  # slugs are anchors and file names: never twice the same
        setting.slug += f"-{place}" if sum(other.slug == setting.slug for other in out) > 1 else ""
    return out


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings with dotted names; empty mappings say nothing."""
    out: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            out |= flatten(value, f"{prefix}{key}.")
        else:
            out[f"{prefix}{key}"] = value
    return out


def short(value: Any) -> str:
    """A setting's value as one would type it: 1e-4, true, post."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        text = f"{value:g}" if 1e-2 <= abs(value) < 1e6 or value == 0 else f"{value:.6e}"
        mantissa, _, exponent = text.partition("e")
        return text if not exponent else f"{float(mantissa):g}e{int(exponent)}"
    return str(value)


def _read(path: Path, given: str | None, group: str) -> Run:
    records = read_records(path)
    if not records:
        raise DataError(f"{path / FILE_NAME} holds no records yet; a comparison needs one finished rollout step of every run")
    first = records[0]
    config: dict[str, Any] = {
        "preset": str(first.get("preset", "unknown")),
        "seed": int(first.get("seed") or 0),
        _MINI_STEPS: len(first.get("mini_steps") or []),
        _LR: math.nan if first.get("lr") is None else first["lr"],
    }
    file = path / "config.yaml"
    if file.exists():
        try:
            loaded = OmegaConf.load(file)
        except Exception as error:  # YAML, encoding and OmegaConf errors have no common base
            raise DataError(f"{file} cannot be read ({' '.join(str(error).split())})") from error
        if not isinstance(loaded, DictConfig):
            raise DataError(f"{file}: expected a mapping of settings")
        config |= flatten(OmegaConf.to_container(loaded))  # type: ignore[arg-type]
    config |= {_GROUP: group} if group else {}
    return Run(path, int(config["seed"]), config, _method(config), records, given)


def _method(config: Mapping[str, Any]) -> dict[str, Any]:
    """What decides a run's routes, defaults included, without what has no effect."""
    preset = str(config["preset"])
    overrides = {key.removeprefix("pr2."): value for key, value in config.items() if key.startswith("pr2.")}
    settings = {**asdict(PR2Config()), **PRESETS.get(preset, {}), **overrides, "preset": preset}
    idle = {"seed", *(key for part, keys in _OF_PREDICTOR.items() if part not in settings["predictor"] for key in keys)}
    if settings["predictor"] == "none":
        idle.add("hold_back")
    if "hold_back" in idle or not settings["hold_back"]:
        idle |= set(_OF_HOLD_BACK)
    return {key: list(value) if isinstance(value, tuple) else value for key, value in settings.items() if key not in idle}


def _method_names(runs: Sequence[Run]) -> list[str]:
    """The name given to a run, or its preset and the settings by which runs of that preset differ."""
    out = []
    for run in runs:
        preset = run.method["preset"]
        kin = [other.method for other in runs if other.given is None and other.method["preset"] == preset]
        keys = [key for key in run.method if len({short(method[key]) for method in kin if key in method}) > 1]
        # What names a way of predicting needs no key.
        words = [str(run.method[k]) if k in ("predictor", "target") else f"{k}={short(run.method[k])}" for k in keys]
        out.append(run.given or " ".join([preset, *words]))
    return out


def _replicates(runs: Sequence[tuple[str, Run]]) -> dict[str, dict[int, Run]]:
    """Runs by method and seed. The same seed twice is no replicate: such runs stand side by side under their directories' names."""
    twice = {name for (name, _), count in Counter((name, run.seed) for name, run in runs).items() if count > 1}
    out: dict[str, dict[int, Run]] = {}
    for name, run in runs:
        unique = f"{name} [{run.name}]" if name in twice else name
        if run.seed in out.get(unique, {}):
            unique = f"{name} [{run.path}]"
        out.setdefault(unique, {})[run.seed] = run
    return out
