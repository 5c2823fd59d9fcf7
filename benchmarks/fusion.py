"""Degraded written and spoken digits: K-FAC with no argument against AdamW with a searched learning rate.

AdamW runs ten epochs at each of three learning rates; its best is chosen by validation accuracy. K-FAC gets the wall
time of that whole search, and so does one long run of AdamW at 0.003. All are evaluated with the same averaged weights,
at the end of each epoch, outside the clock; each run's epoch is chosen by validation accuracy and reported on the test
rows. The runs of a seed follow one another, so that a slow minute of the machine hits all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from time import perf_counter

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hesse
from benchmarks import digits
from hesse.training.average import averaged

SEEDS = (0, 1, 2)
RATES = (0.001, 0.003, 0.01)
EPOCHS = 10
BATCH = 128
FIGURE = Path(__file__).resolve().parents[1] / "docs" / "images" / "fusion.png"


@dataclass
class Trace:
    """One run, a row an epoch: seconds of training, accuracies of the averaged weights, and of the raw ones on test."""

    seconds: list[float]
    valid: list[float]
    test: list[float]
    raw: list[float]
    steps: int = 0

    @property
    def chosen(self) -> int:
        return max(range(len(self.valid)), key=self.valid.__getitem__)


def main() -> None:
    """Run all seeds, print the tables, draw the figure."""
    if not digits.available():
        print(f"fusion: skipped, no data in {digits.DATA} (set HESSE_DATA to the folder with mnist/ and fsdd/)\n")
        return
    runs: dict[str, list[Trace]] = {}
    for seed in SEEDS:
        splits = digits.load(seed)
        found = {f"AdamW {lr}": train(splits, seed, adamw(lr), epochs=EPOCHS) for lr in RATES}
        budget = sum(trace.seconds[-1] for trace in found.values())
        found["KFAC(model)"] = train(splits, seed, hesse.optim.KFAC, seconds=budget)
        found["AdamW 0.003, long"] = train(splits, seed, adamw(0.003), seconds=budget)
        best = max((f"AdamW {lr}" for lr in RATES), key=lambda name: max(found[name].valid))
        found[f"AdamW, best of {len(RATES)} by validation"] = found[best]
        for name, trace in found.items():
            runs.setdefault(name, []).append(trace)
    report(runs)
    draw(runs)


def adamw(lr: float) -> Callable[[nn.Module], torch.optim.Optimizer]:
    return lambda model: torch.optim.AdamW(model.parameters(), lr=lr)


def train(
    splits: dict[str, digits.Split],
    seed: int,
    make: Callable[[nn.Module], torch.optim.Optimizer],
    epochs: int | None = None,
    seconds: float | None = None,
) -> Trace:
    """Train a fresh model, the same for every optimiser, for so many epochs or seconds."""
    (image, sound), labels = splits["train"]
    torch.manual_seed(seed)
    model = digits.LateFusion(image.shape[2:], sound.shape[2:])
    optimizer, average = make(model), averaged(model)
    trace, clock = Trace([], [], [], []), 0.0
    while (epochs is None or len(trace.seconds) < epochs) and (seconds is None or clock < seconds):
        for rows in torch.randperm(len(labels)).split(BATCH):
            began = perf_counter()
            batch = (image[rows], sound[rows]), labels[rows]
            optimizer.step(hesse.closure(model, F.cross_entropy, batch))
            average.update_parameters(model)
            clock += perf_counter() - began
            trace.steps += 1
            if seconds is not None and clock >= seconds:
                break
        trace.seconds.append(clock)
        trace.valid.append(accuracy(average.module, splits["valid"]))
        trace.test.append(accuracy(average.module, splits["test"]))
        trace.raw.append(accuracy(model, splits["test"]))
    return trace


@torch.no_grad()
def accuracy(model: nn.Module, split: digits.Split) -> float:
    (image, sound), labels = split
    outputs: Tensor = torch.cat([model(i, s) for i, s in zip(image.split(500), sound.split(500), strict=True)])
    return float((outputs.argmax(1) == labels).float().mean())


def report(runs: dict[str, list[Trace]]) -> None:
    print("### Degraded image and sound digits (7000 / 1000 / 2000 rows)\n")
    print("| run | test accuracy, % by seed | mean | last epoch, raw weights | epochs | wall time, s | ms a step |")
    print("|---|---|---|---|---|---|---|")
    for name, traces in runs.items():
        chosen = [100 * trace.test[trace.chosen] for trace in traces]
        raw = mean(100 * trace.raw[-1] for trace in traces)
        seconds = [trace.seconds[-1] for trace in traces]
        step = [1000 * trace.seconds[-1] / trace.steps for trace in traces]
        print(
            f"| {name} | {' / '.join(f'{a:.1f}' for a in chosen)} | **{mean(chosen):.1f}** | {raw:.1f} "
            f"| {median(len(trace.seconds) for trace in traces):.0f} | {median(seconds):.1f} "
            f"| {median(step):.1f} ({min(step):.1f} to {max(step):.1f}) |"
        )
    print()


def draw(runs: dict[str, list[Trace]]) -> None:
    """Accuracy against wall time: a thin line a seed, a thick one through the seeds' means by epoch."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    colours = dict(zip(runs, ("#9ecae1", "#4292c6", "#08519c", "#d95f02", "#7570b3"), strict=False))
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for name, colour in colours.items():
        for trace in runs[name]:
            axes.plot(trace.seconds, [100 * a for a in trace.test], color=colour, alpha=0.35, linewidth=0.8)
        epochs = min(len(trace.seconds) for trace in runs[name])
        seconds = [mean(trace.seconds[e] for trace in runs[name]) for e in range(epochs)]
        axes.plot(seconds, [100 * mean(t.test[e] for t in runs[name]) for e in range(epochs)], color=colour, label=name)
    axes.set(xlabel="wall time of training, s", ylabel="test accuracy, %", ylim=(60, None))
    axes.axhline(81, color="grey", linestyle=":", linewidth=1)
    axes.set_title("Degraded image + sound digits: averaged weights, three seeds and their mean")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    FIGURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(FIGURE, dpi=120)
    print(f"figure: {FIGURE.relative_to(FIGURE.parents[2])}\n")


if __name__ == "__main__":
    main()
