"""What an optimiser owes its settings: those of each group hold for that group, and a change takes effect.

The same problem is run with one setting of one group changed, and only what that group moves may change with it.
Groups with their own learning rate, weight decay for some, schedulers and groups that join later are all this, and so
is ``foreach``, which may change nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from hesse.check.contract.trial import LATE, MATRICES, RAISED, Stand, gap, same, sentence
from hesse.finding import Finding

__all__ = ["SETTINGS"]

OWN = "Read settings from the group whose parameters are moved."


def groups(stand: Stand) -> Iterator[Finding]:
    """Each group steps by its own settings, and groups may join later."""
    if stand.takes == "model":
        return
    try:
        stand.trial(groups=[{}, {}], shapes=MATRICES)
    except RAISED as error:
        stand.notes.append(f"Several parameter groups are refused: {sentence(error)}.")
        return
    lr = stand.lr
    settings: list[tuple[str, str, float, float]] = [("lr", "learning rate", lr, lr / 10)] if lr else []
    if "weight_decay" in stand.accepts:
        settings.append(("weight_decay", "weight decay", 0.0, 0.5))
    for name, words, one, two in settings:
        try:
            both, mixed, neither = (
                _halves(stand, [{name: a}, {name: b}]) for a, b in ((one, one), (one, two), (two, two))
            )
        except RAISED as error:
            yield stand.finding("groups", f"Groups with a {words} of their own raise {sentence(error)}.", OWN)
            continue
        if same(both[1], neither[1]) and same(both[0], neither[0]):
            message = f"A group's {name} is without effect."
            yield stand.finding("groups", message, f"Read group[{name!r}] in step, not a value kept from __init__.")
        elif same(both[1], mixed[1]):
            message = f"The second group's {words} is ignored."
            yield stand.finding("groups", message, f"Read group[{name!r}] inside the loop over param_groups.")
        elif same(mixed[0], neither[0]) and not same(both[0], neither[0]):
            message = f"The first group steps by the {words} of the second."
            yield stand.finding("groups", message, f"Read group[{name!r}] inside the loop over param_groups.")
    trial = stand.trial(groups=[{}], shapes=MATRICES)
    joins = [p.detach().clone() for p in trial.part(1)]
    trial.run(2)
    trial.optimizer.add_param_group({"params": trial.part(1)})
    trial.train()
    trial.run(LATE)
    if same(joins, trial.part(1)):
        message = "Parameters added by add_param_group are not moved."
        yield stand.finding("groups", message, "Go through self.param_groups in step, not a list kept from __init__.")


def scheduler(stand: Stand) -> Iterator[Finding]:
    """A learning rate changed in ``param_groups`` takes effect; one given as a tensor is read, not written."""
    lr = stand.lr
    if lr is None:
        return
    ends, still = [], False
    for when in (None, 0, 1):
        trial = stand.trial()
        for i in range(4):
            before = trial.values()
            if i == when:
                for group in trial.optimizer.param_groups:
                    group["lr"] = lr / 10
            trial.run(1, seed=i)
        still = still or same(before, trial.values())  # at the minimum there is nothing to see
        ends.append(trial.values())
    if same(ends[0], ends[1]):
        message = "A learning rate that a scheduler sets is without effect."
        yield stand.finding("scheduler", message, "Read group['lr'] at every step, not a value kept from __init__.")
    elif same(ends[0], ends[2]) and not still:
        stand.notes.append("The learning rate matters at the first step only: a scheduler has no effect later.")
    trial = stand.trial()
    schedule = torch.optim.lr_scheduler.ExponentialLR(trial.optimizer, 0.5)
    trial.step()
    schedule.step()
    trial.step()
    if "lr" not in stand.accepts:
        return
    tensor = torch.tensor(lr)
    try:
        one = stand.trial(lr=tensor)
    except RAISED:
        return  # refused when it is made, as it should be
    two = stand.trial()
    start, found, there = two.values(), one.run(3), two.run(3)
    if gap(found[-1], there[-1]) > 1e-2 * gap(there[-1], start):
        yield stand.finding("tensor_lr", "A tensor as lr gives other steps than the same number.", "Take float(lr).")
    if abs(float(tensor) - lr) > 1e-6 * lr:
        yield stand.finding(
            "tensor_lr", "A step writes into the tensor given as lr.", "Copy before in-place arithmetic."
        )


def _halves(stand: Stand, settings: list[dict[str, Any]]) -> list[list[Tensor]]:
    """Both halves of the problem after a few steps with settings of their own."""
    trial = stand.trial(groups=settings, shapes=MATRICES)  # some leave vectors out of weight decay
    trial.run(2)
    return [[p.detach().clone() for p in trial.part(i)] for i in (0, 1)]


def weight_decay(stand: Stand) -> Iterator[Finding]:
    """Weight decay pulls towards zero."""
    if "weight_decay" not in stand.accepts:
        return
    shapes = None if stand.takes == "model" else MATRICES
    plain, decayed = (stand.trial(shapes=shapes, weight_decay=value) for value in (0.0, 0.5))
    start = plain.values()
    plain.run(2)
    decayed.run(2)
    pairs = zip(start, plain.params, decayed.params, strict=True)
    pull = sum(float(((b - a).detach().double() * p.double()).sum()) for p, a, b in pairs)
    if pull > 1e-3 * gap(plain.values(), decayed.values()) * gap(start, [torch.zeros_like(p) for p in start]):
        message = "Weight decay pushes the parameters away from zero."
        yield stand.finding(
            "weight_decay", message, "Add weight_decay * p to the gradient, or shrink p by 1 - lr * it."
        )


def foreach(stand: Stand) -> Iterator[Finding]:
    """The implementations of one method take the same steps."""
    if "foreach" not in stand.accepts or stand.settings.get("fused"):
        return
    try:
        one, two = stand.trial(foreach=False), stand.trial(foreach=True)
        start = one.values()
        one.run(3)
        two.run(3)
    except RAISED as error:
        stand.notes.append(f"foreach is refused: {sentence(error)}.")
        return
    if gap(one.values(), two.values()) > 1e-3 * gap(start, one.values()):
        message = "foreach=True and foreach=False take different steps."
        yield stand.finding("foreach", message, "Compare the two implementations line by line.")


SETTINGS: dict[str, Callable[[Stand], Iterator[Finding]]] = {
    "groups": groups,
    "scheduler": scheduler,
    "weight_decay": weight_decay,
    "foreach": foreach,
}
