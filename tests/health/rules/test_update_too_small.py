"""Steps that are too short, and short steps that are right."""

from __future__ import annotations

from typing import Any

import pytest

from health_runs.made import made
from hesse.health.rules.update_too_small import update_too_small as rule


def crawl(**changes: Any) -> dict[str, Any]:
    """A run that does not move; ``changes`` make it healthy."""
    still = {"loss": lambda i: 2.0 + 0.01 * (i % 3), "moved": lambda i: 1e-6 * i, "update_ratio": 1e-7}
    noisy = {"coherence": lambda i: 0.3 + 0.1 * (i % 2), "grad_norm": lambda i: 1 + 0.1 * (i % 3)}
    return {**still, **noisy, **changes}


HEALTHY: dict[str, dict[str, Any]] = {
    "moves": crawl(moved=lambda i: 0.01 * i),
    "learns": crawl(loss=lambda i: 2.0 - 0.02 * i),
    "gradients disagree": crawl(coherence=lambda i: 0.3 * (-1) ** i, moved=lambda i: 4e-4 * i),
    "converged": crawl(grad_norm=lambda i: 1e-5 + 1e-6 * (i % 4)),
    "warm-up": crawl(lr=lambda i: 1e-6 * i),
    "too early": crawl(count=6),
    "low precision": crawl(dtype="bfloat16"),
    "steady": {},
    "cosine to zero": {"lr": lambda i: 0.1 if i < 19 else 0.0},
    "decayed and converged": {"lr": lambda i: 0.1 if i < 5 else 1e-6, "grad_norm": lambda i: 1.0 if i < 5 else 1e-3},
    "frozen by hand, no gradient": {"first_moved": 0.0, "first_grad_norm": None},
    "frozen by its learning rate": {"first_moved": 0.0, "first_lr": 0.0},
    "all of one optimiser's, not stepped yet": {"moved": 0.0},
}


@pytest.mark.parametrize("name", HEALTHY)
def test_left_in_peace(name: str) -> None:
    assert rule(made(**HEALTHY[name])) == []


def test_a_run_that_crawls() -> None:
    [finding] = rule(made(**crawl()))
    assert (finding.kind, finding.where, finding.severity) == ("update_too_small", "optimizer", "warning")
    assert finding.value == pytest.approx(1.9e-5)
    assert "from 0.1 to about 1e+03" in finding.remedy  # steps of 1e-7 become 1e-3


def test_too_short_a_way_whatever_the_noise() -> None:
    [finding] = rule(made(**crawl(coherence=lambda i: 0.3 * (-1) ** i)))
    assert "thousandth" in finding.message


def test_clipped_to_nothing() -> None:
    """Gradients of 1e-6 beside a loss of 2 are those of a converged net, unless they all have that length."""
    [finding] = rule(made(**crawl(grad_norm=1e-6)))
    assert finding.remedy.startswith("Clip less")


def test_a_layer_that_no_optimiser_holds() -> None:
    [finding] = rule(made(middle_moved=0.0, last_moved=0.0))
    assert finding.where == "middle" and "last" in finding.message and "optimiser" in finding.remedy


def test_a_schedule_that_ended_long_ago() -> None:
    [finding] = rule(made(lr=lambda i: 0.1 if i < 5 else 1e-6))
    assert finding.where == "optimizer" and "schedule" in finding.remedy
    assert finding.limit == pytest.approx(1e-4)
