"""Columns: standardised numbers and embedded categories, side by side, through two linear layers.

A missing number is its column's mean (zero, after standardisation) and a flag; a missing or unseen category
is category 0. Flags and category 0 start without effect, so what training never met changes nothing later.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hesse.multimodal.encoders import FEATURES, he_

__all__ = ["Encoder"]

FAR = 10.0  # deviations: a value further out says "far out" and no more
WIDEST = 16  # of a category's vector


class Encoder(nn.Module):
    """Numbers ``[B, n]`` and categories ``[B, m]`` to ``[B, FEATURES]``.

    Args:
        settings: ``numbers``, how many number columns; ``categories``, for each category column its number of
            categories, category 0 (missing or unseen) counted.

    ``forward`` takes the pair ``(numbers, categories)``: numbers float ``[B, n]`` with mean 0 and deviation
    1, NaN where missing; categories int64 ``[B, m]``, 0 where missing or unseen.

    Example:
        >>> encoder = Encoder({"numbers": 2, "categories": [3, 40]})
        >>> numbers = torch.tensor([[0.5, float("nan")]])
        >>> encoder((numbers, torch.tensor([[1, 39]]))).shape
        torch.Size([1, 64])
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__()
        n, sizes = settings["numbers"], settings["categories"]
        widths = [min(WIDEST, 1 + math.isqrt(size)) for size in sizes]
        self.embeddings = nn.ModuleList(nn.Embedding(s, w) for s, w in zip(sizes, widths, strict=True))
        self.hidden = he_(nn.Linear(2 * n + sum(widths), FEATURES))
        self.features = he_(nn.Linear(FEATURES, FEATURES))
        with torch.no_grad():
            self.hidden.weight[:, n : 2 * n] = 0  # the flags
            for embedding in self.embeddings:
                embedding.get_parameter("weight")[0] = 0

    def forward(self, data: tuple[Tensor, Tensor]) -> Tensor:
        numbers, categories = data
        missing = numbers.isnan()
        dtype = self.hidden.weight.dtype
        known = numbers.masked_fill(missing, 0).clamp(-FAR, FAR).to(dtype)
        vectors = [embedding(categories[:, i]) for i, embedding in enumerate(self.embeddings)]
        x = torch.cat([known, missing.to(dtype), *vectors], dim=1)
        return F.relu(self.features(F.relu(self.hidden(x))))
