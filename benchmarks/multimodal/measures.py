"""What a model is judged by: accuracy, log-loss, calibration, and what a linear probe finds in each tower."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from benchmarks.multimodal.tasks import Part

__all__ = ["accuracy", "alone", "answers", "calibration_error", "log_loss", "probes"]

BINS = 15
CHUNK = 500  # rows a forward pass
PENALTY = 1.0  # of the probe, as scikit-learn's C: it hardly matters with 64 features and 1000 rows


def accuracy(logits: Tensor, labels: Tensor) -> float:
    return float((logits.argmax(1) == labels).float().mean())


def log_loss(logits: Tensor, labels: Tensor) -> float:
    return float(F.cross_entropy(logits, labels))


def calibration_error(logits: Tensor, labels: Tensor) -> float:
    """Mean distance of confidence and accuracy over bins of equal width (Guo et al., 2017)."""
    confidence, predicted = logits.softmax(1).max(1)
    right = (predicted == labels).float()
    bins = (confidence * BINS).long().clamp_max(BINS - 1)
    gaps = torch.zeros(BINS).index_add_(0, bins, confidence - right)
    return float(gaps.abs().sum() / len(labels))


@torch.no_grad()
def answers(module: nn.Module, part: Part) -> Tensor:
    """Logits [N, classes] of a model or a cure in eval mode."""
    return torch.cat([module(**inputs) for inputs, _ in part.batches(CHUNK)])


@torch.no_grad()
def alone(module: nn.Module, part: Part) -> dict[str, Tensor]:
    """Logits [N, classes] by modality of a cure that has heads for them."""
    present = [{key: here for key, (_, here) in inputs.items()} for inputs, _ in part.batches(CHUNK)]
    features = [module.model.features(**inputs) for inputs, _ in part.batches(CHUNK)]
    chunks = [module.own(*pair) for pair in zip(features, present, strict=True)]
    return {key: torch.cat([chunk[key] for chunk in chunks]) for key in chunks[0]}


@torch.no_grad()
def probes(model: nn.Module, train: Part, test: Part) -> dict[str, float]:
    """Test accuracy of multinomial logistic regression on each tower's frozen features, fitted on training rows."""
    known, asked = _features(model, train), _features(model, test)
    found = {}
    for key, x in known.items():
        mean, scale = x.mean(0), x.std(0) + 1e-6  # a feature that no row excites has no scale
        probe = LogisticRegression(C=PENALTY, max_iter=300, tol=1e-3)
        probe.fit((x - mean) / scale, train.labels.numpy())
        found[key] = float(np.mean(probe.predict((asked[key] - mean) / scale) == test.labels.numpy()))
    return found


def _features(model: nn.Module, part: Part) -> dict[str, np.ndarray]:
    chunks = [model.features(**inputs) for inputs, _ in part.batches(CHUNK)]
    return {key: torch.cat([chunk[key] for chunk in chunks]).numpy() for key in chunks[0]}
