"""The command line: one file a command; what a command needs is imported inside it, so that help is instant."""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> None:
    """Entry point of the ``hesse`` command."""
    try:
        from hesse.cli.app import app
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        sys.exit(f"The hesse command needs {error.name}. Install it with: pip install 'hesse[train]'")
    app()
