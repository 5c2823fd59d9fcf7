"""Cells that hold several labels: lists of Parquet and JSON lines, and texts such as ``action|comedy``.

A list says what it is. A text is taken for one only where that cannot be an accident: labels come back in other
company, so that there are fewer labels than different cells. ``Paris, France`` beside ``Lyon, France`` is not one.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from hesse.finding import InputError
from hesse.multimodal.columns import is_few
from hesse.multimodal.table import MISSING, Table
from hesse.multimodal.values import labels, short

__all__ = ["JSON", "holds_lists", "likely_separator", "read_labels", "separator_of"]

JSON = "json"
SEPARATORS = ("|", ";", ", ", ",")
TOGETHER = 0.1  # share of cells with several labels from which on a text column holds labels
LONGEST = 40  # characters of a label: sentences have commas too


def holds_lists(values: pa.Array) -> bool:
    """Whether each value is a list."""
    kinds = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list, pa.types.is_list_view)
    return any(kind(values.type) for kind in kinds)


def likely_separator(values: pa.Array) -> str | None:
    """What separates the labels in cells of text, ``"json"`` for JSON lists, None if cells are no lists.

    Example:
        >>> likely_separator(pa.array(["sad|slow", "slow", "fast", "fast|sad", "sad"] * 10, pa.large_string()))
        '|'
        >>> likely_separator(pa.array(["Paris, France", "Lyon, France", "Berlin, Germany"] * 10, pa.large_string()))
    """
    known = pc.drop_null(values)
    distinct = pc.unique(known)
    if len(distinct) and pc.all(pc.match_substring_regex(distinct, r"^\[.*\]$")).as_py():
        return JSON if all(isinstance(_parsed(cell), list) for cell in distinct.to_pylist()) else None
    for separator in SEPARATORS[:3]:  # a comma without a blank is found in numbers, names and codes
        several = pc.match_substring(known, separator)
        if pc.mean(several).as_py() < TOGETHER:
            continue
        rows, names = _split(known, separator)
        unique = pc.unique(names)
        sizes = np.unique(np.bincount(rows, minlength=len(known)))
        if (
            2 <= len(unique) < len(distinct)
            and pc.max(pc.utf8_length(unique)).as_py() <= LONGEST
            and is_few(len(unique), len(names))
            and (len(sizes) > 1 or separator == "|")  # always as many parts: a name or a date in parts
        ):
            return separator
    return None


def separator_of(values: pa.Array) -> str:
    """As :func:`likely_separator`, for cells that are known to hold labels: the commonest, if none is clear."""
    found = likely_separator(values)
    if found is not None:
        return found
    counts = {s: pc.sum(pc.count_substring(pc.drop_null(values), s)).as_py() or 0 for s in SEPARATORS}
    return max(counts, key=lambda s: counts[s])


def read_labels(table: Table, name: str, separator: str) -> tuple[NDArray[np.int64], pa.Array]:
    """Every label of a column with the row it stands in.

    Args:
        table: with a column of lists, or of texts.
        name: of the column.
        separator: as from :func:`separator_of`, for texts; lists need none.

    Returns:
        rows int64 [labels], ascending, and the labels, large_string. Missing cells and empty lists have none.

    Raises:
        InputError: lists of lists or structures, or a text that is no JSON list where all others are; with its row.
    """
    values = table.column(name)
    if holds_lists(values):
        try:
            lists = pc.cast(values, pa.large_list(pa.large_string()))
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise InputError(
                "wrong kind",
                table.where(name),
                f"The column holds {values.type} values, not lists of labels.",
                "Put lists of texts or numbers into it.",
            ) from error
        return _flat(lists)
    if separator == JSON:
        parsed = [_parsed(cell) for cell in values.to_pylist()]
        for row, cell in enumerate(parsed):
            if not isinstance(cell, list | None):
                raise InputError(
                    "not a list",
                    table.where(name, row),
                    f"The value '{short(values[row].as_py())}' is not a JSON list of labels, as the others are.",
                    'Write for instance ["red", "round"]; [] where there is none.',
                    value=short(values[row].as_py()),
                )
        words = [None if cell is None else [_word(item) for item in cell] for cell in parsed]
        return _flat(pa.array(words, pa.large_list(pa.large_string())))
    return _split(pc.cast(values, pa.large_string()), separator)


def _split(values: pa.Array, separator: str) -> tuple[NDArray[np.int64], pa.Array]:
    return _flat(pc.split_pattern(values, separator.strip()))


def _flat(lists: pa.Array) -> tuple[NDArray[np.int64], pa.Array]:
    rows = np.asarray(pc.list_parent_indices(lists).to_numpy(zero_copy_only=False), np.int64)
    words = pc.utf8_trim_whitespace(pc.cast(pc.list_flatten(lists), pa.large_string()))
    kept = pc.invert(pc.fill_null(pc.is_in(words, value_set=pa.array(MISSING, pa.large_string())), True))
    kept = pc.and_(kept, words.is_valid())
    return rows[kept.to_numpy(zero_copy_only=False)], labels(pc.filter(words, kept))


def _parsed(cell: str | None) -> Any:
    """The JSON value of a cell; its text if it has none."""
    try:
        return None if cell is None else json.loads(cell)
    except ValueError:
        return cell


def _word(item: Any) -> str | None:
    return None if item is None else item if isinstance(item, str) else json.dumps(item)
