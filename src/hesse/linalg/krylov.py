"""Solve ``(A + damping I) x = b`` with products alone: conjugate gradients and MINRES, each column by its own clock.

Both pick the best x of the Krylov space of b. Conjugate gradients (Hestenes and Stiefel, 1952) need a definite
operator, and are used where damping makes a psd one so. MINRES (Paige and Saunders, 1975) makes the residual
smallest: it needs symmetry only, and where the operator is singular it ends at a least-squares solution instead of
running away.

What the recursions believe of the residual drifts away from it, the more the lower the precision. So the true
residual is computed at the end, and the solve taken up from there until it holds, or rounding is all that is left.
Not converging is an answer: it has a status.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hesse.linalg.lanczos import require_symmetric, working_dtype
from hesse.linalg.recursions import (
    LEAST_SQUARES,
    NEGATIVE,
    NOT_DEFINITE,
    NOT_FINITE,
    RUNNING,
    ConjugateGradients,
    Damped,
    MinimalResiduals,
    norm,
)
from hesse.tree import Layout, Params

if TYPE_CHECKING:
    from hesse.linalg.operator import LinearOperator

__all__ = ["Solution", "solve"]

CONVERGED = "converged"
ROUNDING = "rounding"

_SENTENCES = {
    RUNNING: "out of steps: give more max_steps, more damping or a preconditioner",
    NOT_FINITE: "a product or the right-hand side is not finite: look for NaN in the parameters, the batch or b",
    NEGATIVE: "negative curvature: v'(A + damping I)v <= 0 for a v on the way, where x stops; more damping helps",
    NOT_DEFINITE: "the preconditioner is not positive definite: r'P r <= 0 for a residual r",
    LEAST_SQUARES: "singular, and b has a part that no x reaches: x is a least-squares solution; damping helps",
    ROUNDING: "rounding: in this dtype the residual becomes no smaller",
}


@dataclass(frozen=True)
class Solution:
    """What a solve says.

    Args:
        x: [n] or [n, k] as the right-hand side, or named tensors.
        residual: ``||b - (A + damping I) x|| / ||b||``, computed from x, of the worst column.
        steps: block products spent.
        converged: whether every column's residual is within rtol.
        status: "converged", or what happened and what to do.
    """

    x: Tensor | Params
    residual: float
    steps: int
    converged: bool
    status: str = CONVERGED

    def named(self, layout: Layout) -> Solution:
        """The same with x as named tensors."""
        return replace(self, x=layout.split(self.x)) if isinstance(self.x, Tensor) else self


def solve(
    A: LinearOperator,
    b: Tensor,
    *,
    damping: float = 0.0,
    rtol: float = 1e-6,
    max_steps: int | None = None,
    preconditioner: LinearOperator | Callable[[Tensor], Tensor] | None = None,
) -> Solution:
    """``(A + damping I) x = b`` for a symmetric operator.

    Args:
        A: n x n, symmetric.
        b: [n], or columns [n, k].
        damping: added to the eigenvalues, not negative.
        rtol: of the residual of each column, relative to b.
        max_steps: the most block products; by default ten for each row, and no more than 1000.
        preconditioner: ``r -> P r`` on columns [n, k], P symmetric positive definite and close to the inverse.

    Raises:
        TypeError: A is not declared symmetric, or b is no real tensor.
        ValueError: the shape of b is another, or damping, rtol or max_steps make no sense.

    Example:
        >>> from hesse.linalg import LinearOperator
        >>> A = LinearOperator.of(torch.tensor([[2.0, 1.0], [1.0, 2.0]]), psd=True)
        >>> found = solve(A, torch.tensor([1.0, 0.0]), damping=1.0)  # 3 x + y = 1, x + 3 y = 0
        >>> found.converged, (8 * found.x).round(decimals=4)
        (True, tensor([ 3., -1.]))
    """
    require_symmetric(A, "solve")
    if not damping >= 0:
        raise ValueError(
            f"damping must not be negative; got {damping}. To shift an operator the other way, subtract "
            "LinearOperator.identity(A) times the shift from it: what remains is symmetric, and MINRES solves it."
        )
    if not rtol > 0 or (max_steps is not None and max_steps < 1):
        raise ValueError(f"rtol must be positive and max_steps at least 1; got rtol={rtol}, max_steps={max_steps}.")
    limit = min(10 * A.shape[0], 1000) if max_steps is None else max_steps
    columns = _columns(A, b)
    damped = Damped(A, damping, preconditioner, rtol)
    x, residual, reports = _solve(damped, columns, rtol, limit)
    # A NaN among the residuals is the worst of them.
    worst = float(residual.max()) if len(reports) else 0.0
    converged = all(report == CONVERGED for report in reports)
    return Solution(x[:, 0] if b.ndim == 1 else x, worst, damped.steps, converged, _status(damped, reports, worst))


def _columns(A: LinearOperator, b: Tensor) -> Tensor:
    n = A.shape[0]
    if not isinstance(b, Tensor) or b.is_complex():
        kind = b.dtype if isinstance(b, Tensor) else type(b).__name__
        raise TypeError(f"the right-hand side must be a real tensor [{n}] or [{n}, k]; got {kind}.")
    if b.ndim not in (1, 2) or b.shape[0] != n:
        raise ValueError(f"the right-hand side must be [{n}] or [{n}, k]; got shape {list(b.shape)}.")
    b = b.detach().to(A.device, working_dtype(A))
    return b[:, None] if b.ndim == 1 else b


def _solve(damped: Damped, b: Tensor, rtol: float, limit: int) -> tuple[Tensor, Tensor, list[str]]:
    """x, the relative residual of each column, and what became of it."""
    x, r = torch.zeros_like(b), b.clone()
    size = norm(b)
    # Columns of zeros are solved, and columns that are not finite will not be.
    residual = torch.where(size.isfinite(), (size > 0).double(), math.nan)
    reports = [CONVERGED if s == 0 else RUNNING if math.isfinite(s) else NOT_FINITE for s in size.tolist()]
    recursion = ConjugateGradients if damped.A.psd and damped.damping > 0 else MinimalResiduals
    while damped.steps < limit and RUNNING in reports:
        open_ = [i for i, report in enumerate(reports) if report == RUNNING]
        # A little more than asked for: the last digits of a recursion are not those of the true residual.
        step, found = _iterate(recursion(damped, r[:, open_]), 0.9 * rtol * size[open_], limit - 1)
        step += x[:, open_]
        left = b[:, open_] - damped.multiply(step)
        after = norm(left) / size[open_]
        for j, (i, now) in enumerate(zip(open_, after.tolist(), strict=True)):
            before = float(residual[i])
            # The residual of conjugate gradients may rise while the error falls.
            if now <= before or (recursion is ConjugateGradients and before == 1 and math.isfinite(now)):
                x[:, i], r[:, i], residual[i] = step[:, j], left[:, j], now
            if now <= rtol:
                reports[i] = CONVERGED
            elif not math.isfinite(now):
                reports[i], residual[i] = NOT_FINITE, math.nan
            elif found[j] == LEAST_SQUARES:
                reports[i] = RUNNING if now < 0.9 * before else LEAST_SQUARES
            elif found[j] != CONVERGED:
                reports[i] = found[j]
            elif now > 0.5 * before:
                reports[i] = ROUNDING
    return x, residual, reports


def _iterate(recursion: ConjugateGradients | MinimalResiduals, enough: Tensor, limit: int) -> tuple[Tensor, list[str]]:
    """x of each column when its residual is small enough or it cannot go on, and which it was."""
    x = torch.zeros_like(recursion.x)
    reports = [RUNNING] * len(enough)
    active = list(range(len(enough)))
    while active and recursion.damped.steps < limit:
        troubles = recursion.step()
        small = (recursion.residual <= enough[active]).tolist()
        for j, i in enumerate(active):
            reports[i] = CONVERGED if small[j] and troubles[j] != NOT_FINITE else troubles[j]
            if reports[i] != RUNNING:
                x[:, i] = recursion.x[:, j]
        going = [j for j, i in enumerate(active) if reports[i] == RUNNING]
        if len(going) < len(active):
            active = [active[j] for j in going]
            recursion.keep(going)
    x[:, active] = recursion.x
    return x, reports


def _status(damped: Damped, reports: list[str], worst: float) -> str:
    """Each thing that happened in one sentence."""
    said = []
    for report in dict.fromkeys(reports):
        if report != CONVERGED:
            many = reports.count(report)
            said.append(_SENTENCES[report] + (f" ({many} of {len(reports)} columns)" if len(reports) > 1 else ""))
    if said:
        said.append(f"the relative residual is {worst:.2g}")
    if damped.A.psd and damped.lowest < 0:
        said.append(
            f"the operator was declared psd, but has negative curvature: v'Av / v'v = {damped.lowest:.3g} was met"
        )
    return "; ".join(said) or CONVERGED
