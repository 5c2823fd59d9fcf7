"""The values of a column as numbers, as labels or as text, with errors that name the row.

A number may have been written as text (CSV), and a label as a number (Parquet): 1, 1.0, "1" and "1.0" are the
same label, and so are True, "TRUE" and "true", so that a model trained on one kind of file predicts on
another.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from hesse.finding import InputError
from hesse.multimodal.table import Table

__all__ = ["codes_of", "is_readable", "labels", "not_numbers", "numbers", "require_readable", "texts", "try_numbers"]

_NUMBER = r"^([+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?|[+-]?(?i:inf|infinity|nan(\(\w*\))?))$"


def is_readable(values: pa.Array) -> bool:
    """Whether the values are texts or numbers, not lists, structures or bytes."""
    return pa.types.is_large_string(values.type) or values.type in (pa.int64(), pa.float64())


def require_readable(table: Table, name: str) -> None:
    """Raise InputError (kind ``"wrong kind"``) for a column of lists, structures or bytes."""
    values = table.column(name)
    if not is_readable(values):
        raise InputError(
            "wrong kind",
            table.where(name),
            f"The column holds {values.type} values, not texts or numbers.",
            "Put plain values into it, or the paths of files that hold the rest.",
        )


def try_numbers(values: pa.Array) -> pa.Array | None:
    """The values as int64 or float64, nulls where missing; None if one of them is not a number.

    Example:
        >>> try_numbers(pa.array(["1", None, "2.5"], pa.large_string())).to_pylist()
        [1.0, None, 2.5]
        >>> try_numbers(pa.array(["1", "two"], pa.large_string())) is None
        True
    """
    if not pa.types.is_large_string(values.type):
        return values
    try:
        return pc.cast(values, pa.float64())
    except pa.ArrowInvalid:
        return None


def not_numbers(values: pa.Array) -> NDArray[np.intp]:
    """Row indices of the texts that are not numbers; missing values are not among them."""
    fits = pc.fill_null(pc.match_substring_regex(values, _NUMBER), True)
    return np.flatnonzero(~fits.to_numpy(zero_copy_only=False))


def numbers(table: Table, name: str) -> NDArray[np.float64]:
    """A column as float64 ``[rows]``, NaN where missing.

    Raises:
        InputError: kind ``"not a number"``, naming the first row that holds something else.
    """
    values = table.column(name)
    parsed = try_numbers(values)
    if parsed is None:
        rows = not_numbers(values)
        word = values[int(rows[0])].as_py()
        others = f" {len(rows) - 1} more values are not either." if len(rows) > 1 else ""
        raise InputError(
            "not a number",
            table.where(name, int(rows[0])),
            f"The value '{short(word)}' is not a number, and the column is read as numbers.{others}",
            f"Correct the cell, empty it if the value is unknown, or train with --column {name}=category.",
            value=short(word),
        )
    floats = pc.cast(parsed, pa.float64(), safe=False)
    return np.asarray(pc.fill_null(floats, float("nan")).to_numpy(zero_copy_only=False), np.float64)


def labels(values: pa.Array) -> pa.Array:
    """The values as category labels: composed Unicode, one spelling for each number and truth value.

    Example:
        >>> labels(pa.array(["1.0", "TRUE", None, "Ja"], pa.large_string())).to_pylist()
        ['1', 'true', None, 'Ja']
        >>> labels(pa.array([1.0, 2.5])).to_pylist()
        ['1', '2.5']
    """
    coded = pc.dictionary_encode(pc.cast(values, pa.large_string()))
    words = pc.utf8_normalize(coded.dictionary, form="NFC")
    words = pc.replace_substring_regex(words, r"^([+-]?\d+)\.0*$", r"\1")
    truth = pc.match_substring_regex(words, r"^(?i:true|false)$")
    return pc.if_else(truth, pc.ascii_lower(words), words).take(coded.indices)


def codes_of(values: pa.Array, known: list[str], unknown: int) -> NDArray[np.int64]:
    """The place of each value among the known ones; ``unknown`` for others, -1 for missing ones."""
    places = pc.index_in(values, value_set=pa.array(known, pa.large_string()))
    places = pc.if_else(values.is_valid(), pc.fill_null(places, unknown), -1)
    return np.asarray(places.to_numpy(zero_copy_only=False), np.int64)


def texts(values: pa.Array) -> list[str | None]:
    """The values as Python strings, None where missing."""
    result: list[str | None] = pc.cast(values, pa.large_string()).to_pylist()
    return result


def short(value: Any, limit: int = 60) -> str:
    """A value as it may stand in a table cell or a message: one line, cut to ``limit`` characters."""
    line = " ".join(str(value).split())
    return line if len(line) <= limit else line[: limit - 1] + "…"
