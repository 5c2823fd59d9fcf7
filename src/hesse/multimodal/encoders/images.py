"""Sequences of pictures: one tower looks at each, and mean and maximum over the sequence say what is in it.

Deep Sets (Zaheer et al. 2017): neither the number of pictures nor their order matters. As many places are kept as 95 %
of the training rows need; of a longer sequence evenly spaced pictures are taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from hesse.multimodal.encoders import FEATURES, he_, image, pretrained
from hesse.multimodal.sequences import evenly

__all__ = ["Encoder", "decode", "plan", "storage", "usual_length"]

LONGEST = 64  # pictures a row
TOWERS = {"features": pretrained.Projection, "pretrained": pretrained.Encoder}


def plan(values: Sequence[Sequence[Path]]) -> dict[str, Any]:
    """The settings of :func:`image.plan` for all pictures, and ``length``, how many a row are kept.

    Args:
        values: the resolved paths of each row.

    Raises:
        InputError: none of the pictures looked at can be read.
    """
    return {**image.plan([path for paths in values for path in paths]), "length": usual_length(values)}


def usual_length(values: Sequence[Sequence[Path]]) -> int:
    """How many pictures a row are kept: the 95th percentile, at most 64."""
    return max(1, min(LONGEST, int(np.quantile([len(paths) for paths in values], 0.95, method="higher"))))


def storage(settings: dict[str, Any]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape ``(length, channels, height, width)`` and dtype (uint8) of a decoded sequence."""
    shape, dtype = image.storage(settings)
    return (settings["length"], *shape), dtype


def decode(value: Sequence[Path], settings: dict[str, Any]) -> NDArray[np.uint8]:
    """The pictures of one row, uint8 ``[length, channels, height, width]``, zeros behind the last.

    Raises:
        InputError: one of them cannot be read.
    """
    shape, dtype = storage(settings)
    result = np.zeros(shape, dtype)
    for i, path in enumerate(evenly(value, shape[0])):
        result[i] = image.decode(path, settings)
    return result


class Encoder(nn.Module):
    """One tower for every picture, then mean and maximum over those that are there.

    Args:
        settings: as :func:`plan` made them, or those of a pretrained ``tower``.

    ``forward`` takes the pair ``(pictures, counts)``: uint8 ``[B, length, channels, height, width]`` and int64 ``[B]``,
    how many of each row are there. Returns ``[B, FEATURES]``.

    Example:
        >>> settings = {"height": 8, "width": 8, "channels": 1, "mean": [30.0], "std": [60.0], "length": 3}
        >>> encoder, pictures = Encoder(settings), torch.randint(0, 255, (2, 3, 1, 8, 8), dtype=torch.uint8)
        >>> one = encoder((pictures, torch.tensor([1, 2])))
        >>> pictures[0, 1:] = 0  # what is behind the last does not matter
        >>> torch.equal(encoder((pictures, torch.tensor([1, 2]))), one)
        True
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__()
        tower = settings.get("tower")
        self.tower: nn.Module = image.Encoder(settings) if tower is None else TOWERS[tower["kind"]](tower)
        self.features = he_(nn.Linear(2 * FEATURES, FEATURES))
        with torch.no_grad():  # a maximum over pictures is larger than what one of them shows
            self.features.weight[:, FEATURES:] /= 2

    def prepare(self, data: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Standardised pixels beside the counts."""
        pictures, counts = data
        prepare = getattr(self.tower, "prepare", None)
        return pictures if prepare is None else prepare(pictures.flatten(0, 1)).unflatten(0, pictures.shape[:2]), counts

    def forward(self, data: tuple[Tensor, Tensor]) -> Tensor:
        pictures, counts = data
        B, length = pictures.shape[:2]
        each = self.tower(pictures.flatten(0, 1)).unflatten(0, (B, length))  # [B, length, FEATURES]
        there = torch.arange(length, device=counts.device) < counts[:, None]
        each = each * there.to(each.dtype).unsqueeze(2)
        mean = each.sum(1) / counts.clamp(min=1).to(each.dtype)[:, None]
        # After ReLU nothing is below the zeros of absent pictures, so the maximum needs no mask of its own.
        return F.relu(self.features(torch.cat([mean, each.amax(1)], dim=1)))
