"""Trace, diagonal and Frobenius norm of an operator from a few products with random vectors, with a standard error.

For z with independent signs, E[z' A z] is the trace, E[z * A z] the diagonal and E[|A z|^2] the squared Frobenius norm.
Averaging alone (Hutchinson, 1990; Bekas, Kokiopoulou and Saad, 2007) gains a digit for a hundredfold of products. Where
few eigenvalues dominate, the products themselves span the range that holds them: that part is taken exactly and
only the rest is averaged (Hutch++: Meyer, Musco, Musco and Woodruff, 2021), and no product is for one purpose alone if
every vector in turn tests the range that all others span (XTrace and XDiag: Epperly, Tropp and Webber, 2024).

Every estimate carries its standard error, draws until that is as small as asked for, and is dropped for the exact
value as soon as n products would be cheaper.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hesse.linalg.sampling import BLOCK, HutchPlusPlus, LeaveOneOut, Mean, Probes, Sampler, diagonals, traces

if TYPE_CHECKING:
    from hesse.linalg.operator import LinearOperator

__all__ = ["Estimate", "diagonal", "frobenius", "trace"]

FIRST = 10  # samples before the first judgement
MAX_PRODUCTS = 300


@dataclass(frozen=True)
class Estimate:
    """A value, and how far it may be from the truth.

    Args:
        value: float64, a scalar or [n].
        error: one standard error, shaped as the value; zero where the value is exact up to rounding. For few samples it
            is widened by Student's factor, so that two of them cover the truth 95 times in 100.
        products: matrix-vector products spent.
        converged: whether the error is as small as was asked for.
        method: how the value was found.
        reason: why so, where the choice was ours.

    Example:
        >>> float(Estimate(torch.tensor(2.0), torch.tensor(0.1), 8, True))
        2.0
    """

    value: Tensor
    error: Tensor
    products: int
    converged: bool
    method: str = ""
    reason: str = ""

    def __float__(self) -> float:
        return float(self.value)


def trace(
    A: LinearOperator,
    *,
    method: str = "auto",
    rtol: float = 0.05,
    max_products: int = MAX_PRODUCTS,
    seed: int = 0,
) -> Estimate:
    """The sum of the diagonal of A, which need not be symmetric.

    Args:
        A: n x n.
        method: "hutchinson", best for flat spectra; "xtrace" or "hutch++", best where few eigenvalues dominate, at
            the price of keeping the vectors [n, products]; "auto" looks at the first ten or twenty samples and decides.
        rtol: draw until the standard error is below ``rtol |value|``. A trace near zero takes as long as it may.
        max_products: the most products.
        seed: of the random vectors.

    Raises:
        ValueError: the method is unknown, or ``max_products`` too small for a standard error.
        LinAlgError: a product is not finite.

    Example:
        >>> from hesse.linalg import LinearOperator
        >>> A = LinearOperator.of(torch.diag(torch.tensor([3.0, 2.0, 1.0])))
        >>> trace(A).value, trace(A).error
        (tensor(6., dtype=torch.float64), tensor(0., dtype=torch.float64))
    """
    _known(method, "hutchinson", "xtrace", "hutch++")
    return _estimate(A, _TRACE, method, rtol, max_products, seed)


def diagonal(
    A: LinearOperator,
    *,
    method: str = "auto",
    rtol: float = 0.05,
    max_products: int = MAX_PRODUCTS,
    seed: int = 0,
) -> Estimate:
    """The diagonal [n] of A, which need not be symmetric.

    Args:
        A: n x n.
        method: "bekas" averages; "low-rank" takes the range of the products exactly (XDiag) and keeps them; "auto"
            looks at the first ten or twenty samples and decides.
        rtol: draw until the norm of the standard errors is below ``rtol`` times that of the diagonal.
        max_products, seed: as for :func:`trace`.

    Raises:
        As :func:`trace`.

    Example:
        >>> from hesse.linalg import LinearOperator
        >>> diagonal(LinearOperator.of(torch.tensor([[2.0, 1.0], [1.0, 3.0]]))).value
        tensor([2., 3.], dtype=torch.float64)
    """
    _known(method, "bekas", "low-rank")
    return _estimate(A, _DIAGONAL, method, rtol, max_products, seed)


def frobenius(A: LinearOperator, *, rtol: float = 0.05, max_products: int = MAX_PRODUCTS, seed: int = 0) -> Estimate:
    """The Frobenius norm ``sqrt(sum_ij A_ij^2)`` of A, which need not be symmetric.

    The square is estimated; the error of its root is half the relative error (the delta method).

    Args:
        rtol, max_products, seed: as for :func:`trace`.

    Raises:
        As :func:`trace`.

    Example:
        >>> from hesse.linalg import LinearOperator
        >>> float(frobenius(LinearOperator.of(torch.tensor([[3.0, 0.0], [4.0, 0.0]]))))
        5.0
    """
    squared = _estimate(A, _SQUARE, "hutchinson", 2 * rtol, max_products, seed)
    value = squared.value.sqrt()
    error = squared.error / (2 * value) if value > 0 else squared.error
    return replace(squared, value=value, error=error)


def _known(method: str, *known: str) -> None:
    if method not in ("auto", *known):
        raise ValueError(f"method must be one of {', '.join(map(repr, ('auto', *known)))}; got {method!r}.")


@dataclass(frozen=True)
class _Quantity:
    """What is estimated.

    Args:
        part: what columns [n, k] of A, of which the first is number i, contribute to it.
        join: the whole from the parts.
        plain: samples [..., k] of it from vectors z [n, k] and their products.
        spanned: samples of it from vectors of which each tests the range of all others.
        names: of averaging and of the method that spans a range.
    """

    part: Callable[[int, Tensor], Tensor]
    join: Callable[[list[Tensor]], Tensor]
    plain: Callable[[Tensor, Tensor], Tensor]
    spanned: Callable[[LeaveOneOut], Tensor]
    names: tuple[str, str]


def _total(parts: list[Tensor]) -> Tensor:
    return torch.stack(parts).sum()


_TRACE = _Quantity(
    part=lambda i, columns: columns.diagonal(-i).sum(),
    join=_total,
    plain=lambda z, y: (z * y).sum(0),
    spanned=traces,
    names=("hutchinson", "xtrace"),
)
_DIAGONAL = _Quantity(
    part=lambda i, columns: columns.diagonal(-i),
    join=torch.cat,
    plain=lambda z, y: z * y,
    spanned=diagonals,
    names=("bekas", "low-rank"),
)
_SQUARE = replace(
    _TRACE,
    part=lambda i, columns: columns.square().sum(),
    plain=lambda z, y: y.double().square().sum(0),
)


def _estimate(A: LinearOperator, what: _Quantity, method: str, rtol: float, limit: int, seed: int) -> Estimate:
    if limit < 6:
        raise ValueError(f"a standard error needs at least six products; got max_products={limit}.")
    n = A.shape[0]
    probes = Probes(A, seed)
    if n <= min(4 * FIRST, limit):
        return _exact(probes, what, "so small an operator is multiplied out")
    reason = ""
    sampler: Sampler
    if method == "auto":
        method, sampler, reason = _chosen(probes, what, rtol, limit)
    else:
        sampler = _sampler(probes, what, method)
        sampler.draw(min(FIRST, limit // sampler.cost))
    while True:
        value, error, excess = _judged(sampler, rtol)
        room = (limit - probes.products) // sampler.cost
        if excess <= 1 or room == 0:
            return Estimate(value, error, probes.products, excess <= 1, method, reason)
        wanted = sampler.remaining(excess)
        if n <= min(wanted * sampler.cost, limit - probes.products):
            return _exact(probes, what, "an estimate as good would have taken more products than the value itself")
        sampler.draw(min(room, max(wanted, sampler.count // 4), sampler.count))


def _sampler(probes: Probes, what: _Quantity, method: str) -> Sampler:
    if method == what.names[0]:
        return Mean(probes, what.plain)
    return HutchPlusPlus(probes) if method == "hutch++" else LeaveOneOut(probes, what.spanned)


def _chosen(probes: Probes, what: _Quantity, rtol: float, limit: int) -> tuple[str, Sampler, str]:
    """Averaging, unless it will take long and the range of the same vectors leaves a smaller error."""
    averaging, spanning = what.names
    plain, spanned = Mean(probes, what.plain), LeaveOneOut(probes, what.spanned)
    while True:
        z = probes.signs(min(FIRST, limit))
        y = probes.product(z)
        plain.add(z, y)
        _, _, excess = _judged(plain, rtol)
        if excess <= 1 or plain.remaining(excess) <= 3 * FIRST or limit < 2 * probes.products:
            return averaging, plain, "few samples are enough"
        spanned.add(z, y)
        ratio = _judged(spanned, rtol)[2] / excess
        reason = f"after {probes.products} products the error of {spanning} is {ratio:.2g} of that of {averaging}"
        # Ten vectors decide the clear cases. A range that helps shows it when it grows: ten more decide the rest.
        last = spanned.count > FIRST or limit < 2 * probes.products
        if ratio < (0.9 if last else 0.6):
            return spanning, spanned, reason
        if last or ratio > 1.6:
            return averaging, plain, reason


def _judged(sampler: Sampler, rtol: float) -> tuple[Tensor, Tensor, float]:
    """Value, standard error, and how many times the error is larger than asked for."""
    value, error = sampler.mean()
    wrong, allowed = float(torch.linalg.vector_norm(error)), rtol * float(torch.linalg.vector_norm(value))
    if value.ndim == 0:
        value, error = value.cpu(), error.cpu()
    return value, error, wrong / max(allowed, 1e-100) if wrong > 0 else 0.0


def _exact(probes: Probes, what: _Quantity, reason: str) -> Estimate:
    """From all columns of A, and zero error."""
    A = probes.A
    n = A.shape[0]
    parts = []
    for begin in range(0, n, BLOCK):
        k = min(BLOCK, n - begin)
        columns = torch.zeros(n, k, dtype=A.dtype, device=A.device)
        columns[begin : begin + k].fill_diagonal_(1)
        parts.append(what.part(begin, probes.product(columns).double()))
    value = what.join(parts)
    value = value.cpu() if value.ndim == 0 else value
    return Estimate(value, torch.zeros_like(value), probes.products, True, "exact", reason)
