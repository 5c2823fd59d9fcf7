"""Adam in the eigenbases of a gradient's Kronecker factors.

Adam divides each element of the gradient by its own size, as if elements were uncorrelated. In the eigenbases of
L = E[G G'] and R = E[G'G] they nearly are: there it is SOAP. With the factors' bases left at the identity it is Adam;
with the second moments replaced by products of eigenvalues it is Shampoo.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from hesse.optim.kronecker import Batch, Kronecker
from hesse.optim.moments import adam

__all__ = ["SOAP"]


class SOAP(Kronecker):
    """Adam in Shampoo's eigenbases; runs after ``loss.backward()``, in the place of AdamW.

    For a parameter [m, n] with gradient G, in orthonormal bases Q_L [m, m] and Q_R [n, n] that follow the eigenvectors
    of the running averages L = E[G G'] / n and R = E[G'G] / m,

        G~ = Q_L' G Q_R,    M~ = E[G~],    V~ = E[G~ * G~],    step = -lr Q_L (M~ / (sqrt(V~) + eps)) Q_R',

    with both averages corrected for their start at zero. The first step is Adam's own, in the bases of the identity.
    When a basis turns by a rotation, the first moment turns along and the second as that of uncorrelated elements.

    Choose it where AdamW works but takes many steps, and where only gradients are at hand: its defaults are near its
    best settings, and a step costs little more than AdamW's. :class:`Shampoo` takes fewer steps on deep, badly scaled
    networks. State: 2 + 2 (m / n + n / m) times the parameter, of blocks [m, n].

    Args:
        params: as torch takes them. Dimensions of one element do not count; a kernel [out, in, h, w] is the matrix
            [out, in h w]; vectors and scalars get Adam.
        lr: learning rate, the size of an update's elements at most, about.
        betas: how much of the averages of G~ and of its squares a step keeps.
        factor_beta: how much of L and R a step keeps.
        eps: added to the root of the second moment.
        weight_decay: taken from the parameters if decoupled, else added to the gradient.
        decoupled_weight_decay: which of the two.
        l1: weight of the sum of absolute values, by its proximal step.
        max_dim: the largest factor. Above it a dimension is cut into blocks.
        split: whether it is; if not, it keeps the identity, as the rows of large embeddings do in any case.
        kl: whether factors minimise the Kullback-Leibler divergence to the covariance of the gradient (KL-SOAP).
        period: steps between two looks at whether bases are still right; at 1, 2, 4, 8, ... too until the first.
        statistics: steps between two gradients that are averaged into the factors.
        tolerance: the share of Q'LQ off its diagonal up to which a basis stays as it is.
        maximize: whether to climb.

    Raises:
        ValueError: a setting is out of its range.

    Source: Vyas et al., "SOAP: Improving and Stabilizing Shampoo using Adam", 2024; the criterion of ``tolerance``:
    Eschenhagen et al., "Purifying Shampoo", 2025; ``kl``: Lin et al., "Understanding and Improving Shampoo and SOAP via
    Kullback-Leibler Minimization", 2025.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> _ = torch.manual_seed(0)
        >>> x = torch.randn(64, 3)
        >>> model = nn.Linear(3, 1)
        >>> optimizer = SOAP(model.parameters(), lr=0.1)
        >>> for step in range(200):
        ...     optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / 200)
        ...     optimizer.zero_grad()
        ...     nn.functional.mse_loss(model(x), x @ torch.tensor([[1.0], [2.0], [3.0]])).backward()
        ...     _ = optimizer.step()
        >>> [round(w, 2) for w in model.weight[0].tolist()]
        [1.0, 2.0, 3.0]
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 3e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.95),
        factor_beta: float = 0.95,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = True,
        l1: float = 0.0,
        max_dim: int = 128,
        split: bool = True,
        kl: bool = False,
        period: int = 32,
        statistics: int = 4,
        tolerance: float = 0.01,
        maximize: bool = False,
    ) -> None:
        settings: dict[str, Any] = {
            "lr": lr,
            "betas": betas,
            "factor_beta": factor_beta,
            "eps": eps,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
            "l1": l1,
            "max_dim": max_dim,
            "split": split,
            "kl": kl,
            "period": period,
            "statistics": statistics,
            "tolerance": tolerance,
            "maximize": maximize,
            "rejections": 0,
        }
        super().__init__(params, settings)

    def rule(self, group: dict[str, Any], batches: list[Batch]) -> list[Tensor]:
        """Adam's direction in the frames; then these learn, and turn with all that lives in them."""
        seen = [b.grad if b.frame is None else b.frame.enter(b.grad) for b in batches]
        averages, squares = ([b.moment(name) for b in batches] for name in ("exp_avg", "exp_avg_sq"))
        found = adam(seen, averages, squares, [b.step for b in batches], group["betas"], group["eps"])
        directions = [d if b.frame is None else b.frame.leave(d) for b, d in zip(batches, found, strict=True)]
        # Learning comes after the step: a gradient in a basis that has seen it looks less correlated than the next.
        for b, grad, average, square in zip(batches, seen, averages, squares, strict=True):
            if b.frame is None:
                continue
            b.learn(b.frame, group, grad)
            for turn in b.turn(b.frame, group):
                turn.average(average)
                turn.squares(square)
        return directions
