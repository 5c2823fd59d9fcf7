"""Written and spoken digits, degraded, paired by class: the two-modality task of the benchmarks.

Pictures keep the leading 25 % of their variance (principal components of the training pictures), speech is mixed with
babble of four other recordings of its split at -6 dB: neither modality suffices alone (as in AV-MNIST; Vielzeuf et
al., 2018). A row's picture and recording share their class and nothing else; they are not recordings of one event.
Rows: 7000 for training, 1000 for validation, 2000 for test; no picture and no recording is in two splits.
"""

from __future__ import annotations

import gzip
import os
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

DATA = Path(os.environ.get("HESSE_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
SIZES = {"train": 7000, "valid": 1000, "test": 2000}
Split = tuple[tuple[Tensor, Tensor], Tensor]


def available() -> bool:
    return (DATA / "mnist").is_dir() and (DATA / "fsdd").is_dir()


def load(seed: int) -> dict[str, Split]:
    """``{"train": ((images [N, 1, 28, 28], log-mel [N, 1, 24, 32]), labels [N]), ...}``, standardised."""
    rng = np.random.default_rng(seed)
    images, image_labels = _mnist()
    parts = np.split(rng.permutation(len(images)), np.cumsum(list(SIZES.values()))[:-1])
    flat = images.reshape(len(images), -1).astype(np.float32) / 255
    reduced = _leading_variance(flat, flat[parts[0]], share=0.25)
    mean, std = reduced[parts[0]].mean(), reduced[parts[0]].std()
    pictures = torch.from_numpy((reduced - mean) / std).reshape(-1, 1, 28, 28)

    waves, wave_labels = _fsdd()
    recordings = np.split(rng.permutation(len(waves)), [2100, 2400])
    splits: dict[str, Split] = {}
    for (name, size), rows, pool in zip(SIZES.items(), parts, recordings, strict=True):
        labels = image_labels[rows]
        by_class = [pool[wave_labels[pool] == c] for c in range(10)]
        chosen = np.array([rng.choice(by_class[c]) for c in labels])
        others = rng.choice(pool, size=(size, 4))
        speech = waves[chosen] + _babble(waves[chosen], waves[others], decibel=-6, rng=rng)
        splits[name] = (pictures[rows], _log_mel(torch.from_numpy(speech))), torch.from_numpy(labels).long()
    sound = splits["train"][0][1]
    centre, spread = sound.mean(), sound.std()
    return {name: ((x, (s - centre) / spread), y) for name, ((x, s), y) in splits.items()}


class Tower(nn.Sequential):
    """Three stride-2 3x3 convolutions and 64 features."""

    def __init__(self, height: int, width: int) -> None:
        sizes = [(height, width)]
        for _ in range(3):
            sizes.append(((sizes[-1][0] + 1) // 2, (sizes[-1][1] + 1) // 2))
        layers: list[nn.Module] = []
        for before, after in ((1, 16), (16, 32), (32, 32)):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.ReLU()]
        super().__init__(*layers, nn.Flatten(), nn.Linear(32 * sizes[-1][0] * sizes[-1][1], 64), nn.ReLU())


class LateFusion(nn.Module):
    """A tower a modality, concatenated, one hidden layer."""

    def __init__(self, image: tuple[int, int], sound: tuple[int, int]) -> None:
        super().__init__()
        self.image = Tower(*image)
        self.sound = Tower(*sound)
        self.head = nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))

    def forward(self, image: Tensor, sound: Tensor) -> Tensor:
        return self.head(torch.cat([self.image(image), self.sound(sound)], dim=1))


def _mnist() -> tuple[np.ndarray, np.ndarray]:
    folder = DATA / "mnist"
    with gzip.open(folder / "t10k-images-idx3-ubyte.gz") as file:
        images = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 28, 28)
    with gzip.open(folder / "t10k-labels-idx1-ubyte.gz") as file:
        labels = np.frombuffer(file.read(), np.uint8, offset=8)
    return images, labels


def _fsdd(samples: int = 8000) -> tuple[np.ndarray, np.ndarray]:
    """Recordings centred in one second at 8 kHz, of unit power: float32 [3000, samples]."""
    with np.load(DATA / "fsdd" / "fsdd.npz") as archive:
        flat, offsets, labels = archive["waves"], archive["offsets"], archive["label"]
    waves = np.zeros((len(labels), samples), np.float32)
    for row, (start, stop) in enumerate(pairwise(offsets)):
        wave = flat[start:stop][:samples].astype(np.float32)
        wave /= np.sqrt(np.mean(wave**2)) + 1e-9
        begin = (samples - len(wave)) // 2
        waves[row, begin : begin + len(wave)] = wave
    return waves, labels


def _leading_variance(x: np.ndarray, train: np.ndarray, share: float) -> np.ndarray:
    mean = train.mean(0)
    variance, basis = np.linalg.eigh(np.cov(train - mean, rowvar=False))
    variance, basis = variance[::-1], basis[:, ::-1]
    kept = int(np.searchsorted(np.cumsum(variance) / variance.sum(), share)) + 1
    return ((x - mean) @ basis[:, :kept] @ basis[:, :kept].T + mean).astype(np.float32)


def _babble(speech: np.ndarray, others: np.ndarray, decibel: float, rng: np.random.Generator) -> np.ndarray:
    """Sum of ``others`` [N, 4, T], each begun at a random time, at a signal-to-noise ratio of ``decibel``.

    Power is that of the samples in which somebody speaks: silence around a short word is not a lower level.
    """
    begin = rng.integers(others.shape[-1], size=others.shape[:2])
    time = (np.arange(others.shape[-1]) + begin[..., None]) % others.shape[-1]
    babble = np.take_along_axis(others, time, axis=-1).sum(1)
    return babble * np.sqrt(_active_power(speech) / _active_power(babble) * np.float32(10 ** (-decibel / 10)))


def _active_power(waves: np.ndarray) -> np.ndarray:
    return np.sum(waves**2, axis=1, keepdims=True) / np.count_nonzero(waves, axis=1, keepdims=True).astype(np.float32)


def _log_mel(waves: Tensor, bands: int = 24, window: int = 256, hop: int = 256) -> Tensor:
    spectrum = torch.stft(
        waves, window, hop, window=torch.hann_window(window), center=True, pad_mode="constant", return_complex=True
    )
    power = spectrum.abs() ** 2
    mel = 2595 * np.log10(1 + np.linspace(0, 4000, window // 2 + 1) / 700)
    edges = np.linspace(mel[0], mel[-1], bands + 2)
    left, centre, right = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    bank = np.maximum(0, np.minimum((mel - left) / (centre - left), (right - mel) / (right - centre)))
    return torch.log(torch.einsum("mf,nft->nmt", torch.from_numpy(bank).float(), power) + 1e-6)[:, None]
