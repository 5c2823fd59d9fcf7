"""``hesse report``: rebuild a run's page and its model card from its records."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hesse.cli.exits import clean_exit, print_json

__all__ = ["report"]


def report(
    run: Annotated[Path, typer.Argument(help="The run folder.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")] = False,
) -> None:
    """Rebuild the report page and the model card from a run's records and print the path of the page."""
    with clean_exit(as_json):
        from hesse.report import build
        from hesse.training.card import build_card

        page = build(run)
        card = build_card(run)
        if as_json:
            print_json({"ok": True, "report": str(page), "card": str(card)})
        else:
            typer.echo(page)
