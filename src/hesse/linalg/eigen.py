"""Outermost eigenpairs of a symmetric operator, each with a bound on its error, in as few products as the bounds allow.

Lanczos with full reorthogonalisation, restarted with the best Ritz vectors when its basis is full (thick restart: Wu
and Simon, 2000; on symmetric matrices the same as ARPACK's implicit restart). Two questions end it:

*Is each value right?* A Ritz pair (theta, x) with residual r has an eigenvalue within r, and within r^2 / gap where the
rest of the spectrum is a gap away. Both are one formula, ``2 r^2 / (gap + sqrt(gap^2 + 4 r^2))`` (Li and Li, 2005),
which also holds for a cluster of pairs, with r the norm of all their residuals and the gap to what lies outside.
An eigenvalue is right long before its residual is small: this is what spares products.

*Is nothing else there?* The gap is known among Ritz values only, and the Krylov space of one vector holds one copy only
of a multiple eigenvalue. So when the values are right but for that, the search turns to a random vector r orthogonal to
the basis. If that had left out an eigenvector u of a value tau beyond the limits that the gaps need, the steps
from r would tell how much of u is in r at the most: ``(u'r)^2 <= 1 / sum_j p_j(tau)^2`` with p_j their Lanczos
polynomials (the Christoffel function). A random vector holds less than that by chance with a probability that is
known, and falls tenfold every step or two; when it is below ``1/100`` the search ends. What the steps do find joins the
Ritz values, and both questions are asked again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hesse.linalg.lanczos import Lanczos, check_finite, generator_of, require_symmetric, working_dtype

if TYPE_CHECKING:
    from hesse.linalg.operator import LinearOperator

__all__ = ["Eigenpairs", "eigsh"]

# When the probability of having missed something by chance is below this, the search ends.
MISSED = 0.01


@dataclass(frozen=True)
class Eigenpairs:
    """Eigenvalues and orthonormal eigenvectors, ordered as asked for, with what is known of their errors.

    Args:
        values: [k].
        vectors: [n, k].
        residuals: ``||A v - lambda v||`` [k], or a little more: an eigenvalue lies within it, converged or not.
        bounds: [k], how far each value may be from the eigenvalue in its place: the residual, or about its square over
            the gap to the rest of the spectrum, which is known with a probability of 99 in 100 where ``converged``.
        converged: whether every bound is as small as asked for, and no other eigenvalue is where it could not be seen.
        products: matrix-vector products spent.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    bounds: Tensor
    converged: bool
    products: int


def eigsh(
    A: LinearOperator,
    k: int = 6,
    *,
    which: str = "LA",
    rtol: float = 1e-3,
    atol: float = 0.0,
    max_products: int | None = None,
    basis: int | None = None,
    deflate: Tensor | None = None,
    seed: int = 0,
) -> Eigenpairs:
    """The k eigenpairs of a symmetric operator at the ends of its spectrum.

    Args:
        A: n x n, symmetric.
        k: how many.
        which: "LA" the largest, in descending order; "SA" the smallest (most negative), ascending; "LM" the largest in
            magnitude, magnitudes descending; "BE" both ends, the upper half of them (one more if k is odd) and the
            lower half, descending.
        rtol: of each eigenvalue: its bound is at most ``rtol |lambda| + atol`` or the rounding of the dtype.
        atol: for eigenvalues that may be zero.
        max_products: the most products; by default 200 + 20 k. With fewer than needed, ``converged`` is False.
        basis: how many vectors [n] are kept; by default max(2 k + 10, 50).
        deflate: [n, j], eigenvectors known already; the search is in what is orthogonal to them.
        seed: of the start vector.

    Raises:
        TypeError: A is not declared symmetric.
        ValueError: k, which, basis or deflate make no sense.
        LinAlgError: a product is not finite.

    Example:
        >>> from hesse.linalg import LinearOperator
        >>> A = LinearOperator.of(torch.diag(torch.tensor([3.0, -5.0, 1.0, 1.0])))
        >>> eigsh(A, 2).values, eigsh(A, 2, which="LM").values
        (tensor([3., 1.]), tensor([-5.,  3.]))
    """
    require_symmetric(A, "eigsh")
    n = A.shape[0]
    known = None if deflate is None else _orthonormal(A, deflate)
    free = n - (0 if known is None else known.shape[1])
    if which not in ("LA", "SA", "LM", "BE"):
        raise ValueError(f'which must be "LA", "SA", "LM" or "BE"; got {which!r}.')
    if not 1 <= k <= free:
        raise ValueError(f"k must be between 1 and the {free} eigenvalues there are; got {k}.")
    limit = 200 + 20 * k if max_products is None else max_products
    if limit < k:
        raise ValueError(f"{k} eigenpairs need at least {k} products; got max_products={limit}.")
    room = max(2 * k + 10, 50) if basis is None else basis
    if room < k + 3:
        raise ValueError(f"basis must be at least k + 3 = {k + 3}; got {room}.")
    if n <= max(40, 3 * k) and n <= limit:
        return _dense(A, k, which, known)
    generator = generator_of(A, seed)
    run = Lanczos(A, _random(A, generator), room, generator, known)
    return _search(run, k, which, rtol, atol, limit)


def _search(run: Lanczos, k: int, which: str, rtol: float, atol: float, limit: int) -> Eigenpairs:
    turned: int | None = None  # products when the search last turned to a random vector, if it has found nothing since
    begin: int | None = None  # where in the basis the steps from it begin, if that is not restarted
    settled = torch.zeros(0)
    missed = 1.0
    step = 0
    while True:
        run.step(step)
        theta, S, residual = (x[0] for x in run.ritz())
        rounding = 16 * torch.finfo(run.dtype).eps * float(theta.abs().max())
        wanted = _wanted(theta, min(k, run.length), which)
        sides = _sides(theta, wanted, which)
        allowed = rtol * theta[wanted].abs() + atol + rounding
        right, limits = _judge(theta, residual, wanted, sides, allowed)
        right = right and len(wanted) == k
        if which == "LM":  # at either end
            last = float(theta[wanted[-1]].abs() + allowed[-1])
            limits = {side: min(limits.get(side, last), last) for side in (1.0, -1.0)}
        # No eigenvalue of a psd operator is below zero: nothing need be shown there.
        shown = {side: tau for side, tau in limits.items() if side > 0 or tau < 0 or not run.A.psd}
        moved = turned is not None and bool(((theta[wanted] - settled).abs() > allowed).any())
        if moved or (begin is not None and not _within(run, begin, shown)):
            # Something was there: once that is right, another random vector has to confirm it.
            turned, begin, missed = None, None, 1.0
        chance = _chance(run, begin, shown)
        # Where the spectrum is dense beyond the limits, that takes long: as many products again as it took to get here,
        # or two bases full, are enough in any case.
        more = 0 if turned is None else run.products - turned
        enough = missed * chance <= MISSED or 0 < min(turned or 0, 2 * run.size) <= more
        done = run.complete or (right and enough)
        crowded = run.size < run.free and run.waiting > run.size - k - 5
        if done or crowded or run.products >= limit:
            bounds = _bounds(theta, residual, wanted, sides, limits) + rounding
            return Eigenpairs(
                values=theta[wanted].to(run.basis),
                vectors=run.vectors(S[:, wanted]),
                residuals=(residual[wanted] + rounding).to(run.basis),
                bounds=bounds.to(run.basis),
                converged=done,
                products=run.products,
            )
        links = (run.coupling[0] @ S[:, wanted]).abs()
        step = 0
        if turned is None:  # that waiting vector which takes most from the pairs wanted
            step = int(links.square().sum(1).argmax())
        if run.full:
            missed *= chance
            begin = None
            keep = _wanted(theta, k + (run.size - run.waiting - k) // 2, which)
            run.restart(theta[None, keep], S[None, :, keep])
        if right and (turned is None or (begin is None and run.waiting < 4)):
            turned, begin, settled = turned or run.products, run.length, theta[wanted]
            run.turn((links <= 0.1 * allowed).all(1))
            step = 0


def _wanted(theta: Tensor, k: int, which: str) -> list[int]:
    """Indices into ascending values, in the order of the answer."""
    m = len(theta)
    if which == "LA":
        return list(range(m - 1, m - 1 - k, -1))
    if which == "SA":
        return list(range(k))
    if which == "LM":
        return theta.abs().argsort(descending=True, stable=True)[:k].tolist()
    return list(range(m - 1, m - 1 - (k + 1) // 2, -1)) + list(range(k // 2 - 1, -1, -1))


def _sides(theta: Tensor, wanted: list[int], which: str) -> Tensor:
    """Which end of the spectrum each wanted value belongs to: 1 the upper, -1 the lower."""
    sides = torch.ones(len(wanted), dtype=theta.dtype)
    if which == "SA":
        sides[:] = -1
    elif which == "LM":
        sides[theta[wanted] < 0] = -1
    elif which == "BE":
        sides[(len(wanted) + 1) // 2 :] = -1
    return sides


def _clusters(theta: Tensor, residual: Tensor, i: int) -> tuple[Tensor, Tensor]:
    """Norm of the residuals of growing clusters around Ritz value i, and the gap from it to what is outside of each."""
    distance = (theta - theta[i]).abs()
    order = distance.argsort()
    norm = residual[order].square().cumsum(0).sqrt()
    outside = (distance - residual)[order].flip(0).cummin(0).values.flip(0)
    return norm, torch.cat([outside[1:], torch.zeros(1, dtype=theta.dtype)]).clamp_min(0)


def _judge(
    theta: Tensor, residual: Tensor, wanted: list[int], sides: Tensor, allowed: Tensor
) -> tuple[bool, dict[float, float]]:
    """Whether every wanted value is right if the spectrum has nothing but these beyond the limits {side: value}.

    Values are multiplied by their side, so that limits are upper ones.
    """
    limits: dict[float, float] = {}
    right = True
    for i, side, slack in zip(wanted, sides.tolist(), allowed.tolist(), strict=True):
        norm, gap = _clusters(theta, residual, i)
        need = torch.where(norm <= slack, 0.0, norm.square() / slack - slack)  # the gap that makes the bound the slack
        enough = need <= gap
        right = right and bool(enough.any())
        least = float(need[enough].min()) if bool(enough.any()) else 0.0
        edge = side * float(theta[i]) + (slack if least == 0 else -least)
        limits[side] = min(limits.get(side, math.inf), edge)
    return right, limits


def _bounds(theta: Tensor, residual: Tensor, wanted: list[int], sides: Tensor, limits: dict[float, float]) -> Tensor:
    """How far each wanted value may be from an eigenvalue, if the spectrum has nothing else beyond the limits."""
    found = []
    for i, side in zip(wanted, sides.tolist(), strict=True):
        norm, gap = _clusters(theta, residual, i)
        gap = gap.clamp_max(max(0.0, side * float(theta[i]) - limits[side]))
        bound = 2 * norm.square() / (gap + (gap.square() + 4 * norm.square()).sqrt())
        found.append(bound.nan_to_num(0.0).min())  # 0 / 0: no residual at all
    return torch.stack(found)


def _within(run: Lanczos, begin: int, limits: dict[float, float]) -> bool:
    """Whether all that the steps from ``begin`` on have shown lies within the limits."""
    ritz = torch.linalg.eigvalsh(run.projected[0, begin:, begin:])
    return all(float((side * ritz).max()) <= tau for side, tau in limits.items())


def _chance(run: Lanczos, begin: int | None, limits: dict[float, float]) -> float:
    """The probability that a random vector shows as little of a missed eigenvector as that at ``begin`` did."""
    if not limits or begin is None:
        return float(bool(limits))
    T = run.projected[0, begin:, begin:]
    alphas = T.diagonal().tolist()
    betas = [*T.diagonal(1).tolist(), float(run.coupling[0, 0, -1])]
    weight = min(_polynomials([side * a for a in alphas], betas, tau) for side, tau in limits.items())
    return min(1.0, math.sqrt(2 * (run.free - begin) / (math.pi * weight)))


def _polynomials(alphas: list[float], betas: list[float], tau: float) -> float:
    """``sum_j p_j(tau)^2`` of the Lanczos polynomials, for tau above all of their zeros."""
    before, p, total = 0.0, 1.0, 1.0
    beta = 0.0
    for alpha, after in zip(alphas, betas, strict=True):
        if after <= 0 or total > 1e100:
            return math.inf  # the Krylov space is exhausted, and holds nothing at tau
        before, p = p, ((tau - alpha) * p - beta * before) / after
        beta = after
        total += p * p
    return total


def _dense(A: LinearOperator, k: int, which: str, known: Tensor | None) -> Eigenpairs:
    """All eigenpairs from n products, for operators so small that nothing is cheaper."""
    n = A.shape[0]
    matrix = A.dense().to("cpu", torch.float64)
    check_finite(A, matrix)
    span = torch.eye(n, dtype=torch.float64)
    if known is not None:
        span = torch.linalg.qr(known.to("cpu", torch.float64), mode="complete").Q[:, known.shape[1] :]
    inside = span.mT @ matrix @ span
    theta, S = torch.linalg.eigh(0.5 * (inside + inside.mT))
    wanted = _wanted(theta, k, which)
    like = torch.empty(0, dtype=working_dtype(A), device=A.device)
    rounding = torch.full((k,), 16 * torch.finfo(like.dtype).eps * float(theta.abs().max())).to(like)
    return Eigenpairs(theta[wanted].to(like), (span @ S[:, wanted]).to(like), rounding, rounding, True, n)


def _random(A: LinearOperator, generator: torch.Generator) -> Tensor:
    return torch.randn(A.shape[0], 1, generator=generator, device=A.device, dtype=working_dtype(A))


def _orthonormal(A: LinearOperator, deflate: Tensor) -> Tensor:
    """An orthonormal basis of the columns given."""
    n = A.shape[0]
    if deflate.ndim != 2 or deflate.shape[0] != n or deflate.shape[1] >= n:
        raise ValueError(f"deflate holds eigenvectors as columns [{n}, j], j < {n}; got {list(deflate.shape)}.")
    return torch.linalg.qr(deflate.detach().to(A.device, working_dtype(A))).Q
