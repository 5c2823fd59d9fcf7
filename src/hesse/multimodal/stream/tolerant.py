"""Rows that can be read, whatever is wrong with the others.

Most errors come with the row they belong to. A few stop the reading of a whole table (a path that leads outside, a new
class): then halves of it are read, and halves of these, until the row that is to blame is alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from hesse.finding import InputError
from hesse.multimodal.dataset import Dataset, read_rows
from hesse.multimodal.schema import Schema
from hesse.multimodal.table import Table

__all__ = ["read_what_can_be"]

WHOLE = ("missing column", "wrong kind", "exchanged columns")  # no row is to blame


def read_what_can_be(
    schema: Schema, table: Table, *, root: Path, with_target: bool = True
) -> tuple[Dataset, dict[int, InputError]]:
    """The rows that can be read, and what is wrong with each of the others, by row from 0.

    Raises:
        InputError: a column is absent, of no kind that can be read, or another one's: no row is to blame.
    """
    return _read(schema, table, root, with_target)


def _read(schema: Schema, table: Table, root: Path, with_target: bool) -> tuple[Dataset, dict[int, InputError]]:
    try:
        return read_rows(schema, table, root=root, with_target=with_target)
    except InputError as error:
        if error.finding.kind in WHOLE:
            raise
        if len(table) == 1:
            return read_rows(schema, table.slice(0, 0), root=root, with_target=with_target)[0], {0: error}
    middle = len(table) // 2
    first, errors = _read(schema, table.slice(0, middle), root, with_target)
    second, more = _read(schema, table.slice(middle), root, with_target)
    return _joined(first, second, middle), errors | {middle + row: error for row, error in more.items()}


def _joined(one: Dataset, other: Dataset, offset: int) -> Dataset:
    inputs = {
        key: (_cat(data, other.inputs[key][0]), torch.cat([present, other.inputs[key][1]]))
        for key, (data, present) in one.inputs.items()
    }
    targets = None if one.targets is None else _cat(one.targets, other.targets)
    return Dataset(inputs, targets, torch.cat([one.rows, other.rows + offset]), one.findings + other.findings)


def _cat(one: Any, other: Any) -> Any:
    if isinstance(one, tuple):
        return tuple(torch.cat(pair) for pair in zip(one, other, strict=True))
    return torch.cat([one, other])
