"""Sums over the whole spectrum, ``tr f(B)``, without an eigenvalue: stochastic Lanczos quadrature.

For a vector z, the form ``z' f(B) z / z'z`` is an integral of f over the eigenvalues, each weighed with z's share of
its eigenvector. m Lanczos steps give the Gauss rule of that integral: the eigenvalues of the small matrix are its
nodes, the squared first components of their vectors its weights (Golub and Meurant, 2010). The mean over random z is
``tr f(B) / n`` (Ubaru, Chen and Saad, 2017). A narrow bell for f gives the spectral density (Lin, Saad and Yang, 2016;
Ghorbani, Krishnan and Xiao, 2019), the logarithm gives the log-determinant.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hesse.linalg.estimate import FIRST, Estimate
from hesse.linalg.lanczos import Lanczos, LinAlgError, check_finite, require_symmetric, working_dtype
from hesse.linalg.sampling import Probes, student

if TYPE_CHECKING:
    from hesse.linalg.operator import LinearOperator

__all__ = ["Density", "logdet", "spectral_density"]

# The most numbers that the bases of one group of vectors hold: a gigabyte in float32.
GROUP = 2**28


@dataclass(frozen=True)
class Density:
    """How the eigenvalues are spread: a smooth density that integrates to one, and what it was made of.

    Args:
        grid: values [m] in ascending order, float64.
        density: the share of eigenvalues per unit there [m]: a mean over random vectors.
        error: the standard error of that mean [m]; zero where all eigenvalues were computed.
        nodes: eigenvalues as one vector sees them, [vectors, steps].
        weights: their shares, [vectors, steps]; each row sums to one.
        width: the standard deviation of the bell that smooths each node.
        lower, upper: the outermost nodes. The spectrum reaches at least so far.
        products: matrix-vector products spent.
    """

    grid: Tensor
    density: Tensor
    error: Tensor
    nodes: Tensor
    weights: Tensor
    width: float
    lower: float
    upper: float
    products: int

    def smoothed(self, width: float) -> Density:
        """The same with bells of another width, at no further product."""
        return _smoothed(self.nodes, self.weights, width, self.products)


def spectral_density(
    A: LinearOperator, *, steps: int = 50, vectors: int = 8, width: float | None = None, seed: int = 0
) -> Density:
    """The density of the eigenvalues of a symmetric operator.

    Args:
        A: n x n, symmetric. With no more than ``steps * vectors`` rows it is multiplied out, and the density exact.
        steps: products for each vector: what is closer together than the range of the spectrum over ``steps`` is not
            told apart, except near the ends, where eigenvalues stand out sharply.
        vectors: random vectors, for the mean and its error.
        width: of the bells; by default the range of the nodes over ``steps``.
        seed: of the vectors.

    Raises:
        TypeError: A is not declared symmetric.
        ValueError: an argument makes no sense.
        LinAlgError: a product is not finite.

    Example:
        Half of the eigenvalues are 0, half are 1:

        >>> from hesse.linalg import LinearOperator
        >>> found = spectral_density(LinearOperator.of(torch.diag(torch.tensor([0.0, 1.0, 0.0, 1.0]))))
        >>> found.nodes.tolist(), found.weights.tolist()
        ([[0.0, 0.0, 1.0, 1.0]], [[0.25, 0.25, 0.25, 0.25]])
        >>> round(float(torch.trapezoid(found.density, found.grid)), 6)
        1.0
    """
    require_symmetric(A, "the spectral density")
    if steps < 2 or vectors < 2:
        raise ValueError(f"steps and vectors must be at least 2; got steps={steps}, vectors={vectors}.")
    if width is not None and not width > 0:
        raise ValueError(f"width must be positive; got {width}.")
    probes = Probes(A, seed)
    if A.shape[0] <= steps * vectors:
        nodes = _eigenvalues(A)[None]
        weights, products = torch.full_like(nodes, 1 / A.shape[0]), A.shape[0]
    else:
        rules = []
        for k in _groups(A, vectors, steps):
            run = Lanczos(A, probes.signs(k), steps + 1, probes.generator)
            for _ in range(steps):
                run.step()
            rules.append(_gauss(run))
        nodes, weights = (torch.cat(part) for part in zip(*rules, strict=True))
        products = steps * vectors
    return _smoothed(nodes, weights, width or _default_width(nodes, steps), products)


def _default_width(nodes: Tensor, steps: int) -> float:
    lower, upper = float(nodes.min()), float(nodes.max())
    spread, size = upper - lower, max(abs(lower), abs(upper))
    return spread / steps if spread > 1e-6 * size else (1e-3 * size or 1e-3)


def _smoothed(nodes: Tensor, weights: Tensor, width: float, products: int) -> Density:
    lower, upper = float(nodes.min()), float(nodes.max())
    # Six widths beyond the ends, two points a width: the trapezoidal sum of such bells is one to nine digits.
    points = math.ceil((upper - lower + 12 * width) / (width / 2)) + 1
    if points > 10**6:
        raise ValueError(f"bells of width {width} over a range of {upper - lower} need {points} points: widen them.")
    grid = torch.linspace(lower - 6 * width, upper + 6 * width, points, dtype=torch.float64)
    curves = torch.stack(
        [
            sum(w * torch.exp(-0.5 * ((grid - t) / width) ** 2) for t, w in zip(*rule, strict=True))
            for rule in zip(nodes, weights, strict=True)
        ]
    ) / (width * math.sqrt(2 * math.pi))
    count = len(curves)
    error = torch.zeros_like(grid)
    if count > 1:
        error = student(count) * curves.std(0) / math.sqrt(count)
    return Density(grid, curves.mean(0), error, nodes, weights, width, lower, upper, products)


def logdet(
    A: LinearOperator,
    damping: float,
    *,
    rtol: float = 0.05,
    atol: float = 0.0,
    max_products: int = 1000,
    seed: int = 0,
) -> Estimate:
    """``log det (A + damping I)`` of a symmetric operator that is positive definite with the damping.

    The error has two parts: the standard error of the mean over random vectors, and what Lanczos has left over.
    Where A is declared psd, the latter is bounded from both sides by a Gauss and a Gauss-Radau rule with a node at zero
    (Golub and Meurant, 2010), and the value is their mean; else it is judged by what the last steps have changed.

    Args:
        A: n x n, symmetric. If n is small it is multiplied out, and the error is that of rounding alone, which counts
            where the damping is below it.
        damping: not negative.
        rtol, atol: draw until the error is below ``rtol |value| + atol``. A log-determinant may be near zero:
            give ``atol`` where it may.
        max_products: the most products.
        seed: of the random vectors.

    Raises:
        TypeError: A is not declared symmetric.
        ValueError: the damping is negative, or ``max_products`` too small for a standard error.
        LinAlgError: a product is not finite, or the damped operator is not positive definite.

    Example:
        >>> from hesse.linalg import LinearOperator
        >>> A = LinearOperator.of(torch.diag(torch.tensor([1.0, 3.0])), psd=True)
        >>> round(float(logdet(A, damping=1.0)), 5)  # log 2 + log 4
        2.07944
    """
    require_symmetric(A, "logdet")
    if not damping >= 0:
        raise ValueError(f"damping must not be negative; got {damping}.")
    if max_products < 4 * FIRST:
        raise ValueError(f"a standard error needs at least {4 * FIRST} products; got max_products={max_products}.")
    n = A.shape[0]
    if n <= min(20 * FIRST, max_products):
        return _exact(A, damping, (rtol, atol), 0)
    probes = Probes(A, seed)
    samples = torch.zeros(0, dtype=torch.float64)
    margins = torch.zeros(0, dtype=torch.float64)
    wanted, products = FIRST, 0
    while True:
        for k in _groups(A, wanted, 64):
            most = min(n, (max_products - products) // k)
            if not most:
                break
            spent, values, left = _quadrature(A, damping, probes, k, most, (rtol, atol))
            samples, margins = torch.cat([samples, values]), torch.cat([margins, left])
            products += spent
        count = len(samples)
        value = samples.mean()
        noise = student(count) * samples.std() / math.sqrt(count)
        error = torch.hypot(noise, margins.mean())
        allowed = rtol * abs(float(value)) + atol
        converged = float(error) <= allowed
        each = -(-products // count)
        room = (max_products - products) // each
        need = math.ceil(min(count * 1.1 * (float(error) / max(allowed, 1e-100)) ** 2, 1e9)) - count
        if not converged and n <= min(need * each, max_products - products):
            return _exact(A, damping, (rtol, atol), products)
        if converged or room == 0 or float(margins.mean()) > float(noise):  # more vectors would not help
            return Estimate(value, error, products, converged, "lanczos")
        wanted = min(room, max(need, count // 4), count)


def _quadrature(
    A: LinearOperator, damping: float, probes: Probes, k: int, most: int, allowed: tuple[float, float]
) -> tuple[int, Tensor, Tensor]:
    """Products, samples [k] of the log-determinant, and how far each may be from its integral.

    Args:
        most: steps, at most.
        allowed: (rtol, atol); a tenth of it may be left over.
    """
    rtol, atol = allowed
    n = A.shape[0]
    run = Lanczos(A, probes.signs(k), most + 1, probes.generator)
    before = torch.full((k,), math.inf, dtype=torch.float64)
    while True:
        for _ in range(min(5, most - run.length)):
            run.step()
            if run.complete:
                break
        nodes, weights = _gauss(run)
        logs, rounding = _logs(A, nodes, damping)
        values = n * (weights * logs).sum(1)
        margins = (values - before).abs()
        before = values
        if run.complete:
            margins = torch.zeros_like(values)
        elif A.psd and damping > 0:
            nodes, others = _radau(run)
            below = n * (others * _logs(A, nodes, damping)[0]).sum(1)
            margins, values = 0.5 * (values - below).abs(), 0.5 * (values + below)
        if margins.mean() <= 0.1 * (rtol * values.mean().abs() + atol) or run.complete or run.length == most:
            return run.products, values, margins + n * (weights * rounding).sum(1)


def _gauss(run: Lanczos) -> tuple[Tensor, Tensor]:
    """Nodes and weights [k, m] of the Gauss rule of each run."""
    theta, S, _ = run.ritz()
    return theta, S[:, 0].square()


def _radau(run: Lanczos) -> tuple[Tensor, Tensor]:
    """Nodes and weights [k, m + 1] of the Gauss-Radau rule of each run with one node at zero, for a psd operator.

    The small matrix gets one more row, with the last coupling, and the corner that makes zero an eigenvalue.
    """
    theta, S, _ = run.ritz()
    beta = run.coupling[:, 0, -1]
    floor = torch.finfo(run.dtype).eps * theta.abs().amax(1, keepdim=True) + 1e-300
    corner = beta.square() * (S[:, -1].square() / theta.clamp_min(floor)).sum(1)
    T = torch.nn.functional.pad(run.projected, (0, 1, 0, 1))
    T[:, -1, -2] = T[:, -2, -1] = beta
    T[:, -1, -1] = corner
    nodes, vectors = torch.linalg.eigh(T)
    return nodes, vectors[:, 0].square()


def _logs(A: LinearOperator, nodes: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """``log(node + damping)``, and how far rounding of the products may move it."""
    if A.psd:
        nodes = nodes.clamp_min(0)  # negative by rounding only
    lowest = float(nodes.min())
    if lowest + damping <= 0:
        raise LinAlgError(
            f"the operator has no log-determinant with damping {damping}: a value of its spectrum is {lowest:.6g}, so "
            f"the damped operator is not positive definite. Give a damping of more than {abs(lowest):.6g} at the least."
        )
    rounding = 4 * torch.finfo(working_dtype(A)).eps * nodes.abs().max()
    return (nodes + damping).log(), torch.log1p(rounding / (nodes + damping))


def _exact(A: LinearOperator, damping: float, allowed: tuple[float, float], products: int) -> Estimate:
    logs, rounding = _logs(A, _eigenvalues(A), damping)
    value, error = logs.sum(), rounding.sum()
    converged = float(error) <= allowed[0] * abs(float(value)) + allowed[1]
    return Estimate(value, error, products + A.shape[0], converged, "exact")


def _eigenvalues(A: LinearOperator) -> Tensor:
    matrix = A.dense().to("cpu", torch.float64)
    check_finite(A, matrix)
    return torch.linalg.eigvalsh(0.5 * (matrix + matrix.mT))


def _groups(A: LinearOperator, vectors: int, steps: int) -> list[int]:
    """How many of the vectors go side by side, so that their bases fit into memory."""
    most = max(1, GROUP // (A.shape[0] * (steps + 1)))
    return [min(most, vectors - begin) for begin in range(0, vectors, most)]
