"""How close two numbers must be, and why. A test that needs another figure says its own reason at the line."""

from __future__ import annotations

from typing import TypedDict

import torch


class Tolerance(TypedDict):
    rtol: float
    atol: float


# The algebra is on trial: float64 leaves 1e-16 a rounding, and the problems here are conditioned better than 1e4.
ALGEBRA = Tolerance(rtol=1e-10, atol=1e-12)

# The same value by two routes: sums of at most a few thousand products, each rounded once.
ROUNDING = {
    torch.float64: Tolerance(rtol=1e-12, atol=1e-14),
    torch.float32: Tolerance(rtol=1e-4, atol=1e-6),
    torch.bfloat16: Tolerance(rtol=5e-2, atol=5e-2),
}

# A mean of independent draws is held to this many standard errors of itself. Seeds are fixed, so a test that passes
# goes on passing; at 5 a right formula fails by bad luck once in two million entries, and the tests have a thousand.
STANDARD_ERRORS = 5.0

# Against a fourth-order central difference of float64 gradients with a step of 1e-6: rounding 1e-16 / 1e-6, and what
# the network makes of it.
DIFFERENCES = Tolerance(rtol=1e-6, atol=1e-9)
