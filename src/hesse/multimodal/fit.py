"""What encoding needs to know of a column, chosen from the training rows: sizes, codes, means and deviations.

A column's settings are a JSON object that the schema keeps, so that tomorrow's table is read the same way. Statistics
never see a row that validates or tests.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from hesse.finding import InputError
from hesse.multimodal.columns import MOST_CATEGORIES, Column
from hesse.multimodal.encoders import audio, image, text
from hesse.multimodal.media import find_files
from hesse.multimodal.table import Table
from hesse.multimodal.values import labels, numbers, texts

__all__ = ["fit_column", "moments"]

MOST_FILES_PLANNED = 1000  # a plan reads a sample, so not every path need be looked up for it
HUGE = 1e100  # larger numbers are taken for this one: their squares must stay finite


def fit_column(table: Table, column: Column, train: NDArray[np.int64], root: Path) -> Column:
    """The column with its settings; left out if no training row has a value."""
    if column.role != "input":
        return column
    if column.kind == "number":
        values = numbers(table, column.name)[train]
        known = values[np.isfinite(values)]
        if not known.size:
            return replace(column, role="ignored", reason="missing in every training row")
        mean, std = moments(_without_outliers(known))
        return replace(column, settings={"mean": mean, "std": std})
    values = table.column(column.name).take(pa.array(train))
    present = np.flatnonzero(values.is_valid().to_numpy(zero_copy_only=False))
    if not present.size:
        return replace(column, role="ignored", reason="missing in every training row")
    if column.kind == "category":
        return replace(column, settings=_codes(pc.drop_null(labels(values))))
    if column.kind == "text":
        return replace(column, settings=text.plan([cell for cell in texts(values) if cell is not None]))
    return replace(column, settings=_plan_files(table, column, train[present], root))


def _plan_files(table: Table, column: Column, rows: NDArray[np.int64], root: Path) -> dict[str, Any]:
    plan = image.plan if column.kind == "image" else audio.plan
    rows = rows[:: -(-len(rows) // MOST_FILES_PLANNED)]
    cells = texts(table.column(column.name).take(pa.array(rows)))
    files = [file for file in find_files(table, column.name, cells, rows.tolist(), root) if file is not None]
    try:
        return plan(files)
    except InputError as error:  # none of a sample could be read: not a matter of a few bad rows
        f = error.finding
        raise InputError(
            f.kind,
            f"{table.where(column.name)} ({f.where})",
            f"None of the {column.kind} files looked at can be read. The first: {f.message}",
            f"{f.remedy} If the column holds something else: --column {column.name}=text.",
            value=f.value,
        ) from error


def _codes(known: pa.Array) -> dict[str, Any]:
    """Categories by falling frequency, then by name; those beyond the limit share one code, "other"."""
    counts = pc.value_counts(known)
    order = sorted(
        zip(counts.field("values").to_pylist(), counts.field("counts").to_pylist(), strict=True),
        key=lambda item: (-item[1], item[0]),
    )
    names = [name for name, _ in order]
    if len(names) <= MOST_CATEGORIES:
        return {"values": names, "other": False}
    return {"values": names[: MOST_CATEGORIES - 1], "other": True}


def moments(values: NDArray[np.float64]) -> tuple[float, float]:
    """Mean and standard deviation; 1 instead of a deviation that rounding alone explains."""
    mean, std = float(values.mean()), float(values.std())
    rounding = 1e-12 * float(np.abs(values).max())
    return mean, std if std > max(rounding, 1 / HUGE) else 1.0


def _without_outliers(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Values brought to within 10 robust deviations of the median: one 1e30 must not flatten the others.

    The deviation of a normal distribution is its interquartile range over 1.349. Where more than half of the
    values are equal that range says nothing, and the values stay as they are.
    """
    values = np.clip(values, -HUGE, HUGE)
    low, middle, high = np.quantile(values, (0.25, 0.5, 0.75))
    reach = 10 * (high - low) / 1.349
    return np.clip(values, middle - reach, middle + reach) if reach > 0 else values
