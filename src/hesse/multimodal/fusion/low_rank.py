"""The tensor product: every feature of one modality times every feature of the others, without ever forming it.

Tensor fusion (Zadeh et al., 2017) takes the outer product of ``[x_1; 1], .., [x_M; 1]`` and a linear layer on it. Its
weight is a tensor of as many dimensions as there are modalities; written as a sum of few outer products (Liu et al.,
2018) the layer becomes a product of linear maps, one a modality. Rank one is a plain elementwise product.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from hesse.multimodal.fusion.masking import masked

__all__ = ["LowRank"]


class LowRank(nn.Module):
    """h = sum over r of ``c_r prod_m (W_m^r x_m + b_m^r)``: sums of products, one factor a modality.

    The one in ``[x_m; 1]`` keeps products of fewer modalities among the terms. So a modality that is absent needs no
    rule of its own: what is left of its factor is the bias.

    Args:
        widths: the width of each modality's features.
        width: of the result.
        rank: how many products there are in the sum.

    References:
        Zadeh, Chen, Poria, Cambria and Morency, Tensor fusion network for multimodal sentiment analysis, EMNLP 2017.
        Liu, Shen, Lakshminarasimhan, Liang, Zadeh and Morency, Efficient low-rank multimodal fusion with
        modality-specific factors, ACL 2018.

    Example:
        The weight of rank one that it stands for, on ``[x; flag; 1] (x) [y; flag; 1]``:

        >>> fuse = LowRank({"a": 1, "b": 1}, width=1, rank=1)
        >>> A, B = (torch.cat([f.weight, f.bias[:, None]], 1)[0] for f in fuse.factors.values())
        >>> x, y = torch.tensor([[2.0]]), torch.tensor([[3.0]])
        >>> here = torch.tensor([True])
        >>> outer = torch.outer(torch.tensor([2.0, 1.0, 1.0]), torch.tensor([3.0, 1.0, 1.0]))
        >>> h = fuse({"a": x, "b": y}, {"a": here, "b": here})
        >>> torch.allclose(h, fuse.mix.weight * (outer * torch.outer(A, B)).sum())
        True
    """

    def __init__(self, widths: Mapping[str, int], width: int = 64, rank: int = 4) -> None:
        super().__init__()
        self.modalities: Sequence[str] = tuple(widths)
        self.width, self.rank = width, rank
        self.factors = nn.ModuleDict({key: nn.Linear(inside + 1, width * rank) for key, inside in widths.items()})
        for key, inside in widths.items():
            # Factors of mean 1 and variance 1/M: the square of their product is (1 + 1/M)^M < e in the mean, however
            # many there are. Products of centred factors nearly vanish, and their gradients with them.
            nn.init.normal_(self.factors[key].get_parameter("weight"), std=(inside * len(widths)) ** -0.5)
            nn.init.ones_(self.factors[key].get_parameter("bias"))
        self.mix = nn.Linear(rank, 1, bias=False)
        nn.init.constant_(self.mix.weight, 1 / math.sqrt(rank))

    def forward(self, features: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> Tensor:
        """``features[key]``: ``[B, width]``, ``present[key]``: bool ``[B]``. Returns ``[B, self.width]``."""
        parts = masked(features, present, self.modalities)
        product = torch.ones((), dtype=parts[0].dtype, device=parts[0].device)
        for key, x in zip(self.modalities, parts, strict=True):
            product = product * self.factors[key](x)
        mixed: Tensor = self.mix(product.view(-1, self.width, self.rank))
        return mixed.squeeze(2)
