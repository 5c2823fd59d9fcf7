"""Which rows of a large table train, which validate and test, and which are looked at to understand the columns.

A row's part follows from a hash of its number and the seed, so that nobody has to hold all rows at once; validation
and test rows are few enough to be held. One scan of the target columns finds every class there is, and a row for each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from hesse.multimodal.columns import is_few
from hesse.multimodal.split import prescribed
from hesse.multimodal.stream.source import Source
from hesse.multimodal.table import Table
from hesse.multimodal.values import is_readable, labels, try_numbers

__all__ = ["NONE", "TEST", "TRAIN", "VALID", "Division", "divide"]

TRAIN, VALID, TEST, NONE = 0, 1, 2, 3
MOST_HELD = 20_000  # rows that validate, and rows that test
MOST_CLASSES = 10_000  # that are looked for


@dataclass(frozen=True)
class Division:
    """What the rows are for.

    Attributes:
        part: int8 ``[rows]``: TRAIN, VALID, TEST, or NONE for rows without a target.
        examples: a row of each class, ascending.
    """

    part: NDArray[np.int8]
    examples: NDArray[np.int64]

    def rows(self, part: int) -> NDArray[np.int64]:
        """The rows of a part, ascending."""
        return np.flatnonzero(self.part == part)

    def sample(self, most: int) -> NDArray[np.int64]:
        """Training rows from everywhere, evenly spaced, and the examples among them."""
        train = self.rows(TRAIN)
        spread = train[np.linspace(0, len(train) - 1, min(most, len(train))).astype(np.int64)]
        return np.union1d(spread, self.examples[self.part[self.examples] == TRAIN])


def divide(source: Source, targets: Sequence[str], split_column: str | None, seed: int) -> Division:
    """Scan the target columns and the split column, if there is one.

    Args:
        source: the table.
        targets: the columns to predict; a row with none of them is in no part.
        split_column: says train, valid or test. Otherwise a tenth of the rows validates and a tenth tests, each at
            most about 20 000; and if it says valid in no row, so many of the training rows do.
        seed: of the hash.

    Raises:
        InputError: another word in the split column, named by its row.

    Example:
        >>> from hesse.multimodal.stream import open_source
        >>> source = open_source(pa.table({"y": ["a", "b", None, "b"] * 500}))
        >>> [int((divide(source, ["y"], None, seed=0).part == part).sum()) for part in (TRAIN, VALID, TEST, NONE)]
        [1203, 145, 152, 500]
    """
    chance = hashed(np.arange(len(source), dtype=np.uint64), seed)
    part = np.full(len(source), NONE, np.int8)
    shown: dict[str, dict[str, int]] = {name: {} for name in targets}
    first: dict[str, dict[str, int]] = {name: {} for name in targets}
    columns = [*targets, *([split_column] if split_column is not None else [])]
    share = min(0.1, MOST_HELD / len(source))
    for piece in range(source.pieces):
        table = source.read(piece, columns)
        start, end = (int(i) for i in source.starts[piece : piece + 2])
        present = np.logical_or.reduce([_valid(table.column(name)) for name in targets])
        rows = np.flatnonzero(present)
        if split_column is None:
            own = chance[start:end][rows]
            part[start + rows] = np.where(own < share, VALID, np.where(own < 2 * share, TEST, TRAIN))
        else:
            words = prescribed(table, split_column, rows)
            part[start + rows] = np.where(words == "train", TRAIN, np.where(words == "valid", VALID, TEST))
        trains = np.flatnonzero(part[start:end] == TRAIN)
        for name in targets:
            _note(table.column(name).take(pa.array(trains)), start + trains, shown[name])
            _note(table.column(name), np.arange(start, end), first[name])
    classes = [name for name in targets if not _is_quantity(first[name], int((part != NONE).sum()))]
    if split_column is not None:
        _thin(part, chance)
    elif (part == TRAIN).any():
        if not (part == VALID).any():  # so few rows that none fell to it
            part[_least(chance, part == TRAIN)] = VALID
        for name in classes:  # nothing is validated that was never shown
            for label in first[name].keys() - shown[name].keys():
                part[first[name][label]] = TRAIN
    examples = [row for name in classes for row in (first[name] | shown[name]).values()]
    return Division(part, np.unique(np.array(examples, np.int64)))


def hashed(rows: NDArray[np.uint64], seed: int) -> NDArray[np.float64]:
    """A number from 0 to 1 for each row: the finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014).

    Example:
        >>> hashed(np.arange(3, dtype=np.uint64), seed=0).round(3).tolist()
        [0.883, 0.432, 0.026]
    """
    with np.errstate(over="ignore"):
        z = (rows + np.uint64(1) + (np.uint64(seed) << np.uint64(32))) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (z ^ (z >> np.uint64(31))) / 2.0**64


def _thin(part: NDArray[np.int8], chance: NDArray[np.float64]) -> None:
    """No more rows to validate and to test than can be held, and some to validate."""
    if not (part == VALID).any():
        trains = np.flatnonzero(part == TRAIN)
        few = trains[chance[trains] < min(0.1, MOST_HELD / max(1, len(trains)))]
        part[few if len(few) else _least(chance, part == TRAIN)] = VALID
    for one in (VALID, TEST):
        rows = np.flatnonzero(part == one)
        if len(rows) > MOST_HELD:
            part[rows[chance[rows] >= MOST_HELD / len(rows)]] = NONE


def _least(chance: NDArray[np.float64], among: NDArray[np.bool_]) -> NDArray[np.int64]:
    """The one row with the least chance; none if there are not two."""
    rows = np.flatnonzero(among)
    return rows[[np.argmin(chance[rows])]] if len(rows) > 1 else rows[:0]


def _valid(values: pa.Array) -> NDArray[np.bool_]:
    return np.asarray(values.is_valid().to_numpy(zero_copy_only=False), bool)


def _is_quantity(seen: dict[str, int], rows: int) -> bool:
    """Whether the values are numbers, and too many to be classes."""
    numbers = try_numbers(pa.array(list(seen), pa.large_string())) is not None
    return numbers and (len(seen) > MOST_CLASSES or not is_few(len(seen), rows))


def _note(values: pa.Array, rows: NDArray[np.int64], seen: dict[str, int]) -> None:
    """Remember the first row of each value, or of each label of a list, until there are too many to be classes."""
    if pa.types.is_list(values.type) or pa.types.is_large_list(values.type):
        rows = rows[pc.list_parent_indices(values).to_numpy(zero_copy_only=False)]
        values = pc.list_flatten(values)
    if not (is_readable(values) or pa.types.is_string(values.type)) or len(seen) > MOST_CLASSES:
        return
    words = labels(values)
    coded = pc.dictionary_encode(words)
    codes = coded.indices.fill_null(-1).to_numpy(zero_copy_only=False)
    found, at = np.unique(codes, return_index=True)
    for code, place in zip(found.tolist(), at.tolist(), strict=True):
        if code >= 0:
            seen.setdefault(coded.dictionary[code].as_py(), int(rows[place]))


def marked(table: Table, part: NDArray[np.int8], column: str) -> Table:
    """The table with a column that says "train" or "valid" (tests count among them) for each row."""
    words = np.where(part == TRAIN, "train", "valid")
    data = table.data.drop([column]) if column in table.names else table.data
    values = pa.array(words.tolist(), pa.large_string())
    at = table.names.index(column) if column in table.names else len(table.names)
    return Table(data.add_column(at, column, values), table.name, table.folder, places=table.places)
