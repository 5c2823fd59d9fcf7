"""A function of many rows at once, [B, ...] to [B], and its derivatives row by row.

Where row b of the result depends on row b of x only, the gradient of the sum holds the gradients of all rows, and the
Hessian of the sum is block diagonal: a product with the i-th unit vector of every row at once gives the i-th column of
all blocks. So B Hessians cost n products, whatever B. Whether rows are independent is tested before it is believed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor

from hesse.curvature.dense import products
from hesse.tree import Layout

__all__ = ["Batch", "Rows"]


class Rows:
    """The user's function on rows [A, n], all of them or, if it does not mind, some.

    Args:
        fun: the user's.
        x0: the user's.
    """

    def __init__(self, fun: Callable[[Any], Tensor], x0: Tensor | Mapping[str, Tensor]) -> None:
        self.fun = fun
        named = dict(x0) if isinstance(x0, Mapping) else {"": x0}
        sizes = set()
        for name, value in named.items():
            where = f"x0[{name!r}]" if name else "x0"
            if not isinstance(value, Tensor) or value.dtype not in (torch.float32, torch.float64):
                kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
                raise TypeError(
                    f"batched=True differentiates by torch: {where} must be a float32 or float64 tensor; got {kind}."
                )
            if value.ndim == 0:
                raise ValueError(f"batched=True needs starts [B, ...] with the batch first; {where} is one number.")
            sizes.add(len(value))
        if len(sizes) != 1 or len({(v.dtype, v.device) for v in named.values()}) != 1:
            found = ", ".join(f"{list(v.shape)} {v.dtype} {v.device}" for v in named.values())
            raise ValueError(
                f"all tensors of x0 must share dtype, device and first dimension B; got {found or 'none'}."
            )
        self.single = not isinstance(x0, Mapping)
        self.layout = Layout({name: value.shape[1:] for name, value in named.items()})
        self.start = torch.cat([v.detach().reshape(len(v), prod(v.shape[1:])) for v in named.values()], 1)
        self.count = sizes.pop()
        self.movable = False
        self.nfev = self.njev = self.nhev = 0

    def at(self, x: Tensor, places: Tensor, all_x: Tensor) -> Batch:
        """The function at ``x`` [A, n] for the rows at ``places`` [A]; the others stay where they are in ``all_x``."""
        if self.movable:
            return Batch(self, x, torch.arange(len(x), device=x.device))
        whole = all_x.clone()
        whole[places] = x
        return Batch(self, whole, places)

    def outside(self, x: Tensor) -> Any:
        """[A, n] as the user's fun takes it."""
        parts = {
            name: x[:, place].reshape(len(x), *self.layout.shapes[name]) for name, place in self.layout.slices.items()
        }
        return parts[""] if self.single else parts

    def values(self, x: Tensor) -> Tensor:
        """fun at rows [A, n]: [A].

        Raises:
            TypeError, ValueError: it returned anything else.
        """
        self.nfev += 1
        out = self.fun(self.outside(x))
        if not isinstance(out, Tensor) or not out.is_floating_point():
            kind = out.dtype if isinstance(out, Tensor) else type(out).__name__
            raise TypeError(f"fun must return a tensor [B] of real numbers, one for each row of x; got {kind}.")
        if out.shape != (len(x),):
            hint = " Sum over all dimensions but the first, as in value.flatten(1).sum(1)."
            if out.ndim == 0:
                hint = " It added up the rows: sum over all dimensions but the first."
            raise ValueError(f"fun must return one value for each row of x, [{len(x)}]; got {list(out.shape)}.{hint}")
        return out

    def probe(self) -> None:
        """Find out whether rows depend on each other (then raise), and whether fun minds where they are.

        Raises:
            ValueError: the value of some row changes when other rows do.
        """
        if self.count < 2:
            return
        x, generator = self.start, torch.Generator().manual_seed(0)
        # Away from the start: there rows may agree by chance, all zero for instance, that are different problems.
        draws = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)
        other = x + 0.01 * (1 + x.abs()) * draws
        here, there = self.values(x), self.values(other)
        turn = torch.arange(self.count, device=x.device) % 2 == 0
        mixed = self.values(torch.where(turn[:, None], x, other))
        wrong = ~_same(mixed, torch.where(turn, here, there))
        if bool(wrong.any()):
            row = int(wrong.nonzero()[0])
            raise ValueError(
                f"the rows of fun depend on each other: its value for row {row} changes when other rows of x change "
                "(or each time it is called). A mean or a norm over the batch, batch normalisation, or a random number "
                "would do that. Make row b of the result a function of row b of x, or minimise the sum, without "
                "batched=True."
            )
        some = torch.arange(self.count - 1, (self.count - 1) // 2, -1, device=x.device)
        try:
            moved = self.values(other[some])
        except (RuntimeError, ValueError, IndexError):
            return  # fun holds something for each row, and fewer rows do not fit it
        self.movable = bool(there[some].isfinite().any()) and bool(_same(moved, there[some]).all())


class Batch:
    """The function at some rows, with the graph of its derivatives.

    Args:
        rows: the function.
        x: [K, n], the rows that it is evaluated at.
        wanted: [A], those of them that are asked for.
    """

    def __init__(self, rows: Rows, x: Tensor, wanted: Tensor) -> None:
        self.rows, self.shape, self.wanted = rows, x.shape, wanted
        self.leaf = x.detach().reshape(-1).clone().requires_grad_()
        with torch.enable_grad():
            self.out = rows.values(self.leaf.view(self.shape))
        self.f = self.out.detach()[wanted].double()
        self._slope: Tensor | None = None

    def _gradient(self) -> Tensor:
        if self._slope is None:
            self.rows.njev += 1
            if not self.out.requires_grad:
                raise TypeError(
                    "fun returned a tensor without a gradient: it does not depend on x, or something on the way is "
                    "detached (.detach(), .data, torch.no_grad(), NumPy, torch.tensor(x)). Compute with tensors "
                    "throughout."
                )
            with torch.enable_grad():
                (self._slope,) = torch.autograd.grad(
                    self.out.sum(), self.leaf, create_graph=True, allow_unused=True, materialize_grads=True
                )
        return self._slope

    def gradient(self) -> Tensor:
        """[A, n]"""
        return self._gradient().detach().view(self.shape)[self.wanted]

    def hessians(self) -> Tensor:
        """[A, n, n], symmetric."""
        slope = self._gradient()
        self.rows.nhev += 1
        count, n = self.shape
        units = torch.eye(n, dtype=slope.dtype, device=slope.device).repeat(count, 1)
        H = products(slope, self.leaf, units).view(count, n, n)[self.wanted]
        return (H + H.mT) / 2


def _same(a: Tensor, b: Tensor) -> Tensor:
    # A product of matrices rounds otherwise when they have other rows.
    eps = torch.finfo(a.dtype).eps
    largest = float(torch.where(a.isfinite(), a.abs(), 0.0).max())
    return torch.isclose(a, b, rtol=100 * eps, atol=eps * largest, equal_nan=True)
