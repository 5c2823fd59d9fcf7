"""Losses that are sums over the elements of the outputs: H_L is the diagonal of each element's second derivative.

With o an output, t its target, p = sigmoid(o) unless said otherwise, w the element's weight:

==========================  =====================================  ===========================================
loss                        second derivative h                    model of the label, and its E[r^2]
==========================  =====================================  ===========================================
mse                         2 w                                    normal of variance 1/2: h
gaussian_nll                1 / var                                normal of that variance: h
binary_cross_entropy,       w p (1 - p) (1 + (pos_weight - 1) t)   Bernoulli(p): h
with_logits
binary_cross_entropy        w (t / p^2 + (1 - t) / (1 - p)^2),     Bernoulli(p): w / (p (1 - p))
                            p = o
multilabel_soft_margin      w p (1 - p)                            Bernoulli(p): h
soft_margin                 t^2 sigmoid(t o) sigmoid(-t o)         labels 1 and -1, 1 with probability p: p (1 - p)
poisson_nll                 exp(o)                                 Poisson of that rate: h
poisson_nll, rates          t / (o + eps)^2                        Poisson of rate o + eps: 1 / (o + eps)
huber                       w where |o - t| < delta, or 0          none
smooth_l1                   1 / beta where |o - t| < beta, or 0    none
==========================  =====================================  ===========================================
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Generator, Tensor

from hesse.curvature.losses.base import Counts, OutputCurvature, count, nonnegative, same_shape
from hesse.curvature.losses.diagonal import Diagonal, Model

__all__ = [
    "binary_cross_entropy",
    "binary_cross_entropy_with_logits",
    "gaussian_nll_loss",
    "huber_loss",
    "mse_loss",
    "multilabel_soft_margin_loss",
    "poisson_nll_loss",
    "smooth_l1_loss",
    "soft_margin_loss",
]

TINY = 1e-12  # torch's own bound under p (1 - p) in the gradient of binary cross-entropy


def mse_loss(
    outputs: Tensor, targets: Tensor, reduction: str = "mean", weight: Tensor | None = None
) -> OutputCurvature:
    same_shape("mse_loss", outputs, targets)
    h = (outputs.new_tensor(2.0) if weight is None else 2 * weight.to(outputs.dtype)).expand_as(outputs)
    total = None if weight is None else float(weight.sum())  # torch divides by the weights here, and only here
    counts = count("mse_loss", reduction, outputs.numel(), total)
    return _canonical(counts, h, lambda generator: h.sqrt() * _normal(outputs, generator), nonnegative(weight))


def gaussian_nll_loss(
    outputs: Tensor,
    targets: Tensor,
    var: Tensor | float | None = None,
    full: bool = False,  # a constant
    eps: float = 1e-6,
    reduction: str = "mean",
) -> OutputCurvature:
    same_shape("gaussian_nll_loss", outputs, targets)
    if var is None:
        raise TypeError(
            "gaussian_nll_loss takes the variance as a third argument; bind it: functools.partial(gaussian_nll_loss, "
            "var=...). A variance that the model returns beside the mean needs a loss function of your own: the loss "
            "is not convex in it."
        )
    var = torch.as_tensor(var, dtype=outputs.dtype, device=outputs.device)
    if bool((var < 0).any()):
        raise ValueError(f"gaussian_nll_loss takes a variance of at least 0; the least is {float(var.min()):.3g}.")
    if var.ndim and var.shape == outputs.shape[:-1]:
        var = var.unsqueeze(-1)  # one for each example, as torch reads it
    h = (1 / var.clamp_min(eps)).expand_as(outputs)
    counts = count("gaussian_nll_loss", reduction, outputs.numel())
    return _canonical(counts, h, lambda generator: h.sqrt() * _normal(outputs, generator), True)


def binary_cross_entropy_with_logits(
    outputs: Tensor,
    targets: Tensor,
    weight: Tensor | None = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
) -> OutputCurvature:
    same_shape("binary_cross_entropy_with_logits", outputs, targets)
    own = torch.ones_like(outputs) if weight is None else weight.to(outputs.dtype).expand_as(outputs)
    if pos_weight is not None:
        own = own * (1 + (pos_weight - 1) * targets)
    counts = count("binary_cross_entropy_with_logits", reduction, outputs.numel())
    return _logistic(counts, outputs, own, weight is None and pos_weight is None)


def multilabel_soft_margin_loss(
    outputs: Tensor, targets: Tensor, weight: Tensor | None = None, reduction: str = "mean"
) -> OutputCurvature:
    name = "multilabel_soft_margin_loss"
    same_shape(name, outputs, targets)
    own = torch.ones_like(outputs) if weight is None else weight.to(outputs.dtype).expand_as(outputs)
    counts = count(name, reduction, outputs.numel())
    if reduction == "sum":
        counts["weight"] = 1 / outputs.shape[-1]  # torch sums over the examples, yet averages over the labels
    return _logistic(counts, outputs, own, weight is None)


def binary_cross_entropy(
    outputs: Tensor, targets: Tensor, weight: Tensor | None = None, reduction: str = "mean"
) -> OutputCurvature:
    same_shape("binary_cross_entropy", outputs, targets)
    if not bool(((outputs >= 0) & (outputs <= 1)).all()):
        low, high = float(outputs.min()), float(outputs.max())
        raise ValueError(
            f"binary_cross_entropy takes probabilities; the outputs lie in [{low:.3g}, {high:.3g}]. End the model in "
            "sigmoid, or better use binary_cross_entropy_with_logits, which takes what sigmoid would be given."
        )
    p, q = outputs, 1 - outputs
    own = torch.ones_like(p) if weight is None else weight.to(p.dtype).expand_as(p)
    h = own * (targets / p.clamp_min(TINY).square() + (1 - targets) / q.clamp_min(TINY).square())
    variance = (p * q).clamp_min(TINY)

    def sample(generator: Generator | None) -> Tensor:
        return own.sqrt() * (p - torch.bernoulli(p, generator=generator)) / variance

    counts = count("binary_cross_entropy", reduction, outputs.numel())
    return Diagonal(**counts, psd=nonnegative(h, weight), axes=_axes(outputs), h=h, model=Model(own / variance, sample))


def soft_margin_loss(outputs: Tensor, targets: Tensor, reduction: str = "mean") -> OutputCurvature:
    same_shape("soft_margin_loss", outputs, targets)
    margin = targets * outputs
    h = targets.square() * margin.sigmoid() * (-margin).sigmoid()
    p = outputs.sigmoid()

    def sample(generator: Generator | None) -> Tensor:
        y = 2 * torch.bernoulli(p, generator=generator) - 1
        return -y * (-y * outputs).sigmoid()

    model = Model(p * (-outputs).sigmoid(), sample)
    counts = count("soft_margin_loss", reduction, outputs.numel())
    return Diagonal(**counts, psd=True, axes=_axes(outputs), h=h, model=model)


def poisson_nll_loss(
    outputs: Tensor,
    targets: Tensor,
    log_input: bool = True,
    full: bool = False,  # a function of the target alone
    eps: float = 1e-8,
    reduction: str = "mean",
) -> OutputCurvature:
    same_shape("poisson_nll_loss", outputs, targets)
    counts = count("poisson_nll_loss", reduction, outputs.numel())
    if log_input:
        rate = outputs.exp()
        return _canonical(counts, rate, lambda generator: rate - torch.poisson(rate, generator=generator), True)
    rate = outputs + eps
    if bool((rate <= 0).any()):
        raise ValueError(
            "poisson_nll_loss with log_input=False takes rates, which are positive; the least of the outputs is "
            f"{float(outputs.min()):.3g}. End the model in softplus, or let it return the logarithm: log_input=True."
        )
    h = targets / rate.square()
    model = Model(1 / rate, lambda generator: 1 - torch.poisson(rate, generator=generator) / rate)
    return Diagonal(**counts, psd=nonnegative(targets), axes=_axes(outputs), h=h, model=model)


def huber_loss(
    outputs: Tensor, targets: Tensor, reduction: str = "mean", delta: float = 1.0, weight: Tensor | None = None
) -> OutputCurvature:
    same_shape("huber_loss", outputs, targets)
    h = ((outputs - targets).abs() < delta).to(outputs.dtype)
    counts = count("huber_loss", reduction, outputs.numel())
    psd = nonnegative(weight)
    return Diagonal(**counts, psd=psd, axes=_axes(outputs), h=h if weight is None else h * weight.expand_as(h))


def smooth_l1_loss(outputs: Tensor, targets: Tensor, reduction: str = "mean", beta: float = 1.0) -> OutputCurvature:
    same_shape("smooth_l1_loss", outputs, targets)
    if beta == 0:
        raise TypeError(
            "no Gauss-Newton factor is known for the loss 'smooth_l1_loss' with beta=0: it is l1_loss, piecewise "
            "linear, with a second derivative of zero. Use a beta > 0, the error below which it is to be a square."
        )
    h = ((outputs - targets).abs() < beta).to(outputs.dtype) / beta
    counts = count("smooth_l1_loss", reduction, outputs.numel())
    return Diagonal(**counts, psd=True, axes=_axes(outputs), h=h)


def _logistic(counts: Counts, outputs: Tensor, own: Tensor, unweighted: bool) -> OutputCurvature:
    p, q = outputs.sigmoid(), (-outputs).sigmoid()  # 1 - p would be 0 for p above 1 - 1e-8

    def sample(generator: Generator | None) -> Tensor:
        return own.sqrt() * (p - torch.bernoulli(p, generator=generator))

    return _canonical(counts, own * p * q, sample, unweighted or nonnegative(own))


def _canonical(counts: Counts, h: Tensor, sample: Callable[[Generator | None], Tensor], psd: bool) -> OutputCurvature:
    """A loss whose Hessian knows nothing of the label: it is then the Fisher matrix too."""
    return Diagonal(**counts, psd=psd, axes=_axes(h), h=h, model=Model(h, sample))


def _axes(outputs: Tensor) -> tuple[int, ...]:
    return tuple(range(1, outputs.ndim))


def _normal(like: Tensor, generator: Generator | None) -> Tensor:
    return torch.empty_like(like).normal_(generator=generator)
