"""The whole network: one encoder a modality, concatenated with a mask, and two linear layers on top.

Plain PyTorch, deterministic, and differentiable twice in both modes, so every optimiser of ours and of others
can train it. Dropping modalities at random during training is done outside, on the masks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hesse.multimodal.encoders import FEATURES, Convnet, audio, columns, he_, image, text
from hesse.multimodal.fusion import Concatenate

__all__ = ["Data", "FusedModel"]

Data = Tensor | tuple[Tensor, ...]

HIDDEN = 128
ENCODERS = {"image": image.Encoder, "audio": audio.Encoder, "text": text.Encoder, "columns": columns.Encoder}


class FusedModel(nn.Module):
    """Encoders, fusion and head.

    Args:
        settings: for each modality its ``kind`` ("image", "audio", "text" or "columns") and its encoder's
            settings. The order is the order of fusion.
        outputs: width of the output: the number of classes, or 1 for regression.

    ``forward`` takes each modality by name as the pair ``(data, present)``: data as the encoder takes them,
    present bool ``[B]``. It returns ``[B, outputs]``: logits, or the standardised value. Data that are not
    present have no influence on outputs and gradients, whatever they hold.

    Raises:
        ValueError: an unknown kind, no modality, or ``forward`` without one of the modalities.

    Example:
        >>> settings = {"text_name": {"kind": "text", "length": 4, "alphabet": "aet"},
        ...             "columns": {"kind": "columns", "numbers": 2, "categories": []}}
        >>> model = FusedModel(settings, outputs=3)
        >>> here = torch.tensor([True, True])
        >>> numbers, none = torch.zeros(2, 2), torch.zeros(2, 0, dtype=torch.int64)
        >>> codes = torch.tensor([[4, 3, 2, 0], [2, 4, 3, 0]])
        >>> model(text_name=(codes, here), columns=((numbers, none), here)).shape
        torch.Size([2, 3])
    """

    def __init__(self, settings: Mapping[str, Mapping[str, Any]], outputs: int) -> None:
        super().__init__()
        if not settings:
            raise ValueError("A model needs at least one modality; settings is empty.")
        self.encoders = nn.ModuleDict()
        for key, value in settings.items():
            if value["kind"] not in ENCODERS:
                raise ValueError(f"{key} is of kind {value['kind']!r}; there are {', '.join(ENCODERS)}.")
            self.encoders[key] = ENCODERS[value["kind"]](dict(value))
        self.fusion = Concatenate(dict.fromkeys(settings, FEATURES))
        last = nn.Linear(HIDDEN, outputs)
        nn.init.normal_(last.weight, std=HIDDEN**-0.5)  # no ReLU follows: half of He's variance
        nn.init.zeros_(last.bias)
        self.head = nn.Sequential(he_(nn.Linear(self.fusion.width, HIDDEN)), nn.ReLU(), last)

    def prepare(self, inputs: Mapping[str, tuple[Data, Tensor]]) -> dict[str, tuple[Data, Tensor]]:
        """The inputs with everything done that no parameter takes part in (pixels scaled, spectrograms taken).

        ``forward`` takes either; preparing pays where one batch is evaluated several times, as second-order
        optimisers do.
        """
        prepared = dict(inputs)
        for key, encoder in self.encoders.items():
            data, present = inputs[key]
            if isinstance(encoder, Convnet) and isinstance(data, Tensor):
                prepared[key] = (encoder.prepare(data), present)
        return prepared

    def features(self, **inputs: tuple[Data, Tensor]) -> dict[str, Tensor]:
        """What each encoder makes of its modality, ``[B, FEATURES]`` by name; of absent data, of zeros."""
        if inputs.keys() != self.encoders.keys():
            wanted, got = ", ".join(self.encoders), ", ".join(inputs) or "none"
            raise ValueError(f"The model takes the modalities {wanted}; got {got}.")
        # Absent data are blanked before the encoder: masking its output alone would leave 0 x NaN in the
        # gradients.
        return {key: encoder(_blank(*inputs[key])) for key, encoder in self.encoders.items()}

    def fuse(self, features: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> Tensor:
        """The outputs ``[B, outputs]`` from the features of :meth:`features` and bool ``[B]`` by modality."""
        output: Tensor = self.head(self.fusion(features, present))
        return output

    def forward(self, **inputs: tuple[Data, Tensor]) -> Tensor:
        features = self.features(**inputs)
        return self.fuse(features, {key: present for key, (_, present) in inputs.items()})


def _blank(data: Data, present: Tensor) -> Data:
    """Zeros in the rows that are not present."""
    if isinstance(data, tuple):
        return tuple(torch.where(_rows(present, part), part, torch.zeros_like(part)) for part in data)
    return torch.where(_rows(present, data), data, torch.zeros_like(data))


def _rows(present: Tensor, data: Tensor) -> Tensor:
    return present.view(-1, *[1] * (data.dim() - 1))
