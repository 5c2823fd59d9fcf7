"""Where the examples of a batch are: which of the positions that a layer works on belong to which example.

A layer's input has positions and features. One dimension of the positions holds the examples, first or in the middle
([T, B, D]), folded into others ([B * T, D]) or packed, and no shape says for certain which. For a mean over
everything it does not matter. For per-example gradients it does, and there it is proved: :func:`example_dims`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hesse.curvature.plain import Order
from hesse.curvature.uses import Use

__all__ = ["Examples", "by_example", "example_dims", "guess_examples", "leading", "lengths", "powers"]


class Examples(NamedTuple):
    """Where the examples of a batch lie among the positions of a use's input.

    ``dim`` is a dimension of the input, of ``batch * k`` elements; example b has those at ``b * k + i`` if
    ``major``, else those at ``i * batch + b``.
    """

    dim: int
    batch: int
    major: bool = True


def guess_examples(use: Use, batch: int) -> Examples | None:
    """Where a batch of that size lies, if exactly one of the use's dimensions could hold it. A guess by size."""
    fitting = [dim for dim, size in _sizes(use) if size == batch]
    return Examples(fitting[0], batch) if len(fitting) == 1 else None


def example_dims(
    uses: Sequence[Use], grads: Sequence[Tensor | None], scaled: Sequence[Tensor | None], factors: Tensor
) -> list[Examples | None]:
    """Where each use keeps the examples, proved by a second backward pass.

    If the outputs of an example depend on nothing but its own rows of the use, scaling what is sent back at the
    example's outputs scales those rows and no others. What mixes examples (batch norm in training mode, attention
    across the batch) or orders them anew has no place that fits.

    Args:
        uses: the uses.
        grads: the gradients at their outputs for some r, best a random one.
        scaled: the same for ``factors[b] * r`` at the outputs of example b.
        factors: [B], from :func:`powers`.

    Returns:
        For each use the place, or None if there is none, as where no gradient is.

    Example:
        A layer on [T, B, D], with T = B:

        >>> from hesse.curvature.uses import output_gradients, watch_uses
        >>> layer = torch.nn.Linear(2, 2)
        >>> with watch_uses(dict(layer.named_parameters())) as uses:
        ...     y = layer(torch.ones(3, 3, 2)).transpose(0, 1)
        >>> r, factors = torch.randn(3, 3, 2), powers(3)
        >>> sent = (r, factors[:, None, None] * r)
        >>> example_dims(uses, *(output_gradients(uses, y, s) for s in sent), factors)
        [Examples(dim=1, batch=3, major=True)]
    """
    places: list[Examples | None] = []
    batch = len(factors)
    for use, g, s in zip(uses, grads, scaled, strict=True):
        place = None
        if g is not None and s is not None:
            sizes = _sizes(use)
            folds = [dim for dim, n in sizes if n == batch] + [dim for dim, n in sizes if n > batch and n % batch == 0]
            tried = [Examples(dim, batch, major) for dim in folds for major in (True, False)]
            place = next((one for one in tried if _scales(use, g, s, factors, one)), None)
        places.append(place)
    return places


def powers(batch: int) -> Tensor:
    """[B] powers of two, which scale without rounding, in no order that a reshape would keep.

    Example:
        >>> sorted(powers(3).tolist())
        [1.0, 2.0, 4.0]
    """
    return 2.0 ** (torch.randperm(batch, generator=torch.Generator().manual_seed(0)) % 8)


def leading(use: Use) -> int:
    """How many leading dimensions of the input can tell examples and positions apart; the rest are features."""
    if use.operation is F.embedding:
        return use.x.ndim
    if use.operation is F.linear:
        return use.x.ndim - 1
    if "shape" in use.options:
        return use.x.ndim - len(use.options["shape"])
    return int(use.x.ndim == len(use.options.get("kernel", use.x.shape[2:])) + 2)  # an image alone has none


def _sizes(use: Use) -> list[tuple[int, int]]:
    """The dimensions that can tell examples and positions apart, with their sizes; packed sequences count as one."""
    if "order" in use.options:
        return [(0, use.options["order"].sequences)]
    return [(dim, use.x.shape[dim]) for dim in range(leading(use))]


def by_example(t: Tensor, positions: int, use: Use, examples: Examples | None) -> Tensor:
    """[B, T, features] from a tensor with so many leading dimensions of examples and positions."""
    tail = t.shape[positions:]
    if examples is None:
        return t.reshape(1, -1, *tail)
    dim, batch, major = examples
    if "order" in use.options:
        return _unpack(t, use.options["order"])
    if major:
        return t.unflatten(dim, (batch, -1)).movedim(dim, 0).reshape(batch, -1, *tail)
    return t.unflatten(dim, (-1, batch)).movedim(dim + 1, 0).reshape(batch, -1, *tail)


def lengths(use: Use, rows: Tensor) -> Tensor:
    """How many positions each example has, [B], in rows [B, T, ..] by example; those that only fill up are none."""
    if "order" in use.options and len(rows) > 1:
        order = use.options["order"]
        return order.example.bincount(minlength=order.sequences).to(rows.dtype)
    return rows.new_full(rows.shape[:1], rows.shape[1])


def _unpack(t: Tensor, order: Order) -> Tensor:
    """[sequences, longest, features] from packed rows, with zeros where a sequence has ended."""
    index, slots = order.example.sort(stable=True)
    lengths = order.example.bincount(minlength=order.sequences)
    begin = (lengths.cumsum(0) - lengths)[index]
    out = t.new_zeros(order.sequences, int(lengths.max()), *t.shape[1:])
    out[index, torch.arange(len(index), device=t.device) - begin] = t[slots]
    return out


def _scales(use: Use, g: Tensor, scaled: Tensor, factors: Tensor, examples: Examples) -> bool:
    g, scaled = (by_example(t.reshape(use.shape), leading(use), use, examples).flatten(1) for t in (g, scaled))
    expected = g * factors.to(g)[:, None]
    limit = 64 * torch.finfo(g.dtype).eps * expected.abs().amax(1, keepdim=True)  # a GPU adds in any order
    return bool(((scaled - expected).abs() <= limit).all())
