"""Every fusion on small features, in a model that is small enough for dense curvature."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hesse.multimodal.fusion import Bottleneck, Concatenate, Gated, Late, LowRank

WIDTHS = {"a": 3, "b": 2, "c": 4}
ROWS, OUTPUTS = 8, 3

MAKE: dict[str, Callable[[Mapping[str, int]], nn.Module]] = {
    "concat": Concatenate,
    "gated": lambda widths: Gated(widths, width=4),
    "bottleneck": lambda widths: Bottleneck(widths, tokens=2, shared=2, dim=4, heads=2, layers=2),
    "tensor": lambda widths: LowRank(widths, width=3, rank=2),
    "late": lambda widths: Late(widths, [("classification", OUTPUTS)], hidden=3),
    "late, several answers": lambda widths: Late(
        widths, [("regression", 1), ("classification", 2), ("regression", 1), ("multilabel", 2)], hidden=3
    ),
}


class Model(nn.Module):
    """Linear towers, a fusion, and a linear head where the fusion leaves the answer open. Smooth everywhere."""

    def __init__(self, name: str, widths: Mapping[str, int] = WIDTHS, inside: int = 3) -> None:
        super().__init__()
        self.towers = nn.ModuleDict({key: nn.Linear(inside, width) for key, width in widths.items()})
        self.fusion = MAKE[name](widths)
        self.head = nn.Sequential() if name.startswith("late") else nn.Linear(self.fusion.width, OUTPUTS)

    def forward(self, **inputs: tuple[Tensor, Tensor]) -> Tensor:
        features = {key: F.silu(tower(inputs[key][0])) for key, tower in self.towers.items()}
        return self.head(self.fusion(features, {key: here for key, (_, here) in inputs.items()}))


def made(name: str, widths: Mapping[str, int] = WIDTHS, dtype: torch.dtype = torch.float64) -> Model:
    torch.manual_seed(0)
    return Model(name, widths).to(dtype)


def presence(rows: int = ROWS) -> dict[str, Tensor]:
    """Every subset of three modalities, the empty one among them: one a row."""
    return {key: torch.arange(rows) & (1 << i) > 0 for i, key in enumerate(WIDTHS)}


def features(seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {key: torch.randn(ROWS, width, generator=g, dtype=dtype) for key, width in WIDTHS.items()}


def inputs(seed: int = 0, inside: int = 3) -> dict[str, tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(seed)
    here = presence()
    return {key: (torch.randn(ROWS, inside, generator=g, dtype=torch.float64), here[key]) for key in WIDTHS}
