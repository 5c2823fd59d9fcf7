"""Every solver in one shape: a function and a start go in, an answer, a word and counts come out.

Counted alike for all: one for every value, gradient, Hessian and product of a Hessian with a vector that a solver asks
for. SciPy's get values and derivatives from torch's autodiff of the same function; the graph of the last value serves
the derivatives at the same x, so that no peer pays a forward pass twice. SciPy's and pytorch-minimize's own tolerances
stop early on badly scaled problems: here they are tight (``TIGHT``), with as many steps as the time allows;
"(defaults)" has their own.
"""

from __future__ import annotations

import importlib
import importlib.util
import signal
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.minimize.problems import Problem

__all__ = ["LEAST", "OURS", "PEERS", "STOCK", "Meter", "OutOfTime", "Outcome", "Solver", "reason_absent", "run"]

SECONDS = 6.0  # of processor time for a problem
STEPS = 100_000
TIGHT = {
    "trust-exact": {"gtol": 1e-8, "maxiter": STEPS},
    "trust-krylov": {"gtol": 1e-8, "maxiter": STEPS},
    "trust-ncg": {"gtol": 1e-8, "maxiter": STEPS},
    "dogleg": {"gtol": 1e-8, "maxiter": STEPS},
    "Newton-CG": {"xtol": 1e-10, "maxiter": STEPS},
    "BFGS": {"gtol": 1e-8, "maxiter": STEPS},
    "L-BFGS-B": {"gtol": 1e-8, "ftol": 1e-15, "maxiter": STEPS, "maxfun": 10 * STEPS},
}
TORCHMIN_TIGHT = {
    "newton-exact": {"xtol": 1e-10, "max_iter": STEPS},
    "newton-cg": {"xtol": 1e-10, "max_iter": STEPS},
    "trust-exact": {"gtol": 1e-8, "max_iter": STEPS},
    "trust-krylov": {"gtol": 1e-8, "max_iter": STEPS},
    "dogleg": {"gtol": 1e-8, "max_iter": STEPS},
    "bfgs": {"gtol": 1e-8, "xtol": 1e-12, "max_iter": STEPS},
    "l-bfgs": {"gtol": 1e-8, "xtol": 1e-12, "max_iter": STEPS},
}


class OutOfTime(Exception):
    """Raised from within the function once a solver's time is up."""


@dataclass
class Meter:
    """Evaluations and processor time of one run; ``course`` has (evaluations so far, value) at every value."""

    limit: float = SECONDS
    nfev: int = 0
    njev: int = 0
    nhev: int = 0
    nhvp: int = 0
    course: list[tuple[int, float]] = field(default_factory=list)
    start: float = field(default_factory=time.process_time)

    @property
    def total(self) -> int:
        return self.nfev + self.njev + self.nhev + self.nhvp

    def look(self) -> None:
        if time.process_time() - self.start > self.limit:
            raise OutOfTime(f"{self.limit:g} s of processor time are over")


@dataclass
class Outcome:
    """What a solver left: ``x`` as a flat tensor [n], or None; ``error`` where it raised."""

    x: Tensor | None = None
    fun: float = float("nan")
    success: bool = False
    message: str = ""
    error: str = ""
    nit: int = 0
    nfev: int = 0
    njev: int = 0
    nhev: int = 0
    nhvp: int = 0
    seconds: float = 0.0
    course: list[tuple[int, float]] = field(default_factory=list)

    @property
    def total(self) -> int:
        return self.nfev + self.njev + self.nhev + self.nhvp


@dataclass(frozen=True)
class Solver:
    """``solve(problem, meter)`` runs and returns; ``needs`` names the package without which it cannot."""

    name: str
    solve: Callable[[Problem, Meter], Outcome]
    needs: str


class Calls:
    """A torch function as SciPy wants it: float64 arrays in and out, counted."""

    def __init__(self, fun: Callable[[Tensor], Tensor], dtype: torch.dtype, meter: Meter) -> None:
        self.fun, self.dtype, self.meter = fun, dtype, meter
        self.x = self.f = self.g = None

    def value(self, x: np.ndarray) -> float:
        self.meter.look()
        self.meter.nfev += 1
        f = float(self._at(x).detach())
        self.meter.course.append((self.meter.total, f))
        return f

    def gradient(self, x: np.ndarray) -> np.ndarray:
        self.meter.look()
        self.meter.njev += 1
        f = self._at(x)
        if not f.requires_grad:
            return np.zeros_like(x)
        (g,) = torch.autograd.grad(f, self.x, retain_graph=True, allow_unused=True, materialize_grads=True)
        return g.double().numpy()

    def hessian(self, x: np.ndarray) -> np.ndarray:
        self.meter.look()
        self.meter.nhev += 1
        g = self._gradient_graph(x)
        if not x.size:
            return np.zeros((0, 0))
        rows = [torch.vmap(lambda v: self._backward(g, v))(v) for v in torch.eye(x.size, dtype=self.dtype).split(256)]
        H = torch.cat(rows).double().numpy()
        return (H + H.T) / 2

    def product(self, x: np.ndarray, v: np.ndarray) -> np.ndarray:
        self.meter.look()
        self.meter.nhvp += 1
        v = torch.as_tensor(np.asarray(v), dtype=self.dtype).reshape(-1)
        return self._backward(self._gradient_graph(x), v).double().numpy()

    def _at(self, x: np.ndarray) -> Tensor:
        new = torch.tensor(x, dtype=self.dtype)
        if self.x is None or not torch.equal(new, self.x.detach()):
            self.x, self.g = new.requires_grad_(), None
            self.f = self.fun(self.x)
        return self.f

    def _gradient_graph(self, x: np.ndarray) -> Tensor:
        f = self._at(x)
        if self.g is None:
            self.g = torch.zeros_like(self.x)
            if f.requires_grad:
                (self.g,) = torch.autograd.grad(f, self.x, create_graph=True, allow_unused=True, materialize_grads=True)
        return self.g

    def _backward(self, g: Tensor, v: Tensor) -> Tensor:
        if not g.requires_grad:
            return torch.zeros_like(v)
        (out,) = torch.autograd.grad(g, self.x, v, retain_graph=True, allow_unused=True, materialize_grads=True)
        return out


def run(solver: Solver, problem: Problem, limit: float = SECONDS) -> Outcome:
    """Solve within ``limit`` seconds of processor time; what is raised, Ctrl-C too, is in the outcome."""
    meter = Meter(limit)

    def alarm(*_: object) -> None:
        if time.process_time() - meter.start > limit:
            signal.setitimer(signal.ITIMER_REAL, 0)  # once: it must not go off where nobody catches it
            meter.look()

    # a loop may never ask for a value; a timer of processor time would make its clock as coarse as the kernel's ticks
    before = signal.signal(signal.SIGALRM, alarm)
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")  # peers warn of lost precision and of scripts; their outcome says it as well
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.5, 0.5)
            try:
                out = solver.solve(problem, meter)
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
        except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001  a peer's crash is a result
            out = Outcome(error=f"{type(error).__name__}: {error}".strip(": "))
    signal.signal(signal.SIGALRM, before)
    out.seconds = time.process_time() - meter.start
    if not out.course:
        out.nfev, out.njev, out.nhev, out.nhvp = meter.nfev, meter.njev, meter.nhev, meter.nhvp
        out.course = meter.course
    return out


def reason_absent(solver: Solver) -> str | None:
    """Why ``solver`` cannot run here, or None."""
    package, _, attribute = solver.needs.partition(":")
    if importlib.util.find_spec(package) is None:
        return "not installed"
    if attribute and not hasattr(importlib.import_module(package), attribute):
        return f"{package} has no {attribute}"
    return None


def _scipy(method: str, options: dict[str, Any]) -> Callable[[Problem, Meter], Outcome]:
    def solve(problem: Problem, meter: Meter) -> Outcome:
        from scipy.optimize import minimize

        calls = Calls(problem.fun, problem.x0.dtype, meter)
        second = {}
        if method in ("trust-exact", "dogleg"):
            second = {"hess": calls.hessian}
        elif method in ("trust-krylov", "trust-ncg", "Newton-CG"):
            second = {"hessp": calls.product}
        x0 = problem.x0.detach().double().numpy()
        r = minimize(calls.value, x0, jac=calls.gradient, method=method, options=dict(options), **second)
        return Outcome(torch.as_tensor(r.x), float(r.fun), bool(r.success), str(r.message), nit=int(r.get("nit", 0)))

    return solve


def _torchmin(method: str, options: dict[str, Any]) -> Callable[[Problem, Meter], Outcome]:
    def solve(problem: Problem, meter: Meter) -> Outcome:
        import torchmin
        from torchmin.function import ScalarFunction, sf_value

        def fun(x: Tensor) -> Tensor:
            meter.look()
            meter.nfev += 1
            meter.njev += 1  # it never asks for a value alone
            f = problem.fun(x)
            meter.course.append((meter.total, float(f.detach())))
            return f

        class Product:
            """pytorch-minimize's operator, counted."""

            def __init__(self, inner: Any) -> None:
                self.inner, self.shape, self.dtype, self.device = inner, inner.shape, inner.dtype, inner.device

            def mv(self, v: Tensor) -> Tensor:
                meter.look()
                meter.nhvp += 1
                return self.inner.mv(v)

            rmv = mv

        original = ScalarFunction.closure

        def closure(self: Any, x: Tensor) -> Any:
            out = original(self, x)
            meter.nhev += out.hess is not None
            return sf_value(out.f, out.grad, None if out.hessp is None else Product(out.hessp), out.hess)

        ScalarFunction.closure = closure
        try:
            r = torchmin.minimize(fun, problem.x0.detach().clone(), method=method, options=dict(options))
        finally:
            ScalarFunction.closure = original
        x, success = r.x.detach().reshape(-1), bool(r.get("success", False))
        return Outcome(x, float(r.fun), success, str(r.get("message", "")), nit=int(r.get("nit", 0)))

    return solve


def _ours(method: str) -> Callable[[Problem, Meter], Outcome]:
    def solve(problem: Problem, meter: Meter) -> Outcome:
        import hesse

        def fun(x: Tensor) -> Tensor:
            meter.look()
            return problem.fun(x)

        return _read(hesse.minimize(fun, problem.x0, method=method))

    return solve


def _read(r: Any, half: bool = False) -> Outcome:
    """A ``hesse`` result; its trace has the counts at every row. ``half``: a result of least squares, cost ½ Σ r²."""
    fun, scale = (2 * float(r.cost), 2.0) if half else (float(r.fun), 1.0)
    x, message = torch.as_tensor(r.x).detach().reshape(-1), str(r.message)
    counts = {name: int(getattr(r, name)) for name in ("nfev", "njev", "nhev", "nhvp")}
    course = [(row.nfev + row.njev + row.nhev + row.nhvp, scale * row.fun) for row in r.trace]
    course.append((sum(counts.values()), fun))
    return Outcome(x, fun, bool(r.success), message, nit=int(r.nit), course=course, **counts)


def _scipy_least(method: str) -> Callable[[Problem, Meter], Outcome]:
    def solve(problem: Problem, meter: Meter) -> Outcome:
        from scipy.optimize import least_squares

        if problem.n > 2000:  # nothing can interrupt LAPACK, and one dense factorisation takes minutes
            raise OutOfTime(f"not tried: a factorisation of {problem.n} x {problem.n} alone is longer than the limit")

        def residual(x: np.ndarray) -> np.ndarray:
            meter.look()
            meter.nfev += 1
            with torch.no_grad():
                r = problem.residual(torch.tensor(x)).numpy()
            meter.course.append((meter.total, float(r @ r)))
            return r

        def jacobian(x: np.ndarray) -> np.ndarray:
            meter.look()
            meter.njev += 1
            return torch.func.jacrev(problem.residual, chunk_size=256)(torch.tensor(x)).numpy()

        r = least_squares(
            residual, problem.x0.numpy(), jacobian, method=method, xtol=1e-12, ftol=1e-12, gtol=1e-12, max_nfev=STEPS
        )
        return Outcome(torch.as_tensor(r.x), 2 * float(r.cost), bool(r.success), str(r.message))

    return solve


def _our_least(method: str) -> Callable[[Problem, Meter], Outcome]:
    def solve(problem: Problem, meter: Meter) -> Outcome:
        import hesse

        def residual(x: Tensor) -> Tensor:
            meter.look()
            return problem.residual(x)

        return _read(hesse.least_squares(residual, problem.x0, method=method), half=True)

    return solve


def _table(*solvers: Solver) -> dict[str, Solver]:
    return {solver.name: solver for solver in solvers}


OURS = _table(*(Solver(f"hesse {m}", _ours(m), "hesse:minimize") for m in ("auto", "trust-exact", "newton", "arc")))
PEERS = _table(
    *(Solver(f"scipy {m}", _scipy(m, options), "scipy") for m, options in TIGHT.items()),
    *(Solver(f"scipy {m} (defaults)", _scipy(m, {}), "scipy") for m in ("trust-exact", "BFGS", "L-BFGS-B")),
    *(Solver(f"torchmin {m}", _torchmin(m, options), "torchmin") for m, options in TORCHMIN_TIGHT.items()),
)
STOCK = _table(  # with the settings that a user gets
    *(Solver(f"scipy {m}", _scipy(m, {}), "scipy") for m in TIGHT),
    *(Solver(f"torchmin {m}", _torchmin(m, {}), "torchmin") for m in TORCHMIN_TIGHT),
)
LEAST = _table(
    *(Solver(f"hesse.least_squares {m}", _our_least(m), "hesse:least_squares") for m in ("lm", "auto")),
    *(Solver(f"scipy least_squares {m}", _scipy_least(m), "scipy") for m in ("trf", "dogbox", "lm")),
)
