"""A short training that leaves no trace: watched, then weights, buffers, optimiser and generators are put back.

The model itself is trained, not a copy, because a copy loses hooks, and an optimiser of the user's holds this model's
parameters and no others. What a model keeps in plain attributes is not put back.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from hesse.doctor.diagnosis import Course
from hesse.health import HealthReport, watch
from hesse.objective import closure
from hesse.objective.function import LossFn
from hesse.objective.purity import random_state, set_random_state

__all__ = ["placed", "restored", "train"]

SAMPLES = 60  # of the statistics, in one training: the doctor is in no hurry
LOST = 3  # steps with a loss that is no number after which there is nothing more to see


@contextmanager
def restored(model: nn.Module, optimizer: Optimizer) -> Iterator[None]:
    """Put parameters, buffers, gradients, the optimiser's state and the random generators back at the end."""
    tensors = [*model.parameters(), *model.buffers()]
    with torch.no_grad():
        values = [t.detach().clone() for t in tensors]
    grads = [(p, p.grad) for p in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    state, random = copy.deepcopy(optimizer.state_dict()), random_state(model)
    for p, _ in grads:
        p.grad = None
    try:
        yield
    finally:
        with torch.no_grad():
            for t, value in zip(tensors, values, strict=True):
                t.copy_(value)
        for p, grad in grads:
            p.grad = grad
        for module, mode in modes:
            module.training = mode
        optimizer.load_state_dict(state)
        set_random_state(random)


def train(
    model: nn.Module, loss_fn: LossFn, batches: Iterable[Any], optimizer: Optimizer, steps: int, seconds: float
) -> tuple[Course, HealthReport]:
    """Train for at most ``steps`` and about ``seconds``, and say what was seen on the way."""
    losses: list[float] = []
    began = time.perf_counter()
    with watch(model, optimizer, every=max(1, math.ceil(steps / SAMPLES)), guard=None) as w:
        for batch in batches:
            loss = optimizer.step(closure(model, loss_fn, batch))  # type: ignore[arg-type]
            losses.append(math.nan if loss is None else float(loss))
            w.step(loss=losses[-1])
            lost = not any(math.isfinite(value) for value in losses[-LOST:])
            if len(losses) >= steps or time.perf_counter() - began > seconds or (lost and len(losses) >= LOST):
                break
    rates = {group.get("lr") for group in optimizer.param_groups}
    lr = next(iter(rates)) if len(rates) == 1 else None
    name = type(optimizer).__name__
    took = time.perf_counter() - began
    rate = None if lr is None else float(lr)
    return Course(name, rate, len(losses), took, losses, list(w.records)), w.report()


def placed(batch: Any, model: nn.Module) -> Any:
    """The batch on the device of the model, where a training loop would have put it."""
    first = next((p for p in model.parameters()), None)
    if first is None or first.device.type == "cpu":
        return batch
    return pytree.tree_map(lambda x: x.to(first.device) if isinstance(x, Tensor) else x, batch)
