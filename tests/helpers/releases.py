"""What the megatron-core that is tested has."""

from __future__ import annotations

import importlib.util
from pathlib import Path


def _has_training() -> bool:
    found = importlib.util.find_spec("megatron.training")
    core = importlib.util.find_spec("megatron.core")
    return found is not None and Path(found.origin).parents[1] == Path(core.origin).parents[1]  # type: ignore[arg-type, union-attr]


# Whether it comes with megatron.training (from 0.17.1 on); another release's may lie further back on the path.
HAS_TRAINING = _has_training()
