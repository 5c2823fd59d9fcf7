"""The schema: everything a model must know about a table, found on the training rows and kept with the model.

Which columns go in and as what, what is predicted, and the numbers that turn cells into tensors (means,
deviations, codes, sizes). It is plain JSON, so that a run folder is enough to read tomorrow's table the same
way.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from hesse.finding import InputError
from hesse.multimodal.columns import Column, describe
from hesse.multimodal.fit import fit_column, moments
from hesse.multimodal.split import Parts, prescribed_split, stratified_split
from hesse.multimodal.table import Table, close_names
from hesse.multimodal.target import Target, find_target

__all__ = ["Schema", "make_schema"]

Task = Literal["classification", "regression"]


@dataclass(frozen=True)
class Schema:
    """How a table becomes tensors.

    Attributes:
        columns: every column of the table, in its order.
        target: the name of the column to predict.
        task: "classification" or "regression".
        classes: labels in the order of the outputs; empty for regression.
        mean, scale: a regression target is standardised as ``(value - mean) / scale``; 0 and 1 for
            classification.
    """

    columns: tuple[Column, ...]
    target: str
    task: Task
    classes: tuple[str, ...] = ()
    mean: float = 0.0
    scale: float = 1.0

    @property
    def outputs(self) -> int:
        """Width of the model's output: the number of classes, or 1."""
        return len(self.classes) if self.task == "classification" else 1

    @property
    def inputs(self) -> list[Column]:
        return [column for column in self.columns if column.role == "input"]

    @property
    def modalities(self) -> dict[str, list[Column]]:
        """The model's inputs by name: every image, audio and text column, then "columns" for all others."""
        result: dict[str, list[Column]] = {}
        for column in self.inputs:
            if column.kind not in ("number", "category"):
                slug = f"{column.kind}_{_slug(column.name)}"
                while slug in result:
                    slug += "_"
                result[slug] = [column]
        together = [column for column in self.inputs if column.kind in ("number", "category")]
        return {**result, "columns": together} if together else result

    def model_settings(self) -> dict[str, dict[str, Any]]:
        """What ``FusedModel`` takes: for each modality its kind and its encoder's settings."""
        result: dict[str, dict[str, Any]] = {}
        for key, columns in self.modalities.items():
            if key != "columns":
                result[key] = {"kind": columns[0].kind, **columns[0].settings}
                continue
            codes = [column.settings for column in columns if column.kind == "category"]
            result[key] = {
                "kind": "columns",
                "numbers": len(columns) - len(codes),
                "categories": [1 + len(code["values"]) + code["other"] for code in codes],
            }
        return result

    def rows(self) -> list[dict[str, Any]]:
        """The column table for screen and report: name, kind, role, reason, missing, unique, example."""
        return [column.row() for column in self.columns]

    def to_json(self) -> dict[str, Any]:
        """The schema as a JSON object; :meth:`from_json` reads it back."""
        return {
            "target": self.target,
            "task": self.task,
            "classes": list(self.classes),
            "mean": self.mean,
            "scale": self.scale,
            "columns": [column.to_json() for column in self.columns],
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Schema:
        columns = tuple(Column(**column) for column in value["columns"])
        return cls(columns, value["target"], value["task"], tuple(value["classes"]), value["mean"], value["scale"])


def make_schema(
    table: Table,
    target: str,
    *,
    overrides: Mapping[str, str] | None = None,
    split_column: str | None = None,
    root: Path,
    seed: int = 0,
) -> tuple[Schema, Parts]:
    """Find out what the columns are and which rows train.

    Args:
        table: the table to train on.
        target: the column to predict.
        overrides: column name to "image", "audio", "text", "number", "category" or "ignore"; for the target,
            "category" or "number".
        split_column: a column that says train, valid or test in every row; otherwise the split is stratified
            by class.
        root: the folder that paths in cells are relative to and may not leave.
        seed: of the split.

    Returns:
        The schema, with all statistics from the training rows only, and the row indices of "train", "valid"
        and "test". Rows without a target are in none of them.

    Raises:
        InputError: no such column, one row, one class, a column that cannot be read, nothing to learn from.

    Example:
        >>> import pyarrow
        >>> from hesse.multimodal import read_table
        >>> table = read_table(pyarrow.table({"weight": [4.0, 21.5] * 10, "species": ["cat", "dog"] * 10}))
        >>> schema, parts = make_schema(table, "species", root=Path())
        >>> schema.classes, [row["kind"] for row in schema.rows()]
        (('cat', 'dog'), ['number', 'category'])
        >>> {name: len(rows) for name, rows in parts.items()}
        {'train': 16, 'valid': 2, 'test': 2}
    """
    target = _known(table, target, "target")
    split_column = None if split_column is None else _known(table, split_column, "split column")
    overrides = {_known(table, name, "column"): kind for name, kind in (overrides or {}).items()}
    if split_column == target:
        raise InputError(
            "unusable target",
            table.where(target),
            "The target is also the split column.",
            "Choose another one.",
        )
    if len(table) == 1:
        raise InputError("one row", table.name, "The table has one row.", "Training needs many; ten at the least.")

    found = find_target(table, target, overrides.pop(target, None))
    if split_column is None:
        parts = stratified_split(found.strata, found.rows, seed)
    else:
        parts = prescribed_split(table, split_column, found.strata, found.rows, seed)
    if not len(parts["valid"]):
        raise InputError(
            "too few rows",
            table.where(target),
            f"{len(found.rows)} rows with a target are too few: none can be kept back to validate on.",
            "Each class needs a second row; add some.",
        )

    columns = []
    for name in table.names:
        if name == target:
            columns.append(found.column)
        elif name == split_column:
            columns.append(replace(describe(table, name, root, "ignore"), role="split", reason="says which rows train"))
        else:
            columns.append(fit_column(table, describe(table, name, root, overrides.get(name)), parts["train"], root))
    if not any(column.role == "input" for column in columns):
        raise InputError("no inputs", table.name, _why_none(columns), "Check the delimiter, or use --column NAME=KIND.")
    return _schema(columns, found, parts["train"]), parts


def _known(table: Table, name: str, what: str) -> str:
    composed = unicodedata.normalize("NFC", name).strip()
    if composed not in table.names:
        raise InputError(
            f"no such {what}",
            table.name,
            f"The table has no column '{name}'.",
            close_names(composed, table.names),
            value=name,
        )
    return composed


def _why_none(columns: list[Column]) -> str:
    left_out = [f"{column.name} ({column.reason})" for column in columns if column.role == "ignored"]
    return (
        f"No column is left to predict from: {'; '.join(left_out)}." if left_out else "The target is the only column."
    )


def _schema(columns: list[Column], found: Target, train: NDArray[np.int64]) -> Schema:
    if found.values is None:
        return Schema(tuple(columns), found.column.name, "classification", found.classes)
    mean, scale = moments(found.values[train])
    return Schema(tuple(columns), found.column.name, "regression", (), mean, scale)


def _slug(name: str) -> str:
    """A module's name: letters, marks and digits of any script; whatever else (a dot, a blank) becomes _."""
    return "".join(c if unicodedata.category(c)[0] in "LMN" else "_" for c in name)
