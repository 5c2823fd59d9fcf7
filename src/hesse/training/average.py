"""Averaged weights: what is evaluated and kept, for every optimiser alike.

Noise in the last steps averages out, and no schedule has to bring the step size down first. The average is
polynomial-decay averaging (Shamir and Zhang, Stochastic gradient descent for non-smooth optimization, ICML 2013): step
i weighs about ``i**DECAY``, so its memory grows with the run, a quarter of it, and early weights are soon forgotten.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

__all__ = ["averaged"]

DECAY = 3.0


def averaged(model: nn.Module) -> AveragedModel:
    """A running average of ``model``'s weights; call ``.update_parameters(model)`` after each step.

    Example:
        With weights 1, 2, 3 the average leans to the last:

        >>> model = nn.Linear(1, 1, bias=False)
        >>> average = averaged(model)
        >>> for w in (1.0, 2.0, 3.0):
        ...     _ = model.weight.data.fill_(w)
        ...     average.update_parameters(model)
        >>> round(average.module.weight.item(), 3)
        2.6
    """

    def update(average: Any, current: Any, count: Tensor | int) -> None:
        torch._foreach_lerp_(average, current, (DECAY + 1) / (int(count) + DECAY + 1))

    return AveragedModel(model, multi_avg_fn=update)
