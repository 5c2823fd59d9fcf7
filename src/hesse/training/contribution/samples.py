"""Small copies of what the modalities of a row were looking at, for the page: pictures, sounds and texts.

They are decoded by the readers that training uses and written anew, so nothing but pixels and samples of a file gets
into the run folder, whatever else it holds; and under numbered names, so nothing of a cell is part of a path.
"""

from __future__ import annotations

import shutil
import wave
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from hesse.files import atomic_path
from hesse.finding import InputError
from hesse.multimodal import Schema, Table
from hesse.multimodal.columns import Column
from hesse.multimodal.encoders import audio, image, optional
from hesse.multimodal.media import find_file
from hesse.multimodal.sequences import sequences
from hesse.multimodal.values import short, texts

__all__ = ["FOLDER", "copy_samples"]

PLAIN_PICTURE = {"height": 64, "width": 64, "channels": 3, "white": 255.0, "mean": [255.0] * 3}
PLAIN_SOUND = {"rate": 16_000, "samples": 160_000}
FOLDER = "samples"
SIDE = 200  # pixels, at most
FINER = 3  # than what the encoder sees
RATE, SECONDS = 16_000, 10  # of a sound, at most
LONGEST = 300  # characters
MOST_CELLS = 20  # of the columns of a row


def copy_samples(folder: Path, schema: Schema, source: Table, root: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write ``folder/samples`` anew, and add ``samples`` to each row of ``disagreements``.

    A file that is no longer there, or cannot be read, is left out.

    Args:
        folder: of the run.
        schema: of the table.
        source: the table.
        root: the folder that paths in cells are relative to and may not leave.
        rows: ``row`` is the table's, from 0; ``by_modality`` has the modalities that it has.
    """
    shutil.rmtree(folder / FOLDER, ignore_errors=True)
    if not rows:
        return
    (folder / FOLDER).mkdir(parents=True)
    indices = pa.array([row["row"] for row in rows], pa.int64())
    for m, (key, columns) in enumerate(schema.modalities.items()):
        cells = [source.column(column.name).take(indices) for column in columns]
        for i, row in enumerate(rows):
            if key in row["by_modality"]:
                sample = _sample(
                    folder, f"{FOLDER}/{i:02d}-{m:02d}", columns, [values[i : i + 1] for values in cells], root
                )
                if sample:
                    row.setdefault("samples", {})[key] = sample


def _sample(
    folder: Path, name: str, columns: Sequence[Column], cells: Sequence[pa.Array], root: Path
) -> dict[str, Any]:
    """The sample of one cell, or of several if the modality has several columns; empty if there is none."""
    kind, settings = columns[0].kind, columns[0].settings
    if kind not in ("image", "images", "audio", "text"):
        pairs = zip(columns[:MOST_CELLS], cells, strict=False)
        return {"kind": "columns", "text": {column.name: _short(cell[0].as_py()) for column, cell in pairs}}
    if kind == "images":
        (paths,) = sequences(cells[0])
        path = paths[0] if paths else None
    else:
        (path,) = texts(cells[0])
    if path is None:
        return {}
    if kind == "text":
        return {"kind": "text", "text": short(path, LONGEST)}
    if "source" in settings:  # read by a pretrained encoder, in a size of its own
        settings = {**settings, **(PLAIN_SOUND if kind == "audio" else PLAIN_PICTURE)}
    try:
        file = find_file(root, path)
        if kind == "audio":
            return {"kind": "audio", "file": _sound(folder, f"{name}.wav", file, settings)}
        return {"kind": "image", "file": _picture(folder, f"{name}.png", file, settings)}
    except (InputError, OSError):  # gone or spoiled since it was read: the page says nothing of it
        return {}


def _picture(folder: Path, name: str, file: Path, settings: dict[str, Any]) -> str:
    # Encoders that were trained elsewhere have no size among their settings.
    height, width = settings.get("height", SIDE), settings.get("width", SIDE)
    finer = min(float(FINER), SIDE / max(height, width))
    channels = 1 if settings.get("channels") == 1 else 3
    plan = {
        "height": max(1, round(finer * height)),
        "width": max(1, round(finer * width)),
        "channels": channels,
        "white": settings.get("white", 255.0),
        "mean": settings.get("mean", [255.0] * 3)[:channels],
    }
    pixels = image.decode(file, plan).transpose(1, 2, 0)
    picture = optional("PIL.Image").fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    with atomic_path(folder / name) as temporary:
        picture.save(temporary, format="PNG")
    return name


def _sound(folder: Path, name: str, file: Path, settings: dict[str, Any]) -> str:
    seen = settings.get("rate", RATE)
    rate = min(RATE, seen)
    length = min(SECONDS * rate, round(settings.get("samples", SECONDS * seen) * rate / seen))
    samples = audio.decode(file, {"rate": rate, "samples": max(1, length)})
    with atomic_path(folder / name) as temporary, wave.open(str(temporary), "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(rate)
        sound.writeframes(_trimmed(samples).astype("<i2").tobytes())
    return name


def _trimmed(samples: NDArray[np.int16]) -> NDArray[np.int16]:
    """Without the silence that a short sound was filled up with."""
    loud = np.flatnonzero(samples)
    return samples[: loud[-1] + 1] if loud.size else samples


def _short(value: Any) -> str | float | None:
    return value if value is None or isinstance(value, int | float) else short(value, LONGEST)
