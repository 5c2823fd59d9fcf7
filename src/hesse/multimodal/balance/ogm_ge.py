"""OGM-GE: the tower that is ahead learns more slowly, batch by batch, and its noise is kept up.

What a tower is ahead by is asked of the model itself: how sure it is of the right class with this modality alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hesse.multimodal.balance.cure import FUSED, Cure, LossFn, rows

__all__ = ["OGMGE", "classes"]


class OGMGE(Cure):
    """On-the-fly gradient modulation with generalisation enhancement. No parameters, no own losses.

    With s_m the mean probability of the right class from modality m alone, of the rows that have it,

        rho_m = s_m / mean of the others' s,    k_m = 1 - tanh(alpha rho_m) if rho_m > 1, else 1,

    the gradient of tower m becomes ``k_m g_m + xi``, xi normal with the covariance of the batch gradient's own noise:
    ``g_m = sum_i g_i`` over rows, and ``sum_i (e_i - mean e) g_i`` with independent standard normal e_i has just that
    covariance, so rows are weighted and nothing has to be estimated. What modality m says alone is
    ``fuse(m alone) - (1 - 1 / M) fuse(nothing)``: with one linear layer on M concatenated modalities the paper's
    ``W_m f_m + b / M``.

    A tower's gradient is all that is changed. Optimisers that divide gradients by their own size (Adam, SOAP) take a
    lasting factor out again, and of those that do not step along the gradient (Gauss-Newton, Newton-CG) none is seen;
    K-FAC's factors are those of the plain model, so its step is the changed gradient's.

    Args:
        model, outputs, widths: see :class:`Cure`. ``fuse`` must take rows in which modalities are absent.
        alpha: how hard the leader is slowed.
        enhance: whether noise is added (GE).

    Raises:
        ValueError: (in the loss) targets are not classes: only a probability of the right answer says who is ahead.

    Source: Peng, Wei, Deng, Wang and Hu, "Balanced Multimodal Learning via On-the-fly Gradient Modulation", CVPR 2022.
    """

    factors: Tensor

    def __init__(
        self, model: nn.Module, outputs: int, widths: Mapping[str, int], alpha: float = 0.5, enhance: bool = True
    ) -> None:
        super().__init__(model, outputs, widths)
        if not 0 < alpha < math.inf:
            raise ValueError(f"alpha is a positive number, 0.1 to 1 in the paper; got {alpha}.")
        self.alpha, self.enhance = alpha, enhance
        self.weights[1:] = 0
        self.register_buffer("factors", torch.ones(len(widths)))

    def own(self, features: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the fusion says of each modality alone, without a gradient."""
        with torch.no_grad():
            nobody = {key: torch.zeros_like(here) for key, here in present.items()}
            held = {key: torch.where(present[key][:, None], f.detach(), 0.0) for key, f in features.items()}
            empty = {key: torch.zeros_like(f) for key, f in held.items()}
            nothing = self.model.fuse(empty, nobody)  # type: ignore[operator]
            rest = 1 - 1 / len(self.widths)
            return {
                key: self.model.fuse({**empty, key: held[key]}, {**nobody, key: present[key]}) - rest * nothing  # type: ignore[operator]
                for key in self.modalities
            }

    def flow(self, key: str, feature: Tensor) -> tuple[Tensor, Tensor]:
        if not feature.requires_grad:
            return feature, feature
        toward = feature.view_as(feature)
        index = self.modalities.index(key)

        def modulate(grad: Tensor) -> Tensor:
            if not self.meant(key):
                return grad
            weight = self.factors[index].to(grad).expand(len(grad))
            if self.enhance:
                e = torch.randn(len(grad), dtype=grad.dtype, device=grad.device)
                weight = weight + e - e.mean()
            return grad * weight.view(-1, *[1] * (grad.dim() - 1))

        toward.register_hook(modulate)
        return toward, feature

    def adapt(self, parts: Mapping[str, Tensor], present: Mapping[str, Tensor], targets: Any) -> None:
        classes(self, targets)
        scores = []
        for key in self.modalities:
            outputs, labels = rows(present[key], parts[key], targets)
            right = outputs.softmax(1).gather(1, labels.clamp_min(0)[:, None])[:, 0]
            known = labels >= 0  # -100 is the mark of rows without a label
            scores.append(right[known].mean() if bool(known.any()) else right.new_tensor(math.nan))
        s = torch.stack(scores)
        for m in range(len(s)):
            others = torch.cat([s[:m], s[m + 1 :]])
            others = others[~others.isnan()]
            ratio = s[m] / others.mean()
            self.factors[m] = 1 - torch.tanh(self.alpha * ratio) if float(ratio) > 1 else 1.0

    def losses_of(self, loss_fn: LossFn, own: Mapping[str, LossFn]) -> Iterator[tuple[float, LossFn, str]]:
        yield 1.0, loss_fn, FUSED


def classes(cure: Cure, targets: Any) -> None:
    """Raise unless the targets are one class a row."""
    if isinstance(targets, Tensor) and targets.dim() == 1 and not targets.is_floating_point():
        return
    got = f"{targets.dtype} of shape {list(targets.shape)}" if isinstance(targets, Tensor) else type(targets).__name__
    raise ValueError(
        f"{type(cure).__name__} is for classification with one class a row, int64 [B]: it compares modalities by the "
        f"probability of the right class. The targets are {got}. Use Heads, GBlend or MMPareto, which take any loss."
    )
