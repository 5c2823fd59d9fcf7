"""What the outputs of a trained model must be divided by for its probabilities to be true, and where to cut them.

A network that is 99 % sure is right in 90 % of cases: it went on sharpening its answers after it had stopped to get
better. One number per target, the temperature, makes up for it on the rows that validate: outputs are divided by it,
which changes no order and so no predicted class (Guo et al., 2017; for two classes, Platt's scaling without an offset).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hesse.multimodal import Schema
from hesse.multimodal.target import Target

__all__ = [
    "best_threshold",
    "calibrate",
    "cuts_of",
    "fit_temperature",
    "known",
    "known_values",
    "probabilities",
    "reliability",
    "temperature_of",
]

BINS = 15
PRIOR = 0.5  # deviation of log T: networks are rarely off by more than a factor of 2 or 3
MOST_NUMBERS = 4_000_000  # rows times classes that a temperature is fitted to
FEWEST = 5  # rows of either side from which a threshold can be told


def calibrate(schema: Schema, out: Tensor, targets: Any, fitted: bool = False) -> dict[str, dict[str, Any]]:
    """The record ``calibration.json``, from the rows that validate.

    Args:
        out: outputs [n, outputs] of the trained model.
        targets: of these rows, as in ``Dataset.targets``.
        fitted: the scale of the outputs was fitted to these rows already, as the shares of a pool are; a temperature
            on top would be fitted to what is left of them, and temperatures stay 1.

    Returns:
        For each target with classes by name: ``temperature``; of two classes also the ``threshold`` of the second one's
        probability with the best F1, of labels such a threshold each.
    """
    record: dict[str, dict[str, Any]] = {}
    for target, own, actual in known(schema, out, targets):
        if target.task == "regression" or not len(own) or not bool(torch.isfinite(own).all()):
            continue
        temperature = 1.0 if fitted else fit_temperature(target.task, own, actual)
        record[target.name] = {"temperature": temperature}
        p = probabilities(target.task, own, temperature)
        if target.task == "multilabel":
            cuts = [best_threshold(p[:, i], actual[:, i] > 0) for i in range(target.width)]
            record[target.name]["threshold"] = dict(zip(target.classes, cuts, strict=True))
        elif target.width == 2:
            record[target.name]["threshold"] = best_threshold(p[:, 1], actual == 1)
    return record


def known(schema: Schema, out: Tensor, targets: Any) -> list[tuple[Target, Tensor, Tensor]]:
    """Each target with its outputs [n, width] and its values, on the rows that have it."""
    return [
        (target, out[:, columns] if here.all() else out[here, columns], actual)
        for (target, here, actual), columns in zip(known_values(schema, targets), schema.slices, strict=True)
    ]


def known_values(schema: Schema, targets: Any) -> list[tuple[Target, Tensor, Tensor]]:
    """Each target with bool [n], which rows have it, and its values on these."""
    found = []
    for target, actual in zip(schema.targets, targets if isinstance(targets, tuple) else (targets,), strict=True):
        here = ~actual[:, 0].isnan() if actual.is_floating_point() else actual >= 0
        found.append((target, here, actual[here]))
    return found


def temperature_of(calibration: dict[str, Any], target: Target) -> float:
    """1 where nothing was fitted, as in runs of earlier versions."""
    return float(calibration.get(target.name, {}).get("temperature", 1.0))


def cuts_of(target: Target, cut: float | dict[str, float] | None) -> Tensor:
    """From which probability on each label is given, float64 [labels]; by default one half."""
    cuts = cut if isinstance(cut, dict) else dict.fromkeys(target.classes, 0.5 if cut is None else cut)
    return torch.tensor([cuts[name] for name in target.classes], dtype=torch.float64)


def probabilities(task: str, out: Tensor, temperature: float) -> Tensor:
    """float64 [n, width]: of one class each, or of each label."""
    scaled = out.double() / temperature
    return scaled.sigmoid() if task == "multilabel" else scaled.softmax(1)


def fit_temperature(task: str, out: Tensor, targets: Tensor) -> float:
    """The T with the lowest log-loss of ``out / T``, by Newton's method in s = log T.

    A normal prior of s, of deviation 1/2, keeps T near 1 where rows are few, and finite where every row is right: the
    sum of the loss of all rows and ``2 s^2`` is least, and so their log-loss is never higher than at T = 1.

    Args:
        task: "classification" or "multilabel".
        out: outputs [n, width].
        targets: int64 [n] classes, or [n, width] of 0 and 1.

    References:
        Guo, Pleiss, Sun and Weinberger, On calibration of modern neural networks, ICML 2017.

    Example:
        Outputs that are ten times too large:

        >>> p = torch.tensor([0.8, 0.2]).log()
        >>> out = 10 * p.expand(10_000, 2)
        >>> round(fit_temperature("classification", out, (torch.arange(10_000) >= 8000).long()), 1)
        10.0
    """
    from hesse.minimizers import minimize

    some = slice(None, None, -(-out.numel() // MOST_NUMBERS))  # one number needs no more, be there 10 000 classes
    wide = out[some].double()
    rows = targets[some].double() if task == "multilabel" else targets[some]

    def loss(s: Tensor) -> Tensor:
        scaled = wide * torch.exp(-s)
        if task == "multilabel":
            total = F.binary_cross_entropy_with_logits(scaled, rows, reduction="sum")
        else:
            total = F.cross_entropy(scaled, rows, reduction="sum")
        return (total + 0.5 * (s / PRIOR).square().sum()) / len(wide)

    found = minimize(loss, torch.zeros(1, dtype=torch.float64), method="trust-exact")
    return math.exp(float(found.x))


def best_threshold(p: Tensor, actual: Tensor) -> float:
    """The probability from which on to say yes, for the best F1 on these rows; midway between two that occur.

    0.5 where fewer than five rows are on either side: they could tell anything. Of equals the one nearest to 0.5.

    Args:
        p: [n].
        actual: bool [n].

    Example:
        >>> p = torch.arange(20) / 20
        >>> round(best_threshold(p, p > 0.24), 3)
        0.225
    """
    if min(int(actual.sum()), int((~actual).sum())) < FEWEST:
        return 0.5
    ordered, order = p.double().sort(descending=True)
    hits = actual[order].cumsum(0)
    f1 = 2 * hits / (torch.arange(1, len(p) + 1) + actual.sum())
    following = torch.cat([ordered[1:], ordered.new_zeros(1)])
    cuts = (ordered + following) / 2
    best = (following < ordered) & (f1 >= f1[following < ordered].max() - 1e-12)
    return float(min(cuts[best].tolist(), key=lambda cut: abs(cut - 0.5), default=0.5))


def reliability(confidence: Tensor, right: Tensor) -> tuple[float, list[dict[str, Any]]]:
    """The expected calibration error, and what it is made of: 15 bins of equal width.

    Args:
        confidence: [n] probabilities.
        right: bool [n], whether what they are the probability of was so.

    Returns:
        ``sum_b n_b / n |accuracy_b - confidence_b|``, and of each bin that has rows its mean ``confidence``, its
        ``accuracy`` and its number ``n``.

    Example:
        >>> reliability(torch.full((4,), 0.875), torch.tensor([True, True, True, False]))[0]
        0.125
    """
    place = (confidence.double() * BINS).long().clamp(0, BINS - 1)
    n = torch.bincount(place, minlength=BINS)
    sure = torch.bincount(place, confidence.double(), BINS)
    true = torch.bincount(place, right.double(), BINS)
    error = float((sure - true).abs().sum() / max(1, len(place)))
    bins = [
        {"confidence": float(sure[b] / n[b]), "accuracy": float(true[b] / n[b]), "n": int(n[b])}
        for b in range(BINS)
        if n[b]
    ]
    return error, bins
