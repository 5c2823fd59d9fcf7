"""What encoding needs to know of a column, chosen from the training rows: sizes, codes, means and deviations.

A column's settings are a JSON object that the schema keeps, so that tomorrow's table is read the same way. Statistics
never see a row that validates or tests.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from hesse.finding import InputError
from hesse.multimodal import dates
from hesse.multimodal.columns import MOST_CATEGORIES, Column
from hesse.multimodal.dates import day_first, days_of
from hesse.multimodal.encoders import audio, image, images, pretrained, text
from hesse.multimodal.encoders.pretrained import Choice
from hesse.multimodal.measured import not_a_date
from hesse.multimodal.media import find_files, find_sequences
from hesse.multimodal.places import turned
from hesse.multimodal.table import Table
from hesse.multimodal.values import labels, numbers, short, texts

__all__ = ["fit_column", "moments"]

MOST_FILES_PLANNED = 1000  # a plan reads a sample, so not every path need be looked up for it
PLANS: dict[str, Callable[[Any], dict[str, Any]]] = {"image": image.plan, "images": images.plan, "audio": audio.plan}
HUGE = 1e100  # larger numbers are taken for this one: their squares must stay finite


def fit_column(
    table: Table, column: Column, train: NDArray[np.int64], root: Path, choice: Choice | None = None
) -> Column:
    """The column with its settings, or those of the encoder chosen; left out if no training row has a value."""
    if choice is not None:
        column = _readable_by_choice(table, column, choice)
    if column.role != "input":
        return column
    if column.kind == "date":
        return _fit_dates(table, column, train)
    if column.kind in ("latitude", "longitude"):
        return _fit_place(table, column, train)
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
        cells = [cell for cell in texts(values) if cell is not None]
        if choice is not None:
            return replace(column, settings=pretrained.plan("text", choice, cells, table.where(column.name)))
        return _noted(column, text.plan(cells))
    return _noted(column, _plan_files(table, column, train[present], root, choice))


def _noted(column: Column, settings: dict[str, Any]) -> Column:
    """The column with its settings; what they note of the cells is for the user, beside the reason."""
    note = settings.pop("note", "")
    return replace(column, settings=settings, reason=f"{column.reason}, {note}" if note else column.reason)


def _fit_dates(table: Table, column: Column, train: NDArray[np.int64]) -> Column:
    values = table.column(column.name)
    first = day_first(values)  # how dates are written is judged by all rows; what they are, by those that train
    days = days_of(values, first)
    wrong = np.flatnonzero(np.isnan(days) & values.is_valid().to_numpy(zero_copy_only=False))
    if wrong.size:  # only where the user insists
        row = int(wrong[0])
        raise not_a_date(table.where(column.name, row), column.name, short(values[row].as_py()))
    known = days[train][~np.isnan(days[train])]
    if not known.size:
        return replace(column, role="ignored", reason="missing in every training row")
    mean, std = moments(_without_outliers(known))
    return replace(column, settings={"day_first": first, "mean": mean, "std": std, **dates.plan(known)})


def _fit_place(table: Table, column: Column, train: NDArray[np.int64]) -> Column:
    """Both halves get the same settings, so that each tells the whole."""
    pair = (column.name, column.settings["with"])
    latitude, longitude = pair if column.kind == "latitude" else pair[::-1]
    angles = np.stack([numbers(table, latitude), turned(numbers(table, longitude))])[:, train]
    angles = angles[:, ~np.isnan(angles).any(0)]
    if not angles.size:
        return replace(column, role="ignored", reason="no training row has both halves of the place")
    spread = [moments(values) for values in angles]
    settings = {"with": pair[1], "mean": [mean for mean, _ in spread], "std": [std for _, std in spread]}
    return replace(column, settings=settings)


def _readable_by_choice(table: Table, column: Column, choice: Choice) -> Column:
    """The column as one that a pretrained encoder reads: repeated texts are texts then, and no categories."""
    if column.kind == "category" and column.role == "input":
        column = replace(column, kind="text", reason="texts")
    if column.kind.removesuffix("s") not in pretrained.KINDS or column.role != "input":
        raise InputError(
            "wrong kind",
            table.where(column.name),
            f"A pretrained encoder was chosen for it, but its kind is {column.kind} ({column.role}: {column.reason}).",
            f"Encoders read {', '.join(pretrained.KINDS)}: say which with --column {column.name}=KIND, or leave "
            f"--encoder {column.name}=... away.",
            value=column.kind,
        )
    share = {"none": "frozen", "all": "trains"}.get(str(choice.trainable), f"last {choice.trainable} blocks train")
    return replace(column, reason=f"{column.reason}, read by {Path(choice.source).name} ({share})")


def _plan_files(
    table: Table, column: Column, rows: NDArray[np.int64], root: Path, choice: Choice | None
) -> dict[str, Any]:
    rows = rows[:: -(-len(rows) // MOST_FILES_PLANNED)]
    chosen = table.column(column.name).take(pa.array(rows))
    files: list[Any] = (
        find_sequences(table, column.name, chosen, rows, root)
        if column.kind == "images"
        else find_files(table, column.name, texts(chosen), rows.tolist(), root)
    )
    if choice is not None:
        there = [file for file in files if file is not None]
        if column.kind != "images":
            return pretrained.plan(column.kind, choice, there, table.where(column.name))
        each = pretrained.plan("image", choice, [path for paths in there for path in paths], table.where(column.name))
        return {**each, "length": images.usual_length(there)}
    plan = PLANS[column.kind]
    try:
        return plan([file for file in files if file is not None])
    except InputError as error:  # none of a sample could be read: not a matter of a few bad rows
        f = error.finding
        raise InputError(
            f.kind,
            f"{table.where(column.name)} ({f.where})",
            f"None of the {column.kind.removesuffix('s')} files looked at can be read. The first: {f.message}",
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
