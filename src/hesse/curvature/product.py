"""A curvature of one batch as a product with named vectors: what every way of forming one has in common.

A graph that autograd keeps can be walked for one vector or, under ``vmap``, for a block of them; both are offered, and
:mod:`hesse.curvature.blocks` chooses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from hesse.curvature.culprit import DerivativeError
from hesse.objective import Objective
from hesse.objective.kernels import is_tied
from hesse.tree import Params

__all__ = ["Builder", "Product", "differentiable", "gradients", "hold_padding", "points", "working"]


@dataclass(frozen=True)
class Product:
    """``v -> B v`` at one batch.

    Args:
        apply: takes tensors shaped as some of the parameters, by name; gives the same back, for the block of B of these
            parameters.
        unreached: names of the parameters that the loss does not depend on; their rows are zero.
        outputs: of the model, when they were made on the way.
        at_once: ways to do the same for k vectors, tensors [k, *shape], by a name for each.
        errors: of products by differences, the estimated relative errors; empty for the other modes.
    """

    apply: Callable[[Params], Params]
    unreached: Callable[[], set[str]]
    outputs: Any
    at_once: Mapping[str, Callable[[Params], Params]] = field(default_factory=dict)
    errors: list[float] = field(default_factory=list)


Builder = Callable[[Objective, Params, int], Product]  # the last is the batch's place in a data set: it seeds draws


def working(objective: Objective) -> Objective:
    """The objective, in float32 if a trainable parameter has less: eight bits do not survive two backward passes."""
    low = any(p.dtype in (torch.bfloat16, torch.float16) for p in objective.params.values())
    return objective.cast(torch.float32) if low else objective


def points(objective: Objective) -> Params:
    """The parameters to differentiate by: the live ones, or the same memory without the hooks on their gradients.

    Such a hook (clipping, masking) changes what an optimiser gets, not the loss, and would enter the product twice.
    """
    return {name: p.detach().requires_grad_() if p._backward_hooks else p for name, p in objective.params.items()}


def hold_padding(model: nn.Module, v: Params, *, tied: bool = False) -> Params:
    """``v`` with zeros where autograd holds a parameter still: the row of an embedding's ``padding_idx``.

    Its gradient is dropped, yet the loss depends on it: moved along, the row would make the product unsymmetric. A row
    that a tied weight moves all the same is dealt with in :mod:`hesse.objective.kernels`, and held only if ``tied``.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    for module in model.modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.padding_idx is not None:
            if is_tied(model, module) and not tied:
                continue
            name = names.get(id(module.weight), "")
            if name in v:
                v[name] = v[name].index_fill(-2, torch.tensor(module.padding_idx, device=v[name].device), 0.0)
    return v


def differentiable(outputs: Any) -> list[Tensor]:
    """The tensors in a nest of outputs that depend on parameters."""
    return [x for x in pytree.tree_leaves(outputs) if isinstance(x, Tensor) and x.requires_grad]


def gradients(
    of: Sequence[Tensor], at: Params, weights: Sequence[Tensor | None], *, batched: bool = False, create: bool = False
) -> list[Tensor | None]:
    """Gradients of ``sum_i weights_i . of_i``, with the graph kept; None for what nothing depends on."""
    live = [(x, w) for x, w in zip(of, weights, strict=True) if x.requires_grad]
    if not live:
        return [None] * len(at)
    try:
        found = torch.autograd.grad(
            [x for x, _ in live],
            list(at.values()),
            [w for _, w in live],
            retain_graph=True,
            create_graph=create,
            allow_unused=True,
            is_grads_batched=batched,
        )
    except RuntimeError as error:
        if "use_reentrant=True" not in str(error):
            raise
        raise DerivativeError(
            "activation checkpointing with use_reentrant=True, which has no gradient with respect to chosen tensors; "
            "checkpoint with use_reentrant=False"
        ) from error
    return list(found)
