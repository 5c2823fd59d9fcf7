"""What a row of the coverage table is measured on: a tiny model, a loss and a batch, in float64.

Layers and functions are fed with parameters, so that second derivatives run through their inputs as well as through
their weights, and mix the two. The loss is smooth and no quadratic, so that neither Hessian nor Gauss-Newton matrix is
trivial, and weighs every output differently, so that no symmetry hides a fault.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

__all__ = ["Fed", "Subject", "Table", "apart", "fed", "near", "read", "smooth", "spread", "symmetric"]


class Subject(NamedTuple):
    """
    Args:
        model: the model, with all parameters in float64.
        loss_fn: ``loss_fn(outputs, targets)``.
        batch: inputs and targets.
        plain: a subject of the same parameters whose differences are the products asked for, where those of this one
            are not: its values are rounded coarsely, or the products mean another function by convention.
        error: how far rounding alone may take the products from the reference, where more than usual.
    """

    model: nn.Module
    loss_fn: Callable[[Any, Any], Tensor]
    batch: tuple[Any, Any]
    plain: Subject | None = None
    error: float | None = None


Table = dict[str, Callable[[], Subject]]


def smooth(outputs: Tensor, targets: Tensor) -> Tensor:
    """The mean of ``w log cosh(output - target)``, w from 1/2 to 3/2."""
    terms = (outputs - targets).cosh().log().flatten()
    return (terms * torch.linspace(0.5, 1.5, len(terms), dtype=terms.dtype)).mean()


class Fed(nn.Module):
    """A layer or function on inputs that are parameters themselves, times the batch's only number.

    Args:
        function: what is called; a module is registered, so its parameters count.
        given: initial values of the inputs.
        take: picks one real tensor of what comes out.
    """

    def __init__(
        self, function: Callable[..., Any], *given: Tensor, take: Callable[[Any], Tensor] = lambda y: y
    ) -> None:
        super().__init__()
        self.layer = function
        self.given = nn.ParameterList(nn.Parameter(x.detach().clone()) for x in given)
        self.take = take

    def forward(self, scale: Tensor) -> Tensor:
        return self.take(self.layer(*(scale * x for x in self.given)))


def fed(function: Callable[..., Any], *given: Tensor, take: Callable[[Any], Tensor] = lambda y: y) -> Subject:
    """The function, fed with parameters, under the smooth loss."""
    if isinstance(function, nn.Module):
        if isinstance(function, LazyModuleMixin):
            function(*given)  # its parameters get their shapes
        stir(function)
    return Subject(Fed(function, *given, take=take), smooth, (torch.tensor(1.0), torch.tensor(0.3)))


def read(model: nn.Module, inputs: Any) -> Subject:
    """A model that reads its batch, under the smooth loss."""
    stir(model)
    return Subject(model, smooth, (inputs, torch.tensor(0.3)))


def stir(model: nn.Module) -> None:
    """Norms and biases leave their ones and zeros, where much cancels."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))


def spread(*shape: int, width: float = 1.9) -> Tensor:
    """Shuffled, evenly spaced values in (-width, width), none zero: far from kinks at zero and from one another."""
    count = torch.Size(shape).numel()
    values = (torch.arange(count) + 0.37) / count * 2 - 1
    return (width * values)[torch.randperm(count)].reshape(shape)


def apart(*shapes: tuple[int, ...]) -> list[Tensor]:
    """Several tensors of spread values, of which no two are equal: their differences are away from zero, too."""
    sizes = [torch.Size(shape).numel() for shape in shapes]
    return [part.reshape(shape) for part, shape in zip(spread(sum(sizes)).split(sizes), shapes, strict=True)]


def near(centre: float, *shape: int, width: float = 0.4) -> Tensor:
    """Distinct values in (centre - width, centre + width)."""
    return centre + spread(*shape, width=width)


def symmetric(size: int) -> Tensor:
    """A positive definite matrix with eigenvalues well apart."""
    q = torch.linalg.qr(torch.randn(size, size)).Q
    return q @ torch.diag(1.0 + torch.arange(size)) @ q.T
