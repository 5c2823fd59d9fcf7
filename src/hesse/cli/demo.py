"""``hesse demo``: the main job on the built-in data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hesse.cli.exits import clean_exit

__all__ = ["demo"]

NOTE = (
    "This is the built-in data: written, spelled and spoken digits, made at run time and degraded. "
    "The three share only their class; they are no recordings of one event."
)
SECONDS = 18.0  # for each of the two optimisers: with data, checks and evaluation under a minute on two cores


def demo(
    out: Annotated[Path, typer.Option(help="The run folder; a run in it is replaced.")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(help="Of the data and the training.")] = 0,
) -> None:
    """Make the built-in data, train on it with K-FAC, and AdamW beside it for the same wall time."""
    with clean_exit():
        import hesse.demo
        from hesse.training import train

        typer.echo("making written, spelled and spoken digits ...", err=True)
        table = hesse.demo.write(out.parent / f"{out.name}-data", seed=seed)
        run = train(
            table,
            "digit",
            out=out,
            seconds=SECONDS,
            compare=["adamw"],
            overwrite=True,
            seed=seed,
            notes=[NOTE],
        )
        typer.echo((run.folder / "report.html").resolve())
