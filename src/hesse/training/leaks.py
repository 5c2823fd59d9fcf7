"""Inputs that say too much or nothing, found before the first step.

A column that predicts the target alone is most often the target under another name, or was written down when the
answer was known: the model would be perfect on this table and useless on the next. Each column is asked for the target
of a row as its nearest neighbour in that column has it (the rule of Cover and Hart, 1967, one column at a time);
quantities count by their ranks, so that neither scale nor outliers matter, and of texts also the class that they name,
if they do. A modality whose values are all the same
once they are read tells nothing. Both are warnings: training goes on.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hesse.finding import Finding
from hesse.multimodal import Dataset, Schema
from hesse.multimodal.columns import MEDIA, Column
from hesse.multimodal.encoders.text import normalise
from hesse.multimodal.measured import MEASURED, width
from hesse.multimodal.target import Target

__all__ = ["constant_modalities", "leaks"]

MOST_ROWS = 20_000  # looked at
MOST_LABELS = 100  # looked for in texts
FEWEST_ROWS = 40  # with a value: among fewer, chance makes good columns perfect
ACCURACY, R2 = 0.995, 0.999  # from here on a column is suspected
WON = 10  # rows that it must tell better than the most frequent class does
LOOKED_AT = 256  # values of a modality


def leaks(schema: Schema, data: Dataset, positions: Mapping[str, Tensor]) -> list[Finding]:
    """A finding for each column that predicts a target alone, where there are others.

    Args:
        schema: of the data.
        data: encoded, with targets.
        positions: of the rows by part; "train" and "valid" are looked at.
    """
    if len(schema.inputs) < 2 or data.targets is None:
        return []  # a single column that suffices is a simple task
    rows = torch.cat([positions["train"], positions["valid"]])
    rows = rows[torch.linspace(0, len(rows) - 1, min(MOST_ROWS, len(rows))).round().long()]
    inputs, targets = data.batch(rows)
    of_targets = targets if isinstance(targets, tuple) else (targets,)
    spelt = {
        c.name: _texts(c, inputs[key][0]) for key, (c, *_) in schema.modalities.items() if "alphabet" in c.settings
    }
    findings = []
    for name, (values, there) in _columns(schema, inputs).items():
        for target, known in zip(schema.targets, of_targets, strict=True):
            assert known is not None
            finding = _judge(name, values, there, target, known.numpy())
            if finding is None and name in spelt and 0 < len(target.classes) <= MOST_LABELS:
                finding = _judge(name, _mentioned(spelt[name], target.classes), there, target, known.numpy())
            findings += [finding] if finding else []
    return findings


def constant_modalities(schema: Schema, data: Dataset, positions: Mapping[str, Tensor]) -> list[Finding]:
    """A finding for each picture, sound or text column whose training values are all the same once read."""
    rows = positions["train"]
    rows = rows[torch.linspace(0, len(rows) - 1, min(LOOKED_AT, len(rows))).round().long()]
    inputs, _ = data.batch(rows)
    findings = [
        _constant(column.name, "Every row has the same file")
        for column in schema.columns
        if column.role == "ignored" and column.kind in MEDIA  # of other kinds the table of columns says so
    ]
    for key, columns in schema.modalities.items():
        values, present = inputs[key]
        parts = [part[present] for part in (values if isinstance(values, tuple) else (values,))]
        if key == "columns" or len(parts[0]) < 2 or not all(bool((part == part[:1]).all()) for part in parts):
            continue
        looked = f"All {len(parts[0])} values that were looked at are the same once read"
        findings.append(_constant(columns[0].name, looked, len(parts[0])))
    return findings


def _constant(name: str, message: str, value: int | None = None) -> Finding:
    remedy = f"Check the files, or leave the column out with --column {name}=ignore."
    return Finding("constant modality", f"column '{name}'", f"{message}: that tells nothing.", remedy, value=value)


def _columns(
    schema: Schema, inputs: Mapping[str, tuple[Any, Tensor]]
) -> dict[str, tuple[NDArray[Any], NDArray[np.bool_]]]:
    """What each column says, ``[rows]``: numbers in their order, whole numbers or texts as names; and where."""
    found: dict[str, tuple[NDArray[Any], NDArray[np.bool_]]] = {}
    for key, columns in schema.modalities.items():
        values, present = inputs[key]
        if columns[0].kind == "text" and isinstance(values, Tensor) and not values.is_floating_point():
            codes = np.ascontiguousarray(values.numpy())
            _, names = np.unique(codes, axis=0, return_inverse=True)
            found[columns[0].name] = names.reshape(-1), present.numpy()
        if key != "columns":
            continue
        numbers, categories = (part.numpy() for part in values)
        place, named = 0, 0
        for column in columns:
            if column.kind in MEASURED:
                if column.kind in ("number", "date"):
                    found[column.name] = numbers[:, place].astype(np.float64), ~np.isnan(numbers[:, place])
                place += width(column)
            else:
                found[column.name] = categories[:, named], categories[:, named] > 0
                named += 1
    return found


def _texts(column: Column, codes: Any) -> list[str]:
    """The texts that codes of characters spell, in lower case."""
    letters = np.array([" ", " ", *column.settings["alphabet"]])
    return ["".join(row).casefold() for row in letters[codes.numpy()]]


def _mentioned(texts: list[str], classes: Sequence[str]) -> NDArray[np.int64]:
    """Which class each text names as a word of its own, -1 where it names none or several."""
    places = {normalise(name).casefold(): i for i, name in enumerate(classes)}
    words = re.compile(r"(?<!\w)(" + "|".join(map(re.escape, sorted(places, key=len, reverse=True))) + r")(?!\w)")
    found = [{places[word] for word in words.findall(text)} for text in texts]
    return np.array([next(iter(some)) if len(some) == 1 else -1 for some in found], np.int64)


def _judge(
    name: str, values: NDArray[Any], there: NDArray[np.bool_], target: Target, known: NDArray[Any]
) -> Finding | None:
    y: NDArray[Any]
    if target.task == "regression":
        y, there = known[:, 0], there & ~np.isnan(known[:, 0])
    elif target.task == "multilabel":
        there = there & ~np.isnan(known).any(1)
        _, y = np.unique(np.nan_to_num(known), axis=0, return_inverse=True)
    else:
        y, there = known, there & (known >= 0)
    x, y = values[there], y.reshape(-1)[there]
    if len(x) < max(FEWEST_ROWS, len(there) // 2):
        return None
    if target.task == "regression":
        score, limit = _determination(x, _ranks(y)), R2
        suspected, told = score > limit, f"R\N{SUPERSCRIPT TWO} of the ranks is {score:.4f} over {len(x)} rows"
    else:
        frequent = np.bincount(y).argmax()
        score, base, limit = float((_nearest(x, y, frequent) == y).mean()), float((y == frequent).mean()), ACCURACY
        suspected = score >= limit and (score - base) * len(y) >= WON
        told = f"it tells {score:.1%} of {len(x)} rows, the most frequent class {base:.1%}"
    if not suspected:
        return None
    return Finding(
        "leak",
        f"column '{name}'",
        f"This column predicts the target alone: {told} ('{target.name}').",
        f"If it is known only once the answer is, new rows will not have it: leave it out with --column {name}=ignore.",
        value=score,
        limit=limit,
    )


def _nearest(x: NDArray[Any], y: NDArray[Any], otherwise: Any) -> NDArray[Any]:
    """For each row the ``y`` of the nearest other row ``[n]``; of names (whole numbers) only equal ones are near."""
    order = np.argsort(x, kind="stable")
    gaps = np.diff(x[order]).astype(np.float64)
    if x.dtype.kind == "i":
        gaps[gaps > 0] = np.inf
    before, after = np.concatenate([[np.inf], gaps]), np.concatenate([gaps, [np.inf]])
    place = np.arange(len(x)) + np.where(before <= after, -1, 1)
    near = y[order][place.clip(0, len(x) - 1)]
    result = np.empty_like(y)
    result[order] = np.where(np.isfinite(np.minimum(before, after)), near, otherwise)
    return result


def _determination(x: NDArray[Any], y: NDArray[np.float64]) -> float:
    """R2 of ``y`` by its nearest neighbour, or by a straight line in the ranks of numbers if that tells more."""
    spread = float(np.square(y - y.mean()).sum())
    if not spread:
        return 0.0
    told = 1 - float(np.square(y - _nearest(x, y, y.mean())).sum()) / spread
    if x.dtype.kind == "i" or not np.ptp(x):
        return told
    return max(told, float(np.corrcoef(_ranks(x), y)[0, 1]) ** 2)


def _ranks(x: NDArray[Any]) -> NDArray[np.float64]:
    """Places in ascending order; equal values share the mean of theirs."""
    _, group, counts = np.unique(x, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return np.asarray((last - (counts - 1) / 2)[group.reshape(-1)], np.float64)
