"""Pretrained encoders: a checkpoint of ``transformers`` reads a column of pictures, texts or sounds.

``--encoder photo=hf:PATH_OR_NAME`` chooses it, ``--trainable photo=none|N|all`` how much of it trains. A frozen model
is a function of a cell's content, so its features are computed once, kept on disk by content (:mod:`cache`), and only a
projection trains. A model that trains is part of the network (:mod:`tower`), and gets arrays as its own processor makes
them (:mod:`reading`). A run keeps the checkpoint's path and a hash of it (:mod:`checkpoint`), and refuses another.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hesse.finding import InputError
from hesse.multimodal.encoders import check_file
from hesse.multimodal.encoders.pretrained.cache import Cache, cache_folder, content_of
from hesse.multimodal.encoders.pretrained.checkpoint import folder_of, identity_of, present_folder
from hesse.multimodal.encoders.pretrained.reading import Reader, plan_reading, reader_of
from hesse.multimodal.encoders.pretrained.tower import POOLING, Encoder, Projection, Tower, release

__all__ = [
    "KINDS",
    "Choice",
    "Encoder",
    "Projection",
    "choices",
    "decoder",
    "features",
    "is_frozen",
    "plan",
    "storage",
]

KINDS = ("image", "text", "audio")
LOOKED_AT = 64  # training values whose features are standardised by
BATCH = 32  # values at once
READ = 256  # values read before the next batches are computed

Values = Sequence[Path | str | None]


@dataclass(frozen=True)
class Choice:
    """What the user asked for: the checkpoint, and how much of it trains ("none", "all" or a number of blocks)."""

    source: str
    trainable: str | int = "none"


def choices(encoders: Mapping[str, str], trainable: Mapping[str, str | int]) -> dict[str, Choice]:
    """The choices by column.

    Raises:
        InputError: an encoder that is not ``hf:...``, or something to train that is no number, for no encoder.

    Example:
        >>> choices({"photo": "hf:facebook/dinov2-small"}, {"photo": "2"})
        {'photo': Choice(source='facebook/dinov2-small', trainable=2)}
    """
    for column, asked in encoders.items():
        if not asked.startswith("hf:") or not asked.removeprefix("hf:").strip():
            raise InputError(
                "unknown encoder",
                f"column '{column}'",
                f"There is no encoder '{asked}'.",
                "Write hf: and the folder or the name of a checkpoint, for instance hf:google/vit-base-patch16-224.",
                value=asked,
            )
    for column, share in trainable.items():
        if column not in encoders:
            message = f"Nothing says which pretrained encoder is to train ({share})."
            remedy = f"Choose one with --encoder {column}=hf:PATH_OR_NAME; hesse's own encoders always train."
            raise InputError("no such encoder", f"column '{column}'", message, remedy)
    return {c: Choice(asked.removeprefix("hf:").strip(), _share(c, trainable)) for c, asked in encoders.items()}


def plan(kind: str, choice: Choice, values: Sequence[Any], where: str) -> dict[str, Any]:
    """The settings of a column with a pretrained encoder.

    Args:
        kind: "image", "text" or "audio".
        choice: of the checkpoint.
        values: resolved paths or texts of the training rows.
        where: the column, for errors.

    Returns:
        ``source`` (an absolute path, or a name on the hub), ``identity``, ``trainable``; what reading needs; of the
        pooled features ``width``, ``center`` and ``spread``, of about 64 values; and of a model that trains the names
        of parameters that are ``unused``.

    Raises:
        InputError: the checkpoint cannot be used for this, or no value can be read.
    """
    try:
        folder = folder_of(choice.source)
        given = Path(choice.source).expanduser()
        settings: dict[str, Any] = {
            "source": str(given.resolve()) if given.is_dir() else choice.source,
            "identity": identity_of(folder),
            "trainable": choice.trainable,
        }
        settings |= plan_reading(kind, folder, values, fixed=choice.trainable != "none")
        some = [values[int(i)] for i in np.unique(np.linspace(0, len(values) - 1, LOOKED_AT).round().astype(int))]
        reader = _reader(kind, folder, settings["identity"], settings.get("white"))
        tower = _tower(reader, settings["identity"])
        tried = _read(reader, some)
        read = [array for array, error in tried if error is None]
        if not read and tried[0][1] is not None:
            raise tried[0][1]
        pooled = np.stack([row for _, row in _computed(tower, dict(enumerate(read)))]).astype(np.float64)
        if not is_frozen(settings):
            settings["unused"] = _unused(tower, settings, read[0])
    except InputError as error:
        f = error.finding
        raise InputError(f.kind, f"{where} ({f.where})", f.message, f.remedy, f.value) from error
    spread = pooled.std(0)
    floor = 1e-3 * max(float(spread.max()), 1e-6)  # of features that are all the same
    settings |= {
        "width": pooled.shape[1],
        "center": pooled.mean(0).tolist(),
        "spread": np.where(spread > floor, spread, 1.0).tolist(),
    }
    return settings


def is_frozen(settings: Mapping[str, Any]) -> bool:
    """Whether a column's values become features before training."""
    return settings["trainable"] == "none"


def storage(settings: Mapping[str, Any], kind: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and dtype of what the network gets of one value."""
    if is_frozen(settings):
        return (settings["width"],), np.dtype(np.float32)
    return tuple(settings["shape"]), np.dtype({"image": np.uint8, "text": np.int32, "audio": np.float32}[kind])


def decoder(settings: Mapping[str, Any], kind: str) -> Callable[[Path | str], NDArray[Any]]:
    """What reads one value for a model that trains: an array of :func:`storage`'s shape, cut or padded to it."""
    reader = _reader(kind, present_folder(settings), settings["identity"], settings.get("white"))
    shape, dtype = storage(settings, kind)
    empty = {"image": 0, "text": -1, "audio": np.nan if reader.masked else 0}[kind]

    def decode(value: Path | str) -> NDArray[Any]:
        result = np.full(shape, empty, dtype)
        array = reader(value)[: shape[0]]
        result[: len(array)] = array
        return result

    return decode


def features(
    settings: Mapping[str, Any], kind: str, values: Values, out: NDArray[np.float32], tick: Callable[[int], None]
) -> dict[int, InputError]:
    """Features of a frozen model, from the disk where they were computed before.

    Args:
        settings, kind: of the column.
        values: paths or texts; None leaves the zeros that are there.
        out: ``[len(values), width]``, filled.
        tick: told how many more values are done.

    Returns:
        The errors of files that cannot be read, by position.

    Raises:
        InputError: the checkpoint is another one than the settings were made with, or the cache cannot be written.
    """
    folder = present_folder(settings)
    known = json.dumps([settings["identity"], kind, POOLING, settings.get("white")])
    cache = Cache(cache_folder() / "features" / hashlib.sha256(known.encode()).hexdigest()[:32], settings["width"])
    places: dict[str, list[int]] = {}
    bad: dict[int, InputError] = {}
    for i, value in enumerate(values):
        if value is None:
            continue
        try:
            if isinstance(value, Path):
                check_file(value)
            places.setdefault(content_of(value), []).append(i)
        except InputError as error:
            bad[i] = error
            tick(1)
    left = []
    for content, rows in places.items():
        found = cache.get(content)
        if found is None:
            left.append(content)
        else:
            out[rows] = found
            tick(len(rows))
    if not left:
        return bad
    reader = _reader(kind, folder, settings["identity"], settings.get("white"))
    tower = _tower(reader, settings["identity"])
    kept = True
    for start in range(0, len(left), READ):
        some = left[start : start + READ]
        arrays = {}
        for content, (array, why_not) in zip(some, _read(reader, [values[places[c][0]] for c in some]), strict=True):
            if why_not is None:
                arrays[content] = array
            else:
                bad.update(dict.fromkeys(places[content], why_not))
                tick(len(places[content]))
        for content, row in _computed(tower, arrays):
            out[places[content]] = row
            kept = kept and _keep(cache, content, row)
            tick(len(places[content]))
    return bad


def _share(column: str, trainable: Mapping[str, str | int]) -> str | int:
    share = trainable.get(column, "none")
    if isinstance(share, str) and share.isdecimal():
        share = int(share)
    if share in ("none", "all") or (isinstance(share, int) and share > 0):
        return share
    if share == 0:
        return "none"
    raise InputError(
        "bad argument",
        "trainable",
        f"'{share}' does not say how much of the encoder of '{column}' trains.",
        "Write none, all, or how many of the last blocks.",
        value=share,
    )


def _read(reader: Reader, values: Sequence[Any]) -> list[tuple[NDArray[Any], InputError | None]]:
    """Arrays on several threads, with the error of each value that cannot be read."""

    def one(value: Any) -> tuple[NDArray[Any], InputError | None]:
        try:
            return reader(value), None
        except InputError as error:
            return np.empty(0), error

    if reader.kind == "text":  # tokenizers are not made for several threads
        return list(map(one, values))
    with ThreadPoolExecutor(max_workers=min(16, os.cpu_count() or 1)) as pool:
        return list(pool.map(one, values))


@torch.no_grad()
def _computed(tower: Tower, arrays: Mapping[Any, NDArray[Any]]) -> Iterator[tuple[Any, NDArray[np.float32]]]:
    """The pooled features of each array. Arrays of equal shape go together, so that nothing is padded."""
    by_shape: dict[tuple[int, ...], list[Any]] = {}
    for key, array in arrays.items():
        by_shape.setdefault(array.shape, []).append(key)
    for keys in by_shape.values():
        for start in range(0, len(keys), BATCH):
            some = keys[start : start + BATCH]
            rows = tower(torch.from_numpy(np.stack([arrays[key] for key in some]))).numpy()
            yield from zip(some, rows, strict=True)


def _unused(tower: Tower, settings: dict[str, Any], array: NDArray[Any]) -> list[str]:
    """The parameters that would train, but of which the features are independent: heads of pretraining, as a rule."""
    release(tower.model, settings)
    names = [name for name, parameter in tower.model.named_parameters() if parameter.requires_grad]
    outputs = tower(torch.from_numpy(array[None]))
    grads = torch.autograd.grad(outputs.sum(), [tower.model.get_parameter(n) for n in names], allow_unused=True)
    return [name for name, grad in zip(names, grads, strict=True) if grad is None]


def _keep(cache: Cache, content: str, row: NDArray[np.float32]) -> bool:
    """Whether the row could be kept; that it could not is said, and costs no more than the time to compute it again."""
    try:
        cache.put(content, row)
    except OSError as error:
        why = f"Features cannot be kept in {cache.folder}: {error.strerror or error}."
        warnings.warn(f"{why} They are computed anew each time; make room, or set HESSE_CACHE.", stacklevel=2)
        return False
    return True


@lru_cache(maxsize=8)
def _reader(kind: str, folder: Path, identity: str, white: float | None) -> Reader:
    """Readers are made anew when a checkpoint changes, hence the identity."""
    return reader_of(kind, folder, {} if white is None else {"white": white})


@lru_cache(maxsize=4)
def _tower(reader: Reader, identity: str) -> Tower:
    return Tower(reader).eval()
