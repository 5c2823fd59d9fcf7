"""A problem is a function, a start and the values that count as an answer; the solver's word does not count.

``python -m benchmarks.minimize.problems`` prints the suite and holds every gradient against differences.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

__all__ = ["Problem", "gradient", "hessian", "least", "solved", "suite", "value", "verdict"]

DENSE = 1500  # up to this many unknowns the Hessian at the answer is formed; above, Lanczos and MINRES


@dataclass(frozen=True)
class Problem:
    """``fun`` maps a float64 tensor [n] to a scalar tensor; ``x0`` is [n].

    ``best`` holds minimum values: the global one first, then values of local minima that the literature accepts.
    ``residual`` [n] -> [m], where there is one, has ``fun`` as the sum of its squares. Tags: "large" (n >= 1000),
    "domain" (the value is nan or inf in places), "degenerate" (singular Hessian at the answer: solved by value alone),
    "local" (many minima: any true one is an answer), "least" (has a residual).
    """

    name: str
    fun: Callable[[Tensor], Tensor]
    x0: Tensor
    best: tuple[float, ...]
    residual: Callable[[Tensor], Tensor] | None = None
    tags: frozenset[str] = field(default_factory=frozenset)

    @property
    def n(self) -> int:
        return self.x0.numel()

    @functools.cached_property
    def f0(self) -> float:
        return value(self.fun, self.x0)


def least(
    name: str, residual: Callable[[Tensor], Tensor], x0: Tensor, best: tuple[float, ...] = (0.0,), *tags: str
) -> Problem:
    """The problem of least squares: ``fun`` is the sum of squares of ``residual``, without a half, as in the papers."""

    def fun(x: Tensor) -> Tensor:
        return residual(x).square().sum()

    return Problem(name, fun, x0, best, residual, frozenset({"least", *tags}))


def value(fun: Callable[[Tensor], Tensor], x: Tensor) -> float:
    with torch.no_grad():
        return float(fun(x))


def gradient(fun: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """∇f [n] at ``x`` [n]."""
    x = x.detach().requires_grad_()
    (g,) = torch.autograd.grad(fun(x), x)
    return g


def hessian(fun: Callable[[Tensor], Tensor], x: Tensor, columns: int = 256) -> Tensor:
    """∇²f [n, n] at ``x`` [n] by double backward, ``columns`` products at a time."""
    x = x.detach().requires_grad_()
    (g,) = torch.autograd.grad(fun(x), x, create_graph=True)
    rows = []
    for unit in torch.eye(x.numel(), dtype=x.dtype).split(columns):
        (row,) = torch.autograd.grad(
            g, x, unit, retain_graph=True, is_grads_batched=True, allow_unused=True, materialize_grads=True
        )
        rows.append(row)
    H = torch.cat(rows)
    return (H + H.T) / 2


def solved(problem: Problem, x: Tensor) -> bool:
    """Whether ``x`` is an answer: by its value, or, unless the problem is degenerate, as a true local minimum.

    **By value**: f(x) - b <= 1e-6 |b| + 1e-10 min(1, |f(x0) - b|) for a value b of ``best``.
    1e-6 of b is what six printed digits of the literature bear. Where b is 0 the second term decides: 1e-10 of the
    distance to go, which three to six Newton steps reach and the flat valleys on the way (Rosenbrock, Powell badly
    scaled) do not; never more than 1e-10 itself, since a start of 1e12 (Brown badly scaled) makes 100 no minimum.

    **By gradient and curvature**: λmin(∇²f) >= -1e-9 λmax, and Newton's step, where λ > 1e-9 λmax, would gain at most
    1e-8 of min(|f|, |f(x0) - f|), as would a step as long as x along what remains of the gradient. Both are free of
    the units of f and x, unlike a bound on ‖g‖.
    """
    return verdict(problem, x) != ""


def verdict(problem: Problem, x: Tensor) -> str:
    """ "value", "minimum" (gradient and curvature) or "" (not solved)."""
    x = x.detach().to(problem.x0.dtype).reshape(-1)
    f = value(problem.fun, x)
    if not np.isfinite(f):
        return ""
    for b in problem.best:
        if abs(f - b) <= 1e-6 * abs(b) + 1e-10 * min(1.0, abs(problem.f0 - b)):
            return "value"
    if "degenerate" in problem.tags:
        return ""
    small = 1e-8 * min(abs(f), abs(problem.f0 - f) if np.isfinite(problem.f0) else np.inf)
    return "minimum" if _local_minimum(problem.fun, x, small) else ""


def _local_minimum(fun: Callable[[Tensor], Tensor], x: Tensor, small: float) -> bool:
    g = gradient(fun, x)
    if not bool(g.isfinite().all()):
        return False
    if x.numel() > DENSE:
        return _local_minimum_by_products(fun, x, g, small)
    H = hessian(fun, x)
    if not bool(H.isfinite().all()):
        return False
    w, Q = torch.linalg.eigh(H)
    size = float(w.abs().max())
    if size == 0 or float(w[0]) < -1e-9 * size:
        return False
    c, stiff = Q.T @ g, w > 1e-9 * size
    gain = 0.5 * float((c[stiff].square() / w[stiff]).sum())
    flat = float(c[~stiff].norm() * x.norm())
    return gain <= small and flat <= small


def _local_minimum_by_products(fun: Callable[[Tensor], Tensor], x: Tensor, g: Tensor, small: float) -> bool:
    from scipy.sparse.linalg import LinearOperator, eigsh, minres

    x = x.detach().requires_grad_()
    (graph,) = torch.autograd.grad(fun(x), x, create_graph=True)

    def product(v: np.ndarray) -> np.ndarray:
        (out,) = torch.autograd.grad(graph, x, torch.as_tensor(v, dtype=x.dtype).reshape(-1), retain_graph=True)
        return out.numpy()

    H = LinearOperator((x.numel(),) * 2, matvec=product, dtype=np.float64)
    v0 = np.random.default_rng(0).standard_normal(x.numel())
    large = float(eigsh(H, k=1, which="LA", v0=v0, tol=1e-3, return_eigenvectors=False)[0])
    low = float(eigsh(H, k=1, which="SA", v0=v0, tol=1e-3, return_eigenvectors=False, maxiter=20 * x.numel())[0])
    if low < -1e-6 * large:  # Lanczos at this tolerance tells no more
        return False
    step, _ = minres(H, -g.numpy(), rtol=1e-8, maxiter=5 * x.numel())
    return -0.5 * float(g.numpy() @ step) <= small


@functools.cache
def suite() -> dict[str, Problem]:
    """Every problem by name: the classic ones first."""
    from benchmarks.minimize import classic, harder, larger

    problems = [*classic.problems(), *harder.problems(), *larger.problems()]
    names = [p.name for p in problems]
    if len(set(names)) != len(names):
        raise ValueError(f"two problems share a name: {sorted(n for n in names if names.count(n) > 1)}")
    return {p.name: p for p in problems}


def main() -> None:
    """Print name, size, first and best values; a gradient that differs from differences ends it."""
    for problem in suite().values():
        x0, g = problem.x0, gradient(problem.fun, problem.x0)
        assert x0.dtype == g.dtype == torch.float64 and bool(g.isfinite().all()), problem.name
        direction = torch.randn(problem.n, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        direction *= x0.abs().clamp(min=1e-2 * float(x0.abs().max()) or 1.0) / direction.norm()
        slope = float(g @ direction)
        errors = []
        for h in (1e-3, 1e-4, 1e-5, 1e-6):  # five points: error h^4, so that one of these suits every problem
            near, far = (
                (value(problem.fun, x0 + k * h * direction) - value(problem.fun, x0 - k * h * direction)) / (2 * k * h)
                for k in (1, 2)
            )
            errors.append(abs((4 * near - far) / 3 - slope))
        noise = 1e-9 * abs(problem.f0)
        assert min(errors) <= 1e-6 * max(abs(slope), float(g.norm() * direction.norm()) * 1e-2) + noise, (
            f"{problem.name}: slope {slope:.10g}, differences off by {min(errors):.2g}"
        )
        if problem.residual is not None:
            total = float(problem.residual(x0).square().sum())
            assert abs(total - problem.f0) <= 1e-12 * abs(total), problem.name
        best = ", ".join(f"{b:.10g}" for b in problem.best)
        print(f"{problem.name:24s} n {problem.n:5d}  f(x0) {problem.f0:14.7g}  best {best}  {' '.join(problem.tags)}")
    print(f"{len(suite())} problems, {sum(p.residual is not None for p in suite().values())} of least squares")


if __name__ == "__main__":
    main()
