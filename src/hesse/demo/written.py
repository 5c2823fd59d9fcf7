"""Written digits: scikit-learn's 1797 scans, 8 x 8 pixels each, partly rubbed out and covered with grain."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from sklearn.datasets import load_digits

__all__ = ["SIZE", "digits", "spoil"]

SIZE = 16
"""Height and width of the pictures, in pixels: twice those of the scans."""


def digits() -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """The scans [1797, 8, 8], 0 for paper and 1 for ink, and what they show [1797].

    Example:
        >>> scans, shown = digits()
        >>> scans.shape, shown[:4].tolist()
        ((1797, 8, 8), [0, 1, 2, 3])
    """
    data = load_digits()
    return data.images.astype(np.float32) / 16, data.target.astype(np.int64)


def spoil(
    scans: npt.NDArray[np.float32],
    rng: np.random.Generator,
    *,
    grain: float = 0.28,
    hole: tuple[int, int] = (3, 4),
) -> npt.NDArray[np.uint8]:
    """Pictures [N, 16, 16] of ``scans`` [N, 8, 8].

    A rectangle at a random place of each scan is rubbed out, its sides drawn evenly from ``hole`` (in pixels
    of the scan), and normal noise of standard deviation ``grain`` is added. The noise is laid on the scan and
    not on the enlarged picture, so that averaging neighbours does not take it away again.
    """
    count, size, _ = scans.shape
    pixel = np.arange(size)
    height, width = rng.integers(*hole, (2, count), endpoint=True)
    rows, columns = _interval(pixel, height, rng), _interval(pixel, width, rng)
    spoiled = np.where(rows[:, :, None] & columns[:, None, :], 0, scans)
    spoiled = spoiled + grain * rng.standard_normal(scans.shape, dtype=np.float32)
    enlarge = _interpolation(size, SIZE)
    pictures = np.einsum("ij,njk,lk->nil", enlarge, spoiled, enlarge)
    # Paper at a quarter and ink at three quarters of the scale: little of the noise is cut off.
    return np.rint(255 * (0.25 + 0.5 * pictures)).clip(0, 255).astype(np.uint8)


def _interval(
    pixel: npt.NDArray[np.int64], length: npt.NDArray[np.int64], rng: np.random.Generator
) -> npt.NDArray[np.bool_]:
    """Masks [N, pixels] of intervals of given ``length`` [N], evenly placed."""
    start = rng.integers(0, len(pixel) - length, endpoint=True)[:, None]
    return (pixel >= start) & (pixel < start + length[:, None])


def _interpolation(old: int, new: int) -> npt.NDArray[np.float32]:
    """The matrix [new, old] of linear interpolation between pixel centres."""
    centres = ((np.arange(new) + 0.5) * old / new - 0.5).clip(0, old - 1)
    return np.maximum(0, 1 - np.abs(centres[:, None] - np.arange(old))).astype(np.float32)
