"""What the monitor does at a step: before it, after it, and when it is over.

At a sampled step gradients are read just before the update, weights around it, and sensors listen to the forward
pass; between samples there is counting, and a glance at one small gradient for NaN. What was read waits on the device
until the step is over and its loss is known; then it becomes a record, and the rules speak about it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from hesse.finding import Finding
from hesse.health import rules
from hesse.health.guard import Guard
from hesse.health.norms import Meter
from hesse.health.origin import Origin, find_origin, finite, loss_operation
from hesse.health.passes import Passes
from hesse.health.records import Made, mean, moved, number, record, refused, thinned, unusual
from hesse.health.sampling import Pace
from hesse.health.sensors import SENSORS, Calls, Sensor
from hesse.health.stats import Record, Stats, anatomy, find_layers, same_parameters, unwrapped
from hesse.health.steps import Steps
from hesse.health.teams import Team

__all__ = ["Observer"]

PATIENCE = 10  # steps before the rules are asked again without a new record
WAITING = 50  # losses without a step: there will be none

log = logging.getLogger("hesse.health")


class Observer:
    """Listens to steps and passes, and keeps what comes of it: ``stats`` and ``findings``.

    Attributes:
        attached: whether hooks count steps; if not, they are counted by hand.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer | None, every: int | None, writer: Any) -> None:
        inner = unwrapped(model)
        self.model = model
        self.writer = writer
        self.layers = find_layers(model)
        self.stats = Stats(anatomy=anatomy(model))
        self.findings: list[Finding] = []
        self.guard = Guard(inner)
        self.team = Team(model)
        self.meter = Meter(self.layers)
        device = self.layers[0].params[0].device if self.layers else torch.device("cpu")
        self.pace = Pace(every, device, agree=self.team.size > 1)
        self.calls = Calls(inner)
        self.sensors: list[Sensor] = [sensor(inner, self.layers, self.calls) for sensor in SENSORS]
        self.steps = Steps(model, optimizer, lambda: self.passes.count, self)
        self.passes = Passes(model, self.calls, self.sensors, self.steps.pass_begins)
        self.attached = False
        self._due = False  # whether the step under way is sampled
        self._updater = "the update"  # name of what made the last update
        self._made = Made()  # what is known of the open step
        self._before: Made | None = None  # what was read of a step that was told of before it was made
        self._losses: list[Tensor | float] = []  # of it, or of one to come
        self._judged = 0  # step at which the rules were last asked
        self._pending: list[tuple[int, Tensor]] = []  # losses on a device, read with the next sample

    def attach(self) -> None:
        """Hooks on."""
        self.attached = True
        self.steps.attach()
        self.passes.attach()
        self.prepare()

    def release(self) -> None:
        """Hooks off, copies freed."""
        self.steps.release()
        self.passes.release()
        self.meter.clear()
        self.meter.release()
        self.attached = False

    def tell(self, loss: Tensor | float) -> None:
        """A loss, of the step that was just made or of one to come."""
        self._losses.append(number(loss))
        origin = self._made.origin
        if origin is not None and origin.stage == "loss" and origin.operation is None and isinstance(loss, Tensor):
            origin.operation = loss_operation(loss)
        if self.steps.open:
            if not (self.steps.by_hand and self.attached):  # an optimiser's step may still follow
                self.steps.close()
        elif len(self._losses) >= WAITING and isinstance(last := self._losses[-1], float) and not math.isfinite(last):
            self._made = Made(sampled=True)  # a GradScaler that never finds a scale, for instance
            self.meter.gradients()
            self.meter.moved()
            self.over()

    def settle(self) -> None:
        """Close the last step, and hear what the guard and the other processes have to say."""
        self.steps.close()
        if self.pace.every is None and self.stats.records and self.steps.count >= self._judged + PATIENCE:
            self._judge()  # the last sample may be long ago, and losses were told since
        self._say(self.team.read())
        self._fetch()

    # ---- what steps tell (see hesse.health.steps.Listener) -------------------------------------------------

    def before(
        self, optimizer: Optimizer, closure: Callable[..., Any] | None, first: bool
    ) -> Callable[..., Any] | None:
        """An optimiser is about to step."""
        if first:
            if self._before is not None or self._made.origin is not None or self._made.skipped:
                self._made, self._before = self._before or Made(), None  # a step that failed leaves nothing behind
            if self._due:
                self._refresh()
        if closure is not None:
            if self._due if first else self._made.sampled:
                self.meter.keep(self._held(optimizer))
            return self._inside(optimizer, closure, first)
        self._ready(first)
        if self._due if first else self._made.sampled:
            self.meter.keep(self._held(optimizer))
            self.meter.gradients(self._held(optimizer, first), getattr(optimizer, "grad_scale", None))
        if self.guard.acts:
            self.guard.before(self.steps.count + first, self._of(optimizer), optimizer)
            self._made.skipped |= self.guard.skipped
        return None

    def after(self, optimizer: Optimizer, closed: bool, first: bool) -> None:
        """An optimiser has stepped."""
        if closed:
            if not _reads_once(optimizer):
                self._ready(first, updated=True)
            if self._due if first else self._made.sampled:
                self.meter.gradients(self._held(optimizer, first))
            self.guard.after(self.steps.count + first, self._of(optimizer), optimizer)
            self._made.skipped |= self.guard.skipped
        if self._due if first else self._made.sampled:
            self.meter.moved(self._held(optimizer, first))
            for group in optimizer.param_groups:
                self._made.rates |= {id(p): group.get("lr") for p in group["params"]}
        self._updater = type(optimizer).__name__

    def counted(self, by_hand: bool) -> None:
        """A step was made."""
        if by_hand:
            self._made = Made()
            if self._due:
                self._refresh()
            self._ready(True, updated=True)
            if self._due:
                self.meter.gradients()
                self.meter.moved()
        made = self._made
        made.sampled = self._due
        if made.sampled and not made.readings and self.passes.expected:
            made.readings = [(sensor, sensor.read()) for sensor in self.sensors]
            made.rows, made.autocast = self.passes.rows, self.passes.autocast
        self.prepare()

    def heard(self, again: bool) -> None:
        """Steps by hand were told before the optimiser's, or of batches that made none: only those that moved
        something stand.
        """
        if again:
            self._due, self._before = self._made.sampled, self._made
            self.meter.clear()
        if self.stats.records and not any(moved(record) for record in self.stats.records):
            self._losses[:0] = [loss for _, loss in self.stats.told]
            self.stats.records.clear()
            self.stats.told.clear()
            self.steps.count = 0
            self._due = True

    def over(self) -> None:
        """The last step is over: its loss, and its numbers if it was sampled."""
        made, losses = self._made, self._losses
        self._made, self._losses = Made(), []
        loss = mean(losses) if len(losses) != 1 else losses[0]
        odd = isinstance(loss, float) and unusual(loss, self.stats.told)
        if isinstance(loss, float) and not math.isfinite(loss):
            self.guard.told(loss)
            made.origin = made.origin or self._trace([], updated=True)
            if not made.sampled:
                self.meter.gradients()
                self.meter.moved()
                made.sampled = made.late = True
        if made.sampled:
            began = self.pace.now() if self.pace.every is None else 0.0
            self._read(made, loss)
            if self.pace.every is None:
                self.pace.spent(self.pace.now() - began)
        elif isinstance(loss, Tensor):
            self._pending.append((self.steps.count, loss))
        elif loss is not None:
            self.stats.told.append([self.steps.count, loss])
            if odd:
                self._judge()
        if odd:
            self.pace.ask()
            self._decide()
        self._fetch()

    # ---- sampling and judging ------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Before the next step: decide whether it will be sampled, and listen if so."""
        self.pace.ended(self.steps.count, self._made.sampled)
        self._decide()

    def _decide(self) -> None:
        self._due = self.pace.due(self.steps.count + 1)
        if self._due and not self.attached:
            self.passes.attach()
        elif not self.attached:
            self.passes.release()
        self.passes.expect(self._due)
        if self._due:
            if not self.steps.by_hooks():
                self.meter.keep()
            self.pace.begins()

    def _refresh(self) -> None:
        """Layers anew where parameters were frozen, thawed, materialised or exchanged."""
        layers = find_layers(self.model)
        if not same_parameters(layers, self.layers):
            self.layers, self.meter = layers, Meter(layers)
            self.stats.anatomy = anatomy(self.model)

    def _held(self, optimizer: Optimizer, strangers: bool = False) -> list[int] | None:
        """Which of the layers' parameters an optimiser steps; None for all. With ``strangers`` also those that none
        is known to step: they may have been forgotten.
        """
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        others = {id(p) for other in self.steps.others(optimizer) for g in other.param_groups for p in g["params"]}
        which = [i for i, p in enumerate(self.meter.params) if id(p) in held or (strangers and id(p) not in others)]
        return None if len(which) == len(self.meter.params) else which

    def _of(self, optimizer: Optimizer) -> list[Any]:
        """The layers that an optimiser steps."""
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        return [layer for layer in self.layers if any(id(p) in held for p in layer.params)]

    def _inside(self, optimizer: Optimizer, closure: Callable[..., Any], first: bool) -> Callable[..., Any] | None:
        """What is done between gradient and update when both happen in a step with a closure.

        torch's optimisers read gradients once, after the closure. Any other may call it often, or take derivatives of
        its own: its step is judged when it was made, and taken back if it was bad.
        """
        if not _reads_once(optimizer):
            if self.guard.acts:
                self.guard.keep(self.steps.count + first, optimizer)
            return None

        def judged(*args: Any, **kwargs: Any) -> Any:
            loss = closure(*args, **kwargs)
            self._ready(first)
            if self.guard.acts:
                self.guard.before(self.steps.count + first, self._of(optimizer), optimizer)
            return loss

        return judged

    def _ready(self, first: bool, updated: bool = False) -> None:
        """Gradients are there: how the last step turned them, and a glance at the one that NaN reaches first.

        If it is there, the pass is run again, before the weights are updated unless they are ``updated`` already.
        """
        if first:
            self.meter.turn()
        grad = self.meter.glance()
        if (grad is None or math.isfinite(grad)) and not self.passes.lost:
            return
        bad = [layer.path for layer in self.layers if not all(p.grad is None or finite(p.grad) for p in layer.params)]
        if bad or self.passes.lost:
            self._due = True
            self._made.origin = self._trace(bad, updated)

    def _trace(self, layers: Sequence[str], updated: bool) -> Origin | None:
        """Where it arose, unless that was said already."""
        if any(record.get("origin") for record in self.stats.records[-3:]):
            return None
        self.passes.paused = True
        try:
            updater = None if updated else self._updater
            return find_origin(unwrapped(self.model), list(self.passes.calls), updater, layers)
        finally:
            self.passes.paused = False

    def _read(self, made: Made, loss: Tensor | float | None) -> None:
        """The record of a sampled step, by one transfer; then the rules."""
        earlier, self._pending = self._pending, []
        told = [value for _, value in earlier] + ([loss] if isinstance(loss, Tensor) else [])
        new, values = record(self.steps.count, made, self.meter, told)
        self.stats.told += [[step, value] for (step, _), value in zip(earlier, values, strict=False)]
        new["loss"] = values[-1] if isinstance(loss, Tensor) else loss
        if new["loss"] is not None:
            self.stats.told.append([self.steps.count, new["loss"]])
        if self.steps.by_hand and refused(new):
            self.steps.count -= 1
            return
        order = {path: i for i, path in enumerate(self.stats.anatomy)}
        new["layers"] = dict(sorted(new["layers"].items(), key=lambda item: order.get(item[0], len(order))))
        for path, part in self.calls.anatomy.items():
            self.stats.anatomy.setdefault(path, part)
        self.stats.records.append(new)
        self.team.post(self.steps.count, self.meter.checks)
        self._judge()
        self._say(self.team.read())
        self._write(new)
        thinned(self.stats)

    def _judge(self) -> None:
        """What the rules say of all that is known."""
        self._judged = self.steps.count
        for rule in rules.RULES:
            self._say(rule(self.stats))

    def _fetch(self) -> None:
        """What the guard did."""
        if self.guard.said:
            said, self.guard.said = self.guard.said, []
            self._say(said)

    def _say(self, findings: Sequence[Finding]) -> None:
        said = {(finding.kind, finding.where) for finding in self.findings}
        for finding in findings:
            guarded = finding.kind == "guard"
            if (finding.kind, finding.where) in said and not guarded:
                continue
            said.add((finding.kind, finding.where))
            self.findings.append(finding)
            if self.guard.mode is not None and (guarded or finding.severity != "info"):
                log.warning("step %s: %s", finding.step, finding)
            if hasattr(self.writer, "add_text"):
                self.writer.add_text("hesse/findings", f"step {finding.step}: {finding}", finding.step)

    def _write(self, new: Record) -> None:
        """Scalars of each layer to a TensorBoard writer or its like."""
        if self.writer is None:
            return
        for path, layer in new["layers"].items():
            for key, value in layer.items():
                if isinstance(value, int | float) and math.isfinite(value):
                    self.writer.add_scalar(f"hesse/{path}/{key}", value, new["step"])


def _reads_once(optimizer: Optimizer) -> bool:
    """Whether a step with a closure is the closure, then the update."""
    return type(optimizer).__module__.startswith("torch.optim.") and not isinstance(optimizer, LBFGS)
