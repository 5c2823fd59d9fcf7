"""Attention through a bottleneck: the modalities talk to each other through a few shared tokens and in no other way.

Attention bottlenecks (Nagrani et al., 2021). With as many shared tokens as there are others it comes near to attention
of everything to everything; without any the modalities stay apart. The narrow way makes each of them say what matters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hesse.multimodal.fusion.masking import kept, masked

__all__ = ["Bottleneck"]


class Bottleneck(nn.Module):
    """A few tokens a modality, a few shared ones, and layers of attention within each modality and the shared ones.

    In each layer a modality attends to its own tokens and the shared ones, with weights of its own, and writes both.
    The shared tokens go on as the mean of what the modalities present made of them; those that are absent write
    nothing. The shared tokens after the last layer, normalised and side by side, are the result. Where nothing is
    present they are what they began as, the same for every row.

    Args:
        widths: the width of each modality's features.
        tokens: made of each modality's features.
        shared: tokens that all read and write.
        dim: of a token.
        heads: of attention; they divide ``dim``.
        layers: of attention.

    References:
        Nagrani, Yang, Arnab, Jansen, Schmid and Sun, Attention bottlenecks for multimodal fusion, NeurIPS 2021.

    Example:
        >>> fuse = Bottleneck({"image": 8, "text": 8})
        >>> features = {"image": torch.randn(2, 8), "text": torch.randn(2, 8)}
        >>> neither, both = torch.tensor([False, True]), torch.tensor([False, True])
        >>> h = fuse(features, {"image": neither, "text": both})
        >>> h.shape, torch.equal(h[0], fuse.norm(fuse.shared.weight).flatten())
        (torch.Size([2, 128]), True)
    """

    def __init__(
        self,
        widths: Mapping[str, int],
        tokens: int = 4,
        shared: int = 4,
        dim: int = 32,
        heads: int = 4,
        layers: int = 2,
    ) -> None:
        super().__init__()
        self.modalities: Sequence[str] = tuple(widths)
        self.width, self.dim = shared * dim, dim
        self.tokens = nn.ModuleDict({key: nn.Linear(inside + 1, tokens * dim) for key, inside in widths.items()})
        self.shared = nn.Embedding(shared, dim)  # a layer that curvature by layers knows, unlike a bare parameter
        # Small: what is written weighs from the first step on, and the norm brings it to size.
        nn.init.normal_(self.shared.weight, std=0.02)
        self.layers = nn.ModuleList(
            nn.ModuleDict({key: Attention(dim, heads) for key in widths}) for _ in range(layers)
        )
        self.norm = nn.LayerNorm(dim)

    def forward(self, features: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> Tensor:
        """``features[key]``: ``[B, width]``, ``present[key]``: bool ``[B]``. Returns ``[B, self.width]``."""
        parts = dict(zip(self.modalities, masked(features, present, self.modalities), strict=True))
        own = {key: self.tokens[key](x).unflatten(1, (-1, self.dim)) for key, x in parts.items()}
        rows, count = next(iter(own.values())).shape[0], self.shared.num_embeddings
        index = torch.arange(count, device=self.shared.weight.device)
        shared = self.shared(index.expand(rows, count))  # looked up for each row: an example has gradients of its own
        there = torch.stack([present[key] for key in self.modalities]).sum(0)
        for layer in self.layers:
            assert isinstance(layer, nn.ModuleDict)
            written = torch.zeros_like(shared)
            for key in self.modalities:
                x = layer[key](torch.cat([own[key], shared], dim=1))
                own[key] = x[:, :-count]
                written = written + kept(present[key], x[:, -count:])
            mean = written / there.clamp_min(1).to(written.dtype).view(-1, 1, 1)
            shared = torch.where((there > 0).view(-1, 1, 1), mean, shared)
        result: Tensor = self.norm(shared)
        return result.flatten(1)


class Attention(nn.Module):
    """A layer of a transformer, norms first: ``x + attention(norm x)``, then ``x + mlp(norm x)``, on [B, tokens, dim].

    Products and a softmax, written out: fused kernels of attention have no second derivatives.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(dim)
        self.read = nn.Linear(dim, 3 * dim)
        self.write = nn.Linear(dim, dim)
        self.norm_between = nn.LayerNorm(dim)
        self.widen = nn.Linear(dim, 2 * dim)
        self.narrow = nn.Linear(2 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        queries, keys, values = self.read(self.norm(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        weights = (queries @ keys.mT / queries.shape[-1] ** 0.5).softmax(-1)
        x = x + self.write((weights @ values).transpose(1, 2).flatten(2))
        narrowed: Tensor = self.narrow(F.gelu(self.widen(self.norm_between(x))))
        return x + narrowed
