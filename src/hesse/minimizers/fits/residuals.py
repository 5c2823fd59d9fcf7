"""Residuals and their Jacobian, from whatever the user's function is: the source behind a fit.

The cost 1/2 sum rho is what is minimised; beside it stand the residuals r [m] and their Jacobian J [m, n], from which
the Gauss-Newton model is made. On torch everything comes from the graph of the one forward pass: rows of J by backward
passes; columns, if those are fewer, from the fact that J'u is linear in u, so that its derivative by u is J; a product
J v likewise, if J is too large to form. On arrays J is the user's ``jac`` or differences.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hesse.curvature.dense import dense_hessian, product
from hesse.minimizers.fits.robust import Rho
from hesse.minimizers.functions.border import Border, Named
from hesse.minimizers.functions.differences import Bounds, Memory, jacobian
from hesse.minimizers.functions.function import Counts

__all__ = ["ArrayResiduals", "Evaluated", "Residuals", "TorchResiduals"]

Given = Callable[..., Any]
# Blocks of rows of J are formed at once while their widest tensor is about this large (see hesse.curvature.dense).
BLOCK = 1_250_000


@dataclass
class Evaluated:
    """What one evaluation left behind.

    Args:
        r: [m], without a graph.
        shape: of what the user's function returned.
        rho: the loss there.
        leaf, graph: x [n] and r [m] in torch's graph, where there is one.
        J: [m, n], once formed.
        lifted: u [m] and J'u [n] as a function of it, once formed.
    """

    r: Tensor
    shape: tuple[int, ...]
    rho: Rho
    leaf: Tensor | None = None
    graph: Tensor | None = None
    J: Tensor | None = None
    lifted: tuple[Tensor, Tensor] | None = None


class Residuals:
    """A source of costs (:class:`hesse.minimizers.functions.function.Source`) that knows residuals and Jacobians too.

    Args:
        residual: the user's function.
        border: the user's kind of x.
        loss: of residuals [m].
        args: further arguments of residual and jac.
        jac: the user's Jacobian.
        limit: elements of J from which on it is not formed, where products are to be had.
    """

    without = ""  # where J comes from if the user gives none
    exact = True
    second = True  # products and Hessians come from the graph of the residuals, not from that of the gradient
    name: str

    def __init__(
        self,
        residual: Given,
        border: Border,
        loss: Callable[[Tensor], Rho],
        args: tuple[Any, ...] = (),
        jac: Given | None = None,
        limit: int = 1 << 62,
    ) -> None:
        self.residual, self.border, self.loss, self.args = residual, border, loss, args
        self.jac, self.limit = jac, limit
        self.name = self.without if jac is None else "jac"
        self.counts = Counts()

    def dense(self, at: Evaluated) -> bool:
        """Whether J is formed."""
        return True

    def value(self, x: Tensor) -> tuple[float, Evaluated]:
        """The cost at ``x`` [n]."""
        found = self.evaluate(x)
        return found.rho.cost, found

    def evaluate(self, x: Tensor) -> Evaluated:
        """The residuals at ``x`` [n]."""
        raise NotImplementedError

    def jacobian(self, x: Tensor, at: Evaluated) -> Tensor:
        """J [m, n], formed once."""
        if at.J is None:
            if self.jac is not None:
                at.J = _given(self.jac(self.border.outside(x), *self.args), at, self.border)
            else:
                at.J = self._jacobian(x, at)
        return at.J

    def _jacobian(self, x: Tensor, at: Evaluated) -> Tensor:
        raise NotImplementedError

    def gradient(self, x: Tensor, at: Evaluated) -> Tensor:
        """J' rho' r [n]."""
        weighted = at.rho.weight * at.r
        return self.jacobian(x, at).mT @ weighted if self.dense(at) else self.pull(x, at, weighted)

    def push(self, x: Tensor, at: Evaluated, v: Tensor) -> Tensor:
        """J v [m]."""
        return self.jacobian(x, at) @ v

    def pull(self, x: Tensor, at: Evaluated, u: Tensor) -> Tensor:
        """J' u [n]."""
        return self.jacobian(x, at).mT @ u

    def hessian(self, x: Tensor, at: Evaluated, gradient: Tensor) -> Tensor:
        """Of the cost [n, n], as far as it is known: here without second derivatives of the residuals."""
        J = self.jacobian(x, at)
        return J.mT @ (at.rho.bend[:, None] * J)

    def product(self, x: Tensor, at: Evaluated, gradient: Tensor, v: Tensor) -> Tensor:
        """The same times v [n]."""
        return self.pull(x, at, at.rho.bend * self.push(x, at, v))


class TorchResiduals(Residuals):
    """Residuals of tensors."""

    without = "autodiff"

    def dense(self, at: Evaluated) -> bool:
        return self.jac is not None or at.r.numel() * self.border.x0.numel() <= self.limit

    def evaluate(self, x: Tensor) -> Evaluated:
        leaf = x.detach().clone().requires_grad_(self.jac is None)
        with torch.set_grad_enabled(self.jac is None):
            out = self.residual(self.border.outside(leaf), *self.args)
        if not isinstance(out, Tensor):
            raise _wrong_kind(out, "a tensor of residuals; torch.stack or torch.cat makes one of several")
        _refuse(str(out.dtype).removeprefix("torch."), list(out.shape), str(x.dtype).removeprefix("torch."))
        r = out.detach().reshape(-1)
        at = Evaluated(r, tuple(out.shape), self.loss(r))
        if out.requires_grad:
            with torch.enable_grad():
                at.leaf, at.graph = leaf, out.reshape(-1)
        elif self.jac is None:
            self._refuse_detached(x, out)
        return at

    def _jacobian(self, x: Tensor, at: Evaluated) -> Tensor:
        m, n = at.r.numel(), x.numel()
        if at.graph is None or not m or not n:
            return x.new_zeros(m, n)
        # A column costs two backward passes, the second through a graph that is longer, and a row one.
        lifted = self._lifted(at) if m > 2 * n else None
        if lifted is not None:
            return _rows(lifted[1], lifted[0], torch.eye(n, dtype=x.dtype, device=x.device), m).mT.contiguous()
        return _rows(at.graph, at.leaf, torch.eye(m, dtype=x.dtype, device=x.device), max(m, n))

    def _lifted(self, at: Evaluated) -> tuple[Tensor, Tensor] | None:
        """u and J'u as a function of it, or None where torch cannot differentiate that."""
        if at.lifted is None:
            assert at.graph is not None and at.leaf is not None
            with torch.enable_grad():
                # J'u is linear in u, so any u will do; at zero some formulas (logcumsumexp) give NaN.
                u = torch.ones_like(at.r, requires_grad=True)
                (row,) = torch.autograd.grad(
                    at.graph, at.leaf, u, create_graph=True, allow_unused=True, materialize_grads=True
                )
            # A custom Function without a second derivative raises, or leaves u out without a word: 1'J w = w'w for
            # w = J'1 tells.
            w = row.detach()
            try:
                Jw = _row(row, u, w)
            except RuntimeError:
                return None
            size = float(w @ w)
            if abs(float(Jw.sum()) - size) > torch.finfo(w.dtype).eps ** 0.5 * (size + float(Jw.abs().sum())):
                return None
            at.lifted = u, row
        return at.lifted

    def push(self, x: Tensor, at: Evaluated, v: Tensor) -> Tensor:
        if self.dense(at):
            return super().push(x, at, v)
        if at.graph is None:
            return torch.zeros_like(at.r)
        lifted = self._lifted(at)
        if lifted is None:
            raise RuntimeError(
                f"J [{at.r.numel()}, {x.numel()}] is too large to form, and torch has no products J v with it: "
                "something in residual has no second derivative (a custom autograd.Function marked "
                "once_differentiable). Write it with other operations, or give jac."
            )
        return _row(lifted[1], lifted[0], v)

    def pull(self, x: Tensor, at: Evaluated, u: Tensor) -> Tensor:
        if self.dense(at):
            return super().pull(x, at, u)
        return torch.zeros_like(x) if at.graph is None else _row(at.graph, at.leaf, u)

    def hessian(self, x: Tensor, at: Evaluated, gradient: Tensor) -> Tensor:
        H = super().hessian(x, at, gradient)
        curved, leaf = self._curved(at)
        return H if curved is None else H + dense_hessian(curved, leaf)

    def product(self, x: Tensor, at: Evaluated, gradient: Tensor, v: Tensor) -> Tensor:
        Hv = super().product(x, at, gradient, v)
        curved, leaf = self._curved(at)
        return Hv if curved is None else Hv + product(curved, leaf, v)

    def _curved(self, at: Evaluated) -> tuple[Tensor | None, Tensor]:
        """The gradient of ``<u, r(x)>``, u = rho' r held still: what it depends on x is second derivatives of r."""
        if at.graph is None or at.leaf is None:
            return None, at.r
        with torch.enable_grad():
            (g,) = torch.autograd.grad(
                at.graph, at.leaf, at.rho.weight * at.r, create_graph=True, allow_unused=True, materialize_grads=True
            )
        return g, at.leaf

    def _refuse_detached(self, x: Tensor, out: Tensor) -> None:
        """Residuals without a graph are either constant, or a function that torch was not shown."""
        with torch.no_grad():
            other = self.residual(self.border.outside(x + 0.01 * (1 + x.abs())), *self.args)
        if not torch.equal(other, out):
            raise ValueError(
                "residual depends on x, but its values carry no gradient: something on the way is detached (.detach(), "
                ".data, torch.no_grad(), NumPy, torch.tensor(x)). Compute with tensors throughout, or give jac=."
            )


class ArrayResiduals(Residuals):
    """Residuals of NumPy arrays: J by ``jac``, or by differences that keep what they learnt of noise and scale."""

    without = "differences"

    def __init__(
        self,
        residual: Given,
        border: Border,
        loss: Callable[[Tensor], Rho],
        args: tuple[Any, ...] = (),
        jac: Given | None = None,
        bounds: Bounds | None = None,
    ) -> None:
        super().__init__(residual, border, loss, args, jac)
        self.bounds = bounds
        self.memory: Memory | None = None

    def evaluate(self, x: Tensor) -> Evaluated:
        out = self.residual(self.border.outside(x), *self.args)
        try:
            array = np.asarray(out)
        except ValueError:
            raise _wrong_kind(out, "an array of residuals; the rows have different lengths") from None
        if array.dtype.kind not in "fciub":
            raise _wrong_kind(out, "an array of residuals")
        dtype = str(array.dtype)
        _refuse(dtype, list(array.shape), dtype if array.dtype.itemsize in (4, 8) else "float64")
        r = torch.from_numpy(np.array(array, dtype=array.dtype)).to(x.dtype).reshape(-1)
        return Evaluated(r, array.shape, self.loss(r))

    def _jacobian(self, x: Tensor, at: Evaluated) -> Tensor:
        def values(y: Tensor) -> Tensor:
            self.counts.nfev += 1
            out = np.asarray(self.residual(self.border.outside(y.to(x.dtype)), *self.args), dtype=np.float64)
            return torch.from_numpy(out.copy()).reshape(-1)

        J, _, self.memory = jacobian(values, x.double(), at.r.double(), memory=self.memory, bounds=self.bounds)
        return J.to(x.dtype)


def _rows(values: Tensor, x: Tensor | None, weights: Tensor, widest: int) -> Tensor:
    """``weights @ d values / d x`` [k, numel of x], in blocks of bounded memory."""
    assert x is not None
    size = max(1, BLOCK // (widest * values.element_size()), 8 if values.device.type == "cpu" else 64)
    blocks = []
    for block in weights.split(size):
        try:
            blocks.append(torch.vmap(lambda u: _row(values, x, u))(block))
        except (RuntimeError, ValueError) as error:
            # A custom Function, or an operation with data-dependent control flow; one row at a time still goes.
            if not any(word in str(error) for word in ("vmap", "functorch", "doesn't have storage", "Batched")):
                raise
            blocks.append(torch.stack([_row(values, x, u) for u in block]))
    return torch.cat(blocks)


def _row(values: Tensor, x: Tensor | None, u: Tensor) -> Tensor:
    assert x is not None
    if not values.requires_grad:
        return torch.zeros_like(x)
    (row,) = torch.autograd.grad(values, x, u, retain_graph=True, allow_unused=True)
    return torch.zeros_like(x) if row is None else row


def _given(value: Any, at: Evaluated, border: Border) -> Tensor:
    """The user's Jacobian as [m, n]."""
    m, n, like = at.r.numel(), border.x0.numel(), border.x0
    if isinstance(border, Named) and isinstance(value, Mapping):
        if set(value) != set(border.layout.shapes):
            raise ValueError(f"jac must have the names of x0, {sorted(border.layout.shapes)}; got {sorted(value)}.")
        value = torch.cat([torch.as_tensor(value[name]).reshape(m, -1) for name in border.layout.shapes], 1)
    if hasattr(value, "toarray"):
        value = value.toarray()
    try:
        J = value.detach() if isinstance(value, Tensor) else torch.as_tensor(np.asarray(value, dtype=np.float64))
    except (TypeError, ValueError):
        raise TypeError(f"jac must return a matrix [{m}, {n}] of real numbers; got {type(value).__name__}.") from None
    shape = tuple(J.shape)
    own = (*at.shape, *getattr(border, "shape", (n,)))
    if shape not in ((m, n), own) and not (1 in (m, n) and shape == (m * n,)):
        turned = " It looks like its transpose: rows belong to residuals." if shape == (n, m) else ""
        raise ValueError(f"jac must return [{m}, {n}], residuals by elements of x; got {list(shape)}.{turned}")
    return J.reshape(m, n).to(like.device, like.dtype)


def _wrong_kind(value: Any, wanted: str) -> TypeError:
    if value is None:
        return TypeError("residual returned None; it must return a vector. Is the return statement missing?")
    return TypeError(f"residual must return {wanted}; got {type(value).__name__}.")


def _refuse(dtype: str, shape: list[int], wanted: str) -> None:
    if "complex" in dtype:
        raise TypeError(
            f"residual returned complex numbers ({dtype}); residuals are real. Return the real and imaginary parts "
            "side by side: torch.view_as_real(r), or np.concatenate([r.real, r.imag])."
        )
    if "float" not in dtype:
        raise TypeError(
            f"residual returned integers ({dtype}), which have no derivative; residuals are floats. "
            "Is x rounded, compared or cast on the way?"
        )
    if dtype != wanted:
        raise TypeError(
            f"residual returned {dtype}, and x0 is {wanted}: bring the data and x0 to one dtype. For a fit float64 is "
            "the better choice: x0.double()."
        )
    if not shape:
        raise ValueError(
            "residual returned one number; least squares needs the vector of residuals, before they are squared and "
            "summed. For a function with one value use hesse.minimize; one residual alone is a vector of length 1."
        )
