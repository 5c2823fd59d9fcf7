"""G-Blend: the weight of each loss is what it gains on new rows by the square of what it overfits.

Each modality overfits at its own pace, so one pace for all is wrong for all but one. How fast each gains and overfits
is measured on validation rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from hesse.multimodal.balance.cure import FUSED, Batch, LossFn
from hesse.multimodal.balance.heads import Heads

__all__ = ["GBlend", "blend"]


class GBlend(Heads):
    """Heads whose weights follow the ratio of overfitting to generalisation, measured before each epoch.

    Between two looks, with L^T the loss on training and L^V that on validation rows, of the fused output and of each
    modality's,

        G = L^V_before - L^V_after,    O = (L^V - L^T)_after - (L^V - L^T)_before,    w = G / O^2 / Z,

    Z making the weights sum to one: they minimise the overfitting of the blended step for what it gains. Losses that
    gained nothing have weight zero until they are measured again; if none has, the weights stay.

    The paper measures G and O on models that are trained alone from the present weights. Here they are measured on the
    heads of the one model, as it trains: no extra training, but a modality's gain is then partly the fused loss's.

    Args:
        model, outputs, widths: see :class:`Cure`.
        every: epochs between two measurements, the paper's super-epoch.

    ``begin_epoch`` needs batches of both kinds, the same ones each time; a few hundred rows each do.

    Source: Wang, Tran and Feiszli, "What Makes Training Multi-Modal Classification Networks Hard?", CVPR 2020,
    algorithms 1 and 2.
    """

    before: Tensor
    epochs: Tensor

    def __init__(self, model: nn.Module, outputs: int, widths: Mapping[str, int], every: int = 1) -> None:
        super().__init__(model, outputs, widths)
        if not (isinstance(every, int) and every >= 1):
            raise ValueError(f"every is a whole number of epochs, at least 1; got {every!r}.")
        self.every = every
        self.weights.fill_(1 / len(self.weights))
        self.register_buffer("before", torch.zeros(2, len(self.weights)))
        self.register_buffer("epochs", torch.tensor(0))

    def begin_epoch(self, loss_fn: LossFn, train: Iterable[Batch], valid: Iterable[Batch]) -> None:
        """Measure, and at the second measurement and later set the weights."""
        if int(self.epochs) % self.every == 0:
            seen = [self.losses(loss_fn, batches) for batches in (train, valid)]
            after = torch.tensor([[part[key] for key in (FUSED, *self.modalities)] for part in seen]).to(self.before)
            if int(self.epochs):
                weights = blend(self.before, after)
                if float(weights.sum()):
                    self.weights.copy_(weights)
            self.before.copy_(after)
        self.epochs += 1


def blend(before: Tensor, after: Tensor) -> Tensor:
    """Weights ``[k]`` from losses ``[2, k]`` on training and validation rows; zeros if nothing was gained.

    Example:
        Both gain 1 on validation rows; the second overfits twice as much, and gets a quarter of the weight:

        >>> blend(torch.tensor([[4.0, 4.0], [4.0, 4.0]]), torch.tensor([[2.0, 1.0], [3.0, 3.0]]))
        tensor([0.8000, 0.2000])
    """
    gain = (before[1] - after[1]).clamp_min(0.0)
    overfit = (after[1] - after[0]) - (before[1] - before[0])
    # Measured on so few rows, the difference of two gaps may be nearly zero by chance: no weight may explode by it.
    overfit = overfit.abs().clamp_min(1e-2 * gain.max())
    weights = gain / overfit.square()
    return torch.nan_to_num(weights / weights.sum()) if float(gain.max()) > 0 else torch.zeros_like(gain)
