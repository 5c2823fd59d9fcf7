"""The Hessian of a loss as an operator, each way of forming its product, and which one to trust.

Double backward keeps the graph of the gradient and walks it once a product; it is the cheapest and works on the module
itself, hooks and all. Forward over reverse, a directional derivative of the gradient, covers operations whose backward
pass torch cannot differentiate in reverse. Differences of gradients need nothing but gradients, and are never chosen
unasked. Reverse over forward is not here: it is silently wrong behind normalisation layers.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.autograd.forward_ad as fw
from torch import nn

from hesse.curvature.differences import directional, step_for
from hesse.curvature.evaluate import evaluate
from hesse.curvature.operator import Curvature
from hesse.curvature.product import Product, gradients
from hesse.curvature.sources import Reduction, batches_of
from hesse.curvature.verify import choose_hessian
from hesse.objective import Objective
from hesse.objective.function import LossFn
from hesse.tree import Params

__all__ = ["MODES", "differences", "double_backward", "forward_over_reverse", "hessian"]


def hessian(
    model: nn.Module,
    loss_fn: LossFn,
    batch: tuple[Any, Any] | Iterable[tuple[Any, Any]],
    *,
    mode: str = "auto",
    reduction: Reduction = "mean",
    verify: bool = True,
    progress: bool = False,
) -> Curvature:
    """The Hessian ``d^2 loss / d params^2`` at the model's present parameters.

    Args:
        model: a module, used in the mode (train or eval) in which it stands; it is left as it is.
        loss_fn: ``loss_fn(outputs, targets)``, one number.
        batch: ``(inputs, targets)``, whose graph is kept between products; or an iterable of such pairs that can be
            gone through again (a list, a ``DataLoader``), which holds one graph at a time. Under
            ``torch.distributed`` each rank takes its share of the batches, and the products are summed.
        mode: ``"double-backward"``, ``"forward-over-reverse"``, ``"differences"`` (of gradients, with an error
            estimate), or ``"auto"``: the first of the first two that torch has all derivatives for.
        reduction: how the losses of several batches make one: ``"mean"`` over all that they average over (examples,
            tokens that count), or ``"sum"``.
        verify: compare a product with differences of gradients, once for a model and loss: torch has second
            derivatives that are wrong without a word, and so may a custom ``autograd.Function``.
        progress: show a bar on stderr while batches are gone through.

    Returns:
        A symmetric operator on flat vectors [n], columns [n, k] and named tensors; n is the number of trainable
        parameters, in the order of ``model.named_parameters()``.

    Raises:
        DerivativeError: no mode works, or the product is wrong; the message names module and operation.
        ValueError: no trainable parameter, an empty batch, a loss that is not one finite number or changes when it is
            evaluated again.
        TypeError: arguments of the wrong kind, complex parameters.

    References:
        Pearlmutter, Fast exact multiplication by the Hessian, Neural Computation 1994.

    Example:
        The squared error of a linear model has the Hessian 2 X'X / n:

        >>> X = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> model = nn.Linear(2, 1, bias=False)
        >>> H = hessian(model, nn.functional.mse_loss, (X, torch.zeros(2, 1)))
        >>> torch.allclose(H.dense(), X.T @ X)
        True
    """
    if mode != "auto" and mode not in MODES:
        raise ValueError(f"mode must be 'auto' or one of {', '.join(map(repr, MODES))}; got {mode!r}.")
    batches = batches_of(model, loss_fn, batch, reduction, progress)
    chosen = choose_hessian(batches.first, MODES, mode, verify)
    return Curvature(batches, MODES[chosen], mode=chosen, psd=False)


def double_backward(objective: Objective, params: Params, index: int = 0) -> Product:
    """Reverse over reverse, on the kept graph of the gradient."""
    with torch.enable_grad(), objective.at(params):
        outputs, loss = evaluate(objective, params)
        slopes = gradients([loss], params, [None], create=True)
    reached = {name: g for name, g in zip(params, slopes, strict=True) if g is not None}

    def apply(v: Params, batched: bool = False) -> Params:
        wanted = {name: params[name] for name in v}
        live = [name for name in v if name in reached]
        with objective.at(params):
            rows = gradients([reached[name] for name in live], wanted, [v[name] for name in live], batched=batched)
        return {
            name: torch.zeros_like(value) if row is None else row
            for (name, value), row in zip(v.items(), rows, strict=True)
        }

    def forward_columns(v: Params) -> Params:
        point = {name: params[name].detach() for name in v}
        rest = {name: p.detach() for name, p in params.items() if name not in v}
        slope = torch.func.grad(lambda at: objective({**rest, **at}))
        return torch.vmap(lambda u: torch.func.jvp(slope, (point,), (u,))[1], randomness="same")(v)

    at_once = {"kept graph": lambda v: apply(v, batched=True), "forward over reverse": forward_columns}
    return Product(apply, lambda: params.keys() - reached.keys(), outputs, at_once)


def forward_over_reverse(objective: Objective, params: Params, index: int = 0) -> Product:
    """The derivative of the gradient along v: a backward pass over dual numbers."""
    found, outputs = _gradient(objective, params)

    def apply(v: Params) -> Params:
        with torch.enable_grad(), fw.dual_level():
            duals = {
                name: fw.make_dual(p.detach().requires_grad_(), v[name]) if name in v else p.detach()
                for name, p in params.items()
            }
            with objective.at(duals):
                loss = objective.loss_fn(objective.run_model(), objective.targets)
                rows = torch.autograd.grad(loss, [duals[name] for name in v], allow_unused=True)
            tangents = [None if row is None else fw.unpack_dual(row).tangent for row in rows]
        return {
            name: torch.zeros_like(value) if t is None else t.detach()
            for (name, value), t in zip(v.items(), tangents, strict=True)
        }

    return Product(apply, lambda: params.keys() - found.keys(), outputs)


def differences(objective: Objective, params: Params, index: int = 0) -> Product:
    """Differences of gradients, extrapolated, with the error they estimate of themselves."""
    found, outputs = _gradient(objective, params)
    errors: list[float] = []

    def apply(v: Params) -> Params:
        def slope(t: float) -> Params:
            moved = {
                name: (p.detach() + t * v[name] if name in v else p.detach()).requires_grad_()
                for name, p in params.items()
            }
            here, _ = _gradient(objective, moved)
            return {name: here.get(name, torch.zeros_like(value)) for name, value in v.items()}

        dtype = next(iter(v.values())).dtype
        value, error = directional(slope, step_for(params, v, dtype))
        errors.append(error)
        return value

    return Product(apply, lambda: params.keys() - found.keys(), outputs, errors=errors)


def _gradient(objective: Objective, params: Params) -> tuple[Params, Any]:
    """The gradient by name, without the parameters that the loss does not depend on, and the outputs."""
    with torch.enable_grad(), objective.at(params):
        outputs, loss = evaluate(objective, params)
        rows = gradients([loss], params, [None])
    return {name: row for name, row in zip(params, rows, strict=True) if row is not None}, outputs


MODES = {
    "double-backward": double_backward,
    "forward-over-reverse": forward_over_reverse,
    "differences": differences,
}
