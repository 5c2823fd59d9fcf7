"""What the statistics of a run mean: each rule reads them and returns findings, or none.

Absolute thresholds cry wolf: a small gradient is a fault in one net and convergence in the next. So every
rule compares a layer with its own weights, with its own past or with the other layers, all of which shrink
together when training goes well. Where nothing can be compared yet, in the first samples, no rule speaks.
"""

from __future__ import annotations

from collections.abc import Callable

from hesse.finding import Finding
from hesse.health.rules.bad_init import bad_init
from hesse.health.rules.curvature import curvature
from hesse.health.rules.curves import PATIENCE, WINDOW
from hesse.health.rules.dead_units import dead_units
from hesse.health.rules.exploding import exploding
from hesse.health.rules.learning_rate_too_large import learning_rate_too_large
from hesse.health.rules.loss_spike import loss_spike
from hesse.health.rules.no_gradient import no_gradient
from hesse.health.rules.non_finite import non_finite
from hesse.health.rules.notes import NOTES
from hesse.health.rules.plateau import plateau
from hesse.health.rules.saturation import saturation
from hesse.health.rules.stagnant_update import stagnant_update
from hesse.health.rules.starved_branch import starved_branch
from hesse.health.rules.symmetry import symmetry
from hesse.health.rules.tied_imbalance import tied_imbalance
from hesse.health.rules.underflow import underflow
from hesse.health.rules.update_too_small import update_too_small
from hesse.health.rules.vanishing import vanishing
from hesse.health.rules.vanishing_through_time import vanishing_through_time
from hesse.health.stats import Stats

__all__ = [
    "NOTES",
    "PATIENCE",
    "RULES",
    "WINDOW",
    "bad_init",
    "curvature",
    "dead_units",
    "exploding",
    "learning_rate_too_large",
    "loss_spike",
    "no_gradient",
    "non_finite",
    "plateau",
    "saturation",
    "stagnant_update",
    "starved_branch",
    "symmetry",
    "tied_imbalance",
    "underflow",
    "update_too_small",
    "vanishing",
    "vanishing_through_time",
]

RULES: tuple[Callable[[Stats], list[Finding]], ...] = (
    non_finite,
    bad_init,
    symmetry,
    dead_units,
    saturation,
    exploding,
    vanishing,
    vanishing_through_time,
    no_gradient,
    underflow,
    stagnant_update,
    learning_rate_too_large,
    update_too_small,
    loss_spike,
    starved_branch,
    tied_imbalance,
    curvature,
    plateau,
)
