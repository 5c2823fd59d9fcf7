"""The Krylov space of a symmetric operator, one product at a time: an orthonormal basis V and the small matrix V'AV.

Each product ``w = A v`` is made orthogonal to all of V, twice, because once leaves rounding errors that bring
copies of eigenvalues already found (Parlett, 1998, chapters 6 and 13). What is taken away is a column of V'AV, what is
left is the next direction. Three methods only differ in what they do with the pair (V, V'AV): eigenvalues with
restarts (:mod:`hesse.linalg.eigen`), quadrature rules (:mod:`hesse.linalg.quadrature`), and bounds on what has been
missed. Several runs go side by side, with one block product a step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

if TYPE_CHECKING:
    from hesse.linalg.operator import LinearOperator

__all__ = ["Lanczos", "LinAlgError", "check_finite", "generator_of", "require_symmetric", "working_dtype"]


def require_symmetric(A: LinearOperator, what: str) -> None:
    """Raises TypeError unless A was declared symmetric."""
    if not A.symmetric:
        raise TypeError(
            f"{what} needs a symmetric operator, and this one was not declared so. If it is symmetric, make it with "
            "symmetric=True (or psd=True)."
        )


def working_dtype(A: LinearOperator) -> torch.dtype:
    """What vectors are kept in: the operator's dtype, but no half precision, which cannot hold an orthonormal basis."""
    return torch.promote_types(A.dtype, torch.float32)


def generator_of(A: LinearOperator, seed: int) -> torch.Generator:
    """Random numbers of our own, on the operator's device: the global state stays as it is."""
    return torch.Generator(A.device).manual_seed(seed)


def check_finite(A: LinearOperator, *values: Tensor) -> None:
    """Raises LinAlgError if a product gave something that is not a number."""
    if not all(bool(value.isfinite().all()) for value in values):
        raise LinAlgError(
            f"a product with this operator ({A.shape[0]} rows, {A.dtype}) is not finite. Look for NaN or infinity in "
            "the parameters or the batch, or for numbers too large for the dtype."
        )


class Lanczos:
    """k runs side by side, each with its own start vector: an orthonormal basis V, and vectors that wait.

    The rows of ``basis`` [k, size, n] are V, ``length`` vectors whose products are known, and after them the waiting
    ones W, which lie outside of V and are multiplied next. Nothing else is left of a product:
    ``A V' = V' projected + W' coupling``, with ``projected`` [k, length, length] and ``coupling`` [k, waiting, length].

    Args:
        A: a symmetric operator.
        start: [n, k].
        size: the most rows.
        generator: for a new direction where a run has exhausted its Krylov space.
        against: [n, j] orthonormal directions that are projected out of A on both sides.
    """

    def __init__(
        self, A: LinearOperator, start: Tensor, size: int, generator: torch.Generator, against: Tensor | None = None
    ) -> None:
        n, k = start.shape
        self.A = A
        self.dtype = working_dtype(A)
        self.generator = generator
        self.against = against
        self.free = n - (0 if against is None else against.shape[1])  # dimension of the space searched
        self.size = min(size, self.free)
        self.basis = torch.zeros(k, min(self.size, 16), n, device=A.device, dtype=self.dtype)
        self.length = self.waiting = 0
        self.projected = torch.zeros(k, 0, 0, dtype=torch.float64)
        self.coupling = torch.zeros(k, 0, 0, dtype=torch.float64)
        self.lost = torch.zeros(k, 0, 0, dtype=torch.float64)  # the coupling to vectors that wait no longer
        self.rounding = torch.zeros(k, dtype=torch.float64)  # the largest coupling taken for a rounding error
        self.products = 0
        first = start.mT.to(A.device, self.dtype, copy=True)
        self._orthogonalise(first, self.basis[:, :0])
        self._insert(first)

    @property
    def complete(self) -> bool:
        """Whether V spans the whole space, so that the projected matrix is A itself."""
        return self.length == self.free

    @property
    def full(self) -> bool:
        """Whether the next product, after a turn, could leave more than there are rows for."""
        return self.size < self.free and self.length + self.waiting >= self.size - 1

    def step(self, which: int = 0) -> None:
        """Multiply one of the waiting vectors: one product for each run. What remains of it waits first."""
        m = self.length
        self.basis[:, m : m + which + 1] = self.basis[:, m : m + which + 1].roll(1, dims=1)
        w = (self.A @ self.basis[:, m].mT.contiguous()).mT.to(self.dtype, copy=True)
        self.products += len(w)
        h = self._orthogonalise(w, self.basis[:, : m + 1])
        check_finite(self.A, h)
        rest = torch.arange(self.waiting) != which
        self.length, self.waiting = m + 1, self.waiting - 1
        pad = torch.nn.functional.pad
        self.projected = pad(self.projected, (0, 1, 0, 1))
        self.projected[:, m] = self.projected[:, :, m] = h
        self.coupling = pad(self.coupling[:, rest], (0, 1))
        self.lost = pad(self.lost, (0, 1))
        self._insert(w, linked=True)

    def turn(self, weak: Tensor) -> None:
        """Let a random vector wait: the Krylov space of one vector holds one copy only of a multiple eigenvalue.

        Args:
            weak: [waiting], True for those that need wait no longer. Their coupling stays part of the residuals.
        """
        rows = torch.arange(self.length, self.length + self.waiting)[~weak]
        self.basis[:, self.length : self.length + len(rows)] = self.basis[:, rows]
        self.lost = torch.cat([self.lost, self.coupling[:, weak]], dim=1)
        self.coupling = self.coupling[:, ~weak]
        self.waiting = len(rows)
        self._insert(torch.zeros_like(self.basis[:, 0]))

    def ritz(self) -> tuple[Tensor, Tensor, Tensor]:
        """Eigenvalues of the projected matrix [k, m] ascending, their vectors in the basis [k, m, m], and residuals.

        The residual of Ritz pair i is ``||A x_i - theta_i x_i||``, [k, m], at no further product.
        """
        theta, S = torch.linalg.eigh(self.projected)
        residual = torch.linalg.vector_norm(self.coupling @ S, dim=1) + (self.lost @ S).abs().sum(1)
        return theta, S, residual + self.rounding[:, None]

    def vectors(self, S: Tensor) -> Tensor:
        """The combinations S [m, j] of the first run's basis vectors: [n, j]."""
        return self.basis[0, : self.length].mT @ S.to(self.basis)

    def restart(self, theta: Tensor, S: Tensor) -> None:
        """Keep of V the Ritz vectors S [k, m, p] of values [k, p] alone (thick restart: Wu and Simon, 2000)."""
        p, m, n = S.shape[2], self.length, self.basis.shape[2]
        turned = S.mT.to(self.basis)
        for begin in range(0, n, 65536):  # in slices: a second basis would double the memory
            part = self.basis[:, :, begin : begin + 65536]
            part[:, :p] = turned @ part[:, :m]
        self.basis[:, p : p + self.waiting] = self.basis[:, m : m + self.waiting].clone()
        self.projected = torch.diag_embed(theta)
        self.coupling = self.coupling @ S
        self.lost = self.lost @ S
        self.length = p

    # -- parts -------------------------------------------------------------------------------------------------------

    def _orthogonalise(self, w: Tensor, rows: Tensor) -> Tensor:
        """Take from w [k, n], in place, its part in the rows [k, m, n]; returns that part's coefficients [k, m]."""
        total = torch.zeros(rows.shape[:2], dtype=torch.float64)
        for _ in range(2):
            if self.against is not None:
                w -= (w @ self.against) @ self.against.mT
            h = rows @ w[:, :, None]
            w -= (rows.mT @ h)[:, :, 0]
            total += h[:, :, 0].to(total)
        return total

    def _insert(self, w: Tensor, linked: bool = False) -> None:
        """Let w [k, n], orthogonal to V, wait first; a random vector in its place where it is zero up to rounding.

        Args:
            linked: whether w is what remained of the last product.
        """
        k, m = len(w), self.length
        if self.complete:
            return
        norm = _norm(w)
        scale = self.projected.abs().amax(dim=(1, 2)) if m else torch.zeros(k, dtype=torch.float64)
        ended = norm <= 100 * torch.finfo(self.dtype).eps * scale
        row = torch.zeros(k, 1, m, dtype=torch.float64)
        if linked:
            self.rounding = torch.maximum(self.rounding, norm * ended)
            row[:, 0, -1] = norm.where(~ended, 0.0)
        if bool(ended.any()):
            fresh = torch.randn(w.shape, generator=self.generator, device=w.device, dtype=w.dtype)
            self._orthogonalise(fresh, self.basis[:, :m])
            w = torch.where(ended.to(w.device)[:, None], fresh, w)
        last = m + self.waiting
        if last == self.basis.shape[1]:
            more = min(last, self.size - last) + (last >= self.size)
            self.basis = torch.cat([self.basis, torch.zeros_like(self.basis[:, :more])], dim=1)
        # The vectors that wait already give up their part along w, and with it some of their coupling.
        self.basis[:, m + 1 : last + 1] = self.basis[:, m:last].clone()
        self.basis[:, m] = w / _norm(w).to(w)[:, None]
        links = [row]
        for i, link in enumerate(self.coupling.unbind(1)):
            other = self.basis[:, m + 1 + i].clone()
            h = self._orthogonalise(other, self.basis[:, m : m + len(links)])
            rho = _norm(other)
            if float(rho.max()) < 0.5:  # cancellation has brought rounding errors forward, those along V too
                self._orthogonalise(other, self.basis[:, : m + len(links)])
                rho = _norm(other)
            links = [known + (h[:, j, None] * link)[:, None] for j, known in enumerate(links)]
            if float(rho.max()) > 100 * torch.finfo(self.dtype).eps:
                self.basis[:, m + len(links)] = other / rho.to(other)[:, None]
                links.append((rho[:, None] * link)[:, None])
        self.waiting = len(links)
        self.coupling = torch.cat(links, dim=1)


def _norm(w: Tensor) -> Tensor:
    """Lengths of the rows, summed in float64: over a million float32 numbers the sum itself loses three digits."""
    return torch.linalg.vector_norm(w, dim=1, dtype=torch.float64).cpu()
