"""What a model is worth: outputs over a part of the data, a score, and the score with modalities masked."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.metrics import accuracy_score, confusion_matrix, r2_score
from torch import Tensor, nn

from hesse.multimodal import Dataset, Schema

__all__ = ["LOSSES", "SCORES", "evaluate", "outputs", "score"]

LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"classification": F.cross_entropy, "regression": F.mse_loss}
SCORES = {"classification": "accuracy", "regression": "r2"}
ROWS = 512  # at once, without gradients
MOST_POINTS = 2000  # of a regression, in the page


@torch.no_grad()
def outputs(model: nn.Module, data: Dataset, positions: Tensor, masked: Collection[str] = ()) -> Tensor:
    """The model's outputs [n, outputs] on rows of ``data``, as if the modalities ``masked`` were absent."""
    model.eval()
    parts = []
    for some in positions.split(ROWS):
        inputs, _ = data.batch(some)
        for key in masked:
            values, present = inputs[key]
            inputs[key] = (values, torch.zeros_like(present))
        parts.append(model(**inputs))
    model.train()
    return torch.cat(parts)


def score(schema: Schema, out: Tensor, targets: Tensor) -> tuple[float, float]:
    """``(loss, score)``: the training loss, and the accuracy or the coefficient of determination R^2."""
    loss = float(LOSSES[schema.task](out, targets))
    if not bool(torch.isfinite(out).all()):  # scikit-learn refuses what a diverged model says
        return loss, float("nan")
    if schema.task == "classification":
        return loss, float(accuracy_score(targets.numpy(), out.argmax(1).numpy()))
    return loss, float(r2_score(targets.numpy(), out.numpy())) if len(out) > 1 else float("nan")


def evaluate(
    schema: Schema, model: nn.Module, data: Dataset, positions: dict[str, Tensor], part: str
) -> dict[str, Any]:
    """The record ``evaluation.json``: score, confusion or predictions, each modality alone and left out."""
    at = positions[part]
    targets = data.batch(at)[1]
    assert targets is not None
    out = outputs(model, data, at)
    loss, value = score(schema, out, targets)
    keys = list(schema.modalities)
    result: dict[str, Any] = {
        "part": part,
        "score": SCORES[schema.task],
        "value": value,
        "loss": loss,
        "n": len(at),
        "baseline": _baseline(schema, data, positions["train"], targets),
        "modalities": {
            key: {
                "alone": _masked(schema, model, data, at, targets, [other for other in keys if other != key]),
                "without": _masked(schema, model, data, at, targets, [key]),
            }
            for key in keys
            if len(keys) > 1
        },
    }
    if schema.task == "classification":
        labels = range(len(schema.classes))
        result["confusion"] = confusion_matrix(targets, out.argmax(1), labels=list(labels)).tolist()
    else:
        some = np.unique(np.linspace(0, len(at) - 1, min(len(at), MOST_POINTS)).astype(int))
        result["actual"] = [schema.mean + schema.scale * v for v in targets[some, 0].tolist()]
        result["predicted"] = [schema.mean + schema.scale * v for v in out[some, 0].tolist()]
    return result


def _masked(
    schema: Schema, model: nn.Module, data: Dataset, at: Tensor, targets: Tensor, masked: Sequence[str]
) -> float:
    return score(schema, outputs(model, data, at, masked), targets)[1]


def _baseline(schema: Schema, data: Dataset, train: Tensor, targets: Tensor) -> float:
    """The score of always saying what the training rows say most often, or on average."""
    known = data.batch(train)[1]
    assert known is not None
    if schema.task == "classification":
        return float((targets == known.mode().values).float().mean())
    return float(r2_score(targets, known.mean().expand_as(targets))) if len(targets) > 1 else float("nan")
