"""Where the Hessian of a plain function can be other than zero: the gradient is formed once, and watched.

While ``fun`` and its backward pass run, every operation that torch dispatches passes on which elements of x its results
depend on (:mod:`hesse.curvature.dependence`). What element i of the gradient depends on are the places of row i of the
Hessian that are not zero; a linear term has a constant gradient and leaves no trace. Separable functions give a
diagonal, chains a band, a grid its stencil.

The pattern is that of the branches taken at x. A function that goes another way elsewhere has another pattern, which
one product of the recovered Hessian with a probe finds out (:mod:`hesse.curvature.compressed`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hesse.curvature.dependence import floating, pass_on
from hesse.curvature.index_sets import IndexSets, TooDense
from hesse.linalg.banded import Pattern

__all__ = ["sparsity"]


def sparsity(fun: Callable[[Tensor], Tensor], x: Tensor, most: int | None = None) -> Pattern | None:
    """The pattern of the Hessian of ``fun`` at x, or None where it is dense or cannot be told.

    It holds every element that is not zero, whatever the values of x on the branches taken; it may hold some that are
    zero (where two terms cancel, or behind an operation whose dependence is not known). It is symmetric and holds
    the diagonal.

    Args:
        fun: of a flat tensor [n], one number.
        x: [n].
        most: elements above which the pattern counts as dense; by default an eighth of all, and no more than four
            million.

    Raises:
        Whatever ``fun`` and its backward pass raise.

    Example:
        >>> sparsity(lambda x: (x[1:] * x[:-1]).sum() + x.sum(), torch.ones(4), most=16).dense().int()
        tensor([[1, 1, 0, 0],
                [1, 1, 1, 0],
                [0, 1, 1, 1],
                [0, 0, 1, 1]], dtype=torch.int32)
    """
    n = x.numel()
    most = min(n * n // 8, 4_000_000) if most is None else most
    sets = IndexSets(n, 4 * most + 16 * n)
    point = x.detach().clone().requires_grad_()
    tracer = _Tracer(sets)
    tracer.write(point, torch.arange(1, n + 1))
    try:
        with torch.enable_grad(), tracer:
            value = fun(point)
            if not value.requires_grad:
                return Pattern.of(np.arange(n), np.arange(n), n)
            (gradient,) = torch.autograd.grad(value, point, allow_unused=True)
        if gradient is None:
            return Pattern.of(np.arange(n), np.arange(n), n)
        if gradient.layout != torch.strided:
            return None
        sizes, columns = sets.members(tracer.ids(gradient).numpy())
    except TooDense:
        return None
    rows = np.repeat(np.arange(n), sizes)
    # The Hessian is symmetric: what only one of row and column claims is zero.
    both = np.intersect1d(rows * n + columns, columns * n + rows, assume_unique=True)
    both = np.union1d(both, np.arange(n) * (n + 1))
    return Pattern.of(both // n, both % n, n) if both.size <= most else None


class _Tracer(TorchDispatchMode):
    """Numbers of sets for every element of every storage that depends on x, so that views share them."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # or the first operation imports torch._dynamo, which takes a second

    def __init__(self, sets: IndexSets) -> None:
        super().__init__()
        self.sets = sets
        self.held: dict[int, tuple[torch.UntypedStorage, Tensor, int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        inputs = list(floating((args, kwargs)))
        storages = {_storage(t) for t in inputs}
        if self.held.keys().isdisjoint(storages):
            return out
        targets = self._written(func, args, kwargs)
        fresh = [t for t in floating(out) if _storage(t) not in storages]  # the others are views, or what was written
        if any(t.layout != torch.strided for t in fresh):
            raise TooDense  # what depends on x went into a sparse tensor, whose elements have no places
        targets += fresh
        numbers = pass_on(self.sets, func, args, kwargs, out, targets, self.ids) if targets else []
        for target, ids in zip(targets, numbers, strict=True):
            self.write(target, ids)
        return out

    def ids(self, t: Tensor) -> Tensor:
        """The numbers of a tensor's elements, in its shape."""
        entry = self.held.get(_storage(t))
        if entry is None:
            return torch.zeros((), dtype=torch.int64).expand(t.shape)
        _, numbers, size = entry
        if size == t.element_size():
            return numbers.as_strided(t.shape, t.stride(), t.storage_offset())
        united = self.sets.group(np.zeros(numbers.numel(), dtype=np.int64), numbers.numpy(), 1)
        return torch.full(t.shape, int(united[0]))  # real and imaginary parts, seen apart

    def write(self, t: Tensor, ids: Tensor) -> None:
        key = _storage(t)
        if key not in self.held:
            if not ids.any():
                return
            storage = t.untyped_storage()
            size = t.element_size()
            self.held[key] = (storage, torch.zeros(storage.nbytes() // size, dtype=torch.int64), size)
        _, numbers, size = self.held[key]
        if size == t.element_size():
            numbers.as_strided(t.shape, t.stride(), t.storage_offset()).copy_(ids)
        else:
            one = self.sets.group(np.zeros(ids.numel(), dtype=np.int64), ids.reshape(-1).numpy(), 1)
            numbers.copy_(torch.from_numpy(self.sets.union(numbers.numpy(), np.full(numbers.numel(), one[0]))))

    def _written(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        if not func._schema.is_mutable:
            return []
        arguments = func._schema.arguments
        named = dict(zip((a.name for a in arguments), args, strict=False)) | kwargs
        changed = [a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write]
        return list(floating([named[name] for name in changed if name in named]))


def _storage(t: Tensor) -> int:
    """A name for the memory of a tensor; sparse ones have none, and count as constant."""
    return t.untyped_storage()._cdata if t.layout == torch.strided else 0
