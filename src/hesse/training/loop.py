"""One loop for any optimiser: setting up, taking a step, asking whether we are done.

Everything that is remembered between two steps is in one value, :class:`State`, so that saving it is saving the
run, and a resumed run ends bit for bit where an uninterrupted one ends. What is drawn at random is drawn from the
seed and the epoch alone (order of rows, masked modalities) or from torch's generator, whose state is kept too.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from hesse.finding import Finding
from hesse.health.monitor import Monitor
from hesse.multimodal import Dataset, FusedModel, Schema
from hesse.objective import closure
from hesse.training.evaluate import LOSSES, outputs, score

__all__ = ["Plan", "State", "batches", "finished", "judge", "out_of_time", "start", "take_step"]

MEMORY = 0.99  # of the averaged weights, in steps: 100
MODALITY_DROPOUT = 0.1  # so that the head has met absent modalities before prediction does
MOST_STEPS_KEPT = 1000
TUNED = ("damping", "lr", "momentum", "rejections", "trust_ratio")


@dataclass(frozen=True)
class Plan:
    """What does not change while training: the data, its parts and when to stop.

    Attributes:
        positions: of the rows in ``data``, by part: "train", "valid", "test".
        epochs: most epochs, or None.
        seconds: most seconds of training, evaluation not counted, or None.
        patience: stop after so many epochs without a better validation loss, or None.
    """

    schema: Schema
    data: Dataset
    positions: dict[str, Tensor]
    batch_size: int
    seed: int
    epochs: int | None
    seconds: float | None
    patience: int | None


@dataclass
class State:
    """What changes: the model and its average, the optimiser, the position, the best so far and the records."""

    model: FusedModel
    average: AveragedModel
    optimizer: torch.optim.Optimizer
    monitor: Monitor
    epoch: int = 0
    batch: int = 0
    step: int = 0
    seconds: float = 0.0
    loss_sum: float = 0.0
    best_loss: float = math.inf
    best_epoch: int = 0
    best: dict[str, Tensor] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    steps: list[dict[str, Any]] = field(default_factory=list)
    earlier: list[Finding] = field(default_factory=list)

    @property
    def findings(self) -> list[Finding]:
        """All that was found: in the data and the gradients before the first step, then while training."""
        return [*self.earlier, *self.monitor.findings]


def start(model: FusedModel, optimizer: torch.optim.Optimizer, earlier: list[Finding]) -> State:
    """The state before the first step; ``earlier`` are the findings made until then."""

    def average_(averaged: Any, current: Any, count: Tensor | int) -> None:
        """Exponential average with memory n / (n + 10) at first: early weights are soon forgotten."""
        n = int(count)
        torch._foreach_lerp_(averaged, current, 1 - min(MEMORY, (1 + n) / (10 + n)))

    average = AveragedModel(model, multi_avg_fn=average_)
    return State(model, average, optimizer, Monitor(model), earlier=earlier)


def batches(plan: Plan, epoch: int) -> tuple[tuple[Tensor, ...], Tensor]:
    """The rows of each batch of an epoch, and [n, modalities]: which modalities are hidden from which of these rows."""
    generator = torch.Generator().manual_seed(plan.seed * 1_000_003 + epoch)
    rows = plan.positions["train"]
    order = rows[torch.randperm(len(rows), generator=generator)]
    modalities = len(plan.schema.modalities)
    hidden = torch.rand(len(order), modalities, generator=generator) < MODALITY_DROPOUT * (modalities > 1)
    hidden &= ~hidden.all(1, keepdim=True)  # something must be left to learn from
    return order.split(plan.batch_size), hidden


def take_step(plan: Plan, state: State, rows: Tensor, hidden: Tensor) -> float:
    """One optimiser step on ``rows``; returns the loss before it."""
    began = time.perf_counter()
    inputs, targets = plan.data.batch(rows)
    for column, (key, (values, present)) in enumerate(inputs.items()):
        inputs[key] = (values, present & ~hidden[:, column])
    batch = state.model.prepare(inputs), targets
    loss = float(state.optimizer.step(closure(state.model, LOSSES[plan.schema.task], batch)))  # type: ignore[arg-type]
    state.average.update_parameters(state.model)
    state.step += 1
    state.batch += 1
    state.loss_sum += loss * len(rows)
    state.seconds += time.perf_counter() - began
    state.monitor.step(loss=loss)
    group = state.optimizer.param_groups[0]
    state.steps.append(
        {"step": state.step, "seconds": state.seconds, "loss": loss}
        | {name: float(group[name]) for name in TUNED if name in group}
    )
    return loss


def judge(plan: Plan, state: State) -> dict[str, Any]:
    """End an epoch: validate the averaged model, keep it if it is the best, and return the row of ``metrics.jsonl``."""
    seen = min(state.batch * plan.batch_size, len(plan.positions["train"]))
    valid = plan.positions["valid"]
    targets = plan.data.batch(valid)[1]
    assert targets is not None
    loss, value = score(plan.schema, outputs(state.average.module, plan.data, valid), targets)
    better = loss < state.best_loss or not state.best
    state.epoch += 1
    if better:
        state.best_loss, state.best_epoch = loss, state.epoch
        state.best = {name: t.clone() for name, t in state.average.module.state_dict().items()}
    row = {
        "epoch": state.epoch,
        "step": state.step,
        "seconds": state.seconds,
        "train_loss": state.loss_sum / max(seen, 1),
        "valid_loss": loss,
        "valid_score": value,
        "best": better,
    }
    state.metrics.append(row)
    state.steps = _thinned(state.steps)
    state.batch, state.loss_sum = 0, 0.0
    return row


def finished(plan: Plan, state: State) -> bool:
    """Whether the run is over: epochs or seconds used up, or no better validation loss for long enough."""
    return (
        (plan.epochs is not None and state.epoch >= plan.epochs)
        or out_of_time(plan, state)
        or (plan.patience is not None and state.epoch - state.best_epoch >= plan.patience)
    )


def out_of_time(plan: Plan, state: State) -> bool:
    return plan.seconds is not None and state.seconds >= plan.seconds


def _thinned(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every other row, once there are more than a page can show; the ends stay."""
    if len(rows) <= MOST_STEPS_KEPT:
        return rows
    return rows[:-1:2] + rows[-1:]
