"""Sums of squared per-example gradients of parameters, collected over columns: ``sum_k sum_b (dl_b / dp along r_k)^2``.

The diagonal of the Gauss-Newton matrix, when what is sent back are the columns of a root. A weight's come from its rows
(:mod:`hesse.curvature.row_squares`); scales, shifts and lookups from their own; where uses overlap in part, each
example's gradient is formed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Size, Tensor

from hesse.curvature.collect import Found, Piece
from hesse.curvature.layers import Entries, Lookups, Rows, form_of, from_matrix
from hesse.curvature.passes import Share
from hesse.curvature.row_squares import FORMED, RowSquares, lookup_squares
from hesse.curvature.statistics import find_blocks
from hesse.curvature.uses import Use
from hesse.tree import Params

__all__ = ["Squares", "squares_of"]


class Squares:
    """The sums over columns and examples of the squared gradients of a parameter, or of a weight and its bias.

    Args:
        name: of the parameter.
        params: all by name.
        bias: of a weight, used with it and never without.
    """

    def __init__(self, name: str, params: Mapping[str, Tensor], bias: str | None = None) -> None:
        p = params[name]
        self.name = name
        self.shape = p.shape
        self.like = p.detach()
        self._values: Tensor | None = None
        self.bias = None if bias is None else Squares(bias, params)
        self.rows: dict[tuple[int, int], tuple[Use, RowSquares]] = {}

    def add(self, found: Found) -> None:
        """What some columns give at the uses."""
        pieces = [(use, pieces[self.name]) for use, pieces in found if self.name in pieces]
        rows = [piece for _, piece in pieces if isinstance(piece, Rows)]
        entries = [piece for _, piece in pieces if isinstance(piece, Entries)]
        lookups = [piece for _, piece in pieces if isinstance(piece, Lookups)]
        if not pieces:
            return
        if len(rows) == len(pieces) and len({form_of(use) for use, _ in pieces}) == 1 and self._apart(rows):
            self._add_rows(pieces[0][0], rows)
            return  # with the bias
        if len(entries) == len(pieces):
            self._add_entries(entries)
        elif len(lookups) == len(pieces):
            self.values += lookup_squares(lookups)
        else:
            self._add_formed(pieces)
        if self.bias is not None:
            self.bias.add(found)

    def add_gradients(self, grads: Tensor) -> None:
        """Gradients [K, *shape] of the parameter itself."""
        self.values += grads.square().sum(0)

    def total(self) -> Params:
        """The sums by name, shaped as the parameters."""
        for (begin, end), (use, squares) in self.rows.items():
            matrix, shift = squares.total()
            part = from_matrix(matrix, form_of(use), (end - begin, *self.shape[1:]))[0]
            if end - begin == self.shape[0]:
                self._values = part
            else:
                self.values[begin:end] = part
            if self.bias is not None:
                self.bias.values[begin:end] = shift.flatten()
        self.rows = {}
        return {self.name: self.values} | ({} if self.bias is None else self.bias.total())

    @property
    def values(self) -> Tensor:
        if self._values is None:
            self._values = torch.zeros_like(self.like, dtype=torch.promote_types(self.like.dtype, torch.float32))
        return self._values

    @values.setter
    def values(self, values: Tensor) -> None:
        self._values = values

    def _add_rows(self, use: Use, rows: Sequence[Rows]) -> None:
        by_part: dict[tuple[int, int], list[Rows]] = {}
        for row in rows:
            by_part.setdefault(self._ends(row.part), []).append(row)
        for part, alike in by_part.items():
            if part not in self.rows:
                self.rows[part] = use, RowSquares(bias=self.bias is not None)
            # Several uses are as many positions more.
            a = alike[0].a if len(alike) == 1 else torch.cat([row.a for row in alike], dim=1)
            g = alike[0].g if len(alike) == 1 else torch.cat([row.g for row in alike], dim=2)
            self.rows[part][1].add(a, g)

    def _add_entries(self, entries: Sequence[Entries]) -> None:
        columns, batch = entries[0].grads.shape[:2]
        if len(entries) == 1:
            part, sums = entries[0].part, entries[0].grads.sum(2)
        else:
            part, sums = None, self.values.new_zeros(columns, batch, self.shape.numel())
            for one in entries:
                sums[..., one.part or slice(None)] += one.grads.sum(2)
        self.values.view(-1)[part or slice(None)] += sums.square_().sum((0, 1))

    def _add_formed(self, pieces: Sequence[tuple[Use, Piece]]) -> None:
        """By forming each example's gradient, whatever the pieces are."""
        first = pieces[0][1]
        columns, batch = (first.grads if isinstance(first, Entries) else first.g).shape[:2]
        step = max(1, FORMED // max(1, self.shape.numel()))
        for k in range(columns):
            for begin in range(0, batch, step):
                formed = self.values.new_zeros(min(step, batch - begin), self.shape.numel())
                for use, piece in pieces:
                    _form(formed, use, piece, k, slice(begin, begin + step), self.shape)
                self.values += formed.square_().sum(0).view(self.shape)

    def _ends(self, part: slice | None) -> tuple[int, int]:
        return (0, self.shape[0]) if part is None else (part.start, part.stop)

    def _apart(self, rows: Sequence[Rows]) -> bool:
        """Whether the uses see the same part of the weight, or parts that do not overlap."""
        ends = sorted({self._ends(row.part) for row in rows})
        return all(a[1] <= b[0] for a, b in pairwise(ends))


def squares_of(share: Share) -> dict[str, Squares]:
    """Sums of squares for the parameters of a share, by the name that leads each: a weight takes in its bias."""
    blocks, _ = find_blocks([share.run.uses[i] for i in share.places], share.run.params, frozenset(share.names))
    biases = {block.weight: block.bias for block in blocks if block.bias is not None}
    return {
        name: Squares(name, share.run.params, biases.get(name))
        for name in (*share.names, *share.loose)
        if name not in biases.values()
    }


def _form(formed: Tensor, use: Use, piece: Piece, k: int, some: slice, shape: Size) -> None:
    """Add the gradients of some examples for column k to ``formed`` [b, elements of the parameter]."""
    if isinstance(piece, Entries):
        formed[:, piece.part or slice(None)] += piece.grads[k, some].sum(1)
        return
    g = piece.g[k, some]
    if isinstance(piece, Lookups):
        index = torch.arange(len(g), device=g.device)[:, None] * piece.size + piece.index[some]
        formed.view(-1, g.shape[-1]).index_add_(0, index.flatten(), g.flatten(0, 1))
        return
    matrices = g.permute(0, 2, 3, 1) @ piece.a[some].transpose(1, 2)
    matrices = matrices.mT if form_of(use).transposed else matrices
    rows = formed.view(len(g), shape[0], -1)
    rows[:, piece.part or slice(None)] += matrices.reshape(len(g), -1, rows.shape[-1])
