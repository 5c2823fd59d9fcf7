"""One visit for a model that does not train: are its derivatives right, do gradients reach every layer, is the step
one that the loss bears?

:func:`diagnose` asks the rooms that know: :mod:`hesse.check` on the first batch, :mod:`hesse.health` during a short
training, :mod:`hesse.curvature` for the sharpness before and after. What they find is put in order, the gravest
first, with what may only be its consequence below it.
"""

from hesse.doctor.diagnosis import Diagnosis, Entry
from hesse.doctor.visit import diagnose

__all__ = ["Diagnosis", "Entry", "diagnose"]
