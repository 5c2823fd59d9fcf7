"""What is said of one target's predictions on held-out rows: the metrics of scikit-learn, by class, and calibration."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from hesse.multimodal.target import Target
from hesse.training.calibration import probabilities, reliability, temperature_of

__all__ = ["report"]

MOST_POINTS = 2000  # of a regression, in the page
MOST_IN_CONFUSION = 100  # classes: the matrix is their square; and a curve for each takes a second a hundred
MOST_PAIRS = 20  # of the classes of which one is taken for the other, where the matrix is left out
MOST_BY_CLASS = 1000

Array = NDArray[Any]


def report(target: Target, out: Tensor, targets: Tensor, calibration: dict[str, Any]) -> dict[str, Any]:
    """Metrics, confusion and calibration of one target.

    Args:
        out: outputs [n, width] of rows that have the target, as the model gives them.
        targets: int64 [n] classes, [n, labels] of 0 and 1, or [n, 1] standardised values.
        calibration: the record ``calibration.json``.

    Returns:
        ``metrics`` of calibrated probabilities; for classes ``classes``, ``confusion`` (of more than 100 ``confused``:
        actual, predicted and rows of the commonest mistakes), ``by_class`` (up to 1000), ``calibration`` and
        ``threshold``; for a quantity pairs of ``actual`` and ``predicted``.
    """
    if not len(out) or not bool(torch.isfinite(out).all()):
        return {"metrics": {}}
    if target.task == "regression":
        return _of_quantity(target, out, targets)
    temperature = temperature_of(calibration, target)
    p = probabilities(target.task, out, temperature)
    threshold = calibration.get(target.name, {}).get("threshold")
    record = (_of_labels if target.task == "multilabel" else _of_classes)(target, p, targets, threshold)
    record["calibration"] = _calibration(target, out, targets, temperature)
    return record if threshold is None else record | {"threshold": threshold}


def _of_quantity(target: Target, out: Tensor, targets: Tensor) -> dict[str, Any]:
    from sklearn import metrics

    actual, predicted = ((target.mean + target.scale * x[:, 0].double()).numpy() for x in (targets, out))
    some = np.arange(0, len(actual), -(-len(actual) // MOST_POINTS))
    return {
        "metrics": {
            "r2": metrics.r2_score(actual, predicted) if np.ptp(actual) else math.nan,
            "rmse": math.sqrt(metrics.mean_squared_error(actual, predicted)),
            "mae": metrics.mean_absolute_error(actual, predicted),
            "median_absolute_error": metrics.median_absolute_error(actual, predicted),
        },
        "actual": actual[some].tolist(),
        "predicted": predicted[some].tolist(),
    }


def _of_classes(target: Target, p: Tensor, targets: Tensor, threshold: float | None) -> dict[str, Any]:
    from sklearn import metrics

    k = target.width
    actual, predicted, share = targets.numpy(), p.argmax(1).numpy(), p.numpy()
    present = np.unique(actual)
    found = {
        "accuracy": metrics.accuracy_score(actual, predicted),
        "balanced_accuracy": metrics.recall_score(actual, predicted, labels=present, average="macro", zero_division=0),
        "f1_macro": metrics.f1_score(actual, predicted, average="macro", zero_division=0),
        "log_loss": metrics.log_loss(actual, share, labels=range(k)),
    }
    if k == 2 and len(present) == 2:
        found["roc_auc"] = metrics.roc_auc_score(actual, share[:, 1])
        found["average_precision"] = metrics.average_precision_score(actual, share[:, 1])
        if threshold is not None:
            found["f1_at_threshold"] = metrics.f1_score(actual, share[:, 1] >= threshold, zero_division=0)
    elif 1 < len(present) <= MOST_IN_CONFUSION:  # each class against the rest
        found["roc_auc"] = float(np.mean([metrics.roc_auc_score(actual == c, share[:, c]) for c in present]))
    scores = metrics.precision_recall_fscore_support(actual, predicted, labels=range(k), zero_division=math.nan)
    record: dict[str, Any] = {"metrics": _plain(found), "classes": list(target.classes)}
    record["by_class"] = _by_class(target, *scores)
    if k <= MOST_IN_CONFUSION:
        record["confusion"] = metrics.confusion_matrix(actual, predicted, labels=range(k)).tolist()
    else:
        record["confused"] = _confused(target, actual, predicted)
    return record


def _confused(target: Target, actual: Array, predicted: Array) -> list[list[Any]]:
    """The commonest mistakes, as ``[actual, predicted, rows]``; those of as many rows in the order of the classes."""
    wrong = actual != predicted
    places, counts = np.unique(target.width * actual[wrong] + predicted[wrong], return_counts=True)
    common = np.argsort(-counts, kind="stable")[:MOST_PAIRS]
    pairs = zip(*np.divmod(places[common], target.width), counts[common], strict=True)
    return [[target.classes[one], target.classes[other], int(n)] for one, other, n in pairs]


def _of_labels(target: Target, p: Tensor, targets: Tensor, threshold: dict[str, float] | None) -> dict[str, Any]:
    from sklearn import metrics

    actual, share = targets.numpy() > 0, p.numpy()
    cuts = np.array([(threshold or {}).get(name, 0.5) for name in target.classes])
    predicted = share >= cuts
    some = actual.any(0)
    mixed = np.flatnonzero(some & ~actual.all(0))
    found = {
        "mAP": _mean([metrics.average_precision_score(actual[:, i], share[:, i]) for i in np.flatnonzero(some)]),
        "f1_micro": metrics.f1_score(actual, predicted, average="micro", zero_division=0),
        "f1_macro": metrics.f1_score(actual, predicted, average="macro", zero_division=0),
        "subset_accuracy": metrics.accuracy_score(actual, predicted),
        "hamming_loss": metrics.hamming_loss(actual, predicted),
        "roc_auc": _mean([metrics.roc_auc_score(actual[:, i], share[:, i]) for i in mixed]),
        "log_loss": float(F.binary_cross_entropy(p, targets.double())),
    }
    scores = metrics.precision_recall_fscore_support(actual, predicted, zero_division=math.nan)
    return {"metrics": _plain(found), "classes": list(target.classes), "by_class": _by_class(target, *scores)}


def _by_class(target: Target, precision: Array, recall: Array, f1: Array, n: Array) -> dict[str, dict[str, Any]]:
    """None where nothing was to be found or nothing was predicted."""
    if target.width > MOST_BY_CLASS:
        return {}
    shares = zip(
        *([None if math.isnan(x) else x for x in each.tolist()] for each in (precision, recall, f1)), strict=True
    )
    return {
        name: {"precision": p, "recall": r, "f1": f, "n": count}
        for name, (p, r, f), count in zip(target.classes, shares, n.tolist(), strict=True)
    }


def _calibration(target: Target, out: Tensor, targets: Tensor, temperature: float) -> dict[str, Any]:
    """Before and after the temperature: how far confidence is from accuracy, and the log-loss."""
    found: dict[str, Any] = {"temperature": temperature}
    for suffix, t in (("_before", 1.0), ("", temperature)):
        p = probabilities(target.task, out, t)
        if target.task == "multilabel":  # every label of every row is a yes or no
            sure, right = p.flatten(), targets.flatten() > 0
            loss = F.binary_cross_entropy_with_logits(out.double() / t, targets.double())
        else:
            sure, place = p.max(1)
            right = place == targets
            loss = F.cross_entropy(out.double() / t, targets)
        found[f"ece{suffix}"], found[f"bins{suffix}"] = reliability(sure, right)
        found[f"log_loss{suffix}"] = float(loss)
    return found


def _mean(values: list[float]) -> float:
    return float(np.mean(values)) if values else math.nan


def _plain(found: dict[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in found.items()}
