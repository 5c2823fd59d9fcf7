"""Steps that are too long, and losses that rise for other reasons."""

from __future__ import annotations

from typing import Any

import pytest

from health_runs.made import made
from hesse.health.rules.learning_rate_too_large import learning_rate_too_large as rule

THROWN: dict[str, dict[str, Any]] = {
    "reversed slopes": {"count": 5, "loss": lambda i: 2.0**i, "turn": -1.5, "every": 1},
    "weights rewritten": {"count": 5, "loss": lambda i: 1 + 0.2 * i, "update_ratio": 0.4, "moved": 2.0, "every": 1},
    "one step longer than the weights": {"count": 2, "loss": lambda i: 1 + 5.0 * i, "update_ratio": 4.0, "every": 1},
    "raised later": {"loss": lambda i: 1.0 if i < 17 else 9.0, "lr": lambda i: 0.1 if i < 16 else 10.0},
    "never comes down": {"loss": lambda i: 1.0 + 0.1 * (i % 2), "turn": -0.9, "count": 25},
}
HEALTHY: dict[str, dict[str, Any]] = {
    "steady": {},
    "noisy start, short steps": {"count": 5, "loss": lambda i: 1 + 0.3 * i, "every": 1},
    "long steps, falling loss": {"update_ratio": 0.5, "moved": 3.0},
    "reversed slopes, falling loss": {"turn": -1.1},
    "flat by noise": {"loss": lambda i: 1.0 + 0.1 * (i % 2), "turn": -0.2, "count": 25},
    "one bad batch late": {
        "loss": lambda i: 50.0 if i == 19 else 1 / (1 + i),
        "first_update_ratio": lambda i: 3.0 if i == 19 else 1e-3,
    },
    "warm restart that works": {"loss": lambda i: 1.0 if i < 17 else 0.9, "lr": lambda i: 0.01 if i < 16 else 0.1},
    "no loss": {"loss": None},
    "one record": {"count": 1},
}


@pytest.mark.parametrize("name", THROWN)
def test_named(name: str) -> None:
    [finding] = rule(made(**THROWN[name]))
    assert (finding.kind, finding.where) == ("learning_rate_too_large", "optimizer")
    assert finding.evidence["values"] and "learning rate" in finding.remedy


@pytest.mark.parametrize("name", HEALTHY)
def test_left_in_peace(name: str) -> None:
    assert rule(made(**HEALTHY[name])) == []


def test_the_layer_that_is_rewritten_alone_is_named() -> None:
    [finding] = rule(made(5, loss=lambda i: 1 + 0.2 * i, last_update_ratio=0.4, moved=2.0, every=1))
    assert finding.where == "last"
    assert "40 times" in finding.remedy  # to a hundredth of its weights


def test_before_the_loss_is_lost_it_is_a_warning() -> None:
    early = {"update_ratio": 0.4, "moved": 2.0, "every": 1}
    assert rule(made(5, loss=lambda i: 1 + 0.2 * i, **early))[0].severity == "warning"
    assert rule(made(5, loss=lambda i: 1 + 9.0 * i, **early))[0].severity == "error"
