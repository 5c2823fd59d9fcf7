"""The loss of a model on one batch as the callable that torch's optimisers expect.

``closure(model, loss_fn, batch)`` gives one object with two faces. Called, it is what any torch optimiser expects: it
zeroes the gradients, runs forward and backward and returns the loss, so SGD, Adam and LBFGS run on it unchanged. Its
``.objective`` is the same loss as a function of named parameters without side effects, which is what curvature,
trial steps and gradient checks need.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hesse.objective.function import LossFn, Objective, objective

__all__ = ["Closure", "closure"]


class Closure:
    """What :func:`closure` returns: a torch closure that carries its :class:`Objective`."""

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        self.outputs: Any = None

    @property
    def model(self) -> nn.Module:
        """The module as it was given, DDP around it or not."""
        return self.objective.given

    @property
    def loss_fn(self) -> LossFn:
        return self.objective.loss_fn

    def __call__(self) -> Tensor:
        """Zero the gradients, run forward and backward, return the loss, a detached scalar.

        Under ``DistributedDataParallel`` gradients and loss are the means over the processes, so that optimisers which
        decide by the loss decide alike.
        """
        with torch.enable_grad():
            self.model.zero_grad(set_to_none=True)
            self.outputs = self.objective.forward()
            loss = self.loss_fn(self.outputs, self.objective.targets)
            loss.backward()
        loss = loss.detach()
        self.objective.replicas.mean_([loss])
        return loss


def closure(model: nn.Module, loss_fn: LossFn, batch: tuple[Any, Any]) -> Closure:
    """The loss of ``model`` on ``batch``, for any optimiser's ``step``.

    Args:
        model: a module.
        loss_fn: ``loss_fn(outputs, targets)``, a scalar tensor, for instance ``torch.nn.functional.cross_entropy``.
        batch: ``(inputs, targets)``, as a ``DataLoader`` yields it; inputs are a tensor, a tuple (``model(*inputs)``)
            or a dict (``model(**inputs)``).

    Returns:
        A callable that zeroes the gradients, runs forward and backward and returns the loss; ``.objective`` is the pure
        function of the parameters, ``.outputs`` the outputs of the last call.

    Raises:
        TypeError: the model is no module, the batch not a pair, or the loss not a callable.

    Example:
        One object, any optimiser. The loss mean((w - 2)^2) is least at w = 2, and 4 at w = 0:

        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> batch = torch.ones(4, 1), torch.full((4, 1), 2.0)
        >>> step = closure(model, torch.nn.functional.mse_loss, batch)
        >>> _ = torch.optim.LBFGS(model.parameters()).step(step)
        >>> round(model.weight.item(), 4)
        2.0
        >>> step.objective({"weight": torch.zeros(1, 1)}).item()
        4.0
    """
    return Closure(objective(model, loss_fn, batch))
