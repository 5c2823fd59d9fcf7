"""PMR: the tower that lags is pulled towards the means of its classes, the one that leads is kept from being sure.

Prototypes need no head and no training: a modality's own classifier is the distance of its features to the mean
features of each class, as in few-shot learning (Snell et al., 2017).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hesse.multimodal.balance.cure import FUSED, Batch, Cure, LossFn, rows
from hesse.multimodal.balance.ogm_ge import classes

__all__ = ["PMR"]


class PMR(Cure):
    """Prototypical modal rebalance: prototype losses for those that lag, prototype entropy for those that lead.

    With c_k the mean features of class k in modality m, ``p_m = softmax_k(-|f - c_k|)``, and s_m the mean p_m of the
    right class in the batch,

        ahead_m = clip(s_m / r_m - 1, 0, 1),    behind_m = clip(r_m / s_m - 1, 0, 1),    r_m the mean of the others' s,
        loss = fused + alpha sum_m behind_m * cross_entropy(p_m) - mu sum_m ahead_m * entropy(p_m),

    the last sum in the first ``early`` epochs only. Prototypes are found before each epoch, and are averages over
    epochs: ``c <- momentum c + (1 - momentum) mean``. A class that no row shows has the mean of all.

    Args:
        model, outputs, widths: see :class:`Cure`.
        alpha: weight of the prototype losses.
        mu: weight of the entropies.
        early: epochs that have them.
        momentum: how much of the prototypes an epoch keeps.

    ``begin_epoch`` needs training batches, all classes among them; it is to be called before the first step.

    Raises:
        RuntimeError: no prototypes have been found yet.
        ValueError: targets are not classes: there are no means of classes then.

    Source: Fan, Xu, Wang, Wang and Guo, "PMR: Prototypical Modal Rebalance for Multimodal Learning", CVPR 2023.
    """

    epochs: Tensor
    ahead: Tensor

    def __init__(
        self,
        model: nn.Module,
        outputs: int,
        widths: Mapping[str, int],
        *,
        alpha: float = 1.0,
        mu: float = 0.01,
        early: int = 5,
        momentum: float = 0.2,
    ) -> None:
        super().__init__(model, outputs, widths)
        for name, value in (("alpha", alpha), ("mu", mu), ("early", early)):
            if not value >= 0:
                raise ValueError(f"{name} is a number of 0 or more; got {value}.")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum is at least 0 and less than 1; got {momentum}.")
        self.alpha, self.mu, self.early, self.momentum = alpha, mu, early, momentum
        self.weights[1:] = 0
        self.register_buffer("ahead", torch.zeros(len(widths)))
        self.register_buffer("epochs", torch.tensor(0))
        for key, width in widths.items():
            self.register_buffer(f"prototypes_{key}", torch.zeros(outputs, width))

    def prototypes(self, key: str) -> Tensor:
        """``[classes, width]`` of a modality."""
        return self.get_buffer(f"prototypes_{key}")

    @torch.no_grad()
    def begin_epoch(self, loss_fn: LossFn, train: Iterable[Batch], valid: Iterable[Batch]) -> None:
        """Find the prototypes of the training batches."""
        was_training = self.training
        self.eval()
        sums = {key: torch.zeros_like(self.prototypes(key)) for key in self.modalities}
        counts = {key: sums[key].new_zeros(self.outputs) for key in self.modalities}
        for inputs, targets in train:
            classes(self, targets)
            features = self.model.features(**inputs)  # type: ignore[operator]
            for key in self.modalities:
                here = inputs[key][1] & (targets >= 0)
                sums[key].index_add_(0, targets[here], features[key][here].to(sums[key]))
                counts[key].index_add_(0, targets[here], torch.ones_like(targets[here], dtype=counts[key].dtype))
        self.train(was_training)
        keep = self.momentum if int(self.epochs) else 0.0
        for key in self.modalities:
            overall = sums[key].sum(0) / counts[key].sum().clamp_min(1)
            means = torch.where(counts[key][:, None] > 0, sums[key] / counts[key][:, None].clamp_min(1), overall)
            self.prototypes(key).lerp_(means, 1 - keep)
        self.epochs += 1

    def own(self, features: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Negative distances to the prototypes."""
        if not int(self.epochs):
            raise RuntimeError(
                "PMR has no prototypes yet: call begin_epoch(loss_fn, train, valid) before the first step."
            )
        found = {}
        for key, f in features.items():
            square = (f[:, None, :] - self.prototypes(key).to(f)).square().sum(-1)
            found[key] = -(square + torch.finfo(f.dtype).eps).sqrt()  # the root has no slope at zero
        return found

    def adapt(self, parts: Mapping[str, Tensor], present: Mapping[str, Tensor], targets: Any) -> None:
        classes(self, targets)
        scores = []
        for key in self.modalities:
            own, labels = rows(present[key] & (targets >= 0), parts[key], targets)
            scores.append(own.softmax(1).gather(1, labels[:, None]).mean())  # NaN if no row has it
        s = torch.stack(scores)
        for m in range(len(s)):
            others = torch.cat([s[:m], s[m + 1 :]])
            ratio = torch.nan_to_num(s[m] / others[~others.isnan()].mean(), nan=1.0, posinf=2.0)
            self.ahead[m] = (ratio - 1).clamp(0, 1)
            self.weights[1 + m] = self.alpha * (1 / ratio - 1).clamp(0, 1)

    def losses_of(self, loss_fn: LossFn, own: Mapping[str, LossFn]) -> Iterator[tuple[float, LossFn, str]]:
        yield 1.0, loss_fn, FUSED
        entropies = int(self.epochs) <= self.early
        for key, weight, ahead in zip(self.modalities, self.weights[1:].tolist(), self.ahead.tolist(), strict=True):
            yield weight, F.cross_entropy, key
            yield self.mu * ahead * entropies, negative_entropy, key


def negative_entropy(logits: Tensor, targets: Any) -> Tensor:
    """The mean over rows of ``sum_c p_c log p_c``, whatever the targets are."""
    logs = logits.log_softmax(1)
    return (logs.exp() * logs).sum(1).mean()
