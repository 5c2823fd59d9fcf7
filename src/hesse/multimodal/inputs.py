"""The cells of the input columns as arrays: every modality with its mask of presence, compact as decoders give them.

A missing cell is a zero with ``present = False``, never a made-up value. A file that cannot be read costs its row,
which the caller drops or refuses.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from hesse.finding import Finding, InputError
from hesse.multimodal.columns import Column
from hesse.multimodal.encoders import audio, image, images, pretrained, text
from hesse.multimodal.measured import MEASURED, measure, width
from hesse.multimodal.media import allocate, at_cell, decode_files, find_files, find_sequences
from hesse.multimodal.schema import Schema
from hesse.multimodal.sequences import evenly
from hesse.multimodal.sniff import instead, refuse_exchanged
from hesse.multimodal.table import Table
from hesse.multimodal.values import codes_of, labels, short, texts

__all__ = ["Arrays", "read_inputs", "unknown"]

MOST_LISTED = 20  # values of one column

DECODERS: dict[str, ModuleType] = {"image": image, "images": images, "audio": audio}

Arrays = dict[str, tuple[tuple[NDArray[Any], ...], NDArray[np.bool_]]]
"""By modality: the parts of its data, each ``[rows, ...]`` ("columns" and "images" have two), and bool ``[rows]``."""


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
    single = {key: columns[0] for key, columns in schema.modalities.items() if key != "columns"}
    values = {key: table.column(column.name).take(pa.array(rows)) for key, column in single.items()}
    files: dict[str, Sequence[Any]] = {}
    for key, column in single.items():  # every path is judged before the first file is opened
        if column.kind == "images":
            files[key] = find_sequences(table, column.name, values[key], rows, root)
        elif column.kind != "text":
            files[key] = find_files(table, column.name, texts(values[key]), rows.tolist(), root)
    to_read = dict(files)
    for key, column in single.items():
        if "source" not in column.settings:
            continue
        if column.kind == "images":
            to_read[key] = _thinned(column, files[key])
        elif column.kind == "text" and pretrained.is_frozen(column.settings):
            to_read[key] = texts(values[key])  # these take as long as files
    total = sum(len(column) - column.count(None) for column in to_read.values())
    done = 0

    def tick(more: int) -> None:
        nonlocal done
        done += more
        if progress is not None:
            progress(done, total)

    arrays: Arrays = {}
    bad: dict[int, InputError] = {}  # the first error of each position
    failed: dict[str, dict[int, InputError]] = {}  # the same by modality, of those read from files
    for key, columns in schema.modalities.items():
        if key == "columns":
            parts, present, errors = _read_columns(columns, table, rows)
            arrays[key] = parts, present
            bad = {**errors, **bad}
            continue
        column = columns[0]
        if "source" in column.settings:
            cells = files[key] if key in files else texts(values[key])
            made, failed[key] = _read_pretrained(column, cells, tick)
            arrays[key] = made, np.array([cell is not None for cell in cells], bool)
            continue
        if column.kind == "text":
            cells = texts(values[key])
            arrays[key] = (_read_text(column, cells),), np.array([cell is not None for cell in cells], bool)
            continue
        there = np.array([file is not None for file in files[key]], bool)
        module = DECODERS[column.kind]
        shape, dtype = module.storage(column.settings)
        data = allocate((len(rows), *shape), dtype)
        failed[key] = decode_files(files[key], partial(module.decode, settings=column.settings), data, tick)
        if column.kind == "images":
            arrays[key] = (data, _counts(column, files[key])), there
        else:
            arrays[key] = (data,), there
    if any(failed.values()):
        refuse_exchanged(table, single, files, failed)
    for key, errors in failed.items():  # texts have none
        for i, error in errors.items():
            told = instead(error, files[key][i], single[key].kind)
            cell = values[key][i].as_py()
            bad.setdefault(i, at_cell(told, table, single[key].name, int(rows[i]), str(cell)))
    return arrays, bad


def unknown(schema: Schema, table: Table) -> list[Finding]:
    """A finding for each column with categories that the training rows did not have; those count as missing.

    Its ``value`` is the number of rows, its ``evidence`` has the most frequent of the values, with their counts.
    """
    findings = []
    for column in schema.inputs:
        if column.kind != "category" or column.settings["other"] or column.name not in table.names:
            continue  # rare categories of the training rows share "other", and so does what is new
        values = labels(table.column(column.name))
        new = codes_of(values, column.settings["values"], unknown=-2) == -2
        rows = np.flatnonzero(new)
        if not rows.size:
            continue
        counts = Counter(values.take(pa.array(rows)).to_pylist()).most_common(MOST_LISTED)
        shown = ", ".join(f"'{short(value, 30)}' ({count})" for value, count in counts[:3])
        findings.append(
            Finding(
                "unknown categories",
                table.where(column.name, int(rows[0])),
                f"{rows.size} of {len(table)} values were in no training row and count as missing: {shown}.",
                "Correct their spelling, or train anew with rows that have them.",
                value=int(rows.size),
                evidence={"values": dict(counts)},
            )
        )
    return findings


def _read_columns(
    columns: list[Column], table: Table, rows: NDArray[np.int64]
) -> tuple[tuple[NDArray[np.float32], NDArray[np.int64]], NDArray[np.bool_], dict[int, InputError]]:
    """Numbers ``[N, n]`` and categories ``[N, m]``; present is a row with any value; errors by position."""
    measured = [column for column in columns if column.kind in MEASURED]
    named = [column for column in columns if column.kind == "category"]
    floats = np.empty((len(rows), sum(map(width, measured))), np.float32)
    codes = np.empty((len(rows), len(named)), np.int64)
    present = np.zeros(len(rows), bool)
    bad: dict[int, InputError] = {}
    start = 0
    for column in measured:
        values, there, errors = measure(column, table, rows)
        floats[:, start : start + values.shape[1]] = values
        start += values.shape[1]
        present |= there
        bad = {**errors, **bad}
    for j, column in enumerate(named):
        values = labels(table.column(column.name)).take(pa.array(rows))
        present |= values.is_valid().to_numpy(zero_copy_only=False)
        known = column.settings["values"]
        codes[:, j] = 1 + codes_of(values, known, unknown=len(known) if column.settings["other"] else -1)
    return (floats, codes), present, bad


def _read_pretrained(
    column: Column, values: Sequence[Any], tick: Callable[[int], None]
) -> tuple[tuple[NDArray[Any], ...], dict[int, InputError]]:
    """What a pretrained encoder gets of paths or texts, and by position the errors: features, or its own arrays."""
    settings, kind = column.settings, column.kind.removesuffix("s")
    shape, dtype = pretrained.storage(settings, kind)
    several = settings["length"] if column.kind == "images" else 1
    data = allocate((len(values) * several, *shape), dtype)
    flat = _thinned(column, values) if column.kind == "images" else values
    if pretrained.is_frozen(settings):
        errors = pretrained.features(settings, kind, flat, data, tick)
    elif kind == "text":
        errors, decode = {}, pretrained.decoder(settings, kind)
        for i, cell in enumerate(flat):
            if cell is not None:
                data[i] = decode(cell)
    else:
        errors = decode_files(flat, pretrained.decoder(settings, kind), data, tick)
    if column.kind != "images":
        return (data,), errors
    rows = {i // several: error for i, error in sorted(errors.items(), reverse=True)}  # the first of each row
    return (data.reshape(len(values), several, *shape), _counts(column, values)), rows


def _thinned(column: Column, sequences: Sequence[Any]) -> list[Any]:
    """The paths that are kept of each row, one row after the other, filled up with None to the planned length."""
    length = column.settings["length"]
    kept = [evenly(paths or (), length) for paths in sequences]
    return [paths[i] if i < len(paths) else None for paths in kept for i in range(length)]


def _counts(column: Column, paths: Sequence[Any]) -> NDArray[np.int64]:
    """How many pictures of each row are kept."""
    return np.array([min(len(some or ()), column.settings["length"]) for some in paths], np.int64)


def _read_text(column: Column, cells: list[str | None]) -> NDArray[Any]:
    shape, dtype = text.storage(column.settings)
    data = allocate((len(cells), *shape), dtype)
    for i, cell in enumerate(cells):
        if cell is not None:
            data[i] = text.decode(cell, column.settings)
    return data
