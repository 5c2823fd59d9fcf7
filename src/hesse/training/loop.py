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
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from hesse import tree
from hesse.finding import Finding
from hesse.health.monitor import Monitor
from hesse.multimodal import Dataset, FusedModel, Schema
from hesse.objective import closure
from hesse.objective.replicas import Replicas
from hesse.training.average import averaged
from hesse.training.evaluate import LOSSES, known_targets, outputs, score
from hesse.training.team import Team

__all__ = ["Plan", "State", "batches", "diverged", "finished", "judge", "out_of_time", "start", "take_step"]

MODALITY_DROPOUT = 0.1  # so that the head has met absent modalities before prediction does
MOST_STEPS_KEPT = 1000
SAMPLED = 25  # steps between the monitor's samples: not a share of the time, so that a resumed run repeats them
TUNED = ("damping", "lr", "momentum", "rejections", "trust_ratio")


@dataclass(frozen=True)
class Plan:
    """What does not change while training: the data, its parts and when to stop.

    Attributes:
        positions: of the rows in ``data``, by part: "train", "valid", "test".
        epochs: most epochs, or None.
        seconds: most seconds of training, evaluation not counted, or None.
        patience: stop after so many epochs without a better validation loss, or None.
        team: the processes that train.
    """

    schema: Schema
    data: Dataset
    positions: dict[str, Tensor]
    batch_size: int
    seed: int
    epochs: int | None
    seconds: float | None
    patience: int | None
    team: Team = field(default_factory=Team)


@dataclass
class State:
    """What changes: the model and its average, the optimiser, the position, the best so far and the records.

    Attributes:
        replica: the model as it is called: itself, or with gradients that are averaged over several processes.
        epoch, batch, step: how many were completed; ``batch`` of the epoch under way.
        seconds: of training, evaluation not counted.
        loss_sum: over the rows of the epoch under way.
        best_loss, best_epoch, best: the averaged weights with the lowest validation loss; none before that was a
            number.
        metrics, steps: rows of ``metrics.jsonl`` and ``steps.jsonl``.
        earlier: findings in the data and the gradients, before the first step.
    """

    model: FusedModel
    average: AveragedModel
    optimizer: torch.optim.Optimizer
    monitor: Monitor
    replica: nn.Module
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


def start(model: FusedModel, optimizer: torch.optim.Optimizer, replica: nn.Module | None = None) -> State:
    """The state before the first step."""
    return State(model, averaged(model), optimizer, Monitor(model, every=SAMPLED, guard=None), replica or model)


def batches(plan: Plan, epoch: int) -> list[tuple[Tensor, Tensor]]:
    """The batches of an epoch: positions [b] of their rows, and bool [b, modalities], what is hidden from which row."""
    generator = torch.Generator().manual_seed(plan.seed * 1_000_003 + epoch)
    rows = plan.positions["train"]
    order = rows[torch.randperm(len(rows), generator=generator)]
    modalities = len(plan.schema.modalities)
    hidden = torch.rand(len(order), modalities, generator=generator) < MODALITY_DROPOUT
    hidden &= ~hidden.all(1, keepdim=True)  # something must be left to learn from
    return list(zip(order.split(plan.batch_size), hidden.split(plan.batch_size), strict=True))


def take_step(plan: Plan, state: State, rows: Tensor, hidden: Tensor) -> float:
    """One optimiser step on ``rows``, of which each process computes its share; returns the loss before it."""
    began = time.perf_counter()
    inputs, targets = plan.data.batch(plan.team.share(rows))
    hidden = plan.team.share(hidden)
    for column, (key, (values, present)) in enumerate(inputs.items()):
        inputs[key] = (values, present & ~hidden[:, column])
    batch = state.model.prepare(inputs), targets
    loss = float(state.optimizer.step(closure(state.replica, LOSSES[plan.schema.task], batch)))  # type: ignore[arg-type]
    state.average.update_parameters(state.model)
    state.step += 1
    state.batch += 1
    state.loss_sum += loss * len(rows)
    state.seconds += Replicas(state.replica).largest([time.perf_counter() - began])[0]
    state.monitor.step(loss=loss)
    group = state.optimizer.param_groups[0]
    tuned = {name: float(group[name]) for name in TUNED if name in group}
    _keep(state.steps, {"step": state.step, "seconds": state.seconds, "loss": loss, **tuned})
    return loss


def judge(plan: Plan, state: State) -> dict[str, Any]:
    """End an epoch: validate the averaged model, keep it if it is the best, and return the row of ``metrics.jsonl``."""
    seen = min(state.batch * plan.batch_size, len(plan.positions["train"]))
    valid = plan.positions["valid"]
    out, targets = outputs(state.average.module, plan.data, valid), known_targets(plan.data, valid)
    (loss,) = Replicas(state.replica).mean(float(LOSSES[plan.schema.task](out, targets)))  # one verdict for all
    better = loss < state.best_loss
    state.epoch += 1
    if better:
        state.best_loss, state.best_epoch = loss, state.epoch
        state.best = {name: t.clone() for name, t in state.average.module.state_dict().items()}
    row = {
        "epoch": state.epoch,
        "step": state.step,
        "seconds": state.seconds,
        "train_loss": state.loss_sum / seen,
        "valid_loss": loss,
        "valid_score": score(plan.schema.task, out, targets),
        "best": better,
    }
    state.metrics.append(row)
    state.batch, state.loss_sum = 0, 0.0
    return row


def finished(plan: Plan, state: State) -> bool:
    """Whether the run is over: epochs or seconds used up, no better validation loss for long enough, or diverged."""
    return (
        (plan.epochs is not None and state.epoch >= plan.epochs)
        or out_of_time(plan, state)
        or (plan.patience is not None and state.epoch - state.best_epoch >= plan.patience)
        or diverged(state)
    )


def out_of_time(plan: Plan, state: State) -> bool:
    """Whether the seconds of the plan are used up, be it within an epoch."""
    return plan.seconds is not None and state.seconds >= plan.seconds


def diverged(state: State) -> bool:
    """Whether weights are no numbers any more: no later step can mend that."""
    return not tree.is_finite(list(state.model.parameters()))


def _keep(rows: list[dict[str, Any]], row: dict[str, Any]) -> None:
    """Append a step: every one at first, then every second, fourth, ... of all, never more than a page can show."""
    stride = 1 << ((row["step"] - 1) // MOST_STEPS_KEPT).bit_length()
    if (row["step"] - 1) % stride == 0:
        rows.append(row)
    if len(rows) > MOST_STEPS_KEPT:
        rows[:] = [kept for kept in rows if (kept["step"] - 1) % stride == 0]
