"""``hesse.watch`` beside a script of fixed thresholds: sick trainings, the same cured, healthy ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import median
from time import process_time
from typing import Any

import hesse
from benchmarks.faults.thresholds import Thresholds
from blind import trainings
from blind.runs import Run, alarms, judged, tail, trained
from health_runs import dynamics, dynamics_cases, flow

ASPECTS = ("found", "kind", "place", "time")


def main() -> None:
    """Print the table, and every miss and false alarm of hesse.watch by name."""
    print("### Trainings under watch\n")
    print(
        "| corpus | tool | found | right kind | right layer | in time | cured: clean | cured: trains "
        "| healthy flagged | median, s a training |\n|---|---|---|---|---|---|---|---|---|---|"
    )
    misses: list[str] = []
    for name, (sick, healthy) in _corpora().items():
        for tool, watch in {"hesse.watch": hesse.watch, "thresholds": Thresholds}.items():
            cells, told = _score(sick, healthy, watch)
            print(f"| {name} | {tool} | " + " | ".join(cells) + " |", flush=True)
            if tool == "hesse.watch":  # a script has too many
                misses += [f"- {name}, {line}" for line in told]
    print("\nWhat hesse.watch has not right, and what is said instead:\n")
    print("\n".join(misses) + "\n")


def _score(sick: Sequence[Run], healthy: Sequence[Run], watch: Callable[..., Any]) -> tuple[list[str], list[str]]:
    """The cells of a row of the table, and what is to be told below it."""
    wrong: dict[str, dict[str, Any]] = {}
    clean, trains, flagged, seconds = 0, 0, 0, []
    told = []
    for run in sick:
        began = process_time()
        monitor, _ = trained(run, watch)
        seconds.append(process_time() - began)
        wrong[run.name] = judged(run, monitor)
        if wrong[run.name]:
            told.append(f"{run.name}: {wrong[run.name]}, wanted {run.kinds}")
        monitor, losses = trained(run, watch, cured=True)
        trains += tail(losses) < run.goal
        clean += not alarms(monitor)
        if alarms(monitor):
            told.append(f"cured {run.name}: {_said(monitor)}")
    for run in healthy:
        monitor, losses = trained(run, watch)
        flagged += bool(alarms(monitor))
        if alarms(monitor):
            told.append(f"healthy {run.name}: {_said(monitor)}")
    right = [sum(not {"found", "kind"} & w.keys() and a not in w for w in wrong.values()) for a in ASPECTS[1:]]
    found = sum("found" not in w for w in wrong.values())
    cells = [f"{n}/{len(sick)}" for n in (found, *right, clean, trains)]
    return [*cells, f"{flagged}/{len(healthy)}", f"{median(seconds):.2f}"], told


def _said(monitor: Any) -> str:
    return "; ".join(f"{f.kind} at {f.where or 'loss'}, step {f.step}" for f in alarms(monitor)[:3])


def _corpora() -> dict[str, tuple[list[Run], list[Run]]]:
    cases = [*flow.CASES.items(), *dynamics_cases.CASES.items()]
    healthy = [*flow.HEALTHY.items(), *dynamics_cases.HEALTHY.items()]
    return {
        "development": (
            [_developed(name, case.run, case) for name, case in cases],
            [_developed(name, run) for name, run in healthy],
        ),
        "blind": (trainings.SICK, trainings.HEALTHY),
    }


def _developed(name: str, run: dynamics.Run, case: dynamics.Case | None = None) -> Run:
    """A training of the development corpus as one of the blind corpus: losses in units of the goal."""

    def train(watch: Any, cured: bool) -> list[float]:
        chosen = case.cured if case is not None and cured else run
        _, losses = dynamics.train(chosen, watch=watch)
        return [loss / losses[0] / chosen.gain for loss in losses]

    train.__name__ = name
    made = Run(train, 1.0)
    if case is None:
        return made
    return replace(made, kinds=case.kind, where=" ".join(case.where), latest=case.by, quiet=case.kind)
