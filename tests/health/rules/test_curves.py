"""The shared comparisons: order, the course of the loss, steady growth, thinned curves."""

from __future__ import annotations

import math

import pytest

from health_runs.records import written
from hesse.health.rules.curves import course, curve, growth, in_order, place, weighted


def test_order_is_that_of_calls_and_uncalled_layers_stay_beside_their_neighbours() -> None:
    stats = written({"0": {"order": 9}, "2": {"order": None}, "4": {"order": 1}, "6": {"order": 2}, "8": {"order": 3}})
    assert in_order(stats.records[0]) == ["4", "6", "8", "0", "2"]


def test_weighted_leaves_out_tables_and_what_has_no_matrix() -> None:
    stats = written({"1": {"dead": 0.0}}, types={"0": "Embedding"})
    stats.anatomy["4"]["params"] = {"weight": {"shape": [8], "dtype": "float32", "trainable": True}}
    assert weighted(stats, stats.records[0]) == ["2", "6", "8"]


def test_the_course_of_a_loss() -> None:
    assert course(written(samples=3)) is None
    flat = course(written(told=[1.0 + 0.1 * math.sin(7 * i) for i in range(60)]))
    assert flat is not None and flat.stuck and flat.halted and flat.idle and not flat.worse
    slow = course(written(told=[1.0 - 0.001 * i + 0.01 * math.sin(7 * i) for i in range(60)]))
    assert slow is not None and not slow.stuck and not slow.halted and not slow.idle
    floor = course(written(told=[1.0 + 9 * 0.7**i + 0.01 * math.sin(7 * i) for i in range(60)]))
    assert floor is not None and not floor.stuck and floor.halted and not floor.idle
    near = course(written(told=[1.0 + 0.1 * 0.7**i + 0.001 * math.sin(7 * i) for i in range(60)]))
    assert near is not None and not near.stuck and near.halted and near.idle
    smooth = course(written(told=[1.0 - 1e-3 * i for i in range(60)]))
    assert smooth is not None and not smooth.halted
    up = course(written(told=[1.0 + 0.1 * i for i in range(60)]))
    assert up is not None and up.stuck and up.worse


def test_growth_is_the_product_and_its_steadiness() -> None:
    assert growth([1.0, 0.5, 0.25]) == (pytest.approx(0.25), 1.0)
    assert growth([1.0, 4.0, 2.0]) == (pytest.approx(2.0), 0.5)
    assert growth([1.0, 1.0, 1e6, 1e6]) == (pytest.approx(1e6), pytest.approx(1 / 3))
    assert growth([1.0, 0.0]) is None and growth([1.0]) is None
    assert growth([1.0, 1.0]) == (1.0, 0.0)


def test_curves_are_thinned_and_keep_both_ends() -> None:
    found = curve(written({"0": {"grad_norm": lambda i: None if i == 3 else float(i)}}, samples=200), "0", "grad_norm")
    assert len(found["steps"]) == len(found["values"]) == 60
    assert (found["steps"][0], found["steps"][-1], found["values"][-1]) == (1, 1991, 199.0)


def test_place_of_a_module_and_of_a_function() -> None:
    stats = written({"3": {"dead": 0.0}})
    stats.anatomy |= {"2.relu": {"type": "relu", "after": "2"}, "Net.relu": {"type": "relu", "after": None}}
    assert [place(stats, path) for path in ("3", "2.relu", "Net.relu", "other")] == ["3", "2", "Net.relu", "other"]
