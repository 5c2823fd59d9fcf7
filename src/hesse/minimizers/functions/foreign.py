"""Functions of JAX arrays and of TensorFlow tensors, differentiated by their own libraries.

The type of ``x0`` says whose function it is. Three things of it are made there, on one flat array: the value, the
gradient, and the gradient's derivative along a vector, or along several at once, of which the Hessian is the case of
all unit vectors. How each library makes them, and shares its memory with torch, is in :mod:`hesse.objective.foreign`.

Functions are compiled (``jax.jit``, ``tf.function``), since second derivatives operation by operation take 10 to 500
times as long, and the first call no less. What cannot be compiled (Python branches on values, NumPy inside) runs as it
is. Compiling needs what these libraries ask of every function: it depends on x alone, and side effects do not matter.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hesse.minimizers.functions.border import Border
from hesse.minimizers.functions.function import Counts
from hesse.objective.foreign import Array, Autodiff, home, language
from hesse.tree import Layout

__all__ = ["Foreign", "ForeignBorder", "foreign_border", "language", "language_of"]

BLOCK = 1 << 22  # elements of the Hessian formed at once
# What tracing raises, and what may be the user's own mistake: that one comes again when the function runs as it is.
UNTRACEABLE = (TypeError, ValueError, AttributeError, IndexError, NotImplementedError)


def language_of(x0: Any) -> Autodiff | None:
    """The library of ``x0``, an array or a dict of arrays; None for torch, NumPy and all else.

    Raises:
        TypeError: a dict of arrays of several libraries, or a nested one.

    Example:
        >>> language_of(torch.zeros(2)) is None
        True
    """
    values = list(x0.values()) if isinstance(x0, Mapping) else [x0]
    if any(isinstance(value, Mapping) and language_of(value) is not None for value in values):
        raise TypeError(
            "x0 is a dict of dicts; it must be an array or one dict of arrays. Flatten it, with "
            "jax.flatten_util.ravel_pytree or tf.nest.flatten, and build the parameters inside fun."
        )
    names = {name for value in values if (name := home(value)) is not None and name != "numpy"}
    if not names:
        return None
    own = language(names.pop())
    if names or not all(own.owns(value) for value in values):
        kinds = ", ".join(sorted({f"{type(v).__module__.split('.')[0]}.{type(v).__name__}" for v in values}))
        raise TypeError(f"x0 must be an array of {own.name}, or a dict of such; got {kinds}.")
    return own


# --- x ----------------------------------------------------------------------------------------------------------------


class ForeignBorder(Border):
    """Flat torch tensors inside, arrays of another library outside.

    Args:
        x0: [n], float32 or float64.
        own: the library.
        layout: names and shapes; the name of a lone array is empty.
    """

    def __init__(self, x0: Tensor, own: Autodiff, layout: Layout) -> None:
        self.own, self.layout, self.language = own, layout, own.name
        super().__init__(x0)

    def describe(self) -> dict[str, Any]:
        return {"kind": self.own.name, "shapes": {name: list(shape) for name, shape in self.layout.shapes.items()}}

    def build(self, x: Array) -> Any:
        """The user's x from a flat array of the library; derivatives go through it."""
        parts = {
            name: self.own.reshape(x[place], tuple(self.layout.shapes[name]))
            for name, place in self.layout.slices.items()
        }
        return parts[""] if list(parts) == [""] else parts

    def outside(self, x: Tensor) -> Any:
        return self.build(self.own.give(x))

    def inside(self, value: Any, name: str) -> Tensor:
        parts = dict(value) if isinstance(value, Mapping) else {"": value}
        flat = {}
        for key, part in parts.items():
            where = f"{name}[{key!r}]" if key else name
            if self.own.owns(part):
                part = self.own.take(part)
            got = part if isinstance(part, Tensor) else torch.as_tensor(np.array(part))
            if not got.is_floating_point():
                raise TypeError(f"{where} must be real numbers, shaped as x0; got {got.dtype}.")
            flat[key] = got.detach().to(self.x0.device, self.x0.dtype)
        if list(flat) == [""] and flat[""].shape == self.x0.shape:
            return flat[""]
        shapes = {key: part.shape for key, part in flat.items()}
        if shapes != self.layout.shapes:
            wanted, got_ = (
                ", ".join(f"{k} {list(s)}".strip() for k, s in t.items()) for t in (self.layout.shapes, shapes)
            )
            raise ValueError(f"{name} must have the shape of x0, {wanted}; got {got_}.")
        return torch.cat([flat[key].reshape(-1) for key in self.layout.shapes])

    def matrix(self, H: Tensor) -> Array:
        return self.own.give(H)


def foreign_border(x0: Any, own: Autodiff) -> ForeignBorder:
    """The border of a start.

    Args:
        x0: an array of the library, or a dict of such.
        own: as :func:`language_of` found it.

    Raises:
        TypeError: not float32 or float64, or float64 that the library would round.
        ValueError: several dtypes, or an empty dict.
    """
    named = dict(x0) if isinstance(x0, Mapping) else {"": x0}
    kinds = {str(getattr(value.dtype, "name", value.dtype)) for value in named.values()}
    for name, value in named.items():
        where, kind = f"x0[{name!r}]" if name else "x0", str(getattr(value.dtype, "name", value.dtype))
        if kind not in ("float32", "float64"):
            raise TypeError(
                f"{where} must be float32 or float64; got {kind}. Integers cannot move by small steps, and half "
                "precision has too few digits for a solve: convert it (x0.astype, tf.cast)."
            )
        if own.name == "jax" and kind == "float64" and not importlib.import_module("jax").config.jax_enable_x64:
            raise TypeError(
                f"{where} is float64, but JAX computes in float32 as it is set up. Call "
                "jax.config.update('jax_enable_x64', True) before any array is made, or give a float32 start."
            )
    if len(kinds) != 1:
        raise ValueError(f"all arrays of x0 must share one dtype; got {', '.join(sorted(kinds)) or 'an empty dict'}.")
    flat = {name: own.take(value) for name, value in named.items()}
    layout = Layout({name: value.shape for name, value in flat.items()})
    # Joining them copies: x0 may be a variable, whose memory goes on changing.
    return ForeignBorder(torch.cat([value.reshape(-1) for value in flat.values()]), own, layout)


# --- the function -----------------------------------------------------------------------------------------------------


class Foreign:
    """A source of derivatives (:class:`hesse.minimizers.functions.function.Source`) of another library's function.

    Args:
        fun: the user's function.
        border: of the user's x.
        args: further arguments of fun.
    """

    def __init__(self, fun: Callable[..., Array], border: ForeignBorder, args: tuple[Any, ...] = ()) -> None:
        own = border.own
        self.own, self.name = own, own.about
        self.counts, self.second, self.exact = Counts(), True, True
        if border.x0.dtype == torch.float32 and own.name == "jax":
            self.name += (
                " in float32 (jax.config.update('jax_enable_x64', True) and a float64 x0 give twice the digits)"
            )

        def flat(x: Array) -> Array:
            return fun(border.build(x), *args)

        self._value = _fast(own, flat)
        self._slope = _fast(own, own.slope(flat))
        self._bend = _fast(own, own.bend(flat))
        self._rows = _fast(own, own.rows(flat))

    def value(self, x: Tensor) -> tuple[Any, Any]:
        """What fun returned at x [n], and x as it was given to it."""
        given = self.own.give(x)
        return self._value(given), given

    def gradient(self, x: Tensor, handle: Array) -> Tensor:
        """[n]"""
        return self.own.take(self._slope(handle))

    def product(self, x: Tensor, handle: Array, gradient: Tensor, v: Tensor) -> Tensor:
        """H v [n]"""
        return self.own.take(self._bend(handle, self.own.give(v)))

    def hessian(self, x: Tensor, handle: Array, gradient: Tensor) -> Tensor:
        """[n, n], symmetrised; rows in blocks of bounded memory."""
        n = x.numel()
        size = min(n, max(1, BLOCK // max(n, 1)))
        blocks = []
        for start in range(0, n, size):
            # Blocks of one shape, for each shape is compiled anew.
            seeds = x.new_zeros(size, n)
            stop = min(start + size, n)
            seeds[: stop - start, start:stop].fill_diagonal_(1)
            blocks.append(self.own.take(self._rows(handle, self.own.give(seeds)))[: stop - start])
        H = torch.cat(blocks) if blocks else x.new_zeros(n, n)
        return (H + H.T) / 2


def _fast(own: Autodiff, function: Callable[..., Array]) -> Callable[..., Array]:
    """The function compiled, or as it is from the first time on that it cannot be."""
    compiled: Callable[..., Array] | None = own.compile(function)

    def call(*args: Array) -> Array:
        nonlocal compiled
        if compiled is not None:
            try:
                return compiled(*args)
            except UNTRACEABLE:
                found = function(*args)  # raises again what is not due to tracing
                compiled = None
                return found
        return function(*args)

    return call
