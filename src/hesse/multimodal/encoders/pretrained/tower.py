"""The part of a checkpoint that trains, and what follows it: pooled features, standardised, through one linear layer.

Features are the first position, where BERT and ViT gather what they know, and beside it the mean over all positions; of
a convolutional map or a sound the mean alone. A frozen model's are computed once, before training, and only
:class:`Projection` is part of the network; a model that trains, or whose last blocks do, is part of it as
:class:`Encoder`. Either way the network starts from features of unit scale. Dropout stays off, as in all our encoders.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hesse.finding import InputError
from hesse.multimodal.encoders import FEATURES, he_
from hesse.multimodal.encoders.pretrained.checkpoint import blocks_of, load, present_folder
from hesse.multimodal.encoders.pretrained.reading import Reader, reader_of

__all__ = ["Encoder", "Projection", "Tower", "release"]

POOLING = "mean and first 1"
"""Names how features are pooled; part of what cached features depend on."""

FAR = 10.0  # deviations


class Tower(nn.Module):
    """A model of ``transformers`` from arrays to pooled features ``[B, width]``."""

    scale: Tensor
    shift: Tensor

    def __init__(self, reader: Reader) -> None:
        super().__init__()
        self.kind, self.masked = reader.kind, reader.masked
        self.model = load(reader.folder, reader.kind)
        if self.kind == "image":
            for name, values in zip(("scale", "shift"), reader.scale(), strict=True):
                self.register_buffer(name, torch.from_numpy(values), persistent=False)

    def train(self, mode: bool = True) -> Tower:
        """Gradients or not, the model is evaluated: no dropout, no masking, no running statistics."""
        super().train(mode)
        self.model.eval()
        return self

    def prepare(self, data: Tensor) -> Tensor:
        """Pixels as the model takes them; tokens and sounds are so already."""
        return data if self.kind != "image" or data.is_floating_point() else data * self.scale + self.shift

    def forward(self, data: Tensor) -> Tensor:
        """``data`` as read (see :mod:`reading`) or prepared, with a dimension for the batch in front."""
        data = self.prepare(data)
        if self.kind == "image":
            return _pooled(self.model(pixel_values=data).last_hidden_state)
        there = ~data.isnan() if data.is_floating_point() else data >= 0
        data = torch.where(there, data, torch.zeros_like(data))
        if self.kind == "text":
            hidden = self.model(input_ids=data.long(), attention_mask=there.long()).last_hidden_state
            return _pooled(hidden, there)
        name = getattr(self.model, "main_input_name")  # noqa: B009 - transformers', unknown to nn.Module
        data = data.to(next(self.model.parameters()).dtype)
        if not self.masked or data.dim() > 2:
            return _pooled(self.model(**{name: data}).last_hidden_state, first=False)
        hidden = self.model(**{name: data}, attention_mask=there.long()).last_hidden_state
        return _pooled(hidden, self._frames(hidden, there), first=False)

    def _frames(self, hidden: Tensor, there: Tensor) -> Tensor | None:
        """Which frames come from samples that are there, where the model can tell."""
        of_samples = getattr(self.model, "_get_feature_vector_attention_mask", None)
        return None if of_samples is None else of_samples(hidden.shape[1], there.long()).bool()


class Encoder(nn.Module):
    """A tower that trains, wholly or in its last blocks, and a projection to ``[B, FEATURES]``.

    Args:
        settings: as :func:`pretrained.plan` made them, and what the column ``reads``.

    Its state holds what trains; the rest is read from the checkpoint, which must still be the one of the settings.
    """

    center: Tensor
    spread: Tensor

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__()
        reader = reader_of(settings["reads"], present_folder(settings), settings)
        self.tower = Tower(reader)
        release(self.tower.model, settings)
        self.features = _projection(self, settings)
        self.register_state_dict_post_hook(_without_frozen)
        self.register_load_state_dict_pre_hook(_with_frozen)

    def prepare(self, data: Tensor) -> Tensor:
        """The tower's input with everything done that no parameter takes part in."""
        return self.tower.prepare(data)

    def forward(self, data: Tensor) -> Tensor:
        # A copy, since division keeps its divisor for the backward pass, and buffers may be restored before that.
        return F.relu(self.features((self.tower(data) - self.center) / self.spread.clone()))


class Projection(nn.Module):
    """Features of a frozen model, ``[B, width]``, standardised, through one linear layer to ``[B, FEATURES]``.

    Example:
        >>> project = Projection({"width": 3, "center": [0.0, 1.0, 2.0], "spread": [1.0, 1.0, 0.5]})
        >>> project(torch.tensor([[0.0, 1.0, 2.0]])).equal(project.features.bias.relu()[None])
        True
    """

    center: Tensor
    spread: Tensor

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__()
        self.features = _projection(self, settings)

    def forward(self, data: Tensor) -> Tensor:
        return F.relu(self.features(((data - self.center) / self.spread).clamp(-FAR, FAR)))


def _projection(module: nn.Module, settings: dict[str, Any]) -> nn.Linear:
    for name in ("center", "spread"):  # not persistent: they are in the settings
        module.register_buffer(name, torch.tensor(settings[name]), persistent=False)
    return he_(nn.Linear(settings["width"], FEATURES))


def _pooled(hidden: Tensor, there: Tensor | None = None, *, first: bool = True) -> Tensor:
    """``hidden``: ``[B, positions, channels]`` or a map ``[B, channels, height, width]``; ``there``: of positions."""
    if hidden.dim() == 4:
        return hidden.flatten(2).mean(2)
    if there is None:
        mean = hidden.mean(1)
    else:
        weights = there.to(hidden.dtype)
        mean = (hidden * weights[:, :, None]).sum(1) / weights.sum(1, keepdim=True).clamp(min=1)
    return torch.cat([hidden[:, 0], mean], dim=1) if first else mean


def release(model: nn.Module, settings: dict[str, Any]) -> None:
    """Let all parameters train, or those of the last blocks, but none that the features do not depend on."""
    trainable = settings["trainable"]
    model.requires_grad_(trainable == "all")
    if trainable != "all":
        blocks = blocks_of(model)
        if trainable > len(blocks):
            raise InputError(
                "too many blocks",
                settings["source"],
                f"The model is a stack of {len(blocks)} blocks; {trainable} were to train.",
                "Give a smaller number, or all.",
                value=trainable,
            )
        for block in blocks[-trainable:]:
            block.requires_grad_(True)
    for name in settings.get("unused", ()):
        model.get_parameter(name).requires_grad_(False)


def _frozen(module: Encoder, prefix: str) -> Iterable[tuple[str, Tensor]]:
    """What the checkpoint has and training does not touch: frozen parameters, and buffers."""
    for name, parameter in module.tower.model.named_parameters():
        if not parameter.requires_grad:
            yield f"{prefix}tower.model.{name}", parameter
    for name, buffer in module.tower.model.named_buffers():
        yield f"{prefix}tower.model.{name}", buffer


def _without_frozen(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    assert isinstance(module, Encoder)
    for name, _tensor in _frozen(module, prefix):
        state.pop(name, None)


def _with_frozen(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    assert isinstance(module, Encoder)
    persistent = nn.Module.state_dict(module.tower.model)
    start = f"{prefix}tower.model."
    for name, tensor in _frozen(module, prefix):
        if name.removeprefix(start) in persistent:
            state.setdefault(name, tensor)
