"""A flat loss with healthy gradients, and flat losses that are something else."""

from __future__ import annotations

from typing import Any

import pytest

from health_runs.made import made
from hesse.health.rules.plateau import plateau as rule


def flat(**changes: Any) -> dict[str, Any]:
    walk = {"moved": lambda i: 0.1 * i**0.5}
    noisy = {**walk, "count": 30, "loss": lambda i: 1.4 + 0.02 * (-1) ** i, "coherence": lambda i: 0.3 * (-1) ** i}
    return {**noisy, **changes}


OTHERS: dict[str, dict[str, Any]] = {
    "still falling": flat(loss=lambda i: 1.4 - 0.01 * i),
    "has come down and ended": flat(loss=lambda i: 3.0 if i < 5 else 1.4 + 0.02 * (-1) ** i),
    "converged: gradients have shrunk": flat(grad_norm=lambda i: 0.9**i),
    "gone: gradients are zero": flat(grad_norm=lambda i: 1.0 if i < 5 else 0.0),
    "goes its way": flat(moved=lambda i: 0.01 * i),
    "does not move": flat(moved=1e-6),
    "gradients agree": flat(coherence=0.4),
    "too early": flat(count=15),
    "no loss": flat(loss=None),
}


@pytest.mark.parametrize("name", OTHERS)
def test_said_of_nothing_else(name: str) -> None:
    assert rule(made(**OTHERS[name])) == []


def test_label_noise_is_information() -> None:
    [finding] = rule(made(**flat()))
    assert (finding.kind, finding.where, finding.severity) == ("plateau", "loss", "info")
    assert finding.value == pytest.approx(1.4, abs=0.03)
    assert "labels" in finding.remedy
