"""``hesse export``: a run in, one file out that other programs compute."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from hesse.cli.exits import clean_exit, print_json

__all__ = ["export"]


class Format(StrEnum):
    """What the file is."""

    onnx = "onnx"


def export(
    run: Annotated[Path, typer.Argument(help="The run folder.")],
    format: Annotated[Format, typer.Option(help="Of the file.")] = Format.onnx,
    out: Annotated[Path | None, typer.Option(help="The file.", show_default="model.onnx in the run folder")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")] = False,
) -> None:
    """Write a run's model, all that comes before and after the network inside, and check it against PyTorch."""
    with clean_exit(as_json):
        from hesse.training import Run
        from hesse.training.export import export as write

        path = write(Run(run), out)
        if as_json:
            print_json({"ok": True, "out": str(path), "format": format.value, "bytes": path.stat().st_size})
        else:
            typer.echo(path)
