"""The Jacobian of a model's outputs as a product ``J v``, each way of forming it.

From the kept graph: the backward pass ``J' u`` is linear in u, so its derivative by u along v is ``J v``; two backward
passes, the second as cheap as a forward pass. By dual numbers: one forward pass that carries tangents, and keeps
nothing. By differences of outputs, where torch has neither.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.autograd.forward_ad as fw
from torch import Tensor
from torch.utils import _pytree as pytree

from hesse.curvature.differences import directional, step_for
from hesse.curvature.product import differentiable, gradients
from hesse.objective import Objective
from hesse.tree import Params

__all__ = ["JACOBIANS", "Jacobian", "JacobianOf", "jvp", "secant"]


@dataclass(frozen=True)
class Jacobian:
    """``v -> J v`` at one batch.

    Args:
        apply: from named tensors to one tensor for each output that depends on parameters.
        at_once: the same for k vectors, with a leading dimension each, where there is a way.
        errors: of products by differences, the estimated relative errors.
    """

    apply: Callable[[Params], list[Tensor]]
    at_once: Callable[[Params], list[Tensor]] | None = None
    errors: list[float] = field(default_factory=list)


JacobianOf = Callable[[Objective, Params, Any], Jacobian]


def double_backward(objective: Objective, params: Params, outputs: Any) -> Jacobian:
    """From the graph of ``outputs``, kept between products."""
    leaves = differentiable(outputs)
    with torch.enable_grad(), objective.at(params):
        # J' u is linear in u, so any u will do; at zero some formulas (logcumsumexp) give NaN.
        u = {str(i): torch.ones_like(x, requires_grad=True) for i, x in enumerate(leaves)}
        found = gradients(leaves, params, list(u.values()), create=True)
    rows = {name: row for name, row in zip(params, found, strict=True) if row is not None}

    def apply(v: Params, batched: bool = False) -> list[Tensor]:
        live = [name for name in v if name in rows]
        with objective.at(params):
            tangents = gradients([rows[name] for name in live], u, [v[name] for name in live], batched=batched)
        k = next(iter(v.values())).shape[:1] if batched else ()
        return [x.new_zeros(*k, *x.shape) if t is None else t for x, t in zip(leaves, tangents, strict=True)]

    return Jacobian(apply, lambda v: apply(v, batched=True))


def forward(objective: Objective, params: Params, outputs: Any) -> Jacobian:
    """By dual numbers, one forward pass a product."""
    moving = _moving(outputs)

    def apply(v: Params) -> list[Tensor]:
        found = _tangents(objective, params, v)
        return [found[i] for i in moving]

    return Jacobian(apply)


def differences(objective: Objective, params: Params, outputs: Any) -> Jacobian:
    """By differences of outputs, with the error they estimate of themselves."""
    moving = _moving(outputs)
    errors: list[float] = []

    def apply(v: Params) -> list[Tensor]:
        def at(t: float) -> Params:
            moved = {name: params[name] + t * u for name, u in v.items()}
            with torch.no_grad():
                found = pytree.tree_leaves(objective.outputs({**params, **moved}))
            return {str(i): found[i] for i in moving}

        value, error = directional(at, step_for(params, v, next(iter(v.values())).dtype))
        errors.append(error)
        return list(value.values())

    return Jacobian(apply, errors=errors)


def jvp(objective: Objective, direction: Params) -> Tensor:
    """``J v`` for a model with one output tensor, once: the derivative of the outputs along ``direction``.

    By dual numbers; where an operation has no forward derivative, from the graph of the backward pass.

    Example:
        The outputs of a linear layer are linear in its weight:

        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> objective = Objective(model, torch.nn.functional.mse_loss, torch.tensor([[3.0, 4.0]]), torch.zeros(1, 1))
        >>> jvp(objective, {"weight": torch.tensor([[1.0, 1.0]])})
        tensor([[7.]])
    """
    params = objective.params
    try:
        (tangent,) = _tangents(objective, params, direction)
    except (NotImplementedError, RuntimeError) as error:
        if "forward" not in str(error):
            raise
        with torch.enable_grad():
            outputs = objective.outputs(params)
        (tangent,) = double_backward(objective, params, outputs).apply(direction)
    return tangent


def secant(objective: Objective, outputs: Tensor, direction: Params) -> Tensor:
    """``J v`` from one more forward pass, ``(z(x + h v) - z(x)) / h``: a third of the time of :func:`jvp`.

    The step h moves the parameters by ``sqrt(eps) / 2`` of their length, where truncation and rounding of smooth
    networks balance: three to four digits of a product in float32. Kernels of less precision than their outputs
    (autocast, TF32) have none left; whoever uses this compares with :func:`jvp` now and then.

    Args:
        outputs: z(x), computed by the very kernels that ``objective.outputs`` uses.

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> objective = Objective(model, torch.nn.functional.mse_loss, torch.tensor([[3.0, 4.0]]), torch.zeros(1, 1))
        >>> outputs = objective.outputs(objective.params).detach()
        >>> round(secant(objective, outputs, {"weight": torch.tensor([[1.0, 1.0]])}).item(), 1)
        7.0
    """
    params = {name: p.detach() for name, p in objective.params.items()}
    size, length = (torch.stack(torch._foreach_norm(list(x.values()))).norm().item() for x in (params, direction))
    if length == 0.0:
        return torch.zeros_like(outputs)
    step = 0.5 * torch.finfo(outputs.dtype).eps ** 0.5 * max(size, 1e-3) / length
    names = list(direction)
    moved = torch._foreach_add([params[name] for name in names], [direction[name] for name in names], alpha=step)
    with torch.enable_grad():  # a model may differentiate its own network on the way forward
        there = objective.outputs({**params, **dict(zip(names, moved, strict=True))}).detach()
    return (there - outputs) / step


def _tangents(objective: Objective, params: Params, v: Params) -> list[Tensor]:
    """The derivatives along ``v`` of all tensors in the outputs."""
    with torch.no_grad(), fw.dual_level():
        duals = {name: fw.make_dual(p.detach(), v[name]) if name in v else p.detach() for name, p in params.items()}
        pairs = [fw.unpack_dual(x) for x in pytree.tree_leaves(objective.outputs(duals))]
        return [torch.zeros_like(x) if t is None else t for x, t in pairs]


def _moving(outputs: Any) -> list[int]:
    """Which leaves of the outputs depend on parameters."""
    return [i for i, x in enumerate(pytree.tree_leaves(outputs)) if isinstance(x, Tensor) and x.requires_grad]


JACOBIANS: dict[str, JacobianOf] = {
    "double-backward": double_backward,
    "forward": forward,
    "differences": differences,
}
