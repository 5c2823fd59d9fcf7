"""What a solve says: SciPy's names, an honest status, and one row for every iteration.

A solver that stops has either found what was asked for, or run into something that has a name: no more precision, no
lower bound, a kink, a gradient that does not belong to the function. ``Status`` is that name, ``Result.message`` the
sentence, and ``success`` whether x can be used as a minimiser.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    from hesse.minimizers.state import State

__all__ = ["MinimizeError", "Result", "Row", "Status", "Trace"]


class Status(IntEnum):
    """Why a solve stopped; 0 and 1 are success.

    Example:
        >>> Status.PRECISION.success, Status.UNBOUNDED.success, int(Status.CONVERGED)
        (True, False, 0)
    """

    CONVERGED = 0
    PRECISION = 1
    MAX_STEPS = 2
    UNBOUNDED = 3
    NOT_FINITE = 4
    KINK = 5
    WRONG_GRADIENT = 6
    STALLED = 7
    SADDLE = 8
    STOPPED = 9
    INTERRUPTED = 10

    @property
    def success(self) -> bool:
        """Whether x is a minimiser as far as can be told."""
        return self in (Status.CONVERGED, Status.PRECISION)

    @property
    def sentence(self) -> str:
        """What happened, and what to do about it."""
        return _SENTENCES[self]


_SENTENCES = {
    Status.CONVERGED: "converged",
    Status.PRECISION: "precision reached: what is left to gain is below the rounding or noise of the function",
    Status.MAX_STEPS: "out of steps: give more max_steps, or continue from result.state",
    Status.UNBOUNDED: "the function seems unbounded below: it falls as far as was looked; check its sign, or add l2 "
    "or bounds",
    Status.NOT_FINITE: "the function or its gradient is not finite at x: start where it is, or bound x to its domain",
    Status.KINK: "a kink or a jump: the function rises in the direction in which its gradient says that it falls, at "
    "every step length; no smooth minimum is here",
    Status.WRONG_GRADIENT: "the gradient does not belong to the function: its slope along the step is another than "
    "that of the values; check jac with check=True or hesse.check",
    Status.STALLED: "stalled: no step lowers the function, and neither rounding nor a kink explains it",
    Status.SADDLE: "a saddle: the gradient is zero and the curvature negative, and no step along it lowers the "
    "function",
    Status.STOPPED: "stopped by the callback",
    Status.INTERRUPTED: "interrupted; result.state continues from here",
}


class MinimizeError(RuntimeError):
    """Raised under ``throw=True`` by a solve without success; ``error.result`` is what it had found."""

    def __init__(self, result: Any) -> None:
        self.result = result
        super().__init__(result.message)


class Row(NamedTuple):
    """One iteration: where it ended and how it went there.

    Args:
        step: number of the iteration, 0 for the start.
        fun: value.
        gradient: largest element of the gradient by magnitude.
        length: Euclidean length of the step.
        size: radius of the region, or step size on the line.
        trust_ratio: actual over predicted decrease, NaN where nothing was predicted.
        nfev, njev, nhev, nhvp: values, gradients, Hessians and products so far.
    """

    step: int
    fun: float
    gradient: float
    length: float
    size: float
    trust_ratio: float
    nfev: int
    njev: int
    nhev: int
    nhvp: int


@dataclass
class Trace:
    """The rows of a solve: prints as a table and plots itself.

    Example:
        >>> trace = Trace([Row(0, 9.0, 6.0, 0.0, 0.0, float("nan"), 1, 1, 0, 0)])
        >>> print(trace)
        step           fun      |grad|     |step|       size  ratio  nfev  njev  nhev  nhvp
           0  9.000000e+00   6.000e+00          -          -      -     1     1     0     0
        >>> trace.fun
        [9.0]
    """

    rows: list[Row] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __getitem__(self, i: int) -> Row:
        return self.rows[i]

    def __getattr__(self, name: str) -> list[float]:
        """A column by its name in :class:`Row`."""
        if name not in Row._fields:
            raise AttributeError(f"a trace has the columns {', '.join(Row._fields)}; got {name!r}")
        return [getattr(row, name) for row in self.rows]

    def table(self) -> list[str]:
        """The lines of the table, the heading first."""
        head = f"{'step':>4}  {'fun':>12}  {'|grad|':>10} {'|step|':>10} {'size':>10} {'ratio':>6} "
        return [head + " ".join(f"{name:>5}" for name in ("nfev", "njev", "nhev", "nhvp")), *map(_line, self.rows)]

    def __str__(self) -> str:
        return "\n".join(self.table())

    def plot(self, path: str | Path) -> None:
        """Write the convergence as a figure: distance of the value to the last, and the gradient, by iteration.

        Args:
            path: of the file; its suffix says the format (png, svg, pdf).

        Raises:
            ModuleNotFoundError: matplotlib is not installed.
        """
        from hesse.minimizers.plot import plot

        plot(self, path)


def _line(row: Row) -> str:
    def short(value: float) -> str:
        return "-" if value != value or (row.step == 0 and value == 0) else f"{value:.2e}"

    ratio = "-" if row.trust_ratio != row.trust_ratio else f"{row.trust_ratio:.2f}"
    return (
        f"{row.step:>4}  {row.fun:>12.6e}  {row.gradient:>10.3e} {short(row.length):>10} {short(row.size):>10} "
        f"{ratio:>6} {row.nfev:>5} {row.njev:>5} {row.nhev:>5} {row.nhvp:>5}"
    )


@dataclass(repr=False)
class Result:
    """What :func:`hesse.minimize` found, under SciPy's names.

    Args:
        x: the minimiser, of the kind and shape of ``x0``.
        fun: value there.
        jac: gradient there, shaped as x.
        success: whether x is a minimiser as far as can be told.
        status: a :class:`Status`, which is an int: 0 converged, 1 precision reached, others are no success.
        message: the status as a sentence, and the method that was chosen.
        nit: iterations.
        nfev, njev, nhev, nhvp: function values, gradients, Hessians and Hessian products spent.
        method: name of the method.
        trace: one :class:`Row` an iteration.
        state: everything remembered between steps: ``hesse.minimize(fun, result.state)`` goes on.
    """

    x: Any
    fun: float
    jac: Any
    success: bool
    status: Status
    message: str
    nit: int
    nfev: int
    njev: int
    nhev: int
    nhvp: int
    method: str
    trace: Trace
    state: State | None = None
    inverse: Callable[[], Any] | None = None

    @property
    def hess_inv(self) -> Any:
        """The inverse of the curvature at x in the order of the flattened x: [n, n] in the kind of ``x0``, or an
        operator.

        Computed when asked for: from the method's own curvature, which for quasi-Newton methods is an approximation.

        Raises:
            ValueError: the method keeps no curvature, or there it is singular.
        """
        if self.inverse is None:
            raise ValueError(
                f"method {self.method!r} keeps no curvature; 'bfgs', 'l-bfgs-b', 'newton' and 'trust-exact' do."
            )
        return self.inverse()

    def __repr__(self) -> str:
        head = [
            ("message", self.message),
            ("success", self.success),
            ("status", f"{int(self.status)} ({self.status.name.lower()})"),
        ]
        body = [("fun", f"{self.fun:.10g}"), ("x", brief(self.x)), ("jac", brief(self.jac)), ("nit", self.nit)]
        counts = [(name, getattr(self, name)) for name in ("nfev", "njev", "nhev", "nhvp")]
        return "\n".join(f"{name:>8}: {value}" for name, value in [*head, *body, *counts])


def brief(x: Any) -> str:
    """A few numbers of a tensor, an array or a dict of them, on one line."""
    if isinstance(x, dict):
        return "{" + ", ".join(f"{name}: {brief(value)}" for name, value in x.items()) + "}"
    values = torch.as_tensor(x).detach().flatten()
    shown = ", ".join(f"{value:.4g}" for value in values[:6].tolist())
    return f"[{shown}{', ...' if values.numel() > 6 else ''}]" + (
        f" {list(x.shape)}" if x.ndim != 1 or values.numel() > 6 else ""
    )
