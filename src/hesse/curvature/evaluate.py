"""One evaluation of an objective that is to be differentiated twice, and what is refused before it starts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.utils import _pytree as pytree

from hesse.objective import Objective
from hesse.tree import Params

__all__ = ["evaluate", "refuse_parameters"]


def evaluate(objective: Objective, params: Params) -> tuple[Any, Tensor]:
    """Outputs and loss with their graph. Called inside ``objective.at(params)``.

    Raises:
        ValueError: the batch is empty; the loss is not one number, not finite, or depends on no trainable parameter.
    """
    _refuse_empty(objective.inputs)
    outputs = objective.run_model()
    loss = objective.loss_fn(outputs, objective.targets)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        shape = list(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"the loss must be one number; got {shape}. Use reduction='mean' or 'sum'.")
    if not bool(loss.isfinite()):
        raise ValueError(f"the loss is {loss.item()}, so it has no curvature: {_not_finite(objective, params)}.")
    if not loss.requires_grad:
        raise ValueError(
            "the loss depends on no trainable parameter: all are frozen, or a detach(), .item() or no_grad() "
            "in the model or the loss cuts the graph."
        )
    return outputs, loss.reshape(())


def refuse_parameters(model: nn.Module, params: Params) -> None:
    """ValueError when there is nothing to differentiate by or evaluating moves it, TypeError when torch cannot."""
    for path, module in model.named_modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None:
            raise ValueError(
                f"module {path!r} ({type(module).__name__}) has max_norm={module.max_norm}: every forward pass "
                "shortens its rows in place, so the loss is no function of the weights as they are. Set max_norm=None "
                "and bound the rows with a parametrization or a penalty."
            )
    if not params:
        raise ValueError("the model has no trainable parameter; did requires_grad_(False) freeze them all?")
    for name, p in params.items():
        if isinstance(p, UninitializedParameter):
            raise ValueError(f"the parameter {name!r} has no shape yet: run the model once on a batch first.")
        if p.is_complex():
            raise TypeError(
                f"the parameter {name!r} is complex; curvature is of real parameters. Keep its real and imaginary "
                "parts as two parameters and join them with torch.complex in forward."
            )


def _refuse_empty(inputs: Any) -> None:
    for x in pytree.tree_leaves(inputs):
        if isinstance(x, Tensor) and x.dim() and x.shape[0] == 0:  # rows without a column are rows all the same
            raise ValueError(f"the batch is empty: an input has shape {list(x.shape)}.")


def _not_finite(objective: Objective, params: Params) -> str:
    """Where the first number that is none comes from."""
    named = {f"parameter {name!r}": p for name, p in params.items()}
    named |= {f"buffer {name!r}": b for name, b in objective.model.named_buffers()}
    for what, values in (("input", objective.inputs), ("target", objective.targets)):
        leaves = [x for x in pytree.tree_leaves(values) if isinstance(x, Tensor)]
        named |= {f"{what} {i}" if len(leaves) > 1 else f"the {what}": x for i, x in enumerate(leaves)}
    for name, x in named.items():
        if x.is_floating_point() and not bool(x.isfinite().all()):
            return f"{name} has elements that are not finite"
    first: list[str] = []

    def note(path: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            tensors = [x for x in pytree.tree_leaves(output) if isinstance(x, Tensor) and x.is_floating_point()]
            if not first and not all(bool(x.isfinite().all()) for x in tensors):
                first.append(f"module {path!r} ({type(module).__name__}) is the first to return one")

        return hook

    handles = [module.register_forward_hook(note(path)) for path, module in objective.model.named_modules()]
    try:
        with torch.no_grad():
            objective.run_model()
    finally:
        for handle in handles:
            handle.remove()
    return first[0] if first else "the loss function makes it out of finite outputs"
