"""Derivatives by differences: of a function's values, or of the gradient that the user gave."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from hesse.minimizers.functions import differences
from hesse.minimizers.functions.border import Border
from hesse.minimizers.functions.function import Counts
from hesse.minimizers.functions.returned import number

__all__ = ["Numeric"]


class Numeric:
    """A source of derivatives (:class:`hesse.minimizers.functions.function.Source`) of a function that says nothing but
    numbers.

    Args:
        fun: the user's function.
        border: the user's kind of x.
        args: further arguments of fun.
        jac: the user's gradient.
        bounds: within which fun is evaluated.
    """

    second = True

    def __init__(
        self,
        fun: Callable[..., Any],
        border: Border,
        args: tuple[Any, ...] = (),
        jac: Callable[[Any], Any] | None = None,
        bounds: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        self.fun, self.border, self.args, self.jac = fun, border, args, jac
        self.bounds = None if bounds is None else (bounds[0].double(), bounds[1].double())
        self.counts = Counts()
        self.exact = jac is not None
        self.name = "differences of values" if jac is None else "differences of jac"
        self._memory: Any = None
        self._bends: Any = None
        self._error: Tensor | None = None

    def value(self, x: Tensor) -> tuple[Any, Any]:
        returned = self.fun(self.border.outside(x), *self.args)
        return returned, returned

    def gradient(self, x: Tensor, handle: Any) -> Tensor:
        g, self._error, self._memory = self._differences(x, number(handle))
        return g.to(x)

    def hessian(self, x: Tensor, handle: Any, gradient: Tensor) -> Tensor:
        if self.jac is None:
            H, _ = differences.hessian(
                self._counted, x.double(), number(handle), memory=self._memory, bounds=self.bounds
            )
        else:
            H, _, self._bends = differences.hessian_of(
                self._slope, x.double(), gradient.double(), memory=self._bends, bounds=self.bounds
            )
        return H.to(x)

    def product(self, x: Tensor, handle: Any, gradient: Tensor, v: Tensor) -> Tensor:
        return differences.product(self._slope, x.double(), v.double(), gradient.double(), error=self._error).to(x)

    def _differences(self, x: Tensor, value: float) -> tuple[Tensor, Tensor, Any]:
        return differences.gradient(self._counted, x.double(), value, memory=self._memory, bounds=self.bounds)

    def _counted(self, x: Tensor) -> float:
        self.counts.nfev += 1
        return number(self.value(x.to(self.border.x0))[0])

    def _slope(self, x: Tensor) -> Tensor:
        """The gradient at a point on the way to a second derivative."""
        y = x.to(self.border.x0)
        if self.jac is None:
            return self._differences(y, self._counted(y))[0]
        self.counts.njev += 1
        return self.border.inside(self.jac(self.border.outside(y)), "jac").double()
