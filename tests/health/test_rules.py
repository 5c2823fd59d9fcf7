"""Each rule alone, on statistics written by hand: a planted fault, and the healthy runs that look like it."""

from __future__ import annotations

import math
from typing import Any

import pytest

from hesse.health.rules import PATIENCE, RULES, dead_units, exploding, non_finite, vanishing
from hesse.health.stats import Stats

LAYERS = "first", "middle", "last"


def stats(steps: int = 10, loss: Any = 1.0, **numbers: Any) -> Stats:
    """Records of three like layers; ``first_grad=`` sets a number, or a function of the record's index."""

    def at(value: Any, i: int) -> Any:
        return value(i) if callable(value) else value

    keys = {
        "grad": ("grad_norm", 1.0),
        "weight": ("weight_norm", 10.0),
        "ratio": ("update_ratio", 1e-3),
        "dead": ("dead", None),
    }
    return Stats(
        [
            {
                "step": 10 * i,
                "loss": at(loss, i),
                "layers": {
                    layer: {
                        key: at(numbers.get(f"{layer}_{short}", usual), i)
                        for short, (key, usual) in keys.items()
                    }
                    for layer in LAYERS
                },
            }
            for i in range(steps)
        ]
    )  # fmt: skip


def spike(height: float) -> Any:
    return lambda i: height if i == 9 else 1.0


def where(findings: list[Any]) -> list[str]:
    return [finding.where for finding in findings]


def test_vanishing_names_the_first_starved_layer_and_counts_the_others() -> None:
    [finding] = vanishing(stats(first_grad=1e-9, middle_grad=1e-6))
    assert (finding.kind, finding.where, finding.step) == ("vanishing", "first", 90)
    assert finding.value == pytest.approx(1e-9) and finding.limit == 1e-5
    assert "1 more" in finding.message and "middle" in finding.remedy


HEALTHY = {
    "nothing yet": stats(0),
    "like layers": stats(),
    "small gradients everywhere": stats(first_grad=1e-12, middle_grad=1e-12, last_grad=1e-12),
    "converging": stats(loss=lambda i: 10.0**-i, **{f"{k}_grad": lambda i: 10.0 ** -(2 * i) for k in LAYERS}),
    "small gradient of a large weight": stats(first_grad=1e-6, first_weight=1e7),
    "too early to tell": stats(PATIENCE - 1, first_grad=1e-9),
    "still rising": stats(first_grad=lambda i: 1e-9 * 10**i),
    "zero by structure": stats(first_grad=0.0),
    "no gradient": stats(first_grad=None),
    "one bad sample": stats(first_grad=spike(1e-9)),
    "first gradient tiny, head zero at the start": stats(first_grad=lambda i: min(i, 1.0), last_weight=0.0),
    "spike of the gradient while the loss is good": stats(loss=lambda i: 1 / (i + 1), first_grad=spike(1e4)),
    "spike after convergence": stats(
        5, loss=lambda i: (1, 1e-9, 1e-9, 1e-9, 1e-4)[i], first_grad=lambda i: (1, 1e-8, 1e-8, 1e-8, 1)[i]
    ),
    "loss worse, gradients as ever": stats(loss=lambda i: 1.0 + i),
    "large first step from zero": stats(2, last_ratio=1.5, loss=lambda i: 1.0 - 0.1 * i),
    "negative loss": stats(loss=lambda i: -1.0 - i, first_grad=spike(100.0)),
    "some dead units": stats(first_dead=0.5),
    "no loss told": stats(loss=None, first_grad=spike(50.0)),
}  # fmt: skip


@pytest.mark.parametrize("name", HEALTHY)
def test_no_rule_speaks_about_a_healthy_run(name: str) -> None:
    assert [str(f) for rule in RULES for f in rule(HEALTHY[name])] == []


def test_exploding_gradient_with_a_loss_worse_than_at_the_start() -> None:
    [finding] = exploding(stats(loss=spike(5.0), middle_grad=spike(1e3)))
    assert (finding.kind, finding.where, finding.limit) == ("exploding", "middle", 30.0)
    assert finding.value == pytest.approx(1e3)
    assert where(exploding(stats(loss=None, middle_grad=spike(1e5)))) == ["middle"]


def test_exploding_steps_larger_than_the_weights() -> None:
    [finding] = exploding(stats(2, last_ratio=3.0))
    assert (finding.where, finding.value, finding.limit) == ("last", 3.0, 1.0)


def test_dead_units() -> None:
    findings = dead_units(stats(first_dead=0.9, last_dead=0.7))
    assert where(findings) == ["first", "last"]
    assert "90%" in findings[0].message


def test_non_finite_names_the_loss_or_the_first_layer() -> None:
    bad = math.nan
    assert where(non_finite(stats(loss=spike(bad)))) == ["loss"]
    [finding] = non_finite(stats(middle_grad=spike(math.inf), last_grad=bad))
    assert (finding.where, finding.severity) == ("middle", "error")
    assert "2 of 3 layers" in finding.message
