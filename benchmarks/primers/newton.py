"""The pictures and tables of docs/newton.md: gradient descent and Newton in one dimension, and choosing alpha."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import optuna
import torch
from torch import Tensor

import hesse
from benchmarks.primers.networks import save
from hesse.minimizers import Armijo, Cubic, Exact, Fixed, Gradient, Method, TrustRegion, Wolfe

__all__ = ["alpha_table", "draw_alpha", "draw_overshoot", "draw_quadratic", "quadratic_table", "scale_table"]

ALPHA, STEPS, TRIALS = 0.1, 10, 20
LEAST, MOST = 1e-3, 10.0  # between which random search draws alpha
FLOOR = 1e-16  # distances below are drawn on it


@dataclass(frozen=True)
class Problem:
    """A function of one number, where it starts and where it is least."""

    fun: Callable[[Tensor], Tensor]
    x0: float
    best: float


def parabola(scale: float = 1.0) -> Problem:
    return Problem(lambda x: scale * ((x - 3) ** 2).sum(), 0.0, 3.0)


BRANCH = Problem(lambda x: (1 + x**2).sqrt().sum(), 2.0, 0.0)


@dataclass(frozen=True)
class Way:
    """Distances to the minimum by iteration, and evaluations of value, gradient and Hessian up to each."""

    distances: list[float]
    spent: list[int]


def walk(problem: Problem, descent: Any, search: Any, steps: int = STEPS, rtol: float | None = None) -> Way:
    x0 = torch.tensor([problem.x0], dtype=torch.float64)
    distances = [abs(problem.x0 - problem.best)]
    result = hesse.minimize(
        problem.fun,
        x0,
        method=Method("own", descent, search),
        max_steps=steps,
        rtol=rtol,
        callback=lambda x: distances.append(abs(float(x) - problem.best)),
    )
    return Way(distances, [row.nfev + row.njev + row.nhev for row in result.trace])


def fixed(problem: Problem, descent: Any, alpha: float, steps: int = STEPS) -> Way:
    """With one alpha, for as many steps as asked: no tolerance ends it."""
    return walk(problem, descent, Fixed(alpha), steps, rtol=1e-300)


def multiplied(alpha: float, bend: float = 2.0, steps: int = 100) -> list[float]:
    """The mistake: the slope of bend / 2 (x - 3)^2 times f'' in place of through it."""
    x, distances = 0.0, [3.0]
    for _ in range(steps):
        x -= alpha * (bend * (x - 3)) * bend
        distances.append(abs(x - 3))
    return distances


QUADRATIC = {
    "gradient descent, alpha 0.1": lambda: fixed(parabola(), Gradient(), ALPHA, 150).distances,
    "f' / f'', alpha 0.1": lambda: fixed(parabola(), Exact(), ALPHA, 150).distances,
    "f' · f'', alpha 0.1": lambda: multiplied(ALPHA, steps=150),
    "Newton: f' / f'', alpha 1": lambda: fixed(parabola(), Exact(), 1.0, 150).distances,
}


def quadratic_table() -> list[str]:
    """Four rules on (x - 3)^2 from 0."""
    rows = []
    for name, way in QUADRATIC.items():
        distances = way()
        near = next(k for k, distance in enumerate(distances) if distance <= 1e-3)
        last = distances[min(100, len(distances) - 1)]
        # What is left after 100 steps may be the last digit of 3.
        said = f"{last:.2e}" if last > 1e-14 else "0, to the last digit"
        rows.append(f"| {name} | {distances[1] / distances[0]:.1f} | {near} | {said} |")
    return rows


def scale_table() -> list[str]:
    """By how much a step multiplies the distance, for narrow and wide parabolas."""
    rows = []
    for bend in (0.02, 2.0, 4.4, 4.5, 10.0, 200.0):
        problem = parabola(bend / 2)
        factors = [
            1 - ALPHA * bend,
            1 - ALPHA,
            1 - ALPHA * bend**2,
            0.0,
        ]
        ran = [
            fixed(problem, Gradient(), ALPHA, 1).distances[1] / 3,
            fixed(problem, Exact(), ALPHA, 1).distances[1] / 3,
            multiplied(ALPHA, bend, 1)[1] / 3,
            fixed(problem, Exact(), 1.0, 1).distances[1] / 3,
        ]
        # Closed forms, held against a step of each.
        assert np.allclose(np.abs(factors), ran, atol=1e-12), (factors, ran)
        cells = (f"**{factor:.5g}**" if abs(factor) > 1 else f"{factor:.5g}" for factor in factors)
        rows.append(f"| {bend:g} | {' | '.join(cells)} |")
    return rows


CASES: dict[str, tuple[Problem, Any]] = {
    "(x - 3)^2 along the gradient": (parabola(), Gradient()),
    "100 (x - 3)^2 along the gradient": (parabola(100.0), Gradient()),
    "sqrt(1 + x^2) along Newton's direction": (BRANCH, Exact()),
}


SHORT = dict(zip(CASES, ("(x - 3)², gradient", "100 (x - 3)², gradient", "sqrt(1 + x²), Newton"), strict=True))


@dataclass(frozen=True)
class Study:
    """What random search tried: alpha and distance of each trial, the evaluations of all."""

    alphas: list[float]
    distances: list[float]
    spent: list[int]


def random_search(problem: Problem, descent: Any) -> Study:
    """Optuna draws alpha, and each trial is a run with it."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    alphas, distances, spent = [], [], []

    def trial_of(trial: optuna.Trial) -> float:
        alpha = trial.suggest_float("alpha", LEAST, MOST, log=True)
        way = fixed(problem, descent, alpha)
        alphas.append(alpha)
        distances.append(way.distances[-1])
        spent.append(way.spent[-1])
        return way.distances[-1]

    optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0)).optimize(trial_of, n_trials=TRIALS)
    return Study(alphas, distances, spent)


def alpha_table() -> list[str]:
    """Evaluations and distance by how alpha is chosen, a column a problem."""
    cells: dict[str, list[str]] = {}
    for problem, descent in CASES.values():
        ways = {
            "alpha = 0.1": fixed(problem, descent, ALPHA),
            "alpha = 1": fixed(problem, descent, 1.0),
            "Armijo": walk(problem, descent, Armijo()),
            "Wolfe": walk(problem, descent, Wolfe()),
        }
        for name, way in ways.items():
            cells.setdefault(name, []).append(cell(way))
        study = random_search(problem, descent)
        best = min(range(TRIALS), key=study.distances.__getitem__)
        cells.setdefault("random search, 20 trials", []).append(
            f"{sum(study.spent)}: {said(study.distances[best])} (alpha = {study.alphas[best]:.2g})"
        )
    return [f"| {name} | {' | '.join(row)} |" for name, row in cells.items()]


def cell(way: Way) -> str:
    if way.distances[-1] > 1e3:
        return "diverges"
    return f"{way.spent[-1]}: {said(way.distances[-1])}"


def said(distance: float) -> str:
    """One digit is what a distance has to say; below the rounding of 3 it is that rounding."""
    return "0" if distance < 1e-14 else f"{distance:.0e}"


def draw_quadratic() -> None:
    """Four rules on a parabola, and what they do on narrower and wider ones."""
    figure, panels = plt.subplots(1, 2, figsize=(11, 3.9), layout="constrained")
    colours = ("C0", "C1", "C3", "C2")
    for (name, way), colour in zip(QUADRATIC.items(), colours, strict=True):
        distances = [max(distance, FLOOR) for distance in way()][:101]
        style = "o-" if len(distances) < 5 else "-"
        panels[0].plot(distances, style, color=colour, markersize=4, label=name)
        if len(distances) > 100 and distances[100] > 1e-12:
            panels[0].annotate(f"{distances[100]:.1e}", (100, distances[100]), (3, 0), textcoords="offset points",
                               va="center", fontsize=8, color=colour)  # fmt: skip
    panels[0].set(yscale="log", xlabel="iteration", ylabel="distance to the minimum", xlim=(-3, 116), ylim=(3e-17, 30))
    panels[0].set_title("(x - 3)², from 0", fontsize=10)
    panels[0].legend(frameon=False, fontsize=8, loc=(0.05, 0.04))
    bends = np.logspace(-2, 2.3, 400)
    factors = (1 - ALPHA * bends, np.full_like(bends, 1 - ALPHA), 1 - ALPHA * bends**2, np.zeros_like(bends))
    panels[1].axhspan(-3, -1, color="0.93", zorder=0)
    panels[1].annotate("the distance grows: divergence", (1.2e-2, -1.3), fontsize=8, color="0.35")
    for factor, colour, name in zip(factors, colours, QUADRATIC, strict=True):
        panels[1].plot(bends, factor, color=colour, label=name)
    for bend, where in ((math.sqrt(20), "√20"), (20.0, "20")):
        panels[1].plot([bend], [-1], "o", color="black", markersize=4)
        panels[1].annotate(where, (bend, -1), (-5, -10), textcoords="offset points", fontsize=8, ha="right")
    panels[1].set(xscale="log", xlabel="f'', the curvature of the parabola", ylim=(-2, 1.15), xlim=(1e-2, 200))
    panels[1].set_ylabel("what one step leaves of x - 3")
    save(figure, "newton-quadratic")


def draw_overshoot() -> None:
    """Newton's parabola at 2 has its minimum at -8; what searches make of it."""
    figure, panels = plt.subplots(1, 2, figsize=(11, 3.9), layout="constrained")
    x = np.linspace(-9.5, 4.5, 400)
    panels[0].plot(x, np.sqrt(1 + x**2), color="black", label="sqrt(1 + x²)")
    root = math.sqrt(5.0)
    model = root + 2 / root * (x - 2) + (x - 2) ** 2 / (2 * root**3)
    panels[0].plot(x, model, color="C2", linestyle="--", label="its parabola at 2")
    low = root + 2 / root * -10 + 100 / (2 * root**3)
    panels[0].plot([2, -8], [root, low], "o", color="C2", markersize=5)
    panels[0].plot([-8], [math.sqrt(65)], "o", color="black", markersize=5)
    panels[0].plot([-8, -8], [low, math.sqrt(65)], ":", color="black", linewidth=1)
    panels[0].annotate("what is there", (-8, math.sqrt(65)), (8, 2), textcoords="offset points", fontsize=9)
    panels[0].annotate("x = 2", (2, root), (6, -8), textcoords="offset points", fontsize=9)
    panels[0].annotate("Newton's step: -8", (-8, low), (-4, -15), textcoords="offset points", fontsize=9)
    panels[0].set(xlabel="x", ylim=(-4, 10))
    panels[0].legend(frameon=False, fontsize=9, loc="lower right")
    ways = {
        "Newton, alpha = 1, from 2": ([2.0, 8.0, 512.0, 2.0**27], "C2", "o--"),
        "Newton, alpha = 1, from 0.9": (start(0.9, Fixed(1.0)), "C2", "o-"),
        "alpha = 0.1, from 2": (start(2.0, Fixed(ALPHA), 12), "C1", "o-"),
        "alpha = 0.1, from 4.5": (start(4.5, Fixed(ALPHA), 12), "C1", "o--"),
        "Armijo, from 2": (start(2.0, Armijo()), "C0", "o-"),
        "trust region, from 2": (start(2.0, TrustRegion()), "C4", "s:"),
        "cubic, from 2": (start(2.0, Cubic()), "C5", "^-"),
    }
    for name, (distances, colour, style) in ways.items():
        panels[1].plot([max(d, FLOOR) for d in distances], style, color=colour, markersize=4, linewidth=1.2, label=name)
    panels[1].set(yscale="log", xlabel="iteration", ylabel="|x|", xlim=(-0.3, 12.3), ylim=(1e-16, 1e9))
    panels[1].legend(frameon=False, fontsize=8, loc="lower right")
    save(figure, "newton-overshoot")


def start(x0: float, search: Any, steps: int = STEPS) -> list[float]:
    """Newton's directions from x0."""
    rtol = 1e-300 if isinstance(search, Fixed) else None
    return walk(Problem(BRANCH.fun, x0, 0.0), Exact(), search, steps, rtol).distances


def draw_alpha() -> None:
    """What random search has to find, and what it costs beside a line search."""
    figure, panels = plt.subplots(1, 2, figsize=(11, 3.9), layout="constrained")
    top = 1e6
    for (name, (problem, descent)), colour in zip(CASES.items(), ("C0", "C3", "C2"), strict=True):
        grid = np.logspace(math.log10(LEAST), math.log10(MOST), 240)
        ends = [min(max(fixed(problem, descent, alpha).distances[-1], FLOOR), top) for alpha in grid]
        panels[0].plot(grid, ends, color=colour, linewidth=1, alpha=0.5)
        study = random_search(problem, descent)
        tried = [min(max(distance, FLOOR), top) for distance in study.distances]
        panels[0].plot(study.alphas, tried, "o", color=colour, markersize=4, label=SHORT[name])
    panels[0].set(xscale="log", yscale="log", xlabel="alpha, the same in all ten steps", ylim=(3e-17, 3e6))
    panels[0].set_ylabel("distance after ten steps (1e6: or more)")
    panels[0].legend(frameon=False, fontsize=8, loc=(0.215, 0.03), handletextpad=0.1)
    panels[0].set_title("dots: what random search tried", fontsize=10)
    # The first is wide, for the second lies on it.
    for (name, (problem, descent)), colour, wide in zip(CASES.items(), ("C0", "C3", "C2"), (3.5, 1, 1), strict=True):
        for search, style in ((Armijo(), "o-"), (Wolfe(), "s--")):
            way = walk(problem, descent, search)
            distances = [max(d, FLOOR) for d in way.distances]
            panels[1].plot(way.spent, distances, style, color=colour, markersize=3 + wide, linewidth=1.1 * wide)
        study = random_search(problem, descent)
        best = np.minimum.accumulate([max(d, FLOOR) for d in study.distances])
        panels[1].step(np.cumsum(study.spent), best, where="post", color=colour, linewidth=1.2, label=name)
    for label, style in (("Armijo", "o-"), ("Wolfe", "s--"), ("best of random search", "-")):
        panels[1].plot([], [], style, color="0.3", markersize=4, linewidth=1.2, label=label)
    panels[1].set(xscale="log", yscale="log", xlabel="values, gradients and Hessians computed", ylim=(3e-17, 3e6))
    panels[1].set_ylabel("distance to the minimum")
    panels[1].legend(*_styles(panels[1]), frameon=False, fontsize=8, loc="lower left")
    save(figure, "newton-alpha")


def _styles(panel: Any) -> tuple[list[Any], list[str]]:
    """The legend of the line styles alone: colours are said on the left."""
    handles, labels = panel.get_legend_handles_labels()
    return handles[-3:], labels[-3:]
