"""The commands by name, and what their exit codes mean: 0 fine, 1 refused or failed, 2 usage, 130 interrupted."""

from __future__ import annotations

from typing import Annotated

import typer

from hesse import __version__
from hesse.cli.demo import demo
from hesse.cli.predict import predict
from hesse.cli.report import report
from hesse.cli.train import train

__all__ = ["app"]

app = typer.Typer(
    name="hesse",
    help="Second-order training for PyTorch: a model from a table of images, sounds, texts and columns.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (train, predict, report, demo):
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
