"""Gates: for each row the modalities vote, feature by feature, on whom to listen to.

The gated multimodal unit (Arevalo et al., 2017). With gates that are all alike it is an average of the modalities; with
gates that are zero or one it picks a modality, a mixture of experts with an expert a modality.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from hesse.multimodal.fusion.masking import masked

__all__ = ["Gated"]


class Gated(nn.Module):
    """h = sum over m of ``z_m * tanh(W_m x_m)``, with gates ``z`` that are a softmax over the modalities present.

    The gates see all modalities, and which of them there are: ``z = softmax_m(V_m [x_1, .., x_M, presence])``, for each
    feature of h on its own. For two modalities that is the paper's pair ``z`` and ``1 - z``. What is absent has the
    gate zero, and the others share its part; where nothing is present, h is zero.

    Args:
        widths: the width of each modality's features.
        width: of the result.

    References:
        Arevalo, Solorio, Montes-y-Gomez and Gonzalez, Gated multimodal units for information fusion, ICLR workshop
        2017.

    Example:
        A modality that is alone is heard in full:

        >>> fuse = Gated({"image": 2, "text": 3}, width=4)
        >>> features = {"image": torch.randn(1, 2), "text": torch.randn(1, 3)}
        >>> alone = fuse(features, {"image": torch.tensor([True]), "text": torch.tensor([False])})
        >>> flagged = torch.cat([features["image"], torch.ones(1, 1)], dim=1)
        >>> torch.equal(alone, torch.tanh(fuse.values["image"](flagged)))
        True
    """

    def __init__(self, widths: Mapping[str, int], width: int = 128) -> None:
        super().__init__()
        self.modalities: Sequence[str] = tuple(widths)
        self.width = width
        everything = sum(widths.values()) + len(widths)
        self.values = nn.ModuleDict({key: nn.Linear(inside + 1, width) for key, inside in widths.items()})
        self.gates = nn.ModuleDict({key: nn.Linear(everything, width) for key in widths})
        for layer in [*self.values.values(), *self.gates.values()]:
            nn.init.xavier_normal_(layer.get_parameter("weight"))  # tanh and softmax want the signal as it is
            nn.init.normal_(layer.get_parameter("bias"), std=0.01)

    def forward(self, features: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> Tensor:
        """``features[key]``: ``[B, width]``, ``present[key]``: bool ``[B]``. Returns ``[B, self.width]``."""
        parts = masked(features, present, self.modalities)
        together = torch.cat(parts, dim=1)
        there = torch.stack([present[key] for key in self.modalities]).unsqueeze(2)  # [M, B, 1]
        scores = torch.stack([self.gates[key](together) for key in self.modalities])  # [M, B, width]
        # A row without anything gets finite scores for the softmax, and loses its gates afterwards.
        scores = torch.where(there | ~there.any(0), scores, torch.full_like(scores, -torch.inf))
        gates = torch.where(there, scores.softmax(0), torch.zeros_like(scores))
        values = torch.stack([self.values[key](x) for key, x in zip(self.modalities, parts, strict=True)])
        return (gates * values.tanh()).sum(0)
