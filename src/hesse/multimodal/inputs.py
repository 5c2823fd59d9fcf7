"""The cells of the input columns as arrays: every modality with its mask of presence, compact as decoders give them.

A missing cell is a zero with ``present = False``, never a made-up value. A file that cannot be read costs its row,
which the caller drops or refuses.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from hesse.finding import InputError
from hesse.multimodal.columns import Column
from hesse.multimodal.encoders import audio, image, text
from hesse.multimodal.media import allocate, at_cell, decode_files, find_files
from hesse.multimodal.schema import Schema
from hesse.multimodal.table import Table
from hesse.multimodal.values import codes_of, labels, numbers, texts

__all__ = ["Arrays", "read_inputs"]

FAR = 10.0  # standard deviations: a value further out is brought in to here

Arrays = dict[str, tuple[tuple[NDArray[Any], ...], NDArray[np.bool_]]]
"""By modality: the parts of its data, each ``[rows, ...]`` ("columns" has two), and bool ``[rows]``, what is there."""


def read_inputs(
    schema: Schema,
    table: Table,
    rows: NDArray[np.int64],
    root: Path,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Arrays, dict[int, InputError]]:
    """The input cells of some rows.

    Args:
        schema: says how each column is read.
        table: has all its input columns.
        rows: indices of the rows to read.
        root: the folder that paths in cells are relative to and may not leave.
        progress: called with how many files are decoded and how many there are.

    Returns:
        The arrays, and by position in ``rows`` the first error of each row that cannot be read.

    Raises:
        InputError: a path leads outside, or a number is none; with its row.
    """
    cells = {
        key: texts(table.column(columns[0].name).take(pa.array(rows)))
        for key, columns in schema.modalities.items()
        if key != "columns"
    }
    files = {  # every path is judged before the first file is opened
        key: find_files(table, schema.modalities[key][0].name, cells[key], rows.tolist(), root)
        for key in cells
        if schema.modalities[key][0].kind != "text"
    }
    total = sum(len(column) - column.count(None) for column in files.values())
    done = 0

    def tick(more: int) -> None:
        nonlocal done
        done += more
        if progress is not None:
            progress(done, total)

    arrays: Arrays = {}
    bad: dict[int, InputError] = {}  # the first error of each position
    for key, columns in schema.modalities.items():
        if key == "columns":
            arrays[key] = _read_columns(columns, table, rows)
            continue
        column = columns[0]
        if column.kind == "text":
            data = _read_text(column, cells[key])
        else:
            module = image if column.kind == "image" else audio
            shape, dtype = module.storage(column.settings)
            data = allocate((len(rows), *shape), dtype)
            errors = decode_files(files[key], partial(module.decode, settings=column.settings), data, tick)
            for i, error in errors.items():
                bad.setdefault(i, at_cell(error, table, column.name, int(rows[i]), cells[key][i] or ""))
        arrays[key] = (data,), np.array([cell is not None for cell in cells[key]], bool)
    return arrays, bad


def _read_columns(
    columns: list[Column], table: Table, rows: NDArray[np.int64]
) -> tuple[tuple[NDArray[np.float32], NDArray[np.int64]], NDArray[np.bool_]]:
    """Numbers ``[N, n]`` and categories ``[N, m]``; present is a row with any value."""
    measured = [column for column in columns if column.kind == "number"]
    named = [column for column in columns if column.kind == "category"]
    floats = np.empty((len(rows), len(measured)), np.float32)
    codes = np.empty((len(rows), len(named)), np.int64)
    present = np.zeros(len(rows), bool)
    for j, column in enumerate(measured):
        values = numbers(table, column.name)[rows]
        present |= ~np.isnan(values)
        mean, std = column.settings["mean"], column.settings["std"]
        floats[:, j] = (np.clip(values, mean - FAR * std, mean + FAR * std) - mean) / std
    for j, column in enumerate(named):
        values = labels(table.column(column.name)).take(pa.array(rows))
        present |= values.is_valid().to_numpy(zero_copy_only=False)
        known = column.settings["values"]
        codes[:, j] = 1 + codes_of(values, known, unknown=len(known) if column.settings["other"] else -1)
    return (floats, codes), present


def _read_text(column: Column, cells: list[str | None]) -> NDArray[Any]:
    shape, dtype = text.storage(column.settings)
    data = allocate((len(cells), *shape), dtype)
    for i, cell in enumerate(cells):
        if cell is not None:
            data[i] = text.decode(cell, column.settings)
    return data
