"""A trained model as one function of plain arrays: decoded cells in, logits and answers in the target's own units out.

What training leaves outside the weights is inside: pixels are scaled, spectrograms taken, logits divided by their
temperature, quantities given back their mean and scale. That is the form in which a model leaves PyTorch.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hesse.finding import InputError
from hesse.multimodal import FusedModel, Schema
from hesse.multimodal.encoders import audio, image, images, text
from hesse.training.calibration import probabilities, temperature_of

__all__ = ["Graph", "Port", "ports", "samples"]

PARTS = {"columns": ("numbers", "categories"), "images": ("pictures", "counts")}  # of data that are a pair
STORAGE = {"image": image.storage, "images": images.storage, "audio": audio.storage, "text": text.storage}
LOUDNESS = (3.0, 30.0, 300.0, 3000.0)  # of noise: from the last bits of silence to a third of the full level


@dataclass(frozen=True)
class Port:
    """One array that the function takes.

    Attributes:
        name: ``KEY`` of a modality, ``KEY.PART`` where its data are two arrays, and ``KEY.present``.
        modality: its key.
        kind: "image", "images", "audio", "text", "features" (of a frozen pretrained model) or "columns".
        shape: of a row.
        dtype: as NumPy calls it.
    """

    name: str
    modality: str
    kind: str
    shape: tuple[int, ...]
    dtype: str


def ports(schema: Schema) -> list[Port]:
    """The arrays in their order. One that would have no elements, such as the categories of a table without any, is
    left out.

    Raises:
        InputError: a pretrained encoder trains along, which this is not for.

    Example:
        >>> from hesse.multimodal import make_schema, read_table
        >>> table = {"x": [0.5, 1.5] * 10, "kind": ["a", "b"] * 10}
        >>> from pathlib import Path; import pyarrow
        >>> schema, _ = make_schema(read_table(pyarrow.table(table)), "kind", root=Path())
        >>> [(port.name, port.dtype, port.shape) for port in ports(schema)]
        [('columns.numbers', 'float32', (1,)), ('columns.present', 'bool', ())]
    """
    found = []
    for key, settings in schema.model_settings().items():
        kind = settings["kind"]
        shapes: list[tuple[tuple[int, ...], str]]
        if kind not in (*STORAGE, "columns", "features"):
            (column,) = schema.modalities[key]
            raise InputError(
                "not exportable",
                f"column '{column.name}'",
                "Its encoder is a pretrained one that trains along, and only hesse's own and frozen ones are exported.",
                "Train without --trainable for it, or use hesse predict.",
            )
        if kind == "features":
            shapes = [((settings["width"],), "float32")]
        elif kind == "columns":
            shapes = [((settings["numbers"],), "float32"), ((len(settings["categories"]),), "int64")]
        else:
            shape, dtype = STORAGE[kind](settings)
            shapes = [(shape, dtype.name)] + ([((), "int64")] if kind == "images" else [])
        names = [f"{key}.{part}" for part in PARTS[kind]] if kind in PARTS else [key]
        found += [
            Port(name, key, kind, shape, dtype)
            for name, (shape, dtype) in zip(names, shapes, strict=True)
            if 0 not in shape
        ]
        found.append(Port(f"{key}.present", key, kind, (), "bool"))
    return found


class Graph(nn.Module):
    """The function. It takes the arrays of :func:`ports`, ``[rows, *shape]`` each, in that order.

    It returns the model's logits float32 ``[rows, outputs]``, and for each target its calibrated probabilities float32
    ``[rows, classes]``, or its values float64 ``[rows]`` in the units of the table.

    Args:
        schema: of the run.
        model: its model, of which a copy is kept.
        calibration: its ``calibration.json``; empty if there is none.

    Attributes:
        inputs, outputs: names.
    """

    def __init__(self, schema: Schema, model: FusedModel, calibration: dict[str, Any]) -> None:
        super().__init__()
        self.schema, self.calibration, self.ports = schema, calibration, ports(schema)
        self.model = deepcopy(model).eval()
        for encoder in self.model.encoders.values():
            if isinstance(encoder, audio.Encoder):
                encoder.mel = _AtOnce(encoder.mel)  # type: ignore[assignment]
        self.inputs = [port.name for port in self.ports]
        several = len(schema.targets) > 1
        what = ["values" if target.task == "regression" else "probabilities" for target in schema.targets]
        self.outputs = ["logits"] + [
            f"{target.name}.{word}" if several else word for target, word in zip(schema.targets, what, strict=True)
        ]

    def forward(self, *arrays: Tensor) -> tuple[Tensor, ...]:
        # ONNX Runtime selects among integers of 32 bits, not of 16.
        wide = (array.int() if array.dtype == torch.int16 else array for array in arrays)
        given = dict(zip(self.inputs, wide, strict=True))
        inputs: dict[str, Any] = {}
        for key, settings in self.schema.model_settings().items():
            present = given[f"{key}.present"]
            if settings["kind"] == "columns":
                none = torch.zeros_like(present, dtype=torch.float32)[:, None][:, :0]
                numbers, categories = given.get(f"{key}.numbers", none), given.get(f"{key}.categories", none.long())
                inputs[key] = (numbers, categories), present
            elif settings["kind"] in PARTS:
                inputs[key] = tuple(given[f"{key}.{part}"] for part in PARTS[settings["kind"]]), present
            else:
                inputs[key] = given[key], present
        out = self.model(**inputs)
        answers = [out]
        for target, own in zip(self.schema.targets, self.schema.slices, strict=True):
            if target.task == "regression":
                answers.append(target.mean + target.scale * out[:, own.start].double())
            else:
                answers.append(
                    probabilities(target.task, out[:, own], temperature_of(self.calibration, target)).float()
                )
        return tuple(answers)


class _AtOnce(nn.Module):
    """The spectrograms of all rows at once: pieces that fit a cache would write the number of rows into the graph."""

    def __init__(self, mel: audio.LogMel) -> None:
        super().__init__()
        self.mel = mel

    def forward(self, data: Tensor) -> Tensor:
        return self.mel._transform(data)


def samples(schema: Schema, rows: int, seed: int = 0) -> list[NDArray[Any]]:
    """Arrays to try the function with: noise of every loudness, texts of every length, missing numbers.

    In the first row everything is present and in the last, if there are several, nothing.
    """
    random = np.random.default_rng(seed)
    settings = schema.model_settings()
    arrays: list[NDArray[Any]] = []
    for port in ports(schema):
        shape, own = (rows, *port.shape), settings[port.modality]
        values: NDArray[Any]
        if port.dtype == "bool":
            values = random.random(rows) < 0.7
            values[0], values[-1] = True, rows == 1
        elif port.kind == "audio":
            loud = np.resize(LOUDNESS, rows)[:, None] * random.normal(size=shape)
            time = np.arange(port.shape[0]) / own["rate"]
            tone = 20_000 * random.random((rows, 1)) * np.sin(2 * np.pi * random.uniform(50, 2000, (rows, 1)) * time)
            values = (loud + tone).clip(-32768, 32767)
        elif port.kind == "text":
            values = random.integers(1, 2 + len(own["alphabet"]), shape)
            values *= np.arange(port.shape[0]) < random.integers(0, 1 + port.shape[0], (rows, 1))
        elif port.name.endswith(".counts"):
            values = random.integers(1, 1 + own["length"], shape)
        elif port.name.endswith(".categories"):
            values = random.integers(0, own["categories"], shape)
        elif port.kind == "features":
            values = random.normal(size=shape)
        elif port.name.endswith(".numbers"):
            values = np.where(random.random(shape) < 0.1, np.nan, random.normal(size=shape))
        else:
            values = random.integers(0, 256, shape)
        arrays.append(values.astype(port.dtype))
    return arrays
