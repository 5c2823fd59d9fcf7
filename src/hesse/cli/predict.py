"""``hesse predict``: a run and a new table in, predictions out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hesse.cli.exits import clean_exit, print_json

__all__ = ["predict"]


def predict(
    run: Annotated[Path, typer.Argument(help="The run folder.")],
    table: Annotated[Path, typer.Argument(help="CSV, TSV, JSON lines or Parquet.")],
    out: Annotated[
        Path | None, typer.Option(help="CSV, JSON lines (.jsonl) or Parquet file.  [default: CSV on stdout]")
    ] = None,
    data_root: Annotated[
        Path | None, typer.Option(help="Folder that paths in cells are in.  [default: the table's]")
    ] = None,
    delimiter: Annotated[str | None, typer.Option(help="Of a CSV file, when it cannot be told.")] = None,
    skip_bad_rows: Annotated[
        bool, typer.Option("--skip-bad-rows", help="Leave the prediction of unreadable rows empty.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a summary as JSON on stdout.")] = False,
) -> None:
    """Predict the target for each row of a table with a trained run."""
    if as_json and out is None:
        raise typer.BadParameter("--json prints a summary on stdout, so the predictions need --out.")
    with clean_exit(as_json):
        from hesse.training import Run
        from hesse.training.predictions import refuse_path, write_predictions
        from hesse.training.screen import Screen

        if out is not None:
            refuse_path(out, table)
        with Screen().decoding("reading files") as progress:
            predictions = Run(run).predict(
                table, data_root=data_root, delimiter=delimiter, skip_bad_rows=skip_bad_rows, progress=progress
            )
        write_predictions(predictions, out)
        empty = predictions.column(0).null_count
        if out is not None:
            typer.echo(f"{len(predictions) - empty} predictions in {out}", err=True)
        if empty:
            typer.echo(f"{empty} rows could not be read; their predictions are empty.", err=True)
        if as_json:
            print_json({"ok": True, "out": str(out), "rows": len(predictions), "empty": empty})
