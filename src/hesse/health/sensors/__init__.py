"""What is seen of a network while it works: each sensor measures one thing during a sampled step.

Norms of weights and gradients are read after a step; how alive the units are, how sharp the attention, what passes
through time or through a branch can only be seen while the network runs. Hooks on every module and a
``TorchFunctionMode`` would cost too much at every step, so they are there during one forward pass of a sampled step
and gone before the backward. What a sensor keeps is small, detached and forgotten when it has been read.
"""

from __future__ import annotations

from hesse.health.sensors.activations import Activations
from hesse.health.sensors.attention import Attention
from hesse.health.sensors.branches import Branches
from hesse.health.sensors.functional import Call, Calls
from hesse.health.sensors.protocol import Reading, Section, Sensor
from hesse.health.sensors.recurrence import Recurrence
from hesse.health.sensors.symmetry import Symmetry
from hesse.health.sensors.ties import Ties

__all__ = ["SENSORS", "Call", "Calls", "Reading", "Section", "Sensor"]

SENSORS: tuple[type[Sensor], ...] = (Activations, Attention, Symmetry, Ties, Branches, Recurrence)
