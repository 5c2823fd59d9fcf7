"""Edge cases: what matters is not that a solver wins, but that its word can be trusted.

A word is honest if success means that x is a minimum, and failure that it is not (or that no smooth minimum exists).
A crash in the middle of linear algebra, a loop without end and a changed x0 are no honest words; an error that names
the cause is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.minimize.classic import vector
from benchmarks.minimize.peers import Outcome, Solver, run
from benchmarks.minimize.problems import Problem, value

__all__ = ["CASES", "Case", "judge"]

Verdict = tuple[bool, str]
Fun = Callable[[Tensor], Tensor]
Make = Callable[[], tuple[Fun, Tensor]]
Honest = Callable[[Outcome, Fun, Tensor], Verdict]


@dataclass(frozen=True)
class Case:
    """``make()`` gives a fresh function and start; ``honest(outcome, fun, x0)`` judges. All makes must pass."""

    name: str
    makes: tuple[Make, ...]
    honest: Honest


def judge(solvers: list[Solver], limit: float) -> dict[str, dict[str, Verdict]]:
    """``[case][solver]`` is (honest, reason)."""
    return {case.name: {solver.name: _judge(case, solver, limit) for solver in solvers} for case in CASES}


def _judge(case: Case, solver: Solver, limit: float) -> Verdict:
    words = ""
    for make in case.makes:
        fun, x0 = make()
        out = run(solver, Problem(case.name, fun, x0, (0.0,)), limit)
        if out.error.startswith("OutOfTime"):
            return False, f"no end within {limit:g} s"
        honest, words = case.honest(out, fun, x0)
        if not honest:
            return False, words
    return True, words


def _word(out: Outcome, truth: bool, where: str) -> Verdict:
    """Success exactly where there is a minimum."""
    if out.error:
        return False, f"raises {out.error[:60]}"
    if out.success != truth:
        return False, f"says {'success' if out.success else 'failure'} {where}"
    return True, out.message[:60]


def _near(*answer: float, tol: float = 1e-4) -> Honest:
    """The only minimum is ``answer``, and finding it is easy: success is there, failure elsewhere."""

    def honest(out: Outcome, fun: Fun, x0: Tensor) -> Verdict:
        there = out.x is not None and bool((out.x - torch.tensor(answer)).abs().max() <= tol)
        return _word(out, there, f"at {_shown(out)}")

    return honest


def _low(least: float) -> Honest:
    """Several minima, all of value ``least``."""

    def honest(out: Outcome, fun: Fun, x0: Tensor) -> Verdict:
        there = out.x is not None and value(fun, out.x) <= least + 1e-6
        return _word(out, there, f"at {_shown(out)}, no minimum" if not there else f"at {_shown(out)}")

    return honest


def _shown(out: Outcome) -> str:
    return "nowhere" if out.x is None else str([float(f"{v:.4g}") for v in out.x[:3].tolist()])


def _rosenbrock(x: Tensor) -> Tensor:
    return 100 * (x[1] - x[0] ** 2) ** 2 + (1 - x[0]) ** 2


def _start(*numbers: float) -> Tensor:
    return vector(*numbers)


def _at_the_minimum(out: Outcome, fun: Fun, x0: Tensor) -> Verdict:
    honest, words = _near(1.0, 1.0)(out, fun, x0)
    if honest and out.total > 12:
        return False, f"{out.total} evaluations to see it"
    return honest, words


def _constant(out: Outcome, fun: Fun, x0: Tensor) -> Verdict:
    return _word(out, True, "though every point is a minimum")


def _no_minimum(out: Outcome, fun: Fun, x0: Tensor) -> Verdict:
    return _word(out, False, f"at {_shown(out)}, where there is no minimum")


def _kink(out: Outcome, fun: Fun, x0: Tensor) -> Verdict:
    """At the kink both words are right: it is the minimum, and it is not a smooth one."""
    there = out.x is not None and bool((out.x - _start(0, 1)).abs().max() <= 1e-3)
    return _word(out, there and out.success, f"at {_shown(out)}, the minimum is [0, 1]")


def _jump(out: Outcome, fun: Fun, x0: Tensor) -> Verdict:
    """0 is a minimum of the piece beyond the jump; at the jump, where the value is lower, there is none."""
    there = out.x is not None and float(out.x.abs().max()) <= 1e-4
    return _word(out, there, f"at {_shown(out)}; at the jump is no minimum")


def _noisy(out: Outcome, fun: Fun, x0: Tensor) -> Verdict:
    there = out.x is not None and value(_rosenbrock, out.x) <= 1e-4
    return _word(out, there, f"at {_shown(out)}")


def _empty(out: Outcome, fun: Fun, x0: Tensor) -> Verdict:
    if out.error:
        clear = out.error.startswith("ValueError") and any(word in out.error for word in ("empty", "x0", "no element"))
        return clear, f"raises {out.error[:60]}"
    return _word(out, out.x is not None and out.x.numel() == 0 and out.fun == 2.0, "without an x")


def _untouched(out: Outcome, fun: Fun, x0: Tensor) -> Verdict:
    honest, words = _near(1.0, 1.0, tol=1e-3)(out, fun, x0)
    changed = not torch.equal(x0.detach(), _start(-1.2, 1)) or x0.grad is not None
    return honest and not changed, "x0 was changed" if changed else words


def _interrupted(out: Outcome, fun: Fun, x0: Tensor) -> Verdict:
    """The interrupt comes through, or ends in a result without success that has the best x so far."""
    if out.error:
        return out.error.startswith("KeyboardInterrupt"), f"raises {out.error[:60]}"
    better = out.x is not None and value(_rosenbrock, out.x) <= value(_rosenbrock, x0)
    return better and not out.success, "swallows the interrupt"


def _float32_rosenbrock() -> tuple[Fun, Tensor]:
    return _rosenbrock, torch.tensor([-1.2, 1.0])


def _interrupting() -> tuple[Fun, Tensor]:
    calls = [0]

    def fun(x: Tensor) -> Tensor:
        calls[0] += 1
        if calls[0] == 15:
            raise KeyboardInterrupt
        return _rosenbrock(x)

    return fun, _start(-1.2, 1)


def _shaking() -> tuple[Fun, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def fun(x: Tensor) -> Tensor:  # the gradient is that of the smooth part: the noise is in the value alone
        return _rosenbrock(x) + 1e-6 * torch.randn((), dtype=x.dtype, generator=generator)

    return fun, _start(-1.2, 1)


def _plain(fun: Fun, *x0: float) -> Make:
    return lambda: (fun, _start(*x0))


def _scaled(scale: float) -> Make:
    return _plain(lambda x: scale * _rosenbrock(x), -1.2, 1)


CASES = (
    Case("start at the minimum", (_plain(_rosenbrock, 1, 1),), _at_the_minimum),
    Case("constant function", (_plain(lambda x: x.sum() * 0 + 3, 1, 2),), _constant),
    Case("nan region", (_plain(lambda x: (x - x.log()).sum(), 5, 8),), _near(1.0, 1.0)),
    Case("unbounded", (_plain(lambda x: x[0] + x[1] ** 2, 1, 1), _plain(lambda x: -(x**4).sum(), 1, 1)), _no_minimum),
    Case("kink", (_plain(lambda x: x[0].abs() + 2 * (x[1] - 1).abs(), 0.7, -1.3),), _kink),
    Case("saddle start", (_plain(lambda x: x[0] ** 4 / 4 - x[0] ** 2 / 2 + x[1] ** 2, 0, 0),), _low(-0.25)),
    Case("1e-12 and 1e+12 scaled", (_scaled(1e-12), _scaled(1e12)), _near(1.0, 1.0, tol=1e-3)),
    Case("float32", (_float32_rosenbrock,), _near(1.0, 1.0, tol=1e-2)),
    Case("discontinuity", (_plain(lambda x: (x * x).sum() + 5 * (x[0] < 1), 4),), _jump),
    Case("n = 1", (_plain(lambda x: ((x - 3) ** 4 + (x - 3) ** 2).sum(), 0),), _near(3.0)),
    Case("n = 0", (_plain(lambda x: (x * x).sum() + 2),), _empty),
    Case("non-contiguous", (lambda: (_rosenbrock, _start(-1.2, 9, 1, 9)[::2]),), _untouched),
    Case("requires_grad", (lambda: (_rosenbrock, _start(-1.2, 1).requires_grad_()),), _untouched),
    Case("zero gradient at a maximum", (_plain(lambda x: x.cos().sum(), 0, 0),), _low(-2.0)),
    Case("interrupt", (_interrupting,), _interrupted),
    Case("noisy", (_shaking,), _noisy),
)  # fmt: skip
