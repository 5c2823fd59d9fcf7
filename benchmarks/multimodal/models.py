"""A tower a modality, concatenated, one hidden layer: the model of every entrant; and the same towers each on its own.

Both have the two methods that cures ask for: ``features(**inputs)`` and ``fuse(features, present)``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from benchmarks.digits import Tower

__all__ = ["WIDTH", "Apart", "Inputs", "Towers"]

Inputs = dict[str, tuple[Tensor, Tensor]]
WIDTH = 64  # features a tower, and of the hidden layer


class Towers(nn.Module):
    """The late fusion of :mod:`benchmarks.digits` for any number of modalities; ``sizes``: their heights and widths."""

    def __init__(self, sizes: Mapping[str, tuple[int, int]], outputs: int) -> None:
        super().__init__()
        self.encoders = nn.ModuleDict({key: Tower(*size) for key, size in sizes.items()})
        self.head = nn.Sequential(nn.Linear(WIDTH * len(sizes), WIDTH), nn.ReLU(), nn.Linear(WIDTH, outputs))

    def features(self, **inputs: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        return {key: encoder(inputs[key][0]) for key, encoder in self.encoders.items()}

    def fuse(self, features: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> Tensor:
        output: Tensor = self.head(torch.cat([h * present[key][:, None] for key, h in features.items()], dim=1))
        return output

    def forward(self, **inputs: tuple[Tensor, Tensor]) -> Tensor:
        return self.fuse(self.features(**inputs), {key: here for key, (_, here) in inputs.items()})


class Apart(nn.Module):
    """No fusion at all: a linear layer on each tower, each with a loss of its own, probabilities multiplied.

    Towers share no weight and no loss: this is as many models trained apart, in one loop. Given the class the
    modalities of the pairs are independent, and the product of the posteriors is then Bayes' rule up to the prior.
    """

    def __init__(self, model: nn.Module, outputs: int) -> None:
        super().__init__()
        self.model = model
        self.heads = nn.ModuleDict({key: nn.Linear(WIDTH, outputs) for key in model.encoders})

    def forward(self, **inputs: tuple[Tensor, Tensor]) -> Tensor:
        """In training [B, modalities, outputs], for :meth:`loss`; in eval mode the product, [B, outputs]."""
        own = self.own(self.model.features(**inputs), {key: here for key, (_, here) in inputs.items()})
        logits = torch.stack(list(own.values()), dim=1)
        return logits if self.training else logits.log_softmax(2).sum(1)

    def own(self, features: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What each modality says by itself."""
        return {key: self.heads[key](h) for key, h in features.items()}

    def loss(self, loss_fn: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
        """The sum of the towers' losses."""

        def summed(outputs: Tensor, targets: Tensor) -> Tensor:
            count = outputs.shape[1]
            return count * loss_fn(outputs.flatten(0, 1), targets.repeat_interleave(count))

        return summed
