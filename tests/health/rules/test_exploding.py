"""Growth through depth, through time and in training, and the jumps of healthy runs."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from health_runs.records import CHAIN, spike, written
from hesse.health.rules import exploding


def test_gradients_that_grow_on_their_way_back() -> None:
    [finding] = exploding(written({path: {"grad_norm": 10.0**-i} for i, path in enumerate(CHAIN)}, samples=2))
    assert (finding.kind, finding.where, finding.severity) == ("exploding", "0", "error")
    assert finding.value == pytest.approx(1e4) and "factor of 10 a layer" in finding.message


def test_a_signal_that_grows_on_its_way_forward() -> None:
    [finding] = exploding(written({path: {"in_rms": 10.0**i} for i, path in enumerate(CHAIN)}, samples=2))
    assert finding.where == "0" and finding.evidence["profile"]["8"] == pytest.approx(1e4)


def test_gradients_that_grow_on_their_way_back_through_time() -> None:
    growing = [1.5 ** (19 - i) for i in range(20)]
    [finding] = exploding(written(times={"rnn": growing}))
    assert (finding.where, finding.severity) == ("rnn", "error") and finding.value == pytest.approx(1.5**19)
    assert exploding(written(times={"rnn": growing}, samples=1)) == []  # once may be chance
    [finding] = exploding(written(times={"rnn": [3.0 ** (19 - i) for i in range(20)]}, samples=1))  # this is not
    assert finding.where == "rnn"


def risen(height: float, since: int = 8) -> Callable[[int], float]:
    return lambda i: height if i >= since else 1.0


def test_a_gradient_that_grows_in_training_with_a_loss_worse_than_at_the_start() -> None:
    [finding] = exploding(written({"2": {"grad_norm": risen(1e3)}}, loss=risen(5.0)))
    assert (finding.where, finding.limit, finding.value) == ("2", 30.0, pytest.approx(1e3))
    assert finding.evidence["values"][-3:] == [1.0, 1e3, 1e3]
    [finding] = exploding(written({"2": {"grad_norm": risen(1e5)}}, loss=None))
    assert (finding.where, finding.limit) == ("2", 1e3)


HEALTHY = {
    "like layers": written(),
    "a spike while the loss is good": written({"0": {"grad_norm": risen(1e4)}}, loss=lambda i: 1 / (i + 1)),
    "loss worse, gradients as ever": written(loss=lambda i: 1.0 + i),
    "steps too long, which have their own name": written({"0": {"update_ratio": 3.0}}, loss=2.0),
    "a gradient that a step too long has thrown": written(
        {"2": {"grad_norm": risen(1e3), "update_ratio": spike(0.5, 7)}}, loss=risen(5.0)
    ),
    "one odd batch": written({"2": {"grad_norm": spike(1e3)}}, loss=risen(5.0)),
    "a negative loss": written({"0": {"grad_norm": risen(100.0)}}, loss=lambda i: -1.0 - i),
    "no loss told": written({"0": {"grad_norm": risen(50.0)}}, loss=None),
    "one layer far beyond the others": written({"0": {"grad_norm": 1e5}}),
    "growth that is put right on the way": written({path: {"in_rms": 30.0 ** (i % 2)} for i, path in enumerate(CHAIN)}),
    "a loss that is no number": written({"0": {"grad_norm": math.nan}}, loss=math.nan),
    "time that fades": written(times={"rnn": [1.5**i for i in range(20)]}),
    "time that wavers": written(times={"rnn": [1e4 if i % 2 else 1.0 for i in range(20)]}),
}


@pytest.mark.parametrize("name", HEALTHY)
def test_healthy_growth(name: str) -> None:
    assert exploding(HEALTHY[name]) == []
