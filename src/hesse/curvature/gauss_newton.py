"""The Gauss-Newton matrix J' H_L J and the Fisher matrices J' F J: one product through the model, three middles.

J is the Jacobian of the model's outputs. The middle acts on outputs alone and is all that differs: the loss's Hessian
there (Gauss-Newton), the second moment of the label model's gradients (exact Fisher), of one draw of them (sampled)
or of the data's own (empirical Fisher).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from hesse.curvature.diagonal import ExactDiagonal
from hesse.curvature.differences import directional, step_for
from hesse.curvature.evaluate import evaluate
from hesse.curvature.jacobian import JACOBIANS, JacobianOf
from hesse.curvature.losses import FORMS, function_of
from hesse.curvature.operator import Curvature
from hesse.curvature.output import output_curvature, term_gradients
from hesse.curvature.product import Builder, Product, differentiable, gradients
from hesse.curvature.sources import Reduction, batches_of
from hesse.curvature.verify import choose_jacobian
from hesse.objective import Objective
from hesse.objective.function import LossFn
from hesse.tree import Params

__all__ = ["fisher", "ggn"]

Leaves = list[Tensor]
Middle = Callable[[Leaves, bool], Leaves]
MiddleOf = Callable[[Objective, Any, int], Middle]


def ggn(
    model: nn.Module,
    loss_fn: LossFn,
    batch: tuple[Any, Any] | Iterable[tuple[Any, Any]],
    *,
    mode: str = "auto",
    reduction: Reduction = "mean",
    verify: bool = True,
    progress: bool = False,
) -> Curvature:
    """The generalised Gauss-Newton matrix ``J' H_L J`` at the model's present parameters.

    H_L is the loss's Hessian at the model's outputs: in closed form for the losses of torch.nn, by products for any
    other. It is positive semidefinite where the loss is convex in the outputs, which is declared for the known losses.

    Args:
        model, loss_fn, batch, reduction, verify, progress: as for :func:`hesse.curvature.hessian`. With a loss of
            your own the model may return any nest of tensors.
        mode: how ``J v`` is formed: ``"double-backward"``, ``"forward"``, ``"differences"``, or ``"auto"``, the first
            of the first two that torch has all derivatives for.

    Returns:
        A symmetric operator of n rows, one a trainable parameter.

    Raises:
        DerivativeError, ValueError, TypeError: as for :func:`hesse.curvature.hessian`; TypeError also for a loss
            without curvature (``l1_loss``), with the reason.

    References:
        Schraudolph, Fast curvature matrix-vector products for second-order gradient descent, Neural Computation 2002.

    Example:
        For a linear model the Gauss-Newton matrix is the Hessian:

        >>> X = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> model = nn.Linear(2, 1, bias=False)
        >>> G = ggn(model, nn.functional.mse_loss, (X, torch.zeros(2, 1)))
        >>> G.psd, torch.allclose(G.dense(), X.T @ X)
        (True, True)
    """
    middle = _loss_hessian_by_differences if mode == "differences" else _loss_hessian
    return _operator(model, loss_fn, batch, middle, ExactDiagonal("ggn"), mode, reduction, verify, progress)


def fisher(
    model: nn.Module,
    loss_fn: LossFn,
    batch: tuple[Any, Any] | Iterable[tuple[Any, Any]],
    *,
    fisher_type: Literal["exact", "sampled", "empirical"] = "exact",
    seed: int = 0,
    mode: str = "auto",
    reduction: Reduction = "mean",
    verify: bool = True,
    progress: bool = False,
) -> Curvature:
    """The Fisher information matrix, the second moment of the log-likelihood's gradients.

    Args:
        model, loss_fn, batch, mode, verify, progress: as for :func:`ggn`.
        reduction: as for :func:`ggn`; it also says whether a loss of your own averages over examples or adds them up.
        fisher_type: ``"exact"``: the expectation over labels of the loss's own probability model (for cross-entropy
            and the squared error the Gauss-Newton matrix); ``"sampled"``: one label drawn for each term;
            ``"empirical"``: the labels of the data, which is no curvature but often taken for one.
        seed: of the draws, which are the same at every product.

    Raises:
        TypeError: the loss has no probability model (unless ``"empirical"``).
        ValueError: an unknown ``fisher_type``.

    References:
        Martens, New insights and perspectives on the natural gradient method, JMLR 2020.
        Kunstner, Hennig and Balles, Limitations of the empirical Fisher approximation, NeurIPS 2019.

    Example:
        With a residual of 3 the empirical Fisher is (2 * 3)^2, the exact one 2:

        >>> model = nn.Linear(1, 1, bias=False)
        >>> _ = model.weight.data.fill_(3.0)
        >>> batch = torch.ones(1, 1), torch.zeros(1, 1)
        >>> fisher(model, nn.functional.mse_loss, batch).dense().item()
        2.0
        >>> fisher(model, nn.functional.mse_loss, batch, fisher_type="empirical").dense().item()
        36.0
    """
    middles: dict[str, MiddleOf] = {
        "exact": _exact_fisher,
        "sampled": lambda objective, outputs, i: _sampled_fisher(objective, outputs, seed + i),
        "empirical": lambda objective, outputs, i: _empirical_fisher(objective, outputs, reduction),
    }
    if fisher_type not in middles:
        raise ValueError(f"fisher_type must be one of {', '.join(map(repr, middles))}; got {fisher_type!r}.")
    diagonal = ExactDiagonal(fisher_type, seed, reduction)
    return _operator(model, loss_fn, batch, middles[fisher_type], diagonal, mode, reduction, verify, progress)


def _operator(
    model: nn.Module,
    loss_fn: LossFn,
    batch: Any,
    middle_of: MiddleOf,
    exact_diagonal: ExactDiagonal,
    mode: str,
    reduction: Reduction,
    verify: bool,
    progress: bool,
) -> Curvature:
    if mode != "auto" and mode not in JACOBIANS:
        raise ValueError(f"mode must be 'auto' or one of {', '.join(map(repr, JACOBIANS))}; got {mode!r}.")
    batches = batches_of(model, loss_fn, batch, reduction, progress)
    chosen = choose_jacobian(batches.first, JACOBIANS, mode, verify)
    curved = (_loss_hessian, _loss_hessian_by_differences)
    psd = middle_of not in curved or _convex(batches.first)
    build = _through(JACOBIANS[chosen], middle_of)
    return Curvature(batches, build, mode=chosen, psd=psd, exact_diagonal=exact_diagonal)


def _through(jacobian_of: JacobianOf, middle_of: MiddleOf) -> Builder:
    """The builder of ``v -> J' M J v``."""

    def build(objective: Objective, params: Params, index: int) -> Product:
        with torch.enable_grad(), objective.at(params):
            outputs, _ = evaluate(objective, params)
        leaves = differentiable(outputs)
        jacobian = jacobian_of(objective, params, outputs)
        middle = middle_of(objective, outputs, index)

        def unreached() -> set[str]:
            rows = gradients(leaves, params, [torch.zeros_like(x) for x in leaves])
            return {name for name, row in zip(params, rows, strict=True) if row is None}

        def back(v: Params, tangents: Leaves, batched: bool) -> Params:
            wanted = {name: params[name] for name in v}
            curved = middle(tangents, batched)
            with objective.at(params):
                rows = gradients(leaves, wanted, curved, batched=batched)
            return {
                name: torch.zeros_like(value) if row is None else row
                for (name, value), row in zip(v.items(), rows, strict=True)
            }

        columns = jacobian.at_once
        at_once = {"kept graph": lambda v: back(v, columns(v), True)} if columns else {}
        return Product(lambda v: back(v, jacobian.apply(v), False), unreached, outputs, at_once, jacobian.errors)

    return build


# -- the middles ------------------------------------------------------------------------------------------------


def _loss_hessian(objective: Objective, outputs: Any, index: int) -> Middle:
    if not isinstance(outputs, Tensor):
        return _by_products(objective, outputs)
    curvature = output_curvature(objective.loss_fn, outputs, objective.targets)
    curvature.product(torch.zeros_like(outputs))  # a loss that cannot be differentiated twice is refused here
    return _on_tensor(curvature.product)


def _loss_hessian_by_differences(objective: Objective, outputs: Any, index: int) -> Middle:
    """H_L in closed form where there is one, else by differences of the loss's gradient at the outputs."""
    if function_of(objective.loss_fn)[0] in FORMS:
        return _loss_hessian(objective, outputs, index)
    leaves, spec = pytree.tree_flatten(outputs)
    point = {str(i): x.detach() for i, x in enumerate(leaves) if _moves(x)}

    def slope(t: float, v: Params) -> Params:
        moved = {i: (x + t * v[i]).requires_grad_() for i, x in point.items()}
        filled = [moved.get(str(i), x) for i, x in enumerate(leaves)]
        with torch.enable_grad():
            loss = objective.loss_fn(pytree.tree_unflatten(filled, spec), objective.targets)
        rows = gradients([loss], moved, [None])
        return {i: torch.zeros_like(x) if row is None else row for (i, x), row in zip(point.items(), rows, strict=True)}

    def middle(u: Leaves, batched: bool) -> Leaves:
        v = dict(zip(point, u, strict=True))
        value, _ = directional(lambda t: slope(t, v), step_for(point, v, u[0].dtype))
        return list(value.values())

    return middle


def _exact_fisher(objective: Objective, outputs: Any, index: int) -> Middle:
    curvature = output_curvature(objective.loss_fn, outputs, objective.targets)
    curvature.fisher(torch.zeros_like(outputs))  # a loss without a probability model is refused here, not at a product
    return _on_tensor(curvature.fisher)


def _sampled_fisher(objective: Objective, outputs: Any, seed: int) -> Middle:
    curvature = output_curvature(objective.loss_fn, outputs, objective.targets)
    generator = torch.Generator(outputs.device).manual_seed(seed)
    r = curvature.label(generator)
    return _on_tensor(lambda u: curvature.outer(r, u))


def _empirical_fisher(objective: Objective, outputs: Any, reduction: Reduction) -> Middle:
    loss_fn, targets = objective.loss_fn, objective.targets
    curvature = output_curvature(loss_fn, outputs, targets)
    if curvature.reduction is None:  # a loss of one's own does not say what a term weighs
        curvature = output_curvature(loss_fn, outputs, targets, reduction)
    r = term_gradients(loss_fn, outputs, targets, curvature)
    return _on_tensor(lambda u: curvature.outer(r, u))


def _on_tensor(product: Callable[[Tensor], Tensor]) -> Middle:
    return lambda u, batched: [torch.vmap(product)(u[0]) if batched else product(u[0])]


def _by_products(objective: Objective, outputs: Any) -> Middle:
    """H_L of a loss that takes a nest of tensors, by double backward on the loss alone."""
    leaves, spec = pytree.tree_flatten(outputs)
    moving = {str(i): x.detach().requires_grad_() for i, x in enumerate(leaves) if _moves(x)}
    filled = [moving.get(str(i), x) for i, x in enumerate(leaves)]
    with torch.enable_grad():
        loss = objective.loss_fn(pytree.tree_unflatten(filled, spec), objective.targets)
        slopes = gradients([loss], moving, [None], create=True)
    live = [(i, g) for i, g in enumerate(slopes) if g is not None]

    def middle(u: Leaves, batched: bool) -> Leaves:
        rows = gradients([g for _, g in live], moving, [u[i] for i, _ in live], batched=batched)
        return [torch.zeros_like(x) if row is None else row for x, row in zip(u, rows, strict=True)]

    return middle


def _moves(x: Any) -> bool:
    return isinstance(x, Tensor) and x.requires_grad


def _convex(objective: Objective) -> bool:
    if function_of(objective.loss_fn)[0] not in FORMS:
        return False
    with torch.no_grad():
        outputs = objective.outputs(objective.params)
    return output_curvature(objective.loss_fn, outputs, objective.targets).psd
