"""Where the user's x becomes a flat vector, and the way back.

Inside, x is one tensor [n]. Outside it is what the user gave as ``x0``: a tensor of any shape, a dict of tensors, or
a NumPy array. The type of ``x0`` also says which language the function speaks, for a function of arrays cannot be
differentiated by torch: tensors get autodiff, arrays SciPy's signatures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hesse.minimizers.functions.returned import real
from hesse.tree import Layout

__all__ = ["Arrays", "Border", "Named", "Tensors", "border_of", "described"]

Given = Any  # a tensor, a dict of tensors or a NumPy array: what the user's x0 is


class Border:
    """Flat [n] inside, the user's kind outside.

    Args:
        x0: flat, on its device, in its dtype.
    """

    language = ""

    def __init__(self, x0: Tensor) -> None:
        self.x0 = x0

    def describe(self) -> dict[str, Any]:
        """The kind as JSON, for a saved state."""
        raise NotImplementedError

    def outside(self, x: Tensor) -> Given:
        """``x`` [n] as the user's function takes it."""
        raise NotImplementedError

    def inside(self, value: Given, name: str) -> Tensor:
        """[n] from what the user gave as ``name``, a gradient, product or bound.

        Raises:
            ValueError: another shape.
            TypeError: no real numbers.
        """
        raise NotImplementedError

    def matrix(self, H: Tensor) -> Given:
        """A square [n, n] as the user reads it: a tensor, or an array for arrays."""
        return H


class Tensors(Border):
    """One tensor of any shape."""

    language = "torch"

    def __init__(self, x0: Tensor, shape: Sequence[int]) -> None:
        self.shape = torch.Size(shape)
        super().__init__(x0)

    def describe(self) -> dict[str, Any]:
        return {"kind": "tensor", "shape": list(self.shape)}

    def outside(self, x: Tensor) -> Tensor:
        return x.view(self.shape)

    def inside(self, value: Given, name: str) -> Tensor:
        got = real(value, name).to(self.x0.device, self.x0.dtype)
        if got.shape != self.shape and got.shape != self.x0.shape:
            raise ValueError(f"{name} must have the shape of x0, {list(self.shape)}; got {list(got.shape)}.")
        return got.detach().reshape(-1)


class Named(Border):
    """A dict of tensors, as ``dict(model.named_parameters())`` is one."""

    language = "torch"

    def __init__(self, x0: Tensor, layout: Layout) -> None:
        self.layout = layout
        super().__init__(x0)

    def describe(self) -> dict[str, Any]:
        return {"kind": "dict", "shapes": {name: list(shape) for name, shape in self.layout.shapes.items()}}

    def outside(self, x: Tensor) -> dict[str, Tensor]:
        return self.layout.split(x)

    def inside(self, value: Given, name: str) -> Tensor:
        if isinstance(value, Tensor) and value.shape == self.x0.shape:
            return value.detach().to(self.x0)
        if not isinstance(value, Mapping):
            raise TypeError(f"{name} must be a dict of tensors, as x0 is; got {type(value).__name__}.")
        return self.layout.flatten({key: real(v, name) for key, v in value.items()}).detach().to(self.x0)


class Arrays(Border):
    """A NumPy array of any shape; a number is an array of one, as in SciPy."""

    language = "numpy"

    def __init__(self, x0: Tensor, shape: Sequence[int]) -> None:
        self.shape = tuple(shape)
        super().__init__(x0)

    def describe(self) -> dict[str, Any]:
        return {"kind": "array", "shape": list(self.shape)}

    def outside(self, x: Tensor) -> np.ndarray[Any, Any]:
        # A copy: functions are free to write into their argument.
        return x.numpy().reshape(self.shape).copy()

    def inside(self, value: Given, name: str) -> Tensor:
        got = real(value, name).to(self.x0.dtype)
        if got.shape != self.shape and got.shape != self.x0.shape:
            raise ValueError(f"{name} must have the shape of x0, {list(self.shape)}; got {list(got.shape)}.")
        return got.detach().reshape(-1).clone()

    def matrix(self, H: Tensor) -> np.ndarray[Any, Any]:
        return H.numpy()


def border_of(x0: Given) -> Border:
    """The border of a start.

    Raises:
        TypeError: integers, complex numbers or no numbers at all.
        ValueError: nothing is wrong with the kind, but dtypes or devices differ within the dict.

    Example:
        >>> border = border_of(torch.zeros(2, 3))
        >>> border.x0.shape, border.outside(border.x0).shape
        (torch.Size([6]), torch.Size([2, 3]))
    """
    if isinstance(x0, Mapping):
        for name, value in x0.items():
            if not isinstance(value, Tensor):
                raise TypeError(f"x0 is a dict, so its values must be tensors; x0[{name!r}] is {type(value).__name__}.")
            _refuse_dtype(value.dtype, f"x0[{name!r}]")
        if len({(value.dtype, value.device) for value in x0.values()}) > 1:
            kinds = ", ".join(sorted({f"{value.dtype} on {value.device}" for value in x0.values()}))
            raise ValueError(f"all tensors of x0 must share one dtype and device; got {kinds}.")
        if not x0:
            raise ValueError("x0 is an empty dict: there is nothing to minimise over.")
        layout = Layout.of(x0)
        return Named(layout.flatten({name: value.detach() for name, value in x0.items()}), layout)
    if isinstance(x0, Tensor):
        _refuse_dtype(x0.dtype, "x0")
        return Tensors(x0.detach().reshape(-1).clone(), x0.shape)
    try:
        array = np.atleast_1d(np.asarray(x0))
    except ValueError as error:
        raise TypeError(
            f"x0 must be a tensor, a dict of tensors or an array; got {type(x0).__name__}: {error}."
        ) from None
    if array.dtype == object or array.dtype.kind in "USOMm":
        raise TypeError(f"x0 must be a tensor, a dict of tensors or an array of numbers; got {type(x0).__name__}.")
    if array.dtype.kind != "f":
        raise _wrong_dtype(str(array.dtype), "x0")
    # Always in float64, which costs NumPy no more, and differences need.
    array = array.astype(np.float64, order="C")
    return Arrays(torch.from_numpy(array.reshape(-1)), array.shape)


def described(about: dict[str, Any], x0: Tensor) -> Border:
    """The border of a saved state: ``about`` is what :meth:`Border.describe` said."""
    if about["kind"] == "dict":
        return Named(x0, Layout({name: torch.Size(shape) for name, shape in about["shapes"].items()}))
    return (Arrays if about["kind"] == "array" else Tensors)(x0, about["shape"])


def _refuse_dtype(dtype: torch.dtype, name: str) -> None:
    if dtype not in (torch.float32, torch.float64):
        raise _wrong_dtype(str(dtype), name)


def _wrong_dtype(dtype: str, name: str) -> TypeError:
    if "complex" in dtype:
        remedy = "Minimise over the real and imaginary parts: torch.view_as_real(x0)."
    elif "int" in dtype or "bool" in dtype:
        remedy = "Integers cannot move by small steps: write 1.0 in place of 1, or x0.double()."
    else:
        remedy = "Half precision has too few digits for a solve: use x0.float() or x0.double()."
    return TypeError(f"{name} must be float32 or float64; got {dtype}. {remedy}")
