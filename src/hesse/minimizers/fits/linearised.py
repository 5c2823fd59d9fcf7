"""Models of a sum of squares, in lengths that suit x: ``||f + J s||^2 / 2`` within ``||D s|| <= radius``.

The matrix is taken apart, never squared: with ``J D^{-1} = U S V'`` the steps of all lengths are
``-V S U'f / (S^2 + shift)``, and half the digits are not lost as they are in ``J'J``. That is Levenberg's and
Marquardt's step with the shift found by the radius (More 1978); the dogleg bends to Gauss-Newton's step instead; a J
that is known by products alone is brought into a small bidiagonal one first (Golub and Kahan; LSTR of Cartis, Gould and
Toint 2009). ``Curved`` measures a whole Hessian in the same lengths.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from hesse.minimizers.models.dense import Dense, Model, Step
from hesse.minimizers.models.secular import cubic, trust_region

__all__ = ["Curved", "Linear", "Turning", "bidiagonal"]


class Linear:
    """The residuals made linear.

    Args:
        J: [m, n].
        f: [m].
        scale: [n], the diagonal of D, positive.
        dogleg: whether steps follow the dogleg instead of the curve of all shifts.
        basis: V [n, k], where J is the [m, k] of a J D^{-1} V (see :func:`bidiagonal`).
        dtype: of x, by default that of J.

    Example:
        >>> model = Linear(torch.diag(torch.tensor([1.0, 2.0])), torch.tensor([3.0, 0.0]), torch.ones(2))
        >>> model.within(10.0).s, model.within(1.0).predicted  # 9/2 - (3 - 1)^2 / 2
        (tensor([-3., 0.]), 2.5)
    """

    natural = True

    def __init__(
        self,
        J: Tensor,
        f: Tensor,
        scale: Tensor,
        *,
        dogleg: bool = False,
        basis: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.dtype, self.scale, self.dogleg = dtype or J.dtype, scale.double(), dogleg
        self.lowest = 0.0
        self.f, n = f.double(), J.shape[1]
        self.A = A = J.double() / self.scale if basis is None else J
        b = self.f
        if len(A) > n:
            # A rotation of the rows changes no length: n + 1 rows are left.
            R = torch.linalg.qr(torch.cat([A, b[:, None]], 1), mode="r")[1]
            A, b = R[:n, :n], R[:n, n]
        U, S, V = torch.linalg.svd(A, full_matrices=False)
        # What rounding leaves of a dependent column is no direction to go.
        kept = torch.finfo(self.dtype).eps * max(J.shape) * S.max() < S if S.numel() else S > 0
        k = int(kept.sum())
        self.S, self.V, self.b = S[:k].flip(0), V[:k].flip(0), (U[:, :k].mT @ b).flip(0)
        if basis is not None:
            self.V = self.V @ basis.mT
        self.newton = -self.b / self.S
        self.predicted = 0.5 * float(self.b @ self.b)
        self.length = float(self.newton.norm())

    def within(self, radius: float) -> Step:
        if self.length <= radius:
            return self._step(self.newton)
        if self.dogleg:
            return self._step(self._bent(radius))
        return self._step(trust_region(self.S**2, self.S * self.b, radius)[0])

    def cubed(self, sigma: float) -> Step:
        return self._step(cubic(self.S**2, self.S * self.b, sigma)[0])

    @property
    def whole(self) -> Tensor:
        """Gauss-Newton's step, the shortest if there are several."""
        return self._step(self.newton).s

    def gain(self, s: Tensor) -> float:
        """Decrease of the model by the step ``s``."""
        t = self.A @ (self.scale * s.double())
        return -float(t @ (self.f + 0.5 * t))

    def _bent(self, radius: float) -> Tensor:
        g = self.S * self.b
        cauchy = -g * (g @ g) / (self.S * g).square().sum()
        size = float(cauchy.norm())
        if size >= radius:
            return cauchy * (radius / size)
        side = self.newton - cauchy
        a, b, c = float(side @ side), float(cauchy @ side), size**2 - radius**2
        return cauchy + side * (-c / (b + math.sqrt(b * b - a * c)))

    def _step(self, y: Tensor) -> Step:
        t = self.S * y
        return Step((self.V.mT @ y / self.scale).to(self.dtype), -float(t @ (self.b + 0.5 * t)), float(y.norm()))


class Curved:
    """A whole Hessian, which may bend down, in the same lengths.

    Args:
        H: [n, n].
        g: [n].
        x: [n], where they were taken.
        scale: [n], the diagonal of D, positive.
    """

    natural = True

    def __init__(self, H: Tensor, g: Tensor, x: Tensor, scale: Tensor) -> None:
        self.H, self.g, self.scale, self.dtype = H.double(), g.double(), scale.double(), g.dtype
        self.inner = Dense(self.H / self.scale / self.scale[:, None], self.g / self.scale, self.scale * x)
        self.predicted, self.lowest, self.length = self.inner.predicted, self.inner.lowest, self.inner.length

    @property
    def whole(self) -> Tensor:
        """Newton's step."""
        return self.inner.whole / self.scale

    def within(self, radius: float) -> Step:
        return self._step(self.inner.within(radius))

    def cubed(self, sigma: float) -> Step:
        return self._step(self.inner.cubed(sigma))

    def gain(self, s: Tensor) -> float:
        """Decrease of the model by the step ``s``."""
        return -float(s.double() @ (self.g + 0.5 * (self.H @ s.double())))

    def _step(self, step: Step) -> Step:
        return step._replace(s=(step.s / self.scale).to(self.dtype))


class Turning:
    """A linear model at first; the curved one when asked again at the same point, for the step was refused.

    Args:
        first: the linear model.
        second: forms the curved one.
        enough: a step of the first that promises as much is taken shorter instead.
    """

    natural = True

    def __init__(self, first: Model, second: Callable[[], Model], enough: float) -> None:
        self.first, self.second, self.enough = first, second, enough
        self.predicted, self.lowest = first.predicted, first.lowest
        self.asked = False

    @property
    def whole(self) -> Tensor:
        """That of the first."""
        return self.first.whole

    @property
    def length(self) -> float:
        """That of the first."""
        return self.first.length

    def within(self, radius: float) -> Step:
        step = self.first.within(radius)
        if self.asked and step.predicted < self.enough:
            return self.second().within(radius)
        self.asked = True
        return step

    def cubed(self, sigma: float) -> Step:
        return self.first.cubed(sigma)


def bidiagonal(
    push: Callable[[Tensor], Tensor],
    pull: Callable[[Tensor], Tensor],
    f: Tensor,
    scale: Tensor,
    rtol: float,
    limit: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """A basis V [n, k] of the Krylov space of J'f in which J is bidiagonal: ``J D^{-1} V = U B``, f = U (beta, 0, ...).

    Args:
        push, pull: ``v -> J v`` and ``u -> J'u``.
        f: [m].
        scale: [n], the diagonal of D.
        rtol: the space is large enough when the gradient that its best step leaves is this small, relative to J'f.
        limit: the most columns.

    Returns:
        B [k + 1, k], the projected f [k + 1] and V, all float64.
    """
    u = f.double()
    beta = first = float(u.norm())
    u = u / beta if beta > 0 else u
    rows: list[tuple[float, float]] = []
    V: list[Tensor] = []
    v = pull(u.to(f.dtype)).double() / scale
    alpha = start = float(v.norm())
    reduced, left = alpha, beta
    while alpha > 0 and len(V) < limit:
        V.append(v / alpha)
        w = push((V[-1] / scale).to(f.dtype)).double() - alpha * u
        beta = float(w.norm())
        rows.append((alpha, beta))
        u = w / beta if beta > 0 else w
        v = pull(u.to(f.dtype)).double() / scale - beta * V[-1]
        basis = torch.stack(V, 1)
        v = v - basis @ (basis.mT @ v)
        v = v - basis @ (basis.mT @ v)
        # Givens rotations as in LSQR tell what the step of this space would leave of the gradient.
        rho = math.hypot(reduced, beta)
        c, s = reduced / rho, beta / rho
        last, alpha = alpha, float(v.norm())
        reduced, left = -c * alpha, s * left
        if alpha * left * abs(c) <= rtol * start * first or alpha <= 1e-14 * last or beta == 0:
            break
    k = len(V)
    B = f.new_zeros(k + 1, k, dtype=torch.float64)
    for i, (a, b) in enumerate(rows):
        B[i, i], B[i + 1, i] = a, b
    head = B.new_zeros(k + 1)
    head[0] = first
    return B, head, torch.stack(V, 1) if V else f.new_zeros(len(scale), 0, dtype=torch.float64)
