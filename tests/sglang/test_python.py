"""Which interpreter servers run in, and that this package alone comes along with them."""

from __future__ import annotations

import ast
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import megatron_pr2
from megatron_pr2.errors import ConfigError
from megatron_pr2.rollout.sglang import python as sglang_python
from megatron_pr2.rollout.sglang.config import SGLangConfig, server_environment
from megatron_pr2.rollout.sglang.python import VARIABLE, check_module, find_python, package_environment, package_path
from megatron_pr2.rollout.sglang.server import SGLangServer

PACKAGE = Path(megatron_pr2.__file__).parent
# Run by the interpreter of the server environment, or by verl's servers.
IN_THE_SERVER = ("rollout/sglang/cpu/", "rollout/sglang/plugin.py", "rollout/sglang/gateway/launch.py", "integrations/verl_sglang/")


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """An interpreter at each place but here, as `env` makes one; this environment holds no SGLang."""
    found = {}
    for name in ("named", "variable", ".venv-sglang"):
        python = tmp_path / name / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.write_text(f"#!/bin/sh\nexec {sys.executable} \"$@\"\n")
        python.chmod(0o755)
        found[name] = str(python)
    monkeypatch.setattr(sys, "prefix", str(tmp_path / ".venv"))
    monkeypatch.setenv(VARIABLE, found["variable"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    return found


def test_the_first_place_that_has_one(places: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_python(places["named"]) == places["named"]
    assert find_python() == places["variable"]
    monkeypatch.delenv(VARIABLE)
    assert find_python() == places[".venv-sglang"]
    asked: list[str] = []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: asked.append(name) or SimpleNamespace(origin="here"))
    assert find_python() == sys.executable
    assert find_python(module="sglang_router") == sys.executable
    assert asked == ["sglang", "sglang_router"]
    command = SGLangServer(SGLangConfig(model_path="m", python=places["named"])).command(1)
    assert command[:2] == [places["named"], "-m"]


def test_no_place_has_one(places: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE)
    Path(places[".venv-sglang"]).unlink()
    with pytest.raises(ConfigError) as told:
        find_python()
    looked = (f"{VARIABLE} is not set", f"{tmp_path}/.venv has no sglang", f"{places['.venv-sglang']} does not exist")
    for words in (*looked, "`make sglang`", "sglang.python"):
        assert words in str(told.value)
    # Said before a server is started, by whatever starts one.
    (tmp_path / "model.safetensors").touch()
    server = SGLangServer(SGLangConfig(model_path=str(tmp_path)))
    with pytest.raises(ConfigError, match="no environment with sglang was found"):
        server.start()
    assert server.pid is None


def test_a_directory_of_that_name_is_no_package(places: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(sys, "prefix", str(tmp_path / ".venv"))
    (tmp_path / "nobody_has_this").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    assert importlib.util.find_spec("nobody_has_this") is not None
    assert find_python(module="nobody_has_this") == places[".venv-sglang"]
    with pytest.raises(ConfigError, match="is not installed"):
        check_module(sys.executable, "nobody_has_this", "do this")


def test_what_is_named_must_run(places: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"sglang\.python='nowhere/python': no such executable"):
        SGLangConfig(model_path="m", python="nowhere/python")
    monkeypatch.setenv(VARIABLE, "nowhere/python")
    with pytest.raises(ConfigError, match=rf"{VARIABLE}='nowhere/python': no such executable"):
        find_python()


def test_the_package_that_is_wanted_must_be_there(tmp_path: Path) -> None:
    check_module(sys.executable, "json", "never mind")
    with pytest.raises(ConfigError, match=rf"nobody_has_this is not installed in the environment of {sys.executable}; do this"):
        check_module(sys.executable, "nobody_has_this", "do this")
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho 'pyenv: python3.12: command not found' >&2\nexit 127\n")
    broken.chmod(0o755)
    with pytest.raises(ConfigError, match=r"does not run: pyenv: python3\.12: command not found"):
        check_module(str(broken), "json", "never mind")


def test_the_package_comes_along_and_nothing_else_of_this_environment(tmp_path: Path) -> None:
    """As where it is installed among the trainer's packages, of which a server must see none."""
    assert [entry.name for entry in Path(package_path()).iterdir()] == ["megatron_pr2"]
    assert (Path(package_path()) / "megatron_pr2").resolve() == PACKAGE.resolve()
    code = "import megatron_pr2.rollout.sglang.plugin, importlib.util; print(importlib.util.find_spec('torch'))"
    env = package_environment({"PATH": os.environ["PATH"], "PYTHONHOME": str(tmp_path)})
    # -S: a Python without site-packages stands for another environment.
    done = subprocess.run([sys.executable, "-S", "-c", code], env=env, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "None"


def test_a_pythonpath_of_ones_own_does_not_hide_the_package() -> None:
    env = server_environment(SGLangConfig(model_path="m", env={"PYTHONPATH": "/a/place"}))
    assert env["PYTHONPATH"].split(os.pathsep) == [package_path(), "/a/place"]


def test_the_trainer_imports_nothing_of_sglangs() -> None:
    importing = set()
    for file in sorted(PACKAGE.rglob("*.py")):
        name = str(file.relative_to(PACKAGE))
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if any(each.partition(".")[0] in ("sglang", "sglang_router") for each in names):
                importing.add(name)
    assert importing
    assert [name for name in importing if not name.startswith(IN_THE_SERVER)] == []


def test_the_directory_lasts_as_long_as_the_process() -> None:
    code = "from megatron_pr2.rollout.sglang.python import package_path; print(package_path())"
    env = package_environment(os.environ)
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() != package_path()
    assert not Path(done.stdout.strip()).exists()
    assert sglang_python.package_path() is package_path()
