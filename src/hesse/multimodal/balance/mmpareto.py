"""MMPareto: where the fused loss and a modality's own want opposite things of a tower, take what serves both.

Of all convex combinations of two gradients the shortest descends both (Désidéri's multiple-gradient descent); where
they agree already their sum is better, because it is longer and its noise larger.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from hesse.multimodal.balance.heads import Heads

__all__ = ["MMPareto", "shortest"]


class MMPareto(Heads):
    """Heads, with the two gradients of each tower combined in a direction common to both.

    With g the gradient of the fused loss, u that of the own loss and a = 1/2 if g'u >= 0, else the a in [0, 1] for
    which ``a g + (1 - a) u`` is shortest, the tower's gradient is

        gamma max(1, |g + u| / |h|) h,    h = 2 a g + 2 (1 - a) u.

    Both are compared at the features of the batch, where they meet, and not at the parameters: one backward pass does
    for all towers (Sener and Koltun, 2018: a common descent direction there is one for the parameters below). Lengths
    matter to optimisers that keep them; see :class:`OGMGE` for those that do not.

    Args:
        model, outputs, widths: see :class:`Cure`.
        gamma: by how much a tower's gradient is lengthened. 1 for optimisers that find the length of a step by a model
            of the loss (K-FAC): they take a gradient that is too long for a model that is wrong, and damp it.

    Source: Wei and Hu, "MMPareto: Boosting Multimodal Learning with Innocent Unimodal Assistance", ICML 2024.
    """

    def __init__(self, model: nn.Module, outputs: int, widths: Mapping[str, int], gamma: float = 1.5) -> None:
        super().__init__(model, outputs, widths)
        if not gamma > 0:
            raise ValueError(f"gamma is a positive number, 1.5 in the paper; got {gamma}.")
        self.gamma = gamma

    def flow(self, key: str, feature: Tensor) -> tuple[Tensor, Tensor]:
        if not feature.requires_grad:
            return feature, feature
        met: list[Tensor] = []

        def meet(grad: Tensor) -> None:
            if self.meant(key, done=False):
                met.append(grad)

        def combine(grad: Tensor) -> Tensor:
            if not self.meant(key) or len(met) < 2:  # no row has the modality, or the fusion takes no notice of it
                return grad
            g, u = met
            met.clear()
            return self.combine(g, u)

        meeting = feature.view_as(feature)
        ways = meeting.view_as(meeting), meeting.view_as(meeting)
        for way in ways:
            way.register_hook(meet)
        meeting.register_hook(combine)
        return ways

    def combine(self, g: Tensor, u: Tensor) -> Tensor:
        """What becomes of two gradients of the same shape; which is which makes no difference."""
        whole = g + u
        if float((g * u).sum()) >= 0:
            return self.gamma * whole
        a = shortest(g, u)
        h = 2 * a * g + 2 * (1 - a) * u
        longer = (whole.norm() / h.norm().clamp_min(torch.finfo(h.dtype).tiny)).clamp_min(1.0)
        return self.gamma * longer * h


def shortest(g: Tensor, u: Tensor) -> Tensor:
    """The a in [0, 1] for which ``a g + (1 - a) u`` is shortest, a scalar; 1/2 if they are equal.

    Example:
        >>> shortest(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0]))
        tensor(0.8000)
    """
    apart = u - g
    square = (apart * apart).sum()
    a = (apart * u).sum() / square
    return torch.where(square > 0, a.clamp(0.0, 1.0), torch.full_like(a, 0.5))
