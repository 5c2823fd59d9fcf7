"""What NumPy, JAX and TensorFlow offer to those who differentiate a function of their arrays.

An array is told by the name of its type; values come from NumPy as copies, and to and from torch by DLPack, where both
libraries look at the same memory and nothing is copied. Derivatives are made by each library in its own way: JAX goes
back by ``vjp``, and for second derivatives forward over that; TensorFlow goes back through a tape, and through a tape
of a tape. NumPy makes none.

Neither JAX nor TensorFlow is imported before :func:`language` is asked for it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["NUMPY", "Array", "Autodiff", "Language", "home", "language"]

Array = Any  # of the other library
Function = Callable[[Array], Array]
Pull = Callable[[Callable[..., Any], Sequence[Array], Any], Sequence[Array]]


@dataclass(frozen=True, slots=True)
class Language:
    """Arrays of another library, and the way back through its functions.

    Args:
        name: "numpy", "jax" or "tensorflow".
        array: a NumPy array as its array, a copy.
        pull: from ``f`` [k arrays -> array, or a list of arrays], the k arrays and weights shaped as the output, the
            gradients of the sum of output times weights, one for each array; None where the library has none.
    """

    name: str
    array: Callable[[Any], Array]
    pull: Pull | None


@dataclass(frozen=True, slots=True)
class Autodiff(Language):
    """A library that differentiates functions of one flat array, in memory shared with torch.

    Args:
        about: how derivatives are made, for the message of a result.
        owns: whether a value is one of its arrays.
        give: a torch tensor as its array, in the same memory: the array must not be changed.
        take: its array as a torch tensor, in the same memory: the tensor must not be changed.
        reshape: of its arrays.
        compile: a function made faster.
        slope: from ``f(x)`` to its gradient, a function of ``x`` [n].
        bend: from ``f(x)`` to ``(x, v) -> H v`` [n].
        rows: from ``f(x)`` to ``(x, V) -> V H`` [k, n].
    """

    about: str
    owns: Callable[[Any], bool]
    give: Callable[[Tensor], Array]
    take: Callable[[Array], Tensor]
    reshape: Callable[[Array, tuple[int, ...]], Array]
    compile: Callable[[Callable[..., Array]], Callable[..., Array]]
    slope: Callable[[Function], Function]
    bend: Callable[[Function], Callable[[Array, Array], Array]]
    rows: Callable[[Function], Callable[[Array, Array], Array]]


def home(value: Any) -> str | None:
    """The library of a value, by the name of its type; None for torch and all else.

    That another module called jax or tensorflow is loaded does not make it the library.

    Example:
        >>> home(np.ones(2)), home(torch.ones(2)), home(1.0)
        ('numpy', None, None)
    """
    return _HOMES.get(type(value).__module__.partition(".")[0])


def language(name: str) -> Autodiff:
    """The library of that name, imported.

    Raises:
        ModuleNotFoundError: it is not installed.
        ValueError: neither "jax" nor "tensorflow".
    """
    if name not in _LANGUAGES:
        raise ValueError(f"language must be one of {', '.join(map(repr, _LANGUAGES))}; got {name!r}.")
    try:
        return _LANGUAGES[name]()
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"a function of {name} arrays needs {name}, which cannot be imported: pip install hesse[{name}]."
        ) from error


def _jax() -> Autodiff:
    jax: Any = importlib.import_module("jax")
    dlpack: Any = importlib.import_module("jax.dlpack")

    def bend(f: Function) -> Callable[[Array, Array], Array]:
        slope = jax.grad(f)
        return lambda x, v: jax.jvp(slope, (x,), (v,))[1]

    def rows(f: Function) -> Callable[[Array, Array], Array]:
        one = bend(f)
        return lambda x, V: jax.vmap(lambda v: one(x, v))(V)

    return Autodiff(
        name="jax",
        array=lambda x: jax.numpy.asarray(np.array(x)),
        pull=lambda f, arrays, weights: jax.vjp(f, *arrays)[1](weights),
        about="JAX autodiff",
        owns=lambda value: isinstance(value, jax.Array),
        give=lambda x: dlpack.from_dlpack(x.detach().contiguous()),
        take=lambda array: torch.utils.dlpack.from_dlpack(jax.block_until_ready(array)),
        reshape=lambda array, shape: array.reshape(shape),
        compile=jax.jit,
        slope=jax.grad,
        bend=bend,
        rows=rows,
    )


def _tensorflow() -> Autodiff:
    tf: Any = importlib.import_module("tensorflow")
    zero = tf.UnconnectedGradients.ZERO

    def pull(f: Callable[..., Any], arrays: Sequence[Array], weights: Any) -> Sequence[Array]:
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            for x in arrays:
                tape.watch(x)
            value = f(*arrays)
        found = tape.gradient(value, list(arrays), weights, unconnected_gradients=zero)
        return [tf.convert_to_tensor(g) for g in found]

    def slope(f: Function) -> Function:
        return lambda x: pull(f, [x], None)[0]

    def bend(f: Function) -> Callable[[Array, Array], Array]:
        return lambda x, v: pull(slope(f), [x], v)[0]

    def rows(f: Function) -> Callable[[Array, Array], Array]:
        def products(x: Array, V: Array) -> Array:
            with tf.GradientTape(persistent=True, watch_accessed_variables=False) as tape:
                tape.watch(x)
                g = slope(f)(x)
            return tf.vectorized_map(lambda v: tape.gradient(g, x, output_gradients=v, unconnected_gradients=zero), V)

        return products

    return Autodiff(
        name="tensorflow",
        array=lambda x: tf.constant(np.array(x)),
        pull=pull,
        about="TensorFlow autodiff",
        owns=lambda value: isinstance(value, tf.Tensor | tf.Variable),
        give=lambda x: tf.experimental.dlpack.from_dlpack(x.detach().contiguous().__dlpack__()),
        take=lambda array: torch.utils.dlpack.from_dlpack(
            tf.experimental.dlpack.to_dlpack(tf.convert_to_tensor(array))
        ),
        reshape=lambda array, shape: tf.reshape(array, shape),
        compile=tf.function,
        slope=slope,
        bend=bend,
        rows=rows,
    )


NUMPY = Language("numpy", np.array, None)
_HOMES = {"jax": "jax", "jaxlib": "jax", "tensorflow": "tensorflow", "numpy": "numpy"}
_LANGUAGES: dict[str, Callable[[], Autodiff]] = {"jax": _jax, "tensorflow": _tensorflow}
