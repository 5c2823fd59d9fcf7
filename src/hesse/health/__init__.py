"""Does the gradient reach every layer? Watch a training run, and say where it does not and what to do."""

from hesse.health.guard import TrainingStopped
from hesse.health.monitor import HealthReport, Monitor, watch

__all__ = ["HealthReport", "Monitor", "TrainingStopped", "watch"]
