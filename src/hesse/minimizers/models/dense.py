"""Quadratic models of the function at a point, and their least value within a radius.

    m(s) = f + g's + 1/2 s'H s

A model is asked by a search for steps of several lengths, after each other, at one point; what is expensive is done
once. ``Dense`` has the whole Hessian and solves exactly (More and Sorensen); ``Krylov`` knows H by products and
solves exactly in the Krylov space of g (Gould, Lucidi, Roma and Toint); ``Steihaug`` goes along conjugate gradients to
the edge of the region; ``Dogleg`` bends from the steepest descent to Newton's step.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from hesse.minimizers.models.secular import cubic, trust_region

__all__ = ["Dense", "Model", "Step"]


class Step(NamedTuple):
    """A step that a model proposes.

    Args:
        s: [n].
        predicted: decrease of the function by the model, ``m(0) - m(s)``.
        length: of s, in the norm in which the model measures the region.
    """

    s: Tensor
    predicted: float
    length: float


class Model(Protocol):
    """What searches ask.

    Args:
        predicted: decrease promised by the whole step; inf where the model has no least value, or it is out of reach.
        lowest: least curvature met, negative where the model has no least value.
        natural: whether the whole step has a length of its own, as Newton's has and the gradient has not.
        whole: [n] the whole step, for searches on a line; downhill whatever the curvature.
        length: of a first step: of the whole one, or what the scales of g and H suggest.
    """

    @property
    def predicted(self) -> float: ...

    @property
    def lowest(self) -> float: ...

    @property
    def natural(self) -> bool: ...

    @property
    def whole(self) -> Tensor: ...

    @property
    def length(self) -> float: ...

    def within(self, radius: float) -> Step:
        """The least value in ``||s|| <= radius``."""

    def cubed(self, sigma: float) -> Step:
        """The least value of ``m(s) + sigma/3 ||s||^3``."""


class Dense:
    """The model of a dense Hessian: Cholesky where Newton's step fits, an eigendecomposition where it does not.

    Args:
        H: [n, n] symmetric.
        g: [n].
        x: [n], for a gradient is known up to the rounding of H x.
    """

    natural = True

    def __init__(self, H: Tensor, g: Tensor, x: Tensor) -> None:
        self.H, self.g, self.x = H.double(), g.double(), x.double().abs()
        self.dtype = g.dtype
        self._eigen: tuple[Tensor, Tensor, Tensor] | None = None
        self.lowest = 1.0
        self.newton = self._by_cholesky()
        if self.newton is None:
            self.newton = self._by_eigenvalues()
        self.predicted = math.inf if self.newton is None else -0.5 * float(self.g @ self.newton)

    def _by_cholesky(self) -> Tensor | None:
        """Newton's step of a matrix that is definite in any units of x: of one scaled to a diagonal of ones."""
        if not bool((self.H.diagonal() > 0).all()):
            return None
        d = self.H.diagonal().rsqrt()
        factor, info = torch.linalg.cholesky_ex(d[:, None] * self.H * d)
        # A pivot of rounding alone passes for positive curvature.
        if int(info) or float(factor.diagonal().min()) ** 2 <= 10 * d.numel() * torch.finfo(self.dtype).eps:
            return None
        return -d * torch.cholesky_solve((d * self.g)[:, None], factor)[:, 0]

    def _by_eigenvalues(self) -> Tensor | None:
        """Newton's step in the directions that curve, if no other can be gone down."""
        w, Q, c = self.eigen
        self.lowest = float(w.min())
        flat = w == 0
        return None if self.lowest < 0 or bool(c[flat].any()) else Q @ (-c / w.masked_fill(flat, 1.0))

    @property
    def eigen(self) -> tuple[Tensor, Tensor, Tensor]:
        """Eigenvalues [n] ascending, eigenvectors [n, n] in columns, the gradient [n] among them.

        Where neither gradient nor curvature is above rounding both are 0: minima that are lines or planes (the
        rotations of a molecule) are minima.
        """
        if self._eigen is None:
            w, Q = torch.linalg.eigh(self.H)
            c = Q.T @ self.g
            top, eps = float(w.abs().max()), torch.finfo(self.dtype).eps
            # Half the digits for the curvature: it is only as flat as the gradient is small.
            flat = (w.abs() <= eps**0.5 * top) & (c.abs() <= w.numel() * eps * (Q.abs().T @ (self.H.abs() @ self.x)))
            self._eigen = w.masked_fill(flat, 0.0), Q, c.masked_fill(flat, 0.0)
        return self._eigen

    def flattened(self) -> Dense:
        """The same where negative curvature counts as none, and slopes along it as rounding."""
        w, Q, c = self.eigen
        positive = w > 0
        other = Dense(Q * (w * positive) @ Q.T, Q @ (c * positive), self.x)
        other._eigen = w * positive, Q, c * positive
        other.lowest, other.newton = 0.0, Q @ (-c / w.masked_fill(~positive, math.inf))
        other.predicted = -0.5 * float(self.g @ other.newton)
        other.dtype = self.dtype
        return other

    @property
    def length(self) -> float:
        """Of Newton's step, or of what it were with the curvatures' magnitudes."""
        if self.newton is not None:
            return float(self.newton.norm())
        w, _, c = self.eigen
        return first_length(w, c)

    @property
    def whole(self) -> Tensor:
        """Newton's step; where the curvature is not positive, the least value within ``length``."""
        return self.within(self.length).s

    def within(self, radius: float) -> Step:
        if self.newton is not None and self.length <= radius:
            return Step(self.newton.to(self.dtype), self.predicted, self.length)
        w, Q, c = self.eigen
        return self._step(Q, trust_region(w, c, radius)[0])

    def cubed(self, sigma: float) -> Step:
        w, Q, c = self.eigen
        return self._step(Q, cubic(w, c, sigma)[0])

    def _step(self, Q: Tensor, y: Tensor) -> Step:
        w, _, c = self.eigen
        return Step((Q @ y).to(self.dtype), -float(c @ y + 0.5 * (w * y) @ y), float(y.norm()))


def first_length(w: Tensor, c: Tensor) -> float:
    """Length of Newton's step with the curvatures' magnitudes, small ones raised, where it has no least value to go to.

    Args:
        w: [n] eigenvalues.
        c: [n] gradient among the eigenvectors.
    """
    if float(w.min()) > 0:
        return float((c / w).norm())
    top = float(w.abs().max())
    return float((c / w.abs().clamp_min(1e-3 * top)).norm()) if top > 0 else float(c.norm())
