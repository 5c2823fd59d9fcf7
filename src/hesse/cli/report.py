"""``hesse report``: rebuild a run's page from its records."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hesse.cli.exits import clean_exit

__all__ = ["report"]


def report(run: Annotated[Path, typer.Argument(help="The run folder.")]) -> None:
    """Rebuild the report page from a run's records and print its path."""
    with clean_exit():
        from hesse.report import build

        typer.echo(build(run))
