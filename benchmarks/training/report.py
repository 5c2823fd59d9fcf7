"""Tables and figure of the training races: medians over seeds, times relative to AdamW's of the same seed."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from statistics import geometric_mean, median

from benchmarks.training.entrants import OURS
from benchmarks.training.race import Run
from benchmarks.training.tasks import TASKS

__all__ = ["FIGURE", "draw", "progress", "tables"]

FIGURE = Path(__file__).resolve().parents[2] / "docs" / "images" / "training.png"
GOALS = {  # steps, time relative to tuned AdamW
    "autoencoder": (60, 0.22),
    "tanh30": (90, 0.5),
    "relu30": (90, 0.5),
    "chars": (180, 0.5),
    "adding50": (170, None),
    "adding100": (170, None),
    "logistic": (10, 0.25),
    "fusion": (70, 0.8),
    "poisson": (20, None),
    "burgers": (20, None),
    "convnet": (70, 0.8),
}
BASE = "AdamW"


def progress(run: Run) -> None:
    end = run.refused or (f"{run.steps} steps, {run.seconds:.2f} s" if run.steps else f"fails, best {run.best:.3g}")
    print(f"{run.task} seed {run.seed} {run.entrant}: {end}", file=sys.stderr, flush=True)


def tables(runs: list[Run]) -> None:
    """A table a task, and one of all."""
    by_task: dict[str, dict[str, list[Run]]] = {}
    for run in runs:
        by_task.setdefault(run.task, {}).setdefault(run.entrant, []).append(run)
    for name, by_entrant in by_task.items():
        _task_table(name, by_entrant)
    _summary(by_task)


def _task_table(name: str, by_entrant: dict[str, list[Run]]) -> None:
    task, (steps, time) = TASKS[name], GOALS[name]
    goal = f"{steps} steps" + (f", {time} x" if time else ", every seed")
    last = task.final is not None
    print(f"### {name}: {task.metric} at most {task.target:g} within {task.budget} steps (goal: {goal})\n")
    columns = ["optimiser", "rate", "steps by seed", "steps", "seconds", "processor s", "ms a step"]
    columns += ["time / AdamW", "processor / AdamW", "step / AdamW", "state"]
    columns += ["last number, worst seed"] if last else []
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    base = {run.seed: run for run in by_entrant.get(BASE, [])}
    for entrant, found in by_entrant.items():
        if all(run.refused for run in found):
            print(f"| {_shown(entrant)} | refused: {found[0].refused} |" + " |" * (len(columns) - 2))
            continue
        good = [run for run in found if not run.refused and run.taken]
        rate = "" if good[0].rate is None else f"{good[0].rate:g}"
        row = [_shown(entrant), rate, " / ".join(str(run.steps or "fails") for run in found)]
        reached = len([run for run in found if run.steps]) == len(found)
        row.append(f"**{median(run.steps for run in found):.0f}**" if reached else "fails")
        row += [_spread([run.seconds for run in found]), _spread([run.cpu for run in found])] if reached else ["", ""]
        row.append(_spread([1e3 * run.total_seconds / run.taken for run in good]))
        row += [_ratio(relative_time(found, base)), _ratio(relative_time(found, base, "cpu"))]
        row += [_ratio(relative_step(good, base)), f"{good[0].state:.1f}"]
        if last:
            row.append(f"{max((run.last for run in good), key=_nan_last):.1e}")
        print(f"| {' | '.join(row)} |")
    print()


def relative_time(found: list[Run], base: dict[int, Run], clock: str = "seconds") -> float | None:
    """Median over seeds of ``seconds`` or ``cpu`` to the target over AdamW's; None unless both got there every time."""
    pairs = [(run, base.get(run.seed)) for run in found]
    if not all(run.seconds and other and other.seconds for run, other in pairs):
        return None
    return median(getattr(run, clock) / getattr(other, clock) for run, other in pairs)


def relative_step(found: list[Run], base: dict[int, Run]) -> float | None:
    pairs = [(run, base[run.seed]) for run in found if run.seed in base]
    if not pairs:
        return None
    return median(run.total_seconds / run.taken / (other.total_seconds / other.taken) for run, other in pairs)


def _summary(by_task: dict[str, dict[str, list[Run]]]) -> None:
    """Median steps / time relative to AdamW by task, and the geometric means where both got there."""
    names = list(dict.fromkeys(entrant for by_entrant in by_task.values() for entrant in by_entrant))
    print("### All tasks: median steps / time relative to tuned AdamW\n")
    print(f"| optimiser | {' | '.join(by_task)} | time, geometric mean (tasks) | step, geometric mean |")
    print("|" + "---|" * (len(by_task) + 3))
    for name in names:
        cells, times, steps = [], [], []
        for by_entrant in by_task.values():
            found = by_entrant.get(name, [])
            base = {run.seed: run for run in by_entrant.get(BASE, [])}
            good = [run for run in found if not run.refused and run.taken]
            if not good:
                cells.append("refused" if found else "")
                continue
            time, step = relative_time(found, base), relative_step(good, base)
            reached = sum(run.steps is not None for run in found)
            if time is not None:
                times.append(time)
            if step is not None:
                steps.append(step)
            if reached < len(found):
                cells.append(f"{reached} of {len(found)}" if reached else "fails")
            else:
                cells.append(f"{median(run.steps for run in found):.0f} / {_ratio(time) or '-'}")
        mean = f"**{geometric_mean(times):.2f}** ({len(times)})" if times else ""
        print(
            f"| {_shown(name)} | {' | '.join(cells)} | {mean} | {geometric_mean(steps):.2f} |"
            if steps
            else f"| {_shown(name)} | {' | '.join(cells)} | {mean} | |"
        )
    print("\nGeometric means are over the tasks (how many) where this optimiser and AdamW got there on every seed.\n")


def draw(runs: list[Run], path: Path) -> None:
    """The task's number against seconds, a panel a task: a thin line a seed; a dotted line is the target."""
    try:
        import matplotlib
    except ImportError as error:
        print(f"figure: left out, {error}\n")
        return
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    tasks = list(dict.fromkeys(run.task for run in runs))
    names = list(dict.fromkeys(run.entrant for run in runs if run.trace))
    ours = [name for name in names if name in OURS]
    theirs = [name for name in names if name not in OURS]
    colours = {name: plt.get_cmap("tab10")(i % 10) for i, name in enumerate(ours)}
    colours |= {name: plt.get_cmap("Greys")(0.85 - 0.6 * i / max(1, len(theirs))) for i, name in enumerate(theirs)}
    columns = min(4, len(tasks))
    rows = math.ceil(len(tasks) / columns)
    figure, panels = plt.subplots(
        rows, columns, figsize=(3.2 * columns + 1, 2.6 * rows + 0.6), layout="constrained", squeeze=False
    )
    for panel, task in zip(panels.flat, tasks, strict=False):
        here = [run for run in runs if run.task == task and run.trace]
        for run in sorted(here, key=lambda run: run.entrant in OURS):
            _, seconds, numbers = zip(*run.trace, strict=True)
            style = {"linewidth": 1.4} if run.entrant in OURS else {"linewidth": 0.9, "linestyle": "--"}
            panel.plot(seconds, numbers, color=colours[run.entrant], alpha=0.8, **style)
        got = [run.seconds for run in here if run.seconds]
        base = [run.seconds for run in here if run.seconds and run.entrant == BASE]
        if got:
            panel.set_xlim(0, 1.3 * max(base or got))
        panel.axhline(TASKS[task].target, color="black", linestyle=":", linewidth=1)
        panel.set(title=task, yscale="log", ylim=_window(here))
        panel.set_ylabel(TASKS[task].metric, fontsize=7)
        panel.tick_params(labelsize=7, which="both")
        panel.spines[["top", "right"]].set_visible(False)
    for panel in list(panels.flat)[len(tasks) :]:
        panel.axis("off")
    figure.supxlabel("seconds of steps", fontsize=9)
    lines = [
        plt.Line2D([], [], color=colours[name], linestyle="-" if name in OURS else "--", label=_shown(name).strip("`"))
        for name in ours + theirs
    ]
    figure.legend(handles=lines, loc="outside right upper", frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    print(f"figure: {path}\n")


def _window(runs: list[Run]) -> tuple[float, float]:
    """From a little below the target, or the best where there is more to win, to the first number of most runs."""
    task = TASKS[runs[0].task]
    starts = sorted(run.trace[0][2] for run in runs if math.isfinite(run.trace[0][2]))
    low = task.target * 0.7 if task.final is None else task.final * 0.5
    return low, max(2 * task.target, 1.2 * starts[len(starts) // 2])


def _shown(name: str) -> str:
    if name in OURS:
        return f"`{name}`"
    return f"{name[3:]} (pytorch_optimizer)" if name.startswith("po-") else f"{name} (torch)"


def _spread(values: list[float]) -> str:
    return f"{median(values):.3g} ({min(values):.3g} to {max(values):.3g})"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _nan_last(value: float) -> float:
    return value if math.isfinite(value) else math.inf
