"""Watching a training run from beside it: count steps, sample statistics now and then, let the rules speak
once each.

The monitor changes nothing in the run. At a sampled step it reads the gradients that the optimiser left in
``p.grad``, and the weights before and after; between samples it only counts. Forward hooks on activations
(and on the model, to know which pass is the training pass) are the only hooks, and they are gone when the
context ends.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hesse.finding import Finding
from hesse.health.rules import PATIENCE, RULES, non_finite
from hesse.health.stats import Record, Stats, find_layers, measure, silent_units

__all__ = ["HealthReport", "Monitor", "watch"]

ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.Threshold, nn.Hardswish, nn.GELU, nn.SiLU)  # those whose units can die
ROWS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)  # a row of the weight, a unit
FIRST = 5  # the first steps are all sampled: young nets change quickly, and bad ones do not live long
KEPT = 300  # records; older ones are thinned, so that a long run's memory and checkpoint stay small


@dataclass(frozen=True)
class HealthReport:
    """Findings so far and the layers as last seen; ``print(report)`` shows both."""

    findings: list[Finding]
    last: Record | None

    @property
    def ok(self) -> bool:
        """Whether no rule has spoken."""
        return not self.findings

    def __str__(self) -> str:
        if self.last is None:
            return "Nothing has been sampled yet."
        loss = "" if self.last["loss"] is None else f", loss {self.last['loss']:.6g}"
        width = max([len("layer"), *map(len, self.last["layers"])])
        keys = "grad_norm", "weight_norm", "update_ratio", "dead"
        verdict = "healthy" if self.ok else f"{len(self.findings)} findings"
        lines = [f"Step {self.last['step']}{loss}: {verdict}"]
        lines.append(f"{'layer':<{width}}" + "".join(f"{key:>14}" for key in keys))
        for path, layer in self.last["layers"].items():
            cells = ("" if layer[key] is None else f"{layer[key]:.3g}" for key in keys)
            lines.append((f"{path:<{width}}" + "".join(f"{cell:>14}" for cell in cells)).rstrip())
        return "\n".join([*lines, *(f"- step {finding.step}: {finding}" for finding in self.findings)])


class Monitor:
    """What :func:`watch` returns. See there for the arguments and an example.

    ``records`` holds the samples as JSON-able dicts (see :class:`hesse.health.stats.Stats`), ``steps`` the
    count of steps.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None, every: int = 10) -> None:
        if every < 1:
            raise ValueError(f"every counts steps between samples and must be at least 1; got {every}.")
        self.model = model
        self.optimizer = optimizer
        self.every = every
        self.steps = 0
        self.layers = find_layers(model)
        self.stats = Stats()
        self.findings: list[Finding] = []
        self._shown = 0
        self._order = [path or type(model).__name__ for path, _ in model.named_modules()]
        self._activations = {p: m for p, m in model.named_modules() if isinstance(m, ACTIVATIONS)}
        self._counter: RemovableHandle | None = None
        self._hooks: list[RemovableHandle] = []
        self._before: list[Tensor] | None = None
        self._pending: list[tuple[int, Tensor]] = []  # losses on a device, read with the next sample
        self._listening = False
        self._heard: dict[str, list[Tensor]] = {}  # in this step: units that were silent, a tensor a call
        self._silent: dict[str, list[Tensor]] = {}  # samples in a row for which each unit was silent

    @property
    def records(self) -> list[Record]:
        """The samples, oldest first."""
        return self.stats.records

    def __enter__(self) -> Self:
        if self.optimizer is not None:
            self._counter = self.optimizer.register_step_post_hook(lambda *_: self._advance(None))
        self._prepare()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._release()
        if self._counter is not None:
            self._counter.remove()

    def step(self, loss: Tensor | float | None = None) -> None:
        """Say that the optimiser has made a step, and what its loss was.

        Call it after ``optimizer.step()`` and before gradients are zeroed. With an optimiser given to
        :func:`watch` steps are counted already, and this only tells the loss of the step that was just
        made.
        """
        if self.optimizer is None:
            self._advance(loss)
        elif loss is not None:
            self._tell(loss)

    def report(self) -> HealthReport:
        """The findings so far and the layers as last seen."""
        return HealthReport(list(self.findings), self.records[-1] if self.records else None)

    def new_findings(self) -> list[Finding]:
        """Findings not yet returned by this method, to be shown as they come."""
        new = self.findings[self._shown :]
        self._shown = len(self.findings)
        return new

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs, as a JSON object."""
        return {
            "steps": self.steps,
            "records": list(self.records),
            "findings": [finding.to_dict() for finding in self.findings],
            "shown": self._shown,
            "silent": {path: [count.tolist() for count in counts] for path, counts in self._silent.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state``; the model's weights must have been loaded before."""
        device = self.layers[0].params[0].device if self.layers else torch.device("cpu")
        self.steps = state["steps"]
        self.stats = Stats(list(state["records"]))
        self.findings = [Finding(**finding) for finding in state["findings"]]
        self._shown = state["shown"]
        self._silent = {
            path: [torch.tensor(count, dtype=torch.int32, device=device) for count in counts]
            for path, counts in state["silent"].items()
        }
        self._prepare()

    def _due(self, step: int) -> bool:
        return step <= FIRST or step % self.every == 0

    def _advance(self, loss: Tensor | float | None) -> None:
        self.steps += 1
        if loss is not None:
            loss = self._read(loss)
        bad = isinstance(loss, float) and not math.isfinite(loss)
        if self._due(self.steps) or bad:
            self._sample(loss)
        elif isinstance(loss, Tensor):
            self._pending.append((self.steps, loss))
        self._prepare()

    def _tell(self, loss: Tensor | float) -> None:
        """The loss of the step that the optimiser's hook has already counted."""
        value = self._read(loss)
        if self.records and self.records[-1]["step"] == self.steps:
            self.records[-1]["loss"] = float(value)
            self._judge()
        elif isinstance(value, Tensor):
            self._pending.append((self.steps, value))
        elif not math.isfinite(value):
            self._sample(value)

    def _read(self, loss: Tensor | float) -> Tensor | float:
        """A number at once where that costs nothing; a tensor on another device waits for the next sample."""
        if isinstance(loss, Tensor) and loss.device.type != "cpu":
            return loss.detach().clone()
        return float(loss.detach() if isinstance(loss, Tensor) else loss)

    def _sample(self, loss: Tensor | float | None) -> None:
        self._count_silence()
        fractions = {path: torch.cat(c).ge(PATIENCE).float().mean() for path, c in self._silent.items()}
        earlier, self._pending = self._pending, []
        losses, layers = measure(self.layers, self._before, fractions, [*(x for _, x in earlier), loss])
        for (step, _), value in zip(earlier, losses[:-1], strict=True):
            if value is not None and not math.isfinite(value):
                self._say(non_finite(Stats([{"step": step, "loss": value, "layers": {}}])))
        known = {path: layers[path] for path in self._order if path in layers}
        self.records.append({"step": self.steps, "loss": losses[-1], "layers": known})
        self._judge()
        if len(self.records) > KEPT:
            self.records[: KEPT // 2] = self.records[: KEPT // 2 : 2]

    def _judge(self) -> None:
        for rule in RULES:
            self._say(rule(self.stats))

    def _say(self, findings: list[Finding]) -> None:
        said = {(finding.kind, finding.where) for finding in self.findings}
        self.findings += [finding for finding in findings if (finding.kind, finding.where) not in said]

    def _prepare(self) -> None:
        """Copies of the weights, and hooks, before a step that will be sampled, and only then."""
        self._release()
        if not self._due(self.steps + 1):
            return
        self._before = [p.detach().clone() for layer in self.layers for p in layer.params]
        self._hooks.append(self.model.register_forward_pre_hook(self._start_listening))
        for path, module in self._activations.items():
            self._hooks.append(module.register_forward_hook(self._listener(path)))
        self._hooks.append(self.model.register_forward_hook(self._stop_listening))

    def _release(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._before = None
        self._heard = {}

    def _start_listening(self, *_: Any) -> None:
        self._listening = self.model.training and torch.is_grad_enabled() and not self._heard

    def _stop_listening(self, *_: Any) -> None:
        self._listening = False

    def _listener(self, path: str) -> Any:
        def listen(module: nn.Module, args: Any, output: Any) -> None:
            # Inside vmap or jvp, outputs are wrappers that must not outlive the call.
            if self._listening and not torch._C._functorch.is_functorch_wrapped_tensor(output):
                silent = silent_units(output)
                if silent is not None:
                    self._heard.setdefault(path, []).append(silent)

        return listen

    def _count_silence(self) -> None:
        if not self._activations:  # functional ones leave their mark: units without any gradient
            for layer in self.layers:
                grads = [p.grad for p in layer.params if p.grad is not None]
                if grads and isinstance(layer.module, ROWS):
                    rows = torch.cat([grad.reshape(grad.shape[0], -1) for grad in grads], 1)
                    self._heard[layer.path] = [(rows == 0).all(1)]
        for path, heard in self._heard.items():
            counts = self._silent.get(path, [])
            fresh = [c.shape for c in counts] != [h.shape for h in heard]
            if fresh:
                counts = [torch.zeros(h.shape, dtype=torch.int32, device=h.device) for h in heard]
            self._silent[path] = [torch.where(h, c + 1, 0) for c, h in zip(counts, heard, strict=True)]


def watch(model: nn.Module, optimizer: torch.optim.Optimizer | None = None, every: int = 10) -> Monitor:
    """Watch the gradients of ``model`` while it trains, with any optimiser.

    Args:
        model: the module that is trained; frozen parameters are not watched.
        optimizer: steps are counted by its hooks. Without it, call ``w.step(loss=loss)`` after each step.
        every: steps between samples. The first five steps and those with a NaN loss are always sampled.

    Returns:
        A context manager and monitor: ``.step``, ``.report()``, ``.new_findings()``, ``.records``,
        ``.state_dict()``.

    Raises:
        ValueError: ``every`` is less than 1.

    Example:
        Ten sigmoids in a row let nothing through:

        >>> _ = torch.manual_seed(0)
        >>> parts = [m for _ in range(10) for m in (nn.Linear(8, 8), nn.Sigmoid())]
        >>> model = nn.Sequential(*parts, nn.Linear(8, 1))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> with watch(model) as w:
        ...     for _ in range(10):
        ...         optimizer.zero_grad()
        ...         loss = model(torch.randn(16, 8)).square().mean()
        ...         loss.backward()
        ...         optimizer.step()
        ...         w.step(loss=loss)
        >>> [(finding.kind, finding.where) for finding in w.report().findings]
        [('vanishing', '0')]
    """
    return Monitor(model, optimizer, every)
