"""What a model is worth: outputs over a part of the data, a score a target, and the score with modalities masked."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from hesse.multimodal import Dataset, Schema
from hesse.multimodal.target import Target
from hesse.training.calibration import known, known_values
from hesse.training.losses import LOSSES, loss_of
from hesse.training.metrics import report

__all__ = ["SCORES", "evaluate", "known_targets", "mean_score", "outputs", "score", "score_name"]

SCORES = {"classification": "accuracy", "multilabel": "mAP", "regression": "r2"}
ROWS = 512  # at once, without gradients


@torch.no_grad()
def outputs(model: nn.Module, data: Dataset, positions: Tensor, masked: Collection[str] = ()) -> Tensor:
    """The model's outputs [n, outputs] on rows of ``data``, as if the modalities ``masked`` were absent."""
    was_training = model.training
    model.eval()
    parts = []
    for some in positions.split(ROWS):
        inputs, _ = data.batch(some)
        for key in masked:
            values, present = inputs[key]
            inputs[key] = (values, torch.zeros_like(present))
        parts.append(model(**inputs))
    model.train(was_training)
    return torch.cat(parts)


def score(task: str, out: Tensor, targets: Tensor) -> float:
    """Accuracy, mean average precision of the labels, or the coefficient of determination R^2; NaN where there is none.

    A model whose outputs are not numbers has no score, and neither has a regression on rows that are all equal, nor
    labels that no row has.

    Args:
        task: "classification", "multilabel" or "regression".
        out: outputs [n, outputs].
        targets: int64 [n] classes, [n, labels] of 0 and 1, or [n, 1] values; none missing.

    Example:
        >>> score("classification", torch.eye(3), torch.tensor([0, 1, 1]))
        0.666...
        >>> score("multilabel", torch.tensor([[0.9], [0.8], [0.1]]), torch.tensor([[1.0], [0.0], [1.0]]))
        0.833...
        >>> score("regression", torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0], [3.0]]))
        0.5
    """
    if not bool(torch.isfinite(out).all()):
        return math.nan
    if task == "classification":
        return float((out.argmax(1) == targets).double().mean())
    if task == "multilabel":
        found = [_average_precision(out[:, i], targets[:, i] > 0) for i in range(out.shape[1]) if targets[:, i].any()]
        return sum(found) / len(found) if found else math.nan
    out, targets = out.double(), targets.double()
    spread = float((targets - targets.mean()).square().sum())
    return 1 - float((out - targets).square().sum()) / spread if spread else math.nan


def mean_score(schema: Schema, out: Tensor, targets: Any) -> float:
    """The score of one target, or the mean over several of those that have one; NaN where none has.

    Args:
        out: outputs [n, outputs] of a model of ``schema``.
        targets: as in ``Dataset.targets``.
    """
    return _mean([score(target.task, own, actual) for target, own, actual in known(schema, out, targets) if len(own)])


def score_name(schema: Schema) -> str:
    """What :func:`mean_score` is called."""
    return SCORES[schema.targets[0].task] if len(schema.targets) == 1 else "mean score"


def evaluate(
    schema: Schema,
    model: nn.Module,
    data: Dataset,
    positions: dict[str, Tensor],
    part: str,
    calibration: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The record ``evaluation.json``: score, metrics of each target, each modality alone and left out.

    Args:
        positions: of the rows in ``data``, by part.
        part: what is evaluated.
        calibration: the record ``calibration.json``.
    """
    at = positions[part]
    targets = known_targets(data, at)

    def value(masked: Collection[str]) -> float:
        return mean_score(schema, outputs(model, data, at, masked), targets)

    keys = set(schema.modalities)
    out = outputs(model, data, at)
    trained = known_values(schema, known_targets(data, positions["train"]))
    each = {}
    for (target, own, actual), (_, _, before) in zip(known(schema, out, targets), trained, strict=True):
        each[target.name] = {
            "task": target.task,
            "score": SCORES[target.task],
            "value": score(target.task, own, actual) if len(own) else math.nan,
            "loss": float(LOSSES[target.task](own, actual)) if len(own) else math.nan,
            "baseline": _baseline(target, before, actual) if len(own) else math.nan,
            "n": len(own),
            **report(target, own, actual, calibration or {}),
        }
    first = each[schema.targets[0].name]
    return {
        "part": part,
        "score": score_name(schema),
        "value": _mean([one["value"] for one in each.values() if one["n"]]),
        "loss": float(loss_of(schema)(out, targets)),
        "n": len(at),
        "baseline": _mean([one["baseline"] for one in each.values() if one["n"]]),
        "modalities": {
            key: {"alone": value(keys - {key}), "without": value({key})} for key in schema.modalities if len(keys) > 1
        },
        **{key: first[key] for key in ("confusion", "actual", "predicted") if key in first},
        "targets": each,
    }


def known_targets(data: Dataset, positions: Tensor) -> Any:
    """The targets of rows that were encoded with them, as in ``Dataset.targets``."""
    assert data.targets is not None
    if isinstance(data.targets, tuple):
        return tuple(each[positions] for each in data.targets)
    return data.targets[positions]


def _baseline(target: Target, train: Tensor, targets: Tensor) -> float:
    """The score of always saying what the training rows say most often, or on average."""
    if target.task == "classification":
        return float((targets == train.mode().values).double().mean())
    return score(target.task, train.mean(0).expand_as(targets), targets)


def _average_precision(out: Tensor, actual: Tensor) -> float:
    """The precision at each row that has the label, averaged; rows of equal outputs come together."""
    ordered, order = out.sort(descending=True)
    hits = actual[order].cumsum(0).double()
    last = torch.ones_like(ordered, dtype=torch.bool)
    last[:-1] = ordered[1:] != ordered[:-1]
    hits, ends = hits[last], last.nonzero()[:, 0] + 1
    return float((hits / ends * hits.diff(prepend=hits.new_zeros(1))).sum() / hits[-1])


def _mean(values: list[float]) -> float:
    """Of those that are numbers."""
    found = [value for value in values if not math.isnan(value)]
    return sum(found) / len(found) if found else math.nan
