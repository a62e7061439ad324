"""The cells of a comparison: methods x mini-steps x learning rates x seeds, read from a YAML file (examples/compare.yaml)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megatron_pr2.errors import ConfigError
from megatron_pr2.report.comparison.runs import flatten, short
from megatron_pr2.report.metrics_log import FILE_NAME
from megatron_pr2.rl.config import TrainConfig, load_config

# Every method that can be compared: its name on the page -> what makes it. "+hold" adds hold-back to a predicting method; "@actor"
# lets the actor record the routes, each sequence's predicted for its own mini-step, which an engine with one gate cannot.
METHODS: dict[str, tuple[str, ...]] = {
    "grpo": ("preset=grpo",),
    "gspo": ("preset=grpo", "algorithm.loss=gspo"),
    "r2": ("preset=r2",),
    "r3": ("preset=r3",),
    "pr2-post": ("preset=pr2", "pr2.predictor=learned", "pr2.target=post", "pr2.hold_back=false"),
    "pr2-delta": ("preset=pr2", "pr2.predictor=learned", "pr2.target=delta", "pr2.hold_back=false"),
    "momentum": ("preset=pr2", "pr2.predictor=momentum", "pr2.hold_back=false"),
    "learned+momentum": ("preset=pr2", "pr2.predictor=learned+momentum", "pr2.hold_back=false"),
    "momentum@actor": ("preset=pr2", "pr2.predictor=momentum", "pr2.routes=actor", "pr2.hold_back=false"),
    "lookahead": ("preset=pr2-lookahead", "rollout.groups=1"),
    "lookahead@groups": ("preset=pr2-lookahead", "rollout.groups=0"),
    "lookahead@actor": ("preset=pr2-lookahead", "pr2.routes=actor"),
    "pr2-post+hold": ("preset=pr2", "pr2.predictor=learned", "pr2.target=post", "pr2.hold_back=true"),
    "pr2-delta+hold": ("preset=pr2", "pr2.predictor=learned", "pr2.target=delta", "pr2.hold_back=true"),
    "momentum+hold": ("preset=pr2", "pr2.predictor=momentum", "pr2.hold_back=true"),
    "learned+momentum+hold": ("preset=pr2", "pr2.predictor=learned+momentum", "pr2.hold_back=true"),
    "momentum@actor+hold": ("preset=pr2", "pr2.predictor=momentum", "pr2.routes=actor", "pr2.hold_back=true"),
}
# Of a grid's and a group's values: a list names the kinds of its items.
_KINDS: dict[str, Any] = {
    "steps": int, "methods": [str], "overrides": [str], "mini_steps": [int], "seeds": [int], "lr": [float, int], "name": str,
}  # fmt: skip
# What a run may be continued with although it was started with other values.
_MAY_CHANGE = ("run", "steps", "checkpoint_every")


@dataclass
class Group:
    """Cells that vary along the same axes.

    Attributes:
        name: makes the group's cells a setting of their own, which needs an r3 to be compared with; required where two groups have
            the same cell under different overrides.
        overrides: KEY=VALUE for the cells of this group.
    """

    methods: list[str]
    mini_steps: list[int]
    lr: list[float]
    seeds: list[int] = dataclasses.field(default_factory=list)
    name: str = ""
    overrides: list[str] = dataclasses.field(default_factory=list)


@dataclass
class Grid:
    """A section of the file.

    Attributes:
        config: YAML file of settings that every cell starts from, beside the grid's file.
        steps: rollout batches of every cell.
        seeds: of the groups that name none.
        overrides: KEY=VALUE for every cell.
    """

    config: Path
    steps: int
    seeds: list[int]
    groups: list[Group]
    overrides: list[str] = dataclasses.field(default_factory=list)


@dataclass(frozen=True)
class Cell:
    """One training run.

    Attributes:
        method, group: as the page calls them.
        settings: KEY=VALUE that the run is started with besides the grid's configuration file.
    """

    name: str
    method: str
    group: str
    seed: int
    directory: Path
    settings: tuple[str, ...]
    config: TrainConfig

    @property
    def steps_done(self) -> int:
        file = self.directory / FILE_NAME
        return file.read_bytes().count(b"\n") if file.exists() else 0

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do: `megatron-pr2 train` would move such a run aside and start over."""
        return (self.directory / "final").exists() and self.steps_done >= self.config.steps


def read_grid(path: Path, section: str) -> Grid:
    """The section of a grid's file.

    Raises:
        ConfigError: unreadable file, no such section, unknown or missing keys, values of a wrong kind.
    """
    try:
        loaded = OmegaConf.to_container(OmegaConf.load(path))
    except FileNotFoundError as error:
        raise ConfigError(f"grid {path} does not exist") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"grid {path} cannot be read ({' '.join(str(error).split())})") from error
    if not isinstance(loaded, dict) or not isinstance(loaded.get(section), dict):
        raise ConfigError(f"grid {path}: no section {section!r}; expected a mapping of grids")
    where = f"{path}: {section}"
    grid: Grid = _build(Grid, loaded[section], where)
    if not isinstance(grid.groups, list) or not grid.groups:
        raise ConfigError(f"{where}.groups: expected a list of groups")
    grid.groups = [_build(Group, group, f"{where}.groups[{i}]") for i, group in enumerate(grid.groups)]
    grid.config = path.parent / grid.config
    for group in grid.groups:
        group.seeds = group.seeds or grid.seeds
    return grid


def _build(kind: Any, values: Any, where: str) -> Any:
    """A Grid or Group from a mapping; the type of each value is checked by that of its field."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where}: expected a mapping, not {values!r}")
    fields = {field.name: field for field in dataclasses.fields(kind)}
    if unknown := sorted(set(map(str, values)) - set(fields)):
        raise ConfigError(f"{where}: unknown key(s) {', '.join(unknown)}; known: {', '.join(fields)}")
    required = [f.name for f in fields.values() if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING]
    if missing := [name for name in required if name not in values]:
        raise ConfigError(f"{where}: {', '.join(missing)} missing")
    for name, expected in _KINDS.items():
        if name in values and not _is(values[name], expected):
            raise ConfigError(f"{where}.{name}={values[name]!r}: expected {_named(expected)}")
    return kind(**values)


def _is(value: Any, expected: Any) -> bool:
    if isinstance(expected, list):
        return isinstance(value, list) and bool(value) and all(any(_is(item, kind) for kind in expected) for item in value)
    return isinstance(value, expected) and not isinstance(value, bool)


def _named(expected: Any) -> str:
    names = {int: "integers", float: "numbers", str: "texts"}
    return f"a list of {names[expected[0]]}" if isinstance(expected, list) else {int: "an integer", str: "a text"}[expected]


def expand(grid: Grid, out: Path, overrides: Sequence[str] = ()) -> list[Cell]:
    """The cells in the order in which they run: all of a seed before the next, so that whatever is finished can be compared.

    Args:
        out: cells are kept in `out`/cells.
        overrides: KEY=VALUE for every cell, over the grid's and the groups'.

    Raises:
        ConfigError: an unknown method, settings that `megatron-pr2 train` refuses, two cells of one name, or a directory that
            holds a run of other settings.
    """
    cells: dict[str, Cell] = {}
    for group in grid.groups:
        for name in group.methods:
            if name not in METHODS:
                raise ConfigError(f"method {name!r} is unknown; expected some of {', '.join(METHODS)}")
    points = [
        (seed, group, mini_steps, float(lr), method)
        for seed in dict.fromkeys(seed for group in grid.groups for seed in group.seeds)
        for group in grid.groups
        if seed in group.seeds
        for mini_steps in group.mini_steps
        for lr in group.lr
        for method in (name for name in METHODS if name in group.methods)
    ]
    for seed, group, mini_steps, lr, method in points:
        axes = [f"steps={grid.steps}", f"seed={seed}", f"algorithm.mini_steps={mini_steps}", f"optimizer.lr={lr!r}"]
        named = [group.name] if group.name else []
        name = "_".join([method, *named, f"off{mini_steps}", f"lr{short(lr)}", f"seed{seed}"])
        settings = [*grid.overrides, *METHODS[method], *axes, *group.overrides, *overrides, f"run={out / 'cells' / name}"]
        try:
            config = load_config(grid.config, settings)
        except ConfigError as error:
            raise ConfigError(f"cell {name}: {error}") from error
        cell = Cell(name, method, group.name, seed, out / "cells" / name, tuple(settings), config)
        if cells.setdefault(cell.name, cell).settings != cell.settings:
            raise ConfigError(f"two groups have the cell {cell.name} with different overrides; give one of them a name")
    for cell in cells.values():
        _check_directory(cell)
    return list(cells.values())


def _check_directory(cell: Cell) -> None:
    """Refuses to take a run of other settings for this cell."""
    file = cell.directory / "config.yaml"
    if not file.exists() or not cell.steps_done:
        return
    old = flatten(OmegaConf.to_container(OmegaConf.load(file)))  # type: ignore[arg-type]
    new = flatten(OmegaConf.to_container(OmegaConf.structured(cell.config)))  # type: ignore[arg-type]
    changed = [key for key in sorted(old | new) if key not in _MAY_CHANGE and old.get(key) != new.get(key)]
    changed += ["steps"] if cell.steps_done > cell.config.steps else []
    if changed:
        raise ConfigError(
            f"{cell.directory} holds a run with other settings ({', '.join(changed)}); choose another --out, or remove that run"
        )
