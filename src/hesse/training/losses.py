"""What training lowers: for one target torch's own loss function, for several the sum of theirs.

Either way curvature is known in closed form: the loss is passed as it is, never inside another function.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hesse.curvature.losses.several import Part, several_losses
from hesse.multimodal import Schema

__all__ = ["LOSSES", "loss_of"]

LOSSES: dict[str, Callable[..., Tensor]] = {
    "classification": F.cross_entropy,
    "multilabel": F.binary_cross_entropy_with_logits,
    "regression": F.mse_loss,
}
WEIGHTS = {"classification": "weight", "multilabel": "pos_weight"}


def loss_of(schema: Schema) -> Callable[[Tensor, Any], Tensor]:
    """The loss of the outputs [n, outputs] of a model of ``schema`` and the targets of its rows.

    One target has the mean of torch's ``cross_entropy``, ``binary_cross_entropy_with_logits`` or ``mse_loss`` (of
    standardised values), weighted by class where the schema has class weights. Several have the sum of theirs; rows
    that lack a target count for the others, and a target that few rows have counts no less than one that all have.

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
    loss = LOSSES[target.task]
    return functools.partial(loss, **{WEIGHTS[target.task]: _tensor(target.weights)}) if target.weights else loss


def _tensor(weights: tuple[float, ...]) -> Tensor | None:
    return torch.tensor(weights) if weights else None
