"""``python -m benchmarks minimize``: problems times solvers in one interleaved run; tables in Markdown.

On every problem the solvers follow one another, so that a slow minute of the machine hits all of them. Counts do not
vary from run to run; processor times are medians over ``--repeats``.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import TextIO

import torch

from benchmarks.minimize import edges, hessians, logistic, report
from benchmarks.minimize.peers import LEAST, OURS, PEERS, SECONDS, STOCK, Outcome, Solver, reason_absent
from benchmarks.minimize.peers import run as solve
from benchmarks.minimize.problems import Problem, suite, verdict
from benchmarks.minimize.report import Run

__all__ = ["main"]

PARTS = ("suite", "least", "edges", "hessians", "logistic")


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the options, run, print the tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks minimize", description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--problems", nargs="+", choices=suite(), metavar="NAME", help="all by default")
    parser.add_argument("--solvers", nargs="+", metavar="TEXT", help="only those whose name contains one of these")
    parser.add_argument("--repeats", type=int, default=1, help="of the suite, for the processor times")
    parser.add_argument("--limit", type=float, default=SECONDS, help="processor seconds of a solver on a problem")
    parser.add_argument("--json", type=Path, help="file for the raw results of the suite")
    parser.add_argument("--markdown", type=Path, help="file for the tables, besides the screen")
    parser.add_argument("--report", type=Path, nargs="+", help="print the suite's tables from such files; runs nothing")
    options = parser.parse_args(argv)
    if options.markdown is None:
        return _parts(options)
    with options.markdown.open("w", encoding="utf-8") as file, contextlib.redirect_stdout(_Both(sys.stdout, file)):
        return _parts(options)


class _Both(io.TextIOBase):
    """What is written goes to the screen and into a file."""

    def __init__(self, *files: TextIO) -> None:
        self.files = files

    def write(self, text: str) -> int:
        for file in self.files:
            file.write(text)
            file.flush()
        return len(text)


def _parts(options: argparse.Namespace) -> None:
    if options.report:
        saved = [Run(**row) for path in options.report for row in json.loads(path.read_text(encoding="utf-8"))]
        return _tables(saved, "hesse auto")
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {torch.get_num_threads()} threads\n")
    problems = [suite()[name] for name in options.problems or suite()]
    if "suite" in options.parts:
        runs = _race(problems, _chosen({**OURS, **PEERS}, options.solvers), options, options.json)
        _tables(runs, "hesse auto")
    if "least" in options.parts:
        print("### Least squares, given the residuals\n")
        least = [p for p in problems if p.residual is not None]
        _tables(_race(least, _chosen(LEAST, options.solvers), options), "hesse.least_squares lm")
    if "edges" in options.parts:
        print("### Edge cases: is what the solver says honest?\n")
        print(report.edges(edges.judge(_chosen({**OURS, **STOCK}, options.solvers), options.limit)))
    if "hessians" in options.parts:
        hessians.main()
    if "logistic" in options.parts:
        logistic.main()
    return None


def _chosen(solvers: dict[str, Solver], texts: list[str] | None) -> list[Solver]:
    chosen = []
    for solver in solvers.values():
        if texts and not any(text in solver.name for text in texts):
            continue
        reason = reason_absent(solver)
        if reason is None:
            chosen.append(solver)
        else:
            print(f"{solver.name}: left out, {reason}")
    print()
    return chosen


def _race(
    problems: list[Problem], solvers: list[Solver], options: argparse.Namespace, path: Path | None = None
) -> list[Run]:
    for solver in solvers:  # what is loaded or compiled at a first call is no solver's cost
        solve(solver, suite()["rosenbrock"], options.limit)
    runs: list[Run] = []
    for problem in problems:
        rows: dict[str, Run] = {}
        for _ in range(options.repeats):
            for solver in solvers:
                out = solve(solver, problem, options.limit)
                if solver.name in rows:
                    rows[solver.name].seconds.append(out.seconds)
                else:
                    rows[solver.name] = _judged(problem, solver, out, options.limit)
        runs += rows.values()
        good = [run for run in rows.values() if run.solved]
        least = min((run.total for run in good), default=0)
        print(f"{problem.name}: {len(good)} of {len(rows)} solve it, best {least}", file=sys.stderr, flush=True)
        if path is not None:
            path.write_text(json.dumps([dataclasses.asdict(run) for run in runs]), encoding="utf-8")
    return runs


def _judged(problem: Problem, solver: Solver, out: Outcome, limit: float) -> Run:
    found = verdict(problem, out.x) if out.x is not None else ""
    late = out.seconds > limit or out.error.startswith("OutOfTime")
    counts = {name: getattr(out, name) for name in ("nfev", "njev", "nhev", "nhvp")}
    return Run(
        problem.name, solver.name, found, out.success, late, out.message, out.error, out.fun, out.nit, **counts,
        reached=_reached(problem, out), seconds=[out.seconds],
    )  # fmt: skip


def _reached(problem: Problem, out: Outcome) -> int:
    room = 1e-6 * abs(out.fun) + 1e-10 * min(1.0, abs(problem.f0 - out.fun))
    return next((count for count, f in out.course if f <= out.fun + room), out.total)


def _tables(runs: list[Run], ours: str) -> None:
    if not runs:
        return print("no such problem or solver\n")
    repeats = median(len(run.seconds) for run in runs)
    limit = f"Limit {SECONDS:g} s of processor time a problem; times are medians of {repeats:g}."
    print(report.summary(runs, limit))
    if any(run.solver == ours for run in runs):
        print(report.against(runs, ours))
    return None


if __name__ == "__main__":
    main()
