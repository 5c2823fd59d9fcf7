"""Derivatives of a torch function, from the graph of the forward pass that made its value.

One forward pass is kept a point: the gradient is a backward pass through it, the Hessian and its products are backward
passes through that, several rows at once. Nothing is evaluated twice, and whatever Python the function runs is run
once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hesse.curvature.compressed import CompressedHessian
from hesse.curvature.dense import dense_hessian, product
from hesse.linalg.banded import SparseMatrix
from hesse.minimizers.functions.border import Border
from hesse.minimizers.functions.function import Counts

__all__ = ["Autodiff"]


class Autodiff:
    """A source of derivatives (see :class:`hesse.minimizers.functions.function.Source`) for a function of tensors.

    Args:
        fun: the user's function.
        border: the user's kind of x.
        args: further arguments of fun.
        second: whether second derivatives will be asked for: gradients keep their graph, at twice the cost.
    """

    name = "autodiff"
    exact = True

    def __init__(
        self, fun: Callable[..., Any], border: Border, args: tuple[Any, ...] = (), *, second: bool = True
    ) -> None:
        self.fun, self.border, self.args, self.second = fun, border, args, second
        self.counts = Counts()
        self.sparse: CompressedHessian | None = None

    def value(self, x: Tensor) -> tuple[Any, Any]:
        leaf = x.detach().clone().requires_grad_()
        with torch.enable_grad():
            out = self.fun(self.border.outside(leaf), *self.args)
        if isinstance(out, float):
            raise TypeError(
                "fun returned a Python float, which carries no gradient. Return the tensor itself, without .item() or "
                "float(); or give jac=."
            )
        return out, (leaf, out)

    def gradient(self, x: Tensor, handle: Any) -> Tensor:
        leaf, out = handle
        if not out.requires_grad:
            self._refuse_detached(x, out)
            return torch.zeros_like(x)
        with torch.enable_grad():
            (g,) = torch.autograd.grad(
                out.reshape(()),
                leaf,
                create_graph=self.second,
                retain_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )
        return g

    def hessian(self, x: Tensor, handle: Any, gradient: Tensor) -> Tensor | SparseMatrix:
        leaf = handle[0]
        if self.sparse is not None:
            H = self.sparse.recover(gradient, leaf)
            if self.sparse.holds(H, gradient, leaf):
                return H
            # Another branch of the function was taken, and what depends on what has changed.
            self.sparse = self.trace(x)
        if self.sparse is not None:
            H = self.sparse.recover(gradient, leaf)
            if self.sparse.holds(H, gradient, leaf):
                return H
            self.sparse = None  # part of it leaves torch, where no trace can follow
        full = dense_hessian(gradient, leaf)
        return 0.5 * (full + full.T)

    def trace(self, x: Tensor) -> CompressedHessian | None:
        """How to recover a sparse Hessian near ``x`` from few products, or None where that does not pay."""
        return CompressedHessian.of(lambda y: self.fun(self.border.outside(y), *self.args), x)

    def product(self, x: Tensor, handle: Any, gradient: Tensor, v: Tensor) -> Tensor:
        return product(gradient, handle[0], v)

    def _refuse_detached(self, x: Tensor, out: Tensor) -> None:
        """A value without a graph is either a constant, or a function that torch was not shown."""
        moved = x + 0.01 * (1 + x.abs())
        with torch.no_grad():
            other = self.fun(self.border.outside(moved), *self.args)
        if not torch.equal(torch.as_tensor(other), out):
            raise ValueError(
                "fun depends on x, but its value carries no gradient: something on the way is detached (.detach(), "
                ".data, torch.no_grad(), NumPy, torch.tensor(x)). Compute with tensors throughout, or give jac=."
            )
