"""What a user's function returned, as a number or a matrix, or a sentence about what it is instead."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from hesse.linalg.banded import SparseMatrix

__all__ = ["number", "real", "square"]


def number(value: Any) -> float:
    """One real number.

    Raises:
        TypeError: nothing was returned, or an integer or a complex number.
        ValueError: several numbers.

    Example:
        >>> number(torch.tensor([2.5]))
        2.5
    """
    if value is None:
        raise TypeError("fun returned None; it must return one number. Is the return statement missing?")
    if isinstance(value, Tensor):
        dtype, shape = str(value.dtype), list(value.shape)
    else:
        try:
            array = np.asarray(value)
        except (ValueError, RuntimeError):  # ragged, or a tuple of tensors that carry gradients
            array = np.asarray(None)
        dtype, shape = str(array.dtype), list(array.shape)
    if "complex" in dtype:
        raise TypeError(
            f"fun returned a complex number ({dtype}); it must be real. Return .real, or the squared magnitude."
        )
    if "int" in dtype or "bool" in dtype:
        raise TypeError(
            f"fun returned an integer ({dtype}), which has no derivative; it must be a float. "
            "Is x rounded, compared or cast on the way?"
        )
    if "float" not in dtype:
        raise TypeError(f"fun returned {type(value).__name__}; it must return one real number.")
    if int(np.prod(shape)) != 1:
        raise ValueError(
            f"fun returned shape {shape}; it must return one number. Sum the residuals' squares, or give the residuals "
            "to hesse.least_squares (or method='lm'); for one value a row, batched=True."
        )
    return float(value.detach()) if isinstance(value, Tensor) else float(np.asarray(value).reshape(()))


def square(value: Any, x: Tensor) -> Tensor | SparseMatrix:
    """The user's Hessian at ``x`` [n]: symmetric, [n, n], sparse if it was.

    Raises:
        TypeError: no matrix of real numbers.
        ValueError: another shape, or not symmetric.
    """
    n = x.numel()
    if is_sparse(value):
        value = SparseMatrix.of(value, x.dtype)
    else:
        value = real(value, "hess").to(x.device, x.dtype)
        value = value.reshape(1, 1) if value.numel() == n == 1 else value
    if tuple(value.shape) != (n, n):
        raise ValueError(
            f"hess must return [{n}, {n}], rows and columns in the order of the flattened x; got {list(value.shape)}."
        )
    numbers = value.data if isinstance(value, SparseMatrix) else value
    if not bool(numbers.isfinite().all()):
        raise ValueError("hess returned NaN or infinity where fun and its gradient are finite.")
    off, size = asymmetry(value), float(numbers.abs().max()) if numbers.numel() else 0.0
    # Half the digits: a Hessian by differences has no more.
    if off > torch.finfo(x.dtype).eps ** 0.5 * size:
        raise ValueError(
            f"hess returned a matrix that is not symmetric: H and its transpose differ by {off:.3g}, its largest "
            f"element is {size:.3g}. Second derivatives are symmetric: is one triangle missing, or is it another "
            "function's Jacobian?"
        )
    return value


def real(value: Any, name: str) -> Tensor:
    """A detached tensor of real numbers from a tensor or whatever NumPy can read.

    Raises:
        TypeError: nothing, text or complex numbers.
    """
    if isinstance(value, Tensor):
        got = value.detach()
    else:
        array = _array(value)
        if array is None:
            raise TypeError(f"{name} must be real numbers; got {type(value).__name__}.")
        got = torch.as_tensor(array)
    if got.is_complex():
        raise TypeError(f"{name} must be real; got {got.dtype}.")
    return got


def _array(value: Any) -> np.ndarray[Any, Any] | None:
    """What NumPy reads as real or complex floating-point numbers, or None."""
    if value is None:
        return None
    try:
        array = np.asarray(value)
        return array if array.dtype.kind in "fc" else array.astype(np.float64)
    except (TypeError, ValueError):
        return None


def asymmetry(H: Tensor | SparseMatrix) -> float:
    """The largest difference of an element and its mirror image."""
    if isinstance(H, SparseMatrix):
        return float(abs(H.scipy - H.scipy.T).max()) if H.data.numel() else 0.0
    return float((H - H.T).abs().max()) if H.numel() else 0.0


def is_sparse(H: Any) -> bool:
    """Whether ``H`` is a scipy.sparse matrix, without importing SciPy."""
    return hasattr(H, "tocsr") and not isinstance(H, Tensor)
