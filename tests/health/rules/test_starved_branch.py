"""A tower beside another: starved, noise, done, or only late."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from health_runs.made import made
from hesse.health.rules.starved_branch import starved_branch as rule
from hesse.health.stats import Stats

Curve = Callable[[int], float]


def run(count: int = 25, moved: float = 1.0, lacks: float = 0.0, **sound: Any) -> Stats:
    """A leading tower, and one beside it whose numbers are given as curves; scatter is a hundredth."""

    def scatter(value: Any, i: int) -> float:
        return (value(i) if callable(value) else value) + 0.01 * ((7 * i) % 5 - 2) / 2

    def branches(i: int) -> dict[str, dict[str, Any]]:
        usual = {"probe": 0.05, "share": 0.05, "missing": 0.0, "grad": 1.0, "curvature": 1.0}
        sight = {"probe": 0.5, "share": 0.95, "missing": lacks, "grad": 1.0, "curvature": 50.0}
        varies = sound.get("varies", lambda i: 1.0)(i)
        return {
            "sight": {key: scatter(value, i) for key, value in sight.items()} | {"varies": 1.0, "layers": "first"},
            "sound": {key: scatter(value, i) for key, value in (usual | sound).items()}
            | {"varies": varies, "layers": "middle last"},
        }

    middle: Curve = lambda i: 0.1 * i * moved  # noqa: E731
    return made(
        count, more={"branches": branches}, first_moved=lambda i: 0.1 * i, middle_moved=middle, last_moved=middle
    )


# Too little for the other reasons: a probe that is above zero over the whole run only.
FEW: dict[str, Any] = {"probe": lambda i: 0.1 if i % 3 == 0 else 0.0}
STARVED: dict[str, Stats] = {
    "learns too slowly": run(probe=lambda i: 0.004 * i),
    "is not heard": run(missing=0.1, probe=0.3),
    "has hardly moved": run(moved=0.001, share=0.5),
    "has lost its gradient": run(grad=lambda i: 0.8**i),
    "comes in another unit": run(varies=lambda i: 1e-3, **FEW),
}
HEALTHY: dict[str, Stats] = {
    "noise": run(probe=0.0),
    "has said all it knows": run(),
    "is heard": run(probe=lambda i: 0.004 * i, share=0.6),
    "was late": run(probe=lambda i: 0.004 * i, share=lambda i: min(0.04 * i, 0.9)),
    "the leader lacks as much": run(missing=0.1, probe=0.3, lacks=0.1),
    "knows as much, pretrained": run(moved=0.001, probe=0.5, share=0.6),
    "gets no gradient at all": run(probe=lambda i: 0.004 * i, grad=lambda i: -0.01 * ((7 * i) % 5 - 2) / 2),
    "its probe is not sure": run(probe=lambda i: 0.03 + 0.2 * (-1) ** i, grad=lambda i: 0.8**i),
    "comes in another unit, but is noise": run(varies=lambda i: 1e-3, probe=lambda i: 0.01 * (-1) ** i),
    "comes in another unit, but is heard": run(varies=lambda i: 1e-3, share=0.6, **FEW),
    "its last layer started at zero": run(varies=lambda i: 1e-5 * 1.3**i, **FEW),
    "is somewhat fainter": run(varies=lambda i: 0.02, **FEW),
    "comes in another unit, too early": run(9, varies=lambda i: 1e-3, **FEW),
    "has a loss of its own": run(probe=lambda i: 0.004 * i, own=1),
    "too early": run(9, probe=lambda i: 0.004 * i),
    "no towers": made(25),
}


@pytest.mark.parametrize("name", STARVED)
def test_starved(name: str) -> None:
    [finding] = rule(STARVED[name])
    assert (finding.kind, finding.where, finding.severity) == ("starved_branch", "sound", "warning")
    assert set(finding.evidence) >= {"steps", "values", "sight", "sound"}
    assert "sight" in finding.remedy
    assert ("variance one" in finding.remedy) == ("unit" in name)


@pytest.mark.parametrize("name", HEALTHY)
def test_left_in_peace(name: str) -> None:
    assert rule(HEALTHY[name]) == []


def test_the_reason_is_told() -> None:
    words = ["still rises", "still gets wrong", "times less", "faded", "cannot be heard"]
    assert all(word in rule(stats)[0].message for word, stats in zip(words, STARVED.values(), strict=True))


def test_both_of_two_may_be_starved_beside_a_third() -> None:
    stats = run(probe=lambda i: 0.004 * i)
    for record in stats.records:
        record["branches"]["touch"] = dict(record["branches"]["sound"])
    assert [finding.where for finding in rule(stats)] == ["sound", "touch"]
