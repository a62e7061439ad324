"""Which interpreter SGLang runs in, and how this package gets there: `make sglang` makes VENV-sglang beside the trainer's VENV."""

from __future__ import annotations

import atexit
import functools
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from megatron_pr2.errors import ConfigError

VARIABLE = "MEGATRON_PR2_SGLANG_PYTHON"
_CHECK_S = 60.0


def find_python(named: str | None = None, *, module: str = "sglang") -> str:
    """The interpreter of the server environment that is found first: as named, as in VARIABLE, this one, that of VENV-sglang."""
    for python, setting in ((named, "sglang.python"), (os.environ.get(VARIABLE), VARIABLE)):
        if not python:
            continue
        if shutil.which(python) is None:
            raise ConfigError(f"{setting}={python!r}: no such executable; name the interpreter, e.g. .venv-sglang/bin/python")
        return python
    # A directory of that name beside the user would be found too, as a package without an origin.
    if getattr(importlib.util.find_spec(module), "origin", None) is not None:
        return sys.executable
    beside = f"{sys.prefix}-sglang/bin/python"
    if shutil.which(beside) is not None:
        return beside
    raise ConfigError(
        f"no environment with {module} was found: {VARIABLE} is not set, {sys.prefix} has no {module}, and {beside} "
        "does not exist; make that environment with `make sglang`, or name the interpreter of another one, "
        "rollout.sglang.python=PATH/bin/python"
    )


def check_module(python: str, module: str, install: str) -> None:
    """Raises ConfigError, which says how to `install` it, for an interpreter that does not run or lacks a package."""
    code = f"import importlib.util as u, sys; sys.exit(3 * (getattr(u.find_spec({module!r}), 'origin', None) is None))"
    try:
        done = subprocess.run(
            [python, "-c", code], env=package_environment(os.environ), capture_output=True, text=True, timeout=_CHECK_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(f"{python} does not run: {error}") from error
    if done.returncode == 3:
        raise ConfigError(f"{module} is not installed in the environment of {python}; {install}")
    if done.returncode:
        raise ConfigError(f"{python} does not run: {(done.stderr.strip() or f'exit code {done.returncode}').splitlines()[-1]}")


def package_environment(env: Mapping[str, str]) -> dict[str, str]:
    """`env` for a Python of another environment, which finds this package and nothing else of this environment's."""
    changed = {name: value for name, value in env.items() if name not in ("PYTHONHOME", "VIRTUAL_ENV")}
    changed["PYTHONPATH"] = os.pathsep.join(filter(None, (package_path(), env.get("PYTHONPATH"))))
    return changed


@functools.cache
def package_path() -> str:
    """A directory that holds this package alone; it lives as long as this process.

    The package itself may lie in this environment's site-packages, of which another interpreter must see nothing.
    """
    folder = tempfile.mkdtemp(prefix="megatron_pr2_path_")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    package = Path(__file__).resolve().parents[2]
    (Path(folder) / package.name).symlink_to(package, target_is_directory=True)
    return folder
