"""One real pass, taken apart: every module call, custom Function and stop in it, in order.

Modules are intercepted where ``torch.fx`` does it, at ``nn.Module.__call__``, outside their hooks, so that
hooks count as part of the module that carries them. Each tensor is cloned where it crosses a boundary: that
gives every call its own gradients, and copies that later in-place edits do not reach.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import _pop_mode_temporarily

from hesse.check.passes.calls import (
    Call,
    Place,
    RandomState,
    copy_of,
    cuda_devices,
    differentiable,
    gradients_of,
    mapped,
    tensors_of,
)
from hesse.check.passes.functions import FunctionCall, Functions
from hesse.check.passes.operations import Operations, Stop, in_checkpoint
from hesse.check.straight_through import declared, watching

__all__ = ["LOSS", "Recorder", "opaque"]

LOSS = "loss_fn()"


class Recorder:
    """Records one forward pass, and the gradients inside it when it is differentiated.

    Args:
        model: the modules to record; calls of others pass through. None for a function.
        silent: hooks on tensors are refused.
        protect: custom Functions are given copies of the gradients that arrive.
    """

    def __init__(self, model: nn.Module | None, silent: bool = False, protect: bool = False) -> None:
        modules = dict(model.named_modules()) if model is not None else {}
        params = list(model.parameters()) if model is not None else []
        self.paths = {module: path for path, module in modules.items()}
        self.devices = cuda_devices([*params, *(model.buffers() if model is not None else ())])
        self.places: list[Place] = []  # in the order in which they began
        self.calls: list[Call] = []  # of modules and of the loss, in the order in which they ended
        self.stops: list[Stop] = []
        self.within: list[Call] = []  # the calls that have not returned, outermost first
        self.running: list[str] = []  # paths of the modules that have not, recorded or not
        self.functions = Functions(self.here, self.devices, self._begun, self._ended, protect)
        self.operations = Operations(self.here, self._stopped, self._used)
        self.operations.silenced = silent
        self.editing: set[str] = set()  # modules that edit their arguments in place
        self.whole: frozenset[str] = frozenset()  # modules that are not taken apart from what contains them
        # Outputs that no gradient can leave, each replaced by a leaf that shows what would arrive.
        self.cut: list[tuple[Call, int, Tensor]] = []
        # By id of a parameter: paths of the innermost calls that used it; and those that a declared call has used.
        self.uses: dict[int, set[str]] = {id(p): set() for p in params}
        self.private: set[int] = set()
        self.lit: set[int] = set()  # ids of parameters that were used with gradients, and of those used without
        self.dark: set[int] = set()
        self.again: dict[FunctionCall, FunctionCall] = {}  # calls that were made once more in the backward pass
        self._open = False

    def here(self) -> str:
        """The path of the innermost module that is running."""
        return self.running[-1] if self.running else ""

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record the calls made inside. Leave before the backward pass: checkpoints call modules there."""
        plain = nn.Module.__call__

        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            path = self.paths.get(module)
            run = functools.partial(plain, module)
            if path is None or path in self.whole or transformed((args, kwargs)):
                return run(*args, **kwargs)
            if not torch.is_grad_enabled():
                self.running.append(path)
                try:
                    return run(*args, **kwargs)
                finally:
                    self.running.pop()
            return self._record(path, alone(run) if opaque(module) else run, module, args, kwargs)

        nn.Module.__call__ = call  # type: ignore[method-assign]
        self._open = True
        try:
            with self.functions.recording(), watching(self._declared), self.operations:
                yield
        finally:
            self._open = False
            nn.Module.__call__ = plain  # type: ignore[method-assign]

    def function(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function`` recorded under ``name``, for a loss that is no module."""
        return lambda *args, **kwargs: self._record(name, function, function, args, kwargs)

    def differentiate(self, loss: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Gradients of ``loss``, zero where none arrives; fills in those of the recorded calls on the way."""
        leaves = [leaf for _, _, leaf in self.cut]
        with self.functions.recording():
            grads = gradients_of(loss, [*tensors, *leaves])
        for first, later in self.again.items():
            if later.backwards:
                first.inputs, first.args, first.owners = later.inputs, later.args, later.owners
                first.masks, first.random = later.masks, later.random
                first.in_grads, first.out_grads, first.backwards = later.in_grads, later.out_grads, later.backwards
            self.functions.calls.remove(later)
        for (call, i, _), grad in zip(self.cut, grads[len(tensors) :], strict=True):
            call.out_grads[i] = grad
        return grads[: len(tensors)]

    def _record(
        self,
        path: str,
        run: Callable[..., Any],
        target: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        kind: type[Call] = Call,
    ) -> Any:
        call = kind(path, run, (), {}, RandomState(self.devices))
        call.declared = declared(target) or kind is Declared
        call.checkpointed = in_checkpoint()
        call.args, call.kwargs = mapped(copy_of, (args, kwargs))
        copies = iter(tensors_of((call.args, call.kwargs)))
        versions: list[tuple[Tensor, int]] = []

        def enter(x: Tensor) -> Tensor:
            copied = next(copies)
            if not (x.requires_grad and differentiable(x)):
                return x
            before = x.clone()
            i = len(call.inputs)
            call.inputs.append(copied)
            call.in_grads.append(None)
            before.register_hook(functools.partial(self._arrived, call, call.in_grads, i))
            inside = before.clone()  # a hook that the call hangs on it is part of the call
            versions.append((inside, inside._version))
            return inside

        args, kwargs = mapped(enter, (args, kwargs))
        trains = bool(call.inputs) or (
            isinstance(target, nn.Module) and any(p.requires_grad for p in target.parameters())
        )

        def leave(y: Tensor) -> Tensor:
            if not differentiable(y):
                return y
            i = len(call.out_grads)
            call.out_grads.append(None)
            if not y.requires_grad:
                if not trains:
                    return y
                leaf = y.detach().requires_grad_()
                self.cut.append((call, i, leaf))
                return leaf.clone()
            after = y.clone()
            after.register_hook(functools.partial(self._arrived, call, call.out_grads, i))
            return after.clone()  # a hook that is hung on it is the caller's

        self._enter(call)
        self.within.append(call)
        self.running.append(path)
        try:
            result = run(*args, **kwargs)
        finally:
            self.within.pop()
            self.running.pop()
        if any(inside._version != version for inside, version in versions):
            self.editing.add(path)
        call.end = len(self.places)
        call.result = mapped(copy_of, result)
        call.outputs = [y for y in tensors_of(call.result) if differentiable(y)]
        self.calls.append(call)
        return mapped(leave, result)

    def _arrived(self, call: Call, grads: list[Tensor | None], i: int, grad: Tensor) -> None:
        call.twice |= self._open  # the forward pass takes a derivative: what arrives here later is a part only
        grads[i] = copy_of(grad)

    def _enter(self, place: Place) -> None:
        if self._open:
            place.index = len(self.places)
            place.end = place.index + 1
            self.places.append(place)

    def _stopped(self, stop: Stop, result: Any) -> Any:
        self._enter(stop)
        stop.target = None
        self.stops.append(stop)
        return result

    def _used(self, p: nn.Parameter) -> None:
        (self.lit if torch.is_grad_enabled() or self.operations.quiet else self.dark).add(id(p))
        if self.within and id(p) in self.uses:
            self.uses[id(p)].add(self.within[-1].path)
            if any(call.declared for call in self.within):
                self.private.add(id(p))

    def _begun(self, call: FunctionCall, args: tuple[Any, ...]) -> None:
        call.declared = declared(call.cls)
        self._enter(call)
        for x in args:
            if isinstance(x, nn.Parameter):
                self._used(x)
        self.operations.quiet += 1

    def _ended(self, call: FunctionCall, args: tuple[Any, ...], result: Any) -> None:
        self.operations.quiet -= 1
        if not self._open:  # a checkpoint runs its part again, a reentrant one differentiates only that
            twins = [c for c in self.functions.calls if c.index >= 0 and c.cls is call.cls and c not in self.again]
            same = [c for c in twins if all(map(torch.equal, tensors_of(c.args), tensors_of(call.args)))]
            if same or twins:
                self.again[(same or twins)[0]] = call
            return
        call.end = len(self.places)
        self.operations.flow([x for x in args if isinstance(x, Tensor)], result)

    def _declared(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self._record(self.here(), function, function, args, kwargs, Declared)


@dataclass(eq=False)
class Declared(Call):
    """A call of a function that was declared straight-through."""

    @property
    def key(self) -> tuple[Any, ...]:
        return ("declared", self.target)


def transformed(args: Any) -> bool:
    """Whether tensors among the arguments belong to a transformation of torch.func, such as vmap."""
    return any(torch._C._functorch.is_functorch_wrapped_tensor(x) for x in tensors_of(args))


def opaque(module: nn.Module) -> bool:
    """Whether a module is compiled or scripted: its parts are not Python's to look at."""
    return isinstance(module, torch.jit.ScriptModule) or type(module).__name__ == "OptimizedModule"


def alone(call: Callable[..., Any]) -> Callable[..., Any]:
    """``call`` without anybody watching its operations: a compiler would compile the watching too."""

    def run(*args: Any, **kwargs: Any) -> Any:
        with _pop_mode_temporarily():
            return call(*args, **kwargs)

    return run
