"""The pictures of docs/step.md: how far steps go along stiff and flat directions, and where alpha and mu come from."""

from __future__ import annotations

import math
from itertools import pairwise
from statistics import median
from typing import Any

import matplotlib.pyplot as plt
import torch
from torch import Tensor

import hesse
from benchmarks.primers.networks import NETWORKS, ROWS, Network, mlp, rows_of, save, warmed
from hesse.curvature import output_curvature
from hesse.curvature.quadratic import quadratic_model
from hesse.optim.factors import Factors

__all__ = ["draw_found", "draw_plane", "draw_shares"]


def draw_shares() -> None:
    """How far each method goes, against the way to the minimum, by eigendirection of the exact Gauss-Newton matrix."""
    network = Network(lambda: mlp(64, 16, 10))
    torch.manual_seed(0)
    model = network.make()
    kfac = hesse.optim.KFAC(model)
    adam = torch.optim.Adam(model.parameters(), lr=0.0)  # follows the gradients, and leaves the steps to K-FAC
    everything = slice(0, ROWS)
    for _ in range(12):
        kfac.step(network.closure(model, everything))
        adam.step()
    closure = network.closure(model, everything)
    closure()
    params = dict(model.named_parameters())
    G = hesse.curvature.ggn(model, network.loss_fn, network.batch(everything))
    gradient = {name: p.grad.clone() for name, p in params.items()}
    group = kfac.param_groups[0]
    directions = {
        "SGD": {name: -g for name, g in gradient.items()},
        "Adam": {name: -_adam(adam, params[name]) for name in params},
        "K-FAC": Factors(kfac.state, params, group["blocks"]).direction(gradient, group["damping"]),
    }
    f, Q = torch.linalg.eigh(G.dense().double())
    g = Q.T @ _flat(gradient)
    figure, panel = plt.subplots(figsize=(7, 4), layout="constrained")
    edges = torch.logspace(-6, float(f[-1].log10()) + 1e-9, 15, dtype=torch.float64)
    middles = (edges[1:] * edges[:-1]).sqrt()
    for name, direction in directions.items():
        d = Q.T @ _flat(direction)
        d = d * (-(d @ g) / (d @ (f * d)))  # each at the length that is best for it
        share = []
        for low, high in pairwise(edges.tolist()):
            inside = (f >= low) & (f <= high)
            newton = -g[inside] / f[inside]
            share.append(float(d[inside].norm() / newton.norm()) if inside.any() else math.nan)
        panel.plot(middles, share, "o-", markersize=4, label=name)
        gain = 0.5 * float(d @ g) / (-0.5 * float((g.square() / f)[f > edges[0]].sum()))
        print(f"shares: {name}: {gain:.3f} of the decrease of Newton's step;", [f"{s:.1e}" for s in share])
    panel.axhline(1.0, color="black", linestyle=":", linewidth=1)
    panel.annotate("Newton's step: the minimum of the quadratic model", (1.3e-6, 1.15), fontsize=8)
    panel.set(xscale="log", yscale="log", ylim=(1e-5, 6), xlabel="curvature f along an eigendirection (flat to stiff)")
    panel.set_ylabel("length of the step / way to the minimum")
    panel.legend(frameon=False)
    save(figure, "step-shares")


def _adam(adam: Any, p: Tensor) -> Tensor:
    state, (b1, b2) = adam.state[p], adam.param_groups[0]["betas"]
    step = float(state["step"])
    return state["exp_avg"] / (1 - b1**step) / ((state["exp_avg_sq"] / (1 - b2**step)).sqrt() + 1e-8)


def _flat(x: dict[str, Tensor]) -> Tensor:
    return torch.cat([v.flatten() for v in x.values()]).double()


def draw_plane() -> None:
    """The quadratic model and the loss on the plane of direction and last update."""
    network = NETWORKS["12 layers, tanh"]
    kfac = warmed(network, 0, 25)
    model, group = kfac.model, kfac.param_groups[0]
    closure = network.closure(model, rows_of(7, 1)[0])
    before, params = float(closure()), closure.objective.params
    gradient = {name: p.grad for name, p in params.items()}
    last = {name: kfac.state[p]["update"] for name, p in params.items()}
    direction = Factors(kfac.state, params, group["blocks"]).direction(gradient, group["damping"])
    outputs = closure.objective.outputs(params)
    curvature = output_curvature(network.loss_fn, outputs, closure.objective.targets)
    quadratic = quadratic_model(closure.objective, curvature.product, gradient, [direction, last])
    best = quadratic.minimiser(group["damping"])
    alphas, momenta = torch.linspace(-0.5, 3.0, 36) * best[0], torch.linspace(-0.6, 1.8, 36)
    found: list[list[list[float]]] = [[], []]
    for mu in momenta.tolist():
        found[0].append([quadratic.value([alpha, mu], group["damping"]) for alpha in alphas.tolist()])
        found[1].append([_loss_at(closure, params, direction, last, alpha, mu) - before for alpha in alphas.tolist()])
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained", sharey=True)
    least = min(min(row) for row in found[0])
    levels = sorted(least * x for x in (-4, -2, -1, 0, 0.4, 0.7, 0.9, 0.98, 1.08, 1.15))
    for panel, values, title in zip(panels, found, ("the quadratic model", "the loss of the batch"), strict=True):
        lines = panel.contour(alphas, momenta, torch.tensor(values), levels=levels, cmap="viridis")
        panel.clabel(lines, fontsize=6)
        panel.plot(*best, "k*", markersize=11, label="where the step ends")
        panel.plot(0, 0, "ko", markersize=5, fillstyle="none", label="no step")
        panel.set(xlabel="alpha, times the direction", title=title)
    panels[0].set_ylabel("mu, times the last update")
    panels[0].legend(fontsize=8, loc="lower right")
    save(figure, "step-plane")
    change = _loss_at(closure, params, direction, last, *best) - before
    print(f"plane: alpha {best[0]:.3f}, mu {best[1]:.2f}; promised {quadratic.value(best):.4f}, loss {change:+.4f}")


def _loss_at(closure: Any, params: Any, direction: Any, last: Any, alpha: float, mu: float) -> float:
    there = {name: p.detach() + alpha * direction[name] + mu * last[name] for name, p in params.items()}
    with torch.no_grad():
        return float(closure.objective(there))


def draw_found() -> None:
    """What lr and momentum are over a run, and what runs with fixed ones make of it."""
    network, steps = NETWORKS["12 layers, tanh"], 120
    runs: dict[str, dict[str, Any]] = {
        "found": {},
        "lr 1, momentum 0": {"lr": 1.0, "momentum": 0.0},
        "lr 0.03, momentum 0.9": {"lr": 0.03, "momentum": 0.9},
        "the same, and cosine decay": {"lr": 0.03, "momentum": 0.9},
    }
    figure, panels = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    for name, settings in runs.items():
        torch.manual_seed(0)
        model = network.make()
        kfac = hesse.optim.KFAC(model, **settings)
        group = kfac.param_groups[0]
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(kfac, steps) if "cosine" in name else None
        losses, alphas, momenta = [network.loss(model)], [], []
        for rows in rows_of(0, steps):
            kfac.step(network.closure(model, rows))
            if scheduler is not None:
                scheduler.step()
            losses.append(network.loss(model))
            alphas.append(group["lr"])
            momenta.append(group["momentum"])
        if not settings:
            panels[0].plot(alphas)
            panels[1].plot(momenta)
            print(f"found: lr from {min(alphas):.3f} to {max(alphas):.3f}, median {median(alphas):.3f}; ", end="")
            print(f"momentum median {median(momenta):.2f}, {min(momenta):.2f} to {max(momenta):.2f}")
        panels[2].plot(losses, label=name)
        print(f"found: {name}: loss {losses[-1]:.4f} after {steps} steps, {group['rejections']} rejections")
    panels[0].set(xlabel="step", yscale="log", title="lr (alpha), found")
    panels[1].set(xlabel="step", title="momentum (mu), found")
    panels[2].set(xlabel="step", ylabel="loss of all training rows", yscale="log", title="found, or fixed")
    panels[2].legend(frameon=False, fontsize=8)
    save(figure, "step-found")
