"""Second moments of what meets a weight: the Kronecker factors of its block, summed over columns, examples and batches.

The rows a and g of all positions, examples and uses make ``A = mean a a'`` and ``G = sum g g'``, so that A (x) G is a
sum over rows, as the block itself is. "expand" takes every position for a row of its own; "reduce" takes an example's
mean of a and its sum of g. A weight of several matrices (groups, parts of a packed projection) has factors for each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hesse.curvature.collect import Found
from hesse.curvature.examples import lengths
from hesse.curvature.layers import Lookups, Rows
from hesse.curvature.passes import Share
from hesse.curvature.statistics import Block, Variant
from hesse.curvature.uses import Use

__all__ = ["Moments", "RowsOf", "parts_of"]


class RowsOf(NamedTuple):
    """What one use says about a weight, or about a part of it: see :class:`hesse.curvature.layers.Rows`."""

    use: Use
    a: Tensor
    g: Tensor


class Moments:
    """The sums for one block from one share: a :class:`hesse.curvature.collect.Collector`.

    ``a`` is the sum of a a' [G, n, n] over ``rows`` rows ([G]), ``g`` that of g g' [G, m, m]; of lookups ``a``
    [n] counts the indices. They are None until something has been added.

    Raises:
        ValueError: "reduce", and the examples of a use are not known.
    """

    def __init__(self, block: Block, share: Share, variant: Variant) -> None:
        self.block = block
        self.reduce = variant == "reduce"
        self.a: Tensor | None = None
        self.g: Tensor | None = None
        self.rows: Tensor | None = None
        if self.reduce and share.rows > 1:
            _refuse_mixed(block, share)

    def add(self, found: Found) -> None:
        """What some columns give at the uses. The inputs are the same for all of them, and count once."""
        pieces = [(use, pieces[self.block.weight]) for use, pieces in found if self.block.weight in pieces]
        lookups = [piece for _, piece in pieces if isinstance(piece, Lookups)]
        if lookups:
            self._add_lookups(lookups)
            return
        parts = parts_of(self.block, found)
        if self.a is None:
            inputs = [self._inputs(part) for part in parts]
            self.a = _joined([a for a, _ in inputs])
            self.rows = _joined([rows for _, rows in inputs])
        g = _joined([_second(self._gradients(part)) for part in parts])
        self.g = g if self.g is None else self.g + g

    def add_gradients(self, grads: Tensor) -> None:
        raise TypeError(f"the block of {self.block.weight!r} is made of its uses.")

    def _add_lookups(self, lookups: Sequence[Lookups]) -> None:
        if self.a is None:
            self.a = torch.stack([_counts(one) for one in lookups]).sum(0)
            self.rows = self.a.sum()[None]
        g = _second(torch.cat([one.g.flatten(0, 2) for one in lookups])[:, None])
        self.g = g if self.g is None else self.g + g

    def _inputs(self, part: Sequence[RowsOf]) -> tuple[Tensor, Tensor]:
        """The sum of a a' [G, n, n] and the number of rows for each group."""
        positions = torch.stack([lengths(row.use, row.a) for row in part]).sum(0)
        if self.reduce:
            x = torch.stack([row.a.sum(1) for row in part]).sum(0) / positions[:, None, None]
            rows = float(len(x))
        else:
            x = _joined([row.a.flatten(0, 1) for row in part])
            rows = float(positions.sum())
        if self.block.bias is None:
            a = _second(x)
        else:  # whose input is a one at every row
            groups, n = x.shape[1:]
            a = x.new_empty(groups, n + 1, n + 1)
            _second(x, out=a[:, :n, :n])
            a[:, n, :n] = a[:, :n, n] = x.sum(0)
            a[:, n, n] = rows
        return a, a.new_full(a.shape[:1], rows)

    def _gradients(self, part: Sequence[RowsOf]) -> Tensor:
        """Rows g [.., G, m]."""
        if self.reduce:
            return torch.stack([row.g.sum(2) for row in part]).sum(0).flatten(0, 1)
        return _joined([row.g.flatten(0, 2) for row in part])


def parts_of(block: Block, found: Found) -> list[list[RowsOf]]:
    """What the uses say about a block's weight, apart for each of the parts that it is packed of (mostly one)."""
    rows = [(use, pieces[block.weight]) for use, pieces in found if block.weight in pieces]
    whole = [(use, row) for use, row in rows if isinstance(row, Rows)]
    if all(row.part is None for _, row in whole):
        return [[RowsOf(use, row.a, row.g) for use, row in whole]]
    parts: list[list[RowsOf]] = []
    for i in range(block.form.groups):
        parts.append([])
        for use, row in whole:
            if row.part is None:
                parts[i].append(RowsOf(use, row.a, row.g.chunk(block.form.groups, dim=-1)[i]))
            elif row.part.start == i * row.g.shape[-1]:
                parts[i].append(RowsOf(use, row.a, row.g))
    return parts


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(parts)) if len(parts) > 1 else parts[0]


def _second(x: Tensor, out: Tensor | None = None) -> Tensor:
    """[G, n, n], the sum over rows of x x' for [rows, G, n]."""
    groups, n = x.shape[1:]
    out = x.new_empty(groups, n, n) if out is None else out
    if groups == 1:
        torch.mm(x[:, 0].mT, x[:, 0], out=out[0])
    else:
        torch.bmm(x.permute(1, 2, 0), x.movedim(1, 0), out=out)
    return out


def _counts(found: Lookups) -> Tensor:
    counts = torch.bincount(found.index.flatten(), minlength=found.size).to(found.g.dtype)
    if found.padding is not None:
        counts[found.padding] = 0.0  # its row never moves
    return counts


def _refuse_mixed(block: Block, share: Share) -> None:
    uses, places = [share.run.uses[i] for i in share.places], list(share.places.values())
    for i in block.uses:
        if places[i] is None and uses[i].operation is not F.embedding:
            raise ValueError(
                f"variant='reduce' adds up the positions of each example, and the examples that {block.weight!r} met, "
                f"in inputs of shape {list(uses[i].x.shape)}, cannot be told apart in its gradients: batch norm in "
                "training mode, for instance, mixes them. Use variant='expand', or the model in eval mode."
            )
