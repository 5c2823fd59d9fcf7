"""A pass run again with some of its places held: what remains is what the rest of the pass is responsible for.

A place that is held gives out what it gave in the recorded pass, whatever goes in; and what goes in is weighed
with the gradient that the place sent there, as if that were its derivative. So the function that is left has, to
first order, the very gradient that autograd computed, if all the rest is right: a straight-through estimator that
was declared, or a fault that was found, is excused, and what else is wrong still shows. A stop that is held sends
nothing. If the differences change, its value mattered: a gradient is missing there.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hesse.check.passes.calls import Call, Place, copy_of, differentiable, mapped, products, tensors_of
from hesse.check.passes.functions import FunctionCall, patched
from hesse.check.passes.operations import Operations, Stop
from hesse.check.passes.recording import Recorder, alone, opaque
from hesse.check.straight_through import watching

__all__ = ["Drift", "Replay"]


class Drift(RuntimeError):
    """The pass takes another way than the recorded one: its places cannot be held."""


class Replay:
    """Runs parts of a recorded pass again.

    Args:
        recorder: what was recorded and differentiated.
        keys: of the places to hold.
    """

    def __init__(self, recorder: Recorder, keys: Collection[tuple[Any, ...]] = ()) -> None:
        self.recorder = recorder
        self.keys = frozenset(keys)
        self._queues: dict[tuple[Any, ...], deque[Place]] = {}
        self._terms: list[Tensor] = []

    def holding(self, *keys: tuple[Any, ...]) -> Replay:
        """The same, holding some more."""
        return Replay(self.recorder, {*self.keys, *keys})

    def without(self, key: tuple[Any, ...]) -> Replay:
        """The same, not holding one of them."""
        return Replay(self.recorder, self.keys - {key})

    def held(self, within: Call | None = None) -> list[Place]:
        """The places that are held in a call, or in the whole pass; those inside others are not met."""
        places = self.recorder.places
        found: list[Place] = []
        for place in places[within.index + 1 : within.end] if within else places:
            if place.key in self.keys and (not found or place.index >= found[-1].end):
                found.append(place)
        return found

    def weighted(self, call: Call) -> Tensor:
        """As :meth:`Call.weighted`, with what the held places inside add."""
        with self.running(call) as terms:
            values = call.weighted()
        return torch.cat([values, *terms])

    @contextmanager
    def running(self, within: Call | None = None) -> Iterator[list[Tensor]]:
        """Inside, the places are held. The list fills with the products that have to be added, float64 each."""
        self._queues = {}
        self._terms = []
        for place in self.held(within):
            self._queues.setdefault(place.key, deque()).append(place)
        if not self._queues:
            yield self._terms
            return
        plain = nn.Module.__call__

        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            path = self.recorder.paths.get(module)
            key = ("module", path)
            if key in self._queues and torch.is_grad_enabled():
                return self._given(key, (args, kwargs))
            run = functools.partial(plain, module)
            return (alone(run) if opaque(module) and stops else run)(*args, **kwargs)

        stops = any(key[0] == "stop" for key in self._queues)
        operations = Operations(str, self._stopped)

        def forward(cls: Any, args: tuple[Any, ...], run: Callable[[], Any]) -> tuple[Any, None]:
            if ("function", cls) in self._queues:
                return self._given(("function", cls), args), None
            with operations.hushed():
                return run(), None

        def watcher(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            key = ("declared", function)
            return self._given(key, (args, kwargs)) if key in self._queues else function(*args, **kwargs)

        with ExitStack() as stack:
            stack.callback(setattr, nn.Module, "__call__", plain)
            nn.Module.__call__ = call  # type: ignore[method-assign]
            stack.enter_context(patched(forward))
            stack.enter_context(watching(watcher))
            if stops:
                stack.enter_context(operations)
            yield self._terms

    def _next(self, key: tuple[Any, ...]) -> Any:
        if not self._queues[key]:
            raise Drift(f"{key} is met more often than in the recorded pass")
        return self._queues[key].popleft()

    def _given(self, key: tuple[Any, ...], args: Any) -> Any:
        """What a call gave when it was recorded; notes what its gradient makes of its present arguments."""
        call: Call = self._next(key)
        inputs = arguments(call, args)
        if [x.shape for x in inputs] != [x.shape for x in call.inputs]:
            raise Drift(f"{key} is given other arguments than in the recorded pass")
        self._terms.append(products(inputs, call.in_grads))
        tracks = isinstance(call, FunctionCall)

        def fresh(y: Tensor) -> Tensor:
            return y.clone() if tracks or not differentiable(y) else y.clone().requires_grad_().clone()

        return mapped(fresh, call.result)

    def _stopped(self, stop: Stop, result: Any) -> Any:
        if stop.key not in self._queues:
            return result
        recorded: Stop = self._next(stop.key)
        if stop.target is None:
            return mapped(copy_of, recorded.value)
        if stop.target.shape != recorded.value.shape:
            raise Drift(f"{stop.operation} writes other values than in the recorded pass")
        with torch.no_grad():
            stop.target.copy_(recorded.value)
        return result


def arguments(call: Call, args: Any) -> Sequence[Tensor]:
    """Those of the arguments of a call that it was differentiated by."""
    if isinstance(call, FunctionCall):
        return [x for x, asked in zip(args, call.masks[0], strict=True) if asked]
    return [x for x in tensors_of(args) if x.requires_grad and differentiable(x)]
