"""Many vectors at one batch: one after the other, or at once under ``vmap``, whichever the clock prefers.

On a large batch the kept graph is already at the floor of its arithmetic and ``vmap`` only adds to it; on a small model
most of a product's time is dispatch, which a block pays once. No rule of thumb tells them apart, so each way is
timed on a few columns, and counts only if it gives what single products give.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from time import perf_counter

import torch

from hesse.curvature.product import Product
from hesse.tree import Params

__all__ = ["ONE_BY_ONE", "TRIAL", "fastest", "through"]

ONE_BY_ONE = "one by one"
BLOCK = 32  # columns at once: memory grows with each, and the gain has flattened out
TRIAL = 8  # columns on which a way is timed: with fewer there is nothing to gain


def through(product: Product, way: str, columns: Params) -> Params:
    """The products with k vectors: tensors [k, *shape] by name to the same."""
    if way == ONE_BY_ONE:
        found = [product.apply({name: x[i] for name, x in columns.items()}) for i in range(_count(columns))]
        return {name: torch.stack([row[name] for row in found]) for name in columns}
    with warnings.catch_warnings():
        # vmap says which operations it loops over; the clock has the last word on that.
        warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
        parts = [
            product.at_once[way]({name: x[i : i + BLOCK] for name, x in columns.items()})
            for i in range(0, _count(columns), BLOCK)
        ]
    return {name: torch.cat([part[name] for part in parts]) for name in columns}


def fastest(product: Product, columns: Params) -> str:
    """The fastest way on these few columns, among those that work and agree with single products."""
    two = {name: x[:2] for name, x in columns.items()}
    through(product, ONE_BY_ONE, two)  # what is made at a first call is not to be timed
    best, expected = _timed(lambda: through(product, ONE_BY_ONE, two))
    best, chosen = best / 2, ONE_BY_ONE
    for way in product.at_once:
        try:
            through(product, way, two)
            seconds, found = _timed(lambda way=way: through(product, way, columns))  # type: ignore[misc]
        except (AssertionError, NotImplementedError, RuntimeError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            continue  # what vmap or a compiler cannot batch: one by one always works
        if seconds / _count(columns) < best and _agree(found, expected):
            best, chosen = seconds / _count(columns), way
    return chosen


def _agree(found: Params, expected: Params) -> bool:
    """Whether the first columns are the single products, to the rounding of float32."""
    size = max(float(x.abs().max()) for x in expected.values())
    return all(torch.allclose(found[n][: len(x)], x, rtol=1e-3, atol=1e-4 * size) for n, x in expected.items())


def _timed(run: Callable[[], Params]) -> tuple[float, Params]:
    began = perf_counter()
    result = run()
    device = next(iter(result.values())).device
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()  # kernels run on after the call has returned
    return perf_counter() - began, result


def _count(columns: Params) -> int:
    return len(next(iter(columns.values())))
