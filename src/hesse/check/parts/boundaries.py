"""Where a gradient goes wrong: every call of one real backward pass, held against differences of that call alone.

A wrong backward spoils all gradients upstream of it, and its culprit often owns no parameter, so parameters
cannot tell where it sits. Boundaries can: with the gradient that arrived at the outputs of a module or a custom
Function, the gradients that left by its inputs and parameters are its vector-Jacobian product, right or wrong by
itself. What is compared comes from the real pass, so hooks, in-place edits and stale values are seen. A call that
was found wrong is excused inside the modules that contain it (:mod:`hesse.check.passes.replay`), which are then
judged by what else they do.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hesse.check.differences import Probe, Slope, own_scales
from hesse.check.naming.kinds import Case
from hesse.check.passes.calls import Call, gradients_of, inside, real
from hesse.check.passes.functions import FunctionCall
from hesse.check.passes.recording import LOSS, Recorder
from hesse.check.passes.replay import Replay
from hesse.check.subject import Subject

__all__ = ["Culprit", "Group", "Judge", "taken_apart"]

FEW = 6  # calls of one Function in one module that are looked at
FLAT = 0.2  # a function most of whose outputs do not move under small moves, though they do under large ones, is flat


@dataclass(frozen=True)
class Group:
    """Some of what a call is differentiated by: in words, the live tensors and what the backward gave."""

    words: str
    tensors: dict[str, Tensor]
    grads: dict[str, Tensor]


@dataclass(frozen=True)
class Culprit:
    """Calls whose own vector-Jacobian product is wrong.

    Args:
        calls: of one module, or of one Function in one module.
        replay: what was held inside while they were judged.
        wrong: the groups that are wrong, with the slopes that show it.
        groups: all groups that were compared.
        evaluate: the outputs times the gradients that arrived at them.
        flat: whether the function is constant almost everywhere, and the gradient is not zero.
    """

    calls: tuple[Call, ...]
    replay: Replay
    wrong: tuple[tuple[Group, tuple[Slope, ...]], ...]
    groups: tuple[Group, ...]
    evaluate: Callable[[], Tensor]
    flat: bool

    @property
    def path(self) -> str:
        return self.calls[0].path

    @property
    def key(self) -> tuple[Any, ...]:
        return self.calls[0].key

    @property
    def wrt(self) -> str:
        return " and ".join(group.words for group, _ in self.wrong)

    @property
    def slopes(self) -> list[Slope]:
        return [slope for _, slopes in self.wrong for slope in slopes]

    @property
    def error(self) -> float:
        return max((slope.error for slope in self.slopes if slope.wrong), default=1.0)

    @property
    def beside(self) -> bool:
        """Whether all that is wrong is with respect to arguments of a Function on which, by themselves, it does not
        depend at all: they may stand for something that it reads elsewhere, as the flattened parameters of a module.
        """
        if self.flat or not isinstance(self.calls[0], FunctionCall):
            return False
        return all(s.numeric == 0 for s in self.slopes) and not any(self._moves(group) for group, _ in self.wrong)

    def _moves(self, group: Group) -> bool:
        """Whether anything at all changes when the tensors of a group go a long way."""
        before = {name: t.detach().clone() for name, t in group.tensors.items()}
        scales = own_scales(group.tensors)
        centre = self.evaluate()
        try:
            with torch.no_grad():
                for name, t in group.tensors.items():
                    t.copy_(-before[name] + scales[name])
            return not torch.equal(self.evaluate(), centre)
        finally:
            with torch.no_grad():
                for name, t in group.tensors.items():
                    t.copy_(before[name])

    def case(self, eps: float, batch: int | None) -> Case:
        """What is needed to name the fault."""
        tensors = {name: t for group in self.groups for name, t in group.tensors.items()}
        grads = {name: g for group in self.groups for name, g in group.grads.items()}
        return Case(tensors, grads, self.evaluate, eps, batch)


class Judge:
    """Judges the calls of a recorded pass.

    Args:
        recorder: a recorded and differentiated pass.
        params: by name, as they were in that pass.
        grads: the gradients in that pass, by name: of parameters and of inputs.
        eps: rounding unit of the coarsest number format.
        generator: where random directions come from.
        unedited: a context after which parameters and buffers are what they were before.
    """

    def __init__(
        self,
        recorder: Recorder,
        params: Mapping[str, Tensor],
        grads: Mapping[str, Tensor],
        eps: float,
        generator: torch.Generator,
        unedited: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self.recorder = recorder
        self.params = {name: params[name] for name in grads if name in params}
        self.grads = dict(grads)
        self.eps = eps
        self.generator = generator
        self.unedited = unedited
        # What no operation was seen to use is used where it belongs.
        self.uses = {name: recorder.uses.get(id(p)) or {name.rpartition(".")[0]} for name, p in self.params.items()}
        self._own: dict[str, Tensor] = {}  # gradients of parameters by way of the loss function alone

    def functions(self) -> dict[tuple[Any, ...], list[Call]]:
        """Calls of custom Functions that a gradient arrived at, by Function and module."""
        groups: dict[tuple[Any, ...], list[Call]] = {}
        for call in self.recorder.functions.calls:
            if any(g is not None for g in call.out_grads) and call.inputs and not call.declared:
                groups.setdefault((call.cls, call.path), []).append(call)
        return {
            key: calls if len(calls) <= FEW else [calls[i * (len(calls) - 1) // (FEW - 1)] for i in range(FEW)]
            for key, calls in groups.items()
        }

    def modules(self) -> dict[str, list[Call]]:
        """Calls of modules that a gradient arrived at, by path, innermost first."""
        groups: dict[str, list[Call]] = {}
        for call in self.recorder.calls:
            if any(g is not None for g in call.out_grads) and not call.declared:
                groups.setdefault(call.path, []).append(call)
        return {path: calls for path, calls in groups.items() if not any(call.twice for call in calls)}

    def judge(self, calls: Sequence[Call], replay: Replay, flat: bool = False) -> Culprit | None:
        """What is wrong with the calls of one module or Function, where ``replay`` is excused; None if nothing.

        Args:
            flat: look also whether the function is constant almost everywhere.
        """

        evaluate = self.evaluator(calls, replay)
        groups = self.groups(calls, replay)
        if flat and self._flat(evaluate, groups):
            wrong = tuple((group, ()) for group in groups if any(bool(g.any()) for g in group.grads.values()))
            return Culprit(tuple(calls), replay, wrong, tuple(groups), evaluate, True)
        found = []
        for group in groups:
            slopes = self.slopes(evaluate, group)
            if any(slope.wrong for slope in slopes):
                found.append((group, tuple(slopes)))
        return Culprit(tuple(calls), replay, tuple(found), tuple(groups), evaluate, False) if found else None

    def evaluator(self, calls: Sequence[Call], replay: Replay) -> Callable[[], Tensor]:
        """The outputs of the calls times the gradients that arrived, as a function that leaves no trace."""

        def evaluate() -> Tensor:
            with self.unedited():
                return torch.cat([replay.weighted(call).detach() for call in calls])

        return evaluate

    def slopes(self, evaluate: Callable[[], Tensor], group: Group) -> list[Slope]:
        """Slopes along a few directions in the tensors of a group."""
        scales = own_scales(group.tensors)
        probe = Probe(evaluate, list(group.tensors.values()), list(scales.values()), self.eps, self.generator)
        return probe.slopes([group.grads[name] for name in group.tensors])

    def groups(self, calls: Sequence[Call], replay: Replay) -> list[Group]:
        """What the calls were differentiated by: inputs, own parameters, parameters of the modules inside."""
        groups: list[Group] = []
        names = [_argument_names(call) for call in calls]
        words = sorted({name for some in names for name in some})
        for word in words or ["its input"]:
            tensors: dict[str, Tensor] = {}
            grads: dict[str, Tensor] = {}
            for k, call in enumerate(calls):
                for i, (x, g) in enumerate(zip(call.inputs, call.in_grads, strict=True)):
                    if not words or names[k][i] == word:
                        name = f"{k}.{i}" if len(calls) > 1 or len(call.inputs) > 1 else "input"
                        tensors[name] = real(x)
                        grads[name] = torch.zeros_like(tensors[name]) if g is None else real(g).to(tensors[name])
            alone = len({len(some) for some in names}) == 1 and len(tensors) == len(calls) and len(words) < 2
            words_ = "its input" if alone and len(calls[0].inputs) == 1 else word if words else "its inputs"
            groups.append(Group(words_, tensors, grads))
        if isinstance(calls[0], FunctionCall):
            return [group for group in groups if group.tensors]
        path = calls[0].path
        held = [key[1] for key in replay.keys if key[0] == "module" and key[1] != path and inside(key[1], path)]
        within: dict[str, Tensor] = {}
        for name, p in self.params.items():
            uses = self.uses[name] & {LOSS} if path == LOSS else self.uses[name] - {LOSS}
            excused = any(inside(use, other) for use in uses for other in held) or id(p) in self.recorder.private
            if uses and not excused and all(inside(use, path) for use in uses):
                within[name] = p
        grads = {name: real(self._share(name, path)) for name in within}
        within = {name: real(p.detach()) for name, p in within.items()}
        own = [name for name in within if name.rpartition(".")[0] == path or path == LOSS]
        below = {name: p for name, p in within.items() if name not in own}
        groups += [Group(name.rpartition(".")[2], {name: within[name]}, grads) for name in own]
        groups.append(Group("the parameters below", below, grads))
        return [group for group in groups if group.tensors]

    def _share(self, name: str, path: str) -> Tensor:
        """The gradient of a parameter by way of a module, or of the loss function: where both use it, it is a sum."""
        if LOSS not in self.uses[name] or self.uses[name] == {LOSS}:
            return self.grads[name]
        if name not in self._own:
            (loss,) = [call for call in self.recorder.calls if call.path == LOSS]
            y = sum(
                ((real(y) * real(w)).sum() for y, w in zip(loss(), loss.out_grads, strict=True) if w is not None),
                torch.zeros(()),
            )
            self._own[name] = gradients_of(y, [self.params[name]])[0]
        return self._own[name] if path == LOSS else self.grads[name] - self._own[name]

    def _flat(self, evaluate: Callable[[], Tensor], groups: Sequence[Group]) -> bool:
        """Whether the function does not move in small steps though it does in large ones, against its gradient."""
        tensors = {name: t for group in groups for name, t in group.tensors.items()}
        if not any(bool(g.any()) for group in groups for name, g in group.grads.items() if name in tensors):
            return False
        scales = own_scales(tensors)
        probe = Probe(evaluate, list(tensors.values()), list(scales.values()), self.eps, self.generator)
        counts = []
        for length in (max(1e-4, 16 * self.eps), 1.0):
            changed = torch.zeros_like(probe.centre, dtype=torch.bool)
            for _ in range(3):
                change = (probe.at(probe.random_direction(), length) - probe.centre).abs()
                changed |= change > 4 * probe.rounding
            counts.append(int(changed.sum()))
        probe.restore()
        return counts[1] > 0 and counts[0] <= FLAT * counts[1]


def taken_apart(
    subject: Subject, context: AbstractContextManager[Any] | None = None, silent: bool = False, protect: bool = False
) -> Judge:
    """The pass taken apart and differentiated, after a call elsewhere.

    Args:
        context: inside which that happens.
        silent, protect: as for :class:`hesse.check.passes.recording.Recorder`.
    """
    with context or nullcontext(), subject.unedited():
        subject.stir()
        recorder, loss = subject.record(silent, protect)
        grads = recorder.differentiate(loss, list(subject.tensors.values()))
    subject.eps = max([subject.eps, *(torch.finfo(dtype).eps for dtype in recorder.operations.dtypes)])
    named = dict(zip(subject.tensors, grads, strict=True))
    params = dict(subject.model.named_parameters()) if subject.model is not None else {}
    return Judge(recorder, params, named, subject.eps, subject.generator, subject.unedited)


def _argument_names(call: Call) -> list[str]:
    """Names of the arguments of a Function that it was differentiated by; none for a module's."""
    if not isinstance(call, FunctionCall):
        return []
    names = list(inspect.signature(call.cls.forward).parameters)
    names = names[1:] if call.cls.setup_context is torch.autograd.Function.setup_context else names
    names = [*names, *(f"argument {i}" for i in range(len(names), len(call.args)))][: len(call.args)]
    return [name for name, asked in zip(names, call.masks[0], strict=True) if asked]
