"""How a command ends on what its user can mend."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer

from megatron_pr2.errors import PR2Error


@contextmanager
def errors() -> Iterator[None]:
    """What the user can mend becomes one line and exit code 1."""
    try:
        yield
    except PR2Error as error:
        typer.secho(f"error: {error}", err=True, fg=typer.colors.RED)
        raise typer.Exit(1) from error
