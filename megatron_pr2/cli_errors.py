"""How a command ends after an error that its user can fix."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer

from megatron_pr2.errors import PR2Error


@contextmanager
def errors() -> Iterator[None]:
    """An error that the user can fix becomes one line and exit code 1."""
    try:
        yield
    except PR2Error as error:
        typer.secho(f"error: {error}", err=True, fg=typer.colors.RED)
        raise typer.Exit(1) from error
