"""Which rows train, which choose, which judge: a stratified, seeded split, or the one a column prescribes.

The rows are shuffled, laid out class by class, and dealt like cards: of every ten, one goes to "valid" and
one to "test". So each class is split as evenly as whole numbers allow, whatever the seed. The first row of
every class goes to "train" before dealing starts: nothing is validated that was never shown.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hesse.finding import InputError
from hesse.multimodal.table import Table
from hesse.multimodal.values import require_readable, texts

__all__ = ["Parts", "prescribed", "prescribed_split", "stratified_split"]

Parts = dict[str, NDArray[np.int64]]
"""Ascending row indices of "train", "valid" and "test"."""

_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("valid", "val", "validation", "validate", "dev"), "valid"),
    **dict.fromkeys(("test", "testing"), "test"),
}


def stratified_split(strata: NDArray[np.int64], rows: NDArray[np.int64], seed: int) -> Parts:
    """Split into 80 % train, 10 % valid, 10 % test.

    Args:
        strata: the class of each row, ``[len(rows)]``; all equal for an unstratified split.
        rows: row indices.
        seed: of the shuffle.

    Returns:
        The parts. "valid" has a row as soon as some class has two, "test" when there are about six more than
        classes.

    Example:
        >>> parts = stratified_split(np.repeat([0, 1], [50, 50]), np.arange(100), seed=0)
        >>> [(name, len(part), int((part < 50).sum())) for name, part in parts.items()]
        [('train', 80, 40), ('valid', 10, 5), ('test', 10, 5)]
    """
    first, rest = _shuffled(strata, rows, seed)
    card = np.arange(len(rest)) % 10
    return {
        "train": np.sort(np.concatenate([first, rest[(card != 0) & (card != 5)]])),
        "valid": np.sort(rest[card == 0]),
        "test": np.sort(rest[card == 5]),
    }


def prescribed_split(table: Table, column: str, strata: NDArray[np.int64], rows: NDArray[np.int64], seed: int) -> Parts:
    """Split by the values of a column; if no row says "valid", a tenth of "train" is set aside for it.

    Args:
        table: the table.
        column: its values read train, valid (val, validation, dev) or test, in any case.
        strata: the class of each row, ``[len(rows)]``.
        rows: indices of the rows that take part.
        seed: of the shuffle, where one is needed.

    Raises:
        InputError: another value, named by its row, or no row for training.
    """
    part_of = prescribed(table, column, rows)
    parts = {name: rows[part_of == name] for name in ("train", "valid", "test")}
    if not len(parts["train"]):
        raise InputError("unknown split", table.where(column), "No row says train.", "Mark the rows to train on.")
    if not len(parts["valid"]):
        first, rest = _shuffled(strata[part_of == "train"], parts["train"], seed)
        parts["train"] = np.sort(np.concatenate([first, rest[np.arange(len(rest)) % 10 != 0]]))
        parts["valid"] = np.sort(rest[::10])
    return parts


def prescribed(table: Table, column: str, rows: NDArray[np.int64]) -> NDArray[np.object_]:
    """ "train", "valid" or "test" for each of the rows, as the column says."""
    require_readable(table, column)
    cells = texts(table.column(column))
    names = []
    for row in rows.tolist():
        cell = cells[row]
        part = _WORDS.get((cell or "").casefold())
        if part is None:
            raise InputError(
                "unknown split",
                table.where(column, row),
                f"The value is {'missing' if cell is None else repr(cell)}.",
                "Write train, valid or test into every row of the split column.",
                value=cell,
            )
        names.append(part)
    return np.array(names, dtype=object)


def _shuffled(
    strata: NDArray[np.int64], rows: NDArray[np.int64], seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """One random row of every class, and the others: largest class first, in random order within each."""
    order = np.random.default_rng(seed).permutation(len(rows))
    _, classes, sizes = np.unique(strata[order], return_inverse=True, return_counts=True)
    rank = np.empty(len(sizes), np.int64)
    rank[np.argsort(-sizes, kind="stable")] = np.arange(len(sizes))
    order = order[np.argsort(rank[classes], kind="stable")]
    is_first = np.ones(len(order), bool)
    is_first[1:] = strata[order][1:] != strata[order][:-1]
    return rows[order[is_first]], rows[order[~is_first]]
