"""Updates that are rounded away, in weights of low precision only."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from health_runs.made import made
from hesse.health.rules.stagnant_update import stagnant_update as rule

HEALTHY: dict[str, dict[str, Any]] = {
    "few elements": {"dtype": "bfloat16", "stuck": 0.3},
    "float32": {"stuck": 0.99},
    "converged": {"dtype": "bfloat16", "stuck": 0.99, "grad_norm": lambda i: 0.5**i},
    "warm-up": {"dtype": "bfloat16", "stuck": 0.99, "lr": lambda i: 0.01 * i},
    "in some samples": {"dtype": "bfloat16", "stuck": lambda i: 0.9 * (i % 2)},
    "not measured": {"dtype": "float16", "stuck": None},
    "steps left out by a guard": {"dtype": "bfloat16", "stuck": 0.99, "more": {"skipped": True}},
    "young": {"dtype": "bfloat16", "stuck": 0.99, "count": 2},
}


@pytest.mark.parametrize("name", HEALTHY)
def test_left_in_peace(name: str) -> None:
    assert rule(made(**HEALTHY[name])) == []


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_layer_with_the_most_is_named(dtype: str) -> None:
    [finding] = rule(made(dtype=dtype, stuck=0.6, middle_stuck=0.95))
    assert (finding.kind, finding.where, finding.value) == ("stagnant_update", "middle", 0.95)
    assert dtype in finding.message and "float32" in finding.remedy


def test_what_stuck_means() -> None:
    """A step of 1/1024 of a bfloat16 weight is lost, one of 1/64 is not."""
    w = torch.tensor([1.0], dtype=torch.bfloat16)
    assert w - 1 / 1024 == w and w - 1 / 64 != w
