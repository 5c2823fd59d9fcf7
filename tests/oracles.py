"""Dense Jacobians and Gauss-Newton matrices, one autograd row at a time: slow and obviously right."""

from __future__ import annotations

import torch
from torch import Tensor

from hesse import tree
from hesse.objective import Objective


def flat(x: tree.Params) -> Tensor:
    return torch.cat([value.flatten() for value in x.values()])


def jacobian(objective: Objective) -> Tensor:
    """Derivatives of the outputs in the parameters, in the order of ``objective.params``: [outputs, params]."""
    params = list(objective.params.values())
    outputs = objective.outputs(objective.params).flatten()
    rows = [torch.autograd.grad(y, params, retain_graph=True, materialize_grads=True) for y in outputs]
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])


def loss_hessian(objective: Objective) -> Tensor:
    """Second derivatives of the loss in the outputs: [outputs, outputs]."""
    outputs = objective.outputs(objective.params).detach()
    hessian = torch.autograd.functional.hessian(lambda u: objective.loss_fn(u, objective.targets), outputs)
    return hessian.reshape(outputs.numel(), outputs.numel())


def gauss_newton(objective: Objective) -> Tensor:
    """``J' H_L J``: [params, params]."""
    j = jacobian(objective)
    return j.T @ loss_hessian(objective) @ j


def gradient(objective: Objective) -> tree.Params:
    params = objective.params
    grads = torch.autograd.grad(objective(params), list(params.values()), materialize_grads=True)
    return dict(zip(params, grads, strict=True))


def rows_of(objective: Objective, name: str) -> slice:
    """Where the parameter ``name`` lies in the order of :func:`jacobian`."""
    begin = 0
    for other, p in objective.params.items():
        if other == name:
            return slice(begin, begin + p.numel())
        begin += p.numel()
    raise KeyError(name)


def gradient_differences(objective: Objective, v: Tensor, step: float = 1e-6) -> Tensor:
    """``H v`` from gradients alone, by central differences of fourth order: no second derivative is formed anywhere.

    The step is short, so that no unit crosses the kink of its ReLU.
    """
    params = objective.params
    size = step * max(float(flat(params).detach().norm()), 1.0) / float(v.norm())

    def slope(t: float) -> Tensor:
        parts = v.split([p.numel() for p in params.values()])
        moved = {
            name: (p.detach() + t * size * part.view(p.shape)).requires_grad_()
            for (name, p), part in zip(params.items(), parts, strict=True)
        }
        with objective.at(moved):  # a checkpointed layer runs again during backward
            loss = objective.loss_fn(objective.run_model(), objective.targets)
            grads = torch.autograd.grad(loss, list(moved.values()), materialize_grads=True)
        return torch.cat([g.flatten() for g in grads])

    weights = {1: 2 / 3, 2: -1 / 12}
    return sum(w * (slope(k) - slope(-k)) for k, w in weights.items()) / size
