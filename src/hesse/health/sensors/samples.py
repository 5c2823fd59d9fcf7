"""Few numbers that stand for a large tensor: which tensors may be read, which of their elements, which calls.

An activation of ten million elements is described by a sample of 32 768 of them, and a loop of a hundred turns by its
turns 1, 2, 4, 8, ...: sizes and shares are known to better than a percent, at a cost that does not grow.
"""

from __future__ import annotations

from math import gcd
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["ELEMENTS", "Samples", "plain", "positions", "rms", "strided", "tensors"]

ELEMENTS = 32_768  # of a tensor are looked at
POSITIONS = 1024  # of a unit


class Samples:
    """Numbers of one pass, several for a path and key when it is called several times.

    Example:
        >>> samples = Samples()
        >>> [samples.turn("layer", "fc") for _ in range(5)]
        [True, True, False, True, False]
        >>> samples.add("fc", "out_rms", torch.tensor(3.0)), samples.add("fc", "out_rms", torch.tensor(1.0))
        (None, None)
        >>> samples.read()
        {'fc': {'out_rms': tensor(2.2361)}}
    """

    def __init__(self) -> None:
        self._numbers: dict[str, dict[str, list[Tensor]]] = {}
        self._turns: dict[tuple[str, str], int] = {}

    def turn(self, kind: str, path: str) -> bool:
        """Whether to look at this call: of a loop, turns 1, 2, 4, 8, ..."""
        n = self._turns[kind, path] = self._turns.get((kind, path), 0) + 1
        return n & (n - 1) == 0

    def add(self, path: str, key: str, value: Tensor) -> None:
        """A scalar, still on its device."""
        self._numbers.setdefault(path, {}).setdefault(key, []).append(value)

    def read(self) -> dict[str, dict[str, Tensor]]:
        """The means over calls; of keys that end in "rms" the root of the mean square."""
        reading: dict[str, dict[str, Tensor]] = {}
        for path, numbers in self._numbers.items():
            for key, values in numbers.items():
                part = torch.stack(values) if len(values) > 1 else values[0]
                if len(values) > 1:
                    part = part.square().mean().sqrt() if key.endswith("rms") else part.mean()
                reading.setdefault(path, {})[key] = part
        return reading


def tensors(value: Any) -> list[Tensor]:
    """The tensors in an argument or output: itself, or what tuples, lists and dicts hold."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (tuple, list)):
        return []
    found = []
    for item in value:
        if isinstance(item, Tensor):
            found.append(item)
        elif isinstance(item, (tuple, list, dict)):
            found += tensors(item)
    return found


def plain(value: Any) -> Tensor | None:
    """The first floating tensor of ``value``, if it is of torch's own class, dense, on a device and not empty."""
    for x in tensors(value):
        if x.is_floating_point():
            dense = type(x) in (Tensor, nn.Parameter) and x.layout is torch.strided and not x.is_nested
            return x if dense and x.device.type != "meta" and x.numel() else None
    return None


def strided(x: Tensor, limit: int = ELEMENTS) -> Tensor:
    """At most ``limit`` elements of ``x`` [...], evenly spread, as a detached vector in float32 (float64 stays).

    The stride shares no factor with the number of elements, so that no axis is seen at one index only.

    Example:
        >>> strided(torch.arange(12.0).reshape(3, 4), 6)
        tensor([ 0.,  5., 10.])
    """
    x = x.detach()
    if not x.is_contiguous():  # a flat view of it would be a copy
        x = positions(x, 0, 256)
    n = x.numel()
    step = -(-n // limit)
    while step > 1 and gcd(step, n) > 1:
        step += 1
    flat = x.reshape(-1)[::step]
    return flat if flat.dtype == torch.float64 else flat.float()


def rms(x: Tensor) -> Tensor:
    """Root of the mean square of a sample of the elements of ``x`` [...], a scalar on its device."""
    part = strided(x)
    return torch.linalg.vector_norm(part) / part.numel() ** 0.5


def positions(x: Tensor, axis: int, each: int = POSITIONS) -> Tensor:
    """Every index of ``axis`` at about ``each`` places of the other axes: a detached view of ``x`` [...].

    Every second index of the longest other axis is left out until few enough remain.

    Example:
        >>> positions(torch.zeros(4096, 100, 8), 2, 1024).shape
        torch.Size([64, 50, 8])
    """
    x = x.detach()
    start = [0] * x.dim()  # first the even indices, then the odd ones among them: what remains is not all at one end
    while x.numel() > max(ELEMENTS, each * x.shape[axis]):
        longest = max((d for d in range(x.dim()) if d != axis), key=lambda d: x.shape[d])
        x = x[(slice(None),) * longest + (slice(start[longest], None, 2),)]
        start[longest] = 1 - start[longest]
    return x
