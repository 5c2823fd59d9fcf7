"""All cases of the blind corpus of ``hesse.check``."""

from __future__ import annotations

from blind import (
    faults_around,
    faults_elements,
    faults_losses,
    faults_memory,
    faults_numbers,
    faults_second,
    faults_stops,
    faults_tables,
)
from blind.healthy_models import HEALTHY

__all__ = ["FAULTS", "HEALTHY"]

FAULTS = [
    *faults_losses.FAULTS,
    *faults_tables.FAULTS,
    *faults_stops.FAULTS,
    *faults_memory.FAULTS,
    *faults_around.FAULTS,
    *faults_second.FAULTS,
    *faults_numbers.FAULTS,
    *faults_elements.FAULTS,
]
