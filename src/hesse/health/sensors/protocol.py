"""What a sensor is: something that listens to one forward pass, rests during the backward and is then read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, Protocol

from torch import Tensor, nn

from hesse.health.sensors.functional import Calls
from hesse.health.stats import Layer

__all__ = ["Reading", "Section", "Sensor"]

Reading = dict[str, dict[str, Tensor | float | str | None]]
"""``{path: {key: value}}``: numbers, names, or tensors of at most one axis that are still on the device."""

Section = Literal["layers", "branches", "times", "ties"]


class Sensor(Protocol):
    """One thing that is measured. The monitor builds every class of ``SENSORS`` once, with one ``Calls`` for all.

    A sampled step is ``calls.listen()`` and ``sensor.listen()`` when the training pass begins, ``calls.rest()`` and
    ``sensor.rest()`` when it has ended, backward and optimiser's step, then ``sensor.read()``. A step may be listened
    to and never read (its batch was skipped): ``listen`` begins anew. A step may be read without having been listened
    to: what needs the forward is then absent from the reading.
    """

    section: ClassVar[Section]
    """The part of a record that the reading goes to."""

    def __init__(self, model: nn.Module, layers: Sequence[Layer], calls: Calls) -> None:
        """Subscribe to calls of modules (``calls.on_modules``) and of functions (``calls.on_functions``)."""

    def listen(self) -> None:
        """The forward pass begins: forget what was heard before."""

    def rest(self) -> None:
        """The forward pass has ended. Hooks on tensors may stay until the backward."""

    def read(self) -> Reading:
        """After the optimiser's step, gradients still in ``p.grad``: the numbers. Forgets all but what is counted."""

    def state_dict(self) -> dict[str, Any]:
        """What is counted from sample to sample, as a JSON object."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state``."""
