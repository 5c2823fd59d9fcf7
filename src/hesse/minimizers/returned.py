"""What a user's function returned, as a number or a matrix, or a sentence about what it is instead."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["identity_like", "is_sparse", "number", "square"]


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
        except ValueError:
            array = np.asarray(None)
        dtype, shape = str(array.dtype), list(array.shape)
    if "complex" in dtype:
        raise TypeError(f"fun returned a complex number ({dtype}); it must be real. Return .real, or the squared magnitude.")
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


def square(value: Any, x: Tensor) -> Any:
    """The user's Hessian at ``x`` [n]: symmetric, [n, n], a tensor or a scipy.sparse array as it was given.

    Raises:
        TypeError: no matrix of real numbers.
        ValueError: another shape, or not symmetric.
    """
    n = x.numel()
    if not is_sparse(value):
        try:
            value = value.detach() if isinstance(value, Tensor) else torch.as_tensor(np.asarray(value, dtype=np.float64))
        except (TypeError, ValueError):
            raise TypeError(f"hess must return a matrix [{n}, {n}] of real numbers; got {type(value).__name__}.") from None
        if value.numel() == n * n and n == 1:
            value = value.reshape(1, 1)
        value = value.to(x.device, x.dtype)
    if tuple(value.shape) != (n, n):
        raise ValueError(f"hess must return [{n}, {n}], rows and columns in the order of the flattened x; got {list(value.shape)}.")
    off, size = float(abs(value - value.T).max()) if n else 0.0, float(abs(value).max()) if n else 0.0
    # Half the digits: a Hessian by differences has no more.
    if off > torch.finfo(x.dtype).eps ** 0.5 * size:
        raise ValueError(
            f"hess returned a matrix that is not symmetric: H and its transpose differ by {off:.3g}, its largest element is "
            f"{size:.3g}. Second derivatives are symmetric; is one triangle missing, or is it the Jacobian of something else?"
        )
    return value


def is_sparse(H: Any) -> bool:
    """Whether ``H`` is a scipy.sparse matrix, without importing SciPy."""
    return hasattr(H, "tocsc") and not isinstance(H, Tensor)


def identity_like(H: Any) -> Any:
    """The identity of H's kind and size."""
    if is_sparse(H):
        import scipy.sparse

        return scipy.sparse.eye_array(H.shape[0], format="csc")
    return torch.eye(H.shape[0], dtype=H.dtype, device=H.device)
