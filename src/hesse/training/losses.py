"""What training lowers: for one target torch's own loss function, for several the sum of theirs.

Either way curvature is known in closed form: the loss is passed as it is, or inside one that says what it is made of.
All are means over rows: the loss of a batch is that of its parts, wherever it is cut.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hesse.curvature.losses.several import Part, several_losses
from hesse.multimodal import Schema

__all__ = ["LOSSES", "Scaled", "loss_of"]

LOSSES: dict[str, Callable[..., Tensor]] = {
    "classification": F.cross_entropy,
    "multilabel": F.binary_cross_entropy_with_logits,
    "regression": F.mse_loss,
}

Loss = Callable[[Tensor, Any], Tensor]
Summand = tuple[float, Loss, slice, None, Any]


class Scaled:
    """A multiple of a loss, which says so, and so keeps its curvature.

    Example:
        >>> Scaled(F.mse_loss, 0.5)(torch.ones(2, 1), torch.zeros(2, 1))
        tensor(0.5000)
    """

    def __init__(self, loss_fn: Loss, factor: float) -> None:
        self.loss_fn, self.factor = loss_fn, factor

    def __call__(self, outputs: Tensor, targets: Any) -> Tensor:
        return self.factor * self.loss_fn(outputs, targets)

    def summands(self, outputs: Tensor, targets: Any) -> Iterator[Summand]:
        yield self.factor, self.loss_fn, slice(None), None, targets


class _Weighted:
    """Cross-entropy, each row times the weight of its class. torch's own divides by the sum of the weights instead of
    the number of rows, by which rows count more in batches where rare classes are missing.
    """

    def __init__(self, weights: Tensor) -> None:
        self.weights = weights

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self._sum(outputs)(outputs, targets) / len(outputs)

    def summands(self, outputs: Tensor, targets: Tensor) -> Iterator[Summand]:
        yield 1 / len(outputs), self._sum(outputs), slice(None), None, targets

    def _sum(self, outputs: Tensor) -> Loss:
        return functools.partial(F.cross_entropy, weight=self.weights.to(outputs), reduction="sum")


def loss_of(schema: Schema) -> Loss:
    """The loss of the outputs [n, outputs] of a model of ``schema`` and the targets of its rows.

    One target has the mean of torch's ``cross_entropy``, ``binary_cross_entropy_with_logits`` or ``mse_loss`` (of
    standardised values), each row weighted by its class where the schema has class weights. Several have the sum of
    theirs; rows that lack a target count for the others, and a target that few rows have counts no less than one that
    all have.

    Example:
        >>> from hesse.multimodal.target import Target
        >>> species, age = Target("species", "classification", ("cat", "dog")), Target("age", "regression")
        >>> loss_of(Schema((), (species,))) is F.cross_entropy
        True
        >>> both = loss_of(Schema((), (species, age)))
        >>> both(torch.zeros(1, 3), (torch.tensor([0]), torch.tensor([[2.0]])))  # log 2 + 2^2
        tensor(4.6931)
    """
    if len(schema.targets) > 1:
        parts = tuple(Part(LOSSES[t.task], t.width, 1 / t.share, _tensor(t.weights)) for t in schema.targets)
        return functools.partial(several_losses, parts=parts)
    (target,) = schema.targets
    weights, loss = _tensor(target.weights), LOSSES[target.task]
    if weights is None:
        return loss
    return _Weighted(weights) if loss is F.cross_entropy else functools.partial(loss, pos_weight=weights)


def _tensor(weights: tuple[float, ...]) -> Tensor | None:
    return torch.tensor(weights) if weights else None
