"""The pictures of docs/damping.md: what a damping leaves of a step, and which damping is right."""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from statistics import mean, median
from typing import Any

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from benchmarks.primers.networks import NETWORKS, Network, fixed, rows_of, save, warmed
from hesse.optim.kfac import SHARE

__all__ = ["draw_filter", "draw_own_batch", "draw_progress", "print_judges"]

STEPS, LENGTH, SEEDS = 60, 150, (0, 1)  # of runs at one damping, and under a judge
LAST = 20  # steps whose losses are averaged
DAMPINGS = [10.0**k for k in range(-8, 2)]


def eigenvalues(optimizer: Any) -> Tensor:
    """Of K-FAC's running curvature, all of them."""
    found = []
    for state in optimizer.state.values():
        if "factor_g" in state:
            a, g = (torch.linalg.eigvalsh(state[f"factor_{side}"].double()).clamp_min(0).flatten() for side in "ag")
            found.append(torch.outer(g, a).flatten())
        elif "diagonal" in state:
            found.append(state["diagonal"].double().flatten())
    return torch.cat(found)


def draw_filter() -> None:
    """What a damping leaves of Newton's step, over the eigenvalues of a network."""
    values = eigenvalues(warmed(NETWORKS["one wide layer, ReLU"], 0))
    figure, panel = plt.subplots(figsize=(7, 3.6), layout="constrained")
    low, high = -9.0, 2.0
    f = torch.logspace(low, high, 400, dtype=torch.float64)
    counts = panel.twinx()
    counts.hist(values.clamp_min(10**low).log10(), bins=60, range=(low, high), color="0.85")
    counts.set_ylabel("eigenvalues of the curvature, how many", color="0.5")
    counts.tick_params(colors="0.5")
    panel.set_zorder(counts.get_zorder() + 1)
    panel.patch.set_visible(False)
    for damping, colour in ((1e-6, "tab:red"), (1e-3, "tab:blue"), (1.0, "tab:green")):
        dimension = float((values / (values + damping)).sum())
        share = dimension / len(values)
        label = f"damping {damping:g}: {dimension:.0f} effective dimensions, {share:.1%} of {len(values)}"
        panel.plot(f.log10(), f / (f + damping), color=colour, label=label)
        print(f"filter: {label}")
    panel.set(xlabel="eigenvalue f of the curvature, log10", ylabel="share of Newton's step, f / (f + damping)")
    panel.set(xlim=(low, high), ylim=(0, 1.35), yticks=[0, 0.25, 0.5, 0.75, 1])
    panel.legend(loc="upper left", frameon=False, fontsize=8)
    save(figure, "damping-filter")


def draw_own_batch(steps: int = 24) -> None:
    """One step at each damping, as its own batch sees it and as all rows do; and runs under the two judges."""
    network = NETWORKS["one wide layer, ReLU"]
    start = warmed(network, 0)
    columns: tuple[list[float], ...] = ([], [], [])
    before = network.loss(start.model)
    for damping in DAMPINGS:
        found = []
        for rows in rows_of(5, steps):
            optimizer = fixed(start, damping)
            mine, group = network.loss(optimizer.model, rows), optimizer.param_groups[0]
            optimizer.step(network.closure(optimizer.model, rows))
            changes = network.loss(optimizer.model, rows) / mine - 1, network.loss(optimizer.model) / before - 1
            found.append((group["trust_ratio"] if group["rejections"] == 0 else 0.0, *changes))
        for column, values in zip(columns, zip(*found, strict=True), strict=True):
            column.append(median(values))
        print(
            "own batch: damping {:.0e}: ratio {:.2f}, own {:+.2f}, all {:+.2f}".format(
                damping, *(c[-1] for c in columns)
            )
        )
    figure, panels = plt.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
    panels[0].plot(DAMPINGS, columns[0], "o-", color="C3", markersize=3)
    panels[0].axhline(0.75, color="black", linestyle=":", linewidth=1)
    panels[0].annotate("above: the classic rule lowers the damping", (DAMPINGS[-1], 0.69), fontsize=8, ha="right")
    panels[0].set(xscale="log", xlabel="damping", ylabel="trust ratio on the step's own batch", ylim=(0, 1.2))
    panels[1].plot(DAMPINGS, columns[1], "o-", color="C3", markersize=3, label="the step's own batch (64 rows)")
    panels[1].plot(DAMPINGS, columns[2], "o-", color="C0", markersize=3, label="all 1500 training rows")
    panels[1].axhline(0, color="black", linewidth=0.8)
    panels[1].set(xscale="log", xlabel="damping", ylabel="relative change of the loss by one step")
    panels[1].legend(frameon=False, fontsize=8, loc="center left")
    for judge, colour in (("trust ratio", "C3"), ("effective dimension", "C0")):
        for i, other in enumerate(NETWORKS.values()):
            dampings, _ = judged(replace(other, noisy=not other.picture), judge, 0)
            label = f"by the {judge}" if i == 0 else None
            panels[2].plot([d / dampings[0] for d in dampings], color=colour, linewidth=1.1, label=label)
    panels[2].set(yscale="log", xlabel="step", ylabel="damping, relative to the first")
    panels[2].set_title("six networks; of five, three in ten labels are random", fontsize=9)
    panels[2].legend(frameon=False, fontsize=8, loc="lower left")
    save(figure, "damping-own-batch")


def print_judges() -> None:
    """Where dampings and losses end under the two judges, with right and with noisy labels."""
    for name, network in NETWORKS.items():
        for noisy in (False,) if network.picture else (False, True):
            row = [f"| {name}{', three in ten labels random' if noisy else ''}"]
            for judge in ("trust ratio", "effective dimension"):
                runs = [judged(replace(network, noisy=noisy), judge, seed) for seed in SEEDS]
                row.append(f"{mean(dampings[-1] for dampings, _ in runs):.0e}")
                row.append(f"{mean(mean(losses[-50:]) for _, losses in runs):.3f}")
            print(" | ".join(row) + " |")


@functools.cache
def judged(network: Network, judge: str, seed: int) -> tuple[list[float], list[float]]:
    """Damping and loss of all training rows over a run; by the trust ratio, the damping obeys that and no more."""
    start = warmed(network, seed)
    optimizer = start if judge == "effective dimension" else fixed(start, start.param_groups[0]["damping"])
    group, dampings, losses = optimizer.param_groups[0], [], []
    for rows in rows_of(3 + seed, LENGTH):
        rejected = group["rejections"]
        optimizer.step(network.closure(optimizer.model, rows))
        if judge == "trust ratio":
            up = 2.0 if group["rejections"] > rejected else 1 / 0.95 if group["trust_ratio"] < 0.25 else 1.0
            group["damping"] *= 0.95 if up == 1.0 and group["trust_ratio"] > 0.75 else up
        dampings.append(group["damping"])
        losses.append(network.loss(optimizer.model))
    return dampings, losses


def draw_progress() -> None:
    """Progress over dampings and over shares of the spectrum, for six networks."""
    figure, panels = plt.subplots(1, 3, figsize=(12, 4.2), layout="constrained", sharey=False)
    for i, (name, network) in enumerate(NETWORKS.items()):
        gains, shares = progress(network)
        own_gain, own_share, own_damping = own_progress(network)
        best = max(gains)
        style = {"color": f"C{i}", "markersize": 3, "linewidth": 1.1}
        panels[0].plot(DAMPINGS, [gain / best for gain in gains], "o-", label=name, **style)
        panels[1].plot(DAMPINGS, shares, "o-", **style)
        panels[2].plot(shares, [gain / best for gain in gains], "o-", **style)
        panels[2].plot([own_share], [own_gain / best], "*", color=f"C{i}", markersize=11, markeredgecolor="black")
        k = gains.index(best)
        print(
            f"progress: {name}: best at damping {DAMPINGS[k]:.1e}, share {shares[k]:.3f}; "
            f"left free {own_gain / best:.2f} of the best, damping {own_damping:.1e}, share {own_share:.3f}"
        )
    for panel in panels:
        panel.set(xscale="log")
    panels[0].set(xlabel="damping", ylabel="fall of log(loss) after 40 to 60 steps, best = 1", ylim=(0, 1.15))
    panels[1].set(xlabel="damping", ylabel="effective dimension / parameters", yscale="log")
    panels[2].set(xlabel="effective dimension / parameters", ylim=(0, 1.15), xlim=(1e-4, 1.1))
    panels[2].axvspan(1 / 25, 1 / 6, color="0.9", zorder=0)
    panels[2].axvline(SHARE, color="black", linestyle=":", linewidth=1)
    panels[2].set_title("star: KFAC(model)", fontsize=9)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    save(figure, "damping-progress")


def progress(network: Network) -> tuple[list[float], list[float]]:
    """Means over seeds of the fall of log(loss), and of the share of the spectrum, at each damping."""
    gains: list[list[float]] = [[] for _ in DAMPINGS]
    shares: list[list[float]] = [[] for _ in DAMPINGS]
    for seed in SEEDS:
        start = warmed(network, seed)
        for i, damping in enumerate(DAMPINGS):
            gain, share = run_on(network, fixed(start, damping), seed)
            gains[i].append(gain)
            shares[i].append(share)
    return [max(mean(row), 0.0) for row in gains], [mean(row) for row in shares]


def own_progress(network: Network) -> tuple[float, float, float]:
    """The same of the optimiser left to itself, and the damping that it ends with."""
    found = []
    for seed in SEEDS:
        optimizer = warmed(network, seed)
        found.append((*run_on(network, optimizer, seed), optimizer.param_groups[0]["damping"]))
    gain, share, damping = (mean(column) for column in zip(*found, strict=True))
    return gain, share, damping


def run_on(network: Network, optimizer: Any, seed: int) -> tuple[float, float]:
    """The fall of log(loss) in the next steps, and the mean share of the spectrum."""
    before, group = network.loss(optimizer.model), optimizer.param_groups[0]
    count = sum(p.numel() for p in group["params"])
    shares, falls = [], []
    for i, rows in enumerate(rows_of(seed, STEPS)):
        optimizer.step(network.closure(optimizer.model, rows))
        shares.append(group["effective_dimension"] / count)
        if i >= STEPS - LAST:  # the mean of some: the last one alone is noise
            after = network.loss(optimizer.model)
            falls.append(math.log(before / after) if math.isfinite(after) else 0.0)
    return mean(falls), mean(shares)
