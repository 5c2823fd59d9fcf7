"""What a model is worth: outputs over a part of the data, a score, and the score with modalities masked."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hesse.multimodal import Dataset, Schema

__all__ = ["LOSSES", "SCORES", "evaluate", "known_targets", "outputs", "score"]

LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"classification": F.cross_entropy, "regression": F.mse_loss}
SCORES = {"classification": "accuracy", "regression": "r2"}
ROWS = 512  # at once, without gradients
MOST_POINTS = 2000  # of a regression, in the page


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
    """Accuracy, or the coefficient of determination R^2; NaN where there is none.

    A model whose outputs are not numbers has no score, and neither has a regression on rows that are all equal.

    Args:
        task: "classification" or "regression".
        out: outputs [n, outputs].
        targets: int64 [n] classes, or [n, 1] values.

    Example:
        >>> score("classification", torch.eye(3), torch.tensor([0, 1, 1]))
        0.666...
        >>> score("regression", torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0], [3.0]]))
        0.5
    """
    if not bool(torch.isfinite(out).all()):
        return math.nan
    if task == "classification":
        return float((out.argmax(1) == targets).double().mean())
    out, targets = out.double(), targets.double()
    spread = float((targets - targets.mean()).square().sum())
    return 1 - float((out - targets).square().sum()) / spread if spread else math.nan


def evaluate(
    schema: Schema, model: nn.Module, data: Dataset, positions: dict[str, Tensor], part: str
) -> dict[str, Any]:
    """The record ``evaluation.json``: score, confusion or predictions, each modality alone and left out."""
    at = positions[part]
    targets = known_targets(data, at)

    def value(masked: Collection[str]) -> float:
        return score(schema.task, outputs(model, data, at, masked), targets)

    keys = set(schema.modalities)
    out = outputs(model, data, at)
    record: dict[str, Any] = {
        "part": part,
        "score": SCORES[schema.task],
        "value": score(schema.task, out, targets),
        "loss": float(LOSSES[schema.task](out, targets)),
        "n": len(at),
        "baseline": _baseline(schema, known_targets(data, positions["train"]), targets),
        "modalities": {
            key: {"alone": value(keys - {key}), "without": value({key})} for key in schema.modalities if len(keys) > 1
        },
    }
    if schema.task == "classification":
        k = schema.outputs
        return record | {"confusion": torch.bincount(k * targets + out.argmax(1), minlength=k * k).view(k, k).tolist()}
    some = torch.arange(0, len(at), -(-len(at) // MOST_POINTS))
    return record | {
        "actual": (schema.mean + schema.scale * targets[some, 0].double()).tolist(),
        "predicted": (schema.mean + schema.scale * out[some, 0].double()).tolist(),
    }


def known_targets(data: Dataset, positions: Tensor) -> Tensor:
    """The targets of rows that were encoded with them."""
    assert data.targets is not None
    return data.targets[positions]


def _baseline(schema: Schema, train: Tensor, targets: Tensor) -> float:
    """The score of always saying what the training rows say most often, or on average."""
    if schema.task == "classification":
        return float((targets == train.mode().values).double().mean())
    return score("regression", train.mean().expand_as(targets), targets)
