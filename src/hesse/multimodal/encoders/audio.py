"""Sound: any rate, depth and number of channels become one waveform of fixed length, then a picture of it.

A file is read to mono, cut to its loudest part or padded with silence to the planned length, resampled
without aliasing to the planned rate, freed of its offset and brought to full level: only its shape is left.
The encoder takes the logarithm of its power in mel bands (narrow below, wide above, as the ear has them) and
treats frequency against time as an image.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from hesse.finding import InputError
from hesse.multimodal.encoders import Convnet, check_file, optional, read_sample

__all__ = ["MAX_FRAMES", "Encoder", "LogMel", "decode", "plan", "storage", "stretch"]

MAX_FRAMES = 2**24
"""As many frames of a file are read and no more (six minutes at 48 kHz); a header may promise anything."""

HELD = 2**21  # frames of a file that are held at once; of a longer one only the loudest stretch is

LONGEST = 10.0  # seconds
LOWEST_RATE, HIGHEST_RATE = 1_000, 16_000  # Hz: of the planned rate
FASTEST = 768_000  # Hz: of a file; faster ones have a broken header
SAMPLE = 200  # files looked at by a plan

WINDOW, HOP = 0.025, 0.010  # seconds: speech hardly changes within a window
MELS = 32
MOST_COLUMNS = 128  # of the picture; longer sounds get longer windows
CHUNK = 2**17  # samples transformed at a time: what fits a processor's cache is two to four times as fast
FLOOR = 1e-6  # power relative to a sine at full level, -60 dB: digital silence is not minus infinity


def plan(values: Sequence[Path]) -> dict[str, Any]:
    """Choose the common rate and length from the training sounds.

    Args:
        values: resolved paths; about 200 of them, evenly spaced, are read.

    Returns:
        ``rate`` in Hz, the median within 1 to 16 kHz; ``samples``, the 95th percentile of the length, at most
        ten seconds; ``mean`` (a list, one for each mel band) and ``std`` of the logarithmic power; ``note`` where less
        than half of a sound is read.

    Raises:
        InputError: none of the sampled files is a sound.
    """
    sounds = read_sample(values, _survey, SAMPLE)
    rate = int(np.clip(np.median([source for _, source, _ in sounds]), LOWEST_RATE, HIGHEST_RATE))
    lengths = [frames / source for _, source, frames in sounds]
    seconds = min(LONGEST, float(np.quantile(lengths, 0.95)))
    settings = {"rate": rate, "samples": max(1, round(seconds * rate))}
    waves = np.stack([_shape(wave, source, settings) for wave, source, _ in sounds])
    power = LogMel(rate, settings["samples"])(torch.from_numpy(waves)).double()
    mean = power.mean(dim=(0, 2))
    std = (power - mean[:, None]).square().mean().sqrt().clamp(min=0.1)  # all silence has no spread
    found = {**settings, "mean": mean.tolist(), "std": std.item()}
    cut = {"note": f"of longer ones the loudest {seconds:.3g} s"}
    return found | cut if max(lengths) > 2 * seconds else found


def storage(settings: dict[str, Any]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape ``(samples,)`` and dtype (int16) of a decoded sound."""
    return (settings["samples"],), np.dtype(np.int16)


def decode(value: Path, settings: dict[str, Any]) -> NDArray[np.int16]:
    """Read one sound file of any format that libsndfile knows (WAV, FLAC, OGG, MP3, AIFF, ...).

    Args:
        value: the resolved path.
        settings: what :func:`plan` returned.

    Returns:
        int16 ``[samples]`` at ``rate``, mono, without offset, its peak at full level; silence stays silence.

    Raises:
        InputError: missing, empty, no sound, damaged, without frames, or with samples that are not finite.
    """
    wave, source, _ = _read(value, settings["samples"] / settings["rate"])
    return _shape(wave, source, settings)


def stretch(value: Path, seconds: float) -> tuple[NDArray[np.float64], int]:
    """The loudest so many seconds of a sound, mono, and their rate; the whole if it is shorter.

    Raises:
        InputError: as :func:`decode`.
    """
    wave, source, _ = _read(value, seconds)
    return _loudest(wave, math.ceil(seconds * source)), source


class LogMel(nn.Module):
    """Logarithm of power in mel bands: int16 ``[B, samples]`` to float32 ``[B, bands, columns]``.

    Power is relative to a sine at full level. Windows of 25 ms follow each other every 10 ms; for sounds of
    more than 1.28 s both are stretched, so that there are at most 129 columns. There are 32 bands, fewer
    where the rate is too low for so many. No parameter is in it: no derivative of the model passes through.

    Example:
        A sine shows in one band and its neighbours; one sample is enough for one column.

        >>> mel = LogMel(8000, 8000)
        >>> t = torch.arange(8000) / 8000
        >>> picture = mel((32767 * torch.sin(2 * torch.pi * 1000 * t)).to(torch.int16)[None])
        >>> picture.shape, picture[0, :, 50].argmax().item() == mel.filters[:, 32].argmax().item()
        (torch.Size([1, 32, 101]), True)
        >>> LogMel(8000, 1)(torch.zeros(1, 1, dtype=torch.int16)).shape
        torch.Size([1, 32, 1])
    """

    window: Tensor
    filters: Tensor

    def __init__(self, rate: int, samples: int) -> None:
        super().__init__()
        self.hop = max(round(HOP * rate), math.ceil(samples / MOST_COLUMNS))
        # At very low rates a window needs samples more than it needs time.
        width = max(round(WINDOW * rate), math.ceil(1.25 * self.hop), 64)
        self.size = 2 ** math.ceil(math.log2(width))
        window = torch.hann_window(width)
        self.register_buffer("window", window / (window.sum() / 2), persistent=False)  # a sine at full level: 1
        self.register_buffer("filters", _mel_filters(rate, self.size), persistent=False)
        self.bands, self.columns = len(self.filters), 1 + samples // self.hop

    def forward(self, data: Tensor) -> Tensor:
        rows = max(1, CHUNK // data.shape[1]) if data.device.type == "cpu" else len(data)
        return torch.cat([self._transform(part) for part in data.split(rows)])

    def _transform(self, data: Tensor) -> Tensor:
        # Padding by half a window here, with silence, lets a sound shorter than a window through:
        # stft's own centring reflects, and raises for those.
        x = F.pad(data.float() / 32768, (self.size // 2, self.size // 2))
        window = self.window.float()
        spectrum = torch.stft(x, self.size, self.hop, len(window), window, center=False, return_complex=True)
        power = self.filters.float() @ (spectrum.real.square() + spectrum.imag.square())
        return (power + FLOOR).log()


class Encoder(Convnet):
    """The standardised log-mel picture through a :class:`Convnet`: int16 ``[B, samples]`` to ``[B, 64]``.

    Example:
        >>> settings = {"rate": 8000, "samples": 4000, "mean": [-9.0] * 32, "std": 3.0}
        >>> Encoder(settings)(torch.zeros(5, 4000, dtype=torch.int16)).shape
        torch.Size([5, 64])
    """

    mean: Tensor

    def __init__(self, settings: dict[str, Any]) -> None:
        mel = LogMel(settings["rate"], settings["samples"])
        super().__init__(1, mel.bands, mel.columns)
        self.mel = mel
        self.std = settings["std"]
        self.register_buffer("mean", torch.tensor(settings["mean"]).view(-1, 1), persistent=False)

    def prepare(self, data: Tensor) -> Tensor:
        """The standardised log-mel picture, ``[B, 1, bands, columns]``."""
        return ((self.mel(data).to(self.mean.dtype) - self.mean) / self.std).unsqueeze(1)


def _survey(path: Path) -> tuple[NDArray[np.float64], int, int]:
    """What can matter of a sound, its rate, and its length in frames."""
    wave, source, frames = _read(path, LONGEST)
    return _loudest(wave, math.ceil(LONGEST * source)), source, frames


def _read(path: Path, seconds: float) -> tuple[NDArray[np.float64], int, int]:
    """The mono waveform, its rate, and how many frames were read, at most :data:`MAX_FRAMES`.

    A file of more frames than :data:`HELD` is read twice: for where it is loudest, and for that stretch, which is
    then the waveform.
    """
    check_file(path)
    soundfile = optional("soundfile")
    try:
        # A descriptor, not a name: libsndfile then goes by the content instead of the extension. Not the file
        # object: a damaged header that makes it seek before the beginning would print a traceback.
        with path.open("rb") as file, soundfile.SoundFile(file.fileno(), closefd=False) as sound:
            rate = int(sound.samplerate)
            if not 0 < rate <= FASTEST:
                raise _undecodable(path, f"Its header says {rate} samples a second.")
            length = math.ceil(seconds * rate)
            if sound.frames <= max(HELD, 2 * length):
                blocks = list(_blocks(path, sound, MAX_FRAMES))
                frames = sum(map(len, blocks))
            else:
                start, frames = _scan(path, sound, length)
                sound.seek(start)
                blocks = list(_blocks(path, sound, length))
    except soundfile.LibsndfileError as error:
        raise _undecodable(path, f"It is not a sound that can be decoded: {error.error_string}") from error
    if not blocks:
        raise InputError("empty sound", str(path), "It has no samples.", "Record it again, or remove the row.", 0)
    return np.concatenate(blocks), rate, frames


def _blocks(path: Path, sound: Any, most: int, multiple: int = 1) -> Iterator[NDArray[np.float64]]:
    """Mono blocks, ``most`` frames in all: reading them at once would allocate what the header promises."""
    size = multiple * max(1, 2**20 // sound.channels // multiple)
    while most > 0 and len(frames := sound.read(min(size, most), dtype="float32", always_2d=True)):
        if not np.isfinite(frames).all():
            raise _undecodable(path, "Some samples are not finite numbers.")
        yield frames.mean(axis=1, dtype=np.float64)
        most -= len(frames)


def _scan(path: Path, sound: Any, length: int) -> tuple[int, int]:
    """Where the loudest ``length`` samples of a file start, and how many frames it has."""
    hop = max(1, length // 64)
    energies, frames = [np.zeros(0)], 0
    for block in _blocks(path, sound, MAX_FRAMES, multiple=hop):
        energies.append(np.add.reduceat(np.square(block), np.arange(0, len(block), hop)))
        frames += len(block)
    return _start(np.concatenate(energies), hop, length, frames), frames


def _undecodable(path: Path, message: str) -> InputError:
    remedy = "Open it in a player and save it as WAV or FLAC, or remove the row."
    return InputError("undecodable sound", str(path), message, remedy)


def _shape(wave: NDArray[np.float64], source: int, settings: dict[str, Any]) -> NDArray[np.int16]:
    """Cut, resample, centre and scale a waveform at ``source`` Hz to the planned int16 ``[samples]``."""
    rate, samples = settings["rate"], settings["samples"]
    # Cutting comes first: it bounds the work, whatever the file's length and rate.
    wave = _loudest(wave, math.ceil(samples * source / rate))
    loudest = np.abs(wave).max()
    wave = wave - wave.mean()
    if np.abs(wave).max() <= 1e-6 * loudest:  # nothing but an offset, and the rounding of its removal
        return np.zeros(samples, np.int16)
    if source != rate:
        # A ratio of small numbers keeps the filter short; it is off by less than a thousandth.
        ratio = Fraction(rate, source).limit_denominator(1000)
        wave = optional("scipy.signal").resample_poly(wave, ratio.numerator, ratio.denominator)
    wave = wave[:samples]
    result = np.zeros(samples, np.int16)
    peak = np.abs(wave).max()
    if peak > 0:
        result[: len(wave)] = np.rint(wave * (32767 / peak))
    return result


def _loudest(wave: NDArray[np.float64], length: int) -> NDArray[np.float64]:
    """The stretch of ``length`` samples with the most energy, to within a 64th of its length."""
    if len(wave) <= length:
        return wave
    hop = max(1, length // 64)
    start = _start(np.add.reduceat(np.square(wave), np.arange(0, len(wave), hop)), hop, length, len(wave))
    return wave[start : start + length]


def _start(energy: NDArray[np.float64], hop: int, length: int, frames: int) -> int:
    """Where ``length`` of ``frames`` samples have the most energy, given the energies of pieces of ``hop``."""
    steps = length // hop
    total = np.concatenate([[0.0], np.cumsum(energy)])
    if frames <= length or len(total) <= steps:
        return 0
    start = hop * int(np.argmax(total[steps:] - total[:-steps]))
    return min(start, frames - length)


def _mel_filters(rate: int, size: int) -> Tensor:
    """Triangles of equal width in mel, 2595 log10(1 + f / 700), over FFT bins: ``[bands, size / 2 + 1]``."""
    top = 2595 * math.log10(1 + rate / 2 / 700)
    edges = 700 * (10 ** (torch.linspace(0, top, MELS + 2, dtype=torch.float64) / 2595) - 1)
    bins = torch.linspace(0, rate / 2, size // 2 + 1, dtype=torch.float64)
    low, centre, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    filters = torch.minimum((bins - low) / (centre - low), (high - bins) / (high - centre)).clamp(min=0)
    return filters[filters.sum(dim=1) > 0].float()  # at low rates some bands fall between two bins
