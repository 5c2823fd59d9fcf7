"""The whole network: one encoder a modality, a fusion of what they found, and two linear layers on top.

Plain PyTorch, deterministic, and differentiable twice in both modes, so every optimiser of ours and of others
can train it. Dropping modalities at random during training is done outside, on the masks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hesse.multimodal.encoders import FEATURES, Convnet, audio, columns, he_, image, images, pretrained, text
from hesse.multimodal.fusion import FUSIONS, Bottleneck, Concatenate, Gated, Late, LowRank

__all__ = ["Data", "FusedModel"]

Data = Tensor | tuple[Tensor, ...]

HIDDEN = 128
ENCODERS = {
    "image": image.Encoder,
    "images": images.Encoder,
    "audio": audio.Encoder,
    "text": text.Encoder,
    "columns": columns.Encoder,
    "features": pretrained.Projection,
    "pretrained": pretrained.Encoder,
}


class FusedModel(nn.Module):
    """Encoders, fusion and head.

    Args:
        settings: for each modality its ``kind`` ("image", "images", "audio", "text" or "columns"; "features" or
            "pretrained" of a pretrained model) and its encoder's settings. The order is the order of fusion.
        outputs: width of the output: the number of classes, or 1 for regression.
        fusion: "concat" (side by side), "gated", "bottleneck" (attention), "tensor" (products) or "late" (each
            modality answers for itself); :mod:`hesse.multimodal.fusion` has a file on each.
        answers: for each target its task ("classification", "multilabel" or "regression") and width, in their order;
            by default one classification, or one regression where ``outputs`` is 1. Only late fusion asks.
        prior: the outputs of a row of which nothing is present; by default whatever the fusion makes of it.

    ``forward`` takes each modality by name as the pair ``(data, present)``: data as the encoder takes them,
    present bool ``[B]``. It returns ``[B, outputs]``: logits, or the standardised value. Data that are not
    present have no influence on outputs and gradients, whatever they hold.

    Raises:
        ValueError: an unknown kind or fusion, no modality, answers that are not ``outputs`` wide, or ``forward``
            without one of the modalities.

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

    prior: Tensor | None

    def __init__(
        self,
        settings: Mapping[str, Mapping[str, Any]],
        outputs: int,
        fusion: str = "concat",
        answers: Sequence[tuple[str, int]] | None = None,
        prior: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        if not settings:
            raise ValueError("A model needs at least one modality; settings is empty.")
        if fusion not in FUSIONS:
            raise ValueError(f"There is no fusion {fusion!r}; there are {', '.join(FUSIONS)}.")
        answers = answers or [("regression" if outputs == 1 else "classification", outputs)]
        if sum(width for _, width in answers) != outputs:
            raise ValueError(f"The answers {answers} are not {outputs} wide together, as the output is.")
        self.encoders = nn.ModuleDict()
        for key, value in settings.items():
            if value["kind"] not in ENCODERS:
                raise ValueError(f"{key} is of kind {value['kind']!r}; there are {', '.join(ENCODERS)}.")
            self.encoders[key] = ENCODERS[value["kind"]](dict(value))
        if prior is not None and len(prior) != outputs:
            raise ValueError(f"The prior has {len(prior)} numbers, and the output is {outputs} wide.")
        self.register_buffer("prior", None if prior is None else torch.tensor([*prior]), persistent=False)
        widths = dict.fromkeys(settings, FEATURES)
        self.fusion: Concatenate | Gated | Bottleneck | LowRank | Late
        if fusion == "late":  # answers itself
            self.fusion, self.head = Late(widths, answers), nn.Sequential()
            return
        joint = {"concat": Concatenate, "gated": Gated, "bottleneck": Bottleneck, "tensor": LowRank}
        self.fusion = joint[fusion](widths)
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
            if isinstance(encoder, Convnet | images.Encoder | pretrained.Encoder):
                prepared[key] = (encoder.prepare(data), present)  # type: ignore[arg-type]
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
        if self.prior is None:
            return output
        something = torch.stack([present[key] for key in self.encoders]).any(0)
        return torch.where(something.unsqueeze(1), output, self.prior.to(output.dtype))

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
