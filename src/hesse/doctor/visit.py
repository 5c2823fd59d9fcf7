"""The visit: check, train, look at the curvature, and say what was found."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hesse import check
from hesse.check import Report
from hesse.doctor.diagnosis import Diagnosis, Sharpness
from hesse.doctor.glance import glance, too_sharp
from hesse.doctor.order import arrange
from hesse.doctor.trial import placed, restored, train
from hesse.finding import InputError
from hesse.objective import closure
from hesse.objective.function import LossFn

__all__ = ["diagnose"]


def diagnose(
    model: nn.Module,
    loss_fn: LossFn | None,
    data: Iterable[Any],
    optimizer: Optimizer | None = None,
    *,
    steps: int = 100,
    seconds: float = 30.0,
    second_order: bool = False,
    seed: int = 0,
) -> Diagnosis:
    """Examine a model that does not train: its derivatives, a short training, its curvature.

    The model is used in the mode (train or eval) in which it stands, on its own device. Parameters, buffers, gradients,
    the optimiser's state and the random generators are as before afterwards.

    Args:
        model: a module.
        loss_fn: ``loss_fn(outputs, targets)``, one number; None when the model's output is the loss.
        data: an iterable of batches ``(inputs, targets)``, for instance a ``DataLoader``, gone through again as often
            as needed; with ``loss_fn=None``, of the arguments of the model.
        optimizer: that steps this model's parameters; by default ``AdamW`` as torch has it.
        steps: of the training, at most.
        seconds: of the training, at most; each look at the curvature takes a third of it at most.
        second_order: check second derivatives and forward mode, too.
        seed: of the random directions of the checks.

    Returns:
        What is wrong, where and what to do: ``print`` it, or ``.save`` it as a page; ``.findings``, ``.ok``.

    Raises:
        InputError: there is no batch, or the arguments are not what they should be.

    Example:
        A layer that somebody detached never learns, and the line is named:

        >>> class Net(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.body, self.head = nn.Linear(3, 3), nn.Linear(3, 1)
        ...     def forward(self, x):
        ...         return self.head(torch.tanh(self.body(x)).detach())
        >>> batch = torch.randn(8, 3), torch.randn(8, 1)
        >>> diagnosis = diagnose(Net(), nn.functional.mse_loss, [batch], steps=12)
        >>> diagnosis.ok, diagnosis.findings[0].kind, diagnosis.findings[1].where
        (False, 'detached', 'body')
    """
    if not isinstance(model, nn.Module):
        what = f"The model is a {type(model).__name__}."
        raise InputError("no model", "model", what, "Give a torch.nn.Module; hesse.check.gradients takes functions.")
    if steps < 1 or not seconds > 0:
        what = f"steps={steps} and seconds={seconds} leave no training."
        raise InputError("bad argument", "steps", what, "Give at least one step and some time.")
    pairs = _pairs(model, loss_fn is None, data)
    batch = next(pairs)
    loss = loss_fn or _itself
    reports = _checks(model, loss_fn, batch, second_order, seed)
    first = optimizer or torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    looks: list[Sharpness | str] = []
    right = all(report.ok for report in reports)
    if not right:
        looks.append("The curvature was not looked at: with a wrong derivative it would be wrong, too.")
    with restored(model, first):
        if right:
            looks.append(glance(model, loss, batch, first, "at first", seconds / 3))
        course, health = train(model, loss, chain([batch], pairs), first, steps, seconds)
        if right and course.finite:
            looks.append(glance(model, loss, batch, first, "after training", seconds / 3))
    sharp = [look for look in looks if isinstance(look, Sharpness)]
    notes = [f"{report.check}: {note}" for report in reports for note in report.notes]
    notes += [f"Healthy: {note}" for note in health.notes]
    notes += [look for look in looks if isinstance(look, str)]
    checked = [finding for report in reports for finding in report.findings]
    modules = _in_order(model, course.records)
    entries = arrange(checked, [*health.findings, *too_sharp(sharp, course)], modules)
    return Diagnosis(type(model).__name__, entries, reports, course, sharp, notes)


def _itself(output: Tensor, _: None) -> Tensor:
    """The loss of a model whose output is the loss."""
    return output


def _checks(model: nn.Module, loss_fn: LossFn | None, batch: Any, second_order: bool, seed: int) -> list[Report]:
    """The reports of the checks; second derivatives only where the first are right."""
    subject: tuple[Any, Any] = (model, batch[0]) if loss_fn is None else (closure(model, loss_fn, batch), None)
    reports = [check.gradients(*subject, seed=seed)]
    if second_order and reports[0].ok:
        reports.append(check.hessian(*subject, seed=seed))
    return reports


def _pairs(model: nn.Module, bare: bool, data: Iterable[Any]) -> Iterator[Any]:
    """Pairs of inputs and targets, again and again; those of a generator once."""
    count = 0
    while True:
        before = count
        for batch in data:
            count += 1
            moved = placed(batch, model)
            if bare:
                yield moved, None
            elif isinstance(moved, tuple | list) and len(moved) == 2:
                yield moved
            else:
                what = f"a {type(batch).__name__}" + (f" of {len(batch)}" if isinstance(batch, tuple | list) else "")
                remedy = "Let it give pairs, of which inputs and targets may be tuples or dicts themselves."
                raise InputError("no batch", f"batch {count}", f"It is {what}, not (inputs, targets).", remedy)
        if count == 0:
            raise InputError("no batch", "data", "It holds no batch.", "Give a list of batches, or a DataLoader.")
        if count == before:
            return


def _in_order(model: nn.Module, records: list[dict[str, Any]]) -> list[str]:
    """Paths of modules and of functions called in a forward pass, in the order of their calls where that is known."""
    called = {name: seen["order"] for row in records for name, seen in row["layers"].items() if seen.get("order")}
    names = [path for path, _ in model.named_modules() if path]
    names += [name for name in called if name not in set(names)]
    rank: dict[str, float] = {}
    last = 0.0
    for name in names:
        last = rank[name] = float(called.get(name, last))
    return sorted(names, key=lambda name: rank[name])
