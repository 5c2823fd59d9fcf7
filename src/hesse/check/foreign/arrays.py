"""Derivatives of functions that are not torch's: NumPy with a gradient written by hand, JAX, TensorFlow.

The arrays become torch tensors that are moved in place, and the function is called with arrays of its own library made
from them; then the same differences, limits and names of faults serve as for models. What NumPy's ``jac=`` returns,
``jax.vjp`` and ``tf.GradientTape`` are three ways to the same thing: a gradient to be held against the function.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from hesse.finding import InputError
from hesse.objective.foreign import NUMPY, Array, Language, home, language

__all__ = ["Foreign", "is_foreign"]


def is_foreign(fun: Any, inputs: Any, jac: Any = None) -> bool:
    """Whether a function is one of NumPy, JAX or TensorFlow arrays, as far as its inputs tell.

    Example:
        >>> is_foreign(np.sum, np.ones(3)), is_foreign(torch.sum, torch.ones(3))
        (True, False)
    """
    if isinstance(fun, torch.nn.Module):
        return False
    leaves = _leaves(inputs)
    return jac is not None or (
        any(_home(x) is not None for x in leaves) and not any(isinstance(x, Tensor) for x in leaves)
    )


class Foreign:
    """A function of arrays, as one of live tensors.

    Args:
        fun: ``fun(*inputs)``; with ``jac=True`` it returns the value and the gradient.
        inputs: an array, a tuple or list of arguments, or a mapping of keyword arguments; arguments may be nested. By
            real floating arrays it is differentiated; all else is handed through.
        jac: ``jac(*inputs)``, the gradient shaped as the input, or one for each argument (None for one without); of an
            output that is no scalar the Jacobian, shaped as output and input. None leaves it to JAX or TensorFlow.
        hess: of one array, ``hess(x)`` [n, n], the second derivative.
        seed: of directions, and of the weights that sum an output that is no scalar.

    Raises:
        InputError: there is nothing to differentiate, or no gradient to check.
        TypeError: a function cannot be called.
    """

    def __init__(self, fun: Callable[..., Any], inputs: Any, jac: Any, hess: Any, seed: int) -> None:
        for name, function in (("fun", fun), ("jac", jac), ("hess", hess)):
            if not callable(function) and not (function is None or (name == "jac" and function is True)):
                raise TypeError(
                    f"{name} must be a function{' or True' if name == 'jac' else ''}; got {type(function)}."
                )
        self.fun, self.jac, self.hess = fun, jac, hess
        self.name = getattr(fun, "__name__", "the function")
        self.generator = torch.Generator().manual_seed(seed)
        self.args, self.kwargs = _arguments(inputs)
        self.language = _language([home for x in _leaves(inputs) if (home := _home(x)) is not None])
        self.names: dict[int, str] = {}  # by place among the leaves
        self.tensors: dict[str, Tensor] = {}
        self.whole: list[str] = []  # names of the arguments, in order
        self._enter()
        if not self.tensors:
            what = "No floating array is among the inputs."
            raise InputError("nothing to check", self.name, what, "Convert integers: x.astype(float).")
        if jac is None and self.language.pull is None:
            what = "A NumPy function has no gradient but the one that is given."
            raise InputError(
                "nothing to check", self.name, what, "Give it: jac=gradient, or jac=True if fun returns both."
            )
        self.eps = max(torch.finfo(t.dtype).eps for t in self.tensors.values())
        self.weights: np.ndarray[Any, Any] | None = None
        self.edits = False  # whether fun or jac has written into its input

    @property
    def rule(self) -> Callable[..., Any]:
        """The function that is to blame for a wrong gradient."""
        return self.jac if callable(self.jac) else self.fun

    def value(self) -> Tensor:
        """The outputs times their weights, float64 [n]; the sum is what is differentiated."""
        args, kwargs = self._given()
        value = np.asarray(self._value(*args, **kwargs), dtype=np.float64)
        self._look_for_edits(args, kwargs)
        return torch.from_numpy(np.array(value * self._weights(value)).reshape(-1))

    def gradient(self) -> list[Tensor]:
        """By ``jac``, or by the library; shaped as the tensors, in the same order."""
        args, kwargs = self._given()
        if self.jac is None:
            found = self._pulled(args, kwargs)
        else:
            got = self.fun(*args, **kwargs)[1] if self.jac is True else self.jac(*args, **kwargs)
            found = self._matched(got)
        self._look_for_edits(args, kwargs)
        return found

    def second(self) -> Tensor:
        """What ``hess`` returns, [n, n] float64."""
        ((name, x),) = self.tensors.items()
        args, kwargs = self._given()
        got = self.hess(*args, **kwargs)
        got = got.toarray() if hasattr(got, "toarray") else np.asarray(got)
        H = torch.from_numpy(np.array(got, dtype=np.float64))
        if H.numel() != x.numel() ** 2:
            raise InputError(
                "wrong shape",
                name,
                f"hess returns an array of shape {list(H.shape)} for {x.numel()} elements.",
                f"Return one of [{x.numel()}, {x.numel()}], or of the shape of x twice.",
            )
        return H.reshape(x.numel(), x.numel())

    def bend(self, u: Sequence[Tensor]) -> list[Tensor]:
        """The derivative of the library's gradient along ``u``: the gradient of the gradient times u."""
        assert self.language.pull is not None
        pull = self.language.pull
        flat, arrays, weights = self._flat(*self._given())
        found = pull(lambda *xs: list(pull(flat, xs, weights)), arrays, [self.language.array(v.numpy()) for v in u])
        return [self._tensor(g, name) for g, name in zip(found, self.names.values(), strict=True)]

    def _flat(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Callable[..., Array], list[Array], Array]:
        """The function of the floating arrays alone, these, and the weights of its output."""
        leaves, spec = pytree.tree_flatten((args, kwargs))

        def flat(*arrays: Array) -> Array:
            filled = list(leaves)
            for place, array in zip(self.names, arrays, strict=True):
                filled[place] = array
            new_args, new_kwargs = pytree.tree_unflatten(filled, spec)
            return self.fun(*new_args, **new_kwargs)

        arrays = [leaves[place] for place in self.names]
        value = np.asarray(flat(*arrays))
        return flat, arrays, self.language.array(self._weights(value).astype(value.dtype))

    def _value(self, *args: Any, **kwargs: Any) -> Array:
        value = self.fun(*args, **kwargs)
        if self.jac is True and not (isinstance(value, tuple) and len(value) == 2):
            raise InputError(
                "wrong output",
                self.name,
                f"With jac=True fun returns (value, gradient); got {type(value)}.",
                "Return both.",
            )
        return value[0] if self.jac is True else value

    def _weights(self, value: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        if value.size == 1:
            return np.ones(value.shape)
        if self.weights is None or self.weights.shape != value.shape:
            drawn = torch.randn(value.shape, generator=self.generator, dtype=torch.float64)
            self.weights = drawn.to(torch.float32).numpy().astype(np.float64)  # the same number in either format
        return self.weights

    def _enter(self) -> None:
        """Take the floating arrays as tensors, and give each a name."""
        given = list(self.args) + list(self.kwargs.values())
        names = (_positional(self.fun, len(self.args)) + list(self.kwargs))[: len(given)]
        self.whole = names
        place = 0
        for name, argument in zip(names, given, strict=True):
            for path, leaf in pytree.tree_flatten_with_path(argument)[0]:
                if _home(leaf) is not None or isinstance(leaf, float):
                    array = np.array(np.asarray(leaf))
                    if array.dtype.kind == "f" and array.size:
                        array = array.astype(np.float64) if array.dtype.itemsize > 8 else array
                        array = np.array(np.asarray(self.language.array(array)))  # in the format it will have
                        self.names[place] = name + pytree.keystr(path)
                        self.tensors[self.names[place]] = torch.from_numpy(array)
                place += 1

    def _given(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments for a call, with arrays of the library made anew from the tensors."""
        leaves, spec = pytree.tree_flatten((self.args, self.kwargs))
        for place, name in self.names.items():
            array = np.array(self.tensors[name].numpy())
            scalar = isinstance(leaves[place], float | np.floating)
            leaves[place] = array[()] if scalar else self.language.array(array)
        args, kwargs = pytree.tree_unflatten(leaves, spec)
        return args, kwargs

    def _look_for_edits(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        leaves = pytree.tree_leaves((args, kwargs))
        for place, name in self.names.items():
            if isinstance(leaves[place], np.ndarray) and not np.array_equal(
                leaves[place], self.tensors[name].numpy(), equal_nan=True
            ):
                self.edits = True

    def _pulled(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        """The gradient that the library finds."""
        assert self.language.pull is not None
        found = self.language.pull(*self._flat(args, kwargs))
        return [self._tensor(g, name) for g, name in zip(found, self.names.values(), strict=True)]

    def _matched(self, got: Any) -> list[Tensor]:
        """What ``jac`` returned, one tensor for each input."""
        if len(self.whole) > 1 and isinstance(got, list | tuple) and len(got) == len(self.whole):
            parts = list(got)
        elif len(self.whole) > 1 and isinstance(got, Mapping) and set(got) <= set(self.whole):
            parts = [got.get(name) for name in self.whole]
        elif len(self.whole) == 1 or len(self.tensors) == 1:
            only = next(iter(self.tensors)).split("[")[0].split(".")[0]
            parts = [got if name == only else None for name in self.whole]
        else:
            raise InputError(
                "wrong output",
                getattr(self.rule, "__name__", "jac"),
                f"jac returns {type(got).__name__} for {len(self.whole)} arguments.",
                "Return a tuple with one gradient for each argument, None for those without.",
            )
        found: dict[str, Tensor] = {}
        for name, part in zip(self.whole, parts, strict=True):
            keyed = pytree.tree_flatten_with_path(part)[0] if _home(part) is None else [((), part)]
            if isinstance(part, list | tuple) and name in self.tensors:  # numbers in a list stand for an array
                keyed = [((), np.asarray(part))]
            for path, leaf in keyed:
                if leaf is not None and name + pytree.keystr(path) in self.tensors:
                    found[name + pytree.keystr(path)] = self._tensor(leaf, name + pytree.keystr(path))
        return [found.get(name, torch.zeros_like(t)) for name, t in self.tensors.items()]

    def _tensor(self, got: Any, name: str) -> Tensor:
        """A gradient, or a Jacobian times the weights, shaped as its input."""
        like = self.tensors[name]
        array = np.array(np.asarray(got) if got is not None else np.zeros(like.shape), dtype=np.float64)
        if self.weights is not None and array.size == self.weights.size * like.numel() and self.jac is not None:
            array = self.weights.reshape(-1) @ array.reshape(self.weights.size, like.numel())
        if array.size != like.numel():
            raise InputError(
                "wrong shape",
                name,
                f"The gradient has the shape {list(array.shape)}, {name} {list(like.shape)}.",
                "Return one number for each element; sum over what was broadcast.",
            )
        return torch.from_numpy(array.reshape(like.shape)).to(like.dtype)


# --- the inputs -------------------------------------------------------------------------------------------------------


def _language(homes: Sequence[str]) -> Language:
    """The library of the inputs: NumPy arrays may go beside those of another."""
    names = set(homes) - {"numpy"}
    if len(names) > 1:
        raise TypeError(f"the inputs are arrays of several libraries: {', '.join(sorted(names))}.")
    return language(names.pop()) if names else NUMPY


def _home(x: Any) -> str | None:
    """The library of an array."""
    return home(x) if hasattr(x, "dtype") else None


def _leaves(inputs: Any) -> list[Any]:
    return pytree.tree_leaves(inputs)


def _arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)), {}


def _positional(function: Any, count: int) -> list[str]:
    """Names of the first arguments."""
    while isinstance(function, functools.partial):
        function = function.func
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        parameters = {}.values()
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)][:count]
    return names + [f"input {i}" for i in range(len(names), count)]
