"""A method is a search times a descent.

The descent makes a quadratic model of the function at a point: gradient descent, Newton, BFGS. The search says how far
to go by it: a fixed step, a line search, a trust region, a cube. Any search goes with any descent that has what it asks
for; the names of SciPy are pairs of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from hesse.minimizers.functions.function import Point
from hesse.minimizers.models.dense import Model
from hesse.tree import Params

__all__ = ["ROUNDING", "Advance", "Descent", "Method", "Search"]

# A value is a sum of many terms: its rounding is a few units in the last place, seldom one.
ROUNDING = 4.0


class Descent(Protocol):
    """How the curvature is known."""

    def begin(self, point: Point) -> Params:
        """What is remembered from the start on."""

    def model(self, point: Point, memory: Params) -> Model:
        """The quadratic model at ``point``."""

    def update(self, memory: Params, old: Point, new: Point) -> Params:
        """What is remembered after a step."""


class Advance(NamedTuple):
    """What a search found.

    Args:
        point: where it went, or None if no step lowers the function.
        memory: the search's own numbers for the next round.
        size: radius or step size.
        trust_ratio: actual over predicted decrease.
    """

    point: Point | None
    memory: Params
    size: float
    trust_ratio: float = math.nan


class Search(Protocol):
    """How far to go."""

    def advance(self, point: Point, model: Model, memory: Params) -> Advance:
        """A lower point along what ``model`` proposes."""


@dataclass(frozen=True)
class Method:
    """A search times a descent, under the name that users know it by."""

    name: str
    descent: Descent
    search: Search
