"""Concatenation: the features of several modalities become one vector that says what is there and what is not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

__all__ = ["Concatenate"]


class Concatenate(nn.Module):
    """Features side by side, in a fixed order, zero where absent, followed by one presence flag a modality.

    The flags let the layer behind tell "absent" from "present, with all features zero".

    Args:
        widths: the width of each modality's features; its order is the order of concatenation.

    Attributes:
        width: of the result.

    Example:
        >>> fuse = Concatenate({"image": 2, "text": 1})
        >>> features = {"text": torch.tensor([[3.0]]), "image": torch.tensor([[1.0, 2.0]])}
        >>> fuse(features, {"image": torch.tensor([True]), "text": torch.tensor([False])})
        tensor([[1., 2., 0., 1., 0.]])
    """

    def __init__(self, widths: Mapping[str, int]) -> None:
        super().__init__()
        self.modalities: Sequence[str] = tuple(widths)
        self.width = sum(widths.values()) + len(widths)

    def forward(self, features: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> Tensor:
        """``features[key]``: ``[B, width]``, ``present[key]``: bool ``[B]``. Returns ``[B, self.width]``."""
        masks = [present[key].unsqueeze(1) for key in self.modalities]
        # Selected, not multiplied: zero times infinity is not zero.
        parts = [
            torch.where(mask, features[key], torch.zeros_like(features[key]))
            for key, mask in zip(self.modalities, masks, strict=True)
        ]
        return torch.cat([*parts, *(mask.to(parts[0].dtype) for mask in masks)], dim=1)
