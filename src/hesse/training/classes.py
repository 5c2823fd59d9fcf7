"""Classes that cannot have been learnt: they stand in rows that validate or test, and in none that trains."""

from __future__ import annotations

import torch
from torch import Tensor

from hesse.finding import Finding
from hesse.multimodal import Dataset, Schema
from hesse.multimodal.target import Target
from hesse.training.calibration import known_values
from hesse.training.evaluate import known_targets

__all__ = ["unseen_classes"]

MOST_LISTED = 5  # classes, and rows of each


def unseen_classes(schema: Schema, data: Dataset, positions: dict[str, Tensor]) -> list[Finding]:
    """A finding for each class that no training row has, the first few by name and row.

    Args:
        positions: of the rows in ``data``, by part.
    """
    findings = []
    shown = torch.cat([positions["valid"], positions["test"]])
    parts = [known_values(schema, known_targets(data, where)) for where in (positions["train"], shown)]
    for (target, _, before), (_, here, after) in zip(*parts, strict=True):
        rows = data.rows[shown][here]
        if target.task == "regression":
            continue
        new = ((_count(target, after) > 0) & (_count(target, before) == 0)).nonzero()[:, 0].tolist()
        for c in new[:MOST_LISTED]:
            where = rows[after == c if after.ndim == 1 else after[:, c] > 0].sort().values + 1
            listed = ", ".join(map(str, where[:MOST_LISTED].tolist())) + (", ..." if len(where) > MOST_LISTED else "")
            findings.append(
                Finding(
                    "unseen class",
                    f"column '{target.name}'",
                    f"'{target.classes[c]}' is in {len(where)} rows that validate or test (row {listed}) and in none "
                    "that trains.",
                    "Such rows count as wrong. Give the class rows to train on, or leave it out.",
                    value=target.classes[c],
                )
            )
        if len(new) > MOST_LISTED:
            findings.append(
                Finding(
                    "unseen class",
                    f"column '{target.name}'",
                    f"{len(new)} of {target.width} classes are in no row that trains; the first are named above.",
                    "Such rows count as wrong. Give the classes rows to train on, or leave them out.",
                    value=len(new),
                )
            )
    return findings


def _count(target: Target, actual: Tensor) -> Tensor:
    """[width]: in how many rows each class is."""
    return torch.bincount(actual, minlength=target.width) if actual.ndim == 1 else (actual > 0).sum(0)
