"""An encoder turns one modality into :data:`FEATURES` numbers; there is one file a modality.

The image, audio and text files each offer the same four names. ``plan(values)`` looks at a sample of the
training values and chooses the settings (a JSON object: size, rate, alphabet, mean and deviation);
``decode(value, settings)`` turns one value into an array of fixed shape; ``storage(settings)`` tells that
shape and dtype; and ``Encoder(settings)`` is the module that takes a batch of such arrays. Data stay compact
(pixels as uint8, sound as int16, characters as codes) and become standardised floats only inside the encoder.

Hesse's own encoders start from unit scale: standardised input, He's initialisation (He et al. 2015), no normalisation
layers, no dropout. So they are deterministic, and every parameter belongs to a Linear, Conv2d or Embedding. A sequence
of images has one of them for every picture; in the place of any may stand a pretrained model.

Here is what they share: the convolutional tower, the initialisation, and the care for files and samples.
"""

from __future__ import annotations

import errno
import importlib
import os
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import TypeVar

import numpy as np
from torch import Tensor, nn
from torch.nn import functional as F

from hesse.finding import InputError

__all__ = ["FEATURES", "Convnet", "check_file", "he_", "optional", "read_sample"]

FEATURES = 64
"""Width of every encoder's output."""

T = TypeVar("T")
V = TypeVar("V")


class Convnet(nn.Module):
    """Three 3x3 convolutions and a linear layer: a map ``[B, channels, height, width]`` to ``[B, FEATURES]``.

    A convolution strides by two along each side that is still longer than four, so small maps keep their
    places and large ones shrink eightfold; what is left is averaged to at most 4 x 4. The linear layer then
    sees at most 1024 numbers, which bounds both its cost and the size of its curvature factors.

    Example:
        >>> import torch
        >>> tower = Convnet(1, 28, 28)
        >>> tower.convolve(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 64])
        >>> tower.features.in_features
        1024
    """

    def __init__(self, channels: int, height: int, width: int) -> None:
        super().__init__()
        side = (height, width)
        layers = []
        for inside, outside in ((channels, 16), (16, 32), (32, 64)):
            stride = (2 if side[0] > 4 else 1, 2 if side[1] > 4 else 1)
            layers.append(he_(nn.Conv2d(inside, outside, 3, stride, padding=1)))
            side = (-(-side[0] // stride[0]), -(-side[1] // stride[1]))
        self.conv1, self.conv2, self.conv3 = layers
        self.bins = (-(-side[0] // 4), -(-side[1] // 4))
        places = -(-side[0] // self.bins[0]) * -(-side[1] // self.bins[1])
        self.features = he_(nn.Linear(64 * places, FEATURES))

    def prepare(self, data: Tensor) -> Tensor:
        """Compact data as a standardised map. No parameter takes part, so once a batch is enough."""
        return data

    def forward(self, data: Tensor) -> Tensor:
        """``data`` as decoded, or as prepared (floating). Returns ``[B, FEATURES]``."""
        return self.convolve(data if data.is_floating_point() else self.prepare(data))

    def convolve(self, x: Tensor) -> Tensor:
        """``x``: a standardised map ``[B, channels, height, width]``. Returns ``[B, FEATURES]``."""
        for conv in (self.conv1, self.conv2, self.conv3):
            x = F.relu(conv(x))
        if self.bins != (1, 1):
            # Plain pooling, not the adaptive kind, whose backward pass on GPUs is not deterministic.
            x = F.avg_pool2d(x, self.bins, ceil_mode=True)
        return F.relu(self.features(x.flatten(1)))


Layer = TypeVar("Layer", nn.Conv2d, nn.Linear)


def he_(layer: Layer) -> Layer:
    """He's initialisation for a layer followed by ReLU, in place: the mean square of the signal is kept.

    Biases are small instead of zero: blank input (an empty text, say) would sit exactly in the kink of every
    ReLU, where a loss has no gradient to check.
    """
    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    if layer.bias is not None:
        nn.init.normal_(layer.bias, std=0.01)
    return layer


def optional(name: str) -> ModuleType:
    """Import a library of the extra ``[train]``.

    Raises:
        ImportError: it is not installed; the message says how to install it.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        library = name.partition(".")[0]
        message = f"Reading this data needs {library}. Install it with: pip install 'hesse[train]'"
        raise ImportError(message, name=name) from error


def check_file(path: Path) -> None:
    """Refuse what is not a regular file with something in it (opening a pipe, say, would wait for ever).

    Raises:
        InputError: missing, not a file, not readable or empty.
    """
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise InputError("not a file", str(path), "This is a folder or a device.", "Give the path of a file.")
        if not os.access(path, os.R_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
    except (FileNotFoundError, NotADirectoryError):
        message, remedy = "There is no such file.", "Correct the path in the table."
        raise InputError("missing file", str(path), message, remedy) from None
    except (OSError, ValueError) as error:  # no permission, a name too long, a NUL character
        if isinstance(error, InputError):
            raise
        remedy = "Check the path and the permissions."
        raise InputError("unreadable file", str(path), f"It cannot be opened: {error}.", remedy) from error
    if found.st_size == 0:
        raise InputError("empty file", str(path), "The file has no bytes.", "Copy it again, or remove the row.", 0)


def read_sample(values: Sequence[V], read: Callable[[V], T], limit: int) -> list[T]:
    """``read(value)`` for at most ``limit`` evenly spaced values, without those that cannot be read.

    A plan needs a fair sample, not every file; unreadable ones are reported when their rows are decoded.

    Raises:
        InputError: none could be read (the first one's error), or there are no values.
    """
    if not values:
        raise InputError("no values", "", "There is no training value to look at.", "Check the column and the split.")
    results, first = [], None
    for i in np.unique(np.linspace(0, len(values) - 1, limit).round().astype(int)):
        try:
            results.append(read(values[int(i)]))
        except InputError as error:
            first = first or error
    if first is not None and not results:
        raise first
    return results
