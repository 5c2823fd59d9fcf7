"""The script that people have instead of a monitor: fixed numbers on gradient norms, NaN, zeros after ReLU."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Thresholds"]

SMALL, LARGE, SILENT = 1e-6, 1e2, 0.5


@dataclass(frozen=True)
class Said:
    """As much of a finding as a script says."""

    kind: str
    where: str
    step: int
    severity: str = "warning"


class Thresholds:
    """Used as ``hesse.watch`` is; looks at every step, says each thing once."""

    def __init__(self, model: nn.Module, optimizer: Any = None, every: int | None = None, guard: Any = None) -> None:
        self.model, self.count, self.findings = model, 0, list[Said]()
        self.handles: list[Any] = []
        self.zeros: dict[str, float] = {}

    def __enter__(self) -> Thresholds:
        for path, module in self.model.named_modules():
            if isinstance(module, nn.ReLU):
                self.handles.append(module.register_forward_hook(self._zeros_at(path)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _zeros_at(self, path: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            self.zeros[path] = float((output == 0).float().mean())

        return hook

    def step(self, loss: Any = None) -> None:
        self.count += 1
        if loss is not None and not math.isfinite(float(loss)):
            self._say("non_finite", "")
        for where, module in self.model.named_modules():
            own = [p for p in module.parameters(recurse=False) if p.requires_grad]
            if own:
                self._look(where, [p.grad for p in own if p.grad is not None])
        for path, share in self.zeros.items():
            if share > SILENT:
                self._say("dead_units", path)

    def _look(self, where: str, grads: list[Tensor]) -> None:
        if not grads:
            return self._say("no_gradient", where)
        values = [g.coalesce().values() if g.is_sparse else g for g in grads]
        norm = float(torch.stack([g.float().norm() for g in values]).norm())
        if not math.isfinite(norm):
            self._say("non_finite", where)
        elif norm < SMALL:
            self._say("vanishing", where)
        elif norm > LARGE:
            self._say("exploding", where)
        return None

    def _say(self, kind: str, where: str) -> None:
        if all((said.kind, said.where) != (kind, where) for said in self.findings):
            self.findings.append(Said(kind, where, self.count))

    def report(self) -> Thresholds:
        return self
