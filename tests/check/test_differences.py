"""hesse.check.differences: slopes come with a limit that covers their error, and is not idle."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from hesse.check.differences import Probe, own_scales


def values(f: Callable[[Tensor], Tensor], a: Tensor, summed: bool) -> Tensor:
    return f(a).double().sum().reshape(1) if summed else f(a).double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_limit_covers_the_error_of_known_slopes(dtype: torch.dtype) -> None:
    """Over points, functions and scales: the true slope lies within the limit, and the limit is not idle."""
    generator = torch.Generator().manual_seed(0)
    functions: list[tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = [
        (torch.exp, torch.exp),
        (torch.sin, torch.cos),
        (torch.abs, torch.sign),
        (lambda a: a**3 + 1e3, lambda a: 3 * a**2),
        (torch.relu, lambda a: (a > 0).to(a)),
    ]
    sharp = total = 0
    for f, derivative in functions:
        for size in (1, 30):
            for scale in (1e-3, 1.0, 5.0):
                a = (torch.randn(size, generator=generator, dtype=torch.float64) * scale).to(dtype)
                grads = [derivative(a)]
                eps = torch.finfo(dtype).eps
                for summed in (True, False):
                    evaluate = partial(values, f, a, summed)
                    probe = Probe(evaluate, [a], list(own_scales({"a": a}).values()), eps, generator)
                    slope = probe.slope(grads, probe.random_direction())
                    assert math.isfinite(slope.limit)
                    assert not slope.wrong, (f, size, scale, slope)
                    sharp += slope.noise < 0.1
                    total += 1
    assert sharp > total / 2
