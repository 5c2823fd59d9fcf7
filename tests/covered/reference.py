"""Hessian and Gauss-Newton products without any second-derivative code: differences of gradients and of outputs.

The model itself is moved and evaluated, one direction at a time, as in plain training: forward pass, ``backward()``.
Nothing of hesse is used.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from covered.subject import Subject

__all__ = ["SEED", "Reference", "directions", "relative_error"]

SEED = 3  # random layers draw the same numbers at every evaluation

# Four points: the error is h^4 f'''''/30 + 1.5 eps f/h, about 1e-12 for values and derivatives near one.
STEP = 1e-3
DENSE = 24


def directions(n: int) -> Tensor:
    """Columns to multiply with: all units [n, n], or six random ones [n, 6] of a larger space.

    A random direction meets every entry of the matrix; units say where it is wrong, at n times the cost.
    """
    if n <= DENSE:
        return torch.eye(n, dtype=torch.float64)
    v = torch.randn(n, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(SEED))
    return v / v.norm(dim=0)


class Reference:
    """The right products of a subject: ``hessian`` and ``ggn`` [n, k] along the columns of ``v`` [n, k]."""

    def __init__(self, subject: Subject, v: Tensor) -> None:
        self.subject = subject.plain or subject
        self.model = self.subject.model
        self.params = [p for p in self.model.parameters() if p.requires_grad]
        self.buffers = {name: b.clone() for name, b in self.model.named_buffers()}
        self.v = v
        self.hessian = self._along(self.gradient)
        self.ggn = self._gauss_newton()

    def outputs(self) -> Tensor:
        """Spectral norm's vectors and BatchNorm's averages move at every call: each starts from the same ones."""
        torch.manual_seed(SEED)
        with torch.no_grad():
            for name, b in self.model.named_buffers():
                b.copy_(self.buffers[name])
        inputs = self.subject.batch[0]
        return self.model(*inputs) if isinstance(inputs, tuple) else self.model(inputs)

    def gradient(self) -> Tensor:
        """[n]"""
        self.model.zero_grad(set_to_none=True)
        self.subject.loss_fn(self.outputs(), self.subject.batch[1]).backward()
        return self._grads()

    def _grads(self) -> Tensor:
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.params]
        self.model.zero_grad(set_to_none=True)
        return torch.cat([(g.to_dense() if g.is_sparse else g).flatten() for g in grads])

    def _gauss_newton(self) -> Tensor:
        j = self._along(lambda: self.outputs().detach().flatten())
        pulled = []
        for u in (self._loss_hessian() @ j).T:
            self.model.zero_grad(set_to_none=True)
            outputs = self.outputs()
            outputs.backward(u.view_as(outputs))
            pulled.append(self._grads())
        return torch.stack(pulled, 1)

    def _loss_hessian(self) -> Tensor:
        outputs = nn.Parameter(self.outputs().detach())

        def gradient() -> Tensor:
            outputs.grad = None
            self.subject.loss_fn(outputs, self.subject.batch[1]).backward()
            return outputs.grad.flatten().clone()

        return _derivative(gradient, [outputs], torch.eye(outputs.numel(), dtype=outputs.dtype))

    def _along(self, evaluate: Callable[[], Tensor]) -> Tensor:
        return _derivative(evaluate, self.params, self.v)


def _derivative(evaluate: Callable[[], Tensor], params: list[nn.Parameter], v: Tensor) -> Tensor:
    """Derivatives [m, k] of ``evaluate`` [m] as ``params`` move along the columns of ``v`` [n, k]."""
    base = [p.detach().clone() for p in params]

    def at(column: Tensor, step: float) -> Tensor:
        parts = (step * column).split([p.numel() for p in params])
        with torch.no_grad():
            for p, b, part in zip(params, base, parts, strict=True):
                p.copy_(b + part.view_as(b))
        return evaluate()

    columns = [(8 * (at(c, STEP) - at(c, -STEP)) - (at(c, 2 * STEP) - at(c, -2 * STEP))) / (12 * STEP) for c in v.T]
    with torch.no_grad():
        for p, b in zip(params, base, strict=True):
            p.copy_(b)
    return torch.stack(columns, 1)


def relative_error(found: Tensor, right: Tensor, model: nn.Module) -> float:
    """The largest, over the parameters, of ``|found - right| / |right|`` in that parameter's rows.

    A parameter of small curvature is judged by its own size, down to a thousandth of the whole: the rounding of the
    reference is that of the whole.
    """
    sizes = [p.numel() for p in model.parameters() if p.requires_grad]
    floor = 1e-3 * float(right.norm()) or 1.0  # where all is zero, the error itself
    pairs = zip((found - right).split(sizes), right.split(sizes), strict=True)
    return float(torch.stack([e.norm() / r.norm().clamp_min(floor) for e, r in pairs]).max())  # NaN stays NaN
