"""What a modality's encoder has understood: a linear model of the targets on its features, which stay as they are.

Linear probes (Alain and Bengio, 2017). The fused model may not listen to what an encoder knows; the probe does. A probe
far below the one of a model trained on that modality alone says that the encoder was starved.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from hesse.multimodal import Dataset, FusedModel, Schema
from hesse.training.evaluate import known_targets, mean_score
from hesse.training.losses import loss_of

__all__ = ["fit_linear", "probes"]

MOST_ROWS = 2000  # to learn from, and to be judged on
ROWS = 512  # at once
STEPS = 100


@torch.no_grad()
def probes(schema: Schema, model: FusedModel, data: Dataset, train: Tensor, test: Tensor) -> dict[str, float]:
    """By modality, the score on test rows of a linear model on its encoder's features, fitted on training rows.

    Args:
        train, test: positions in ``data``; at most 2000 of each are used, evenly spaced, those that have the modality.

    Returns:
        As :func:`hesse.training.evaluate.mean_score`; NaN for a modality that no training row or no test row has.

    References:
        Alain and Bengio, Understanding intermediate layers using linear classifier probes, ICLR workshop 2017.
    """
    known, asked = (_features(model, data, _few(at)) for at in (train, test))
    found = {}
    for key in model.encoders:
        x, y = known[key]
        x_new, y_new = asked[key]
        if not len(x) or not len(x_new) or not bool(x.isfinite().all() and x_new.isfinite().all()):
            found[key] = math.nan
            continue
        mean, scale = x.mean(0), x.std(0, correction=0)
        scale = torch.where(scale > 1e-6 * x.abs().amax(), scale, 1.0)  # a feature that no row excites has no scale
        weight = fit_linear(schema, (x - mean) / scale, y)
        found[key] = mean_score(schema, _affine((x_new - mean) / scale, weight), y_new)
    return found


@torch.enable_grad()
def fit_linear(schema: Schema, x: Tensor, targets: Any) -> Tensor:
    """The weight [features + 1, outputs], the bias last, with the lowest ``loss + |weight|^2 / 2n`` (no bias in it).

    The loss is the model's own, so this is multinomial or logistic regression or ridge regression, or several at once.

    Args:
        x: standardised features [n, features].
        targets: of the rows, as in ``Dataset.targets``.
    """
    loss_fn = loss_of(schema)
    weight = torch.zeros(x.shape[1] + 1, schema.outputs, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=STEPS, tolerance_change=1e-7, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_fn(_affine(x, weight), targets) + weight[:-1].square().sum() / (2 * len(x))
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach()


def _affine(x: Tensor, weight: Tensor) -> Tensor:
    return x @ weight[:-1] + weight[-1]


def _few(positions: Tensor) -> Tensor:
    return positions[:: max(1, -(-len(positions) // MOST_ROWS))]


def _features(model: FusedModel, data: Dataset, positions: Tensor) -> dict[str, tuple[Tensor, Any]]:
    """By modality the features [n, width] and targets of the rows that have it."""
    parts: dict[str, list[Tensor]] = {key: [] for key in model.encoders}
    here: dict[str, list[Tensor]] = {key: [] for key in model.encoders}
    for some in positions.split(ROWS):
        inputs, _ = data.batch(some)
        for key, x in model.features(**inputs).items():
            parts[key].append(x[inputs[key][1]])
            here[key].append(some[inputs[key][1]])
    return {key: (torch.cat(parts[key]), known_targets(data, torch.cat(here[key]))) for key in parts}
