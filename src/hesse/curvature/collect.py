"""What columns give: sent back some at a time, and brought into the one form of every layer.

How many columns go together is a matter of the machine. A GPU takes as many as its memory holds in one batched backward
pass. On a CPU batching saves calls and no more, so that only tiny models are batched, and a column whose gradients
fill the cache goes alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from hesse.curvature.examples import Examples, by_example, leading
from hesse.curvature.layers import CONVOLUTIONS, Entries, Lookups, Rows, rows_of, wide
from hesse.curvature.passes import Share
from hesse.curvature.uses import Use

__all__ = ["Collector", "Found", "Piece", "collect"]

Piece = Rows | Lookups | Entries
Found = Sequence[tuple[Use, dict[str, Piece]]]  # what some columns give at some uses; g are [K, B, T, ..]

ON_CPU, ELSEWHERE = 2**18, 2**26  # elements of gradients that are kept side by side: on a CPU what fills a cache
BATCHED = 2**14  # on a CPU a batched pass saves calls only: with more elements a column it is slower than a loop
PATCHES = 2**26  # elements of convolutions' patches that are kept from one column to the next


class Collector(Protocol):
    """What sums something up over columns."""

    def add(self, found: Found) -> None:
        """What some columns give at the uses of a share."""

    def add_gradients(self, grads: Tensor) -> None:
        """What some columns give at a parameter, [K, *shape]."""


def _send_back(share: Share, columns: Iterable[Tensor]) -> Iterator[list[Tensor | None]]:
    """What the columns give at each use of the share, and then at each of its loose parameters.

    Yields:
        Gradients [k, *shape] for some columns at a time, None where they do not reach.
    """
    run = share.run
    targets: list[Any] = [*(run.uses[i].edge for i in share.places), *(run.params[name] for name in share.loose)]
    shapes = [*(run.uses[i].shape for i in share.places), *(run.params[name].shape for name in share.loose)]
    size = max(run.outputs.numel(), sum(shape.numel() for shape in shapes))
    on_cpu = run.outputs.device.type == "cpu"
    batched = not on_cpu or size <= BATCHED
    columns = (part for column in columns for part in share.parts(column))
    if share.sent is not None:
        yield [None if g is None else g.reshape(1, *shape) for g, shape in zip(share.sent, shapes, strict=True)]
        columns = islice(columns, 1, None)
    while some := list(islice(columns, max(1, (ON_CPU if on_cpu else ELSEWHERE) // size))):
        block = torch.stack(some)
        block = block[block.reshape(len(block), -1).any(1)]  # the others belong to terms that do not count
        if len(block) > 1 and batched:
            try:
                grads: Sequence[Tensor | None] = run.gradients(targets, block, batched=True)
            except (RuntimeError, NotImplementedError) as error:
                if isinstance(error, torch.OutOfMemoryError):
                    raise
                batched = False  # an operation cannot be batched; what is really wrong comes up again one by one
        if len(block) == 1 or not batched:
            each = zip(*(run.gradients(targets, column) for column in block), strict=True)
            grads = [None if of[0] is None else torch.stack(of) if len(of) > 1 else of[0] for of in each]
        if len(block):
            yield [None if g is None else g.reshape(-1, *shape) for g, shape in zip(grads, shapes, strict=True)]


def collect(share: Share, columns: Iterable[Tensor], collectors: Mapping[str, Collector]) -> None:
    """Send the columns back, and hand what they give to the collectors of parameters.

    Args:
        share: which columns may go together, and to which parameters.
        columns: shaped like the outputs of the batch.
        collectors: by name of a parameter; others of the share are passed over.
    """
    room = _Room(PATCHES)
    readers = [_Reader(share.run.uses[i], place, room) for i, place in share.places.items()]
    for grads in _send_back(share, columns):
        found = [(read.use, read(g)) for read, g in zip(readers, grads, strict=False) if g is not None]
        direct = dict(zip(share.loose, grads[len(readers) :], strict=True))
        for name, collector in collectors.items():
            g = direct.get(name)
            if g is not None:
                collector.add_gradients(g)
            elif name not in direct:
                collector.add(found)


class _Room:
    """How many elements more may be kept."""

    def __init__(self, size: int) -> None:
        self.left = size

    def take(self, size: int) -> bool:
        enough = size <= self.left
        self.left -= size if enough else 0
        return enough


class _Reader:
    """:func:`hesse.curvature.layers.rows_of` for what columns send back to one use, some columns at a time."""

    def __init__(self, use: Use, examples: Examples | None, room: _Room) -> None:
        self.use = use
        self.examples = examples
        self.room = room
        self.inputs: Tensor | None = None

    def __call__(self, grads: Tensor) -> dict[str, Piece]:
        """The pieces for ``grads`` [K, *shape], with K in front of g [K, B, T, ..]; a [B, T, G, n] is of no column."""
        use, grads = self.use, wide(grads)
        if self.inputs is not None and use.weight is not None:
            # The inputs are the same for every column, and the patches of a convolution cost more than all the rest.
            if use.operation is not F.linear:
                grads = (grads if leading(use) else grads[:, None]).flatten(3).mT
            shift = by_example(grads.movedim(0, -1), grads.ndim - 2, use, self.examples).movedim(-1, 0)
            read: dict[str, Piece] = {
                use.weight: Rows(self.inputs, shift.unflatten(-1, (self.inputs.shape[2], -1)), use.rows)
            }
            return read if use.bias is None else read | {use.bias: Entries(shift, use.bias_rows)}
        found: dict[str, Piece] = {}

        def one(g: Tensor) -> dict[str, Tensor]:
            found.update(rows_of(use, g, self.examples))
            return {name: _of(piece) for name, piece in found.items()}

        columns = torch.vmap(one)(grads) if len(grads) > 1 else {name: g[None] for name, g in one(grads[0]).items()}
        piece = found.get(use.weight or "")
        if isinstance(piece, Rows) and (use.operation is F.linear or self._fits(piece)):
            self.inputs = piece.a
        return {name: _with(piece, columns[name]) for name, piece in found.items()}

    def _fits(self, rows: Rows) -> bool:
        return self.use.operation in CONVOLUTIONS and self.room.take(rows.a.numel())


def _of(piece: Piece) -> Tensor:
    return piece.grads if isinstance(piece, Entries) else piece.g


def _with(piece: Piece, columns: Tensor) -> Piece:
    if isinstance(piece, Entries):
        return Entries(columns, piece.part)
    if isinstance(piece, Lookups):
        return Lookups(piece.index, columns, piece.padding, piece.size)
    return Rows(piece.a, columns, piece.part)
