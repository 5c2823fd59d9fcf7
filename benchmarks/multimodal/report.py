"""Tables in Markdown, a row an optimiser and cure, and the figures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.multimodal.entrants import CURES, OPTIMIZERS, TRIED
from benchmarks.multimodal.race import Result
from benchmarks.multimodal.starvation import EPOCHS, EVERY
from benchmarks.multimodal.tasks import TASKS

__all__ = ["FIGURES", "alarms", "draw", "overview", "progress", "tables"]

DEEPEST = 10  # points of accuracy below the best that the figure shows
LINES = {"none": "-", "apart": "--", "Pool": ":"}
UNDRAWN = {"heard"}  # validation rows are all right there from the first epoch on
FIGURES = Path(__file__).resolve().parents[2] / "docs" / "images"
COLOURS = dict(
    zip(OPTIMIZERS, ("#bdbdbd", "#969696", "#525252", "#1b9e77", "#7570b3", "#d95f02", "#e6ab02"), strict=True)
)


def progress(run: Result) -> None:
    told = run.refused or f"{run.accuracy:.1%}, {run.epochs:.1f} epochs in {run.seconds:.1f} s"
    print(f"{run.task} {run.seed} {run.optimizer}+{run.cure}: {told}", flush=True)


def overview(runs: Sequence[Result]) -> None:
    """A table a task, cures by optimisers: accuracy, and the probe of the tower that starves most."""
    for task in _in_order(TASKS, {run.task for run in runs}):
        here = [run for run in runs if run.task == task and run.refused is None]
        grouped, starved = _grouped(here), _starved(here)
        optimizers = _in_order(OPTIMIZERS, {run.optimizer for run in here})
        seeds = {run.seed for run in here}
        print(f"### {task}: test accuracy / {starved} probe, %\n")
        print(f"| cure | {' | '.join(map(_shown, optimizers))} |")
        print("|---" * (1 + len(optimizers)) + "|")
        best = max(mean(run.accuracy for run in found) for found in grouped.values())
        for cure in _in_order(CURES, {run.cure for run in here}):
            cells = []
            for found in (grouped.get((optimizer, cure), []) for optimizer in optimizers):
                if not found:
                    cells.append("")
                    continue
                accuracy = mean(run.accuracy for run in found)
                told = f"**{100 * accuracy:.1f}**" if accuracy == best else f"{100 * accuracy:.1f}"
                few = f" ({len(found)} of {len(seeds)} seeds)" if len(found) < len(seeds) else ""
                cells.append(f"{told} / {100 * _mean(found, starved):.1f}{few}")
            print(f"| {_cure(cure)} | {' | '.join(cells)} |")
        _single(here)
        print()


def tables(runs: Sequence[Result]) -> None:
    """A table a task; after a mean, the lowest and the highest seed."""
    for task in _in_order(TASKS, {run.task for run in runs}):
        here = [run for run in runs if run.task == task]
        seeds = sorted({run.seed for run in here})
        keys = list(next(run.probes for run in here if run.probes))
        print(f"### {task}: {TASKS[task].says} (seeds {', '.join(map(str, seeds))})\n")
        probes = " | ".join(f"{key} probe, %" for key in keys)
        print(f"| optimiser | cure | accuracy, % | log-loss | calibration error, % | {probes} | epochs | wall, s |")
        print("|---" * (7 + len(keys)) + "|")
        for (optimizer, cure), found in _grouped(here).items():
            ran = [run for run in found if run.refused is None]
            if not ran:
                print(f"| {_shown(optimizer)} | {cure} | {found[0].refused} |" + " |" * (4 + len(keys)))
                continue
            cells = [
                _spread([100 * run.accuracy for run in ran], ".1f", bold=True),
                _spread([run.log_loss for run in ran], ".3f"),
                f"{100 * mean(run.calibration for run in ran):.1f}",
                *(_spread([100 * run.probes[key] for run in ran], ".1f") for key in keys),
                f"{mean(run.epochs for run in ran):.1f}",
                f"{mean(run.wall for run in ran):.1f}",
            ]
            few = f" ({len(ran)} of {len(seeds)} seeds)" if len(ran) < len(seeds) else ""
            print(f"| {_shown(optimizer)} | {cure}{few} | {' | '.join(cells)} |")
        print()


def _single(runs: Sequence[Result]) -> None:
    """What each modality reaches alone, by its own head."""
    print()
    for (optimizer, cure), found in _grouped([run for run in runs if run.alone]).items():
        if cure in ("apart", "Pool"):
            told = [f"{key} {_spread([100 * run.alone[key][1] for run in found], '.1f')}" for key in found[0].alone]
            print(f"- {_shown(optimizer)}, {_cure(cure)}: each head alone {', '.join(told)}")


def _starved(runs: Sequence[Result]) -> str:
    """The modality whose tower loses most from its training apart to the fused one, both with the pacemaker."""
    apart = [run for run in runs if run.cure == "apart"]
    fused = [run for run in runs if (run.optimizer, run.cure) == ("AdamW", "none")] or list(runs)
    return max(fused[0].probes, key=lambda key: _mean(apart, key) - _mean(fused, key))


def _mean(runs: Sequence[Result], key: str) -> float:
    return mean(run.probes[key] for run in runs) if runs else 0.0


def alarms(lines: Sequence[dict[str, Any]]) -> None:
    """What the monitor named, and in which epoch, by task, optimiser and seed."""
    if not lines:
        return
    print(f"### What `hesse.watch(every={EVERY})` named in {EPOCHS} epochs\n")
    print("| task | optimiser | starvation: tower, epoch, by seed | other findings |")
    print("|---|---|---|---|")
    for task in _in_order(TASKS, {line["task"] for line in lines}):
        for optimizer in _in_order(OPTIMIZERS, {line["optimizer"] for line in lines if line["task"] == task}):
            here = [line for line in lines if (line["task"], line["optimizer"]) == (task, optimizer)]
            starved, others = [], set()
            for line in sorted(here, key=lambda line: line["seed"]):
                named = [f for f in line["findings"] if f[1] == "starved_branch"]
                starved.append(", ".join(f"{where.rpartition('.')[2]} {epoch}" for epoch, _, where, _ in named) or "-")
                others |= {f[1] for f in line["findings"]} - {"starved_branch"}
            print(f"| {task} | {_shown(optimizer)} | {' / '.join(starved)} | {', '.join(sorted(others)) or '-'} |")
    print()


def draw(runs: Sequence[Result], folder: Path) -> None:
    """``multimodal.png``: accuracy over probe by entrant; ``multimodal-time.png``: accuracy over time."""
    runs = [run for run in runs if run.refused is None]
    if not runs:
        return
    try:
        import matplotlib
    except ImportError as error:
        print(f"figures: left out, {error}\n")
        return
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    tasks = _in_order(TASKS, {run.task for run in runs} - UNDRAWN)
    for name, paint in (("multimodal.png", _by_entrant), ("multimodal-time.png", _by_time)):
        figure = paint(plt, runs, tasks)
        figure.savefig(folder / name, dpi=120)
        plt.close(figure)
        print(f"figure: {folder / name}\n")


def _by_entrant(plt: Any, runs: Sequence[Result], tasks: Sequence[str]) -> Any:
    """Each entrant's accuracy over the probe of the most starved tower: who starves it, and what that costs."""
    columns = min(2, len(tasks))
    rows = -(-len(tasks) // columns)
    figure, panels = plt.subplots(rows, columns, figsize=(6 * columns, 4.6 * rows), layout="constrained", squeeze=False)
    marks = dict(zip(CURES, "osD^vP*Xp<>hd", strict=False))
    used: set[str] = set()
    moved: set[str] = set()
    for panel, task in zip(panels.flat, tasks, strict=False):
        here = _grouped([run for run in runs if run.task == task])
        starved = _starved([run for found in here.values() for run in found])
        top = max(100 * mean(run.accuracy for run in found) for found in here.values())
        for (optimizer, cure), found in here.items():
            if 100 * mean(run.accuracy for run in found) < top - DEEPEST:
                continue
            x, y = (
                [100 * v for v in values]
                for values in zip(*((r.probes[starved], r.accuracy) for r in found), strict=True)
            )
            style = {"color": COLOURS[optimizer], "marker": marks[cure]}
            panel.plot(mean(x), mean(y), linestyle="", alpha=0.85, markersize=7, **style)
            used.add(cure)
            moved.add(optimizer)
        panel.set(title=task, xlabel=f"linear probe of the {starved} tower, % right", ylabel="test accuracy, %")
        panel.spines[["top", "right"]].set_visible(False)
    for panel in list(panels.flat)[len(tasks) :]:
        panel.axis("off")
    handles = [
        plt.Line2D([], [], color=COLOURS[o], marker="o", linestyle="", label=o) for o in _in_order(OPTIMIZERS, moved)
    ]
    handles += [
        plt.Line2D([], [], color="black", markerfacecolor="none", marker=marks[c], linestyle="", label=_cure(c))
        for c in _in_order(CURES, used)
    ]
    figure.legend(handles=handles, loc="outside right upper", frameon=False)
    return figure


def _by_time(plt: Any, runs: Sequence[Result], tasks: Sequence[str]) -> Any:
    """Validation accuracy of the averaged weights over the clock, mean of the seeds, of the cures in :data:`LINES`."""
    columns = min(2, len(tasks))
    rows = -(-len(tasks) // columns)
    figure, panels = plt.subplots(
        rows, columns, figsize=(5 * columns + 1, 3.6 * rows), layout="constrained", squeeze=False
    )
    for panel, task in zip(panels.flat, tasks, strict=False):
        top = 0.0
        for (optimizer, cure), found in _grouped([run for run in runs if run.task == task]).items():
            if cure not in LINES:
                continue
            seconds, accuracy = ([mean(values) for values in zip(*rows, strict=True)] for rows in _curves(found))
            top = max(top, *accuracy)
            panel.plot(seconds, accuracy, LINES[cure], color=COLOURS[optimizer], linewidth=1.5)
        panel.set(title=task, xlabel="processor time, s", ylim=(0.9 * top, 1.01 * top))
        panel.spines[["top", "right"]].set_visible(False)
    panels.flat[0].set_ylabel("validation accuracy, %")
    present = _in_order(OPTIMIZERS, {run.optimizer for run in runs})
    handles = [plt.Line2D([], [], color=COLOURS[o], label=o) for o in present]
    handles += [plt.Line2D([], [], color="black", linestyle=line, label=_cure(cure)) for cure, line in LINES.items()]
    figure.legend(handles=handles, loc="outside right upper", frameon=False)
    return figure


def _curves(runs: Sequence[Result]) -> tuple[list[list[float]], list[list[float]]]:
    return [[row[0] for row in run.trace] for run in runs], [[100 * row[1] for row in run.trace] for run in runs]


def _grouped(runs: Sequence[Result]) -> dict[tuple[str, str], list[Result]]:
    found: dict[tuple[str, str], list[Result]] = {}
    for cure in CURES:
        for optimizer in OPTIMIZERS:
            same = [run for run in runs if (run.optimizer, run.cure) == (optimizer, cure)]
            if same:
                found[optimizer, cure] = same
    return found


def _in_order(names: Iterable[str], present: set[str]) -> list[str]:
    return [name for name in names if name in present]


def _shown(optimizer: str) -> str:
    return f"{optimizer}, tuned" if optimizer in TRIED else f"`{optimizer}`"


def _cure(name: str) -> str:
    return {"none": "no cure", "apart": "towers apart"}.get(name, name)


def _spread(values: Sequence[float], form: str, bold: bool = False) -> str:
    middle = f"{mean(values):{form}}"
    middle = f"**{middle}**" if bold else middle
    return middle if len(values) == 1 else f"{middle} ({min(values):{form}} to {max(values):{form}})"
