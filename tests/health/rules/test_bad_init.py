"""First samples that lose the signal, and starts that are odd on purpose."""

from __future__ import annotations

from typing import Any

import pytest

from health_runs.records import CHAIN, written
from hesse.health.rules import bad_init
from hesse.health.stats import Stats


@pytest.mark.parametrize("factor", [0.1, 10.0], ids=["shrinks", "grows"])
def test_a_steady_factor_a_layer(factor: float) -> None:
    [finding] = bad_init(written({path: {"in_rms": factor**i} for i, path in enumerate(CHAIN)}, samples=1))
    assert (finding.kind, finding.where, finding.step) == ("bad_init", "0", 1)
    assert finding.value == pytest.approx(factor**4)
    assert ("shrinks" if factor < 1 else "grows") in finding.message
    assert finding.evidence["profile"]["4"] == pytest.approx(factor**2)


def test_outputs_that_are_the_same_for_every_example() -> None:
    [finding] = bad_init(written({path: {"spread": 1e-6} for path in ("4", "6", "8")}, samples=1))
    assert finding.where == "4" and finding.evidence["profile"]["2"] == 0.8


def test_a_head_so_large_that_the_loss_is_about_its_outputs() -> None:
    [finding] = bad_init(written({"8": {"out_rms": 40.0}}, samples=1, loss=60.0))  # logits
    assert finding.where == "8" and finding.value == pytest.approx(40.0)
    [finding] = bad_init(written({"8": {"out_rms": 40.0}}, samples=1, loss=1600.0))  # squares
    assert finding.where == "8"
    for loss in (1.0, 1e6):  # the targets explain it
        assert bad_init(written({"8": {"out_rms": 40.0}}, samples=1, loss=loss)) == []


DEPTH = [f"{i:02d}" for i in range(16)]


def gentle(factor: float = 1.3, out: float = 60.0, slope: float = 0.03, **more: Any) -> Stats:
    """Sixteen layers in blocks of two, the second of which keeps the scale; the loss is about the outputs."""
    sizes = {path: {"in_rms": factor ** (2 * (i // 2))} for i, path in enumerate(DEPTH)}
    sizes["15"] |= {"out_rms": out, "out_grad_rms": slope / 8**0.5}
    return written(sizes, chain=DEPTH, **{"samples": 3, "loss": 60.0, "told": [60.0, 50.0, 20.0], **more})


def test_a_gentle_factor_over_a_great_depth_and_a_loss_about_it() -> None:
    [finding] = bad_init(gentle())
    assert finding.where == "00" and finding.value == pytest.approx(1.3**14)
    assert "residual" in finding.remedy and "60" in finding.message


def test_a_head_that_starts_at_zero_hides_it_for_a_step_only() -> None:
    stats = gentle(out=0.0)
    assert bad_init(stats) == []
    stats.records[1]["layers"]["15"]["out_rms"] = 60.0
    assert [finding.where for finding in bad_init(stats)] == ["00"]


HEALTHY = {
    "a gentle factor, and targets that are as large": gentle(loss=4.0),
    "a gentle factor, and a loss that is settled": gentle(told=[60.0, 55.0, 65.0]),
    "a factor that comes to little": gentle(1.05, out=8.0, loss=8.0),
    "a factor that comes from one place": written(
        {path: {"in_rms": 1.0 if i < 8 else 100.0} for i, path in enumerate(DEPTH)}
        | {"15": {"in_rms": 100.0, "out_rms": 60.0, "out_grad_rms": 0.01}},
        chain=DEPTH,
        samples=3,
        loss=60.0,
        told=[60.0, 50.0, 20.0],
    ),
    "squared errors far below the outputs they correct": gentle(
        out=110.0, loss=600.0, told=[600.0, 100.0, 60.0], slope=50.0 / 32
    ),
    "nothing yet": written(samples=0),
    "like layers": written(samples=1),
    "one narrow place": written({"4": {"in_rms": 1e-4}}, samples=1),
    "a zero head": written({"8": {"out_rms": 0.0, "spread": 0.0}}, samples=1),
    "zero blocks": written({"4": {"out_rms": 0.0, "spread": 0.0}, "8": {"out_rms": 0.0, "spread": 0.0}}, samples=1),
    "a last block that starts at zero": written({"6": {"out_rms": 0.0, "spread": 0.0}}, samples=1),
    "a side branch that is constant at first": written({"4": {"spread": 1e-9}}, samples=1),
    "a head that starts at the mean of far targets": written({"8": {"spread": 1e-4, "out_rms": 100.0}}, samples=1),
    "far targets": written(samples=1, loss=1e6),
    "long after the start": written({path: {"in_rms": 10.0**i} for i, path in enumerate(CHAIN)}, samples=9),
    "units that are saturated, which has its own name": written(
        {"3": {"saturated": 1.0}, **{path: {"spread": 1e-6} for path in ("4", "6", "8")}}, samples=1
    ),
    "units that are dead, likewise": written(
        {"4": {"in_rms": 0.0, "spread": 1e-6}, "6": {"spread": 1e-6}, "8": {"spread": 1e-6}}, samples=1
    ),
    "a blocked gradient, likewise": written(
        {"0": {"grad_norm": 1e-9}, **{path: {"spread": 1e-6} for path in ("4", "6", "8")}}, samples=1
    ),
    "a fading gradient, which has its own name": written(
        {path: {"grad_norm": 0.2 ** (4 - i), "spread": 0.05**i} for i, path in enumerate(CHAIN)}, samples=1
    ),
}


@pytest.mark.parametrize("name", HEALTHY)
def test_healthy_starts(name: str) -> None:
    assert bad_init(HEALTHY[name]) == []
