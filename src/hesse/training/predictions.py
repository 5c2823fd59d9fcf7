"""Predictions as a file: CSV, JSON lines or Parquet by the ending, whole or not at all."""

from __future__ import annotations

import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from hesse.files import atomic_path, write_lines
from hesse.finding import InputError

__all__ = ["refuse_path", "write_predictions"]

ENDINGS = (".csv", ".jsonl", ".ndjson", ".parquet")


def refuse_path(path: Path, table: Path) -> None:
    """Raise :class:`InputError` if predictions on ``table`` cannot or should not be written to ``path``."""
    ending = path.suffix.lower()
    if ending not in ENDINGS:
        message = f"Predictions cannot be written as {ending!r}." if ending else "The name has no ending."
        raise InputError("unknown format", str(path), message, "Use .csv, .jsonl or .parquet.", ending)
    if path.is_dir():
        raise InputError("not a file", str(path), "This is a folder.", "Name a file in it.")
    if path.exists() and table.exists() and path.samefile(table):
        message = "The predictions would replace the table that is read."
        raise InputError("same file", str(path), message, "Choose another --out.")


def write_predictions(predictions: pa.Table, path: Path | None) -> None:
    """Write a table to a file with one of the endings that :func:`refuse_path` lets pass, or as CSV to stdout."""
    if path is None:
        pyarrow.csv.write_csv(predictions, sys.stdout.buffer)
        return
    ending = path.suffix.lower()
    if ending in (".jsonl", ".ndjson"):
        write_lines(path, predictions.to_pylist())
        return
    with atomic_path(path) as temporary:
        if ending == ".csv":
            pyarrow.csv.write_csv(predictions, temporary)
        else:
            pyarrow.parquet.write_table(predictions, temporary)
