"""Releases of Megatron-Core: the only place where their numbers count. Everything else asks for what is there.

Which tests pass on which release is in docs/megatron_releases.md, which tools/megatron_releases.py writes.
"""

from __future__ import annotations

# The newest of each minor version that has the replay hook, ascending.
TRIED = ("0.16.1", "0.17.1", "0.18.2", "0.19.2")


def is_tried(version: str) -> bool:
    """Whether a release belongs to a minor version whose newest release was tried: patches are taken to be patches."""
    return minor(version) in {minor(tried) for tried in TRIED}


def minor(version: str) -> tuple[str, ...]:
    """("0", "19") of "0.19.2"."""
    return tuple(version.split(".")[:2])
