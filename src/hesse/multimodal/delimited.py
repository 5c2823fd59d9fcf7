"""Delimited text (CSV, TSV and their ``;`` and ``|`` cousins), read by pyarrow as strings and nothing else.

What a cell means is decided later, by looking at the whole column; here a file becomes rows of equal length
or an error that names the row. The header is read as an ordinary first row, so that a name given twice, or
not at all, is seen as it stands in the file.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv

from hesse.finding import InputError
from hesse.multimodal.encoding import require_utf8
from hesse.multimodal.native import opened

__all__ = [
    "decimal_comma",
    "find_delimiter",
    "layout",
    "parse",
    "ragged_rows",
    "read_delimited",
    "unclosed_quote",
    "with_point",
]

_DELIMITERS = (",", ";", "\t", "|")
_NAMES = {",": "','", ";": "';'", "\t": "tab", "|": "'|'"}
_SAMPLE = 1 << 20
_BLOCK = 64 << 20  # pyarrow wants every row inside one block
_DECIMAL_COMMA = r"^[+-]?(\d+|\d*,\d+)([eE][+-]?\d+)?$"


def read_delimited(path: Path, name: str, delimiter: str | None) -> tuple[list[str], pa.Table]:
    """The header's names and the rows as columns of strings; ``""`` stands for an empty cell.

    Args:
        path: a CSV or TSV file in UTF-8, with or without a byte order mark.
        name: how to call it in errors.
        delimiter: one character, or None to find it.

    Raises:
        InputError: not UTF-8, ambiguous delimiter, ragged rows, an unclosed quote, or nothing in the file.
    """
    delimiter, columns = layout(path, name, delimiter)
    try:
        with opened(path) as file:
            rows = parse(file, delimiter, columns)
    except pa.ArrowException as error:
        _refuse_ragged(path, name, delimiter, columns)
        raise damaged_rows(name, error) from error
    _require_closed_quotes(path, name, rows)
    names = [str(column[0].as_py()) for column in rows.columns]
    rows = rows.slice(1).rename_columns(names)
    if delimiter == ";":
        rows = pa.table([_decimal_point(column) for column in rows.columns], names=names)
    return names, rows


def layout(path: Path, name: str, delimiter: str | None) -> tuple[str, int]:
    """The delimiter of a file, and how many columns it can have at most.

    Raises:
        InputError: not UTF-8, ambiguous delimiter, or nothing in the file.
    """
    require_utf8(path, name)
    with path.open("rb") as file:
        # The cut may fall inside a character: that one is dropped.
        sample = file.read(_SAMPLE).decode("utf-8-sig", errors="ignore")
    if not sample.strip():
        raise InputError("empty table", name, "The file is empty.", "Check that it was written completely.")
    if delimiter is None:
        delimiter = find_delimiter(sample, "\t" if path.suffix.lower() in (".tsv", ".tab") else ",")
        if delimiter is None:
            raise InputError(
                "wrong delimiter",
                name,
                "More than one of ',', ';' and '|' cuts the lines into equally many cells.",
                "Say which: --delimiter ';' for instance.",
            )
    elif len(delimiter) != 1 or not delimiter.isascii() or delimiter in '"\r\n':
        raise InputError("wrong delimiter", name, f"A delimiter is one ASCII character; got {delimiter!r}.")
    return delimiter, _most_columns(sample, delimiter)


def find_delimiter(sample: str, default: str) -> str | None:
    """The character that cuts the sample's lines into equally many cells; None when several do.

    Args:
        sample: the beginning of a file.
        default: what the file's name suggests; taken when no candidate cuts evenly.

    Example:
        >>> find_delimiter("name;weight\\nMinka;4,2\\nRex;23,5\\n", ",")
        ';'
        >>> find_delimiter("a;b, c\\n1;2,5\\n", ",") is None
        True
    """
    lines = _without_quoted(sample).splitlines()
    # Of a long sample the last line may be half a row; twenty lines are enough anyway.
    lines = [line for line in lines[: max(20, len(lines) - 1)] if line][:20]
    found = [d for d in _DELIMITERS if lines and d in lines[0]]
    even = [d for d in found if all(line.count(d) == lines[0].count(d) for line in lines)]
    if "\t" in even:
        return "\t"  # hardly ever part of a cell
    if len(even) > 1:
        return None
    return (even or [d for d in found if d == default] or found or [default])[0]


def _refuse_ragged(path: Path, name: str, delimiter: str, columns: int) -> None:
    ragged: list[Any] = []

    def note(row: Any) -> str:
        ragged.append(row)
        return "skip"

    with opened(path) as file, suppress(pa.ArrowException):  # what else is wrong is known
        parse(file, delimiter, columns, note)
    if ragged:
        raise ragged_rows(name, delimiter, ragged)


def parse(
    file: Any, delimiter: str, columns: int, on_ragged: Callable[[Any], str] | None = None, *, exact: bool = False
) -> pa.Table:
    """The rows of a file, the header among them, as columns of strings f0, f1, ...

    Args:
        columns: at most, or, if ``exact``, as many; otherwise the first row says how many.
        on_ragged: told of each row that has another number of cells; returns "skip" or "error". By default such a row
            is an error, and several threads read, which know no numbers of rows.
    """
    read = csv.ReadOptions(
        column_names=[f"f{i}" for i in range(columns)] if exact else None,
        autogenerate_column_names=not exact,
        block_size=_BLOCK,
        use_threads=on_ragged is None,
    )
    settings = csv.ParseOptions(
        delimiter=delimiter,
        newlines_in_values=True,
        # In a table of one column an empty line is a missing value, not a gap between rows.
        ignore_empty_lines=columns > 1,
        invalid_row_handler=on_ragged,
    )
    strings = csv.ConvertOptions(column_types={f"f{i}": pa.large_string() for i in range(columns)})
    return csv.read_csv(file, read, settings, strings)


def _most_columns(sample: str, delimiter: str) -> int:
    """As many columns as the header can have, whether its quotes enclose names or are part of them."""
    lines = (sample.partition("\n")[0], _without_quoted(sample).partition("\n")[0])
    return 1 + max(line.count(delimiter) for line in lines)


def _without_quoted(sample: str) -> str:
    return re.sub(r'"[^"]*"', '""', sample)


def damaged_rows(name: str, error: Exception) -> InputError:
    """What pyarrow says of rows that it cannot tell apart, as an error of ours."""
    return InputError(
        "damaged file",
        name,
        f"The rows cannot be told apart: {str(error).strip().splitlines()[0]}.",
        "Look for a double quote that is opened and never closed.",
    )


def ragged_rows(name: str, delimiter: str, ragged: list[Any]) -> InputError:
    """The first of the rows with more or fewer cells than the header."""
    first = ragged[0]
    text = first.text if len(first.text) <= 80 else first.text[:80] + "..."
    others = f" {len(ragged) - 1} more rows do not fit either." if len(ragged) > 1 else ""
    return InputError(
        "ragged rows",
        f"{name}, row {first.number - 1}",
        f"The row has {first.actual_columns} cells, the header {first.expected_columns}: {text!r}.{others}",
        f"Put text that contains the delimiter, {_NAMES.get(delimiter, repr(delimiter))}, in double quotes, "
        "or name another delimiter with --delimiter.",
        value=first.actual_columns,
    )


def _require_closed_quotes(path: Path, name: str, rows: pa.Table) -> None:
    """An unclosed quote swallows the rest of the file into one cell, and pyarrow is content with that."""
    if not rows.num_rows or "\n" not in (rows.column(rows.num_columns - 1)[-1].as_py() or ""):
        return
    with path.open("rb") as file:
        quotes = sum(block.count(b'"') for block in iter(lambda: file.read(1 << 20), b""))
    if quotes % 2:
        raise unclosed_quote(name, rows.num_rows - 1)


def unclosed_quote(name: str, row: int) -> InputError:
    """Of the row, from 1, in which it is opened."""
    return InputError(
        "unclosed quote",
        f"{name}, row {row}",
        "A double quote is opened in this row and never closed: the rest of the file became one cell.",
        'Close it, or write a quote inside a quoted cell twice ("").',
    )


def _decimal_point(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Where ``;`` parts the cells, ``3,14`` is a number: written with a point if the whole column is such."""
    some, all_fit = decimal_comma(column)
    return with_point(column) if some and all_fit else column


def decimal_comma(column: pa.ChunkedArray) -> tuple[bool, bool]:
    """Whether any cell has a comma, and whether all are numbers as they are written with one, or empty."""
    cells = pc.utf8_trim_whitespace(column)
    fits = pc.or_(pc.match_substring_regex(cells, _DECIMAL_COMMA), pc.equal(cells, ""))
    return bool(pc.any(pc.match_substring(cells, ",")).as_py()), pc.all(fits).as_py() is not False  # null: no cells


def with_point(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Commas as points."""
    return pc.replace_substring(column, ",", ".")
