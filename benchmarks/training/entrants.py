"""Who runs: torch's own optimisers and pytorch_optimizer's at a searched learning rate, hesse's by default constructor.

    pip install --no-deps pytorch_optimizer

Peers have no weight decay: they minimise the same objective as the others.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import hesse
from benchmarks.training.tasks import Task

__all__ = ["OURS", "PEERS", "Entrant", "rates", "reason_absent", "state_bytes"]

ADAPTIVE = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
GENTLE = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3)
PLAIN = (3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
RESIDUALS = ("poisson", "burgers", "adding50", "adding100")


@dataclass(frozen=True)
class Entrant:
    """``make(model, rate)`` gives the optimiser; ``rates`` is what the search tries, empty where nothing is set."""

    name: str
    make: Callable[[nn.Module, float], Any]
    rates: tuple[float, ...] = ()
    tasks: tuple[str, ...] | None = None  # where it makes sense; everywhere by default
    full: bool = False  # only where a batch is all the data
    package: str | None = None

    def runs(self, task: Task) -> bool:
        return (self.tasks is None or task.name in self.tasks) and (task.full or not self.full)


class Muon:
    """torch's Muon for the matrices, AdamW for the rest, at one rate: their steps match in root mean square."""

    def __init__(self, model: nn.Module, rate: float) -> None:
        groups: dict[bool, list[Tensor]] = {True: [], False: []}
        for p in model.parameters():
            groups[p.dim() == 2].append(p)
        self.parts = [
            torch.optim.Muon(groups[True], lr=rate, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(groups[False], lr=rate, weight_decay=0.0),
        ]

    def step(self, closure: Callable[[], Tensor]) -> Tensor:
        loss = closure()
        for part in self.parts:
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        return {"state": [part.state_dict()["state"] for part in self.parts]}


def _theirs(name: str, **settings: Any) -> Callable[[nn.Module, float], Any]:
    def make(model: nn.Module, rate: float) -> Any:
        return getattr(importlib.import_module("pytorch_optimizer"), name)(model.parameters(), lr=rate, **settings)

    return make


def _ours(name: str, **settings: Any) -> Callable[[nn.Module, float], Any]:
    return lambda model, _: getattr(hesse.optim, name)(model, **settings)


def _ours_by_parameters(name: str) -> Callable[[nn.Module, float], Any]:
    return lambda model, _: getattr(hesse.optim, name)(model.parameters())


def _line_search(model: nn.Module, _: float) -> Any:
    return hesse.optim.LineSearch(torch.optim.SGD(model.parameters(), lr=1.0))


def _table(*entrants: Entrant) -> dict[str, Entrant]:
    return {entrant.name: entrant for entrant in entrants}


PEERS = _table(
    Entrant("AdamW", lambda model, rate: torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0), ADAPTIVE),
    Entrant("SGD", lambda model, rate: torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9), PLAIN),
    Entrant("Muon", Muon, ADAPTIVE),
    Entrant("LBFGS", lambda model, _: torch.optim.LBFGS(model.parameters(), line_search_fn="strong_wolfe"), full=True),
    Entrant("po-SOAP", _theirs("SOAP", weight_decay=0.0), ADAPTIVE, package="pytorch_optimizer"),
    Entrant(  # its defaults graft on SGD and refresh every 1000 steps, which is past the end of most of these races
        "po-Shampoo",
        _theirs("ScalableShampoo", graft_type=3, preconditioning_compute_steps=10, start_preconditioning_step=10),
        GENTLE,
        package="pytorch_optimizer",
    ),
    Entrant("po-Kron", _theirs("Kron"), ADAPTIVE, package="pytorch_optimizer"),
)

OURS = _table(
    Entrant("KFAC", _ours("KFAC")),
    Entrant("EKFAC", _ours("KFAC", ekfac=True)),
    Entrant("NewtonCG", _ours("NewtonCG")),
    Entrant("GaussNewton", _ours("GaussNewton"), tasks=RESIDUALS),
    Entrant("SOAP", _ours_by_parameters("SOAP")),
    Entrant("Shampoo", _ours_by_parameters("Shampoo")),
    Entrant("AdaHessian", _ours_by_parameters("AdaHessian")),
    Entrant("SophiaH", _ours_by_parameters("SophiaH")),
    Entrant("SophiaG", _ours_by_parameters("SophiaG")),
    Entrant("LineSearch", _line_search),
)


def rates(entrant: Entrant, task: Task) -> tuple[float, ...]:
    """What the search tries: ten times as much where nothing is curved, as all best rates are there."""
    return tuple(10 * rate for rate in entrant.rates) if task.name == "logistic" else entrant.rates


def reason_absent(entrant: Entrant) -> str | None:
    """Why it cannot run here, if so."""
    if entrant.package is not None:
        try:
            importlib.import_module(entrant.package)
        except ImportError as error:
            return f"{entrant.package} is not installed ({error.name})"
    kind = {"EKFAC": "KFAC"}.get(entrant.name, entrant.name)
    if entrant.name in OURS and not hasattr(hesse.optim, kind):
        return f"hesse.optim has no {kind}"
    return None


def state_bytes(optimizer: Any) -> int:
    """Bytes of the tensors in the optimiser's state, each memory counted once."""
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in _tensors(optimizer)}.values())


def _tensors(optimizer: Any) -> Iterator[Tensor]:
    seen = [optimizer.state_dict()["state"]]
    while seen:
        value = seen.pop()
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, dict):
            seen += value.values()
        elif isinstance(value, list | tuple):
            seen += value
