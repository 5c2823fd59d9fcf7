"""Several losses side by side: each has some of the outputs and a target of its own, and they are added up.

With o_k the outputs of part k, the loss of n examples is ``1/n sum_k factor_k * loss_k(o_k, t_k)``, each loss_k a sum
over examples. No term of one part knows of the outputs of another, so H_L is block diagonal in the parts. One part is
the loss itself.

The mean is over all examples, whether or not they have every target, so that the loss of a batch is the mean of those
of its halves; a rare target is made up for by its factor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor

from hesse.curvature.losses.base import OutputCurvature, plain
from hesse.curvature.losses.categorical import cross_entropy
from hesse.curvature.losses.elementwise import binary_cross_entropy_with_logits, mse_loss
from hesse.curvature.losses.summed import Summand, summed

__all__ = ["Part", "several_losses", "several_losses_curvature"]

CURVATURES: dict[Callable[..., Tensor], Callable[..., OutputCurvature]] = {
    F.cross_entropy: cross_entropy,
    F.binary_cross_entropy_with_logits: binary_cross_entropy_with_logits,
    F.mse_loss: mse_loss,
}


class Part(NamedTuple):
    """One of the losses.

    Args:
        loss: ``F.cross_entropy``, ``F.binary_cross_entropy_with_logits`` or ``F.mse_loss``.
        width: how many outputs it has.
        factor: what it counts in the sum.
        weights: ``weight`` of the classes of cross-entropy, ``pos_weight`` of the labels of binary cross-entropy.
    """

    loss: Callable[..., Tensor]
    width: int
    factor: float = 1.0
    weights: Tensor | None = None

    def options(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """Targets without gaps, and the options with which the loss leaves the gaps out."""
        own = None if self.weights is None else self.weights.to(outputs)
        if self.loss is F.cross_entropy:
            return targets, {"weight": own, "ignore_index": -100}
        mask = ~targets.isnan()
        options: dict[str, Any] = {"weight": mask.to(outputs.dtype)}
        if self.loss is F.binary_cross_entropy_with_logits:
            options["pos_weight"] = own
        return targets.where(mask, 0.0).to(outputs.dtype), options


def several_losses(outputs: Tensor, targets: Sequence[Tensor], parts: Sequence[Part]) -> Tensor:
    """``1/n sum_k factor_k * loss_k(outputs of part k, targets_k)``, the losses summed over examples.

    Args:
        outputs: ``[n, sum of widths]``.
        targets: for each part ``[n]`` classes, -100 where an example has none, or ``[n, width]`` numbers, NaN where it
            has none.
        parts: in the order of outputs and targets.

    Example:
        >>> import torch
        >>> parts = (Part(F.cross_entropy, 2), Part(F.mse_loss, 1, factor=3.0))
        >>> targets = torch.tensor([0, -100]), torch.tensor([[float("nan")], [2.0]])
        >>> several_losses(torch.zeros(2, 3), targets, parts)  # (log 2 + 3 * 2^2) / 2
        tensor(6.3466)
    """
    _refuse_widths(outputs, targets, parts)
    total = outputs.new_zeros(())
    for part, own, target in zip(parts, outputs.split([part.width for part in parts], 1), targets, strict=True):
        known, options = part.options(own, target)
        if part.loss is F.mse_loss:  # torch's weight of it takes another mean
            loss = (options["weight"] * (own - known).square()).sum()
        else:
            loss = part.loss(own, known, reduction="sum", **options)
        total = total + part.factor * loss
    return total / outputs.shape[0]


def several_losses_curvature(outputs: Tensor, targets: Sequence[Tensor], parts: Sequence[Part]) -> OutputCurvature:
    _refuse_widths(outputs, targets, parts)
    summands, start = [], 0
    for part, target in zip(parts, targets, strict=True):
        columns = slice(start, start + part.width)
        known, options = part.options(outputs[:, columns], plain(target))
        curvature = CURVATURES[part.loss](outputs[:, columns], known, reduction="sum", **options)
        summands.append(Summand(part.factor / outputs.shape[0], curvature, columns))
        start += part.width
    return summed("several_losses", outputs, summands)


def _refuse_widths(outputs: Tensor, targets: Sequence[Tensor], parts: Sequence[Part]) -> None:
    width = sum(part.width for part in parts)
    if outputs.ndim != 2 or outputs.shape[1] != width or len(targets) != len(parts):
        raise ValueError(
            f"several_losses of {len(parts)} parts takes outputs [n, {width}] and as many targets; got outputs "
            f"{list(outputs.shape)} and {len(targets)} targets."
        )
