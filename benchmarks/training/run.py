"""``python -m benchmarks training``: optimisers by default constructor against tuned peers, to a target.

The runs of a seed follow one another, so that a slow minute of the machine hits all of them. Peers' learning rates come
from ``rates.json``; ``--search`` finds them anew.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.training import report
from benchmarks.training.entrants import OURS, PEERS, Entrant, reason_absent
from benchmarks.training.race import RATES, Run, load_rates, race, search
from benchmarks.training.tasks import TASKS, Task, available

__all__ = ["main"]

ENTRANTS = {**PEERS, **OURS}


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the options, run, print the tables, draw the figure."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks training", description=__doc__)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), metavar="TASK", help=", ".join(TASKS))
    parser.add_argument(
        "--optimizers", nargs="+", choices=ENTRANTS, default=list(ENTRANTS), metavar="NAME", help=", ".join(ENTRANTS)
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--limit", type=float, default=60.0, help="processor seconds of a run at most")
    parser.add_argument("--search", action="store_true", help="search the peers' learning rates; prints no table")
    parser.add_argument(
        "--json", type=Path, default=os.environ.get("HESSE_TRAINING_JSON"), help="file for the raw results of all runs"
    )
    parser.add_argument("--report", type=Path, nargs="+", help="print tables and draw from such files; runs nothing")
    parser.add_argument("--figure", type=Path, default=report.FIGURE, help="where to draw; by default %(default)s")
    options = parser.parse_args(argv)
    if options.report:
        saved = [row for path in options.report for row in json.loads(path.read_text(encoding="utf-8"))]
        return _show([Run(**row) for row in saved], options.figure)
    if not available():
        print("training: skipped, no data (set HESSE_DATA to the folder with mnist/, fsdd/ and tinyshakespeare/)\n")
        return None
    tasks = [TASKS[name] for name in options.tasks]
    entrants = _present([ENTRANTS[name] for name in options.optimizers])
    if options.search:
        return _search(tasks, entrants, tuple(options.seeds), options.limit)
    runs = _races(tasks, entrants, options.seeds, options.limit, options.json)
    return _show(runs, options.figure)


def _races(tasks: list[Task], entrants: list[Entrant], seeds: list[int], limit: float, path: Path | None) -> list[Run]:
    runs: list[Run] = []
    for task in tasks:
        racing, found = [e for e in entrants if e.runs(task)], load_rates().get(task.name, {})
        unknown = [e.name for e in racing if e.rates and e.name not in found]
        if unknown:
            print(f"{task.name}: no rate in {RATES.name} for {', '.join(unknown)}; run --search. Left out.\n")
        racing = [e for e in racing if e.name not in unknown]
        rates = {e.name: found[e.name]["rate"] if e.rates else None for e in racing}
        for entrant in racing:  # what is loaded or compiled at a first step is no optimiser's cost
            race(task, entrant, seeds[0], rates[entrant.name], budget=2)
        for seed in seeds:
            for entrant in racing:
                runs.append(race(task, entrant, seed, rates[entrant.name], limit=limit))
                report.progress(runs[-1])
        if path is not None:
            path.write_text(json.dumps([run.record() for run in runs]), encoding="utf-8")
    return runs


def _search(tasks: list[Task], entrants: list[Entrant], seeds: tuple[int, ...], limit: float) -> None:
    for task in tasks:
        for entrant in entrants:
            if not entrant.rates or not entrant.runs(task):
                continue
            found = search(task, entrant, seeds, limit)
            print(f"{task.name} {entrant.name}: {found}", flush=True)
            kept = load_rates()
            kept.setdefault(task.name, {})[entrant.name] = found
            RATES.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def _present(entrants: list[Entrant]) -> list[Entrant]:
    present = []
    for entrant in entrants:
        reason = reason_absent(entrant)
        if reason is None:
            present.append(entrant)
        else:
            print(f"{entrant.name}: left out, {reason}")
    return present


def _show(runs: list[Run], figure: Path) -> None:
    print(f"\n{torch.get_num_threads()} threads\n")
    report.tables(runs)
    report.draw(runs, figure)


if __name__ == "__main__":
    main()
