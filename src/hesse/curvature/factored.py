"""A block-diagonal curvature of Kronecker products and diagonals, of which everything is known.

A block A (x) G acts on a weight's matrix W as ``G W A``. With ``A = Q_A diag(s_A) Q_A'`` and G alike, its eigenvalues
are the products s_G s_A' and its eigenvectors the outer products of columns of Q_G and Q_A. So what is estimated for
other curvatures is exact here: the inverse of B + damping I, its log-determinant, trace, diagonal, every eigenpair.
K-FAC (Martens and Grosse, 2015) is the operator of the factors themselves; EKFAC (George et al., 2018) keeps the
eigenvectors and has eigenvalues of its own. A parameter without a matrix has a diagonal, one that the loss does not
depend on has zeros.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Size, Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from hesse.curvature.kronecker import apply_inverse, invert
from hesse.curvature.layers import as_matrix, from_matrix
from hesse.curvature.statistics import Diagonal, Kronecker, Statistics
from hesse.linalg import Eigenpairs, Estimate, LinearOperator, Solution
from hesse.tree import Layout, Params

__all__ = ["Eigenbasis", "KroneckerFactored"]

Function = Callable[[Tensor], Tensor]  # of eigenvalues


@dataclass(frozen=True, eq=False)
class Eigenbasis:
    """Eigenvectors and eigenvalues of one block.

    Args:
        a: Q_A [n, n] or [G, n, n], eigenvectors of A as columns; None stands for the identity.
        g: Q_G [m, m] or [G, m, m]; None for a diagonal block.
        values: [G, m, n], the eigenvalue of column i of Q_G and column j of Q_A at [i, j]; of a diagonal block
            [*shape].
    """

    a: Tensor | None
    g: Tensor | None
    values: Tensor

    def into(self, matrices: Tensor) -> Tensor:
        """Coordinates ``Q_G' W Q_A`` [..., G, m, n] of matrices."""
        left = matrices if self.g is None else self.g.mT @ matrices
        return left if self.a is None else left @ self.a

    def out_of(self, coordinates: Tensor) -> Tensor:
        """The matrices that have these coordinates."""
        left = coordinates if self.g is None else self.g @ coordinates
        return left if self.a is None else left @ self.a.mT


class KroneckerFactored(LinearOperator):
    """``B``, one block for each weight with its bias and for each other parameter; symmetric, positive semidefinite.

    Args:
        factors: by name of the weight or parameter.
        layout: all rows.
        dtype, device: of products.
        values: by name of a weight eigenvalues [G, m, n] in place of the products (EKFAC).

    Example:
        >>> layout = Layout.of({"weight": torch.zeros(1, 2)})
        >>> A = torch.tensor([[3.0, 1.0], [1.0, 3.0]])
        >>> from hesse.curvature.layers import Form
        >>> factors = {"weight": Kronecker(A, torch.tensor([[2.0]]), Form(), None)}
        >>> B = KroneckerFactored(factors, layout, dtype=A.dtype)
        >>> torch.allclose(B.dense(), 2 * A), float(B.trace())
        (True, 12.0)
        >>> torch.allclose(B.inverse(1.0).dense() @ (B.dense() + torch.eye(2)), torch.eye(2), atol=1e-6)
        True
    """

    def __init__(
        self,
        factors: Statistics,
        layout: Layout,
        *,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        values: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__(self._apply, layout, dtype=dtype, device=device, psd=True)
        values = values or {}
        held = {name for one in factors.values() if isinstance(one, Kronecker) for name in [one.bias] if name}
        missing = [name for name in layout.shapes if name not in factors and name not in held]
        zeros = {name: Diagonal(torch.zeros(layout.shapes[name], dtype=dtype, device=device)) for name in missing}
        self.factors: Statistics = {**factors, **zeros}
        self._blocks: list[_Matrices | _Entries] = [
            _Matrices(name, one, layout.shapes[name], values.get(name))
            if isinstance(one, Kronecker)
            else _Entries(name, one.values)
            for name, one in self.factors.items()
        ]

    def eigenbasis(self) -> dict[str, Eigenbasis]:
        """Eigenvectors and eigenvalues of each block, by name of its weight or parameter."""
        return {block.name: block.eigenbasis for block in self._blocks}

    def inverse(self, damping: float, *, factored: bool = False) -> LinearOperator:
        """``(B + damping I)^{-1}``, exactly.

        Args:
            damping: added to every eigenvalue, positive.
            factored: the customary approximation instead, ``(A + pi sqrt(damping) I)^{-1} (x) (G + sqrt(damping) / pi
                I)^{-1}`` with ``pi^2 = (tr A / n) / (tr G / m)``, which needs no eigenvectors (Martens and Grosse,
                2015, section 6.3).

        Raises:
            ValueError: the damping is not positive; or ``factored`` for eigenvalues that are no products (EKFAC).
            LinAlgError: a damped factor has no inverse in float64.
        """
        _positive(damping)
        if factored:
            inverses = [block.factored_inverse(damping) for block in self._blocks]
            return self._psd(lambda x: _merged(inverse(x) for inverse in inverses))
        return self._psd(lambda x: _merged(block.function(x, lambda s: 1 / (s + damping)) for block in self._blocks))

    # -- what is exact ----------------------------------------------------------------------------------------------

    def diagonal(self, *, method: str = "exact", **options: Any) -> Estimate:
        """The diagonal [n]; with a ``method`` of :func:`hesse.linalg.diagonal` its estimate."""
        if method not in ("exact", "auto"):
            return super().diagonal(method=method, **options)
        return _exact(self._rows.flatten(_merged(block.diagonal() for block in self._blocks)))

    def trace(self, *, method: str = "exact", **options: Any) -> Estimate:
        """The sum of the eigenvalues; with a ``method`` of :func:`hesse.linalg.trace` its estimate."""
        if method not in ("exact", "auto"):
            return super().trace(method=method, **options)
        return _exact(torch.stack([block.trace() for block in self._blocks]).sum())

    def frobenius(self, **options: Any) -> Estimate:
        """The root of the sum of the squared eigenvalues."""
        return _exact(self._spectrum.square().sum().sqrt())

    def logdet(self, damping: float, **options: Any) -> Estimate:
        """``log det (B + damping I)``."""
        _positive(damping)
        return _exact((self._spectrum + damping).log().sum())

    def eigsh(self, k: int = 6, *, which: str = "LA", deflate: Tensor | None = None, **options: Any) -> Eigenpairs:
        """The k outermost eigenpairs, ordered as by :func:`hesse.linalg.eigsh`, which is asked only to ``deflate``."""
        if deflate is not None:
            return super().eigsh(k, which=which, deflate=deflate, **options)
        if which not in ("LA", "SA", "LM", "BE"):
            raise ValueError(f'which must be "LA", "SA", "LM" or "BE"; got {which!r}.')
        if not 1 <= k <= self.shape[0]:
            raise ValueError(f"k must be between 1 and the {self.shape[0]} eigenvalues there are; got {k}.")
        spectrum = self._spectrum
        order = spectrum.argsort(descending=which != "SA", stable=True)
        chosen = torch.cat([order[: (k + 1) // 2], order[len(order) - k // 2 :]]) if which == "BE" else order[:k]
        vectors = torch.stack([self._rows.flatten(self._eigenvector(int(i))) for i in chosen], dim=1)
        values = spectrum[chosen]
        rounding = 16 * torch.finfo(self.dtype).eps * spectrum.max().expand(k)
        bounds = rounding.to(self.dtype)
        return Eigenpairs(values.to(self.dtype), vectors, bounds, bounds, converged=True, products=0)

    def solve(self, b: Tensor | Mapping[str, Tensor], *, damping: float = 0.0, **options: Any) -> Solution:
        """``(B + damping I) x = b`` by :func:`hesse.linalg.solve`, whom the exact inverse leads there at once."""
        if damping > 0:
            options.setdefault("preconditioner", self.inverse(damping))
        return super().solve(b, damping=damping, **options)

    def block(self, pattern: str | Sequence[str]) -> LinearOperator:
        """The diagonal block of the parameters whose names match; one of this kind unless a weight loses its bias.

        Raises:
            ValueError: nothing matches; the message lists the names.
        """
        layout = self._rows.restrict(self._rows.match(pattern))
        inside = [block for block in self._blocks if not set(block.names).isdisjoint(layout.shapes)]
        if any(not set(block.names) <= set(layout.shapes) for block in inside):
            return super().block(pattern)
        values = {b.name: b.values for b in inside if isinstance(b, _Matrices) and b.values is not None}
        factors = {block.name: self.factors[block.name] for block in inside}
        return KroneckerFactored(factors, layout, dtype=self.dtype, device=self.device, values=values)

    # -- parts ------------------------------------------------------------------------------------------------------

    def _apply(self, columns: Tensor) -> Tensor:
        x = self._rows.split(columns)
        return self._rows.flatten(_merged(block.apply(x) for block in self._blocks))

    def _psd(self, apply: Callable[[Params], Params]) -> LinearOperator:
        rows = self._rows
        return LinearOperator(
            lambda v: rows.flatten(apply(rows.split(v))), rows, dtype=self.dtype, device=self.device, psd=True
        )

    @property
    def _rows(self) -> Layout:
        assert self.layout is not None
        return self.layout

    @cached_property
    def _spectrum(self) -> Tensor:
        """All eigenvalues, block after block, float64."""
        return torch.cat([block.eigenbasis.values.double().flatten() for block in self._blocks])

    def _eigenvector(self, number: int) -> Params:
        x = self._rows.split(torch.zeros(self.shape[0], dtype=self.dtype, device=self.device))
        for block in self._blocks:
            size = block.eigenbasis.values.numel()
            if number < size:
                return x | block.eigenvector(number)
            number -= size
        raise IndexError(number)


class _Matrices:
    """``A (x) G`` on a weight with its bias."""

    def __init__(self, name: str, factors: Kronecker, shape: Size, values: Tensor | None) -> None:
        self.name = name
        self.names = (name,) if factors.bias is None else (name, factors.bias)
        self.factors = factors
        self.shape = shape
        self.values = values

    def gather(self, x: Mapping[str, Tensor]) -> Tensor:
        """Matrices [k, G, m, n] from columns [*shape, k]."""
        parts = [x[name].movedim(-1, 0) for name in self.names]
        return torch.vmap(lambda weight, *bias: as_matrix(weight, self.factors.form, *bias))(*parts)

    def scatter(self, matrices: Tensor) -> Params:
        """The inverse of :meth:`gather`."""

        def one(matrix: Tensor) -> tuple[Tensor, ...]:
            weight, bias = from_matrix(matrix, self.factors.form, self.shape, self.factors.bias is not None)
            return (weight,) if bias is None else (weight, bias)

        return dict(zip(self.names, torch.vmap(one, out_dims=-1)(matrices), strict=True))

    @cached_property
    def eigenbasis(self) -> Eigenbasis:
        a, g = self.factors.a, self.factors.g
        s_a, q_a = _eigh(a, self.name) if a.ndim > 1 else (a.double(), None)
        s_g, q_g = _eigh(g, self.name)
        values = _outer(s_g, s_a).to(g.dtype) if self.values is None else self.values
        return Eigenbasis(None if q_a is None else q_a.to(a.dtype), q_g.to(g.dtype), values)

    def apply(self, x: Params) -> Params:
        if self.values is not None:
            return self.function(x, lambda s: s)
        return self.scatter(apply_inverse(self.factors.a, self.factors.g, self.gather(x)))

    def function(self, x: Params, f: Function) -> Params:
        basis = self.eigenbasis
        return self.scatter(basis.out_of(f(basis.values) * basis.into(self.gather(x))))

    def factored_inverse(self, damping: float) -> Callable[[Params], Params]:
        if self.values is not None:
            raise ValueError(
                "EKFAC's eigenvalues are no products, so their damping has no factors: use factored=False."
            )
        inverse = invert(self.factors.a, self.factors.g, damping)
        if inverse is None:
            raise LinAlgError(
                f"the factors of {self.name!r} with damping {damping} have no inverse in float64: is an element not "
                "finite, or the damping below 1e-16 of the largest eigenvalue?"
            )
        return lambda x: self.scatter(apply_inverse(inverse.a, inverse.g, self.gather(x)))

    def diagonal(self) -> Params:
        if self.values is None:
            matrices = _outer(_diagonal(self.factors.g), _diagonal(self.factors.a))
        else:
            basis = self.eigenbasis
            a, g = (None if q is None else q.square() for q in (basis.a, basis.g))
            matrices = Eigenbasis(a, g, basis.values).out_of(basis.values)
        return _first(self.scatter(matrices[None]))

    def trace(self) -> Tensor:
        if self.values is not None:
            return self.values.double().sum()
        a, g = (_diagonal(factor).double().sum(-1) for factor in (self.factors.a, self.factors.g))
        return (a * g).sum()

    def eigenvector(self, number: int) -> Params:
        basis = self.eigenbasis
        unit = torch.zeros_like(basis.values)
        unit.view(-1)[number] = 1
        return _first(self.scatter(basis.out_of(unit)[None]))


class _Entries:
    """A diagonal."""

    values = None

    def __init__(self, name: str, values: Tensor) -> None:
        self.name = name
        self.names = (name,)
        self.eigenbasis = Eigenbasis(None, None, values)

    def apply(self, x: Params) -> Params:
        return self.function(x, lambda s: s)

    def function(self, x: Params, f: Function) -> Params:
        return {self.name: f(self.eigenbasis.values)[..., None] * x[self.name]}

    def factored_inverse(self, damping: float) -> Callable[[Params], Params]:
        return lambda x: self.function(x, lambda s: 1 / (s + damping))

    def diagonal(self) -> Params:
        return {self.name: self.eigenbasis.values}

    def trace(self) -> Tensor:
        return self.eigenbasis.values.double().sum()

    def eigenvector(self, number: int) -> Params:
        unit = torch.zeros_like(self.eigenbasis.values)
        unit.view(-1)[number] = 1
        return {self.name: unit}


def _eigh(factor: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Eigenvalues, none negative, and eigenvectors in float64."""
    if not bool(factor.isfinite().all()):  # eigh of it is NaN without a word
        raise LinAlgError(f"a factor of {name!r} has elements that are not finite, so it has no eigenvalues.")
    factor = factor.double()
    values, vectors = torch.linalg.eigh(0.5 * (factor + factor.mT))
    return values.clamp_min(0.0), vectors


def _outer(g: Tensor, a: Tensor) -> Tensor:
    """[G, m, n] of products from [m] and [n], or [G, m] and [G, n]."""
    products = g[..., :, None] * a[..., None, :]
    return products if products.ndim == 3 else products[None]


def _diagonal(factor: Tensor) -> Tensor:
    return factor if factor.ndim == 1 else factor.diagonal(dim1=-2, dim2=-1)


def _first(x: Params) -> Params:
    return {name: value[..., 0] for name, value in x.items()}


def _merged(parts: Iterable[Params]) -> Params:
    return {name: value for part in parts for name, value in part.items()}


def _exact(value: Tensor) -> Estimate:
    value = value.double()
    return Estimate(value, torch.zeros_like(value), 0, True, "exact", "the blocks are known")


def _positive(damping: float) -> None:
    if not 0 < damping < math.inf:
        raise ValueError(f"damping is added to eigenvalues that may be zero, so it must be positive; got {damping}.")
