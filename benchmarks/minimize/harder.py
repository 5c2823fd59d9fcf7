"""Problems that are hard in kind rather than in size: scale, domains, plateaus, saddles, statistics, molecules.

Data come from generators seeded here, so that every run sees the same functions.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import log_softmax, softplus

from benchmarks.minimize.classic import beale, count, rosenbrock, vector
from benchmarks.minimize.classic_sized import rosenbrock_start
from benchmarks.minimize.larger import chained_rosenbrock
from benchmarks.minimize.problems import Problem, least

__all__ = ["problems"]


def _normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _named(name: str, fun: Callable[[Tensor], Tensor], x0: Tensor, best: tuple[float, ...], *tags: str) -> Problem:
    return Problem(name, fun, x0, best, None, frozenset(tags))


def himmelblau(x: Tensor) -> Tensor:
    return torch.stack([x[0] ** 2 + x[1] - 11, x[0] + x[1] ** 2 - 7])


def camel(x: Tensor) -> Tensor:
    a, b = x
    return (4 - 2.1 * a**2 + a**4 / 3) * a**2 + a * b + (-4 + 4 * b**2) * b**2


def rastrigin(x: Tensor) -> Tensor:
    return (x * x + 10 - 10 * (2 * math.pi * x).cos()).sum()


def griewank(x: Tensor) -> Tensor:
    return 1 + (x * x).sum() / 4000 - (x / count(1, x.numel()).sqrt()).cos().prod()


def ackley(x: Tensor) -> Tensor:
    far = -20 * (-0.2 * (x * x).mean().sqrt()).exp()
    return far - (2 * math.pi * x).cos().mean().exp() + 20 + math.e


def styblinski_tang(x: Tensor) -> Tensor:
    return 0.5 * (x**4 - 16 * x**2 + 5 * x).sum()


def dixon_price(x: Tensor) -> Tensor:
    return torch.cat([x[:1] - 1, count(2, x.numel()).sqrt() * (2 * x[1:] ** 2 - x[:-1])])


def zakharov(x: Tensor) -> Tensor:
    s = 0.5 * (count(1, x.numel()) * x).sum()
    return torch.cat([x, torch.stack([s, s * s])])


def trid(x: Tensor) -> Tensor:
    return ((x - 1) ** 2).sum() - (x[1:] * x[:-1]).sum()


def goldstein_price(x: Tensor) -> Tensor:
    a, b = x
    first = 1 + (a + b + 1) ** 2 * (19 - 14 * a + 3 * a**2 - 14 * b + 6 * a * b + 3 * b**2)
    return first * (30 + (2 * a - 3 * b) ** 2 * (18 - 32 * a + 12 * a**2 + 48 * b - 36 * a * b + 27 * b**2))


def mccormick(x: Tensor) -> Tensor:
    return x.sum().sin() + (x[0] - x[1]) ** 2 - 1.5 * x[0] + 2.5 * x[1] + 1


def steep_quadratic(n: int) -> Problem:
    """½ xᵀAx - bᵀx with eigenvalues 1e-10 to 1 in a random basis; each direction is worth -½ at the answer."""
    Q, w = torch.linalg.qr(_normal(1, n, n))[0], torch.logspace(-10, 0, n, dtype=torch.float64)

    def fun(x: Tensor) -> Tensor:
        c = Q.T @ x
        return (0.5 * w * c * c - w.sqrt() * c).sum()

    return _named(f"quadratic-1e10-{n}", fun, torch.zeros(n, dtype=torch.float64), (-n / 2,))


def logistic(name: str, n: int, rows: int, spread: float, l2: float, best: float) -> Problem:
    """Mean logistic loss of [rows, n] plus ½ l2 |x|²; the columns' scales run from 1/spread to spread."""
    X = _normal(2, rows, n)
    y = torch.sign(X @ _normal(3, n) / n**0.5 + 0.5 * _normal(4, rows))
    X = X * torch.logspace(-math.log10(spread), math.log10(spread), n, dtype=torch.float64)

    def fun(x: Tensor) -> Tensor:
        return softplus(-y * (X @ x)).mean() + 0.5 * l2 * (x @ x)

    return _named(name, fun, torch.zeros(n, dtype=torch.float64), (best,))


def softmax_regression(best: float) -> Problem:
    """Cross entropy of 4 classes over [300, 12] plus ½ 1e-3 |x|²: 48 unknowns."""
    X, classes = _normal(5, 300, 12), 4
    label = (X @ _normal(6, 12, classes) + _normal(7, 300, classes)).argmax(1)

    def fun(x: Tensor) -> Tensor:
        rows = log_softmax(X @ x.view(12, classes), 1)
        return -rows.gather(1, label[:, None]).mean() + 0.5e-3 * (x @ x)

    return _named("softmax-regression", fun, torch.zeros(48, dtype=torch.float64), (best,))


def poisson_regression(best: float) -> Problem:
    """Mean of exp(η) - yη over [200, 10], with columns that make exp overflow at long steps."""
    X = 3 * _normal(8, 200, 10)
    y = (X @ (0.2 * _normal(9, 10)) + 1).exp().round()

    def fun(x: Tensor) -> Tensor:
        eta = X @ x
        return (eta.exp() - y * eta).mean()

    return _named("poisson-regression", fun, torch.zeros(10, dtype=torch.float64), (best,))


def robust_regression(best: float) -> Problem:
    """Pseudo-Huber loss √(1+r²)-1 of [200, 20] with a tenth of the rows far off."""
    X = _normal(10, 200, 20)
    y = X @ _normal(11, 20) + 0.1 * _normal(12, 200)
    y[::10] += 50 * _normal(13, 20)

    def fun(x: Tensor) -> Tensor:
        return ((1 + (X @ x - y) ** 2).sqrt() - 1).sum()

    return _named("robust-regression", fun, torch.zeros(20, dtype=torch.float64), (best,))


def tanh_network(best: float, hidden: int = 16) -> Problem:
    """Mean squared error of 2-hidden-1 tanh on 60 points of a wavy surface, plus ½ 1e-3 |x|²."""
    X = 2 * _normal(14, 60, 2)
    y = (X[:, 0] * X[:, 1]).sin() + 0.5 * X[:, 0]
    cuts = [2 * hidden, hidden, hidden, 1]

    def fun(x: Tensor) -> Tensor:
        W, b, v, c = x.split(cuts)
        out = (X @ W.view(2, hidden) + b).tanh() @ v + c
        return ((out - y) ** 2).mean() + 0.5e-3 * (x @ x)

    return _named("tanh-network", fun, 0.5 * _normal(15, sum(cuts)), (best,), "local")


def lennard_jones(atoms: int, best: float, seed: int) -> Problem:
    """Σ 4 (r^-12 - r^-6) over pairs (Wales and Doye, 1997), from a perturbed part of the face-centred lattice."""
    i, j = torch.triu_indices(atoms, atoms, 1)
    grid = torch.cartesian_prod(*[torch.arange(-2.0, 3)] * 3).double()
    lattice = grid[grid.sum(1) % 2 == 0]
    near = lattice[(lattice - 0.1).norm(dim=1).argsort(stable=True)][:atoms] * (1.12 / 2**0.5)

    def fun(x: Tensor) -> Tensor:
        p = x.view(atoms, 3)
        s = ((p[i] - p[j]) ** 2).sum(1) ** -3
        return 4 * (s * s - s).sum()

    return _named(f"lennard-jones-{atoms}", fun, (near + 0.1 * _normal(seed, atoms, 3)).reshape(-1), (best,), "local")


def analytic_centre(best: float, outside: float) -> Problem:
    """-Σ log(b - Ax) for 60 half-spaces in 10 dimensions, from near a face; ``outside`` it is nan or inf."""
    A = _normal(16, 60, 10)
    b = 1 + _normal(17, 60).abs()
    ray = _normal(18, 10)
    x0 = 0.999 * ray / float((A @ ray / b).max())

    def fun(x: Tensor) -> Tensor:
        room = b - A @ x
        inside = bool((room > 0).all())
        return -room.log().sum() if inside or math.isnan(outside) else x.sum() * 0 + outside

    return _named(f"analytic-centre-{outside}", fun, x0, (best,), "domain")


def barrier(best: float) -> Problem:
    """A linear programme with its barrier, 1e3 cᵀx - Σ log(b - Ax), in 10 dimensions: steep towards a corner."""
    A = torch.cat([_normal(19, 40, 10), torch.eye(10, dtype=torch.float64), -torch.eye(10, dtype=torch.float64)])
    b, c = torch.ones(60, dtype=torch.float64), _normal(20, 10)

    def fun(x: Tensor) -> Tensor:
        return 1e3 * (c @ x) - (b - A @ x).log().sum()

    return _named("linear-programme-barrier", fun, torch.zeros(10, dtype=torch.float64), (best,), "domain")


def factorisation() -> Problem:
    """|UVᵀ - M|² for M [10, 8] by rank 2, from near the saddle at 0; Eckart and Young give the answer."""
    M = _normal(21, 10, 8)
    best = float(torch.linalg.svdvals(M)[2:].square().sum())

    def residual(x: Tensor) -> Tensor:
        return (x[:20].view(10, 2) @ x[20:].view(8, 2).T - M).reshape(-1)

    return least("factorisation-saddle", residual, 1e-3 * _normal(22, 36), (best,), "local")


def phase_retrieval() -> Problem:
    """Σ ((a·x)² - y)² / 4m for 120 squares of 20 unknowns: quartic, with saddles (Sun, Qu and Wright, 2018)."""
    A = _normal(23, 120, 20)
    y = (A @ _normal(24, 20)) ** 2

    def residual(x: Tensor) -> Tensor:
        return ((A @ x) ** 2 - y) / (4 * 120) ** 0.5

    return least("phase-retrieval", residual, 0.1 * _normal(25, 20), (0.0,), "local")


def exponentials(best: float) -> Problem:
    """Two decays and a floor fitted to 50 noisy points: 5 unknowns, close rates."""
    t = torch.linspace(0, 5, 50, dtype=torch.float64)
    y = 2 * (-0.8 * t).exp() + (-2.5 * t).exp() + 0.3 + 0.01 * _normal(26, 50)

    def residual(x: Tensor) -> Tensor:
        return x[0] * (-x[1] * t).exp() + x[2] * (-x[3] * t).exp() + x[4] - y

    return least("exponentials", residual, vector(1, 0.5, 1, 4, 0), (best,))


def logistic_growth(best: float) -> Problem:
    """K / (1 + exp(a - rt)) fitted to 20 noisy points, K in thousands and r in hundredths."""
    t = torch.linspace(0, 200, 20, dtype=torch.float64)
    y = 5000 / (1 + (4 - 0.05 * t).exp()) + 30 * _normal(27, 20)

    def residual(x: Tensor) -> Tensor:
        return x[0] / (1 + (x[1] - x[2] * t).exp()) - y

    return least("logistic-growth", residual, vector(3000, 2, 0.02), (best,))


def geometric_programme(best: float) -> Problem:
    """log Σ exp(Ax + b) of [60, 12]: convex, with tails that grow only linearly (Boyd and Vandenberghe, 4.5)."""
    A, b = 3 * _normal(28, 60, 12), _normal(29, 60)

    def fun(x: Tensor) -> Tensor:
        return torch.logsumexp(A @ x + b, 0)

    return _named("geometric-programme", fun, 2 * _normal(30, 12), (best,))


def marginal_likelihood(best: float) -> Problem:
    """A Gaussian process's negative log evidence in log length, height and noise, for 30 points."""
    t = torch.linspace(0, 6, 30, dtype=torch.float64)
    y = (2 * t).sin() + 0.1 * _normal(31, 30)
    apart = (t[:, None] - t[None, :]) ** 2

    def fun(x: Tensor) -> Tensor:
        length, height, noise = (2 * x).exp()
        K = height * (-apart / (2 * length)).exp() + noise * torch.eye(30, dtype=torch.float64)
        L, bad = torch.linalg.cholesky_ex(K)
        w = torch.linalg.solve_triangular(L, y[:, None], upper=False)
        total = 0.5 * (w * w).sum() + L.diagonal().log().sum() + 15 * math.log(2 * math.pi)
        return total if int(bad) == 0 else total + math.nan

    return _named("gaussian-process", fun, vector(1, 1, 0), (best,), "local", "domain")


BEST = {  # computed by Newton's method with eigenvalue shifts to a gradient of 1e-7 of the first or less
    "logistic": 0.3295494642042381,
    "scaled": 0.4383196711901369,
    "softmax": 0.4053056293837528,
    "poisson": -23.62864625294089,
    "robust": 689.2900151622989,
    "centre": -35.49734455832844,
    "barrier": -4248.952913382891,
    "exponentials": 4.02112925727990e-3,
    "growth": 22370.57369581879,
    "geometric": 4.573572490016216,
    "process": -6.707777455322503,
    "network": 6.259797887243e-2,
}


def problems() -> list[Problem]:
    return [
        least("himmelblau", himmelblau, vector(0, 0)),
        least("beale-far", beale, vector(4, -1.5)),
        least("rosenbrock-far", rosenbrock, vector(-100, 100)),
        least("chained-rosenbrock-50", chained_rosenbrock, rosenbrock_start(50), (0.0, 3.986623854301), "local"),
        least("dixon-price", dixon_price, torch.ones(10, dtype=torch.float64), (0.0, 2 / 3)),
        least("zakharov", zakharov, torch.full((10,), 5.0, dtype=torch.float64)),
        _named("camel", camel, vector(1, 1), (-1.031628453489877, -0.2154638244), "local"),
        _named("goldstein-price", goldstein_price, vector(-0.5, 0.25), (3.0, 30.0, 84.0, 840.0), "local"),
        _named("mccormick", mccormick, vector(0, 0), (-1.9132229549810367,), "local"),
        _named("rastrigin", rastrigin, 0.3 * _normal(40, 10).tanh(), (0.0,), "local"),
        _named("griewank", griewank, 5 * _normal(41, 10), (0.0,), "local"),
        _named("ackley", ackley, vector(3.2, -4.1, 5.3, 2.2, -3.9), (0.0,), "local"),
        _named("styblinski-tang", styblinski_tang, torch.full((10,), 0.5, dtype=torch.float64),
               (-391.6616570377142,), "local"),
        _named("trid-50", trid, torch.zeros(50, dtype=torch.float64), (-50 * 54 * 49 / 6,)),
        steep_quadratic(100),
        logistic("logistic-dense", 50, 500, 1, 1e-3, BEST["logistic"]),
        logistic("logistic-ill-scaled", 20, 300, 1e3, 1e-6, BEST["scaled"]),
        softmax_regression(BEST["softmax"]),
        poisson_regression(BEST["poisson"]),
        robust_regression(BEST["robust"]),
        tanh_network(BEST["network"]),
        lennard_jones(7, -16.505384, 32),
        lennard_jones(13, -44.326801, 33),
        analytic_centre(BEST["centre"], math.nan),
        analytic_centre(BEST["centre"], math.inf),
        barrier(BEST["barrier"]),
        factorisation(),
        phase_retrieval(),
        exponentials(BEST["exponentials"]),
        logistic_growth(BEST["growth"]),
        geometric_programme(BEST["geometric"]),
        marginal_likelihood(BEST["process"]),
    ]  # fmt: skip
