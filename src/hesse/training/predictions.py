"""Predictions as a file, CSV, JSON lines or Parquet by the ending: written chunk by chunk, and whole or not at all."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from hesse.files import atomic_path
from hesse.finding import InputError
from hesse.training.answers import flat

__all__ = ["refuse_path", "written"]

ENDINGS = (".csv", ".jsonl", ".ndjson", ".parquet")
ROW_GROUP = 1 << 16  # rows


def refuse_path(path: Path, table: Any = None) -> None:
    """Raise :class:`InputError` if predictions on ``table`` cannot or should not be written to ``path``."""
    ending = path.suffix.lower()
    if ending not in ENDINGS:
        message = f"Predictions cannot be written as {ending!r}." if ending else "The name has no ending."
        raise InputError("unknown format", str(path), message, "Use .csv, .jsonl or .parquet.", ending)
    if path.is_dir():
        raise InputError("not a file", str(path), "This is a folder.", "Name a file in it.")
    if not isinstance(table, Path) or not table.exists():
        return
    if path.exists() and path.samefile(table):
        message = "The predictions would replace the table that is read."
        raise InputError("same file", str(path), message, "Choose another --out.")
    if table.is_dir() and table.resolve() in path.resolve().parents:
        message = "The predictions would lie in the folder that is read, and be a part of the table from then on."
        raise InputError("same folder", str(path), message, "Choose another --out.")


class _Sink(Protocol):
    def write(self, table: pa.Table) -> None: ...

    def close(self) -> None: ...


@contextmanager
def written(path: Path | None, separators: Mapping[str, str]) -> Iterator[Callable[[pa.Table], None]]:
    """Give a function that takes tables of the same columns, one after the other; when the block ends well, they are
    the file ``path``, or CSV on stdout.

    Args:
        path: with one of the endings that :func:`refuse_path` lets pass, or None.
        separators: of the labels in a cell of a CSV file, as :func:`~hesse.training.answers.separators` has them.
    """
    if path is None:
        sink = _Csv(sys.stdout.buffer, separators)
        yield sink.write
        sink.close()
        return
    kinds: dict[str, Callable[[Any], _Sink]] = {".csv": lambda file: _Csv(file, separators), ".parquet": _Parquet}
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        chosen = kinds.get(path.suffix.lower(), _JsonLines)(file)
        yield chosen.write
        chosen.close()


class _Csv:
    def __init__(self, file: Any, separators: Mapping[str, str]) -> None:
        self._file, self._separators = file, separators
        self._writer: Any = None

    def write(self, table: pa.Table) -> None:
        table = flat(table, self._separators)
        if self._writer is None:
            self._writer = pyarrow.csv.CSVWriter(self._file, table.schema)
        self._writer.write_table(table)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class _JsonLines:
    def __init__(self, file: Any) -> None:
        self._file = file

    def write(self, table: pa.Table) -> None:
        lines = (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in table.to_pylist())
        self._file.write("".join(lines).encode("utf-8", "backslashreplace"))

    def close(self) -> None:
        self._file.flush()


class _Parquet:
    def __init__(self, file: Any) -> None:
        self._file = file
        self._writer: Any = None
        self._waiting: list[pa.Table] = []

    def write(self, table: pa.Table) -> None:
        self._waiting.append(table)
        if sum(map(len, self._waiting)) >= ROW_GROUP:
            self._put()

    def close(self) -> None:
        self._put()
        if self._writer is not None:
            self._writer.close()

    def _put(self) -> None:
        if self._waiting:
            table = pa.concat_tables(self._waiting)
            self._writer = self._writer or pyarrow.parquet.ParquetWriter(self._file, table.schema)
            self._writer.write_table(table)
            self._waiting.clear()
