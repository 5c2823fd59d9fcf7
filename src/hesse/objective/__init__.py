"""What is minimised: the loss of a model on one batch, as a closure and as a pure function of the parameters."""

from hesse.objective.closure import Closure, closure
from hesse.objective.function import Objective

__all__ = ["Closure", "Objective", "closure"]
