"""How much a residual costs: losses rho that let outliers weigh less than their square.

    f(x) = 1/2 sum_i C^2 rho(z_i),   z_i = (r_i / C)^2

rho(z) = z is least squares; the others grow more slowly from about ``|r| = C`` on. All that a solver asks of a loss is
three numbers a residual: rho, rho' and rho''. The gradient is J' (rho' r), so rho' is a weight (iteratively reweighted
least squares); the curvature of f along r is ``rho' + 2 rho'' z``, smaller than that, and negative for the outliers of
a loss that flattens (Cauchy, arctan).

References:
    Triggs, McLauchlan, Hartley and Fitzgibbon, Bundle adjustment - a modern synthesis, 2000, section 4.3.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__ = ["LOSSES", "Rho", "loss_of"]

# The least part of the weight rho' that is kept as curvature where the loss bends down. At 0 an outlier would have a
# gradient and no curvature, and pull the step far away; at 1 it is reweighted least squares, which converges slowly.
KEPT = 0.1


class Rho(NamedTuple):
    """A loss at the residuals of one point: f = cost, its slope and its curvature along each residual.

    Args:
        cost: 1/2 sum C^2 rho.
        weight: [m], rho': the gradient is ``J' (weight * r)``.
        bend: [m], rho' + 2 rho'' z: the Hessian is ``J' diag(bend) J`` and a part with second derivatives of r.
    """

    cost: float
    weight: Tensor
    bend: Tensor

    @property
    def kept(self) -> Tensor:
        """[m], the bend where it is positive enough for a model that must not bend down."""
        return torch.maximum(self.bend, KEPT * self.weight)


Loss = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]


def _linear(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return z, torch.ones_like(z), torch.zeros_like(z)


def _huber(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    inside, root = z <= 1, z.clamp_min(1).sqrt()
    return (
        torch.where(inside, z, 2 * root - 1),
        torch.where(inside, 1.0, 1 / root),
        torch.where(inside, 0.0, -0.5 / root**3),
    )


def _soft_l1(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    root = (1 + z).sqrt()
    return 2 * z / (root + 1), 1 / root, -0.5 / root**3  # 2 (root - 1), without its cancellation for small z


def _cauchy(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return z.log1p(), 1 / (1 + z), -1 / (1 + z) ** 2


def _arctan(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return z.arctan(), 1 / (1 + z * z), -2 * z / (1 + z * z) ** 2


LOSSES: dict[str, Loss] = {
    "linear": _linear,
    "huber": _huber,
    "soft_l1": _soft_l1,
    "cauchy": _cauchy,
    "arctan": _arctan,
}


def loss_of(loss: str | Callable[[Any], Any], f_scale: float, *, arrays: bool = False) -> Callable[[Tensor], Rho]:
    """The loss by its name in SciPy, or of the user's own rho, as a function of residuals [m].

    Args:
        loss: one of ``LOSSES``; or a function of z [m] that returns rho(z) [m], differentiated by torch, or SciPy's
            [3, m] with rho, rho' and rho''.
        f_scale: C, positive.
        arrays: whether the user's function takes NumPy arrays.

    Raises:
        TypeError, ValueError: no such loss; f_scale is not positive; at the call, what the user's function returned.

    Example:
        >>> rho = loss_of("cauchy", 2.0)(torch.tensor([0.0, 2.0]))  # 1/2 4 log(1 + 1)
        >>> round(rho.cost, 4), rho.weight
        (1.3863, tensor([1.0000, 0.5000]))
    """
    if not (isinstance(f_scale, int | float) and 0 < f_scale < float("inf")):
        raise ValueError(f"f_scale must be positive, the size of residuals that are no outliers; got {f_scale!r}.")
    if isinstance(loss, str):
        if loss not in LOSSES:
            known = ", ".join(LOSSES)
            raise ValueError(f"loss must be one of {known}, or a function of z = (r / f_scale)^2; got {loss!r}.")
        three = LOSSES[loss]
    elif callable(loss):
        given = loss

        def three(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return _three(given, z, arrays)
    else:
        raise TypeError(f"loss must be a name or a function of z = (r / f_scale)^2; got {type(loss).__name__}.")

    def at(r: Tensor) -> Rho:
        z = (r / f_scale) ** 2
        rho, slope, bend = three(z)
        return Rho(0.5 * f_scale**2 * float(rho.sum()), slope, slope + 2 * bend * z)

    return at


def _three(loss: Callable[[Any], Any], z: Tensor, arrays: bool) -> tuple[Tensor, Tensor, Tensor]:
    m = len(z)
    if arrays:
        values = np.asarray(loss(z.numpy()))
        if values.shape != (3, m):
            raise ValueError(
                f"loss must return rho, rho' and rho'' as an array [3, {m}] when residuals are arrays, which nothing "
                f"differentiates; got {list(values.shape)}. On tensors rho alone is enough."
            )
        first, slope, bend = torch.from_numpy(values).to(z)
        return first, slope, bend
    with torch.enable_grad():
        leaf = z.detach().clone().requires_grad_()
        rho = loss(leaf)
        if not isinstance(rho, Tensor):
            raise TypeError(f"loss must return a tensor, rho of each z; got {type(rho).__name__}.")
        if rho.shape == (3, m):
            first, slope, bend = rho.detach()
            return first, slope, bend
        if rho.shape != (m,):
            raise ValueError(f"loss must return rho of each z, [{m}] (or [3, {m}] as in SciPy); got {list(rho.shape)}.")
        slope = _slope(rho, leaf)
        return rho.detach(), slope.detach(), _slope(slope, leaf).detach()


def _slope(values: Tensor, z: Tensor) -> Tensor:
    if not values.requires_grad:
        return torch.zeros_like(z)
    (slope,) = torch.autograd.grad(values.sum(), z, create_graph=True, allow_unused=True, materialize_grads=True)
    return slope
