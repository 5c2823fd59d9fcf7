"""Tables of the race: who solved what, who said so, and at what cost relative to the best on each problem."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import geometric_mean, median

__all__ = ["Run", "against", "edges", "summary"]


@dataclass
class Run:
    """One solver on one problem: the judge's ``verdict`` ("" for not solved), the solver's word, and the cost.

    ``reached`` counts evaluations until the value was the last one's for the first time, by the same tolerance as
    ``verdict``: what follows only confirms it.
    """

    problem: str
    solver: str
    verdict: str
    success: bool
    late: bool
    message: str
    error: str
    fun: float
    nit: int
    nfev: int
    njev: int
    nhev: int
    nhvp: int
    reached: int
    seconds: list[float]

    @property
    def solved(self) -> bool:
        return bool(self.verdict) and not self.late

    @property
    def total(self) -> int:
        return self.nfev + self.njev + self.nhev + self.nhvp

    @property
    def time(self) -> float:
        return median(self.seconds)


def summary(runs: list[Run], note: str) -> str:
    """One row a solver. Costs are geometric means over what it solved, relative to the cheapest solver."""
    problems, solvers = _names(run.problem for run in runs), _names(run.solver for run in runs)
    best = {key: _best(runs, key) for key in ("total", "reached", "time")}
    lines = [
        f"{len(problems)} problems. {note}",
        "",
        "| solver | solved | says success, is not | solved, says failure | out of time | raised "
        "| evaluations / best | until reached / best | worst | Hessians | products | CPU time / best |",
        "|---" * 12 + "|",
    ]
    for solver in solvers:
        mine = [run for run in runs if run.solver == solver]
        good = [run for run in mine if run.solved]
        row = [solver, f"**{len(good)}**", _named(r for r in mine if r.success and not r.solved)]
        row += [_named(r for r in good if not r.success), str(sum(r.late for r in mine))]
        row += [str(sum(bool(r.error) and not r.late for r in mine))]
        for key in ("total", "reached"):
            row.append(_mean([_ratio(r, key, best) for r in good]))
        worst = max(good, key=lambda r: _ratio(r, "total", best), default=None)
        row.append(f"{_ratio(worst, 'total', best):.1f} ({worst.problem})" if worst else "")
        row += [str(sum(r.nhev for r in mine)), str(sum(r.nhvp for r in mine))]
        row.append(_mean([_ratio(r, "time", best) for r in good]))
        lines.append(f"| {' | '.join(row)} |")
    lines += ["", _solved_by_others(runs, problems, solvers), "", *_hessians(runs, solvers)]
    return "\n".join(lines) + "\n"


def against(runs: list[Run], solver: str) -> str:
    """``solver`` against the best of all on every problem."""
    best = {key: _best(runs, key) for key in ("total", "reached", "time")}
    lines = [
        f"| problem | {solver} | says | f, g, H, Hv | evaluations | best of all | ratio | ms | best ms | by |",
        "|---" * 10 + "|",
    ]
    for run in (run for run in runs if run.solver == solver):
        rivals = [r for r in runs if r.problem == run.problem and r.solved]
        first = min(rivals, key=lambda r: r.total, default=None)
        says = run.error or ("success" if run.success else "failure") + (", late" if run.late else "")
        row = [run.problem, run.verdict or f"**not solved** ({run.fun:.6g})", says[:60]]
        row += [f"{run.nfev}, {run.njev}, {run.nhev}, {run.nhvp}", str(run.total)]
        row += [str(first.total), f"{run.total / first.total:.2f}"] if first else ["", ""]
        row += [f"{1e3 * run.time:.1f}", f"{1e3 * best['time'][run.problem]:.1f}" if rivals else ""]
        row.append(first.solver if first else "")
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines) + "\n"


def edges(rows: dict[str, dict[str, tuple[bool, str]]]) -> str:
    """``rows[case][solver]`` is (honest, reason): a table of cases, with the reasons where a word was not honest."""
    solvers = list(next(iter(rows.values())))
    lines = [f"| case | {' | '.join(solvers)} |", "|---" * (len(solvers) + 1) + "|"]
    for case, found in rows.items():
        cells = ["yes" if honest else f"**no**: {reason}" for honest, reason in found.values()]
        lines.append(f"| {case} | {' | '.join(cells)} |")
    totals = [sum(found[solver][0] for found in rows.values()) for solver in solvers]
    lines.append(f"| honest of {len(rows)} | {' | '.join(f'**{t}**' for t in totals)} |")
    return "\n".join(lines) + "\n"


def _hessians(runs: list[Run], solvers: list[str]) -> list[str]:
    """Hessians of the first solver against another's on what both solve: totals hang on who gives up where."""
    lines = []
    found = {(run.problem, run.solver): run for run in runs if run.solved}
    for other in (s for s in solvers[1:] if s.endswith("trust-exact")):
        both = [p for p, s in found if s == solvers[0] and (p, other) in found]
        mine, theirs = (sum(found[p, s].nhev for p in both) for s in (solvers[0], other))
        lines.append(f"Hessians on the {len(both)} problems that both solve: {solvers[0]} {mine}, {other} {theirs}.")
    return lines


def _best(runs: list[Run], key: str) -> dict[str, float]:
    found: dict[str, float] = {}
    for run in runs:
        if run.solved:
            found[run.problem] = min(found.get(run.problem, float("inf")), getattr(run, key))
    return found


def _ratio(run: Run, key: str, best: dict[str, dict[str, float]]) -> float:
    return max(1e-6, getattr(run, key)) / max(1e-6, best[key][run.problem])


def _mean(ratios: list[float]) -> str:
    return f"{geometric_mean(ratios):.2f}" if ratios else ""


def _named(runs: Iterable[Run]) -> str:
    names = [run.problem for run in runs]
    return f"{len(names)}" + (f" ({', '.join(names)})" if 0 < len(names) <= 4 else "")


def _names(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


def _solved_by_others(runs: list[Run], problems: list[str], solvers: list[str]) -> str:
    """Which problems each solver misses, where it misses few, and which nobody solves."""
    solved = {(run.problem, run.solver) for run in runs if run.solved}
    nobody = [p for p in problems if not any((p, s) in solved for s in solvers)]
    lines = [f"Solved by no one: {', '.join(nobody) or 'none'}."]
    for solver in solvers:
        missing = [p for p in problems if (p, solver) not in solved]
        if 0 < len(missing) <= 12:
            lines.append(f"Not solved by {solver}: {', '.join(missing)}.")
    return "\n\n".join(lines)
