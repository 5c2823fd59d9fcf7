"""One step of conjugate gradients or of MINRES on several columns at once, by short recursions.

Both keep a few vectors and scalars for each column, and nothing else: ``step`` takes one block product and says of each
column whether it may go on. What has been achieved is ``x`` and ``residual``; when to stop is not decided here, but in
:mod:`hesse.linalg.krylov`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hesse.linalg.lanczos import working_dtype

if TYPE_CHECKING:
    from hesse.linalg.operator import LinearOperator

__all__ = [
    "LEAST_SQUARES",
    "NEGATIVE",
    "NOT_DEFINITE",
    "NOT_FINITE",
    "RUNNING",
    "ConjugateGradients",
    "Damped",
    "MinimalResiduals",
    "norm",
]

RUNNING = "running"
NOT_FINITE = "not finite"
NEGATIVE = "negative curvature"
NOT_DEFINITE = "preconditioner not definite"
LEAST_SQUARES = "least squares"


class Damped:
    """``A + damping I`` and a preconditioner, with the products counted and the curvature on the way kept in mind."""

    def __init__(
        self,
        A: LinearOperator,
        damping: float,
        preconditioner: LinearOperator | Callable[[Tensor], Tensor] | None,
        rtol: float,
    ) -> None:
        self.A = A
        self.damping = damping
        # Where ||A r|| is below this share of ||A|| ||r||, the recursion of MINRES has lost its digits: measured on
        # singular systems, x grows without bound from there on. A restart shows whether more can be had.
        self.flat = max(0.01 * rtol, math.sqrt(torch.finfo(working_dtype(A)).eps))
        self.preconditioner = preconditioner
        self.steps = 0
        self.scale = 0.0  # the largest ||A v|| / ||v|| met
        self.lowest = 0.0  # the most negative v'Av / v'v met, beyond rounding

    def multiply(self, v: Tensor) -> Tensor:
        """``(A + damping I) v``."""
        self.steps += 1
        Av = (self.A @ v).to(v.dtype)
        vv = dot(v, v)
        self.scale = max(self.scale, float((norm(Av) / vv.sqrt()).nan_to_num(0, 0).max()))
        lowest = float((dot(v, Av) / vv).nan_to_num(0, 0, 0).min())
        if lowest < -100 * torch.finfo(v.dtype).eps * self.scale:
            self.lowest = min(self.lowest, lowest)
        return Av + self.damping * v

    def precondition(self, r: Tensor) -> Tensor:
        """``P r``, in a tensor of its own."""
        if self.preconditioner is None:
            return r.clone()
        # An operator is no callable: it is applied by @, as everywhere.
        P = self.preconditioner
        return (P(r) if callable(P) else P @ r).to(r.dtype, copy=True)


class _Recursion:
    """What both have in common: ``x`` [n, k], ``residual`` [k] by the recursion, and columns that leave."""

    x: Tensor
    residual: Tensor

    def step(self) -> list[str]:
        """One block product; of each column, RUNNING or why it cannot go on."""
        raise NotImplementedError

    def keep(self, columns: Sequence[int]) -> None:
        """Go on with these columns alone."""
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value[..., list(columns)])


class ConjugateGradients(_Recursion):
    """To the minimum of ``x'(A + damping I)x / 2 - b'x`` along directions conjugate to all before."""

    def __init__(self, damped: Damped, b: Tensor) -> None:
        self.damped = damped
        self.x = torch.zeros_like(b)
        self.r = b.clone()
        self.p = damped.precondition(b)
        self.rz = dot(b, self.p)
        self.residual = norm(b)

    def step(self) -> list[str]:
        Ap = self.damped.multiply(self.p)
        curvature = dot(self.p, Ap)
        reports = [
            NOT_FINITE if not math.isfinite(c * rz) else NOT_DEFINITE if rz <= 0 else NEGATIVE if c <= 0 else RUNNING
            for c, rz in zip(curvature.tolist(), self.rz.tolist(), strict=True)
        ]
        going = torch.tensor([report == RUNNING for report in reports], device=self.x.device)
        alpha = torch.where(going, self.rz / curvature, 0.0).to(self.x)
        self.x += alpha * self.p.where(going, 0.0)
        self.r -= alpha * Ap.where(going, 0.0)
        z = self.damped.precondition(self.r)
        before, self.rz = self.rz, dot(self.r, z)
        self.p = z + (self.rz / before).to(z) * self.p
        self.residual = norm(self.r)
        return reports


class MinimalResiduals(_Recursion):
    """To the smallest residual of the Krylov space: Lanczos, and a QR factorisation of its tridiagonal matrix.

    v is the Lanczos vector and z = P v, gamma their norm; w are the directions that QR makes of them, (c, s) its last
    two rotations, and eta the residual in the norm of P.
    """

    def __init__(self, damped: Damped, b: Tensor) -> None:
        self.damped = damped
        self.x = torch.zeros_like(b)
        self.v, self.v_old = b.clone(), torch.zeros_like(b)
        self.z = damped.precondition(b)
        self.w, self.w_old = torch.zeros_like(b), torch.zeros_like(b)
        self.vz = dot(self.v, self.z)
        self.gamma = self.vz.clamp_min(0).sqrt()
        self.gamma_old = torch.ones_like(self.vz)
        self.eta = self.gamma
        self.c, self.c_old = torch.ones_like(self.vz), torch.ones_like(self.vz)
        self.s, self.s_old = torch.zeros_like(self.vz), torch.zeros_like(self.vz)
        self.size = torch.zeros_like(self.vz)  # of A, as far as its columns in the Krylov space show it
        self.unit = norm(b) / self.gamma
        self.residual = norm(b)

    def step(self) -> list[str]:
        before = self.vz
        z = self.z / self.gamma.to(self.z)
        Az = self.damped.multiply(z)
        delta = dot(z, Az)
        v = Az - (delta / self.gamma).to(z) * self.v - (self.gamma / self.gamma_old).to(z) * self.v_old
        self.v_old, self.v = self.v, v
        self.z = self.damped.precondition(v)
        self.vz = dot(v, self.z)
        gamma = self.vz.clamp_min(0).sqrt()
        first = self.c * delta - self.c_old * self.s * self.gamma
        second = self.s * delta + self.c_old * self.c * self.gamma
        third = self.s_old * self.gamma
        pivot = torch.hypot(first, gamma)
        self.size = torch.maximum(self.size, torch.hypot(delta, gamma))
        # ||A r|| / ||r||, which vanishes where no x makes the residual smaller (Choi, Paige and Saunders, 2011).
        slope = torch.hypot(first, self.c * gamma)
        flat = slope <= self.damped.flat * self.size
        reports = [
            NOT_DEFINITE if b <= 0 else NOT_FINITE if not math.isfinite(p) else LEAST_SQUARES if f else RUNNING
            for p, b, f in zip((pivot + self.vz).tolist(), before.tolist(), flat.tolist(), strict=True)
        ]
        going = torch.tensor([report == RUNNING for report in reports], device=z.device)
        w = (z - third.to(z) * self.w_old - second.to(z) * self.w) / pivot.to(z)
        self.w_old, self.w = self.w, w
        self.c_old, self.c, self.s_old, self.s = self.c, first / pivot, self.s, gamma / pivot
        self.x += torch.where(going, self.c * self.eta, 0.0).to(z) * w.where(going, 0.0)
        self.eta = torch.where(going, -self.s * self.eta, self.eta)
        self.gamma_old, self.gamma = self.gamma, gamma
        self.residual = self.eta.abs() * self.unit
        return reports


def dot(x: Tensor, y: Tensor) -> Tensor:
    """Inner products of columns, summed in float64: [k]."""
    return torch.sum(x * y, dim=0, dtype=torch.float64)


def norm(x: Tensor) -> Tensor:
    """Lengths of columns, summed in float64: [k]."""
    return torch.linalg.vector_norm(x, dim=0, dtype=torch.float64)
