"""One run of one optimiser on one task, and the search for a peer's learning rate, which is runs only.

The clock counts steps and nothing else: drawing a batch and evaluating are outside. Wall time and processor time of the
process are kept side by side, as the first alone lies on a machine with other guests.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import Any

import hesse
from benchmarks.training.entrants import Entrant, rates, state_bytes
from benchmarks.training.tasks import Task

__all__ = ["RATES", "Run", "load_rates", "race", "search"]

RATES = Path(__file__).with_name("rates.json")
POINTS = 150  # of a trace, at most


@dataclass
class Run:
    """What one run shows; ``steps`` and ``seconds`` to the target are None where it was not reached."""

    task: str
    entrant: str
    seed: int
    rate: float | None
    steps: int | None = None
    seconds: float | None = None
    cpu: float | None = None
    taken: int = 0
    total_seconds: float = 0.0
    total_cpu: float = 0.0
    best: float = math.inf
    last: float = math.inf
    final_steps: int | None = None  # to the final accuracy, where the task has one
    state: float = 0.0  # multiples of the parameters' bytes
    refused: str | None = None
    trace: list[tuple[int, float, float]] = field(default_factory=list)  # step, seconds, number

    def record(self) -> dict[str, Any]:
        stride = max(1, math.ceil(len(self.trace) / POINTS))
        thin = self.trace[::stride] + ([self.trace[-1]] if (len(self.trace) - 1) % stride else [])
        return asdict(self) | {"trace": [(k, round(s, 4), float(f"{v:.4g}")) for k, s, v in thin]}


def race(
    task: Task,
    entrant: Entrant,
    seed: int,
    rate: float | None,
    budget: int | None = None,
    limit: float = math.inf,
    to_target: bool = False,
) -> Run:
    """Train until the target (or the task's final accuracy), the budget, ``limit`` processor seconds or a NaN."""
    run = Run(task.name, entrant.name, seed, rate)
    problem = task.make(seed)
    batches = problem.batches()
    aim = task.target if task.final is None or to_target else task.final
    below: tuple[tuple[int, float, float], ...] = ()  # the last evaluations, as long as they are below the target
    try:
        optimizer = entrant.make(problem.model, rate if rate is not None else math.nan)
        for step in range(1, (budget or task.budget) + 1):
            batch = next(batches)
            wall, cpu = perf_counter(), process_time()
            optimizer.step(hesse.closure(problem.model, problem.loss_fn, batch))
            run.total_seconds += perf_counter() - wall
            run.total_cpu += process_time() - cpu
            run.taken = step
            if step % task.every:
                continue
            run.last = problem.evaluate()
            run.trace.append((step, run.total_seconds, run.last))
            run.best = min(run.best, run.last)
            below = (*below, (step, run.total_seconds, run.total_cpu)) if run.last <= task.target else ()
            if run.steps is None and len(below) == task.hold:
                run.steps, run.seconds, run.cpu = below[0]
            if run.steps is not None and run.last <= aim:
                run.final_steps = step if task.final is not None and run.last <= task.final else None
                break
            if not math.isfinite(run.last) or run.total_cpu > limit:
                break
        weights = sum(p.numel() * p.element_size() for p in problem.model.parameters())
        run.state = state_bytes(optimizer) / weights
    except Exception as error:  # noqa: BLE001 - an optimiser may refuse in any way; its reason is printed in the table
        run.refused = f"{type(error).__name__}: {error}"[:200]
    return run


def search(task: Task, entrant: Entrant, seeds: tuple[int, ...], limit: float) -> dict[str, Any]:
    """The best of the entrant's rates, in steps to the target.

    All run a quarter of the budget on the first seed, and one more beyond where the best lies at an end. In the order
    of their numbers they run in full there, until two have or one gets to the target; where two are close, the other
    seeds decide.

    Returns:
        ``rate``, ``steps`` by seed as far as they ran, ``tried``: rate to steps on the first seed, or to the best
        number as a text.
    """
    ladder = list(rates(entrant, task))
    heats = {rate: race(task, entrant, seeds[0], rate, task.budget // 4, limit, True) for rate in ladder}
    ranked = sorted(heats, key=lambda rate: (heats[rate].steps or math.inf, heats[rate].best))
    further = {ladder[0]: ladder[0] ** 2 / ladder[1], ladder[-1]: ladder[-1] ** 2 / ladder[-2]}.get(ranked[0])
    if further is not None:
        beyond = float(f"{further:.3g}")
        heats[beyond] = race(task, entrant, seeds[0], beyond, task.budget // 4, limit, True)
        ranked = sorted(heats, key=lambda rate: (heats[rate].steps or math.inf, heats[rate].best))
    runs, budget, leading = dict(heats), task.budget, ranked[:0]
    for rate in ranked:
        if len(leading) >= 2 and any(runs[other].steps for other in leading):
            break
        leading = [*leading, rate]
        if heats[rate].steps is None:
            runs[rate] = race(task, entrant, seeds[0], rate, budget, limit, to_target=True)
        if runs[rate].steps is not None:
            budget = min(budget, math.ceil(1.3 * runs[rate].steps) + task.every * task.hold)
        if not math.isfinite(heats[rate].last):
            break
    there = sorted(runs[rate].steps for rate in leading if runs[rate].steps is not None)
    close = [rate for rate in leading if there and (runs[rate].steps or math.inf) <= 1.3 * there[0]]
    close = close or [min(leading, key=lambda rate: runs[rate].best)]
    by_seed = {rate: [runs[rate].steps] for rate in close}
    if len(close) > 1:
        for rate in close:
            more = [race(task, entrant, seed, rate, limit=limit, to_target=True).steps for seed in seeds[1:]]
            by_seed[rate] += more
    best = min(close, key=lambda rate: _score(by_seed[rate]))
    tried = {f"{rate:g}": run.steps or run.refused or f"{run.best:.3g}" for rate, run in runs.items()}
    return {"rate": best, "steps": by_seed[best], "tried": tried}


def _score(steps: list[int | None]) -> tuple[int, float]:
    return sum(s is None for s in steps), median(s if s is not None else math.inf for s in steps)


def load_rates() -> dict[str, dict[str, dict[str, Any]]]:
    return json.loads(RATES.read_text(encoding="utf-8")) if RATES.is_file() else {}
