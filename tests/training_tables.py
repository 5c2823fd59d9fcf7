"""Small tables for the tests of training and command line: learnable, in several scripts, with gaps and files."""

from __future__ import annotations

import csv
import wave
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

CLASSES = ("犬", "кошка", "قطة 🐈", 'bird, "small"')
TEXTS = (("わんわん", "散歩 が 好き"), ("мяу мяу", "спит"), ("مواء", "تحب السمك"), ("tweet tweet", "chirp, sings"))
TARGET = "種.species"


def write_csv(path: Path, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
    return path


def pets(folder: Path, rows: int = 60, seed: int = 0) -> Path:
    """Pictures, sounds, texts, numbers and categories, a tenth of the cells missing; four classes."""
    random = np.random.default_rng(seed)
    (folder / "写真").mkdir(parents=True)
    (folder / "sounds").mkdir()
    table = []
    for i in range(rows):
        c = i % 4
        pixels = random.integers(0, 90, (10, 10, 3)).astype(np.uint8)
        pixels[:, :, c % 3] += np.uint8(70 + 40 * (c == 3))
        Image.fromarray(pixels).save(folder / "写真" / f"{i}.png")
        time = np.arange(1600) / 8000
        samples = 6000 * np.sin(2 * np.pi * (300 + 300 * c) * time) + random.normal(0, 1500, 1600)
        with wave.open(str(folder / "sounds" / f"{i}.wav"), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(8000)
            file.writeframes(samples.astype("<i2").tobytes())
        cells = [
            f"写真/{i}.png",
            f"sounds/{i}.wav",
            f"{TEXTS[c][i // 4 % 2]} {i}",
            f"{3 * c + random.normal():.3f}",
            ("red", "grün", "青")[random.integers(3)],
        ]
        table.append([cell if random.random() > 0.1 else "" for cell in cells] + [CLASSES[c]])
    return write_csv(folder / "pets.csv", ["写真.png", "sound", "self", "weight (kg)", 'co"lour 🎂', TARGET], table)


def numbers(rows: int = 64, seed: int = 0, classes: int = 2) -> dict[str, list[Any]]:
    """Two numbers and a category as columns; ``species`` follows from the first number, ``age`` from both."""
    random = np.random.default_rng(seed)
    x = random.normal(size=(rows, 2))
    kind = random.integers(3, size=rows)
    species = np.clip(np.floor(classes * (0.5 + x[:, 0] / 4)), 0, classes - 1).astype(int)
    return {
        "x": x[:, 0].tolist(),
        "y": x[:, 1].tolist(),
        "kind": [("a", "b", "c")[k] for k in kind],
        "species": [f"s{s}" for s in species],
        "age": (10 + 3 * x[:, 0] - 2 * x[:, 1]).tolist(),
    }


def numbers_csv(path: Path, target: str = "species", rows: int = 64, seed: int = 0) -> Path:
    columns = numbers(rows, seed)
    names = ["x", "y", "kind", target]
    return write_csv(path, names, list(zip(*(columns[name] for name in names), strict=True)))
