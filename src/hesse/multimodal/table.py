"""A table as it was given: named columns of texts and numbers, before anyone asks what they mean.

CSV, TSV, JSON lines, Parquet and every data frame that speaks Arrow (pandas, polars, duckdb, pyarrow) become
the same thing: each column is a string, int64 or float64 array without surprises. Surrounding blanks are
gone, and an empty cell, ``NA``, ``NaN`` or ``null`` is a missing value wherever it stood. Rows count from 1
and the header is not counted, in every message.
"""

from __future__ import annotations

import difflib
import os
import re
import unicodedata
from collections.abc import Container, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pyarrow import parquet

from hesse.finding import InputError
from hesse.multimodal.delimited import read_delimited
from hesse.multimodal.encoding import refuse_compressed
from hesse.multimodal.json_lines import read_json_lines
from hesse.multimodal.native import opened
from hesse.multimodal.stamp import Stamp

__all__ = [
    "DELIMITED",
    "JSON",
    "MISSING",
    "PARQUET",
    "Places",
    "Table",
    "check_names",
    "close_names",
    "damaged_parquet",
    "plain",
    "read_table",
    "unknown_type",
    "unused",
]

MISSING = ("", "NA", "N/A", "n/a", "NaN", "nan", "null", "NULL", "Null", "<NA>")
"""Cells that stand for "no value"."""

DELIMITED = (".csv", ".tsv", ".tab", ".txt")
JSON = (".jsonl", ".ndjson", ".json")
PARQUET = (".parquet", ".pq")


@dataclass(frozen=True, eq=False)
class Places:
    """Of each row, which of ``names`` (of files) it is from, and which row there, from 0: int64 ``[rows]``."""

    names: tuple[str, ...]
    file: NDArray[np.int64]
    row: NDArray[np.int64]

    def take(self, rows: Any) -> Places:
        """Of some rows."""
        return Places(self.names, self.file[rows], self.row[rows])


@dataclass(frozen=True)
class Table:
    """Columns of one length: large_string, int64 or float64 (or nested or binary ones, which nobody reads).

    Attributes:
        data: the columns, nulls where a value is missing.
        name: the file's name, or ``"data frame"``.
        folder: where the file lies; None for a data frame. Paths in cells are relative to it.
        first: which row of the file the first one here is, from 0, where this is a part of it.
        places: where each row comes from, if they come from here and there.
    """

    data: pa.Table
    name: str
    folder: Path | None
    first: int = 0
    places: Places | None = None

    def __len__(self) -> int:
        return int(self.data.num_rows)

    @property
    def names(self) -> list[str]:
        return list(self.data.column_names)

    def column(self, name: str) -> pa.Array:
        """The values of one column, in one piece."""
        column = self.data.column(name)
        return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()

    def slice(self, start: int, length: int | None = None) -> Table:
        """Some rows, one after the other."""
        places = self.places
        if places is not None:
            places = places.take(slice(start, None if length is None else start + length))
        return replace(self, data=self.data.slice(start, length), first=self.first + start, places=places)

    def take(self, rows: NDArray[np.int64]) -> Table:
        """Some rows, in the order of ``rows``."""
        if self.places is None:
            places = Places((self.name,), np.zeros(len(rows), np.int64), self.first + rows)
        else:
            places = self.places.take(rows)
        return replace(self, data=self.data.take(pa.array(rows)), first=0, places=places)

    def where(self, column: str | None = None, row: int | None = None) -> str:
        """A place in words; ``row`` is an index from 0.

        Example:
            >>> Table(pa.table({"a": [1]}), "pets.csv", None).where("a", 16)
            "pets.csv, row 17, column 'a'"
        """
        parts = [self.name]
        if row is not None and self.places is not None:
            parts = [self.places.names[self.places.file[row]], f"row {self.places.row[row] + 1}"]
        elif row is not None:
            parts += [f"row {self.first + row + 1}"]
        parts += [] if column is None else [f"column '{column}'"]
        return ", ".join(parts)


def read_table(source: str | os.PathLike[str] | object, *, delimiter: str | None = None) -> Table:
    """Read a table from a file, or take one from a data frame.

    Args:
        source: path of a CSV, TSV, JSON lines or Parquet file, or an object with ``__arrow_c_stream__``.
        delimiter: of a CSV or TSV file; found by itself if None.

    Raises:
        InputError: whatever is wrong with the file, named by row and column where there is one.
        TypeError: ``source`` is neither a path nor a data frame.

    Example:
        >>> table = read_table(pa.table({"name": [" Minka", "NA"], "weight": [4, 23]}))
        >>> table.data.to_pydict()
        {'name': ['Minka', None], 'weight': [4, 23]}
    """
    if isinstance(source, str | os.PathLike):
        path = Path(os.fspath(source))
        name = os.fsencode(path.name).decode("utf-8", "replace")
        names, data = _read_file(path, name, delimiter)
        folder: Path | None = path.parent
    elif hasattr(source, "__arrow_c_stream__"):
        name, folder = "data frame", None
        names, data = _take_frame(source, name)
    else:
        raise TypeError(
            "A table is a path or a data frame with the Arrow interface (pandas, polars, duckdb, pyarrow); "
            f"got {type(source).__name__}. A list of dicts becomes one with pyarrow.Table.from_pylist(rows)."
        )
    names = check_names(names, name)
    if not data.num_rows:
        raise InputError(
            "empty table",
            name,
            "The table has column names but no rows.",
            "Check that it was written completely.",
        )
    columns = [plain(column) for column in data.columns]
    return Table(pa.table(columns, names=names).combine_chunks(), name, folder)


def unused(name: str, names: Container[str]) -> str:
    """``name``, with as many underscores as it takes to be none of ``names``.

    Example:
        >>> unused("split", ["split", "split_"])
        'split__'
    """
    while name in names:
        name += "_"
    return name


def close_names(name: str, names: Iterable[str]) -> str:
    """What the writer of ``name`` may have meant: a sentence for a remedy.

    Example:
        >>> close_names("spceies", ["name", "species"])
        "Did you mean 'species'? The columns are: name, species."
    """
    names = list(names)
    by_folded = {other.casefold(): other for other in names}
    close = difflib.get_close_matches(name.casefold(), by_folded, n=3, cutoff=0.6)
    guess = "Did you mean " + " or ".join(f"'{by_folded[other]}'" for other in close) + "? " if close else ""
    shown = ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
    return f"{guess}The columns are: {shown}."


def _read_file(path: Path, name: str, delimiter: str | None) -> tuple[list[str], pa.Table]:
    suffix = path.suffix.lower()
    try:
        if not path.is_file():
            raise missing(path, name)
        stamp = Stamp.of(path)
        if suffix in DELIMITED:
            names, data = read_delimited(path, name, delimiter)
        elif suffix in JSON:
            data = read_json_lines(path, name)
            names = data.column_names
        elif suffix in PARQUET:
            data = _read_parquet(path, name)
            names = data.column_names
        else:
            raise unknown_type(path, name)
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(
            "unreadable file",
            name,
            f"The file cannot be read: {reason}.",
            "Check its permissions and the disk.",
        ) from error
    stamp.require(path, name)
    return names, data


def missing(path: Path, name: str) -> InputError:
    """Why there is no file at ``path``."""
    if path.exists():
        return InputError("not a file", str(path), "This is a folder or a device.", "Name a file in it.")
    there = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    close = difflib.get_close_matches(name, there, n=1)
    return InputError(
        "missing file",
        str(path),
        "There is no such file." if path.parent.is_dir() else "There is no such folder.",
        f"Did you mean '{close[0]}'?" if close else "Check the path.",
    )


def unknown_type(path: Path, name: str) -> InputError:
    """For a file of no kind that is read; raises another that says more if it is a compressed one."""
    with path.open("rb") as file:
        refuse_compressed(name, file.read(8))
    return InputError(
        "unknown file type",
        name,
        f"Tables are read from {', '.join(DELIMITED + JSON + PARQUET)} files.",
        "Rename the file to say what it is, or save it as CSV.",
        value=path.suffix.lower(),
    )


def _read_parquet(path: Path, name: str) -> pa.Table:
    try:
        with opened(path) as file:
            data = parquet.ParquetFile(file).read()
        data.validate(full=True)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise damaged_parquet(name, error) from error
    return data


def damaged_parquet(name: str, error: Exception) -> InputError:
    """What pyarrow says of a file that is no Parquet, as an error of ours."""
    return InputError(
        "damaged file",
        name,
        f"This is not a whole Parquet file: {str(error).strip().partition(chr(10))[0]}.",
        "Write or copy it again.",
    )


def _take_frame(frame: object, name: str) -> tuple[list[str], pa.Table]:
    try:
        data = pa.table(frame)
    except (pa.ArrowException, ValueError) as error:
        message = " ".join(str(part) for part in error.args)
        duplicate = "uplicate" in message
        raise InputError(
            "duplicate column" if duplicate else "mixed column",
            name,
            f"The data frame cannot be turned into columns of one type: {message}.",
            "Rename the columns." if duplicate else "Make the column text throughout, or numbers throughout.",
        ) from error
    # pandas keeps a row index as a column; it identifies rows and says nothing about them.
    data = data.select([i for i, n in enumerate(data.column_names) if not re.fullmatch(r"__index_level_\d+__", n)])
    return data.column_names, data


def check_names(names: list[str], table: str) -> list[str]:
    """Names in Unicode's composed form without blanks around them; none empty, none twice."""
    names = [unicodedata.normalize("NFC", name).strip() for name in names]
    if not names:
        raise InputError("empty table", table, "The table has no columns.", "Check that it was written completely.")
    for position, name in enumerate(names):
        if not name:
            raise InputError(
                "missing column name",
                f"{table}, column {position + 1} of {len(names)}",
                "The column has no name in the header.",
                "Name it in the first line. If it is pandas' index, write the file with index=False.",
            )
        if name in names[:position]:
            raise InputError(
                "duplicate column",
                f"{table}, columns {names.index(name) + 1} and {position + 1}",
                f"Both columns are called '{name}'.",
                "Rename one of them in the header.",
                value=name,
            )
    return names


def plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """The column as large_string, int64 or float64, null where missing; nested and binary ones unchanged."""
    t = column.type
    if isinstance(t, pa.BaseExtensionType):
        column = pa.chunked_array([chunk.storage for chunk in column.chunks], t.storage_type)
        return plain(column)
    if pa.types.is_dictionary(t):
        return plain(pc.cast(column, t.value_type))
    if pa.types.is_run_end_encoded(t):
        return plain(pa.chunked_array([pc.run_end_decode(chunk) for chunk in column.chunks], t.value_type))
    if pa.types.is_integer(t):
        if t == pa.uint64() and (pc.max(column).as_py() or 0) >= 2**63:
            return pc.cast(column, pa.float64(), safe=False)
        return pc.cast(column, pa.int64())
    if pa.types.is_floating(t) or pa.types.is_decimal(t):
        numbers = pc.cast(column, pa.float64(), safe=False)
        return pc.if_else(pc.is_nan(numbers), None, numbers)
    if pa.types.is_duration(t):
        return pc.cast(column, pa.int64())
    if pa.types.is_nested(t) or _is_binary(t):
        return column
    if pa.types.is_timestamp(t) and t.tz is not None:
        column = pc.cast(column, pa.timestamp(t.unit))  # the instant in UTC: needs no table of time zones
    texts = pc.cast(column, pa.large_string())
    texts = pc.utf8_trim_whitespace(texts)
    return pc.if_else(pc.is_in(texts, value_set=pa.array(MISSING, pa.large_string())), None, texts)


def _is_binary(t: pa.DataType) -> bool:
    kinds = (
        pa.types.is_binary,
        pa.types.is_large_binary,
        pa.types.is_binary_view,
        pa.types.is_fixed_size_binary,
    )
    return any(is_kind(t) for is_kind in kinds)
