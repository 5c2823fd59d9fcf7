"""Logistic regression to a gradient of 1e-8: hesse.minimize against scikit-learn's solvers on the same objective.

Objective: mean log loss + ½ l2 |w|² (+ l1 |w|_1), a column of ones among the features, so that the intercept is
penalised alike by all. scikit-learn divides its objective by the rows as well, and its ``tol`` is the largest element
of that gradient, so that 1e-8 means the same to everyone; what was reached is measured here, at the coefficients.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, softplus

__all__ = ["main"]

TOLERANCE = 1e-8
REPEATS = 5


@dataclass(frozen=True)
class Data:
    """Features [rows, d] with a last column of ones, labels [rows] from 0 to ``classes`` - 1."""

    name: str
    X: np.ndarray
    y: np.ndarray
    classes: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.X.shape[1],) if self.classes == 2 else (self.classes, self.X.shape[1])

    def loss(self) -> Callable[[Tensor], Tensor]:
        """Mean log loss of weights [d], or [classes, d]."""
        X, y = torch.as_tensor(self.X), torch.as_tensor(self.y)
        if self.classes == 2:
            sign = 1.0 - 2.0 * y.double()
            return lambda w: softplus(sign * (X @ w)).mean()
        return lambda w: cross_entropy(X @ w.T, y)


def main() -> None:
    import hesse

    if not hasattr(hesse, "minimize"):
        return print("logistic: left out, hesse has no minimize\n")
    try:
        import sklearn
    except ImportError as error:
        return print(f"logistic: left out, {error}\n")
    print(f"### Logistic regression to a gradient of {TOLERANCE:g} (scikit-learn {sklearn.__version__})\n")
    print(
        "Seconds: median (least to most) of interleaved runs. Gradient: largest element reached, by its own measure.\n"
    )
    print("| data | rows x features x classes | solver | seconds | time / best of scikit-learn | gradient | says |")
    print("|---" * 7 + "|")
    for data in _sets():
        _compare(data, l1=0.0, l2=1 / len(data.y), peers={"lbfgs": {}, "newton-cholesky": {}})
    strength = 0.02
    for data in (data for data in _sets()[:3] if data.classes == 2):  # ten classes take saga a minute
        saga = {"l1_ratio": 0.5, "C": 1 / (strength * len(data.y))}
        _compare(data, l1=strength / 2, l2=strength / 2, peers={"saga": saga})
    return print()


def _sets() -> list[Data]:
    from sklearn.datasets import load_breast_cancer, load_digits, make_classification

    cancer, digits = load_breast_cancer(return_X_y=True), load_digits(return_X_y=True)
    wide = make_classification(50_000, 100, n_informative=30, n_redundant=20, random_state=0)
    return [
        _data("breast cancer", *cancer, 2),
        _data("digits", *digits, 10),
        _data("digits, odd or even", digits[0], digits[1] % 2, 2),
        _data("breast cancer, perturbed rows", *_more(*cancer, 10_000), 2),
        _data("digits, perturbed rows", *_more(*digits, 10_000), 10),
        _data("breast cancer, perturbed rows", *_more(*cancer, 50_000), 2),
        _data("make_classification", *wide, 2),
    ]


def _more(X: np.ndarray, y: np.ndarray, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows drawn again with noise of a tenth of each column's spread."""
    draw = np.random.default_rng(0)
    chosen = draw.integers(0, len(y), rows)
    return X[chosen] + 0.1 * X.std(0) * draw.standard_normal((rows, X.shape[1])), y[chosen]


def _data(name: str, X: np.ndarray, y: np.ndarray, classes: int) -> Data:
    spread = X.std(0)
    X = (X - X.mean(0)) / np.where(spread > 0, spread, 1)
    return Data(name, np.ascontiguousarray(np.hstack([X, np.ones((len(y), 1))])), y.astype(np.int64), classes)


def _compare(data: Data, l1: float, l2: float, peers: dict[str, dict[str, float]]) -> None:
    from sklearn.linear_model import LogisticRegression

    import hesse

    loss = data.loss()

    def ours() -> tuple[Tensor, str]:
        penalties = {"l2": l2, **({"l1": l1} if l1 else {})}
        r = hesse.minimize(loss, torch.zeros(data.shape, dtype=torch.float64), atol=TOLERANCE, **penalties)
        return r.x.detach(), "success" if r.success else r.message[:60]

    def theirs(solver: str, options: dict[str, float]) -> tuple[Tensor, str]:
        settings = {
            "C": 1 / (l2 * len(data.y)),
            "max_iter": 20_000,
            "tol": TOLERANCE,
            "fit_intercept": False,
            **options,
        }
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model = LogisticRegression(solver=solver, random_state=0, **settings).fit(data.X, data.y)
        w = torch.as_tensor(np.array(model.coef_)).reshape(data.shape)
        return w, str(caught[0].message).split("\n")[0][:60] if caught else "success"

    solvers = {"hesse": ours, **{name: lambda n=name, o=options: theirs(n, o) for name, options in peers.items()}}
    seconds: dict[str, list[float]] = {name: [] for name in solvers}
    ends: dict[str, tuple[Tensor, str]] = {}
    repeats = REPEATS if not l1 else 1
    for turn in range(repeats + 1):
        for name, solve in solvers.items():
            begin = time.perf_counter()
            ends[name] = solve()
            if turn or repeats == 1:  # the first warms up
                seconds[name].append(time.perf_counter() - begin)
    best = [min(times) for times in zip(*(seconds[name] for name in peers), strict=True)]
    size = f"{len(data.y)} x {data.X.shape[1]} x {data.classes}"
    for name, (w, says) in ends.items():
        ratios = [mine / other for mine, other in zip(seconds[name], best, strict=True)]
        label = data.name + (" (elastic net)" if l1 else "")
        print(
            f"| {label} | {size} | {name} | {_spread(seconds[name])} | {_spread(ratios)} "
            f"| {_steepest(loss, w, l1, l2):.1e} | {says} |",
            flush=True,
        )


def _steepest(loss: Callable[[Tensor], Tensor], w: Tensor, l1: float, l2: float) -> float:
    """The largest element of the shortest subgradient at ``w``."""
    w = w.detach().requires_grad_()
    (g,) = torch.autograd.grad(loss(w), w)
    w, g = w.detach(), g + l2 * w.detach()
    held = (g.abs() - l1).clamp(min=0)
    return float(torch.where(w == 0, held, (g + l1 * w.sign()).abs()).max())


def _spread(values: list[float]) -> str:
    return f"{median(values):.3g} ({min(values):.3g} to {max(values):.3g})"
