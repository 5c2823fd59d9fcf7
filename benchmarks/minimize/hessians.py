"""What a dense Hessian and a sparse Newton step cost, in gradients of the same function (value, then gradient).

The timings of a row are interleaved, a gradient, a Hessian, a gradient, so that the machine's moods cancel in ratios.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor

from benchmarks.minimize.classic_sized import extended_rosenbrock, rosenbrock_start
from benchmarks.minimize.larger import chained_rosenbrock

__all__ = ["main"]

GOALS = {100: 5, 1000: 270}
STEP_GOAL, ITERATIONS_GOAL = 15, 30


def main() -> None:
    _dense()
    _steps()


def _dense() -> None:
    print("### A dense Hessian, in gradients\n")
    print("| function | n | gradient, ms | Hessian from its graph | all from x | torch.func.hessian | goal |")
    print("|---" * 7 + "|")
    for n in GOALS:
        for name, fun in _functions(n).items():
            cells = [name, str(n), *_hessian_costs(fun, n), str(GOALS[n])]
            print(f"| {' | '.join(cells)} |", flush=True)
    print()


def _hessian_costs(fun: Callable[[Tensor], Tensor], n: int) -> list[str]:
    """Milliseconds of a gradient; in gradients: from the gradient's graph, with that, and torch's own."""
    from hesse.curvature.dense import dense_hessian

    x = 0.5 * torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def graph() -> tuple[Tensor, Tensor]:
        leaf = x.clone().requires_grad_()
        return torch.autograd.grad(fun(leaf), leaf, create_graph=True)[0], leaf

    plain, alone, whole, torchs = [], [], [], []
    for turn in range(60 if n <= 100 else 12):
        kept = graph()
        gradient = _seconds(lambda: _gradient(fun, x), 5)
        rows = _seconds(lambda kept=kept: dense_hessian(*kept))
        everything = _seconds(lambda: dense_hessian(*graph()))
        theirs = _seconds(lambda: torch.func.hessian(fun)(x))
        if turn > 1:  # the first warm up
            plain.append(1e3 * gradient)
            alone.append(rows / gradient)
            whole.append(everything / gradient)
            torchs.append(theirs / gradient)
    return [_spread(plain), _spread(alone), _spread(whole), _spread(torchs)]


def _steps() -> None:
    import hesse

    if not hasattr(hesse, "minimize"):
        return print("Newton steps: left out, hesse has no minimize\n")
    print("### Sparse Newton: a step in gradients, by the times between callbacks\n")
    print("| function | n | method | iterations | gradient, ms | a step | the first, pattern found | goal |")
    print("|---" * 8 + "|")
    cases = {
        ("chained Rosenbrock (tridiagonal)", 10_000): (chained_rosenbrock, 1.0, f"a step at most {STEP_GOAL}"),
        ("extended Rosenbrock", 5_000): (extended_rosenbrock, None, f"at most {ITERATIONS_GOAL} iterations"),
    }
    for (name, n), (residual, near, goal) in cases.items():
        x0 = rosenbrock_start(n)
        if near is not None:  # near the answer of the chain: what a step costs does not hang on how many there are
            x0 = near + 0.2 * torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

        def fun(x: Tensor, residual: Callable[[Tensor], Tensor] = residual) -> Tensor:
            return residual(x).square().sum()

        plain, steps, before, result = [], [], [], None
        for turn in range(5):
            gradient = _seconds(lambda f=fun, x=x0: _gradient(f, x), 20)
            stamps = [time.process_time()]
            result = hesse.minimize(fun, x0, callback=lambda *_, s=stamps: s.append(time.process_time()))
            if turn:  # the first warms up
                plain.append(1e3 * gradient)
                steps += [(b - a) / gradient for a, b in itertools.pairwise(stamps[1:])]
                before.append((stamps[1] - stamps[0]) / gradient)
        word = f"{result.nit}" + ("" if result.success else f" ({result.status.name.lower()})")
        cells = [name, str(n), result.method, word, _spread(plain), _spread(steps), _spread(before), goal]
        print(f"| {' | '.join(cells)} |", flush=True)
    return print()


def _functions(n: int) -> dict[str, Callable[[Tensor], Tensor]]:
    g = torch.Generator().manual_seed(1)
    hidden = (n - 1) // 12 if n <= 100 else (n - 1) // 22
    inputs = 10 if n <= 100 else 20
    X = torch.randn(200, inputs, dtype=torch.float64, generator=g)
    y = X.prod(1).tanh()
    A = torch.randn(2 * n, n, dtype=torch.float64, generator=g)

    def network(x: Tensor) -> Tensor:
        W, b, v = x[: hidden * inputs], x[hidden * inputs : hidden * (inputs + 1)], x[hidden * (inputs + 1) :]
        return (((X @ W.view(inputs, hidden) + b).tanh() @ v[:hidden] + v[hidden:].sum() - y) ** 2).mean()

    return {
        "tanh network": network,
        "logistic loss": lambda x: torch.nn.functional.softplus(A @ x).mean(),
        "chained Rosenbrock": lambda x: chained_rosenbrock(x).square().sum(),
    }


def _gradient(fun: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(fun(x), x)[0]


def _seconds(call: Callable[[], object], repeats: int = 1) -> float:
    """Of the processor: what others do on the machine does not count."""
    begin = time.process_time()
    for _ in range(repeats):
        call()
    return (time.process_time() - begin) / repeats


def _spread(values: list[float]) -> str:
    return f"{median(values):.3g} ({min(values):.3g} to {max(values):.3g})" if values else "none"
