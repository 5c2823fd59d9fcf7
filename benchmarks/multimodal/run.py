"""``python -m benchmarks multimodal``: optimisers and cures where one modality starves another, and where none does.

Results are written line by line as each task and seed ends. Called again with the same ``--out``, what is in the file
is not run again; ``--report`` prints and draws from it and runs nothing. ``--search`` tries the learning rates.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.multimodal import report, starvation
from benchmarks.multimodal.entrants import CURES, OPTIMIZERS, PLAN, RATES, TRIED, WATCHED, Entrant
from benchmarks.multimodal.race import Result, race
from benchmarks.multimodal.tasks import TASKS, Task

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the options, run, print the tables, draw the figures."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks multimodal", description=__doc__)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), metavar="TASK", help=", ".join(TASKS))
    parser.add_argument("--rows", nargs="+", metavar="NAME", help="such as KFAC or AdamW+PMR; by default the table's")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--search", nargs="?", type=int, const=3, help="try the learning rates on this seed and stop")
    parser.add_argument("--out", type=Path, default=Path("runs") / "multimodal.jsonl", help="raw results, a run a line")
    parser.add_argument("--report", type=Path, nargs="+", help="print tables and draw from such files; runs nothing")
    parser.add_argument("--figures", type=Path, default=report.FIGURES, help="folder; by default %(default)s")
    options = parser.parse_args(argv)
    if options.report:
        return _show([line for path in options.report for line in _lines(path)], options.figures)
    torch.set_num_threads(1)  # one clock for all: processor time
    tasks = [TASKS[name] for name in options.tasks]
    for task in tasks:
        if (reason := task.missing()) is not None:
            print(f"multimodal: {task.name} skipped, {reason}\n")
    tasks = [task for task in tasks if task.missing() is None]
    if options.search is not None:
        return _search(tasks, options.search)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for seed in options.seeds:
        for task in tasks:
            _run(task, seed, options.rows, options.out)
    return _show(_lines(options.out) if options.out.exists() else [], options.figures)


def _run(task: Task, seed: int, rows: Sequence[str] | None, out: Path) -> None:
    done = {_key(line) for line in (_lines(out) if out.exists() else [])}
    names = PLAN[task.name] if rows is None else [tuple(row.replace(" ", "").partition("+")[::2]) for row in rows]
    entrants = [_entrant(task, optimizer, cure or "none") for optimizer, cure in names]
    entrants = [e for e in entrants if (task.name, e.optimizer, e.cure, seed) not in done]
    pacemaker = _entrant(task, "AdamW", "none")
    entrants = [e for e in entrants if e != pacemaker]
    paced = (task.name, "AdamW", "none", seed) in done
    if entrants or not paced:
        for result in race(task, pacemaker, entrants, seed):
            if not (paced and result.optimizer == "AdamW" and result.cure == "none"):
                _write(out, {"kind": "run"} | asdict(result))
                report.progress(result)
    if (task.name, "watch", seed) not in done:
        for line in starvation.watched(task, [_entrant(task, name, "none") for name in WATCHED], seed):
            _write(out, line)


def _entrant(task: Task, optimizer: str, cure: str) -> Entrant:
    if optimizer not in OPTIMIZERS or cure not in CURES:
        known = f"{', '.join(OPTIMIZERS)}; {', '.join(CURES)}"
        raise SystemExit(f"There is no entrant {optimizer}+{cure}. There are {known}.")
    return Entrant(optimizer, cure, RATES.get(task.name, {}).get(optimizer, float("nan")))


def _search(tasks: list[Task], seed: int) -> None:
    """Each rate for AdamW's ten epochs; the best by validation accuracy is for a reader to put into ``RATES``."""
    for task in tasks:
        entrants = [Entrant(name, "none", rate) for name, rates in TRIED.items() for rate in rates]
        pacemaker = next(e for e in entrants if e.optimizer == "AdamW")
        results = race(task, pacemaker, [e for e in entrants if e != pacemaker], seed)
        for name in TRIED:
            found = {r.rate: r.trace[r.chosen][1:3] for r in results if r.optimizer == name}
            best = max(found, key=lambda rate: found[rate][0])
            told = ", ".join(f"{rate}: {a:.1%} ({loss:.3f})" for rate, (a, loss) in sorted(found.items()))
            print(f"{task.name} {name}: best {best} of {told}", flush=True)


def _write(path: Path, line: dict[str, object]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def _lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _key(line: dict[str, object]) -> tuple[object, ...]:
    if line["kind"] == "watch":
        return line["task"], "watch", line["seed"]
    return line["task"], line["optimizer"], line["cure"], line["seed"]


def _show(lines: list[dict[str, object]], figures: Path) -> None:
    runs = [Result(**{k: v for k, v in line.items() if k != "kind"}) for line in lines if line["kind"] == "run"]
    report.overview(runs)
    report.alarms([line for line in lines if line["kind"] == "watch"])
    report.tables(runs)
    report.draw(runs, figures)
