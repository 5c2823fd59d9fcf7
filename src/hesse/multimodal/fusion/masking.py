"""What every fusion begins with: features that are there as they are, and zeros for those that are not.

Selected, not multiplied: zero times infinity is not zero, neither in the result nor in a gradient.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

__all__ = ["kept", "masked"]


def kept(present: Tensor, x: Tensor) -> Tensor:
    """``x`` [B, ...] with zeros in the rows that are not ``present`` (bool [B]).

    Example:
        >>> kept(torch.tensor([True, False]), torch.tensor([[1.0], [float("nan")]]))
        tensor([[1.],
                [0.]])
    """
    return torch.where(present.view(-1, *[1] * (x.dim() - 1)), x, torch.zeros_like(x))


def masked(features: Mapping[str, Tensor], present: Mapping[str, Tensor], modalities: Sequence[str]) -> list[Tensor]:
    """Each modality's features [B, width + 1]: zeros where absent, and a last column that says which is which.

    The flag lets the layer behind tell "absent" from "present, with all features zero".

    Example:
        >>> there = torch.tensor([True, False])
        >>> masked({"text": torch.tensor([[0.5], [2.0]])}, {"text": there}, ["text"])
        [tensor([[0.5000, 1.0000],
                [0.0000, 0.0000]])]
    """
    parts = []
    for key in modalities:
        x = kept(present[key], features[key])
        parts.append(torch.cat([x, present[key].to(x.dtype).unsqueeze(1)], dim=1))
    return parts
