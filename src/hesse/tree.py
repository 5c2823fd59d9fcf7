"""Named tensors as one vector: the inner product and sums of ``dict[str, Tensor]``, and their place in a flat vector.

Parameters, gradients, directions and curvature products are all such dictionaries (``Params``); the functions here
are the only ones that see them as points of one Euclidean space. ``Layout`` says where each name lies when they are
written one after another, which is the order of an operator's rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from math import prod

import torch
from torch import Tensor

__all__ = ["Layout", "Params", "add", "dot", "is_finite", "scale"]

Params = dict[str, Tensor]


@dataclass(frozen=True)
class Layout:
    """Names and shapes, in the order in which they make up one vector.

    Example:
        >>> layout = Layout.of({"weight": torch.zeros(2, 3), "bias": torch.zeros(2)})
        >>> layout.size, layout.slices["bias"]
        (8, slice(6, 8, None))
        >>> layout.split(torch.arange(8.0))["bias"]
        tensor([6., 7.])
    """

    shapes: dict[str, torch.Size]

    @classmethod
    def of(cls, x: Mapping[str, Tensor]) -> Layout:
        """The layout of ``x``."""
        return cls({name: value.shape for name, value in x.items()})

    @cached_property
    def slices(self) -> dict[str, slice]:
        """Where each name lies."""
        found, begin = {}, 0
        for name, shape in self.shapes.items():
            found[name] = slice(begin, begin + prod(shape))
            begin += prod(shape)
        return found

    @property
    def size(self) -> int:
        """Length of the vector."""
        return sum(prod(shape) for shape in self.shapes.values())

    def flatten(self, x: Mapping[str, Tensor]) -> Tensor:
        """[n] from tensors of these shapes, or [n, k] if each has one more, last dimension k.

        Raises:
            ValueError: a name is missing or unknown, or a shape is another.
        """
        if x.keys() != self.shapes.keys():
            missing, unknown = self.shapes.keys() - x.keys(), x.keys() - self.shapes.keys()
            raise ValueError(
                f"the names do not match: missing {sorted(missing)}, unknown {sorted(unknown)}. "
                "Give one tensor for every parameter, zeros where it does not move."
            )
        columns = [value.ndim - len(self.shapes[name]) for name, value in x.items()]
        tail = next(iter(x.values())).shape[-1:] if x and columns[0] == 1 else torch.Size()
        for name, shape in self.shapes.items():
            if x[name].shape != shape + tail:
                raise ValueError(
                    f"the tensor {name!r} must have shape {list(shape + tail)}; got {list(x[name].shape)}."
                )
        return torch.cat([x[name].reshape((shape.numel(), *tail)) for name, shape in self.shapes.items()])

    def split(self, v: Tensor) -> Params:
        """Views of ``v`` [n] by name, or of [n, k] with k as last dimension."""
        return {name: v[self.slices[name]].reshape((*shape, *v.shape[1:])) for name, shape in self.shapes.items()}

    def match(self, pattern: str | Sequence[str]) -> list[str]:
        """The names that a pattern such as ``"encoder.*"``, or one of several, matches.

        Raises:
            ValueError: there is none.
        """
        patterns = [pattern] if isinstance(pattern, str) else list(pattern)
        found = [name for name in self.shapes if any(fnmatchcase(name, p) for p in patterns)]
        if not found:
            names = list(self.shapes)
            shown = ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
            raise ValueError(f"no parameter is named like {pattern!r}. The names are: {shown}.")
        return found

    def restrict(self, names: Sequence[str]) -> Layout:
        """The layout of these names alone, in this layout's order."""
        return Layout({name: shape for name, shape in self.shapes.items() if name in set(names)})


def dot(x: Mapping[str, Tensor], y: Mapping[str, Tensor]) -> Tensor:
    """Inner product, a float64 scalar: sums over millions of float32 products lose digits that ratios need.

    Example:
        >>> x = {"a": torch.ones(2), "b": torch.full((1,), 2.0)}
        >>> dot(x, x).item()
        6.0
    """
    return torch.stack([_dot(x[name], y[name]) for name in x]).sum()


def _dot(x: Tensor, y: Tensor) -> Tensor:
    if x.dtype == y.dtype == torch.float32 and x.numel() <= 2**20:  # no digit is lost yet, in half the time
        return torch.dot(x.flatten(), y.flatten()).double()
    return torch.sum(x * y, dtype=torch.float64)


def scale(factor: float | Tensor, x: Mapping[str, Tensor]) -> Params:
    """``factor * x``."""
    return {name: factor * value for name, value in x.items()}


def add(*terms: tuple[float, Mapping[str, Tensor]]) -> Params:
    """Linear combination ``sum_i c_i x_i`` of trees with the same names.

    Example:
        >>> add((2.0, {"a": torch.ones(1)}), (-1.0, {"a": torch.ones(1)}))
        {'a': tensor([1.])}
    """
    (first, x), *rest = terms
    total = scale(first, x)
    for factor, y in rest:
        for name, value in total.items():
            value.add_(y[name], alpha=factor)
    return total


def is_finite(x: Mapping[str, Tensor] | Sequence[Tensor]) -> bool:
    """Whether every element is a number: one reduction a tensor, one synchronisation in all."""
    tensors = [value.detach() for value in (x.values() if isinstance(x, Mapping) else x) if value.numel()]
    return not tensors or bool(torch.stack([value.abs().amax() for value in tensors]).isfinite().all())
