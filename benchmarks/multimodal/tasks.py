"""Pairs and triples of modalities: where the quick one starves the slow one, where one deceives, where nothing starves.

- ``degraded``: written and spoken digits, both spoiled, so that neither suffices (:mod:`benchmarks.digits`).
- ``speaker``: clean pictures, and clean recordings of one voice in training, of two others in validation, of the last
  three in the test. The audio tower is perfect on the voice it knows, and right in half of the rows of new ones.
  Validation must ask what the test will ask, unheard voices: on the voice of training no rule could see what is coming.
- ``heard``: the same, but the validation rows have the voice of training (other takes): what such a split conceals.
- ``demo``: hesse's built-in data, three modalities of 1797 rows, as the main job encodes them.
- ``balanced``: the left and the right half of one picture: two witnesses of equal strength, the control.

Pairs are made by class: a row's picture and recording share the digit and nothing else, and given the digit they are
independent. The halves of ``balanced`` are of one picture, and are not.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import torch
from torch import Tensor, nn

from benchmarks import digits
from benchmarks.multimodal.models import Inputs, Towers
from hesse import demo

__all__ = ["CLASSES", "TASKS", "Data", "Part", "Task"]

CLASSES = 10
SPEAKERS = 6
SCARCE = 2000  # pictures for training in ``speaker``: the image alone is right in 95 of 100 then
DEMO = {"train": 1097, "valid": 300, "test": 400}


@dataclass(frozen=True)
class Part:
    """Rows of a task: inputs ``{modality: (data [N, ...], present [N])}`` and labels [N]."""

    inputs: Inputs
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, rows: Tensor | slice) -> tuple[Inputs, Tensor]:
        return {key: (x[rows], here[rows]) for key, (x, here) in self.inputs.items()}, self.labels[rows]

    def batches(self, size: int) -> list[tuple[Inputs, Tensor]]:
        """All rows in their order."""
        return [self.batch(slice(i, i + size)) for i in range(0, len(self), size)]


@dataclass(frozen=True)
class Data:
    """The parts of a task by name, and ``make()``, a fresh model for it."""

    parts: dict[str, Part]
    make: Callable[[], nn.Module]


@dataclass(frozen=True)
class Task:
    """``load(seed)``: split, pairs and noise by that seed."""

    name: str
    says: str
    load: Callable[[int], Data]
    batch: int = 128

    def missing(self) -> str | None:
        """Why it cannot run here, if so."""
        if self.name != "demo" and not digits.available():
            return f"no data in {digits.DATA} (set HESSE_DATA to the folder with mnist/ and fsdd/)"
        return None


def degraded(seed: int) -> Data:
    parts = {name: _part(y, image=image, audio=audio) for name, ((image, audio), y) in digits.load(seed).items()}
    return Data(parts, _towers(parts))


def balanced(seed: int) -> Data:
    rng = np.random.default_rng(seed)
    images, labels = digits._mnist()
    pictures = _standard(torch.from_numpy(images.astype(np.float32))[:, None])
    parts = {}
    for name, rows in _rows(rng, len(images), digits.SIZES).items():
        x = pictures[rows]
        parts[name] = _part(torch.from_numpy(labels[rows]).long(), left=x[..., :14], right=x[..., 14:])
    return Data(parts, _towers(parts))


def speaker(seed: int, heard_before: bool = False) -> Data:
    rng = np.random.default_rng(seed)
    images, labels = digits._mnist()
    pictures = _standard(torch.from_numpy(images.astype(np.float32))[:, None])
    waves, spoken = digits._fsdd()
    with np.load(digits.DATA / "fsdd" / "fsdd.npz") as archive:
        voices, late = archive["speaker"], archive["take"] >= 40
    sounds = _standard(digits._log_mel(torch.from_numpy(waves)))
    turn = (voices.astype(int) - seed) % SPEAKERS
    heard = {"train": turn == 0, "valid": (turn == 1) | (turn == 2), "test": turn > 2}
    if heard_before:
        heard |= {"train": (turn == 0) & ~late, "valid": (turn == 0) & late}
    parts = {}
    for name, rows in _rows(rng, len(images), digits.SIZES | {"train": SCARCE}).items():
        y = labels[rows]
        pools = [np.flatnonzero(heard[name] & (spoken == c)) for c in range(CLASSES)]
        chosen = np.array([rng.choice(pools[c]) for c in y])
        parts[name] = _part(torch.from_numpy(y).long(), image=pictures[rows], audio=sounds[chosen])
    return Data(parts, _towers(parts))


def built_in(seed: int) -> Data:
    """As ``hesse demo`` reads them, with more rows held out, since a test of 180 rows says little."""
    from hesse.multimodal import FusedModel, encode, make_schema, read_table

    with tempfile.TemporaryDirectory() as folder:
        path = demo.write(Path(folder), seed=seed)
        table = pyarrow.csv.read_csv(path)
        names = np.repeat(list(DEMO), list(DEMO.values()))
        part = np.random.default_rng(seed).permutation(names)
        source = read_table(table.append_column("part", pa.array(part.tolist())))
        schema, _ = make_schema(source, "digit", split_column="part", root=Path(folder), seed=seed)
        data = encode(schema, source, root=Path(folder))
    settings, outputs = schema.model_settings(), schema.outputs
    prepared = FusedModel(settings, outputs).prepare(data.inputs)
    parts = {}
    for name in DEMO:
        rows = torch.from_numpy(np.flatnonzero(part == name))
        inputs = {key.partition("_")[0]: (x[rows], here[rows]) for key, (x, here) in prepared.items()}
        parts[name] = Part(inputs, data.targets[rows])
    renamed = {key.partition("_")[0]: value for key, value in settings.items()}
    return Data(parts, lambda: FusedModel(renamed, outputs))


def _part(labels: Tensor, **inputs: Tensor) -> Part:
    here = torch.ones(len(labels), dtype=torch.bool)
    return Part({key: (x.contiguous(), here) for key, x in inputs.items()}, labels)


def _towers(parts: dict[str, Part]) -> Callable[[], nn.Module]:
    sizes = {key: tuple(x.shape[2:]) for key, (x, _) in parts["train"].inputs.items()}
    return lambda: Towers(sizes, CLASSES)


def _rows(rng: np.random.Generator, count: int, sizes: dict[str, int]) -> dict[str, np.ndarray]:
    order, cuts = rng.permutation(count), np.cumsum(list(sizes.values()))
    return dict(zip(sizes, np.split(order, cuts)[:-1], strict=True))


def _standard(x: Tensor) -> Tensor:
    return (x - x.mean()) / x.std()


TASKS = {
    task.name: task
    for task in (
        Task("degraded", "degraded pictures and speech in babble, 7000 / 1000 / 2000 rows", degraded),
        Task("speaker", f"clean, voices 1 / 2 / 3, {SCARCE} / 1000 / 2000 rows", speaker, batch=64),
        Task("heard", "the same, validation with the voice of training", partial(speaker, heard_before=True), batch=64),
        Task("demo", "built-in image, sound and word, 1097 / 300 / 400 rows", built_in, batch=32),
        Task("balanced", "left and right half of a picture, 7000 / 1000 / 2000 rows", balanced),
    )
}
