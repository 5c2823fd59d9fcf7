"""Outputs of a model as columns of a table that people read: classes, labels, numbers, and how sure they are."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from hesse.finding import InputError
from hesse.multimodal import Schema
from hesse.multimodal.label_lists import JSON
from hesse.multimodal.table import unused
from hesse.multimodal.target import Target
from hesse.training.calibration import cuts_of, probabilities, temperature_of

__all__ = ["answer", "flat", "refuse_threshold", "separators"]

MOST_PROBABILITIES = 20  # columns of a target
BAR = "|"  # between the labels of a cell, if the table says nothing else


def answer(
    schema: Schema, outputs: Tensor, calibration: dict[str, Any], threshold: float | str | None = None
) -> pa.Table:
    """Predictions as columns.

    Args:
        outputs: [n, outputs] of the model.
        calibration: the record ``calibration.json``; empty if there is none.
        threshold: from which probability on a row is of the second of two classes, or has a label: a number, or "best"
            for that with the best F1 on the rows that validated. By default the likelier of two classes is predicted,
            and labels by their best thresholds.

    Returns:
        n rows: the prediction under the target's name. For classes also ``confidence``, the probability of the
        predicted one, and, up to 20 classes or labels, ``probability of CLASS`` each; where there are several targets,
        the target's name comes first. Labels are a list in each cell.

    Example:
        >>> schema = Schema((), (Target("species", "classification", ("cat", "dog")),))
        >>> answer(schema, torch.tensor([[2.0, 0.0]]), {}).to_pylist()
        [{'species': 'cat', 'confidence': 0.88..., 'probability of cat': 0.88..., 'probability of dog': 0.11...}]
    """
    columns: dict[str, Any] = {target.name: None for target in schema.targets}

    def put(target: Target, what: str, values: Tensor) -> None:
        name = what if len(schema.targets) == 1 else f"{target.name} {what}"
        columns[unused(name, columns)] = pa.array(values.numpy())

    for target, own in zip(schema.targets, schema.slices, strict=True):
        out = outputs[:, own]
        if target.task == "regression":
            columns[target.name] = pa.array((target.mean + target.scale * out[:, 0].double()).numpy())
            continue
        p = probabilities(target.task, out, temperature_of(calibration, target))
        fitted = calibration.get(target.name, {}).get("threshold")
        cut: Any = fitted if threshold in (None, "best") else threshold
        if target.task == "multilabel":
            columns[target.name] = _labels(target, p, cut)
        else:
            sure, place = p.max(1)
            if threshold is not None and target.width == 2 and cut is not None:
                place = (p[:, 1] >= cut).long()
                sure = p.gather(1, place[:, None])[:, 0]
            columns[target.name] = pa.array(target.classes, pa.string()).take(pa.array(place.numpy()))
            put(target, "confidence", sure)
        if target.width <= MOST_PROBABILITIES:
            for i, name in enumerate(target.classes):
                put(target, f"probability of {name}", p[:, i])
    return pa.table(columns)


def refuse_threshold(schema: Schema, threshold: float | str | None) -> None:
    """Raise InputError for a threshold that is no probability, or that no target takes."""
    if threshold is None:
        return
    if not (threshold == "best" or (isinstance(threshold, int | float) and 0 <= threshold <= 1)):
        message = f"It must be a probability from 0 to 1, or best; got {threshold}."
        raise InputError("bad argument", "threshold", message, "Change it.", value=threshold)
    if not any(t.task == "multilabel" or (t.task == "classification" and t.width == 2) for t in schema.targets):
        raise InputError(
            "no threshold",
            "threshold",
            "The run predicts neither one of two classes nor labels, so there is nothing to cut.",
            "Leave the threshold away.",
        )


def separators(schema: Schema) -> dict[str, str]:
    """What goes between the labels of a cell of text, by target: what the table that was trained on had there, a bar if
    it had lists; ``"json"`` for lists of JSON, also where a label holds the separator.

    Example:
        >>> moods = Target("moods", "multilabel", ("sad", "slow"), separator="; ")
        >>> separators(Schema((), (moods, Target("tags", "multilabel", ("a|b", "c")))))
        {'moods': '; ', 'tags': 'json'}
    """
    found = {}
    for target in schema.targets:
        if target.task == "multilabel":
            between = target.separator or BAR
            found[target.name] = JSON if any(between.strip() in name for name in target.classes) else between
    return found


def flat(table: pa.Table, separators: Mapping[str, str]) -> pa.Table:
    """Lists of labels as texts, ``red|round``, for files whose cells hold no lists."""
    names, columns = table.column_names, table.columns
    put = [_joined(c, separators[n]) if pa.types.is_list(c.type) else c for n, c in zip(names, columns, strict=True)]
    return pa.table(put, names=names)


def _joined(column: pa.ChunkedArray, between: str) -> pa.Array:
    join: Callable[[list[str]], str] = partial(json.dumps, ensure_ascii=False) if between == JSON else between.join
    return pa.array([None if cell is None else join(cell) for cell in column.to_pylist()], pa.string())


def _labels(target: Target, p: Tensor, cut: float | dict[str, float] | None) -> pa.Array:
    """list<string> [n]."""
    has = p >= cuts_of(target, cut)
    ends = torch.cat([torch.zeros(1, dtype=torch.long), has.sum(1).cumsum(0)])
    names = pa.array(target.classes, pa.string()).take(pa.array(has.nonzero()[:, 1].numpy()))
    return pa.ListArray.from_arrays(pa.array(ends.int().numpy()), names)
