"""A list of attribute replacements that can be applied and undone exactly."""

from __future__ import annotations

from typing import Any

_ABSENT = object()


class PatchSet:
    """Replaces attributes of modules and classes and remembers what was there.

    Only the object's own ``__dict__`` counts: an attribute that was inherited is deleted again on :meth:`undo`, not copied.
    """

    def __init__(self) -> None:
        self._saved: list[tuple[Any, str, Any]] = []

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Sets ``owner.name``; the name need not exist before."""
        self._saved.append((owner, name, vars(owner).get(name, _ABSENT)))
        setattr(owner, name, value)

    def undo(self) -> None:
        """Restores everything in reverse order; safe to call twice."""
        while self._saved:
            owner, name, value = self._saved.pop()
            if value is _ABSENT:
                delattr(owner, name)
            else:
                setattr(owner, name, value)
