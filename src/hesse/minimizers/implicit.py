"""The minimiser as a differentiable function of what the problem depends on, by the implicit function theorem.

At a minimum the gradient stays zero when theta moves: ``H dx + (d grad / d theta) dtheta = 0``. So the derivative of
x*(theta) costs one solve with the Hessian at the end, however x* was found, and no step of the solver is remembered.
Hyper-gradients (the penalty of a ridge regression), bilevel problems and layers that are themselves a fit are special
cases.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from hesse.curvature.dense import dense_hessian, products
from hesse.linalg import LinearOperator, solve
from hesse.minimizers.functions.border import Border, border_of

__all__ = ["argmin"]

# Up to this many elements of x the Hessian is formed and factorised; beyond, conjugate gradients.
DENSE = 500
# The solver stops when the value has nothing left to gain, which leaves x half the digits: Newton's steps add the rest.
POLISH = 3


def argmin(fun: Callable[..., Any], x0: Any = None, **options: Any) -> Callable[..., Any]:
    """``theta -> argmin_x fun(x, *theta)``, differentiable in theta.

    Args:
        fun: ``fun(x, *theta)``, one real number, of tensors or dicts of tensors, twice differentiable by torch.
        x0: the start; by default zeros, shaped as the first of theta.
        options: of :func:`hesse.minimize`. L2 is part of the function that is differentiated; L1 and bounds are not
            taken, for x*(theta) has kinks with them.

    Returns:
        A function of theta that returns x*, of the kind and shape of x0. Its derivative with respect to tensors of
        theta that require gradients is ``-(d grad / d theta)' H^{-1}``; it can be differentiated again. What is no
        tensor is handed to ``fun`` as it is. It raises TypeError if no theta says what x is, or fun returns no number,
        MinimizeError if the solve has no success, and in the backward pass ValueError if the Hessian at the minimum is
        singular.

    References:
        Gould et al., On differentiating parameterized argmin and argmax problems, 2016.
        Blondel et al., Efficient and modular implicit differentiation, NeurIPS 2022.

    Example:
        How the error of a ridge regression on other data changes with its penalty; x* = (A'A + w)^{-1} A'b:

        >>> A = torch.tensor([[2.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
        >>> b = torch.tensor([2.0, 1.0], dtype=torch.float64)
        >>> ridge = argmin(lambda x, w: (A @ x - b).square().sum() / 2 + w / 2 * x @ x, torch.zeros_like(b))
        >>> w = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
        >>> x = ridge(w)  # 4 / (4 + w) and 1 / (1 + w)
        >>> (slope,) = torch.autograd.grad(x.sum(), w)  # -4 / (4 + w)^2 - 1 / (1 + w)^2
        >>> x.detach(), slope
        (tensor([0.8000, 0.5000], dtype=torch.float64), tensor(-0.4100, dtype=torch.float64))
    """
    for name in ("l1", "bounds"):
        if options.get(name) not in (None, 0, 0.0):
            raise ValueError(
                f"{name} cannot be given to argmin: x*(theta) has kinks with it, where no derivative exists. Fix the "
                "elements that rest on a kink and take the argmin over the others, or use l2."
            )
    if options.get("batched"):
        raise ValueError("batched=True cannot be given to argmin; call it once a problem, or sum the problems in fun.")

    def solution(*theta: Any) -> Any:
        start = x0
        if start is None:
            if not theta or not isinstance(theta[0], Tensor | Mapping):
                raise TypeError(
                    "argmin needs x0, or a first theta that is a tensor or a dict of tensors and shaped as x."
                )
            first = dict(theta[0]) if isinstance(theta[0], Mapping) else theta[0]
            start = pytree.tree_map(torch.zeros_like, first)
        leaves, spec = pytree.tree_flatten(list(theta))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        problem = _Problem(fun, border_of(start), start, leaves, spec, options)
        x = _Argmin.apply(problem, *tensors)
        return problem.border.outside(x)

    return solution


class _Problem:
    """``fun`` on flat x [n] and the tensors among theta."""

    def __init__(
        self, fun: Callable[..., Any], border: Border, start: Any, leaves: list[Any], spec: Any, options: dict[str, Any]
    ) -> None:
        if border.language != "torch":
            kind = type(start).__name__
            raise TypeError(
                f"argmin differentiates torch functions: x0 must be a tensor or a dict of them; got {kind}."
            )
        self.fun, self.border, self.start = fun, border, start
        self.leaves, self.spec, self.options = leaves, spec, options

    def theta(self, tensors: tuple[Tensor, ...]) -> list[Any]:
        """What the user handed over, with these tensors in place of its own."""
        new = iter(tensors)
        return pytree.tree_unflatten(
            [next(new) if isinstance(leaf, Tensor) else leaf for leaf in self.leaves], self.spec
        )

    def value(self, x: Tensor, *tensors: Tensor) -> Tensor:
        """The function, L2 included."""
        out = self.fun(self.border.outside(x), *self.theta(tensors))
        return out.reshape(()) + 0.5 * self.options.get("l2", 0.0) * (x @ x)

    def minimise(self, tensors: tuple[Tensor, ...]) -> Tensor:
        """x* [n], to the last digits that gradients tell."""
        from hesse.minimizers.minimize import minimize

        theta = self.theta(tuple(t.detach() for t in tensors))
        found = minimize(lambda x: self.fun(x, *theta), self.start, **{**self.options, "throw": True})
        x = self.border.inside(found.x, "x").detach()
        g, leaf = self.gradient(x, tensors)
        for _ in range(POLISH):
            size = float(g.norm())
            try:
                new = x - self.solve(g, leaf, g.detach())
            except ValueError:
                break  # a minimum that is a line or a plane is one all the same; only its derivative is refused
            after, at = self.gradient(new, tensors)
            if not float(after.norm()) < 0.5 * size:
                break
            x, g, leaf = new, after, at
        return x

    def gradient(self, x: Tensor, tensors: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """The gradient [n] with its graph, and the x that it belongs to."""
        with torch.enable_grad():
            leaf = x.detach().clone().requires_grad_()
            f = self.value(leaf, *tensors)
            (g,) = torch.autograd.grad(f, leaf, create_graph=True, allow_unused=True, materialize_grads=True)
        return g, leaf

    def solve(self, g: Tensor, x: Tensor, v: Tensor) -> Tensor:
        """``H^{-1} v`` [n] by the graph of the gradient."""
        if not g.requires_grad:
            raise _singular(0.0, 0.0)
        if len(x) <= DENSE:
            H = dense_hessian(g, x).double()
            d = H.diagonal().abs().clamp_min(1e-300).rsqrt()
            factor, info = torch.linalg.cholesky_ex(d[:, None] * H * d)
            if int(info) or float(factor.diagonal().min()) ** 2 <= 10 * len(d) * torch.finfo(x.dtype).eps:
                w = torch.linalg.eigvalsh(H)
                raise _singular(float(w[0]), float(w[-1]))
            return (d * torch.cholesky_solve((d * v.double())[:, None], factor)[:, 0]).to(x.dtype)
        A = LinearOperator(lambda V: products(g, x, V), len(x), dtype=x.dtype, device=x.device, psd=True)
        found = solve(A, v, rtol=100 * torch.finfo(x.dtype).eps)
        if found.residual > 1e-6:
            raise ValueError(
                f"the derivative of the argmin asks for a solve with the Hessian, which came to a residual of "
                f"{found.residual:.2g}: {found.status}. Add l2, or check that x* is a minimum of its own."
            )
        assert isinstance(found.x, Tensor)
        return found.x


class _Argmin(torch.autograd.Function):
    """x*(theta) and its pull-back."""

    @staticmethod
    def forward(ctx: Any, problem: _Problem, *tensors: Tensor) -> Tensor:
        x = problem.minimise(tensors)
        ctx.problem = problem
        ctx.save_for_backward(x, *tensors)
        return x

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
        x, *tensors = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[1:])
        # x and theta as they came, not detached: what is done with them is a function of theta too.
        u = _Solved.apply(ctx.problem, v, x, *tensors)
        return None, *_pull(ctx.problem, u, x, tensors, needs)


class _Solved(torch.autograd.Function):
    """``u = H(x, theta)^{-1} v``; since ``du = H^{-1} (dv - dH u)``, its pull-back is one more solve."""

    @staticmethod
    def forward(ctx: Any, problem: _Problem, v: Tensor, x: Tensor, *tensors: Tensor) -> Tensor:
        g, leaf = problem.gradient(x, tensors)
        u = problem.solve(g, leaf, v)
        ctx.problem = problem
        ctx.save_for_backward(u, x, *tensors)
        return u

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
        u, x, *tensors = ctx.saved_tensors
        problem, needs = ctx.problem, list(ctx.needs_input_grad[2:])
        w = _Solved.apply(problem, v, x, *tensors)

        def curvature(x: Tensor, *tensors: Tensor) -> Tensor:
            return u @ torch.func.grad(lambda y: w @ torch.func.grad(problem.value)(y, *tensors))(x)

        found = _partial(curvature, (x, *tensors), needs)
        return None, w, *(None if part is None else -part for part in found)


def _pull(problem: _Problem, u: Tensor, x: Tensor, tensors: list[Tensor], needs: list[bool]) -> list[Tensor | None]:
    """``-(d grad / d theta)' u``."""
    if not torch.is_grad_enabled():
        inputs = tuple(t.detach().requires_grad_(need) for t, need in zip(tensors, needs, strict=True))
        g, _ = problem.gradient(x, inputs)
        wanted = [t for t in inputs if t.requires_grad]
        if not g.requires_grad:
            return [torch.zeros_like(t) if t.requires_grad else None for t in inputs]
        found = iter(torch.autograd.grad(g, wanted, -u, allow_unused=True))
        return [next(found) if t.requires_grad else None for t in inputs]

    def slope(*tensors: Tensor) -> Tensor:
        return -(u @ torch.func.grad(problem.value)(x, *tensors))

    return _partial(slope, tuple(tensors), needs)


def _partial(f: Callable[..., Tensor], inputs: tuple[Tensor, ...], needs: list[bool]) -> list[Tensor | None]:
    """The derivatives of ``f`` by each input alone, whatever the inputs depend on, with a graph."""
    wanted = tuple(i for i, need in enumerate(needs) if need)
    found = iter(torch.func.grad(f, argnums=wanted)(*inputs) if wanted else ())
    return [next(found) if need else None for need in needs]


def _singular(low: float, high: float) -> ValueError:
    return ValueError(
        f"the Hessian at the minimum is singular: its eigenvalues go from {low:.3g} to {high:.3g}. There x* is not a "
        "minimum of its own, but one of a line or more, and has no derivative. Add l2, or leave out what fun does not "
        "feel."
    )
