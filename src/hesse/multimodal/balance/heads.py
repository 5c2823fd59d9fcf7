"""A head and a loss for each modality, beside the fused ones: no tower is left without a gradient of its own.

The simplest cure, and the ground of G-Blend and MMPareto. Auxiliary classifiers in the middle of deep networks are the
same idea in another place.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from hesse.multimodal.balance.cure import FUSED, Cure

__all__ = ["Heads"]


class Heads(Cure):
    """A linear head on each modality's features, trained along: ``fused + sum_m w_m * own_m``.

    Args:
        model, outputs, widths: see :class:`Cure`.
        weights: of the own losses and of ``"fused"``, by name; 1 where none is given. 0 takes a loss out.

    Raises:
        ValueError: weights of what is no modality, or negative ones.

    Source: Wang, Tran and Feiszli, "What Makes Training Multi-Modal Classification Networks Hard?", CVPR 2020, with
    fixed weights; deep supervision: Lee et al., "Deeply-Supervised Nets", AISTATS 2015.

    Example:
        At the start all heads of zero weights say the same, and the loss is that of three guesses among four classes:

        >>> import torch
        >>> from torch.nn.functional import cross_entropy
        >>> class Sum(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.towers = nn.ModuleDict({"left": nn.Linear(2, 4), "right": nn.Linear(3, 4)})
        ...     def features(self, **inputs):
        ...         return {key: tower(inputs[key][0]) for key, tower in self.towers.items()}
        ...     def fuse(self, features, present):
        ...         return sum(f * present[key][:, None] for key, f in features.items())
        >>> cure = Heads(Sum(), 4, {"left": 4, "right": 4})
        >>> _ = [p.data.zero_() for p in cure.parameters()]
        >>> here = torch.tensor([True, True])
        >>> outputs = cure(left=(torch.ones(2, 2), here), right=(torch.ones(2, 3), here))
        >>> round(cure.loss(cross_entropy)(outputs, torch.tensor([0, 1])).exp().item())
        64
    """

    def __init__(
        self, model: nn.Module, outputs: int, widths: Mapping[str, int], weights: Mapping[str, float] | None = None
    ) -> None:
        super().__init__(model, outputs, widths)
        self.heads = nn.ModuleDict()
        for key, width in widths.items():
            head = nn.Linear(width, outputs)
            nn.init.normal_(head.weight, std=width**-0.5)
            nn.init.zeros_(head.bias)
            self.heads[key] = head
        for key, weight in (weights or {}).items():
            if key not in (FUSED, *self.modalities) or not weight >= 0:
                raise ValueError(
                    f"weights are numbers of 0 or more for {FUSED} and {', '.join(widths)}; got {weight} for {key!r}."
                )
            self.weights[(FUSED, *self.modalities).index(key)] = weight

    def own(self, features: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {key: head(features[key]) for key, head in self.heads.items()}
