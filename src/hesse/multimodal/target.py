"""What is to be predicted: classes or a quantity, found by looking at the target column.

Texts and truth values are classes; so are whole numbers of which there are few and each comes often (ratings,
digits); every other number is a quantity. ``--column TARGET=category`` or ``=number`` decides otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from hesse.finding import InputError
from hesse.multimodal.columns import Column, Kind, is_few, refuse_mixed
from hesse.multimodal.table import Table
from hesse.multimodal.values import labels, numbers, require_readable, short, try_numbers

__all__ = ["Target", "find_target"]

MOST_NUMBERED_CLASSES = 20
LARGEST = 1e30  # of a quantity; its standardised values and their squares must fit single precision


@dataclass(frozen=True)
class Target:
    """The target column as found.

    Attributes:
        column: its row in the column table.
        classes: labels in the order of the outputs; empty for a quantity.
        values: float64 ``[rows of the table]`` of a quantity; None for classes.
        rows: int64, indices of the rows that have a target.
        strata: int64 ``[len(rows)]``, the class of each; zeros for a quantity.
    """

    column: Column
    classes: tuple[str, ...]
    values: NDArray[np.float64] | None
    rows: NDArray[np.int64]
    strata: NDArray[np.int64]


def find_target(table: Table, name: str, override: str | None = None) -> Target:
    """Decide between classification and regression.

    Raises:
        InputError: no value, one value only, free text, words among numbers, or a number too large.
    """
    values = table.column(name)
    if override not in (None, "category", "number"):
        raise InputError(
            "unknown kind",
            table.where(name),
            f"A target cannot be read as '{override}'.",
            "A target is a category (classification) or a number (regression).",
            value=override,
        )
    require_readable(table, name)
    present = np.flatnonzero(values.is_valid().to_numpy(zero_copy_only=False)).astype(np.int64)
    known = pc.drop_null(values)
    distinct = pc.unique(labels(known))
    if len(distinct) < 2:
        only = f"the same, '{short(distinct[0].as_py())}'" if len(distinct) else "missing"
        raise InputError(
            "one class" if len(distinct) else "no target",
            table.where(name),
            f"Every value of the target is {only}: there is nothing to tell apart.",
            "Choose another target, or add rows with other values.",
        )
    kind, reason = _task(table, name, values, len(distinct), override)
    if kind == "number":
        quantity = numbers(table, name)
        huge = np.flatnonzero(np.abs(quantity) > LARGEST)
        if huge.size:
            raise InputError(
                "number too large",
                table.where(name, int(huge[0])),
                f"The target is {quantity[huge[0]]:g}; models compute in single precision, up to 3e38.",
                "Correct the cell, or give the target in a larger unit.",
                value=float(quantity[huge[0]]),
            )
        strata, classes = np.zeros(len(present), np.int64), ()
    else:
        quantity = None
        names = sorted(distinct.to_pylist(), key=_natural)
        codes = pc.index_in(labels(known), value_set=pa.array(names, pa.large_string()))
        strata = codes.to_numpy().astype(np.int64)
        classes = tuple(names)
    example = short(known[0].as_py())
    column = Column(name, kind, "target", reason, values.null_count, len(distinct), example)
    return Target(column, classes, quantity, present, strata)


def _task(table: Table, name: str, values: pa.Array, unique: int, override: str | None) -> tuple[Kind, str]:
    rows = len(values) - values.null_count
    classes = f"target: {unique} classes"
    if override == "category":
        return "category", f"{classes}, as asked"
    if override == "number":
        return "number", "target: a quantity, as asked"
    parsed = try_numbers(values)
    if parsed is not None:
        whole = pc.all(pc.equal(parsed, pc.round(parsed))).as_py()
        if whole and (unique == 2 or (unique <= MOST_NUMBERED_CLASSES and is_few(unique, rows))):
            return "category", f"{classes}, whole numbers"
        return "number", f"target: a quantity, {unique} different values"
    if unique > MOST_NUMBERED_CLASSES or not is_few(unique, rows):
        refuse_mixed(table, name)
    if unique > 20 and unique * 2 > rows:
        raise InputError(
            "unusable target",
            table.where(name),
            f"{unique} different texts in {rows} rows are not classes: most have one row only.",
            f"Choose a target whose values repeat, or insist with --column {name}=category.",
            value=unique,
        )
    return "category", classes


def _natural(label: str) -> tuple[bool, float, str]:
    """Numbers in their own order, before words in theirs."""
    try:
        return False, float(label), label
    except ValueError:
        return True, 0.0, label
