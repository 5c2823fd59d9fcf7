"""Where the time of a K-FAC step goes, beside AdamW's whole step on the same closure, in one interleaved run."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from time import perf_counter

import torch
import torch.nn.functional as F
from torch import nn

import hesse
from benchmarks.digits import LateFusion
from hesse.curvature import jvp

ROUNDS = 60


def main() -> None:
    """Print medians of interleaved measurements, and the ratio of whole steps, for two small models."""
    print("### Cost of a step (batch 128)\n")
    print("| model | part | median, ms | quartiles, ms | of AdamW's step |\n|---|---|---|---|---|")
    torch.manual_seed(0)
    image, sound, labels = torch.randn(128, 1, 28, 28), torch.randn(128, 1, 24, 32), torch.randint(10, (128,))
    table = torch.randn(128, 30)
    mlp = nn.Sequential(nn.Linear(30, 64), nn.ReLU(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    _measure("image + sound towers", LateFusion((28, 28), (24, 32)), ((image, sound), labels))
    _measure("MLP 30-64-128-10", mlp, (table, labels))
    print()


def _measure(name: str, model: nn.Module, batch: tuple[object, torch.Tensor]) -> None:
    kfac = hesse.optim.KFAC(model)
    adamw = torch.optim.AdamW(model.parameters(), lr=0.0)
    closure = hesse.closure(model, F.cross_entropy, batch)
    for _ in range(11):  # past the burn-in, whose steps are dearer
        kfac.step(closure)
    direction = {key: torch.randn_like(p) for key, p in closure.objective.params.items()}

    def forward() -> None:
        with torch.no_grad():
            closure.objective.forward()

    parts: dict[str, Callable[[], object]] = {
        "AdamW step": lambda: adamw.step(closure),
        "KFAC step, mean of ten": lambda: [kfac.step(closure) for _ in range(10)],
        "forward pass": forward,
        "forward and backward": closure,
        "one forward-mode product": lambda: jvp(closure.objective, direction),
        "all inverses": lambda: kfac._invert(kfac._params()),
    }
    times: dict[str, list[float]] = {part: [] for part in parts}
    for _ in range(ROUNDS):
        for part, run in parts.items():
            began = perf_counter()
            run()
            times[part].append((perf_counter() - began) / (10 if "mean of ten" in part else 1))
    base = median(times["AdamW step"])
    for part, seconds in times.items():
        low, high = torch.tensor(seconds).quantile(torch.tensor([0.25, 0.75])).tolist()
        middle = median(seconds)
        print(
            f"| {name} | {part} | {1e3 * middle:.2f} | {1e3 * low:.2f} to {1e3 * high:.2f} | {middle / base:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
