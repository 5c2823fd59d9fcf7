"""Gradients that fade through depth, and those that are small for other reasons."""

from __future__ import annotations

import pytest

from health_runs.records import CHAIN, spike, written
from hesse.health.rules import PATIENCE, vanishing
from hesse.health.stats import Stats


def fading(factor: float, **more: object) -> Stats:
    """Each layer's gradient is ``factor`` of that of the next."""
    grads = {path: factor ** (len(CHAIN) - 1 - i) for i, path in enumerate(CHAIN)}
    return written({path: {"grad_norm": grad} for path, grad in grads.items()}, **more)  # type: ignore[arg-type]


def test_the_first_starved_layer_is_named_and_the_last_one_said() -> None:
    [finding] = vanishing(fading(1e-3))
    assert (finding.kind, finding.where, finding.step, finding.limit) == ("vanishing", "0", 91, 1e-5)
    assert finding.value == pytest.approx(1e-12)
    assert "2 more layers" in finding.message and "from 0 to 4" in finding.message
    assert finding.evidence["starved"] == ["0", "2", "4"] and finding.evidence["lost_above"] == "4"
    assert finding.evidence["values"] == [pytest.approx(1e-12)] * 10
    assert finding.evidence["profile"]["6"] == pytest.approx(1e-3)


def test_a_blockage_is_named_at_the_layer_below_it() -> None:
    [finding] = vanishing(written({path: {"grad_norm": 1e-8} for path in ("0", "2", "4")}))
    assert finding.where == "4"


def test_layers_are_ordered_as_they_are_called_and_not_as_they_are_defined() -> None:
    changed = {path: {"order": order} for order, path in enumerate(("8", "6", "4", "2", "0"))}
    changed["8"]["grad_norm"] = 1e-9  # type: ignore[assignment]
    [finding] = vanishing(written(changed))
    assert finding.where == "8"
    assert vanishing(written({**changed, "8": {"order": 0}, "0": {"order": 9, "grad_norm": 1e-9}})) == []


def test_a_gradient_below_what_a_float_holds_belongs_to_the_fading() -> None:
    grads = {"0": 0.0, "2": 1e-30, "4": 1e-15, "6": 1e-3}
    [finding] = vanishing(written({path: {"grad_norm": grad} for path, grad in grads.items()}))
    assert finding.evidence["starved"] == ["0", "2", "4"]


def test_a_weak_gradient_counts_only_where_it_fades_steadily_and_nothing_is_learnt() -> None:
    stuck = [1.4 + 0.01 * (i % 3) for i in range(100)]
    [finding] = vanishing(fading(0.2, told=stuck))
    assert (finding.where, finding.limit) == ("0", 1e-2)
    assert vanishing(fading(0.2, told=[2.0 - 0.01 * i for i in range(100)])) == []
    assert vanishing(fading(0.2, told=stuck[:20])) == []
    assert vanishing(fading(0.5, told=stuck)) == []
    assert vanishing(written({"0": {"grad_norm": 1e-3}}, told=stuck)) == []  # one layer only: it does not fade


HEALTHY = {
    "like layers": written(),
    "small gradients everywhere": written({path: {"grad_norm": 1e-12} for path in CHAIN}),
    "small gradient of a large weight": written({"0": {"grad_norm": 1e-6, "weight_norm": 1e7}}),
    "too early to tell": fading(1e-3, samples=PATIENCE - 1),
    "still rising": written({"0": {"grad_norm": lambda i: 1e-9 * 10**i}}),
    "rising from far below": written({"0": {"grad_norm": lambda i: 1e-15 * 10**i}}),
    "zero beside a weak one": written({"0": {"grad_norm": 0.0}, "2": {"grad_norm": 5e-3}}),
    "zero by structure": written({"0": {"grad_norm": 0.0}}),
    "no gradient": written({"0": {"grad_norm": None}}),
    "one bad sample": written({"0": {"grad_norm": spike(1e-9)}}),
    "no records": written(samples=0),
}


@pytest.mark.parametrize("name", HEALTHY)
def test_healthy_gradients(name: str) -> None:
    assert vanishing(HEALTHY[name]) == []
