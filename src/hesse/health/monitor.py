"""Watching a training run from beside it: count steps, sample statistics now and then, let the rules speak
once each.

The monitor changes nothing in the run unless its guard is told to. Steps are counted by torch's hooks for all
optimisers, so that wrappers (GradScaler, Lightning, Accelerate, a line search) need no word of it; a loop that updates
its weights by hand calls :meth:`Monitor.step`.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

from torch import Tensor, nn
from torch.optim import Optimizer

from hesse.finding import Finding
from hesse.health import rules
from hesse.health.guard import MODES, Mode
from hesse.health.observer import Observer
from hesse.health.stats import Record, Stats
from hesse.health.summary import HealthReport

__all__ = ["HealthReport", "Monitor", "watch"]


class Monitor:
    """What :func:`watch` returns. See there for the arguments and an example.

    One that is never entered as a context counts by :meth:`step` only.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        every: int | None = None,
        *,
        guard: Mode = "warn",
        writer: Any = None,
    ) -> None:
        self._observer = Observer(model, optimizer, every, writer)
        self._shown = 0
        self.guard = guard

    @property
    def model(self) -> nn.Module:
        """The module that is watched."""
        return self._observer.model

    @property
    def stats(self) -> Stats:
        """What the rules read."""
        self._observer.steps.close()
        return self._observer.stats

    @property
    def steps(self) -> int:
        """The count of steps."""
        return self._observer.steps.count

    @property
    def records(self) -> list[Record]:
        """The samples, oldest first, as JSON objects: see :class:`hesse.health.stats.Stats`."""
        return self.stats.records

    @property
    def findings(self) -> list[Finding]:
        """What was found so far."""
        self._observer.settle()
        return self._observer.findings

    @property
    def guard(self) -> Mode:
        """What happens to a step that would do harm; may be set at any time."""
        return self._observer.guard.mode

    @guard.setter
    def guard(self, mode: Mode) -> None:
        if mode not in MODES:
            raise ValueError(f"guard must be one of {', '.join(map(repr, MODES))}; got {mode!r}.")
        self._observer.guard.mode = mode

    def __enter__(self) -> Self:
        self._observer.attach()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._observer.settle()
        self._observer.release()

    def step(self, loss: Tensor | float | None = None) -> None:
        """Say what the loss of the step was that has just been made, or is about to be made.

        Where no optimiser of torch makes the steps this also counts one: call it after the weights were updated and
        before gradients are zeroed.
        """
        steps = self._observer.steps
        if not steps.by_hooks():
            steps.step()
        if loss is not None:
            self._observer.tell(loss)
        elif not steps.by_hand:
            steps.close()

    def tell(self, loss: Tensor | float) -> None:
        """The loss of the step that was just made, or of one of the batches that it will be made from.

        Never counts a step.
        """
        self._observer.tell(loss)

    def report(self) -> HealthReport:
        """The findings so far, the layers as last seen, and what looks odd but is well."""
        findings, records = list(self.findings), self.records
        notes = [note for speak in rules.NOTES for note in speak(self.stats)]
        return HealthReport(findings, records[-1] if records else None, notes)

    def new_findings(self) -> list[Finding]:
        """Findings not yet returned by this method, to be shown as they come."""
        new = self.findings[self._shown :]
        self._shown += len(new)
        return new

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs, as a JSON object."""
        findings, o = self.findings, self._observer
        return {
            "steps": o.steps.count,
            "records": list(o.stats.records),
            "told": list(o.stats.told),
            "findings": [finding.to_dict() for finding in findings],
            "shown": self._shown,
            "by_hooks": o.steps.seen,
            "meter": o.meter.state_dict(),
            "sensors": {type(sensor).__name__: sensor.state_dict() for sensor in o.sensors},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state``; the model's weights must have been loaded before."""
        o = self._observer
        o.steps.count, o.steps.seen = state["steps"], state["by_hooks"]
        o.stats.records, o.stats.told = list(state["records"]), [list(pair) for pair in state["told"]]
        o.findings = [Finding(**finding) for finding in state["findings"]]
        self._shown = state["shown"]
        o.meter.load_state_dict(state["meter"])
        for sensor in o.sensors:
            if (saved := state["sensors"].get(type(sensor).__name__)) is not None:
                sensor.load_state_dict(saved)
        o.prepare()


def watch(
    model: nn.Module,
    optimizer: Optimizer | None = None,
    every: int | None = None,
    *,
    guard: Mode = "warn",
    writer: Any = None,
) -> Monitor:
    """Watch the gradients of ``model`` while it trains, with any optimiser.

    Args:
        model: the module that is trained; frozen parameters are not watched. It may be wrapped for several processes
            or compiled; layers go by the paths of the model inside.
        optimizer: whose steps count. Without it those of every optimiser count that holds parameters of the model.
        every: steps between samples; the first five, and every tenth of the first 120, are always sampled. Without it
            so few that they cost at most a twentieth of the running time, once the first seconds are over.
        guard: what happens to a step that would do harm, because its gradient is not finite or far longer than the
            history of its layers allows. "warn" logs findings as they arise, None does not; "skip" leaves the step
            out; "stop" raises :class:`~hesse.health.guard.TrainingStopped` before it; "repair" also clips single
            layers to their history, and goes back to the last good state when weights are lost.
        writer: a TensorBoard ``SummaryWriter`` or its like, for the numbers of each layer and the findings.

    Returns:
        A context manager and monitor: ``.step``, ``.report()``, ``.new_findings()``, ``.records``, ``.guard``,
        ``.state_dict()``.

    Raises:
        ValueError: ``every`` is less than 1, or there is no such ``guard``.

    Example:
        Ten sigmoids in a row let nothing through:

        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> parts = [m for _ in range(10) for m in (nn.Linear(8, 8), nn.Sigmoid())]
        >>> model = nn.Sequential(*parts, nn.Linear(8, 1))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> with watch(model, every=10, guard=None) as w:
        ...     for _ in range(10):
        ...         optimizer.zero_grad()
        ...         loss = model(torch.randn(16, 8)).square().mean()
        ...         loss.backward()
        ...         optimizer.step()
        >>> "vanishing" in [finding.kind for finding in w.report().findings]
        True
    """
    return Monitor(model, optimizer, every, guard=guard, writer=writer)
