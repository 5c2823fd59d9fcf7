"""One loop for any optimiser: setting up, taking a step, asking whether we are done.

Everything that is remembered between two steps is in one value, :class:`State`, so that saving it is saving the
run, and a resumed run ends bit for bit where an uninterrupted one ends. What is drawn at random is drawn from the
seed and the epoch alone (order of rows, masked modalities) or from torch's generator, whose state is kept too.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from hesse import tree
from hesse.finding import Finding
from hesse.health.monitor import Monitor
from hesse.multimodal import Dataset, FusedModel, Schema
from hesse.multimodal.balance.cure import CureLoss
from hesse.objective import closure
from hesse.objective.replicas import Replicas
from hesse.training.average import averaged
from hesse.training.balance import before_epoch, fit_answer
from hesse.training.build import training_loss
from hesse.training.evaluate import known_targets, mean_score, outputs
from hesse.training.feed import Batch, Feed, Held, skipped_rows
from hesse.training.losses import Scaled, loss_of
from hesse.training.team import Team

__all__ = ["Plan", "State", "batches", "diverged", "epochs", "finished", "judge", "start", "take_step"]

MOST_STEPS_KEPT = 1000
MOST_LISTED = 20  # rows that could not be read
SAMPLED = 25  # steps between the monitor's samples: not a share of the time, so that a resumed run repeats them
TUNED = ("damping", "lr", "momentum", "rejections", "trust_ratio")


@dataclass(frozen=True)
class Plan:
    """What does not change while training: the data, its parts and when to stop.

    Attributes:
        data: the rows that validate and test, and those that train: all of them, or a sample if they are streamed.
        positions: of the rows in ``data``, by part: "train", "valid", "test".
        epochs: most epochs, or None.
        seconds: most seconds of training, evaluation not counted, or None.
        patience: stop after so many epochs without a better validation loss, or None.
        team: the processes that train.
        streamed: where training rows come from if they are not all in ``data``.
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
    streamed: Feed | None = None

    @property
    def feed(self) -> Feed:
        """The training rows."""
        return self.streamed or Held(self.data, self.positions["train"])


@dataclass
class State:
    """What changes: the model and its average, the optimiser, the position, the best so far and the records.

    Attributes:
        replica: the model as it is called: itself, or with gradients that are averaged over several processes.
        epoch, batch, step: how many were completed; ``batch`` of the epoch under way.
        seconds: of training, evaluation not counted.
        waited: how many of these the loop had to wait for rows.
        seen, loss_sum: rows of the epoch under way, and the sum of their losses.
        best_loss, best_epoch, best: the averaged weights with the lowest validation loss; none before that was a
            number.
        metrics, steps: rows of ``metrics.jsonl`` and ``steps.jsonl``.
        earlier: findings in the data and the gradients, before the first step.
        skipped: rows that could not be read while training: the place of each, and for the first of them the finding.
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
    waited: float = 0.0
    seen: int = 0
    loss_sum: float = 0.0
    best_loss: float = math.inf
    best_epoch: int = 0
    best: dict[str, Tensor] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    steps: list[dict[str, Any]] = field(default_factory=list)
    earlier: list[Finding] = field(default_factory=list)
    skipped: dict[str, dict[str, Any] | None] = field(default_factory=dict)

    @property
    def findings(self) -> list[Finding]:
        """All that was found: in the data and the gradients before the first step, then while training."""
        return [*self.earlier, *skipped_rows(self.skipped), *self.monitor.findings]


def start(model: FusedModel, optimizer: torch.optim.Optimizer, replica: nn.Module | None = None) -> State:
    """The state before the first step."""
    return State(model, averaged(model), optimizer, Monitor(model, every=SAMPLED, guard=None), replica or model)


def batches(plan: Plan, state: State) -> Iterator[Batch]:
    """What is left of the epoch under way, with the time that each batch was waited for."""
    feed = plan.feed.batches(state.epoch, state.batch, plan.batch_size, plan.seed, plan.team)
    while True:
        began = time.perf_counter()
        batch = next(feed, None)
        if batch is None:
            return
        for finding in batch.failed:
            listed = len(state.skipped) < MOST_LISTED
            state.skipped.setdefault(finding.where, finding.to_dict() if listed else None)
        if Replicas(state.replica).all(batch.rows > 0):
            yield replace(batch, waited=time.perf_counter() - began)
        else:  # nothing of it could be read, in some process
            state.batch += 1


def take_step(plan: Plan, state: State, batch: Batch) -> float:
    """One optimiser step on a batch, of which each process computes its share; returns the answer's loss before it."""
    began = time.perf_counter()
    if state.seen == 0:
        before_epoch(plan.schema, state.model, plan.data, plan.positions)
    prepared = state.model.prepare(batch.inputs), batch.targets
    loss_fn = training_loss(plan.schema, state.model)
    mine = _rows(batch.targets)
    factor = mine / Replicas(state.replica).mean(mine)[0]  # gradients are averaged over processes, whatever their rows
    shared = loss_fn if factor == 1 else Scaled(loss_fn, factor)
    lowered = loss = float(state.optimizer.step(closure(state.replica, shared, prepared)))  # type: ignore[arg-type]
    if isinstance(loss_fn, CureLoss) and loss_fn.fused is not None:  # a sum of losses: validation's compares with one
        (loss,) = Replicas(state.replica).mean(factor * loss_fn.fused)
    state.average.update_parameters(state.model)
    state.step += 1
    state.batch += 1
    state.seen += batch.rows
    state.loss_sum += loss * batch.rows
    took, waited = Replicas(state.replica).largest([time.perf_counter() - began, batch.waited])
    state.seconds += took + waited
    state.waited += waited
    state.monitor.step(loss=lowered)
    group = state.optimizer.param_groups[0]
    tuned = {name: float(group[name]) for name in TUNED if name in group}
    _keep(state.steps, {"step": state.step, "seconds": state.seconds, "loss": loss, **tuned})
    return loss


def _rows(targets: Tensor | tuple[Tensor, ...] | None) -> int:
    return 0 if targets is None else len(targets[0] if isinstance(targets, tuple) else targets)


def judge(plan: Plan, state: State) -> dict[str, Any]:
    """End an epoch: validate the averaged model, keep it if it is the best, and return the row of ``metrics.jsonl``."""
    valid = plan.positions["valid"]
    fit_answer(plan.schema, state.average.module, plan.data, valid)
    out, targets = outputs(state.average.module, plan.data, valid), known_targets(plan.data, valid)
    (loss,) = Replicas(state.replica).mean(float(loss_of(plan.schema)(out, targets)))  # one verdict for all
    better = loss < state.best_loss
    state.epoch += 1
    for others in Replicas(state.replica).objects(state.skipped) if plan.streamed else ():
        state.skipped |= others
    if better:
        state.best_loss, state.best_epoch = loss, state.epoch
        state.best = {name: t.clone() for name, t in state.average.module.state_dict().items()}
    row = {
        "epoch": state.epoch,
        "step": state.step,
        "seconds": state.seconds,
        "waited": state.waited,
        "train_loss": state.loss_sum / max(1, state.seen),
        "valid_loss": loss,
        "valid_score": mean_score(plan.schema, out, targets),
        "best": better,
    }
    state.metrics.append(row)
    state.batch, state.seen, state.loss_sum = 0, 0, 0.0
    return row


def epochs(
    plan: Plan,
    state: State,
    stepped: Callable[[float], object] = lambda loss: None,
    dealt: Callable[[Plan, State], Iterator[Batch]] = batches,
) -> Iterator[dict[str, Any]]:
    """Train to the end of the plan, and give the row of each epoch when it has ended.

    Args:
        stepped: called after each step with its loss; whatever it raises ends the training between two steps.
        dealt: gives what is left of an epoch.
    """
    while not finished(plan, state):
        for batch in dealt(plan, state):
            loss = take_step(plan, state, batch)
            stepped(loss)
            if _out_of_time(plan, state) or (not math.isfinite(loss) and diverged(state)):
                break
        yield judge(plan, state)


def finished(plan: Plan, state: State) -> bool:
    """Whether the run is over: epochs or seconds used up, no better validation loss for long enough, or diverged."""
    return (
        (plan.epochs is not None and state.epoch >= plan.epochs)
        or _out_of_time(plan, state)
        or (plan.patience is not None and state.epoch - state.best_epoch >= plan.patience)
        or diverged(state)
    )


def _out_of_time(plan: Plan, state: State) -> bool:
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
