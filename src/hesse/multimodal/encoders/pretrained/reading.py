"""Pictures, texts and sounds as a checkpoint's own processor gives them: compact arrays, one a value.

Files are opened by hesse's readers, which turn pictures upright and keep 16 bits from saturating; what follows (size,
crop, tokens, rate, spectrogram) is the processor's. Pixels stay uint8, and are scaled and standardised inside the
encoder. Tokens behind the end are -1, samples behind the end NaN: no made-up value.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hesse.finding import InputError
from hesse.multimodal.encoders import audio, image, optional, read_sample
from hesse.multimodal.encoders.pretrained.checkpoint import load_processor

__all__ = ["Reader", "plan_reading", "reader_of"]

LONGEST_TEXT = 512  # tokens
LONGEST_SOUND = 10.0  # seconds
PER_TOKEN = 32  # characters that a token may stand for: of a text of a million, so much is looked at
SAMPLE = 200  # values looked at by a plan


@dataclass(frozen=True)
class Reader:
    """Reads values of one kind for one checkpoint.

    Args:
        kind: "image", "text" or "audio".
        folder: of the checkpoint.
        white: of deep pictures, as :func:`image.plan` finds it.
        processor: of the checkpoint.
    """

    kind: str
    folder: Path
    white: float
    processor: Any = field(repr=False, compare=False)

    def __call__(self, value: Path | str) -> NDArray[Any]:
        """uint8 ``[channels, height, width]``, int32 ``[tokens]``, or float32 ``[samples]`` or ``[frames, bands]``.

        Raises:
            InputError: the file cannot be read.
        """
        if isinstance(value, str):
            return self._tokens(value)
        return self._pixels(value) if self.kind == "image" else self._sound(value)

    def scale(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """What pixels are multiplied by and then added, each ``[channels, 1, 1]``, as the processor would."""
        p = self.processor
        factor = p.rescale_factor if p.do_rescale else 1.0
        moments = (p.image_mean, p.image_std) if p.do_normalize else ([0.0] * 3, [1.0] * 3)
        mean, std = (np.asarray(values, np.float32).reshape(-1, 1, 1) for values in moments)
        return np.asarray(factor / std, np.float32), -mean / std

    @property
    def masked(self) -> bool:
        """Whether the model is told where a value ends, or sees zeros there."""
        return self.kind == "text" or bool(getattr(self.processor, "return_attention_mask", False))

    def _pixels(self, path: Path) -> NDArray[np.uint8]:
        picture = image.upright(path, self.white)
        made = self.processor(images=[picture], return_tensors="np", do_rescale=False, do_normalize=False)
        return np.asarray(np.rint(made["pixel_values"][0]).clip(0, 255), np.uint8)

    def _tokens(self, text: str) -> NDArray[np.int32]:
        most = min(LONGEST_TEXT, self.processor.model_max_length)
        start = text[: PER_TOKEN * most].encode("utf-8", "replace").decode("utf-8")
        tokens = self.processor(start, truncation=True, max_length=most)["input_ids"]
        if not tokens:  # some models mark neither beginning nor end, and attention needs something to look at
            tokens = [next((t for t in (self.processor.eos_token_id, self.processor.pad_token_id) if t is not None), 0)]
        return np.asarray(tokens, np.int32)

    def _sound(self, path: Path) -> NDArray[np.float32]:
        rate = int(self.processor.sampling_rate)
        wave, source = audio.stretch(path, LONGEST_SOUND)
        if source != rate:
            ratio = Fraction(rate, source).limit_denominator(1000)
            wave = optional("scipy.signal").resample_poly(wave, ratio.numerator, ratio.denominator)
        made = self.processor(wave.astype(np.float32), sampling_rate=rate, return_tensors="np")
        name = next(name for name in ("input_values", "input_features") if name in made)
        return np.asarray(made[name][0], np.float32)


def reader_of(kind: str, folder: Path, settings: dict[str, Any]) -> Reader:
    """The reader for a column's settings."""
    return Reader(kind, folder, settings.get("white", image.WHITES[-1]), load_processor(folder, kind))


def plan_reading(kind: str, folder: Path, values: Sequence[Any], fixed: bool) -> dict[str, Any]:
    """The settings of reading: ``white`` of pictures and, for arrays of one shape, ``shape`` ``[channels, ...]``.

    Args:
        kind, folder: of the column and the checkpoint.
        values: of the training rows; some are read.
        fixed: whether arrays must have one shape; the 95th percentile of the lengths is taken.

    Raises:
        InputError: no value looked at can be read, or the processor gives pictures of different sizes.
    """
    settings: dict[str, Any] = {"white": image.plan(values)["white"]} if kind == "image" else {}
    if not fixed:
        return settings
    shapes = [array.shape for array in read_sample(values, reader_of(kind, folder, settings), SAMPLE)]
    rest = {shape if kind == "image" else shape[1:] for shape in shapes}
    if len(rest) > 1:
        first, second = sorted(rest)[:2]
        raise InputError(
            "pictures of different sizes",
            str(folder),
            f"The checkpoint's processor keeps sizes apart: {list(first)} and {list(second)}.",
            "Train with --trainable NAME=none, or set one size in its preprocessor_config.json.",
        )
    if kind == "image":
        return {**settings, "shape": list(shapes[0])}
    length = int(np.quantile([shape[0] for shape in shapes], 0.95, method="higher"))
    return {**settings, "shape": [length, *shapes[0][1:]]}
