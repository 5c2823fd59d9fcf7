"""Least squares in SciPy's shape: Levenberg-Marquardt as a trust region, with second derivatives where they pay.

A fit is a search times a descent like any other minimisation (:mod:`hesse.minimizers.solve`): the search is the trust
region, the descent Gauss-Newton's model of the residuals. ``method="lm"`` is that alone; ``"dogleg"`` goes along two
straight lines instead of Levenberg's and Marquardt's curve; ``"auto"`` is "lm" which takes the whole Hessian where
residuals that remain make Gauss-Newton slow, and before it claims a minimum.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hesse.minimizers.callback import told
from hesse.minimizers.fits.gauss_newton import Fit, FitPoint, GaussNewton
from hesse.minimizers.fits.linearised import Linear
from hesse.minimizers.fits.residuals import ArrayResiduals, TorchResiduals
from hesse.minimizers.fits.robust import loss_of
from hesse.minimizers.functions.border import Arrays, Border, border_of
from hesse.minimizers.functions.bounds import bounds_of, project
from hesse.minimizers.method import Method
from hesse.minimizers.result import MinimizeError, Result, Status, brief
from hesse.minimizers.searches.regions import NOISE, TrustRegion
from hesse.minimizers.solve import solve
from hesse.minimizers.state import State

__all__ = ["LeastSquaresResult", "least_squares"]

METHODS = ("auto", "lm", "dogleg")
RTOL = {torch.float64: 1e-10, torch.float32: 1e-5}
# Elements of a Jacobian that is formed: beyond, its factorisation costs seconds, and products are taken instead.
DENSE = 400_000


@dataclass(repr=False, kw_only=True)
class LeastSquaresResult(Result):
    """What :func:`least_squares` found, under SciPy's names; see also :class:`hesse.minimizers.result.Result`.

    Args:
        fun: residuals at x, shaped as the user's function returned them.
        jac: their Jacobian [m, n], columns in the order of the flattened x, the loss not in it; where it was not
            formed, a function of v that gives J v.
        cost: 1/2 sum of the losses, L2 included: what was minimised.
        grad: gradient of the cost, shaped as x.
        optimality: largest element of the gradient that bounds let x follow.
        active_mask: -1 where x is at its least, 1 where it is at its largest, shaped as x.
    """

    fun: Any
    cost: float
    grad: Any
    optimality: float
    active_mask: Any

    def __repr__(self) -> str:
        head = [("message", self.message), ("success", self.success)]
        body = [("cost", f"{self.cost:.10g}"), ("optimality", f"{self.optimality:.3g}"), ("nit", self.nit)]
        values = [(name, brief(getattr(self, name))) for name in ("x", "grad", "fun")]
        counts = [(name, getattr(self, name)) for name in ("nfev", "njev", "nhev", "nhvp")]
        return "\n".join(f"{name:>10}: {value}" for name, value in [*head, *body, *values, *counts])


def least_squares(
    residual: Callable[..., Any],
    x0: Any,
    *,
    jac: Callable[..., Any] | None = None,
    method: str = "auto",
    loss: str | Callable[[Any], Any] = "linear",
    f_scale: float = 1.0,
    x_scale: Any = 1.0,
    bounds: Any = None,
    l2: float = 0.0,
    rtol: float | None = None,
    atol: float = 0.0,
    max_steps: int = 1000,
    callback: Callable[..., object] | None = None,
    throw: bool = False,
    args: tuple[Any, ...] = (),
) -> LeastSquaresResult:
    """Minimise ``1/2 sum_i C^2 rho((r_i(x) / C)^2) + l2/2 ||x||^2``, between bounds.

    Args:
        residual: ``residual(x, *args)`` -> residuals of any shape, at least one dimension: a tensor for a tensor or a
            dict of tensors, an array for an array.
        x0: the start, float32 or float64; or the ``state`` of an earlier result, from which the solve goes on.
        jac: the Jacobian [m, n] of the residuals, dense or of scipy.sparse, in the arguments of ``residual``. By
            default autodiff on tensors, differences on arrays.
        method: "lm" (Levenberg and Marquardt), "dogleg", or "auto": "lm" with second derivatives by autodiff where
            Gauss-Newton's model proves wrong about residuals that remain.
        loss: "linear", "huber", "soft_l1", "cauchy", "arctan" (rho as in SciPy), or a function of z = (r / C)^2 (see
            :func:`hesse.minimizers.fits.robust.loss_of`).
        f_scale: C, the size from which on a residual counts as an outlier.
        x_scale: the size of a change of x that matters, a number or shaped as x: lengths are those of x / x_scale.
            "jac" takes it from the columns of J.
        bounds: ``(least, largest)``, each a number, shaped as x, or None for none; or SciPy's ``Bounds``. x0 is moved
            between them.
        l2: weight of 1/2 ||x||^2, outside of the loss.
        rtol: done when the model promises less than this part of what has been gained and is left; by default 1e-10 in
            float64 and 1e-5 in float32.
        atol: done when no element of the gradient is larger.
        max_steps: the most iterations.
        callback: called after every iteration, ``callback(x)``, or with the result so far if its parameter is named
            ``intermediate_result``. StopIteration ends the solve.
        throw: whether a solve without success raises.
        args: further arguments of ``residual`` and ``jac``.

    Returns:
        The fit. With fewer residuals than unknowns there are many, and steps are the shortest that reach one. Where J
        is too large to form (and there is neither ``jac`` nor a bound), steps come from products with it.

    Raises:
        TypeError, ValueError: arguments, or what residual or jac returned, that cannot be; each says which and what to
            do.
        MinimizeError: no success, under ``throw``.

    References:
        More, The Levenberg-Marquardt algorithm: implementation and theory, 1978.
        Dennis, Gay and Welsch, An adaptive nonlinear least-squares algorithm, ACM TOMS 1981.

    Example:
        >>> t = torch.linspace(0, 2, 20, dtype=torch.float64)
        >>> y = 3 * torch.exp(-0.7 * t)
        >>> fit = least_squares(lambda x: x[0] * torch.exp(-x[1] * t) - y, torch.ones(2, dtype=torch.float64))
        >>> fit.x.round(decimals=6), fit.success, fit.cost < 1e-20
        (tensor([3.0000, 0.7000], dtype=torch.float64), True, True)
    """
    if method not in METHODS:
        hint = " Its bounds, losses and large problems are those of 'auto'." if method in ("trf", "dogbox") else ""
        raise ValueError(f"method must be one of {', '.join(METHODS)}; got {method!r}.{hint}")
    if not callable(residual):
        raise TypeError(f"residual must be a function of x; got {type(residual).__name__}.")
    if not l2 >= 0:
        raise ValueError(f"l2 must not be negative; got {l2}.")
    if max_steps < 0:
        raise ValueError(f"max_steps must not be negative; got {max_steps}.")
    given = x0 if isinstance(x0, State) else None
    border = border_of(x0) if given is None else given.border
    rtol = RTOL[border.x0.dtype] if rtol is None else rtol
    if not (0 <= rtol < 1 and atol >= 0):
        raise ValueError(f"rtol must be in [0, 1) and atol not negative; got rtol={rtol}, atol={atol}.")
    box = bounds_of(bounds, border)
    rho = loss_of(loss, f_scale, arrays=isinstance(border, Arrays))
    source: ArrayResiduals | TorchResiduals
    if isinstance(border, Arrays):
        source = ArrayResiduals(residual, border, rho, args, jac, box)
    else:
        source = TorchResiduals(residual, border, rho, args, jac, DENSE if box is None else 1 << 62)
    fit = Fit(source, border, l2=l2, bounds=box)
    fit.counts = source.counts
    second = method == "auto" and isinstance(source, TorchResiduals) and jac is None
    descent = GaussNewton(_scale(x_scale, border), second=second, dogleg=method == "dogleg", rtol=rtol, atol=atol)
    state = State(method, border, {"x": project(border.x0, box)}) if given is None else given.copy(method)

    def report(point: FitPoint, status: Status) -> LeastSquaresResult:
        return _result(point, status, state)

    point, status = solve(
        fit,
        Method(method, descent, TrustRegion()),
        state,
        rtol=rtol,
        atol=atol,
        max_steps=max_steps,
        callback=told(callback, report),
    )
    assert isinstance(point, FitPoint)
    if status in (Status.KINK, Status.STALLED, Status.WRONG_GRADIENT) and _within_rounding(point):
        status = Status.PRECISION
    result = _result(point, status, state)
    if throw and not result.success:
        raise MinimizeError(result)
    return result


def _result(point: FitPoint, status: Status, state: State) -> LeastSquaresResult:
    fit, at, border = point.fit, point.found, point.fit.border
    m, n = at.r.numel(), fit.n
    usable = math.isfinite(point.value)
    gradient = point.gradient() if usable else torch.full_like(point.x, math.nan)
    dense = fit.source.dense(at)
    J: Any
    if not usable:
        J = border.matrix(point.x.new_full((m, n), math.nan))
    elif dense:
        J = border.matrix(point.jacobian())
    else:

        def J(v: Any) -> Tensor:
            return fit.source.push(point.x, at, border.inside(v, "v"))

    mask = torch.zeros_like(point.x)
    if fit.bounds is not None:
        mask = (point.x >= fit.bounds[1]).to(mask) - (point.x <= fit.bounds[0]).to(mask)
    fun = at.r.reshape(at.shape)
    how = {True: f"J [{m}, {n}] by {fit.source.name}", False: f"products with J [{m}, {n}] by {fit.source.name}"}[dense]
    name = {"lm": "Levenberg-Marquardt", "dogleg": "dogleg", "auto": "auto: Levenberg-Marquardt"}[state.method]
    words = [status.sentence, f"{name}, {how}"]
    if fit.counts.nhev:
        words.append(f"second derivatives formed {fit.counts.nhev} times")
    if m < n:
        words.append("fewer residuals than unknowns: one of many solutions")
    return LeastSquaresResult(
        x=border.outside(point.x.clone()),
        fun=fun.numpy() if isinstance(border, Arrays) else fun,
        jac=J,
        cost=point.value,
        grad=border.outside(gradient),
        optimality=point.steepest() if usable else math.nan,
        active_mask=border.outside(mask),
        success=status.success,
        status=status,
        message="; ".join(words),
        nit=len(state.trace) - 1 if len(state.trace) else 0,
        nfev=fit.counts.nfev,
        njev=fit.counts.njev,
        nhev=fit.counts.nhev,
        nhvp=fit.counts.nhvp,
        method=state.method,
        trace=state.trace,
        state=state,
        inverse=(lambda: border.matrix(_inverse(point))) if dense and usable else None,
    )


def _within_rounding(point: FitPoint) -> bool:
    """Whether even the best step along the gradient gains less than the rounding of the cost.

    Gauss-Newton's model goes on to promise more where residuals remain (all of the cost, if J is square), and that its
    promises fail tells nothing about the function.
    """
    g = point.gradient()
    root, _ = point.weighted()
    bend = float((root * point.fit.source.push(point.x, point.found, g)).square().sum() + point.fit.l2 * (g @ g))
    gain = 0.5 * float(g @ g) ** 2 / bend if bend > 0 else 0.0
    return gain <= NOISE * torch.finfo(g.dtype).eps * point.value


def _inverse(point: FitPoint) -> Tensor:
    """(J' rho J + l2)^{-1} [n, n]: the covariance of x for residuals of unit variance."""
    root, f = point.weighted()
    A = root[:, None] * point.jacobian()
    one = torch.ones_like(point.x)
    if point.function.l2:
        A = torch.cat([A, math.sqrt(point.function.l2) * torch.diag(one)])
        f = torch.cat([f, math.sqrt(point.function.l2) * point.x])
    model = Linear(A, f, one)
    if len(model.S) < len(one):
        raise ValueError(
            f"J has rank {len(model.S)} and x {len(one)} elements: {len(one) - len(model.S)} combinations of them are "
            "not determined by the residuals, and their covariance is infinite. Add l2, or leave some out."
        )
    return (model.V.mT / model.S**2 @ model.V).to(point.x.dtype)


def _scale(x_scale: Any, border: Border) -> Tensor | None:
    if isinstance(x_scale, str):
        if x_scale != "jac":
            raise ValueError(f"x_scale must be 'jac', a number, or shaped as x; got {x_scale!r}.")
        return None
    scale = _number_or_shaped(x_scale, border, "x_scale")
    if not bool(((scale > 0) & scale.isfinite()).all()):
        raise ValueError("x_scale must be positive and finite: it is the size of a change of x that matters.")
    return scale


def _number_or_shaped(value: Any, border: Border, name: str) -> Tensor:
    if isinstance(value, int | float | np.number):
        return torch.full_like(border.x0, float(value))
    return border.inside(value, name)
