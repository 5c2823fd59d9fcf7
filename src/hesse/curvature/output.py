"""Curvature of a loss at the model's outputs: the H_L of the Gauss-Newton matrix J' H_L J.

A loss is a weighted sum of terms, ``loss = sum_n w_n l(o_n, t_n)``; each term's Hessian at its outputs o_n is known in
closed form and does not depend on what the network does. For these losses the Gauss-Newton matrix is also the Fisher
matrix of a probability model, so H_L = E[r r'] for the gradient r of a label drawn from that model: one backward
pass of r samples the curvature of the whole network (Martens, 2020, section 9).

=====================  ==================  ================================  ==========================
loss                   model of the label  Hessian of a term                 a draw r with E[r r'] = H
=====================  ==================  ================================  ==========================
cross-entropy          categorical         diag(p) - p p'                    p - onehot(y), y ~ p
binary cross-entropy   Bernoulli           p (1 - p)                         p - y, y ~ p
mean squared error     Gaussian            2                                 sqrt(2) z, z ~ N(0, 1)
=====================  ==================  ================================  ==========================
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["OutputCurvature", "output_curvature"]


@dataclass(frozen=True)
class OutputCurvature:
    """H_L of one batch, as an action on tensors shaped like the outputs.

    Args:
        product: ``u -> H_L u``, with the weights of the reduction included.
        draw: ``() -> (r, weight)``: a random tensor shaped like the outputs with E[r r'] = H_n for each term alone,
            zero for terms that do not count, and the weight w of one term (1 / number of terms for a mean).
        terms: how many terms the loss is made of.
    """

    product: Callable[[Tensor], Tensor]
    draw: Callable[[], tuple[Tensor, float]]
    terms: float


def output_curvature(loss_fn: Callable[..., Any], outputs: Any, targets: Any) -> OutputCurvature:
    """The exact Gauss-Newton factor of ``loss_fn`` at ``outputs``.

    Args:
        loss_fn: ``F.cross_entropy``, ``F.binary_cross_entropy_with_logits``, ``F.mse_loss``, a ``functools.partial``
            of one with keywords (class weights, ``ignore_index``, ``label_smoothing``, ``pos_weight``, ``reduction``),
            or the matching ``torch.nn`` module.
        outputs: what the model returned, a tensor.
        targets: as the loss takes them.

    Raises:
        TypeError: the loss has no known factor, or the outputs are not one tensor.

    Example:
        The squared error of n numbers, averaged, has the Hessian 2 / n:

        >>> outputs = torch.zeros(4, 1)
        >>> output_curvature(F.mse_loss, outputs, outputs).product(torch.ones(4, 1)).flatten().tolist()
        [0.5, 0.5, 0.5, 0.5]
    """
    if not isinstance(outputs, Tensor):
        raise TypeError(
            f"the Gauss-Newton factor needs the model to return one tensor; it returned {type(outputs).__name__}. "
            "Return the tensor that the loss is taken of, or wrap the model in one that does."
        )
    function, options = _function_of(loss_fn)
    factor = _FACTORS.get(function) if isinstance(function, Callable) else None  # type: ignore[arg-type]
    if factor is None:
        name = getattr(loss_fn, "__name__", type(loss_fn).__name__)
        raise TypeError(
            f"no Gauss-Newton factor is known for the loss {name!r}. Known: cross_entropy, mse_loss and "
            "binary_cross_entropy_with_logits of torch.nn.functional, functools.partial of them with keywords, and the "
            "modules CrossEntropyLoss, MSELoss, BCEWithLogitsLoss. A lambda around one hides it: pass the loss itself."
        )
    return factor(outputs.detach(), targets, **options)


def _function_of(loss_fn: Callable[..., Any]) -> tuple[Callable[..., Any], dict[str, Any]]:
    if isinstance(loss_fn, functools.partial) and not loss_fn.args:
        return loss_fn.func, dict(loss_fn.keywords)
    if type(loss_fn) is nn.CrossEntropyLoss:
        keys = ("weight", "ignore_index", "reduction", "label_smoothing")
        return F.cross_entropy, {key: getattr(loss_fn, key) for key in keys}
    if type(loss_fn) is nn.BCEWithLogitsLoss:
        return F.binary_cross_entropy_with_logits, {
            key: getattr(loss_fn, key) for key in ("weight", "pos_weight", "reduction")
        }
    if type(loss_fn) is nn.MSELoss:
        return F.mse_loss, {"reduction": loss_fn.reduction}
    return loss_fn, {}


def _cross_entropy(
    outputs: Tensor,
    targets: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> OutputCurvature:
    # Classes lie in dimension 1, or 0 when there is no batch; smoothing moves the gradient, not the Hessian,
    # unless classes are weighted: then a term's weight is the sum of its smoothed target weights.
    axis = 1 if outputs.ndim > 1 else 0
    p = outputs.softmax(axis)
    classes = outputs.shape[axis]
    if targets.is_floating_point():  # class probabilities: a term's weight is sum_c t_c w_c
        soft = targets * (1 - label_smoothing) + label_smoothing / classes
        per_class = torch.ones(classes, device=outputs.device, dtype=outputs.dtype) if weight is None else weight
        shape = [1] * outputs.ndim
        shape[axis] = classes
        terms = (soft * per_class.view(shape)).sum(axis, keepdim=True)
        number = total = float(terms.numel())  # torch divides by the number of terms here, not by their weights
    else:
        counted = (targets != ignore_index).unsqueeze(axis)
        terms = counted.to(outputs.dtype)
        number = total = float(counted.sum())
        if weight is not None:
            own = weight[targets.clamp_min(0).where(targets != ignore_index, 0)].unsqueeze(axis)
            terms = terms * ((1 - label_smoothing) * own + label_smoothing * weight.mean())
            total = float((own * counted).sum())
    scale = _scale(reduction, total)

    def product(u: Tensor) -> Tensor:
        return scale * terms * (p * u - p * (p * u).sum(axis, keepdim=True))

    def draw() -> tuple[Tensor, float]:
        rows = p.movedim(axis, -1)
        labels = torch.multinomial(rows.reshape(-1, classes), 1).view(rows.shape[:-1])
        onehot = F.one_hot(labels, classes).to(p.dtype).movedim(-1, axis)
        return terms.sqrt() * (p - onehot), scale

    return OutputCurvature(product, draw, number)


def _binary_cross_entropy(
    outputs: Tensor,
    targets: Tensor,
    weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
    reduction: str = "mean",
) -> OutputCurvature:
    p = outputs.sigmoid()
    terms = torch.ones_like(outputs) if weight is None else weight.expand_as(outputs)
    if pos_weight is not None:
        terms = terms * (1 + (pos_weight - 1) * targets)
    scale = _scale(reduction, outputs.numel())

    def product(u: Tensor) -> Tensor:
        return scale * terms * p * (1 - p) * u

    def draw() -> tuple[Tensor, float]:
        return terms.sqrt() * (p - torch.bernoulli(p)), scale

    return OutputCurvature(product, draw, outputs.numel())


def _mean_squared_error(outputs: Tensor, targets: Tensor, reduction: str = "mean") -> OutputCurvature:
    if targets.shape != outputs.shape:
        raise ValueError(
            f"mse_loss broadcasts outputs {list(outputs.shape)} against targets {list(targets.shape)}, which averages "
            "over pairs that do not belong together. Give both the same shape, for instance targets.view_as(outputs)."
        )
    scale = _scale(reduction, outputs.numel())

    def draw() -> tuple[Tensor, float]:
        return 2**0.5 * torch.randn_like(outputs), scale

    return OutputCurvature(lambda u: 2 * scale * u, draw, outputs.numel())


def _scale(reduction: str, total: float) -> float:
    if reduction == "mean":
        return 1 / max(total, 1e-30)
    if reduction == "sum":
        return 1.0
    raise ValueError(f"the loss must be one number; got reduction={reduction!r}. Use reduction='mean' or 'sum'.")


_FACTORS: dict[Callable[..., Any], Callable[..., OutputCurvature]] = {
    F.cross_entropy: _cross_entropy,
    F.binary_cross_entropy_with_logits: _binary_cross_entropy,
    F.mse_loss: _mean_squared_error,
}
