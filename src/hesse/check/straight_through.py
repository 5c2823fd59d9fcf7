"""Gradients that are meant to differ from the derivative, declared where they are made.

Rounding has slope zero almost everywhere, so quantised nets send the gradient straight through it (Bengio,
Leonard and Courville 2013); reversal layers change its sign (Ganin and Lempitsky 2015). No check can tell such an
estimator from a fault. Declared, it is accepted as it is, and everything around it is still checked.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

from torch import nn
from torch.autograd import Function

__all__ = ["declared", "straight_through", "watching"]

T = TypeVar("T")
MARK = "__hesse_straight_through__"

Watcher = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
_watcher: ContextVar[Watcher | None] = ContextVar("watcher", default=None)


def straight_through(obj: T) -> T:
    """Declare that the gradient of ``obj`` is not its derivative, on purpose. Usable as a decorator.

    Args:
        obj: a subclass of :class:`torch.autograd.Function` (or its ``apply``), a subclass of
            :class:`torch.nn.Module`, one module, or a function of tensors.

    Returns:
        ``obj`` itself, marked; of a function, one that does the same and can be recognised.

    Raises:
        TypeError: ``obj`` cannot be called.

    Example:
        >>> import torch
        >>> from hesse.check import gradients
        >>> def rounded(x):
        ...     return x + (x.round() - x).detach()
        >>> x = torch.linspace(-2, 2, 7)
        >>> gradients(lambda x: rounded(x).square().sum(), x).ok
        False
        >>> rounded = straight_through(rounded)
        >>> gradients(lambda x: rounded(x).square().sum(), x).ok
        True
    """
    owner = getattr(obj, "__self__", None)
    if isinstance(owner, type) and issubclass(owner, Function):  # Function.apply
        setattr(owner, MARK, True)
        return obj
    if isinstance(obj, nn.Module) or (isinstance(obj, type) and issubclass(obj, Function | nn.Module)):
        object.__setattr__(obj, MARK, True) if isinstance(obj, nn.Module) else setattr(obj, MARK, True)
        return obj
    if not callable(obj):
        raise TypeError(f"straight_through() takes a Function, a module or a function; got {type(obj)}.")
    function: Callable[..., Any] = obj

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        watcher = _watcher.get()
        return function(*args, **kwargs) if watcher is None else watcher(function, args, kwargs)

    setattr(call, MARK, True)
    return call  # type: ignore[return-value]


def declared(obj: Any) -> bool:
    """Whether the gradient of a Function, module or function has been declared."""
    return bool(getattr(obj, MARK, False))


@contextmanager
def watching(watcher: Watcher) -> Iterator[None]:
    """Inside, ``watcher(function, args, kwargs)`` stands for each call of a declared function."""
    token = _watcher.set(watcher)
    try:
        yield
    finally:
        _watcher.reset(token)
