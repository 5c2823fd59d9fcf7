"""What is to be predicted: one class of several, any number of labels, or a quantity, found by looking at the cells.

Lists are labels. Texts and truth values are classes, unless they hold several labels each; so are whole numbers of
which there are few and each comes often (ratings, digits); every other number is a quantity. ``--column
TARGET=category``, ``=labels`` or ``=number`` decides otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from hesse.finding import InputError
from hesse.multimodal.columns import Column, Kind, is_few, refuse_mixed
from hesse.multimodal.fit import moments
from hesse.multimodal.label_lists import holds_lists, likely_separator, read_labels, separator_of
from hesse.multimodal.table import Table
from hesse.multimodal.values import codes_of, labels, numbers, require_readable, short, try_numbers

__all__ = ["IGNORED", "Found", "Target", "find_target", "read_targets", "refuse_weights", "strata_of"]

Task = Literal["classification", "multilabel", "regression"]

IGNORED = -100  # the class of a row that has none, as torch's cross_entropy leaves it out
MOST_NUMBERED_CLASSES = 20
MOST_LABELS = 2000  # each is an output and a column of targets in memory
LARGEST = 1e30  # of a quantity; its standardised values and their squares must fit single precision


@dataclass(frozen=True)
class Target:
    """What is predicted from a row, and how outputs of the model say it.

    Attributes:
        name: of the column.
        task: "classification" (one class of several, two included), "multilabel" (any number of labels) or
            "regression".
        classes: labels in the order of the outputs; empty for regression.
        mean, scale: a quantity is standardised as ``(value - mean) / scale``; 0 and 1 otherwise.
        weights: what a row of each class counts in the loss, or for labels what a row that has one counts beside a row
            that has not; empty if all count alike.
        share: of the training rows that have the target.
        separator: of the labels in a cell of text, "json" for JSON lists; empty where there are none.
        prior: of each class the share of the training rows, as the loss weighs them, or of each label the share of rows
            that have it: what to answer where nothing is known. Empty for regression, whose mean is 0 by now.
    """

    name: str
    task: Task
    classes: tuple[str, ...] = ()
    mean: float = 0.0
    scale: float = 1.0
    weights: tuple[float, ...] = ()
    share: float = 1.0
    separator: str = ""
    prior: tuple[float, ...] = ()

    @property
    def width(self) -> int:
        """Number of the model's outputs: one a class, or 1."""
        return len(self.classes) or 1

    def to_json(self) -> dict[str, Any]:
        """The target as a JSON object; :meth:`from_json` reads it back."""
        return {name: list(item) if isinstance(item, tuple) else item for name, item in asdict(self).items()}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Target:
        fields: dict[str, Any] = {name: tuple(x) if isinstance(x, list) else x for name, x in value.items()}
        return cls(**fields)


@dataclass(frozen=True)
class Found:
    """A target column as found.

    Attributes:
        column: its row in the column table.
        task, classes, separator: as of :class:`Target`.
        values: of every row of the table: float64 ``[rows]`` of a quantity, NaN where missing; int64 ``[rows]`` of
            classes, -100 where missing; float32 ``[rows, labels]`` of labels, 0 or 1, NaN where missing.
    """

    column: Column
    task: Task
    classes: tuple[str, ...]
    separator: str
    values: NDArray[Any]

    @property
    def present(self) -> NDArray[np.bool_]:
        """bool ``[rows]``: which have the target."""
        return _present(self.values)

    def target(self, table: Table, train: NDArray[np.int64], weigh: bool = False) -> Target:
        """The target, with statistics of the training rows; ``weigh`` by the rarity of classes.

        Raises:
            InputError: no training row has the target, or all of those that do are of one class.
        """
        own = self.values[train]
        known = own[_present(own)]
        if not len(known) or (self.task != "regression" and (known == known[0]).all()):
            raise InputError(
                "one class",
                table.where(self.column.name),
                f"Every row that is trained on has the same class, '{short(self._label(known[0]))}'."
                if len(known)
                else "No row that is trained on has the target.",
                "Mark other rows to train on in the split column, or add some.",
            )
        share = len(known) / len(train)
        if self.task == "regression":
            mean, scale = moments(known)
            return Target(self.column.name, self.task, (), mean, scale, share=share)
        weights = _balanced(self.task, known, len(self.classes)) if weigh else ()
        prior = _prior(self.task, known, len(self.classes), np.array(weights or 1.0))
        return Target(self.column.name, self.task, self.classes, 0.0, 1.0, weights, share, self.separator, prior)

    def _label(self, value: Any) -> str:
        if self.task == "classification":
            return self.classes[int(value)]
        return "|".join(name for name, has in zip(self.classes, value, strict=True) if has)


def find_target(table: Table, name: str, override: str | None = None) -> Found:
    """Decide between classification, labels and regression.

    Raises:
        InputError: no value, one value only, free text, words among numbers, or a number too large.
    """
    values = table.column(name)
    lists = holds_lists(values)
    if override not in (None, "category", "labels", "number") or (lists and override not in (None, "labels")):
        raise InputError(
            "unknown kind",
            table.where(name),
            f"A target {'of lists ' if lists else ''}cannot be read as '{override}'.",
            "A target is a category (classification), labels (several in a cell) or a number (regression).",
            value=override,
        )
    if lists or override == "labels":
        asked = "" if lists else separator_of(_texts(table, name))
        return _find_labels(table, name, asked, "" if lists else "as asked")
    require_readable(table, name)
    known = pc.drop_null(values)
    distinct = pc.unique(labels(known))
    if len(distinct) < 2:
        raise _nothing_to_tell(table, name, short(distinct[0].as_py()) if len(distinct) else None)
    if override is None and pa.types.is_large_string(values.type):
        separator = likely_separator(values)
        if separator is not None:
            return _find_labels(table, name, separator, "")
    kind, reason = _kind(table, name, values, len(distinct), override)
    column = Column(name, kind, "target", reason, values.null_count, len(distinct), short(known[0].as_py()))
    if kind == "number":
        return Found(column, "regression", (), "", _quantity(table, name))
    classes = tuple(sorted(distinct.to_pylist(), key=_natural))
    return Found(column, "classification", classes, "", _codes(labels(values), classes))


def read_targets(
    targets: Sequence[Target], table: Table
) -> tuple[NDArray[np.int64], NDArray[Any] | tuple[NDArray[Any], ...]]:
    """Rows with a target, and their targets.

    Returns:
        Indices of the rows that have any of the targets. Of one target the values: int64 ``[n]`` classes, float32
        ``[n, labels]`` of 0 and 1, or float32 ``[n, 1]`` standardised values. Of several a tuple of these, with -100
        for a class and NaN for labels and values that are missing in a row.

    Raises:
        InputError: a class that the model does not know, or a word where a number is expected; with its row.
    """
    columns = [_read(target, table) for target in targets]
    rows = np.flatnonzero(np.logical_or.reduce([_present(column) for column in columns]))
    kept = tuple(column[rows] for column in columns)
    return rows, kept if len(kept) > 1 else kept[0]


def strata_of(found: Sequence[Found]) -> NDArray[np.int64]:
    """int64 ``[rows]``: what each part of a split should have its share of.

    That is the class of the first target that has classes; for labels, the rarest label of the row, so that the labels
    hardest to share out are shared out first (as in Sechidis, Tsoumakas and Vlahavas, 2011).
    """
    for one in found:
        if one.task == "classification":
            codes: NDArray[np.int64] = one.values
            return codes
        if one.task == "multilabel":
            has = np.nan_to_num(one.values) > 0
            order = np.argsort(has.sum(0), kind="stable")
            rarest = order[has[:, order].argmax(1)]
            return np.where(has.any(1), rarest, np.where(one.present, -1, IGNORED)).astype(np.int64)
    return np.zeros(len(found[0].values), np.int64)


def refuse_weights(class_weights: str | None, found: Sequence[Found]) -> None:
    """Raise InputError unless there is a way of weighing that is called so, and something to weigh."""
    if class_weights not in (None, "balanced"):
        message = f"There are no class weights '{class_weights}'."
        raise InputError("unknown weights", "class_weights", message, "Choose balanced.", value=class_weights)
    if class_weights and all(one.task == "regression" for one in found):
        raise InputError(
            "no classes",
            "class_weights",
            "The target is a quantity: it has no classes to weigh.",
            "Leave class weights away, or use --column TARGET=category if its values are classes.",
        )


# -- kinds --------------------------------------------------------------------------------------------------------


def _kind(table: Table, name: str, values: pa.Array, unique: int, override: str | None) -> tuple[Kind, str]:
    rows = len(values) - values.null_count
    classes = f"target: {unique} classes"
    if override == "category":
        return "category", f"{classes}, as asked"
    if override == "number":
        return "number", "target: a quantity, as asked"
    parsed = try_numbers(values)
    if parsed is not None:
        whole = pc.all(pc.equal(parsed, pc.round(parsed))).as_py()
        if whole and (unique == 2 or (unique <= MOST_NUMBERED_CLASSES and is_few(unique, rows))):
            return "category", f"{classes}, whole numbers"
        return "number", f"target: a quantity, {unique} different values"
    if unique > MOST_NUMBERED_CLASSES or not is_few(unique, rows):
        refuse_mixed(table, name)
    if unique > 20 and unique * 2 > rows:
        raise InputError(
            "unusable target",
            table.where(name),
            f"{unique} different texts in {rows} rows are not classes: most have one row only.",
            f"Choose a target whose values repeat, or insist with --column {name}=category.",
            value=unique,
        )
    return "category", classes


def _find_labels(table: Table, name: str, separator: str, reason: str) -> Found:
    values = table.column(name)
    rows, names = read_labels(table, name, separator)
    distinct = pc.unique(names)
    present = values.is_valid().to_numpy(zero_copy_only=False)
    if not len(distinct):
        raise _nothing_to_tell(table, name, "[]" if present.any() else None)
    if len(distinct) > 20 and len(distinct) * 2 > present.sum():
        raise InputError(
            "unusable target",
            table.where(name),
            f"{len(distinct)} different labels in {present.sum()} rows: most stand in one row only.",
            f"Choose a target whose labels repeat; if cells are no lists, use --column {name}=category.",
            value=len(distinct),
        )
    if len(distinct) > MOST_LABELS:
        raise InputError(
            "too many labels",
            table.where(name),
            f"The cells hold {len(distinct)} different labels.",
            f"Up to {MOST_LABELS} can be predicted: join or leave out the rarest.",
            value=len(distinct),
        )
    classes = tuple(sorted(distinct.to_pylist(), key=_natural))
    found = _indicators(rows, names, classes, present)
    if (found[present] == found[present][0]).all():
        raise _nothing_to_tell(table, name, "|".join(names.filter(pa.array(rows == rows[0])).to_pylist()))
    how = {"": "lists", "json": "JSON lists"}.get(separator, f"separated by '{separator.strip()}'")
    words = ", ".join(filter(None, (f"target: {len(classes)} labels", how, reason)))
    first = values[int(np.flatnonzero(present)[0])].as_py()
    example = short("|".join(map(str, first)) if isinstance(first, list) else first)
    column = Column(name, "category", "target", words, values.null_count, len(classes), example)
    return Found(column, "multilabel", classes, separator, found)


def _nothing_to_tell(table: Table, name: str, only: str | None) -> InputError:
    what = "missing" if only is None else f"the same, '{only}'"
    return InputError(
        "no target" if only is None else "one class",
        table.where(name),
        f"Every value of the target is {what}: there is nothing to tell apart.",
        "Choose another target, or add rows with other values.",
    )


# -- values -------------------------------------------------------------------------------------------------------


def _read(target: Target, table: Table) -> NDArray[Any]:
    """The values of every row, as in ``Found.values``, standardised where they are quantities."""
    if target.task == "regression":
        standard = (numbers(table, target.name) - target.mean) / target.scale
        return standard.astype(np.float32)[:, None]
    values = table.column(target.name)
    if target.task == "multilabel":
        rows, names = read_labels(table, target.name, target.separator)
    else:
        names = labels(values)
        rows = np.arange(len(values))
    new = rows[codes_of(names, list(target.classes), unknown=-2) == -2]
    if new.size:
        cell = values[int(new[0])].as_py()
        raise InputError(
            "unknown class",
            table.where(target.name, int(new[0])),
            f"The model was not trained on the class '{short(cell)}'.",
            f"It knows: {', '.join(short(c) for c in target.classes[:20])}.",
        )
    if target.task == "classification":
        return _codes(names, target.classes)
    return _indicators(rows, names, target.classes, values.is_valid().to_numpy(zero_copy_only=False))


def _texts(table: Table, name: str) -> pa.Array:
    require_readable(table, name)
    return pc.cast(table.column(name), pa.large_string())


def _quantity(table: Table, name: str) -> NDArray[np.float64]:
    quantity = numbers(table, name)
    huge = np.flatnonzero(np.abs(quantity) > LARGEST)
    if huge.size:
        raise InputError(
            "number too large",
            table.where(name, int(huge[0])),
            f"The target is {quantity[huge[0]]:g}; models compute in single precision, up to 3e38.",
            "Correct the cell, or give the target in a larger unit.",
            value=float(quantity[huge[0]]),
        )
    return quantity


def _codes(cells: pa.Array, classes: Sequence[str]) -> NDArray[np.int64]:
    codes = codes_of(cells, list(classes), unknown=IGNORED)
    return np.where(codes < 0, IGNORED, codes)


def _indicators(
    rows: NDArray[np.int64], names: pa.Array, classes: Sequence[str], present: NDArray[np.bool_]
) -> NDArray[np.float32]:
    result = np.zeros((len(present), len(classes)), np.float32)
    result[rows, codes_of(names, list(classes), unknown=-1)] = 1
    result[~present] = np.nan
    return result


def _present(values: NDArray[Any]) -> NDArray[np.bool_]:
    """Which rows of classes ``[n]``, quantities ``[n]`` or ``[n, 1]``, or labels ``[n, labels]`` are not missing."""
    if values.dtype == np.int64:
        here: NDArray[np.bool_] = values != IGNORED
        return here
    return ~np.isnan(values if values.ndim == 1 else values[:, 0])


def _balanced(task: Task, known: NDArray[Any], classes: int) -> tuple[float, ...]:
    """``n / (k n_c)``, k the number of classes that occur; for labels, rows without over rows with. 1 where none is."""
    if task == "classification":
        counts = np.bincount(known, minlength=classes)
        weights = len(known) / (np.count_nonzero(counts) * np.maximum(counts, 1))
    else:
        counts = known.sum(0, dtype=np.float64)
        weights = (len(known) - counts) / np.maximum(counts, 1)
    return tuple(np.where(counts > 0, weights, 1.0).tolist())


def _prior(task: Task, known: NDArray[Any], classes: int, weights: NDArray[np.float64]) -> tuple[float, ...]:
    """The constant answer with the least loss. What never occurs counts half a row: no answer is certain."""
    n = len(known)
    if task == "classification":
        counts = weights * np.maximum(np.bincount(known, minlength=classes), 0.5)
        return tuple((counts / counts.sum()).tolist())
    counts = np.clip(known.sum(0, dtype=np.float64), 0.5, n - 0.5)
    return tuple((weights * counts / (weights * counts + n - counts)).tolist())


def _natural(label: str) -> tuple[bool, float, str]:
    """Numbers in their own order, before words in theirs."""
    try:
        return False, float(label), label
    except ValueError:
        return True, 0.0, label
