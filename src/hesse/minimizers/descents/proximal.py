"""Proximal Newton: the whole Hessian, magnitudes and bounds, one least value of the model a step.

The model of a composite function keeps what is not smooth as it is: ``l1 |x|`` and the bounds enter whole, only the
rest is replaced by its quadratic. ``Composite`` is that model for any curvature, ``Full`` the curvature of a dense
Hessian, ``BoxRegion`` the search that fits: it limits how far each coordinate goes, which to the model is only a
pair of bounds.

Special cases: Newton's method within a region (no L1, no bounds), sequential quadratic programming for bounds, glmnet's
and Lee, Sun and Saunders's proximal Newton for the lasso family. Near the solution the coordinates that rest on zero or
on a bound no longer change, and the steps are Newton's in the others: convergence is quadratic.

References:
    Friedman, Hastie and Tibshirani, Regularization paths for generalized linear models via coordinate descent,
    J. Stat. Software 2010.
    Tseng and Yun, A coordinate gradient descent method for nonsmooth separable minimization, Math. Programming 2009.
    Conn, Gould and Toint, Global convergence of a class of trust region algorithms for optimization with simple bounds,
    SIAM J. Numer. Anal. 1988.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hesse.minimizers.functions.function import Point
from hesse.minimizers.functions.returned import is_sparse
from hesse.minimizers.models.composite import Curvature, Direction, Kinks, least
from hesse.minimizers.models.dense import Model, Step
from hesse.tree import Params

__all__ = ["Composite", "Full", "Proximal"]

SWEEPS = 10
EPS = torch.finfo(torch.float64).eps
FLAT = 1e-10  # curvature, relative to the diagonal, that rounding can make negative


class Proximal:
    """A descent: the Hessian whole, L1 and bounds as they are.

    Example:
        >>> from hesse.minimizers.functions.autodiff import Autodiff
        >>> from hesse.minimizers.functions.border import border_of
        >>> from hesse.minimizers.functions.function import Function
        >>> border = border_of(torch.tensor([0.0, 0.0]))
        >>> f = Function(Autodiff(lambda x: (x[0] - 3) ** 2 + (x[1] - 0.2) ** 2, border), border, l1=1.0)
        >>> Proximal().model(f.at(border.x0), {}).within(math.inf).s  # soft thresholding, in one step
        tensor([2.5000, 0.0000])
    """

    def begin(self, point: Point) -> Params:
        """See :class:`hesse.minimizers.method.Descent`."""
        return {}

    def model(self, point: Point, memory: Params) -> Model:
        """See :class:`hesse.minimizers.method.Descent`."""
        H = point.hessian()
        return Composite(point, Full(H if isinstance(H, Tensor) else H.dense()))

    def update(self, memory: Params, old: Point, new: Point) -> Params:
        """See :class:`hesse.minimizers.method.Descent`."""
        return {}


class Composite:
    """A quadratic of the smooth part at a point, with the point's L1 and bounds.

    Args:
        point: where.
        curvature: of the smooth part.
        rtol: how well the model is minimised: of the largest subgradient.
    """

    natural = True

    def __init__(self, point: Point, curvature: Curvature, rtol: float = 1e-12) -> None:
        f, self.dtype, self.rtol = point.function, point.x.dtype, rtol
        self.curvature = curvature
        self.x, self.g = point.x.double(), point.gradient().double()
        ends = torch.full_like(self.x, math.inf)
        low, high = (-ends, ends) if f.bounds is None else (end.double() for end in f.bounds)
        self.kinks = Kinks(f.l1, low, high)
        self.place = least(curvature, self.g, self.x, self.kinks, rtol)
        self.predicted = -self.place.value
        self.lowest = self._least_curvature()

    def _least_curvature(self) -> float:
        """Of the directions in which x may go without rising at first order.

        A coordinate that rests on a kink and rises to both sides takes no part; one that is level to one side may go
        there, and only there.
        """
        left, right = self.kinks.slopes(self.x, self.g)
        level = 16 * EPS * _largest(self.g)
        up, down = (left == right) | (right <= level), (left == right) | (left >= -level)
        value, v = self.curvature.lowest(up | down)
        if value < 0 and not bool((up & down)[v != 0].all()):
            return _cone(self.curvature, v, up, down)
        return value

    @property
    def whole(self) -> Tensor:
        """The step to the least value [n]; where there is none, to that within the first region."""
        return self.within(math.inf if math.isfinite(self.predicted) else self.length).s

    @property
    def length(self) -> float:
        """The largest element of the whole step, or of the steepest descent's where the model has no least value."""
        if math.isfinite(self.predicted):
            return _largest(self.place.z - self.x)
        down = self.kinks.least(self.x, self.g)
        bend = abs(float(down @ self.curvature.times(down)))
        size = float(down @ down) / bend * _largest(down) if bend > 0 else _largest(down)
        return size if size > 0 else max(_largest(self.x), 1.0)

    def within(self, radius: float) -> Step:
        """The least value where no element of the step is larger than ``radius``."""
        place = self.place
        if not (math.isfinite(place.value) and _largest(place.z - self.x) <= radius):
            low, high = torch.maximum(self.kinks.low, self.x - radius), torch.minimum(self.kinks.high, self.x + radius)
            place = least(self.curvature, self.g, self.x, Kinks(self.kinks.l1, low, high), self.rtol)
        s = place.z - self.x
        return Step(s.to(self.dtype), -place.value, _largest(s))

    def cubed(self, sigma: float) -> Step:
        """Refused: a cube does not fall apart into coordinates, as L1 and bounds do."""
        raise TypeError("cubic regularisation knows neither L1 nor bounds; use method='prox-newton'.")


class Full:
    """The curvature of a dense Hessian.

    Args:
        H: [n, n] symmetric, dense or of scipy.sparse.
    """

    def __init__(self, H: Any) -> None:
        self.H = torch.as_tensor(H.toarray() if is_sparse(H) else H).double()
        self._positive: Tensor | None = None  # coordinates in which H was last found positive definite

    def times(self, v: Tensor) -> Tensor:
        """See :class:`hesse.minimizers.models.composite.Curvature`."""
        return self.H @ v

    def sweep(self, z: Tensor, r: Tensor, kinks: Kinks, patience: int) -> tuple[Tensor, Tensor]:
        """Coordinate descent: each coordinate that is not at its least value goes there, till kinks settle.

        In NumPy, on the CPU: a coordinate costs one row of H, and torch's calls would cost several times that.
        """
        H = self.H.cpu().numpy()
        new, slope = z.cpu().numpy().copy(), r.cpu().numpy().copy()
        low, high = kinks.low.cpu().numpy(), kinks.high.cpu().numpy()
        bends = H.diagonal()
        before, same = None, 0
        for _ in range(SWEEPS * patience):
            left = np.where(new <= low, -np.inf, slope + np.where(new > 0, kinks.l1, -kinks.l1))
            right = np.where(new >= high, np.inf, slope + np.where(new >= 0, kinks.l1, -kinks.l1))
            (moving,) = np.nonzero(((left > 0) | (right < 0)) & (bends > 0))
            for i in moving.tolist():
                a, old = float(bends[i]), float(new[i])
                u = old - float(slope[i]) / a
                t = kinks.l1 / a
                u = u - t if u > t else u + t if u < -t else 0.0 if t else u
                u = min(max(u, float(low[i])), float(high[i]))
                if u != old:
                    new[i] = u
                    slope += (u - old) * H[i]
            pattern = np.sign(new) * (kinks.l1 > 0) + 3.0 * (new <= low) + 9.0 * (new >= high)
            same = same + 1 if before is not None and np.array_equal(pattern, before) else 0
            if same >= patience or not len(moving):
                break
            before = pattern
        return torch.from_numpy(new).to(z.device), torch.from_numpy(slope).to(z.device) - r

    def solve(self, free: Tensor, force: Tensor, rtol: float, patience: int) -> Direction | None:
        """Newton's step by Cholesky; else, by eigenvalues' magnitudes, and on along the lowest if that is negative."""
        F = free.nonzero()[:, 0]
        p = torch.zeros_like(force)
        if not F.numel():
            return Direction(p, None, True)
        H, c = self.H[F][:, F] if F.numel() < len(p) else self.H, force[F]
        step = _newton(H, c)
        if step is not None:
            p[F], self._positive = step, free
            return Direction(p, None, True)
        if patience == 1 and F.numel() > 1:
            return None
        w, Q = torch.linalg.eigh(H)
        c, top = Q.T @ c, float(w.abs().max())
        if top == 0:
            p[F] = -force[F]
            return Direction(p, None, not bool(c.any()))
        level = 10 * len(w) * EPS
        flat, sloping = w.abs() <= level * top, c.abs() > level * float(force.abs().max())
        y = torch.where(flat & ~sloping, 0.0, -c / w.abs().clamp_min(1e-12 * top))
        if float(w[0]) < -level * top:
            far = max(float(y.norm()), EPS * top) if bool(y.any()) else 1.0
            y[0] = math.copysign(max(abs(float(y[0])), far), float(y[0]) or 1.0)
        p[F] = Q @ y
        return Direction(p, None, not bool(((w < -level * top) | (flat & sloping)).any()))

    def lowest(self, free: Tensor) -> tuple[float, Tensor]:
        """See :class:`hesse.minimizers.models.composite.Curvature`."""
        F = free.nonzero()[:, 0]
        v = torch.zeros(len(free), dtype=self.H.dtype, device=self.H.device)
        if not F.numel() or (self._positive is not None and not bool((free & ~self._positive).any())):
            return 1.0, v
        H = self.H[F][:, F]
        if _newton(H, v[F]) is not None:
            return 1.0, v
        w, Q = torch.linalg.eigh(H)
        v[F] = Q[:, 0]
        value = float(w[0])
        return (value if value < -10 * len(w) * EPS * float(w.abs().max()) else max(value, 0.0)), v


def _newton(H: Tensor, c: Tensor) -> Tensor | None:
    """``-H^{-1} c`` by Cholesky with the smallest shift, or None of a matrix with negative curvature.

    The matrix is scaled to a diagonal of ones first, so that it is as definite in any units of x. A shift keeps the
    curvature that is lost in rounding (more columns than rows, softmax, which does not see a common shift) from
    counting as negative; what it makes of the step, a second one puts right.
    """
    diagonal = H.diagonal()
    top = float(diagonal.max())
    if not top > 0 or not bool((diagonal >= 0).all()):
        return None
    d = torch.where(diagonal > 0, diagonal, top).rsqrt()
    scaled = d[:, None] * H * d
    for shift in (0.0, FLAT):
        scaled.diagonal().add_(shift)
        factor, info = torch.linalg.cholesky_ex(scaled)
        # A pivot of rounding alone passes for positive curvature.
        if not int(info) and float(factor.diagonal().min()) ** 2 > max(10 * len(d) * EPS, 0.5 * shift):
            step = -d * torch.cholesky_solve((d * c)[:, None], factor)[:, 0]
            # A slope where nothing curves is left over whole: there is no such step.
            return step if not shift or float((H @ step + c).norm()) <= 0.5 * float(c.norm()) else None
    return None


def _cone(curvature: Curvature, v: Tensor, up: Tensor, down: Tensor) -> float:
    """Curvature along v or against it, whichever is less, of what remains where coordinates may go one way only."""
    found = math.inf
    for way in (v, -v):
        part = way.masked_fill((way > 0) & ~up | (way < 0) & ~down, 0.0)
        size = float(part @ part)
        if size > 0:
            found = min(found, float(part @ curvature.times(part)) / size)
    return found if found < 0 else 0.0


def _largest(v: Tensor) -> float:
    return float(v.abs().max()) if v.numel() else 0.0
