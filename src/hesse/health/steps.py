"""What one step of training is: told by torch's hooks for all optimisers, or by hand.

Only the outermost step counts (a line search calls the optimiser that it holds), and several optimisers that share a
model make one step together as long as no training pass comes between them. A step stays open until its loss is known
or the next one begins. Loops that update weights without an optimiser of torch count by hand; a loop that calls
``step(loss)`` before the optimiser's step, or for batches that make none (gradient accumulation, a GradScaler that
found infinities), is told from those as soon as an optimiser's hook has fired.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from hesse.health.stats import unwrapped

__all__ = ["Listener", "Steps", "hooked"]

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class Listener(Protocol):
    """Who wants to know of steps."""

    def before(
        self, optimizer: Optimizer, closure: Callable[..., Any] | None, first: bool
    ) -> Callable[..., Any] | None:
        """An optimiser is about to step; with a closure, gradients come only then. May give another closure."""
        ...

    def after(self, optimizer: Optimizer, closed: bool, first: bool) -> None:
        """It has stepped; ``closed`` tells whether a closure was given, ``first`` that no other did in this step."""
        ...

    def counted(self, by_hand: bool) -> None:
        """A step was made."""
        ...

    def heard(self, again: bool) -> None:
        """The first step of an optimiser is about to be made; ``again``: it was counted by hand, and is no longer."""
        ...

    def over(self) -> None:
        """Nothing more will come of the last step."""
        ...


class Steps:
    """Counts steps of the optimisers that hold parameters of ``model``, or of one of them only.

    Attributes:
        count: steps so far.
        open: whether the last may still get a part or a loss.
        by_hand: whether it was counted by hand.
        seen: whether any optimiser ever stepped: then nothing is counted by hand.
    """

    def __init__(
        self, model: nn.Module, optimizer: Optimizer | None, passes: Callable[[], int], listener: Listener
    ) -> None:
        self.model = model
        self.optimizer = hooked(optimizer)
        self.listener = listener
        self.count = 0
        self.open = self.by_hand = self.seen = False
        self._passes = passes
        self._at = 0  # training passes when the step was made
        self._made: list[Optimizer] = []  # who took part in the open step
        self._inside: list[Optimizer] = []  # whose steps are under way, outermost first
        self._known: Optimizer | None = None  # the last one that counted, and its first parameter
        self._first: Any = None
        self._holders: WeakKeyDictionary[Optimizer, tuple[int, bool]] = WeakKeyDictionary()
        self._hooks: list[RemovableHandle] = []

    def attach(self) -> None:
        """From now on optimisers are heard."""
        self._hooks = [
            register_optimizer_step_pre_hook(self._before),
            register_optimizer_step_post_hook(self._after),
        ]

    def release(self) -> None:
        """No longer."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._inside, self._known, self._first = [], None, None

    def by_hooks(self) -> bool:
        """Whether hooks count, so that nothing is to be counted by hand."""
        return self.seen or self.optimizer is not None

    def others(self, optimizer: Optimizer) -> list[Optimizer]:
        """The other optimisers that hold parameters of the model, as far as they have stepped."""
        return [other for other, (_, holds) in list(self._holders.items()) if holds and other is not optimizer]

    def step(self) -> None:
        """A step was made by hand."""
        self.close()
        self._begin(by_hand=True)

    def close(self) -> None:
        """The last step is over."""
        if self.open:
            self.open = False
            self._made = []
            self.listener.over()

    def pass_begins(self) -> None:
        """A training pass begins, which belongs to the next step unless it runs inside of one."""
        if self.open and not self._inside:
            self.close()

    def _begin(self, by_hand: bool) -> None:
        self.count += 1
        self.open, self.by_hand, self._at = True, by_hand, self._passes()
        self.listener.counted(by_hand)

    def _before(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
        if torch.compiler.is_compiling():
            return None
        if self._inside and not _nested():
            self._inside = []  # a step that ended by an exception
        if self._inside:
            self._inside.append(optimizer)
            return None
        if not self._counts(optimizer):
            return None
        if not self.seen:
            self._first_of_all()
        if self.open and (self._at != self._passes() or optimizer in self._made):
            self.close()
        closure = _closure(args, kwargs)
        self._inside = [optimizer]
        other = self.listener.before(optimizer, closure, not self.open)
        if other is None:
            return None
        if len(args) > 1:
            return (args[0], other, *args[2:]), kwargs
        return args, kwargs | {"closure": other}

    def _after(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._inside or torch.compiler.is_compiling():
            return
        if len(self._inside) > 1:
            self._inside.pop()
            return
        if self._inside[0] is not optimizer:
            return
        self._inside = []
        first = not self.open
        self.listener.after(optimizer, _closure(args, kwargs) is not None, first)
        if first:
            self._begin(by_hand=False)
        self._made.append(optimizer)

    def _first_of_all(self) -> None:
        """No optimiser stepped before: what was counted by hand was this very step, or none."""
        self.seen = True
        again = self.open and self.by_hand and self._at == self._passes()
        if again:
            self.count -= 1
            self.open = False
        self.close()
        self.by_hand = False
        self.listener.heard(again)

    def _counts(self, optimizer: Optimizer) -> bool:
        """Whether its steps count: it is the one that was given, or holds parameters of the model."""
        if self.optimizer is not None:
            return optimizer is self.optimizer
        params = optimizer.param_groups[0]["params"] if optimizer.param_groups else []
        first = params[0] if params else None
        if optimizer is self._known and first is self._first:
            return True
        known = self._holders.get(optimizer)
        if known is None or known[0] != id(first):  # parameters may be exchanged, as Accelerate does
            own = {id(p) for p in unwrapped(self.model).parameters()}
            known = id(first), any(id(p) in own for group in optimizer.param_groups for p in group["params"])
            self._holders[optimizer] = known
        if known[1]:
            self._known, self._first = optimizer, first
        return known[1]


def hooked(optimizer: Optimizer | None) -> Optimizer | None:
    """The optimiser whose hooks fire: that inside a wrapper which never called ``Optimizer.__init__``."""
    while optimizer is not None and not hasattr(optimizer, "_optimizer_step_post_hooks"):
        optimizer = optimizer.optimizer  # type: ignore[attr-defined]
    return optimizer


def _closure(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[..., Any] | None:
    """The closure that a step was given: the gradient is then computed within it."""
    given = args[1] if len(args) > 1 else kwargs.get("closure") if kwargs else None
    return given if callable(given) else None


def _nested() -> bool:
    """Whether another optimiser's step is among the callers of this one's hook."""
    here = sys._getframe(2)  # torch's wrapper of ``step``, which calls the hook
    caller = here.f_back
    while caller is not None and caller.f_code is not here.f_code:
        caller = caller.f_back
    return caller is not None
