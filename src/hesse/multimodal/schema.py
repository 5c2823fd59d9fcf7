"""The schema: everything a model must know about a table, found on the training rows and kept with the model.

Which columns go in and as what, what is predicted, and the numbers that turn cells into tensors (means,
deviations, codes, sizes). It is plain JSON, so that a run folder is enough to read tomorrow's table the same
way.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from hesse.finding import InputError
from hesse.multimodal.columns import Column, describe
from hesse.multimodal.encoders.pretrained import choices, is_frozen
from hesse.multimodal.fit import fit_column
from hesse.multimodal.measured import MEASURED, width
from hesse.multimodal.places import pair_places
from hesse.multimodal.split import Parts, prescribed_split, stratified_split
from hesse.multimodal.table import Table, close_names, unused
from hesse.multimodal.target import Target, find_target, refuse_weights, strata_of

__all__ = ["Schema", "make_schema"]

TOGETHER = (*MEASURED, "category")  # kinds that share one encoder, "columns"


@dataclass(frozen=True)
class Schema:
    """How a table becomes tensors.

    Attributes:
        columns: every column of the table, in its order.
        targets: what is predicted, in the order of the model's outputs.
    """

    columns: tuple[Column, ...]
    targets: tuple[Target, ...]

    @property
    def outputs(self) -> int:
        """Width of the model's output: the sum over the targets of the number of classes, or 1."""
        return sum(target.width for target in self.targets)

    @property
    def slices(self) -> tuple[slice, ...]:
        """Where the outputs of each target are."""
        ends = list(accumulate((target.width for target in self.targets), initial=0))
        return tuple(slice(start, end) for start, end in pairwise(ends))

    @property
    def inputs(self) -> list[Column]:
        return [column for column in self.columns if column.role == "input"]

    @property
    def modalities(self) -> dict[str, list[Column]]:
        """The model's inputs by name: every image, audio and text column, then "columns" for all others."""
        result: dict[str, list[Column]] = {}
        for column in self.inputs:
            if column.kind not in TOGETHER:
                result[unused(f"{column.kind}_{_slug(column.name)}", result)] = [column]
        together = [column for column in self.inputs if column.kind in TOGETHER]
        return {**result, "columns": together} if together else result

    def model_settings(self) -> dict[str, dict[str, Any]]:
        """What ``FusedModel`` takes: for each modality its kind and its encoder's settings."""
        result: dict[str, dict[str, Any]] = {}
        for key, columns in self.modalities.items():
            if key != "columns":
                result[key] = _encoder(columns[0])
                continue
            codes = [column.settings for column in columns if column.kind == "category"]
            result[key] = {
                "kind": "columns",
                "numbers": sum(width(column) for column in columns if column.kind in MEASURED),
                "categories": [1 + len(code["values"]) + code["other"] for code in codes],
            }
        return result

    def rows(self) -> list[dict[str, Any]]:
        """The column table for screen and report: name, kind, role, reason, missing, unique, example."""
        return [column.row() for column in self.columns]

    def to_json(self) -> dict[str, Any]:
        """The schema as a JSON object; :meth:`from_json` reads it back."""
        return {
            "targets": [target.to_json() for target in self.targets],
            "columns": [column.to_json() for column in self.columns],
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Schema:
        columns = tuple(Column(**column) for column in value["columns"])
        if "target" in value:  # written by version 0.1.0
            one = {key: value[key] for key in ("task", "classes", "mean", "scale")}
            value = {"targets": [{"name": value["target"], "weights": (), **one}]}
        return cls(columns, tuple(map(Target.from_json, value["targets"])))


def make_schema(
    table: Table,
    target: str | Sequence[str],
    *,
    overrides: Mapping[str, str] | None = None,
    split_column: str | None = None,
    class_weights: str | None = None,
    encoders: Mapping[str, str] | None = None,
    trainable: Mapping[str, str | int] | None = None,
    root: Path,
    seed: int = 0,
) -> tuple[Schema, Parts]:
    """Find out what the columns are and which rows train.

    Args:
        table: the table to train on.
        target: the column to predict, or several.
        overrides: column name to "image", "images", "audio", "text", "number", "date", "latitude", "longitude",
            "category" or "ignore"; for a target, "category", "labels" or "number".
        split_column: a column that says train, valid or test in every row; otherwise the split is stratified
            by the class of the first target that has classes.
        class_weights: "balanced" weighs rows by the rarity of their class among the training rows.
        encoders: column name to "hf:" and the folder or name of a pretrained checkpoint.
        trainable: column name to how much of its pretrained encoder trains: "none", a number of blocks, or "all".
        root: the folder that paths in cells are relative to and may not leave.
        seed: of the split.

    Returns:
        The schema, with all statistics from the training rows only, and the row indices of "train", "valid"
        and "test". Rows without any target are in none of them.

    Raises:
        InputError: no such column, one row, one class, a column that cannot be read, nothing to learn from.

    Example:
        >>> import pyarrow
        >>> from hesse.multimodal import read_table
        >>> table = read_table(pyarrow.table({"weight": [4.0, 21.5] * 10, "species": ["cat", "dog"] * 10}))
        >>> schema, parts = make_schema(table, "species", root=Path())
        >>> schema.targets[0].classes, [row["kind"] for row in schema.rows()]
        (('cat', 'dog'), ['number', 'category'])
        >>> {name: len(rows) for name, rows in parts.items()}
        {'train': 16, 'valid': 2, 'test': 2}
    """
    asked = [target] if isinstance(target, str) else list(target)
    names = list(dict.fromkeys(_known(table, name, "target") for name in asked))
    split_column = None if split_column is None else _known(table, split_column, "split column")
    overrides = {_known(table, name, "column"): kind for name, kind in (overrides or {}).items()}
    if not names:
        raise InputError("no target", table.name, "No column to predict was named.", close_names("", table.names))
    if split_column in names:
        raise InputError(
            "unusable target",
            table.where(split_column),
            "The target is also the split column.",
            "Choose another one.",
        )
    if len(table) == 1:
        raise InputError("one row", table.name, "The table has one row.", "Training needs many; ten at the least.")

    found = {name: find_target(table, name, overrides.pop(name, None)) for name in names}
    refuse_weights(class_weights, list(found.values()))
    rows = np.flatnonzero(np.logical_or.reduce([one.present for one in found.values()]))
    strata = strata_of(list(found.values()))[rows]
    if split_column is None:
        parts = stratified_split(strata, rows, seed)
    else:
        parts = prescribed_split(table, split_column, strata, rows, seed)
    if not len(parts["valid"]):
        raise InputError(
            "too few rows",
            table.where(names[0]),
            f"{len(rows)} rows with a target are too few: none can be kept back to validate on.",
            "Each class needs a second row; add some.",
        )
    targets = tuple(one.target(table, parts["train"], class_weights is not None) for one in found.values())

    columns = []
    for name in table.names:
        if name in found:
            columns.append(found[name].column)
        elif name == split_column:
            columns.append(replace(describe(table, name, root, "ignore"), role="split", reason="says which rows train"))
        else:
            columns.append(describe(table, name, root, overrides.get(name)))
    columns = pair_places(table, columns, overrides)
    chosen = choices({_known(table, name, "column"): e for name, e in (encoders or {}).items()}, trainable or {})
    columns = [fit_column(table, column, parts["train"], root, chosen.get(column.name)) for column in columns]
    if not any(column.role == "input" for column in columns):
        raise InputError("no inputs", table.name, _why_none(columns), "Check the delimiter, or use --column NAME=KIND.")
    return Schema(tuple(columns), targets), parts


def _encoder(column: Column) -> dict[str, Any]:
    """The kind and the settings of the encoder of one column; a pretrained one stands in a sequence's tower."""
    kind, settings = column.kind, column.settings
    if "source" not in settings:
        return {"kind": kind, **settings}
    if is_frozen(settings):
        encoder = {"kind": "features", **{name: settings[name] for name in ("width", "center", "spread")}}
    else:
        encoder = {"kind": "pretrained", "reads": kind.removesuffix("s"), **settings}
    return {"kind": kind, "tower": encoder} if kind == "images" else encoder


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


def _slug(name: str) -> str:
    """A module's name: letters, marks and digits of any script; whatever else (a dot, a blank) becomes _."""
    return "".join(c if unicodedata.category(c)[0] in "LMN" else "_" for c in name)
