"""The wheel holds everything and runs from an empty directory, without this checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

pytest.importorskip("build")
ROOT = Path(__file__).resolve().parent.parent


def run(*command: str | Path, cwd: Path, path: Path | None = None) -> str:
    """Output of a command in `cwd`, with `path` alone on PYTHONPATH."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **({"PYTHONPATH": str(path)} if path else {})}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of the files that git knows: a build folder of the checkout is no part of it."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        (source / name).write_bytes((ROOT / name).read_bytes())
    for file in package_files():
        (source / file).parent.mkdir(parents=True, exist_ok=True)
        (source / file).write_bytes((ROOT / file).read_bytes())
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, cwd=source)
    (built,) = out.glob("*.whl")
    return built


def package_files() -> list[Path]:
    """Everything under megatron_pr2, relative to the checkout."""
    found = (path.relative_to(ROOT) for path in (ROOT / "megatron_pr2").rglob("*") if path.is_file())
    return [path for path in found if "__pycache__" not in path.parts]


def test_the_wheel_holds_the_package(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if name.startswith("megatron_pr2/")}
    assert held == {path.as_posix() for path in package_files()}
    assert "megatron_pr2/py.typed" in held
    assert any(name.endswith(".html.j2") for name in held)


def test_it_runs_from_an_empty_directory(wheel: Path, tmp_path: Path) -> None:
    installed, empty = tmp_path / "installed", tmp_path / "empty"
    empty.mkdir()
    # What `pip install --no-deps --target` does with a wheel of pure Python; environments of uv have no pip.
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)
    found = run(sys.executable, "-c", "import megatron_pr2; print(megatron_pr2.__file__)", cwd=empty, path=installed)
    assert Path(found.strip()).is_relative_to(installed)
    scripts = (installed / next(installed.glob("*.dist-info")) / "entry_points.txt").read_text(encoding="utf-8")
    assert "megatron-pr2 = megatron_pr2.cli:app" in scripts
    assert "train" in run(sys.executable, "-m", "megatron_pr2.cli", "--help", cwd=empty, path=installed)
    example = (ROOT / "examples/attach_minimal.py").read_text(encoding="utf-8")
    assert run(sys.executable, "-c", example, cwd=empty, path=installed).count("rollout batch") == 3
