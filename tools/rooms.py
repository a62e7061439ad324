"""Draws docs/rooms.svg: the rooms of megatron_pr2 on their floors, what each is for, and who imports whom.

    python tools/rooms.py            writes the picture
    python tools/rooms.py --check    fails if the one that is there is not of today's imports

Floors come from the import-linter contract in pyproject.toml, imports from the code, words from each room's docstring.
"""

from __future__ import annotations

import argparse
import ast
import sys
import tomllib
from html import escape
from pathlib import Path

import grimp

ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / "docs/rooms.svg"
PACKAGE = "megatron_pr2"
# Not drawn: everybody imports it, which says nothing.
EVERYWHERE = "errors"
WIDTH, HEIGHT, GAP, MARGIN = 1160, 62, 8, 16


def floors() -> list[list[str]]:
    """Rooms by floor, the highest first."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    return [[name.strip() for name in layer.split("|")] for layer in layers]


def purpose(room: str) -> str:
    """First sentence of a room's docstring."""
    path = ROOT / PACKAGE / room
    source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    text = ast.get_docstring(ast.parse(source.read_text(encoding="utf-8"))) or ""
    return " ".join(text.partition("\n\n")[0].split())


def imports(rooms: list[str]) -> set[tuple[str, str]]:
    """(importer, imported), of whole rooms; what is imported for types alone does not count."""
    sys.path.insert(0, str(ROOT))
    graph = grimp.build_graph(PACKAGE, exclude_type_checking_imports=True, cache_dir=None)
    found = set()
    for room in rooms:
        name = f"{PACKAGE}.{room}"
        for module in {name, *graph.find_descendants(name)}:
            found |= {(room, other.split(".")[1]) for other in graph.find_modules_directly_imported_by(module) if "." in other}
    return {(one, other) for one, other in found if one != other and other in rooms and other != EVERYWHERE}


def _fitting(words: str, width: float) -> str:
    room_for = int((width - 20) / 5.6)
    return escape(words if len(words) <= room_for else words[: room_for - 1].rsplit(" ", 1)[0] + " …")


def picture() -> str:
    """The SVG."""
    rows = floors()
    boxes: dict[str, tuple[float, float, float]] = {}
    for number, row in enumerate(rows):
        width = (WIDTH - 2 * MARGIN - GAP * (len(row) - 1)) / len(row)
        for column, room in enumerate(row):
            boxes[room] = (MARGIN + column * (width + GAP), MARGIN + number * (HEIGHT + GAP), width)
    height = 2 * MARGIN + len(rows) * (HEIGHT + GAP) - GAP
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" font-size="12">',
        "<title>Rooms of megatron_pr2: each imports only what is below it</title>",
        f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>',
    ]
    order = list(boxes)
    found = imports(order)
    uses = {room: [other for other in order if (room, other) in found] for room in order}
    for room, (x, y, width) in boxes.items():
        label = f"{room}/" if (ROOT / PACKAGE / room).is_dir() else f"{room}.py"
        place = f'x="{x:.0f}" y="{y:.0f}" width="{width:.0f}" height="{HEIGHT}" rx="6"'
        parts.append(f'<rect {place} fill="#eef4fa" stroke="#4a6b8a"/>')
        parts.append(f'<text x="{x + 10:.0f}" y="{y + 18:.0f}" font-weight="bold" fill="#12324f">{label}</text>')
        parts.append(f'<text x="{x + 10:.0f}" y="{y + 35:.0f}" font-size="11" fill="#333">{_fitting(purpose(room), width)}</text>')
        if uses[room]:
            words = _fitting(f"imports {', '.join(uses[room])}", width)
            parts.append(f'<text x="{x + 10:.0f}" y="{y + 52:.0f}" font-size="11" fill="#4a6b8a">{words}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the picture is out of date")
    given = parser.parse_args()
    drawn = picture()
    if given.check:
        if PICTURE.read_text(encoding="utf-8") != drawn:
            print(f"{PICTURE.relative_to(ROOT)} is not of today's imports; run python tools/rooms.py")
            return 1
        return 0
    PICTURE.write_text(drawn, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
