"""The Gauss-Newton matrix seen from the batch: the Gram matrix of its Jacobian rows, one row a sample.

With a root R of the loss's Hessian at the outputs, ``R R' = H_L``, the Gauss-Newton matrix is ``J' R R' J``. It has the
nonzero eigenvalues of ``K = R' J J' R``, which has a row for each term of the loss where the other has one for each
parameter. For few samples K is the small one: it is the neural tangent kernel for the squared error, and the matrix of
kernel natural gradients, of minimal-norm Gauss-Newton and of stochastic reconfiguration with few walkers.

K is a sum over parameters, and for a layer it needs no Jacobian: rows ``sum_t g_t a_t'`` and ``sum_u h_u c_u'`` have
the inner product ``sum_tu (a_t . c_u)(g_t . h_u)``. Where multiplying that out costs more than the rows of the one
parameter, they are formed, for as long as they are needed. :mod:`hesse.curvature.samples` finds what they are made of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement
from typing import Protocol

import torch
from torch import Tensor

from hesse.curvature.layers import Entries, Form, Lookups, Rows
from hesse.curvature.output import OutputCurvature
from hesse.tree import Layout

__all__ = ["Formed", "JacobianRows", "Layered", "Part", "Root", "sent_of"]

CHUNK = 2**22  # elements of Jacobian rows that are formed at a time
BLOCK = 128  # rows of a Gram matrix that are multiplied at a time
PASSES = 64  # products that multiplying two Gram matrices element by element costs for each of their elements


@dataclass(frozen=True, eq=False)
class Root:
    """R with ``R R' = H_L``, or its positive semidefinite part for a loss that is not convex.

    Args:
        columns: [k, B, D], float64: sample (k, b) touches the D outputs of example b alone.
        shape: of the outputs.
    """

    columns: Tensor
    shape: torch.Size

    @classmethod
    def of(cls, curvature: OutputCurvature, outputs: Tensor) -> Root:
        """The root of the loss's Hessian at the outputs.

        Raises:
            ValueError: it has none, as :meth:`hesse.curvature.OutputCurvature.root` says.
        """
        batch = len(outputs) if outputs.ndim and 0 not in curvature.axes else 1
        found = [s.double().reshape(batch, -1) for s in curvature.root()]
        return cls(torch.stack(found), outputs.shape)

    @property
    def size(self) -> int:
        """The number of samples."""
        return self.columns.shape[0] * self.columns.shape[1]

    def to_samples(self, u: Tensor) -> Tensor:
        """``R' u`` [samples] of u shaped like the outputs."""
        return torch.einsum("kbd,bd->kb", self.columns, self._rows(u)).flatten()

    def to_outputs(self, r: Tensor) -> Tensor:
        """``R r``, shaped like the outputs, float64."""
        return torch.einsum("kbd,kb->bd", self.columns, r.view(self.columns.shape[:2])).view(self.shape)

    def solve(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """The least r with ``R r = u`` where there is one, and what of u is left: ``u - R r``."""
        rows, s = self._rows(u), self.columns.permute(1, 2, 0)  # [B, D, k]
        values, vectors = torch.linalg.eigh(s @ s.mT)
        least = values.amax(-1, keepdim=True) * (values.shape[-1] * torch.finfo(values.dtype).eps)
        inverse = torch.where(values > least, 1 / values, 0.0)
        whitened = (vectors @ (inverse * (vectors.mT @ rows[..., None])[..., 0])[..., None])[..., 0]
        r = torch.einsum("kbd,bd->kb", self.columns, whitened).flatten()
        return r, u.double() - self.to_outputs(r)

    def _rows(self, u: Tensor) -> Tensor:
        return u.double().reshape(self.columns.shape[1:])


class JacobianRows:
    """``R' J`` of one batch, as what it is made of.

    Args:
        root: R.
        parts: by name of each parameter that influences the outputs, what its rows are made of.
        layout: of all parameters.
    """

    def __init__(self, root: Root, parts: Mapping[str, Part], layout: Layout) -> None:
        self.root = root
        self.parts = parts
        self.layout = layout

    def gram(self) -> Tensor:
        """``R' J J' R`` [samples, samples], float64."""
        total = self.root.columns.new_zeros(self.root.size, self.root.size)
        number, batch = self.root.columns.shape[:2]
        some: list[Tensor] = []
        for part in self.parts.values():
            own = part.gram()
            if own is not None:
                total += own
                continue
            some.append(torch.cat([part.formed(k, slice(0, batch)) for k in range(number)]))
            if sum(rows.numel() for rows in some) > CHUNK:
                total += _outer(torch.cat(some, dim=1))
                some = []
        return total + _outer(torch.cat(some, dim=1)) if some else total

    def normal(self) -> Tensor:
        """``J' R R' J`` [parameters, parameters], float64, from some rows at a time."""
        n = self.layout.size
        total = self.root.columns.new_zeros(n, n)
        for k, rows in self._chunks():
            some = self._dense(k, rows)
            total.addmm_(some.mT, some)
        return total

    def dense(self) -> Tensor:
        """``R' J`` [samples, parameters], float64."""
        return torch.cat([self._dense(k, rows) for k, rows in self._chunks()])

    def times(self, v: Tensor) -> Tensor:
        """``R' J v`` [samples] of v [parameters], from some rows at a time."""
        return torch.cat([self._dense(k, rows) @ v for k, rows in self._chunks()])

    def _chunks(self) -> Iterator[tuple[int, slice]]:
        number, batch = self.root.columns.shape[:2]
        step = max(1, CHUNK // max(1, self.layout.size))
        for k in range(number):
            for begin in range(0, batch, step):
                yield k, slice(begin, min(batch, begin + step))

    def _dense(self, k: int, rows: slice) -> Tensor:
        some = self.root.columns.new_zeros(rows.stop - rows.start, self.layout.size)
        for name, part in self.parts.items():
            some[:, self.layout.slices[name]] = part.formed(k, rows)
        return some


class Part(Protocol):
    def gram(self) -> Tensor | None:
        """Its rows' inner products, [samples, samples]; None where forming the rows costs less."""

    def formed(self, k: int, rows: slice) -> Tensor:
        """Its rows of the samples (k, b) for b in ``rows``, [b, elements]."""


@dataclass(frozen=True, eq=False)
class Formed:
    """The rows themselves, [k, B, elements]."""

    rows: Tensor

    def gram(self) -> None:
        return None

    def formed(self, k: int, rows: slice) -> Tensor:
        return self.rows[k, rows].double()


@dataclass(frozen=True, eq=False)
class Layered:
    """Factors of the rows, from every use of the parameter.

    Args:
        pieces: with a dimension k in front of what is sent back: g [k, B, T, ...].
        forms: of the matrices of each.
        shape: of the parameter.
    """

    pieces: Sequence[Rows | Lookups | Entries]
    forms: Sequence[Form]
    shape: torch.Size

    def gram(self) -> Tensor | None:
        pairs = self._pairs()
        if pairs is None:
            return None
        positions, inner = pairs
        number, batch = positions[0][1].shape[:2]
        total = positions[0][1].new_zeros(number, batch, number, batch)
        for (a, g), (c, h) in combinations_with_replacement(positions, 2):
            outer = (g.flatten(0, 1) @ h.flatten(0, 1).mT).view_as(total) * inner(a, c)[:, None, :]
            total += outer if g is h else outer + outer.permute(2, 3, 0, 1)
        return total.view(number * batch, number * batch)

    def _pairs(self) -> tuple[list[tuple[Tensor, Tensor]], Callable[[Tensor, Tensor], Tensor]] | None:
        """Each position's a [B, n] or index [B] and g [k, B, m], and the inner products of two a; None if multiplying
        out over pairs of positions costs more than forming the rows."""
        number = sum(sent_of(piece).shape[2] for piece in self.pieces)
        if all(isinstance(piece, Lookups) for piece in self.pieces):
            if number**2 > self.shape[0]:
                return None
            found = [
                (piece.index[:, t], piece.g[:, :, t].double())
                for piece in self.pieces
                if isinstance(piece, Lookups)
                for t in range(piece.g.shape[2])
            ]
            return found, lambda i, j: (i[:, None] == j).double()
        rows = [piece for piece in self.pieces if isinstance(piece, Rows) and piece.part is None]
        if len(rows) < len(self.pieces) or len(set(self.forms)) > 1 or rows[0].a.shape[2] > 1:
            return None
        m, n = rows[0].g.shape[-1], rows[0].a.shape[-1]
        if number * (number + 1) // 2 * (m + n + PASSES) > m * n:
            return None
        found = [(row.a[:, t, 0].double(), row.g[:, :, t, 0].double()) for row in rows for t in range(row.a.shape[1])]
        return found, lambda a, c: a @ c.mT

    def formed(self, k: int, rows: slice) -> Tensor:
        total = sent_of(self.pieces[0]).new_zeros(rows.stop - rows.start, *self.shape, dtype=torch.float64)
        flat = total.flatten(1)
        for piece, form in zip(self.pieces, self.forms, strict=True):
            if isinstance(piece, Entries):
                flat[:, piece.part or slice(None)] += piece.grads[k, rows].sum(1)
            elif isinstance(piece, Lookups):
                index = piece.index[rows][..., None].expand(piece.g[k, rows].shape)
                total.scatter_add_(1, index, piece.g[k, rows].double())
            else:
                matrix = torch.einsum("btgm,btgn->bgmn", piece.g[k, rows].double(), piece.a[rows].double())
                part = total[:, piece.part or slice(None)]
                part += (matrix.mT if form.transposed else matrix).reshape(part.shape)
        return flat


def _outer(rows: Tensor) -> Tensor:
    """``rows rows'``, of which only blocks on and below the diagonal are multiplied."""
    total = rows.new_zeros(len(rows), len(rows))
    for begin in range(0, len(rows), BLOCK):
        end = begin + BLOCK
        total[begin:end, :end] = rows[begin:end] @ rows[:end].mT
    return total.tril() + total.tril(-1).mT


def sent_of(piece: Rows | Lookups | Entries) -> Tensor:
    return piece.grads if isinstance(piece, Entries) else piece.g
