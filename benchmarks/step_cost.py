"""Where the time of a step goes, beside AdamW's whole step on the same closure, in one interleaved run."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from statistics import median
from time import process_time
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import hesse
from benchmarks.digits import LateFusion
from benchmarks.training.networks import CharTransformer, autoencoder
from hesse.curvature.jacobian import jvp, secant
from hesse.curvature.output import output_curvature
from hesse.curvature.statistics import statistics
from hesse.curvature.uses import watch_uses
from hesse.optim.factors import Factors

ROUNDS = 30
MANY = 12  # steps measured together: statistics come every third, inverses when they are off


def main() -> None:
    """Print medians of interleaved measurements, and the ratio of whole steps, for three small models."""
    print("### Cost of a step\n")
    print("| model | part | median, ms | quartiles, ms | of AdamW's step |\n|---|---|---|---|---|")
    torch.manual_seed(0)
    image, sound, labels = torch.randn(128, 1, 28, 28), torch.randn(128, 1, 24, 32), torch.randint(10, (128,))
    pixels, text = torch.rand(250, 196), torch.randint(65, (16, 65))
    _measure("autoencoder, 250 rows", autoencoder(), F.binary_cross_entropy_with_logits, (pixels, pixels))
    _measure("image + sound, 128 rows", LateFusion((28, 28), (24, 32)), F.cross_entropy, ((image, sound), labels))
    _measure("transformer, 16 x 64", CharTransformer(65), F.cross_entropy, (text[:, :-1], text[:, 1:]))
    print()


def _measure(name: str, model: nn.Module, loss_fn: Any, batch: tuple[Any, torch.Tensor]) -> None:
    others = {kind: deepcopy(model) for kind in ("AdamW", "SOAP", "Shampoo")}
    optimizers = {
        "AdamW": torch.optim.AdamW(others["AdamW"].parameters(), lr=1e-4),
        "SOAP": hesse.optim.SOAP(others["SOAP"].parameters(), lr=1e-4),
        "Shampoo": hesse.optim.Shampoo(others["Shampoo"].parameters(), lr=1e-4),
        "KFAC": hesse.optim.KFAC(model),
    }
    models = {**others, "KFAC": model}
    closures = {kind: hesse.closure(one, loss_fn, batch) for kind, one in models.items()}

    def steps(kind: str) -> Callable[[], object]:
        return lambda: [optimizers[kind].step(closures[kind]) for _ in range(MANY)]

    steps("KFAC")()  # past the burn-in, whose steps are dearer
    frozen = hesse.closure(deepcopy(model), loss_fn, batch)
    objective = frozen.objective
    params = objective.params
    with watch_uses(params) as uses:
        outputs = objective.forward(plain=True)
    curvature = output_curvature(loss_fn, outputs, batch[1])
    direction = {key: 1e-3 * torch.randn_like(p) for key, p in params.items()}
    kfac = optimizers["KFAC"]
    group, live = kfac.param_groups[0], dict(model.named_parameters())

    def forward() -> None:
        with torch.no_grad():
            objective.forward()

    @torch.no_grad()
    def inverses() -> None:
        Factors(kfac.state, live, group["blocks"]).refresh(group["damping"])

    @torch.no_grad()
    def natural() -> None:
        Factors(kfac.state, live, group["blocks"]).direction(direction, group["damping"])

    wholes = {f"{kind} step": steps(kind) for kind in optimizers}
    parts: dict[str, Callable[[], object]] = {
        **wholes,
        "KFAC: forward pass": forward,
        "KFAC: forward and backward": frozen,
        "KFAC: one product of the quadratic model, by differences": lambda: secant(objective, outputs, direction),
        "the same in forward mode": lambda: jvp(objective, direction),
        "KFAC: statistics, every third step": lambda: statistics(uses, params, outputs, curvature, patches=2048),
        "KFAC: all inverses, when they are off": inverses,
        "KFAC: direction": natural,
    }
    times: dict[str, list[float]] = {part: [] for part in parts}
    for _ in range(ROUNDS):
        for part, run in parts.items():
            began = process_time()
            run()
            times[part].append((process_time() - began) / (MANY if part in wholes else 1))
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
