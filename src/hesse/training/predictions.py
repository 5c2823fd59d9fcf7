"""Predictions as a file: CSV, JSON lines or Parquet by the ending, whole or not at all."""

from __future__ import annotations

import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from hesse.files import atomic_path, write_lines
from hesse.finding import InputError

__all__ = ["write_predictions"]


def write_predictions(predictions: pa.Table, path: Path | None) -> None:
    """Write a table to ``path``, or as CSV to stdout.

    Raises:
        InputError: the ending is not .csv, .jsonl, .ndjson or .parquet.
    """
    if path is None:
        pyarrow.csv.write_csv(predictions, sys.stdout.buffer)
        return
    ending = path.suffix.lower()
    if ending not in (".csv", ".jsonl", ".ndjson", ".parquet"):
        raise InputError(
            "unknown format",
            str(path),
            f"Predictions cannot be written as {ending!r}.",
            "Use .csv, .jsonl or .parquet.",
        )
    if ending in (".jsonl", ".ndjson"):
        write_lines(path, predictions.to_pylist())
        return
    with atomic_path(path) as temporary:
        if ending == ".csv":
            pyarrow.csv.write_csv(predictions, temporary)
        else:
            pyarrow.parquet.write_table(predictions, temporary)
