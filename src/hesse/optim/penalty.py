"""What is added to a loss and known in closed form: ``decay / 2 ||x||^2 + l1 ||x||_1``.

The L2 part is smooth and joins gradient and curvature. The L1 part has a kink at zero. Away from it, and as long as no
weight changes its sign, it is linear; so a step is made within an orthant (Andrew and Gao, 2007): the slope is the
smallest subgradient, a weight that would cross zero stops there, and one at zero leaves it only if the loss pulls
harder than ``l1``. Whatever the curvature, a point at which that gives no step is a minimum, which a soft threshold
after a preconditioned step does not give.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hesse import tree

__all__ = ["Penalty"]


@dataclass(frozen=True, eq=False)
class Penalty:
    """The penalties at one point.

    Args:
        curvature: of the L2 part, its factor.
        l1: the factor of the L1 part.
        orthant: by parameter the sign, -1, 0 or 1, that each element has or may take; empty without L1.

    Example:
        At zero a slope smaller than l1 holds nothing; a larger one moves the weight, less l1:

        >>> x, grad = {"w": torch.tensor([0.0, 0.0, 2.0])}, {"w": torch.tensor([0.5, -3.0, 0.0])}
        >>> penalty = Penalty.of({"weight_decay": 0.0, "decoupled_weight_decay": False, "l1": 1.0}, x)
        >>> penalty.slope(x, grad)["w"].tolist()
        [0.0, -2.0, 1.0]
    """

    curvature: float
    l1: float
    orthant: dict[str, Tensor]

    @staticmethod
    def of(group: Mapping[str, Any], params: tree.Params) -> Penalty:
        """The penalties that an optimiser's settings ask for."""
        decay = 0.0 if group["decoupled_weight_decay"] else group["weight_decay"]
        return Penalty(decay, group["l1"], {name: p.sign() for name, p in params.items()} if group["l1"] else {})

    def value(self, x: tree.Params) -> float:
        """The penalties at ``x``."""
        total = 0.0
        if self.curvature:
            total += 0.5 * self.curvature * float(tree.dot(x, x))
        if self.l1:
            total += self.l1 * float(torch.stack(torch._foreach_norm(list(x.values()), 1)).double().sum())
        return total

    def slope(self, x: tree.Params, grad: tree.Params) -> tree.Params:
        """The gradient of everything, where there is a kink the smallest subgradient; decides the orthant."""
        if self.curvature:
            grad = tree.add((1.0, grad), (self.curvature, x))
        if not self.l1:
            return grad
        slope = {}
        for name, g in grad.items():
            pull = -g.sign() * (g.abs() > self.l1)
            side = torch.where(self.orthant[name] == 0, pull, self.orthant[name])
            self.orthant[name] = side
            slope[name] = (g + self.l1 * side) * side.abs()
        return slope

    def keep(self, direction: tree.Params) -> tree.Params:
        """The direction without its elements that would leave zero on the wrong side."""
        if not self.l1:
            return direction
        return {name: d * (self.orthant[name] != 0) for name, d in direction.items()}

    def end(self, name: str, x: Tensor) -> Tensor:
        """Where a step to ``x`` ends: what has crossed zero stops there."""
        return torch.where(x.sign() == self.orthant[name], x, 0.0) if self.l1 else x
