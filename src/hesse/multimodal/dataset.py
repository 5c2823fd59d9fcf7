"""The table as tensors: every modality with its mask of presence, the targets, and which rows they came from.

A missing cell is a zero with ``present = False``, never a made-up value. Cells that cannot be read stop
everything, or, if asked, cost their rows: those are dropped, counted and listed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from hesse.finding import Finding, InputError
from hesse.multimodal.inputs import read_inputs
from hesse.multimodal.label_lists import JSON
from hesse.multimodal.model import Data
from hesse.multimodal.schema import Schema
from hesse.multimodal.sequences import is_list_of_texts
from hesse.multimodal.table import Table, close_names
from hesse.multimodal.target import read_targets
from hesse.multimodal.values import require_readable

__all__ = ["Dataset", "encode", "read_rows", "require_columns"]

MOST_LISTED = 20  # findings about single rows

Targets = Tensor | tuple[Tensor, ...]
Indices = Tensor | NDArray[np.int64] | Sequence[int] | slice


@dataclass(frozen=True)
class Dataset:
    """N rows of a table, ready for ``FusedModel``.

    Attributes:
        inputs: for each modality ``(data, present)``: data ``[N, ...]`` as its encoder takes them, present
            bool ``[N]``.
        targets: int64 ``[N]`` classes, float32 ``[N, labels]`` of 0 and 1, float32 ``[N, 1]`` standardised values, or
            None; of several targets a tuple of these, where a class may be -100 and a number NaN: missing in this row.
        rows: int64 ``[N]``, the table's row of each, ascending.
        findings: rows that were left out, and why.
    """

    inputs: dict[str, tuple[Data, Tensor]]
    targets: Targets | None
    rows: Tensor
    findings: list[Finding] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, indices: Indices) -> tuple[dict[str, tuple[Data, Tensor]], Targets | None]:
        """Inputs and targets of some positions (0 to N - 1), as ``hesse.closure`` takes them."""
        at = indices if isinstance(indices, slice) else torch.as_tensor(indices)
        inputs = {key: (_at(data, at), present[at]) for key, (data, present) in self.inputs.items()}
        return inputs, None if self.targets is None else _at(self.targets, at)

    def positions(self, rows: NDArray[np.int64]) -> Tensor:
        """Where the table's rows ``rows`` are in this dataset, int64; rows that were left out are skipped."""
        kept = np.isin(self.rows.numpy(), rows, assume_unique=True)
        return torch.from_numpy(np.flatnonzero(kept))


def encode(
    schema: Schema,
    table: Table,
    *,
    root: Path,
    skip_bad_rows: bool = False,
    with_target: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> Dataset:
    """Read the cells of a table as a schema says.

    Args:
        schema: from :func:`~hesse.multimodal.schema.make_schema`, or a run folder.
        table: the table it was made from, or another one with the same input columns.
        root: the folder that paths in cells are relative to and may not leave.
        skip_bad_rows: leave out rows with a file that cannot be read, instead of raising.
        with_target: also read the target, and leave out rows without one; otherwise the table need not have
            it.
        progress: called with how many files are decoded and how many there are.

    Raises:
        InputError: a column is absent, a number is none, a class is new, a path leads outside, or (without
            ``skip_bad_rows``) a file cannot be read; each with its row.

    Example:
        >>> import pyarrow
        >>> from hesse.multimodal import make_schema, read_table
        >>> weights, species = [4.0, 21.5, None, 23.5] * 5, ["cat", "dog"] * 10
        >>> table = read_table(pyarrow.table({"weight": weights, "species": species}))
        >>> schema, parts = make_schema(table, "species", root=Path())
        >>> inputs, targets = encode(schema, table, root=Path()).batch(slice(0, 3))
        >>> (numbers, categories), present = inputs["columns"]
        >>> numbers.shape, categories.shape, present.tolist(), targets.tolist()
        (torch.Size([3, 1]), torch.Size([3, 0]), [True, True, False], [0, 1, 0])
    """
    data, bad = read_rows(schema, table, root=root, with_target=with_target, progress=progress)
    if bad:
        data.findings.extend(_bad_rows(bad, len(data) + len(bad), table, skip_bad_rows))
    return data


def read_rows(
    schema: Schema,
    table: Table,
    *,
    root: Path,
    with_target: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Dataset, dict[int, InputError]]:
    """The rows that can be read, as :func:`encode` reads them, and what is wrong with each of the others.

    Returns:
        The rows, and the first error of each row (from 0) that has a cell which cannot be read.

    Raises:
        InputError: a column is absent, a class is new, or a path leads outside.
    """
    table, findings = require_columns(schema, table, with_target)
    rows = np.arange(len(table))
    targets = None
    if with_target:
        rows, targets = read_targets(schema.targets, table)
        if len(rows) < len(table):
            findings.append(_without_target(schema, table, len(table) - len(rows)))

    arrays, bad = read_inputs(schema, table, rows, root, progress)
    errors = {int(rows[i]): error for i, error in bad.items()}
    if bad:
        keep = np.setdiff1d(np.arange(len(rows)), list(bad))
        rows = rows[keep]
        targets = None if targets is None else _at(targets, keep)
        arrays = {key: (tuple(_keep(part, keep) for part in data), here[keep]) for key, (data, here) in arrays.items()}
    inputs = {
        key: (
            torch.from_numpy(data[0]) if len(data) == 1 else tuple(map(torch.from_numpy, data)),
            torch.from_numpy(here),
        )
        for key, (data, here) in arrays.items()
    }
    return Dataset(inputs, _tensors(targets), torch.from_numpy(rows), findings), errors


def require_columns(schema: Schema, table: Table, with_target: bool) -> tuple[Table, list[Finding]]:
    """The table with all columns that the schema names.

    Where there is nothing to learn, an input column may be absent: its values are then missing in every row, and a
    finding says so. One at least must be there.
    """
    inputs = [column.name for column in schema.inputs]
    targets = {target.name: target for target in schema.targets} if with_target else {}
    absent = [name for name in (*inputs, *targets) if name not in table.names]
    listed = ", ".join(f"'{name}'" for name in absent)
    if absent and (with_target or len(absent) == len(inputs)):
        raise InputError(
            "missing column",
            table.name,
            f"The table lacks {listed}, which the model was trained with.",
            f"Add what is missing, empty if need be, or rename: the columns are {', '.join(table.names)}.",
            value=absent[0],
        )
    data = table.data
    for name in absent:
        data = data.append_column(name, pa.nulls(len(table), pa.large_string()))
    findings = [_absent(name, table) for name in absent]
    table = replace(table, data=data)
    of_images = {column.name for column in schema.inputs if column.kind == "images"}
    for name in (*inputs, *targets):
        # Labels are also read from lists, and so are paths.
        if not (name in targets and targets[name].task == "multilabel") and not (
            name in of_images and is_list_of_texts(table.column(name))
        ):
            require_readable(table, name)
    return table, findings


def _absent(name: str, table: Table) -> Finding:
    return Finding(
        "missing column",
        table.where(name),
        "The table lacks this column, which the model was trained with: it counts as missing in every row.",
        close_names(name, table.names),
        value=name,
    )


def _tensors(targets: NDArray[Any] | tuple[NDArray[Any], ...] | None) -> Targets | None:
    if isinstance(targets, tuple):
        return tuple(map(torch.from_numpy, targets))
    return None if targets is None else torch.from_numpy(targets)


def _keep(data: NDArray[Any], keep: NDArray[np.intp]) -> NDArray[Any]:
    """The rows ``keep`` (ascending), moved to the front in place: a copy might not fit into memory."""
    for to, start in enumerate(keep.tolist()):
        if to != start:
            data[to] = data[start]
    return data[: len(keep)]


def _bad_rows(bad: dict[int, InputError], rows: int, table: Table, skip: bool) -> list[Finding]:
    """What to say about rows that cannot be read; raises if they may not be skipped, or none is left."""
    first, *others = [bad[i] for i in sorted(bad)]
    f = first.finding
    if not skip or len(bad) == rows:
        rest = f" {len(others)} of the other {rows - 1} rows cannot be read either." if others else ""
        remedy = "" if len(bad) == rows else " Or leave out rows that cannot be read with --skip-bad-rows."
        raise InputError(f.kind, f.where, f"{f.message}{rest}", f"{f.remedy}{remedy}".strip(), f.value) from first
    count = Finding(
        "skipped rows",
        table.name,
        f"{len(bad)} of {rows} rows cannot be read and were left out.",
        "The first of them are listed below." if len(bad) > MOST_LISTED else "",
        value=len(bad),
    )
    listed = [error.finding for error in (first, *others)[:MOST_LISTED]]
    return [count, *(Finding(f.kind, f.where, f.message, f.remedy, "warning", f.value) for f in listed)]


def _without_target(schema: Schema, table: Table, count: int) -> Finding:
    return Finding(
        "missing target",
        table.where(schema.targets[0].name),
        f"{count} of {len(table)} rows have no target and were left out.",
        "Fill the cells in if those rows should count." + _none_of(schema),
        value=count,
    )


def _none_of(schema: Schema) -> str:
    """How a cell says that none of the labels is true, where an empty one says that nothing is known."""
    between = {target.separator for target in schema.targets if target.task == "multilabel"} - {""}
    said = " or ".join("[]" if one == JSON else f"'{one.strip()}' alone" for one in sorted(between))
    return (
        f" If a row has none of the labels, write {said}: an empty cell is one that nobody has filled in."
        if said
        else ""
    )


def _at(data: Any, at: Any) -> Any:
    return tuple(part[at] for part in data) if isinstance(data, tuple) else data[at]
