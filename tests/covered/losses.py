"""The loss modules of torch.nn: as the loss itself, or as a layer where they take several inputs or have corners."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from covered.subject import Subject, Table, apart, fed, near, spread

__all__ = ["LOSSES"]


class With(nn.Module):
    """A layer with constants behind its inputs, such as targets."""

    def __init__(self, layer: nn.Module, *constants: Tensor) -> None:
        super().__init__()
        self.layer, self.constants = layer, constants

    def forward(self, *x: Tensor) -> Tensor:
        return self.layer(*x, *self.constants)


def loss(loss_fn: Callable[..., Tensor], targets: Tensor, *last: nn.Module, outputs: int = 3) -> Subject:
    """The loss of a tiny network on two rows."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, outputs), *last)
    return Subject(model, loss_fn, (spread(2, 2), targets))


def at_the_logits(loss_fn: nn.Module, targets: Tensor) -> Subject:
    """A loss of log-probabilities is linear in them. Its Gauss-Newton matrix is that in the logits, by convention."""
    subject = loss(loss_fn, targets, nn.LogSoftmax(1))
    logits, whole = subject.model[:-1], lambda o, t: loss_fn(o.log_softmax(1), t)
    return subject._replace(plain=subject._replace(model=logits, loss_fn=whole))


def weights() -> Tensor:
    return torch.tensor([0.5, 2.0, 1.0])


def binary() -> Tensor:
    return torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.2, 0.0]])


def adaptive() -> nn.AdaptiveLogSoftmaxWithLoss:
    return nn.AdaptiveLogSoftmaxWithLoss(2, 5, [2, 3], div_value=1.0, head_bias=True)


def first(outputs: Any) -> Tensor:
    return outputs[0]


CLASSES, SIGNS = torch.tensor([2, 0]), torch.tensor([1, -1])
EACH: dict[str, Any] = {"reduction": "none"}
PAIR = torch.tensor([[0, 2], [1, 1]])

# fmt: off
LOSSES: Table = {
    "AdaptiveLogSoftmaxWithLoss": lambda: fed(With(adaptive(), torch.tensor([0, 2, 4])), spread(3, 2), take=first),
    "BCELoss": lambda: loss(nn.BCELoss(), binary(), nn.Sigmoid()),
    "BCEWithLogitsLoss": lambda: loss(nn.BCEWithLogitsLoss(), binary()),
    "BCEWithLogitsLoss, weights": lambda: loss(nn.BCEWithLogitsLoss(weights(), pos_weight=2 * weights()), binary()),
    "CTCLoss": lambda: loss(ctc, torch.tensor([[1, 2]]), nn.Unflatten(1, (4, 3)), nn.LogSoftmax(-1), outputs=12),
    "CosineEmbeddingLoss": lambda: fed(With(nn.CosineEmbeddingLoss(-0.9, **EACH), SIGNS), *apart((2, 3), (2, 3))),
    "CrossEntropyLoss": lambda: loss(nn.CrossEntropyLoss(), CLASSES),
    "CrossEntropyLoss, sum": lambda: loss(nn.CrossEntropyLoss(reduction="sum"), CLASSES),
    "CrossEntropyLoss, class weights": lambda: loss(nn.CrossEntropyLoss(weights()), CLASSES),
    "CrossEntropyLoss, ignore_index": lambda: loss(nn.CrossEntropyLoss(ignore_index=0), CLASSES),
    "CrossEntropyLoss, label smoothing":
        lambda: loss(nn.CrossEntropyLoss(weights(), label_smoothing=0.2), CLASSES),
    "CrossEntropyLoss, probabilities": lambda: loss(nn.CrossEntropyLoss(), spread(2, 3).softmax(1)),
    "CrossEntropyLoss, positions":
        lambda: loss(nn.CrossEntropyLoss(weights(), ignore_index=2), PAIR, nn.Unflatten(1, (3, 2)), outputs=6),
    "GaussianNLLLoss": lambda: loss(functools.partial(F.gaussian_nll_loss, var=weights().expand(2, 3)), binary()),
    "GaussianNLLLoss, learned variance":
        lambda: fed(nn.GaussianNLLLoss(full=True, **EACH), *apart((2, 2), (2, 2)), near(1, 2, 2)),
    "HingeEmbeddingLoss": lambda: fed(With(nn.HingeEmbeddingLoss(**EACH), SIGNS), spread(2)),
    "HuberLoss": lambda: loss(nn.HuberLoss(delta=0.6), 2 * binary()),
    "KLDivLoss, at the logits":
        lambda: at_the_logits(nn.KLDivLoss(reduction="batchmean"), spread(2, 3).softmax(1)),
    "KLDivLoss, log target, at the logits":
        lambda: at_the_logits(nn.KLDivLoss(log_target=True, reduction="sum"), spread(2, 3).log_softmax(1)),
    "L1Loss": lambda: loss(nn.L1Loss(), 3 * binary() - 1),
    "LinearCrossEntropyLoss": lambda: fed(With(nn.LinearCrossEntropyLoss(2, 3, bias=True), CLASSES), spread(2, 2)),
    "MSELoss": lambda: loss(nn.MSELoss(), binary()),
    "MSELoss, sum": lambda: loss(nn.MSELoss(reduction="sum"), binary()),
    "MarginRankingLoss": lambda: fed(With(nn.MarginRankingLoss(2.0, **EACH), SIGNS), *apart((2,), (2,))),
    "MultiLabelMarginLoss":
        lambda: fed(With(nn.MultiLabelMarginLoss(**EACH), torch.tensor([[2, 0, -1], [1, -1, -1]])), spread(2, 3)),
    "MultiLabelSoftMarginLoss": lambda: loss(nn.MultiLabelSoftMarginLoss(weights()), binary()),
    "MultiMarginLoss": lambda: fed(With(nn.MultiMarginLoss(**EACH), CLASSES), spread(2, 3)),
    "MultiMarginLoss, p = 2": lambda: loss(nn.MultiMarginLoss(2, margin=1.7), CLASSES),
    "NLLLoss, at the logits": lambda: at_the_logits(nn.NLLLoss(weights()), CLASSES),
    "PoissonNLLLoss": lambda: loss(nn.PoissonNLLLoss(), 3 * binary()),
    "PoissonNLLLoss, rates": lambda: loss(nn.PoissonNLLLoss(log_input=False), 3 * binary(), nn.Softplus()),
    "SmoothL1Loss": lambda: loss(nn.SmoothL1Loss(beta=0.6), 2 * binary()),
    "SoftMarginLoss": lambda: loss(nn.SoftMarginLoss(), 2 * binary() - 1),
    "TripletMarginLoss": lambda: fed(nn.TripletMarginLoss(4.0, **EACH), *apart((2, 2), (2, 2), (2, 2))),
    "TripletMarginLoss, swap, p = 3": lambda: fed(
        nn.TripletMarginLoss(4.0, p=3, swap=True, **EACH), *apart((2, 2), (2, 2), (2, 2))
    ),
    "TripletMarginWithDistanceLoss": lambda: fed(
        nn.TripletMarginWithDistanceLoss(margin=4.0, **EACH), *apart((2, 2), (2, 2), (2, 2))
    ),
}
# fmt: on


def ctc(outputs: Tensor, targets: Tensor) -> Tensor:
    """Log-probabilities [N, T, C] of a batch, against one label sequence each."""
    batch, steps, _ = outputs.shape
    lengths = torch.full((batch,), steps), torch.full((batch,), targets.shape[1])
    return nn.CTCLoss()(outputs.movedim(1, 0), targets.expand(batch, -1), *lengths)
