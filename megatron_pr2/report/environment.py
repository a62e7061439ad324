"""The model, hardware and versions of a run in words, from the environment.json that a trainer writes when it starts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FILE_NAME = "environment.json"


def read_environment(run_dir: Path) -> Mapping[str, Any]:
    """Empty where the run has none, or none that can be read: a page can do without it."""
    try:
        found = json.loads((run_dir / FILE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) and all(isinstance(part, dict) for part in found.values()) else {}


def in_words(environment: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(heading, text) of what is known."""
    model, hardware, versions = (environment.get(name, {}) for name in ("model", "hardware", "versions"))
    shape = "{type}, {layers} layers ({moe_layers} with experts), hidden {hidden}, top-{topk} of {experts} experts, {dtype}"
    found = {
        "Model": shape.format_map(_Known(model)) if model else "",
        "Hardware": "{processes} processes, {device}, {cores} cores".format_map(_Known(hardware)) if hardware else "",
        "Versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }
    return [(heading, text) for heading, text in found.items() if text]


class _Known(dict[str, Any]):
    def __missing__(self, key: str) -> str:
        return "?"
