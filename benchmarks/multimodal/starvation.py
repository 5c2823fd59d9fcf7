"""Does the monitor say in time that a modality starves? A short run beside the race, under ``hesse.watch``.

Every fifth step is sampled, so that a run says the same each time; by default the number of samples obeys the clock.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import hesse
from benchmarks.multimodal.entrants import Entrant
from benchmarks.multimodal.race import Runner
from benchmarks.multimodal.tasks import Task

__all__ = ["EPOCHS", "EVERY", "watched"]

EPOCHS = 4
EVERY = 5  # steps


def watched(task: Task, entrants: Sequence[Entrant], seed: int) -> Iterator[dict[str, Any]]:
    """For each entrant the findings of :data:`EPOCHS` epochs: in which (from 1), what, where, and what is said."""
    data = task.load(seed)
    for entrant in entrants:
        runner = Runner(task, data, entrant, seed)
        found = []
        with hesse.watch(runner.cure, runner.optimizer, every=EVERY, guard=None) as monitor:
            for epoch in range(1, EPOCHS + 1):
                runner.epoch()
                found += [(epoch, f.kind, f.where, f.message) for f in monitor.new_findings()]
        yield {
            "kind": "watch",
            "task": task.name,
            "optimizer": entrant.optimizer,
            "cure": entrant.cure,
            "seed": seed,
            "samples": len(monitor.records),
            "findings": found,
        }
