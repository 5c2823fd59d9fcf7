"""Columns that become numbers: quantities, dates and places, standardised, NaN where something is missing.

A quantity is one number, a date several (:mod:`~hesse.multimodal.dates`), and the latitude of a place stands for both
of its columns (:mod:`~hesse.multimodal.places`). They differ in how a cell becomes numbers, and in nothing behind that.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from hesse.finding import InputError
from hesse.multimodal import dates, places
from hesse.multimodal.columns import Column
from hesse.multimodal.table import Table
from hesse.multimodal.values import numbers, short

__all__ = ["MEASURED", "measure", "width"]

MEASURED = ("number", "date", "latitude", "longitude")
"""The kinds that become numbers."""

FAR = 10.0  # standard deviations: a value further out is brought in to here


def width(column: Column) -> int:
    """How many numbers a column becomes. A place's are all counted with its latitude."""
    if column.kind == "date":
        return dates.width(column.settings)
    return {"number": 1, "latitude": places.WIDTH, "longitude": 0}[column.kind]


def measure(
    column: Column, table: Table, rows: NDArray[np.int64]
) -> tuple[NDArray[np.float32], NDArray[np.bool_], dict[int, InputError]]:
    """The numbers of one column on some rows.

    Returns:
        float32 ``[rows, width]``; bool ``[rows]``, where there is a value; and by position in ``rows`` the error of
        each cell that is no date or no angle.

    Raises:
        InputError: a column of numbers holds something else; with its row.
    """
    settings = column.settings
    if column.kind == "date":
        days = dates.days_of(table.column(column.name), settings["day_first"])[rows]
        return _bounded(dates.measures(days, settings)), ~np.isnan(days), _not_dates(column, table, rows, days)
    values = numbers(table, column.name)[rows]
    if column.kind == "number":
        mean, std = settings["mean"], settings["std"]
        standard = (np.clip(values, mean - FAR * std, mean + FAR * std) - mean) / std
        return standard.astype(np.float32)[:, None], ~np.isnan(values), {}
    errors = {
        int(i): places.not_an_angle(table.where(column.name, int(rows[i])), column.kind, float(values[i]))
        for i in np.flatnonzero(places.off_the_globe(column.kind, values))
    }
    if column.kind == "longitude":
        return np.empty((len(rows), 0), np.float32), ~np.isnan(values), errors
    place = places.measures(values, numbers(table, settings["with"])[rows], settings)
    return _bounded(place), ~np.isnan(values), errors


def _bounded(values: NDArray[Any]) -> NDArray[np.float32]:
    return np.asarray(np.clip(values, -FAR, FAR), np.float32)


def _not_dates(
    column: Column, table: Table, rows: NDArray[np.int64], days: NDArray[np.float64]
) -> dict[int, InputError]:
    values = table.column(column.name)
    there = values.is_valid().to_numpy(zero_copy_only=False)[rows]
    errors = {}
    for i in np.flatnonzero(np.isnan(days) & there).tolist():
        word = short(values[int(rows[i])].as_py())
        errors[i] = not_a_date(table.where(column.name, int(rows[i])), column.name, word)
    return errors


def not_a_date(where: str, name: str, word: str) -> InputError:
    """The error about one cell."""
    return InputError(
        "not a date",
        where,
        f"The value '{word}' is not a date, and the column is read as dates.",
        f"Write it like 2024-12-31 or 2024-12-31 23:59, empty the cell, or train with --column {name}=text.",
        value=word,
    )
