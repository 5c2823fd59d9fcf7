"""``python -m benchmarks.choose``: what each optimiser keeps and what a step costs, for the table of docs/choose.md.

Every optimiser by its default constructor on two small networks and the same batches of 128 digits, steps interleaved,
processor time of one thread, the first steps (burn-in, calibration) left out.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import hesse
from benchmarks.primers.networks import DATA, ROWS, mlp
from hesse import optim

ROUNDS, EACH, BATCH = 9, 6, 128
MAKE: dict[str, Callable[[nn.Module], Any]] = {
    "torch.optim.AdamW": lambda model: torch.optim.AdamW(model.parameters()),
    "KFAC": optim.KFAC,
    "KFAC, ekfac=True": lambda model: optim.KFAC(model, ekfac=True),
    "NewtonCG": optim.NewtonCG,
    "GaussNewton": optim.GaussNewton,
    "SOAP": lambda model: optim.SOAP(model.parameters()),
    "Shampoo": lambda model: optim.Shampoo(model.parameters()),
    "AdaHessian": lambda model: optim.AdaHessian(model.parameters()),
    "SophiaH": lambda model: optim.SophiaH(model.parameters()),
    "SophiaG": lambda model: optim.SophiaG(model.parameters()),
    "LineSearch around SGD": lambda model: optim.LineSearch(torch.optim.SGD(model.parameters(), lr=1.0)),
}
NETWORKS: dict[str, tuple[int, ...]] = {"wide": (64, 128, 128, 10), "deep": (64, *[32] * 15, 10)}


def main() -> None:
    """Print the table: state in multiples of the parameters, a step in multiples of AdamW's."""
    torch.set_num_threads(1)
    columns = [measured(sizes) for sizes in NETWORKS.values()]
    heads = [f"MLP {'-'.join(map(str, sizes[:3]))}-..-10, {len(sizes) - 1} layers" for sizes in NETWORKS.values()]
    print("| optimiser | " + " | ".join(f"state, {head} | step | ms" for head in heads) + " |")
    print("|---" * (1 + 3 * len(heads)) + "|")
    for name in MAKE:
        cells = [f"{c[name][0]:.1f} | {c[name][1] / c['torch.optim.AdamW'][1]:.1f} | {c[name][1]:.2f}" for c in columns]
        print(f"| {name} | " + " | ".join(cells) + " |")


def measured(sizes: tuple[int, ...]) -> dict[str, tuple[float, float]]:
    """By name: elements of the state a parameter, and milliseconds a step."""
    runs = {}
    for name, make in MAKE.items():
        torch.manual_seed(0)
        model = mlp(*sizes)
        runs[name] = (model, make(model))
    spent: dict[str, list[float]] = {name: [] for name in runs}
    kept = dict.fromkeys(runs, 0.0)
    generator = torch.Generator().manual_seed(0)
    for round in range(ROUNDS):
        batches = [torch.randint(ROWS, (BATCH,), generator=generator) for _ in range(EACH)]
        for name, (model, optimizer) in runs.items():
            steps = batches[:2] if name == "GaussNewton" else batches
            began = time.process_time()
            for rows in steps:
                optimizer.step(hesse.closure(model, F.cross_entropy, (DATA[0][rows], DATA[1][rows])))
            if round > 1:
                spent[name].append(1e3 * (time.process_time() - began) / len(steps))
            kept[name] = max(kept[name], elements(optimizer) / sum(p.numel() for p in model.parameters()))
    return {name: (kept[name], median(times)) for name, times in spent.items()}


def elements(optimizer: torch.optim.Optimizer) -> int:
    """Numbers in the state's tensors."""
    return sum(x.numel() for state in optimizer.state.values() for x in state.values() if isinstance(x, torch.Tensor))


if __name__ == "__main__":
    main()
