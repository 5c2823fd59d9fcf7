"""The commands by name."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from hesse import __version__
from hesse.cli.check import check
from hesse.cli.demo import demo
from hesse.cli.doctor import doctor
from hesse.cli.exits import print_json
from hesse.cli.export import export
from hesse.cli.minimize import minimize
from hesse.cli.predict import predict
from hesse.cli.report import report
from hesse.cli.spectrum import spectrum
from hesse.cli.train import train
from hesse.cli.tune import tune
from hesse.finding import Finding

__all__ = ["app", "run"]

USAGE = Finding(
    "usage", "command line", "The command cannot be understood; stderr says why.", "See hesse COMMAND --help.", "error"
)

app = typer.Typer(
    name="hesse",
    help="Second-order training for PyTorch: a model from a table of images, sounds, texts and columns.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (train, tune, predict, export, report, spectrum, minimize, check, doctor, demo):
    app.command()(command)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"hesse {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def run() -> None:
    """Run the command of ``sys.argv``, which also gets its line of JSON when it could not be understood."""
    try:
        app()
    except SystemExit as end:
        if end.code == 2 and "--json" in sys.argv[1:]:
            print_json({"ok": False, "error": USAGE.to_dict()})
        raise
