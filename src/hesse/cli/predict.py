"""``hesse predict``: a run and a new table in, predictions out."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Annotated

import typer

from hesse.cli import options
from hesse.cli.exits import clean_exit, print_json

__all__ = ["predict"]

MOST_NAMED = 20  # rows that failed, on stderr


def predict(
    run: Annotated[Path, typer.Argument(help="The run folder.")],
    table: Annotated[Path, typer.Argument(help="CSV, TSV, JSON lines or Parquet: a file or a folder.")],
    out: Annotated[
        Path | None, typer.Option(help="CSV, JSON lines (.jsonl) or Parquet file.", show_default="CSV on stdout")
    ] = None,
    data_root: options.DataRoot = None,
    delimiter: options.Delimiter = None,
    threshold: Annotated[
        str | None,
        typer.Option(help="Probability from which on the second of two classes, or a label, is predicted; or best."),
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Stop at the first row that cannot be read, instead of naming it.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a summary as JSON on stdout.")] = False,
) -> None:
    """Predict the target for each row of a table with a trained run, of any size, in the order of its rows."""
    if as_json and out is None:
        raise typer.BadParameter("--json prints a summary on stdout, so the predictions need --out.")
    cut = None if threshold is None else _threshold(threshold)
    with clean_exit(as_json):
        from hesse.training import Run
        from hesse.training.answers import separators
        from hesse.training.predictions import refuse_path, written
        from hesse.training.screen import Screen

        if out is not None:
            refuse_path(out, table)
        screen = Screen()
        trained = Run(run)
        with screen.decoding("predicting") as progress:
            forecast = trained.forecast(
                table, data_root=data_root, delimiter=delimiter, strict=strict, threshold=cut, progress=progress
            )
            with written(out, separators(trained.schema)) as write:
                for predictions in forecast:
                    write(predictions)
        screen.findings([*islice(forecast.failures, MOST_NAMED), *forecast.findings])
        if out is not None:
            typer.echo(f"{forecast.rows - forecast.failed} predictions in {out}", err=True)
        if forecast.failed:
            first = f", the first {MOST_NAMED} of which are named above" if forecast.failed > MOST_NAMED else ""
            typer.echo(f"{forecast.failed} rows cannot be read{first}; their predictions are empty.", err=True)
        if as_json:
            print_json(
                {
                    "ok": True,
                    "out": str(out),
                    "rows": forecast.rows,
                    "empty": forecast.failed,
                    "failures": [finding.to_dict() for finding in forecast.failures],
                    "findings": [finding.to_dict() for finding in forecast.findings],
                }
            )


def _threshold(text: str) -> float | str:
    try:
        return text if text == "best" else float(text)
    except ValueError:
        raise typer.BadParameter(f"--threshold takes a probability, or best; got {text!r}.") from None
