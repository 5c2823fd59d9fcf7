"""Images: any size, depth and number of channels become one small map of pixels, then a convolutional tower.

The common size is the median of the training images, shrunk to at most 64 pixels a side. Pictures keep their
aspect and are padded with the training mean, which after standardisation is zero: what a convolution pads
with itself.

Two things Pillow does not do by itself. Pixels deeper than 8 bits (16-bit, 32-bit, float) are scaled by a
planned white instead of being cut off at 255; and files are judged by their header before anything is
decompressed.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hesse.finding import InputError
from hesse.multimodal.encoders import Convnet, check_file, optional, read_sample

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["MAX_PIXELS", "WHITES", "Encoder", "decode", "plan", "storage", "upright"]

MAX_PIXELS = 89_478_485
"""Largest image that is decoded: Pillow's own default for its warning, about 256 MB of RGB."""

SMALLEST, LARGEST = 8, 64  # pixels a side of the common size
SAMPLE = 200  # images looked at by a plan

# Formats that are pictures and nothing else. Pillow hands EPS, for one, to Ghostscript, which
# runs it as a program.
FORMATS = (
    *("AVIF", "BMP", "DDS", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "MPO", "PCX"),
    *("PNG", "PPM", "QOI", "SGI", "TGA", "TIFF", "WEBP"),
)

# What scanners, microscopes and cameras mean by white: fractions, then 8, 10, 12, 14 and 16 bits
# in a larger word.
WHITES = (1.0, 255.0, 1023.0, 4095.0, 16383.0, 65535.0)

# EXIF orientation -> the transposition that undoes it (names of PIL.Image.Transpose); from 5 on,
# height and width are swapped.
TURNS = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}

# What Pillow's readers raise on damaged files, found by damaging files of every format above.
DAMAGE = (OSError, ValueError, SyntaxError, RuntimeError)


def plan(values: Sequence[Path]) -> dict[str, Any]:
    """Choose the common size, channels and scale from the training images.

    Args:
        values: resolved paths; about 200 of them, evenly spaced, are read.

    Returns:
        ``height`` and ``width`` in pixels; ``channels``: 1 when every sampled picture is grey, 4 when one has
        transparent pixels, else 3; ``white``: the value of full brightness in pictures deeper than 8 bits;
        ``mean`` and ``std`` of each channel on the scale 0 to 255; ``note`` where a file has several frames.

    Raises:
        InputError: none of the sampled files is a picture.
    """
    sample = read_sample(values, _survey, SAMPLE)
    height, width = np.median([size for _, size, _, _ in sample], axis=0)
    shrink = min(1.0, LARGEST / max(height, width))
    brightest = max(top for _, _, top, _ in sample)
    pictures = [picture for picture, _, _, _ in sample]
    settings = {
        "height": max(SMALLEST, round(height * shrink)),
        "width": max(SMALLEST, round(width * shrink)),
        "channels": max(map(_channels, pictures)),
        # A black picture tells nothing about white; above 16 bits the brightest pixel is all there is to go
        # by.
        "white": next((w for w in WHITES if w >= brightest), brightest) if brightest > 0 else WHITES[-1],
    }
    if any(animated for _, _, _, animated in sample):
        settings["note"] = "animated ones by their first frame"
    pixels = np.concatenate([_array(p, settings).reshape(-1, settings["channels"]) for p in pictures])
    mean, std = pixels.mean(axis=0, dtype=np.float64), pixels.std(axis=0, dtype=np.float64)
    return {**settings, "mean": mean.tolist(), "std": np.maximum(std, 1.0).tolist()}


def storage(settings: dict[str, Any]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape ``(channels, height, width)`` and dtype (uint8) of a decoded image."""
    return (settings["channels"], settings["height"], settings["width"]), np.dtype(np.uint8)


def decode(value: Path, settings: dict[str, Any]) -> NDArray[np.uint8]:
    """Read one image (of an animation: its first frame), upright as its EXIF data say.

    Transparency is kept as a fourth channel with the colours multiplied by it, so that what nobody sees has
    no effect; where the plan has no fourth channel, the picture is laid on white.

    Args:
        value: the resolved path.
        settings: what :func:`plan` returned.

    Returns:
        uint8 ``[channels, height, width]``: the picture, aspect kept, centred on the training mean.

    Raises:
        InputError: missing, empty, not an image, damaged, cut short, or larger than :data:`MAX_PIXELS`.
    """
    height, width = settings["height"], settings["width"]
    picture, _ = _open(value, max(height, width))
    picture = _fit(picture, height, width)
    top, left = (height - picture.height) // 2, (width - picture.width) // 2
    canvas = np.empty((height, width, settings["channels"]), np.uint8)
    canvas[:] = np.rint(settings["mean"]).astype(np.uint8)
    canvas[top : top + picture.height, left : left + picture.width] = _array(picture, settings)
    return np.ascontiguousarray(canvas.transpose(2, 0, 1))


def upright(value: Path, white: float) -> Image:
    """The whole picture as 8-bit RGB, upright, transparency laid on white; ``white`` as planned.

    Raises:
        InputError: as :func:`decode`.
    """
    picture, _ = _open(value, 2 * MAX_PIXELS)
    colours: Image = optional("PIL.Image").fromarray(_array(picture, {"channels": 3, "white": white}))
    return colours


class Encoder(Convnet):
    """Standardised pixels through a :class:`Convnet`: uint8 ``[B, channels, height, width]`` to ``[B, 64]``.

    Example:
        >>> settings = {"height": 8, "width": 12, "channels": 1, "mean": [30.0], "std": [60.0]}
        >>> Encoder(settings)(torch.zeros(5, 1, 8, 12, dtype=torch.uint8)).shape
        torch.Size([5, 64])
    """

    mean: Tensor
    std: Tensor

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__(settings["channels"], settings["height"], settings["width"])
        for name in ("mean", "std"):  # not persistent: they are in the settings
            self.register_buffer(name, torch.tensor(settings[name]).view(-1, 1, 1), persistent=False)

    def prepare(self, data: Tensor) -> Tensor:
        """The standardised pixels, of the same shape."""
        return (data.to(self.mean.dtype) - self.mean) / self.std


def _survey(path: Path) -> tuple[Image, tuple[int, int], float, bool]:
    """A small version of the picture, its (height, width), its brightest deep pixel (0: not deep), and if it moves."""
    picture, size = _open(path, LARGEST)
    brightest = float(np.asarray(picture).max()) if picture.mode == "F" else 0.0
    return _fit(picture, LARGEST, LARGEST), size, brightest, _is_animated(path)


def _is_animated(path: Path) -> bool:
    images = optional("PIL.Image")
    try:
        with _quiet, path.open("rb") as file, images.open(file, formats=_formats()) as image:
            return bool(getattr(image, "is_animated", False))
    except DAMAGE:  # behind the first frame, which could be read
        return True


def _open(path: Path, side: int) -> tuple[Image, tuple[int, int]]:
    """The upright picture in mode L, RGB, RGBA or F (deep), no smaller than ``side``, and its full size."""
    check_file(path)
    images = optional("PIL.Image")
    try:
        # An open file, not a name: Pillow maps named files into memory, and an uncompressed TIFF that has to
        # be turned by 90 degrees then comes out scrambled.
        with _quiet, path.open("rb") as file, images.open(file, formats=_formats()) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise _bomb(path, f"It has {width} x {height} pixels; the limit is {MAX_PIXELS}.")
            image.draft(None, (side, side))  # a JPEG can be decoded smaller, many times faster
            picture = _plain(image, path)
            # After decoding, because for TIFF that turns the picture, and forgets the orientation.
            orientation = image.getexif().get(0x0112)
    except images.DecompressionBombError as error:
        raise _bomb(path, str(error)) from error
    except InputError:
        raise
    except DAMAGE as error:
        unknown = isinstance(error, images.UnidentifiedImageError)  # Pillow's words for it show an open file
        why = "its format is none that Pillow knows" if unknown else error or type(error).__name__
        message = f"It is not a picture that can be decoded: {why}."
        remedy = "Open it in a viewer and save it as PNG, or remove the row."
        raise InputError("undecodable image", str(path), message, remedy) from error
    if orientation not in TURNS:
        return picture, (height, width)
    size = (width, height) if orientation >= 5 else (height, width)
    return picture.transpose(images.Transpose[TURNS[orientation]]), size


class _Quiet:
    """No warnings while any thread reads: Pillow's are of harmless oddities, and of bombs, judged by us.

    ``warnings.catch_warnings`` alone will not do: of two threads that overlap, one leaves its filters behind.
    """

    def __init__(self) -> None:
        self.lock, self.readers = threading.Lock(), 0
        self.filters = ExitStack()

    def __enter__(self) -> None:
        with self.lock:
            self.readers += 1
            if self.readers == 1:
                self.filters.enter_context(warnings.catch_warnings())
                warnings.simplefilter("ignore")

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.readers -= 1
            if self.readers == 0:
                self.filters.close()


_quiet = _Quiet()


def _bomb(path: Path, message: str) -> InputError:
    return InputError("decompression bomb", str(path), message, "Reduce the picture, or remove the row.")


@lru_cache
def _formats() -> tuple[str, ...]:
    """Those of our formats that this build of Pillow can read."""
    images = optional("PIL.Image")
    images.init()
    return tuple(name for name in FORMATS if name in images.OPEN)


def _plain(image: Image, path: Path) -> Image:
    """Decode into one of four modes: L, RGB, RGBA, or F for anything deeper than 8 bits."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):  # .convert("L") would cut these off at 255
        deep = np.asarray(image).astype(np.float32)
        if not np.isfinite(deep).all():
            message = "Some pixels are not finite numbers."
            remedy = "Replace them, and save the picture again."
            raise InputError("undecodable image", str(path), message, remedy)
        return optional("PIL.Image").fromarray(deep)
    if image.has_transparency_data:
        return image.convert("RGBA")
    return image.convert("L" if image.mode in ("1", "L") else "RGB")


def _fit(picture: Image, height: int, width: int) -> Image:
    """The largest picture of the same aspect within ``height`` x ``width``."""
    scale = min(height / picture.height, width / picture.width)
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    return picture if picture.size == size else picture.resize(size, optional("PIL.Image").Resampling.BILINEAR)


def _channels(picture: Image) -> int:
    """How many channels the content needs: grey is often stored as colour, and opaque pictures with alpha."""
    pixels = np.asarray(picture)
    if picture.mode == "RGBA" and (pixels[..., 3] < 255).any():
        return 4
    return 1 if pixels.ndim == 2 or (pixels[..., :1] == pixels[..., :3]).all() else 3


def _array(picture: Image, settings: dict[str, Any]) -> NDArray[np.uint8]:
    """uint8 ``[height, width, channels]`` from any of the four modes."""
    channels = settings["channels"]
    if picture.mode == "F":
        bright = np.asarray(picture) * np.float32(255 / settings["white"])
        picture = optional("PIL.Image").fromarray(np.rint(bright.clip(0, 255)).astype(np.uint8))
    if channels == 4:
        return np.asarray(picture.convert("RGBA").convert("RGBa"))
    if picture.mode == "RGBA":
        white = optional("PIL.Image").new("RGBA", picture.size, "white")
        picture = optional("PIL.Image").alpha_composite(white, picture)
    mode = "L" if channels == 1 else "RGB"
    pixels = np.asarray(picture if picture.mode == mode else picture.convert(mode))
    return pixels.reshape(*pixels.shape[:2], channels)
