"""Losses of torch with outputs and targets, shared by the tests: every option and reduction that changes a formula."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from tolerances import STANDARD_ERRORS

__all__ = ["Case", "assert_mean", "batch_of", "bound", "cases", "dense_hessian", "matrix_of", "random"]


class Case(NamedTuple):
    """A loss at ``outputs = inner(x)``: for losses of log-probabilities x are the logits, where curvature shows."""

    loss_fn: Callable[..., Tensor]
    x: Tensor
    targets: Tensor
    terms: float
    total: float | None = None  # what a mean divides by, where it is not the number of terms
    inner: Callable[[Tensor], Tensor] = lambda x: x
    reference: Callable[..., Tensor] | None = None  # where torch has no second derivative

    @property
    def outputs(self) -> Tensor:
        return self.inner(self.x)

    @property
    def examples(self) -> int:
        """1 for the vector of classes, and the number, that are a batch of their own."""
        return 1 if self.x.numel() <= 3 and self.terms == 1 else len(self.x)


def random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def bound(function: Callable[..., Tensor], **options: Any) -> Callable[..., Tensor]:
    return functools.partial(function, **options)


def squared_margin(outputs: Tensor, targets: Tensor, margin: float, weight: Tensor, reduction: str) -> Tensor:
    outputs, targets = outputs.view(-1, outputs.shape[-1]), targets.view(-1)
    loss = outputs.new_zeros(())
    for o, y in zip(outputs, targets, strict=True):
        for c in range(len(o)):
            if c != y:
                loss = loss + weight[y] / len(o) * (margin - o[y] + o[c]).clamp_min(0) ** 2
    return loss / len(targets) if reduction == "mean" else loss


def cases(reduction: str) -> dict[str, Case]:
    torch.manual_seed(0)
    weight = torch.tensor([0.5, 2.0, 1.0]).double()
    pos_weight = torch.tensor([3.0, 0.2]).double()
    y, ignored = torch.tensor([0, 2, 1, 1]), torch.tensor([0, -100, 1, -100])
    grid, grid_ignored = torch.tensor([[0, 1], [2, 2]]), torch.tensor([[0, 7], [2, 7]])
    binary, smooth = torch.tensor([[0.0, 1.0], [1.0, 1.0], [0.0, 0.3]]).double(), random(4, 3).softmax(1)
    sides = torch.tensor([[1.0, -1.0], [-1.0, -1.0], [1.0, 1.0]]).double()
    counts = torch.tensor([[0.0, 3.0], [1.0, 2.0], [5.0, 0.5]]).double()
    per_element = torch.tensor([[1.0, 0.5], [0.0, 3.0], [2.0, 1.0]]).double()
    near = random(3, 2)
    far = near + torch.tensor([[0.1, 0.6], [-0.3, -2.0], [0.9, -0.6]]).double()  # on both sides of every bound below
    log_softmax, last = functools.partial(F.log_softmax, dim=1), functools.partial(F.log_softmax, dim=-1)
    cross, bce, nll, kl, mse, gauss, probability, multilabel, soft, poisson, huber, smooth_l1, squared = (
        bound(function, reduction=reduction)
        for function in (
            F.cross_entropy,
            F.binary_cross_entropy_with_logits,
            F.nll_loss,
            F.kl_div,
            F.mse_loss,
            F.gaussian_nll_loss,
            F.binary_cross_entropy,
            F.multilabel_soft_margin_loss,
            F.soft_margin_loss,
            F.poisson_nll_loss,
            F.huber_loss,
            F.smooth_l1_loss,
            bound(F.multi_margin_loss, p=2),
        )
    )
    margin = functools.partial(squared_margin, margin=1.0, weight=torch.ones(3).double(), reduction=reduction)
    return {
        "cross-entropy": Case(cross, random(4, 3), y, 4),
        "cross-entropy, no batch": Case(cross, random(3), torch.tensor(2), 1),
        "cross-entropy, class weights": Case(bound(cross, weight=weight), random(4, 3), y, 4, 5.5),
        "cross-entropy, ignored": Case(cross, random(4, 3), ignored, 2),
        "cross-entropy, ignored and weighted": Case(
            bound(cross, ignore_index=7, weight=weight), random(2, 3, 2), grid_ignored, 2, 1.5
        ),
        "cross-entropy, a class ignored": Case(bound(cross, ignore_index=1, weight=weight), random(4, 3), y, 2, 1.5),
        "cross-entropy, smoothed": Case(bound(cross, label_smoothing=0.2), random(4, 3), y, 4),
        "cross-entropy, smoothed and weighted": Case(
            bound(cross, label_smoothing=0.2, weight=weight), random(4, 3), y, 4, 5.5
        ),
        "cross-entropy, smoothed, weighted and ignored": Case(
            bound(cross, label_smoothing=0.2, weight=weight), random(4, 3), ignored, 2, 2.5
        ),
        "cross-entropy, probabilities": Case(cross, random(4, 3), smooth, 4),
        "cross-entropy, probabilities, smoothed and weighted": Case(
            bound(cross, label_smoothing=0.2, weight=weight), random(4, 3), smooth, 4
        ),
        "cross-entropy, probabilities, no batch": Case(bound(cross, weight=weight), random(3), smooth[0], 1),
        "cross-entropy, positions": Case(cross, random(2, 3, 2), grid, 4),
        "cross-entropy, positions, probabilities": Case(cross, random(2, 3, 2), random(2, 3, 2).softmax(1), 4),
        "cross-entropy, images": Case(cross, random(1, 3, 2, 2), grid[None], 4),
        "NLL": Case(nll, random(4, 3), y, 4, inner=log_softmax),
        "NLL, no batch": Case(nll, random(3), torch.tensor(2), 1, inner=last),
        "NLL, weighted and ignored": Case(bound(nll, weight=weight), random(4, 3), ignored, 2, 2.5, inner=log_softmax),
        "NLL, positions": Case(
            bound(nll, ignore_index=7, weight=weight), random(2, 3, 2), grid_ignored, 2, 1.5, inner=log_softmax
        ),
        "KL": Case(kl, random(4, 3), smooth, 4, 12, inner=last),
        "KL, no batch": Case(kl, random(3), smooth[0], 1, 3, inner=last),
        "KL, logarithms": Case(bound(kl, log_target=True), random(4, 3), smooth.log(), 4, 12, inner=last),
        "KL, classes last of three": Case(kl, random(2, 2, 3), random(2, 2, 3).softmax(-1), 4, 12, inner=last),
        "KL, classes second of three": Case(kl, random(2, 3, 2), random(2, 3, 2).softmax(1), 4, 12, inner=log_softmax),
        "KL, targets that add up to something else": Case(kl, random(4, 3), 3 * torch.rand(4, 3).double(), 4, 12, last),
        "squared error": Case(mse, random(3, 2), random(3, 2), 6),
        "squared error, one number": Case(mse, random(), random(), 1),
        "squared error, images": Case(mse, random(2, 1, 2, 2), random(2, 1, 2, 2), 8),
        "squared error, weights": Case(bound(mse, weight=per_element), random(3, 2), random(3, 2), 6, 7.5),
        "Gaussian": Case(bound(gauss, var=0.25, full=True), random(3, 2), random(3, 2), 6),
        "Gaussian, a variance each": Case(bound(gauss, var=per_element, eps=0.1), random(3, 2), random(3, 2), 6),
        "Gaussian, a variance an example": Case(
            bound(gauss, var=torch.tensor([0.5, 1.0, 2.0]).double()), random(3, 2), random(3, 2), 6
        ),
        "Gaussian, a column of variances": Case(
            bound(gauss, var=torch.tensor([[0.5], [1.0], [2.0]]).double()), random(3, 2), random(3, 2), 6
        ),
        "binary": Case(bce, random(3, 2), binary, 6),
        "binary, one dimension": Case(bce, random(3), binary[:, 0], 3),
        "binary, positive weight": Case(bound(bce, pos_weight=pos_weight), random(3, 2), binary, 6),
        "binary, weights": Case(
            bound(bce, weight=torch.tensor([[1.0], [0.0], [2.0]]).double(), pos_weight=pos_weight),
            random(3, 2),
            binary,
            6,
        ),
        "binary of probabilities": Case(probability, random(3, 2).sigmoid(), binary, 6),
        "binary of probabilities, weights": Case(
            bound(probability, weight=per_element), random(3, 2).sigmoid(), binary, 6
        ),
        "multi-label": Case(multilabel, random(3, 2), binary, 6, 6),
        "multi-label, weights, images": Case(
            bound(multilabel, weight=pos_weight), random(2, 3, 2), binary.expand(2, 3, 2), 12, 12
        ),
        "soft margin": Case(soft, random(3, 2), sides, 6),
        "soft margin, other targets": Case(soft, random(3, 2), 2 * binary - 1, 6),
        "Poisson": Case(poisson, random(3, 2), counts, 6),
        "Poisson, full": Case(bound(poisson, full=True), random(3, 2), counts, 6),
        "Poisson, rates": Case(bound(poisson, log_input=False, eps=0.1), random(3, 2).exp(), counts, 6),
        "Huber": Case(bound(huber, delta=0.7), near, far, 6),
        "Huber, weights": Case(bound(huber, weight=per_element), near, far, 6),
        "smooth L1": Case(bound(smooth_l1, beta=0.5), near, far, 6),
        "squared margin": Case(squared, random(4, 3), y, 4, reference=margin),
        "squared margin, no batch": Case(squared, random(3), torch.tensor(2), 1, reference=margin),
        "squared margin, weights": Case(
            bound(squared, weight=weight, margin=1.5),
            random(4, 3),
            y,
            4,
            reference=bound(margin, weight=weight, margin=1.5),
        ),
    }


def batch_of(kind: str) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return {
        "labels": (random(6, 3).log_softmax(1), torch.tensor([0, 1, 2, 2, 0, 0])),
        "logarithms": (random(6, 3).log_softmax(1), random(6, 3).log_softmax(1)),
        "numbers": (random(6, 3), torch.rand(6, 3).double()),
        "probabilities": (torch.rand(6, 3).double(), torch.rand(6, 3).double()),
    }[kind]


def matrix_of(product: Callable[[Tensor], Tensor], shape: torch.Size) -> Tensor:
    units = torch.eye(shape.numel(), dtype=torch.float64)
    return torch.stack([product(unit.view(shape)).flatten() for unit in units])


def dense_hessian(loss_fn: Callable[..., Tensor], outputs: Tensor, targets: Any) -> Tensor:
    hessian = torch.autograd.functional.hessian(lambda o: loss_fn(o, targets), outputs)
    return hessian.reshape(outputs.numel(), outputs.numel())


def assert_mean(samples: Tensor, expected: Tensor) -> None:
    """The mean over the first dimension is ``expected``, to so many of its standard errors."""
    error = (samples.mean(0) - expected).abs()
    limit = STANDARD_ERRORS * (samples.std(0) / len(samples) ** 0.5).clamp_min(1e-12)
    assert bool((error <= limit).all()), f"off by {float((error / limit).max()) * STANDARD_ERRORS:.1f} standard errors"
