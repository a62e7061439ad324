"""Writes requirements/pyproject.toml: every package of every environment, pinned, as one dependency group each.

    python tools/lock.py             keeps the pins that still fit, adds what is new
    python tools/lock.py --upgrade   takes the newest that fits

What is wanted stands in pyproject.toml; uv resolves it for all Python versions at once, and markers say where they differ.
Dependency groups (PEP 735) rather than uv's own lock format: environments differ in what they pin, and this file names no index.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "requirements" / "pyproject.toml"
# Group of the lock: what of pyproject.toml it holds, with the project's own dependencies or without.
ENVIRONMENTS = {
    "trainer": (True, []),
    "test": (True, ["test"]),
    "verl": (True, ["verl"]),
    "sglang": (False, ["sglang"]),
    "sglang-0519": (False, ["sglang-0519"]),
}
HEADER = '''# Written by tools/lock.py (make lock) from pyproject.toml: every package of the Makefile's environments, pinned, since
# numbers and plugin hooks depend on them. Installed with `uv pip install --no-deps --group requirements/pyproject.toml:GROUP`.
[dependency-groups]
'''


def resolve(uv: str, own: bool, groups: list[str], preferred: list[str], upgrade: bool) -> list[str]:
    """Pins of one environment for Linux, `name==version` with a marker where Python versions differ."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "pins.txt"
        output.write_text("\n".join(preferred) + "\n", encoding="utf-8")
        command = [uv, "pip", "compile", "--quiet", "--universal", "--python-version", "3.11", "--no-annotate", "--no-header"]
        command += ["--no-emit-index-url", "--output-file", str(output), *(["--upgrade"] if upgrade else [])]
        command += [part for group in groups for part in ("--group", group)]
        command += ["pyproject.toml"] if own else []
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{' '.join(command)} failed:\n{done.stderr}")
        lines = output.read_text(encoding="utf-8").splitlines()
    elsewhere = ("sys_platform == 'win32'", "sys_platform == 'emscripten'", "sys_platform == 'darwin'")
    return [line for line in lines if line and not any(line.endswith(marker) for marker in elsewhere)]


def all_pins(lock: dict[str, list], name: str) -> list[str]:
    """Pins of a group of the present lock, with those of the groups that it includes."""
    pins = []
    for entry in lock.get(name, []):
        pins += [entry] if isinstance(entry, str) else all_pins(lock, entry["include-group"])
    return pins


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--upgrade", action="store_true", help="take the newest versions that fit, not those of the present lock")
    parser.add_argument("--uv", default=shutil.which("uv") or str(ROOT / ".uv" / "bin" / "uv"), help="the uv to resolve with")
    options = parser.parse_args()
    present = tomllib.loads(LOCK.read_text(encoding="utf-8"))["dependency-groups"] if LOCK.exists() else {}
    text = HEADER
    resolved: dict[str, list[str]] = {}
    for name, (own, groups) in ENVIRONMENTS.items():
        preferred = all_pins(present, name)
        pins = resolve(options.uv, own, groups, preferred, options.upgrade)
        resolved[name] = pins
        inside = [other for other, its in resolved.items() if other != name and set(its) < set(pins)]
        entries = [f'{{ include-group = "{other}" }}' for other in inside]
        entries += [f'"{pin}"' for pin in pins if not any(pin in resolved[other] for other in inside)]
        text += f"{name} = [\n" + "".join(f"    {entry},\n" for entry in entries) + "]\n\n"
        print(f"{name}: {len(pins)} packages", file=sys.stderr)
    LOCK.write_text(text.rstrip("\n") + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
