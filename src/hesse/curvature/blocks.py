"""Many vectors at one batch: one after the other, or at once under ``vmap``, whichever the clock prefers.

On a large batch the kept graph is already at the floor of its arithmetic and ``vmap`` only adds to it; on a small model
most of a product's time is dispatch, which a block pays once. No rule of thumb tells them apart, so each way is
timed on a few columns, and counts only if it gives what single products give.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from time import perf_counter

import torch

from hesse.curvature.product import Product
from hesse.tree import Params

__all__ = ["ONE_BY_ONE", "TRIAL", "fastest", "through"]

ONE_BY_ONE = "one by one"
BLOCK = 32  # columns at once: memory grows with each, and the gain has flattened out
TRIAL = 8  # columns on which a way is timed: with fewer there is nothing to gain


def through(product: Product, way: str, vectors: Params) -> Iterator[Params]:
    """The products with k vectors, tensors [k, *shape] by name, in order and in pieces [<= k, *shape]."""
    count = _count(vectors)
    if way == ONE_BY_ONE:
        for i in range(count):
            found = product.apply({name: x[i] for name, x in vectors.items()})
            yield {name: row[None] for name, row in found.items()}
        return
    for i in range(0, count, BLOCK):
        with warnings.catch_warnings():
            # vmap says which operations it loops over; the clock has the last word on that.
            warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
            found = product.at_once[way]({name: x[i : i + BLOCK] for name, x in vectors.items()})
        yield found


def fastest(product: Product, vectors: Params) -> str:
    """The fastest way on these few vectors, among those that work and agree with single products."""
    two = {name: x[:2] for name, x in vectors.items()}
    _timed(product, ONE_BY_ONE, two)  # what is made at a first call is not to be timed
    best, expected = _timed(product, ONE_BY_ONE, two)
    chosen = ONE_BY_ONE
    for way in product.at_once:
        try:
            _timed(product, way, two)
            seconds, found = _timed(product, way, vectors)
        except (AssertionError, NotImplementedError, RuntimeError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            continue  # what vmap or a compiler cannot batch: one by one always works
        if seconds < best and _agree(found, expected):
            best, chosen = seconds, way
    return chosen


def _agree(found: list[Params], expected: list[Params]) -> bool:
    """Whether the first vectors' products are the single ones, to the rounding of float32."""
    single = {name: torch.cat([row[name] for row in expected]) for name in expected[0]}
    size = max(float(x.abs().max()) for x in single.values())
    return all(torch.allclose(found[0][n][: len(x)], x, rtol=1e-3, atol=1e-4 * size) for n, x in single.items())


def _timed(product: Product, way: str, vectors: Params) -> tuple[float, list[Params]]:
    """Seconds a vector, and the products."""
    began = perf_counter()
    found = list(through(product, way, vectors))
    device = next(iter(found[0].values())).device
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()  # kernels run on after the call has returned
    return (perf_counter() - began) / _count(vectors), found


def _count(vectors: Params) -> int:
    return len(next(iter(vectors.values())))
