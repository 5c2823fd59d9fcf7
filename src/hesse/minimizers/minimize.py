"""``hesse.minimize``: from what the user gave to a method and a function, and back to a result under SciPy's names."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hesse.minimizers.batched import minimize_rows
from hesse.minimizers.callback import told
from hesse.minimizers.choice import choose
from hesse.minimizers.descents.quasi_newton import inverse_product
from hesse.minimizers.functions.autodiff import Autodiff
from hesse.minimizers.functions.border import Border, border_of
from hesse.minimizers.functions.bounds import bounds_of, project
from hesse.minimizers.functions.foreign import Foreign, ForeignBorder, foreign_border, language_of
from hesse.minimizers.functions.function import Function, Point, Source
from hesse.minimizers.functions.numeric import Numeric
from hesse.minimizers.least_squares import least_squares
from hesse.minimizers.method import Method
from hesse.minimizers.result import MinimizeError, Result, Status
from hesse.minimizers.solve import solve
from hesse.minimizers.state import State
from hesse.minimizers.trial import check_gradient

__all__ = ["minimize"]


def minimize(
    fun: Callable[..., Any],
    x0: Any,
    args: Any = (),
    *,
    method: str | Method | None = "auto",
    jac: Callable[..., Any] | bool | None = None,
    hess: Callable[..., Any] | None = None,
    hessp: Callable[..., Any] | None = None,
    l1: float = 0.0,
    l2: float = 0.0,
    bounds: Any = None,
    callback: Callable[..., Any] | None = None,
    check: bool = False,
    throw: bool = False,
    rtol: float | None = None,
    atol: float = 0.0,
    max_steps: int | None = None,
    batched: bool = False,
) -> Any:
    """Minimise ``fun(x) + l1 ||x||_1 + l2/2 ||x||^2``, between bounds, from ``x0``.

    Args:
        fun: ``fun(x, *args)``, one number. Its language is that of ``x0``: a torch function gets tensors and is
            differentiated by autograd, a JAX or TensorFlow function by its own library, a NumPy function by
            differences where ``jac`` is not given.
        x0: where to start: a float tensor of any shape, a dict of tensors, an array; or the ``state`` of an earlier
            result, to go on from there.
        args: further arguments of ``fun`` and of the derivatives.
        method: ``"auto"`` chooses by size, sparsity and what is given, and says what in ``message``. By name:
            ``"trust-exact"``, ``"trust-krylov"``, ``"trust-ncg"``, ``"dogleg"``, ``"newton"``, ``"newton-cg"``,
            ``"arc"``, ``"arc-krylov"`` (second derivatives), ``"bfgs"``, ``"l-bfgs-b"``, ``"gd"`` (gradients),
            ``"prox-newton"`` (L1, bounds), ``"lm"`` (``fun`` returns residuals: :func:`hesse.least_squares`). Or any
            ``Method(name, descent, search)`` of :mod:`hesse.minimizers`.
        jac: ``jac(x, *args)``, shaped as x; True if ``fun`` returns the pair of value and gradient.
        hess: ``hess(x, *args)`` [n, n] over the flattened x, dense or scipy.sparse.
        hessp: ``hessp(x, v, *args)``, the Hessian times v, shaped as x.
        l1: weight of the sum of magnitudes; elements of the solution become exactly 0.
        l2: weight of half the sum of squares.
        bounds: ``(low, high)``, each a number, None, or shaped as x; or SciPy's ``Bounds``, or a list of pairs.
        callback: called after every step, as SciPy does: ``callback(x)``, or with a :class:`Result` if its parameter is
            named ``intermediate_result``. Raising ``StopIteration`` stops.
        check: compare the gradient with one directional difference first.
        throw: raise :class:`MinimizeError` where the result is no success.
        rtol: share of the decrease so far (and of the value) that may be left to gain, by the quadratic model. By
            default 1e-12 in float64, 1e-6 in float32.
        atol: also stop where no element of the gradient is larger.
        max_steps: iterations; by default 1000, or ten for each variable if that is more: what a wave along a chain
        takes. batched: x0 [B, ...] are B starts, and ``fun`` maps all of them to [B] values; they are solved together.

    Returns:
        A :class:`Result`; with ``batched``, a :class:`BatchResult`, the same with a leading dimension B.

    Raises:
        TypeError: arguments or values of the wrong kind.
        ValueError: shapes that do not fit, crossed bounds, a method that needs what was not given, a wrong ``jac``.
        MinimizeError: under ``throw``.

    References:
        Nocedal and Wright, Numerical Optimization, 2nd edition, 2006.
        Conn, Gould and Toint, Trust-Region Methods, 2000.

    Example:
        Rosenbrock's valley, from its classic start:

        >>> def rosenbrock(x):
        ...     return (1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2
        >>> result = minimize(rosenbrock, torch.tensor([-1.2, 1.0], dtype=torch.float64))
        >>> result.success, result.x.round(decimals=6)
        (True, tensor([1., 1.], dtype=torch.float64))
    """
    _refuse_settings(rtol, atol, max_steps, l1, l2, callback)
    args = args if isinstance(args, tuple) else (args,)
    if batched:
        _refuse("batched=True", jac=jac, hess=hess, hessp=hessp, l1=l1, bounds=bounds, callback=callback, check=check)
        most = 1000 if max_steps is None else max_steps
        rows = minimize_rows(_penalised(fun, args, l2), x0, rtol=rtol, atol=atol, max_steps=most)
        if throw and not bool(rows.success.all()):
            raise MinimizeError(rows)
        return rows
    if method == "lm":
        _refuse("method='lm'", hess=hess, hessp=hessp, l1=l1, check=check)
        if jac is True:
            raise ValueError("jac=True does not go with method='lm': give the Jacobian [m, n] as jac.")
        most = 1000 if max_steps is None else max_steps
        rest: dict[str, Any] = {"rtol": rtol, "atol": atol, "max_steps": most, "callback": callback, "throw": throw}
        return least_squares(fun, x0, args=args, method="lm", jac=jac or None, bounds=bounds, l2=l2, **rest)
    state = x0 if isinstance(x0, State) else None
    border = _border(x0)
    x = border.x0 if state is None else state.memory["x"]
    box = bounds_of(bounds, border)
    if jac is True:
        fun, jac = _pair(fun)
    gradient = _with(jac, args, "jac")
    source = _source(fun, border, args, gradient, box)
    function = Function(
        source,
        border,
        jac=gradient,
        hess=_with(hess, args, "hess"),
        hessp=_with(hessp, args, "hessp"),
        l1=l1,
        l2=l2,
        bounds=box,
    )
    x = project(x, box)
    found, why = choose(method if state is None or method != "auto" else state.method, function, x)
    state = State(found.name, border, {"x": x}) if state is None else state.copy(found.name)
    if check:
        check_gradient(function, x)
    tolerance = rtol if rtol is not None else (1e-12 if x.dtype == torch.float64 else 1e-6)
    limit = max_steps if max_steps is not None else max(1000, 10 * x.numel())

    def report(point: Point, status: Status) -> Result:
        return _result(point, status, state, found, why)

    point, status = solve(
        function, found, state, rtol=tolerance, atol=atol, max_steps=limit, callback=told(callback, report)
    )
    result = report(point, status)
    if throw and not result.success:
        raise MinimizeError(result)
    return result


def _result(point: Point, status: Status, state: State, method: Method, why: str) -> Result:
    border, c = point.function.border, point.function.counts
    return Result(
        x=border.outside(point.x.clone()),
        fun=point.value,
        jac=border.outside(point.gradient().clone()) if point.x.numel() else border.outside(point.x.clone()),
        success=status.success,
        status=status,
        message=f"{status.sentence} (method {method.name}{why})",
        nit=state.trace[-1].step if len(state.trace) else 0,
        nfev=c.nfev,
        njev=c.njev,
        nhev=c.nhev,
        nhvp=c.nhvp,
        method=method.name,
        trace=state.trace,
        state=state,
        inverse=_inverse(point, state),
    )


def _inverse(point: Point, state: State) -> Callable[[], Any] | None:
    """How to form the inverse curvature, if the method has one."""
    border = point.function.border
    if "inverse" in state.memory:
        return lambda: border.matrix(state.memory["inverse"])
    if "steps" in state.memory:
        eye, (steps, changes) = torch.eye(point.x.numel()).to(point.x), (state.memory["steps"], state.memory["changes"])
        return lambda: border.matrix(torch.stack([inverse_product(steps, changes, row) for row in eye]))
    if isinstance(point.known_hessian, Tensor):
        H = point.known_hessian

        def dense() -> Any:
            inverse, info = torch.linalg.inv_ex(H)
            if int(info):
                raise ValueError("the Hessian at x is singular, so it has no inverse.")
            return border.matrix(inverse)

        return dense
    return None


def _border(x0: Any) -> Border:
    if isinstance(x0, State):
        return x0.border
    own = language_of(x0)
    return border_of(x0) if own is None else foreign_border(x0, own)


def _source(
    fun: Callable[..., Any],
    border: Border,
    args: tuple[Any, ...],
    jac: Callable[[Any], Any] | None,
    box: tuple[Tensor, Tensor] | None,
) -> Source:
    if not callable(fun):
        raise TypeError(f"fun must be a function of x; got {type(fun).__name__}.")
    if isinstance(border, ForeignBorder):
        return Foreign(fun, border, args)
    if border.language == "numpy" or jac is not None:
        return Numeric(fun, border, args, jac, box)
    return Autodiff(fun, border, args)


def _with(derivative: Any, args: tuple[Any, ...], name: str) -> Callable[..., Any] | None:
    """A derivative with the further arguments bound."""
    if derivative is None or derivative is False:
        return None
    if not callable(derivative):
        raise TypeError(f"{name} must be a function of x; got {derivative!r}. Leave it out to have it computed.")
    return (lambda *x: derivative(*x, *args)) if args else derivative


def _pair(fun: Callable[..., Any]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Value and gradient apart, for a function that returns both; evaluated once for an x."""
    last: list[Any] = [None, None]

    def both(x: Any, *args: Any) -> Any:
        parts = x.values() if isinstance(x, dict) else [x]
        key = [np.asarray(part.detach().cpu() if isinstance(part, Tensor) else part).tobytes() for part in parts]
        if last[0] != key:
            returned = fun(x, *args)
            if not isinstance(returned, tuple) or len(returned) != 2:
                raise TypeError(f"with jac=True fun must return (value, gradient); got {type(returned).__name__}.")
            last[:] = [key, returned]
        return last[1]

    return (lambda x, *args: both(x, *args)[0]), (lambda x, *args: both(x, *args)[1])


def _refuse(why: str, **given: Any) -> None:
    """What cannot go together."""
    names = [name for name, value in given.items() if value is not None and value is not False and value != 0]
    if names:
        raise ValueError(f"{why} does not go with {', '.join(names)}; leave {'it' if len(names) == 1 else 'them'} out.")


def _penalised(fun: Callable[..., Any], args: tuple[Any, ...], l2: float) -> Callable[[Any], Any]:
    """A function of many rows with its further arguments, and L2 added to each row."""

    def penalised(x: Any) -> Any:
        parts = x.values() if isinstance(x, dict) else [x]
        value = fun(x, *args)
        return value + 0.5 * l2 * sum(part.reshape(len(part), -1).square().sum(1) for part in parts) if l2 else value

    return penalised


def _refuse_settings(rtol: Any, atol: Any, max_steps: Any, l1: Any, l2: Any, callback: Any) -> None:
    for name, value in (("rtol", 0.5 if rtol is None else rtol), ("atol", atol), ("l1", l1), ("l2", l2)):
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"{name} must be a number; got {value!r}.")
    if callback is not None and not callable(callback):
        raise TypeError(f"callback must be a function of x; got {type(callback).__name__}.")
    if rtol is not None and not 0 < rtol < 1:
        raise ValueError(f"rtol must be between 0 and 1; got {rtol}.")
    for name, value in (("atol", atol), ("l1", l1), ("l2", l2)):
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} must not be negative; got {value}.")
    if max_steps is not None and (not isinstance(max_steps, int) or max_steps < 0):
        raise ValueError(f"max_steps must be an integer of at least 0; got {max_steps!r}.")
