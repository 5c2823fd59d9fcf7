"""Cells that name several files: paths between bars or semicolons, a JSON list of them, or a list column of Parquet."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

__all__ = ["evenly", "is_list_of_texts", "paths_in", "sequences"]

T = TypeVar("T")

_BETWEEN = re.compile(r"[|;]")


def is_list_of_texts(values: pa.Array) -> bool:
    """Whether the values are lists of texts."""
    t = values.type
    listed = pa.types.is_list(t) or pa.types.is_large_list(t) or pa.types.is_fixed_size_list(t)
    return listed and (pa.types.is_string(t.value_type) or pa.types.is_large_string(t.value_type))


def paths_in(cell: str) -> list[str]:
    """The paths in one cell.

    Example:
        >>> paths_in('["a|b.png", "c.png"]'), paths_in("a.png; b.png|c.png")
        (['a|b.png', 'c.png'], ['a.png', 'b.png', 'c.png'])
    """
    if cell.startswith("["):
        try:
            listed = json.loads(cell)
        except ValueError:
            listed = None
        if isinstance(listed, list) and all(isinstance(item, str | None) for item in listed):
            return [item.strip() for item in listed if item and item.strip()]
    return [part.strip() for part in _BETWEEN.split(cell) if part.strip()]


def sequences(values: pa.Array) -> list[list[str] | None]:
    """The paths of each row; None for a row without any."""
    if is_list_of_texts(values):
        cells = ([item.strip() for item in row or () if item and item.strip()] for row in values.to_pylist())
        return [cell or None for cell in cells]
    return [paths_in(cell) or None if cell else None for cell in pc.cast(values, pa.large_string()).to_pylist()]


def evenly(items: Sequence[T], most: int) -> Sequence[T]:
    """At most so many of a list, the first and the last among them (of one: the middle).

    Example:
        >>> evenly(list("abcdefg"), 3), evenly(list("ab"), 3), evenly(list("abc"), 1)
        (['a', 'd', 'g'], ['a', 'b'], ['b'])
    """
    if len(items) <= most:
        return items
    if most == 1:
        return [items[len(items) // 2]]
    return [items[int(i)] for i in np.linspace(0, len(items) - 1, most).round()]
