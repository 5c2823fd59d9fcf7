"""Stepping in when a step would do harm: leave it out, end the run, or repair and go on.

Every layer is its own measure. The guard remembers how long each layer's gradient was at the last steps; a gradient
that is not finite, or whose logarithm lies so many median absolute deviations above that history that no step of it
came near, is a bad one. Clipping to a fixed norm is the special case of one layer and a history of one number; ZClip
(Kumar 2025) and AutoClip (Seetharaman 2020) clip the whole gradient by its history likewise. Nothing is done silently:
each intervention is a finding.
"""

from __future__ import annotations

import copy
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Literal
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hesse.finding import Finding
from hesse.health.stats import Layer

__all__ = ["MODES", "Guard", "Mode", "TrainingStopped"]

Mode = Literal["warn", "skip", "stop", "repair"] | None
MODES: tuple[Mode, ...] = ("warn", "skip", "stop", "repair", None)

HISTORY = 50  # steps that a layer's gradient is held against
ENOUGH = 20  # steps before anything but NaN is called bad: norms fall quickly in the first ones
FAR = 8.0  # deviations above the median; normal scatter reaches 5 once in a million steps
PATIENCE = 5  # bad steps in a row: then it is no accident
KEEP = 25  # steps between copies of a good state
RETURNS = 3  # to a good state, without KEEP good steps between: then it does not help

SKIP_REMEDY = "Look at the examples of this batch; if it happens often, lower the learning rate or clip gradients."


class TrainingStopped(RuntimeError):
    """The guard ended the run before a step that would have done harm; ``finding`` says why.

    The weights are as they were before the step.

    Example:
        >>> try:
        ...     raise TrainingStopped(Finding("guard", "Net", "The gradient is nan."))
        ... except TrainingStopped as stopped:
        ...     stopped.finding.where
        'Net'
    """

    def __init__(self, finding: Finding) -> None:
        self.finding = finding
        super().__init__(str(finding))

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and worker processes rebuild it from its finding, not from its sentence."""
        return type(self), (self.finding,)


@dataclass
class Verdict:
    """What is wrong with a gradient: nothing, a layer that is not finite, or layers that are far too long."""

    nan: str | None = None
    far: dict[str, tuple[float, float]] = field(default_factory=dict)  # path: norm, and the longest it may be
    whole: tuple[float, float] | None = None


@dataclass
class State:
    """Weights, buffers and the states of optimisers, as they were at a step."""

    step: int
    tensors: list[Tensor]
    optimizers: list[tuple[Optimizer, dict[str, Any]]]


class Guard:
    """Judges gradients before a step, and acts as ``mode`` says."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.mode: Mode = "warn"
        self.said: list[Finding] = []  # interventions, to be fetched by the monitor
        self.skipped = False  # the step that is under way
        self._logs: dict[str, deque[float]] = {}  # of each layer, and of the whole at ""
        self._now: dict[str, float] = {}  # norms that were judged last
        self._optimizers: WeakSet[Optimizer] = WeakSet()
        self._bad = 0  # steps in a row
        self._since = 0  # good steps since the last return
        self._returns = 0
        self._before: State | None = None  # a step that is given a closure
        self._good: State | None = None
        self._candidate: State | None = None  # good if the steps after it are

    @property
    def acts(self) -> bool:
        """Whether gradients are judged at every step."""
        return self.mode not in ("warn", None)

    def before(self, step: int, layers: Sequence[Layer], optimizer: Optimizer) -> None:
        """Judge the gradients of ``layers`` before ``step`` is made.

        Raises:
            TrainingStopped: in mode "stop", of a bad gradient.
        """
        self.skipped = False
        if self.mode == "repair" and self._good is None:
            self._good = self._state(step, optimizer)
        verdict = self._judge(layers)
        bad = verdict.nan is not None or verdict.whole is not None
        if not bad:
            self._fine(step, layers, verdict, optimizer)
            return
        self._bad += 1
        if self.mode == "stop":
            raise TrainingStopped(self._stop(step, verdict))
        if verdict.nan is None and self._bad >= PATIENCE and self.mode == "skip":
            where, (norm, usual) = "model", verdict.whole or (0.0, 0.0)
            self._say(
                step, where, f"Gradients have been as long as {norm:.3g} for {PATIENCE} steps: that is how they are "
                "now, and steps are made again.", "Lower the learning rate or clip gradients.", norm, usual,
            )  # fmt: skip
            self._logs.clear()
            self._bad = 0
            return
        self._leave_out(step, layers, verdict)
        broken = verdict.nan is not None and not _finite(self.model)
        if self.mode == "repair" and (broken or self._bad >= PATIENCE):
            self._go_back(step, broken)

    def keep(self, step: int, optimizer: Optimizer) -> None:
        """Before a step whose gradients come only within it: copies, to take it back by."""
        self.skipped = False
        self._before = self._state(step, optimizer)
        if self.mode == "repair" and self._good is None:
            self._good = self._before

    def after(self, step: int, layers: Sequence[Layer], optimizer: Optimizer) -> None:
        """Judge a step of which :meth:`keep` kept the state before; a bad one is taken back.

        Raises:
            TrainingStopped: in mode "stop", when it was bad; the weights are as they were.
        """
        kept, self._before = self._before, None
        if kept is None:
            return
        verdict = self._judge(layers)
        if verdict.nan is None and not _finite(self.model):
            verdict.nan = type(self.model).__name__
        if verdict.nan is None and verdict.whole is None:
            verdict.far = {}  # the step was made; only whole steps can be taken back
            self._fine(step, layers, verdict, optimizer)
            return
        self._bad += 1
        self._restore(kept)
        if self.mode == "stop":
            raise TrainingStopped(self._stop(step, verdict))
        self._leave_out(step, layers, verdict)
        if self.mode == "repair" and self._bad >= PATIENCE:
            self._go_back(step, broken=False)

    def told(self, loss: float) -> None:
        """The loss of a step: a state from just before a bad one is not a good state."""
        if not math.isfinite(loss):
            self._candidate = None

    def _judge(self, layers: Sequence[Layer]) -> Verdict:
        grads = [[g for p in layer.params if (g := p.grad) is not None] for layer in layers]
        flat = [g.coalesce().values() if g.is_sparse else g for part in grads for g in part]
        self._now = {}
        if not flat:
            return Verdict()
        norms = [n.full_tensor() if hasattr(n, "full_tensor") else n for n in torch._foreach_norm(flat)]
        squares = torch.stack([n.to(norms[0].device, torch.float64) for n in norms]).square().tolist()
        verdict, i = Verdict(), 0
        for layer, part in zip(layers, grads, strict=True):
            total = sum(squares[i : i + len(part)])
            i += len(part)
            if not part:
                continue
            if not math.isfinite(total):
                if all(bool(g.isfinite().all()) for g in part):  # squares left the range, the elements did not
                    total = sum(float(torch.linalg.vector_norm(g, dtype=torch.float64)) ** 2 for g in part)
                else:
                    verdict.nan = verdict.nan or layer.path
                    continue
            self._now[layer.path] = math.sqrt(total)
        if verdict.nan is None:
            self._now[""] = math.sqrt(sum(n * n for n in self._now.values()))
            for path, norm in self._now.items():
                limit = self._limit(path)
                if norm > limit:
                    verdict.far[path] = norm, limit
            verdict.whole = verdict.far.pop("", None)
            if self.mode == "repair" and 0 < len(verdict.far) <= (len(self._now) - 1) / 2:
                verdict.whole = None  # a few layers are clipped; only a batch that throws most of them is left out
        return verdict

    def _limit(self, path: str) -> float:
        """The longest gradient that a layer's history allows."""
        logs = self._logs.get(path, ())
        if len(logs) < ENOUGH:
            return math.inf
        middle = median(logs)
        spread = 1.4826 * median(abs(value - middle) for value in logs)
        return math.exp(max(middle + FAR * max(spread, 0.1), max(logs) + spread))

    def _fine(self, step: int, layers: Sequence[Layer], verdict: Verdict, optimizer: Optimizer) -> None:
        """A good step: remember it, and clip single layers in mode "repair"."""
        self._bad = 0
        self._since += 1
        if self._since >= KEEP:
            self._returns = 0
        for path, norm in self._now.items():
            if norm > 0 and path not in verdict.far:
                self._logs.setdefault(path, deque(maxlen=HISTORY)).append(math.log(norm))
        if self.mode != "repair":
            return
        for layer in layers:
            if layer.path in verdict.far:
                norm, limit = verdict.far[layer.path]
                for p in layer.params:
                    if p.grad is not None:
                        p.grad.mul_(limit / norm)
                self._say(
                    step, layer.path, f"Its gradient, {norm:.3g}, was clipped to {limit:.3g}, the longest that its "
                    "history allows.", SKIP_REMEDY, norm, limit,
                )  # fmt: skip
        if self._candidate is None or step - self._candidate.step >= KEEP:
            if self._candidate is not None:
                self._good = self._candidate
            self._candidate = self._state(step, optimizer)

    def _leave_out(self, step: int, layers: Sequence[Layer], verdict: Verdict) -> None:
        for layer in layers:
            for p in layer.params:
                p.grad = None  # so that an optimiser leaves weights and state alone
        self.skipped = True
        self._candidate = None
        where, message, value, limit = _described(verdict)
        self._say(step, where, f"{message} The step was left out.", SKIP_REMEDY, value, limit)

    def _stop(self, step: int, verdict: Verdict) -> Finding:
        where, message, value, limit = _described(verdict)
        return self._say(step, where, f"{message} The run was stopped before this step.", SKIP_REMEDY, value, limit)

    def _go_back(self, step: int, broken: bool) -> None:
        good = self._good
        why = "The weights were no longer finite" if broken else f"{PATIENCE} steps in a row were bad"
        if good is None or self._returns >= RETURNS:
            self.mode = "warn"
            self._say(
                step, type(self.model).__name__, f"{why}, and going back did not help: the guard only warns from now "
                "on.", "Lower the learning rate, and look at the other findings.", self._returns, RETURNS,
            )  # fmt: skip
            return
        self._restore(good)
        self._returns += 1
        self._bad = self._since = 0
        self._say(
            step, type(self.model).__name__, f"{why}: weights and the optimiser's state are those of step "
            f"{good.step} again. The learning rate is as it was.",
            "If it happens again, lower the learning rate or warm it up.", step, good.step,
        )  # fmt: skip

    def _say(self, step: int, where: str, message: str, remedy: str, value: Any, limit: Any) -> Finding:
        where = type(self.model).__name__ if where == "model" else where
        finding = Finding("guard", where, message, remedy, "info", value, limit, step)
        self.said.append(finding)
        return finding

    def _state(self, step: int, optimizer: Optimizer) -> State:
        self._optimizers.add(optimizer)
        tensors = [t.detach().clone() for t in _tensors(self.model)]
        return State(step, tensors, [(each, copy.deepcopy(each.state_dict())) for each in self._optimizers])

    def _restore(self, state: State) -> None:
        with torch.no_grad():
            for t, value in zip(_tensors(self.model), state.tensors, strict=True):
                t.copy_(value)
        for optimizer, saved in state.optimizers:
            optimizer.load_state_dict(copy.deepcopy(saved))


def _described(verdict: Verdict) -> tuple[str, str, float | str, float | str]:
    if verdict.nan is not None:
        return verdict.nan, "The gradient is not finite.", "nan", "finite"
    norm, limit = verdict.whole or (0.0, 0.0)
    where = max(verdict.far, key=lambda path: verdict.far[path][0] / verdict.far[path][1], default="model")
    return where, f"The gradient, {norm:.3g}, is far longer than its history allows, {limit:.3g}.", norm, limit


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def _finite(model: nn.Module) -> bool:
    return all(bool(p.isfinite().all()) for p in model.parameters())
