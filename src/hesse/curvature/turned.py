"""EKFAC's eigenvalues: the squares of per-example gradients in the eigenbasis of a Kronecker block.

In the basis of Q_G and Q_A the best diagonal is ``E[(Q_G' grad_i Q_A)^2]`` (George et al., 2018); K-FAC takes the
products of the factors' eigenvalues in its place. Rows are turned first, ``Q_G' g`` and ``Q_A' a``, and then squared
and summed as any others (:mod:`hesse.curvature.row_squares`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from hesse.curvature.collect import Found, Piece
from hesse.curvature.examples import guess_examples
from hesse.curvature.factored import Eigenbasis
from hesse.curvature.layers import Entries, Lookups, Rows, rows_of
from hesse.curvature.moments import parts_of
from hesse.curvature.row_squares import RowSquares, lookup_squares
from hesse.curvature.statistics import Block
from hesse.curvature.uses import Use

__all__ = ["Turned", "turned_squares"]


def turned_squares(block: Block, pairs: Sequence[tuple[Use, Tensor]], basis: Eigenbasis, batch: int) -> Tensor:
    """The sums [G, m, n] for one gradient sent back.

    Args:
        block: a weight.
        pairs: its uses and the gradients at their outputs.
        basis: its eigenvectors; ``values`` give the shape.
        batch: the number of examples. Where no dimension of an input is known to hold them, each position is taken for
            an example of its own, as the factors take it.
    """
    places = [guess_examples(use, batch) for use, _ in pairs]
    known = all(places)
    turned = Turned(block, basis)
    found = []
    for (use, g), place in zip(pairs, places, strict=True):
        piece = rows_of(use, g, place if known else None)[block.weight]
        if not known:
            piece = _apart(piece)
        found.append((use, {block.weight: _one_column(piece)}))
    turned.add(found)
    return turned.total()


def _apart(piece: Piece) -> Piece:
    """Positions as examples: [1, T, ..] as [T, 1, ..]."""
    if isinstance(piece, Lookups):
        return replace(piece, index=piece.index.T, g=piece.g.transpose(0, 1))
    assert isinstance(piece, Rows)
    return replace(piece, a=piece.a.transpose(0, 1), g=piece.g.transpose(0, 1))


def _one_column(piece: Piece) -> Piece:
    assert not isinstance(piece, Entries)  # a weight has none
    return replace(piece, g=piece.g[None])


class Turned:
    """The squares of one block's per-example gradients in its eigenbasis: a collector."""

    def __init__(self, block: Block, basis: Eigenbasis) -> None:
        self.block = block
        self.basis = basis
        self.looked_up = torch.zeros_like(basis.values)
        self.inputs: list[Tensor] = []
        self.squares: list[RowSquares] = []

    def add(self, found: Found) -> None:
        pieces = [pieces[self.block.weight] for _, pieces in found if self.block.weight in pieces]
        assert self.basis.g is not None
        lookups = [
            Lookups(one.index, one.g @ self.basis.g, one.padding, one.size)
            for one in pieces
            if isinstance(one, Lookups)
        ]
        if lookups:
            self.looked_up += lookup_squares(lookups).mT
            return
        parts = parts_of(self.block, found)
        for i, part in enumerate(parts):
            q_a, q_g = (_matrices(q, i if len(parts) > 1 else None) for q in (self.basis.a, self.basis.g))
            if len(self.inputs) == i:
                a = torch.cat([row.a for row in part], dim=1)
                a = a if self.block.bias is None else F.pad(a, (0, 1), value=1.0)
                self.inputs.append(torch.einsum("btgn,gnr->btgr", a, q_a))
                self.squares.append(RowSquares())
            g = torch.cat([row.g for row in part], dim=2)
            self.squares[i].add(self.inputs[i], torch.einsum("kbtgm,gmr->kbtgr", g, q_g))

    def add_gradients(self, grads: Tensor) -> None:
        """A parameter without uses has no block."""

    def total(self) -> Tensor:
        return torch.cat([one.total()[0] for one in self.squares]) if self.squares else self.looked_up


def _matrices(q: Tensor | None, part: int | None) -> Tensor:
    """Eigenvectors [G, n, n], or of one part [1, n, n]."""
    assert q is not None  # only an embedding has none
    q = q if q.ndim == 3 else q[None]
    return q if part is None else q[part : part + 1]
