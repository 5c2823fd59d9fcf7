"""``hesse report``: rebuild a run's page and its model card from its records, or the page of a search."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hesse.cli.exits import clean_exit, print_json

__all__ = ["report"]


def report(
    run: Annotated[Path, typer.Argument(help="The folder of a run, or of a search.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")] = False,
) -> None:
    """Rebuild the report page and the model card from a run's records and print the path of the page.

    Of the folder that hesse tune has written, the page of the search.
    """
    with clean_exit(as_json):
        from hesse.report import build, build_tune
        from hesse.training.card import build_card

        if (run / "tune.json").exists():
            made = {"report": str(build_tune(run))}
        else:
            made = {"report": str(build(run)), "card": str(build_card(run))}
        if as_json:
            print_json({"ok": True, **made})
        else:
            typer.echo(made["report"])
