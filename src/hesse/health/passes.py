"""Which forward passes are training, and what went into the last one.

A pass counts when gradients are recorded and the model is in training mode (or has never been). Sensors listen to
the first pass of a sampled step; models that are not called themselves (``model.encode(x)``, Lightning modules) are
heard through the modules they hold. The arguments and the state of the random generators are kept until the
optimiser's step, so that a pass in which NaN arose can be run once more.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor, peek_interpreter_stack
from torch.utils.hooks import RemovableHandle

from hesse.health.sensors import Calls, Sensor
from hesse.health.stats import unwrapped

__all__ = ["Call", "Passes", "tensors_in", "versions"]

PASSES = 8  # of one step are kept, and with them their batches


@dataclass(slots=True)
class Call:
    """A forward pass of the model: all that it takes to run it again.

    Attributes:
        random: states of the generators of the CPU and of the device before it.
        versions: as :func:`versions` gives them.
        grads: gradients at the tensors of the output, by place, where the backward pass was watched.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    random: tuple[Tensor, Tensor | None]
    autocast: torch.dtype | None
    versions: list[int]
    grads: dict[int, Tensor] = field(default_factory=dict)


class Passes:
    """Hooks on the model; while a step is sampled, also on the modules it holds, if it is not called itself.

    Attributes:
        count: training passes so far.
        calls: those of this step, the last few.
        rows: examples in this step, while it is sampled.
        autocast: the precision of the last pass that was sampled.
        watch_outputs: whether gradients at the outputs are kept at every step, not only at sampled ones.
        paused: nothing is a training pass for now.
        expected: whether it was known before this step that it would be sampled.
        lost: whether NaN came out of a pass of this step, while it is sampled.
    """

    def __init__(self, model: nn.Module, calls: Calls, sensors: Sequence[Sensor], begun: Callable[[], None]) -> None:
        self.model = model
        self.listeners = calls
        self.sensors = sensors
        self.begun = begun
        self.count = 0
        self.calls: deque[Call] = deque(maxlen=PASSES)
        self.rows: int | None = None
        self.autocast: torch.dtype | None = None
        self.watch_outputs = self.paused = self.lost = False
        self._new = True  # a step has begun, and no pass in it
        self._device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self._closed = any(getattr(m, "_compiled_call_impl", None) is not None for m in (model, unwrapped(model)))
        self._trained = False
        self.expected = False
        self._heard = False  # whether it was listened to
        self._called = False  # whether the model itself was called since it was attached
        self._depth = 0
        self._listening = False
        self._before: RemovableHandle | None = None
        self._after: RemovableHandle | None = None
        self._parts: list[RemovableHandle] = []

    def attach(self) -> None:
        """A hook on the model itself, which stays."""
        if self._before is None and not self._closed:
            self._before = self.model.register_forward_pre_hook(self._begin, with_kwargs=True)

    def release(self) -> None:
        """Let go of everything."""
        self.expect(False)
        self.calls.clear()
        for hook in (self._before, self._after):
            if hook is not None:
                hook.remove()
        self._before = self._after = None

    def expect(self, sampled: bool) -> None:
        """A new step begins, to be sampled or not."""
        self._new = True
        if not (sampled or self.expected or self._after):
            return
        self._rest((), None)
        for part in self._parts:
            part.remove()
        self._parts = []
        self.expected, self._heard, self._depth, self.rows = sampled, False, 0, None
        self.lost = False
        ends = sampled or self.watch_outputs
        if ends and self._after is None and self._before is not None:
            self._after = self.model.register_forward_hook(self._end, always_call=True)
        elif not ends and self._after is not None:
            self._after.remove()
            self._after = None
        if sampled and not self._called and self._before is not None:
            self._parts = [m.register_forward_pre_hook(self._part_begins) for m in _parts(unwrapped(self.model))]

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._counts(module):
            return
        self._called = True
        self.count += 1
        self.begun()
        if self._new:
            self.calls.clear()  # only now: of the step before, the loss may have been told since
            self._new = False
        kind = self._device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        random = torch.get_rng_state(), torch.cuda.get_rng_state(self._device) if kind == "cuda" else None
        self.calls.append(Call(args, kwargs, random, autocast, versions(args, kwargs)))
        if not self.expected:
            return
        self.autocast = autocast
        given = tensors_in((args, kwargs))
        if given and given[0].dim():
            self.rows = (self.rows or 0) + len(given[0])
        self._depth += 1
        if self._depth == 1 and not self._heard:
            self._listen()

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling() or self.paused:
            return
        if self._depth:
            self._depth -= 1
            if not self._depth:
                self._rest(args, output)
        if self.calls and torch.is_grad_enabled():
            for i, t in enumerate(tensors_in(output)):
                if t.requires_grad and t.is_floating_point() and not is_functorch_wrapped_tensor(t):
                    t.register_hook(_keeper(self.calls[-1], i))
                    self.lost |= self.expected and t.device.type == "cpu" and bool(t.detach().isnan().any())

    def _part_begins(self, module: nn.Module, args: Any) -> None:
        if not self._called and self._counts(module):
            self._depth += 1
            if self._depth == 1:
                self._listen(module)
            # After the hooks that listening has put on the module: they are called before it and go with it.
            self._parts.append(module.register_forward_hook(self._part_ends, always_call=True))

    def _part_ends(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._depth and not torch.compiler.is_compiling():
            self._parts.pop().remove()
            self._depth -= 1
            if not self._depth:
                self._rest((), None)

    def _counts(self, module: nn.Module) -> bool:
        """Whether a call is a training pass: gradients are recorded, and the module trains (or none ever did)."""
        if torch.compiler.is_compiling() or self.paused or not torch.is_grad_enabled():
            return False
        if peek_interpreter_stack() is not None:  # vmap, grad or jvp
            return False
        self._trained |= module.training
        return module.training or not self._trained

    def _listen(self, part: nn.Module | None = None) -> None:
        if self.model is not unwrapped(self.model) and hasattr(self.model, "_orig_mod"):
            return  # hooks inside a compiled model are not run, and would compile it again
        self._listening = True
        self.listeners.listen(part, again=self._heard)
        if not self._heard:
            for sensor in self.sensors:
                sensor.listen()
        self._heard = True

    def _rest(self, args: Any, output: Any) -> None:
        if self._listening:
            self._listening = False
            self.listeners.rest(args, output)
            for sensor in self.sensors:
                sensor.rest()


def versions(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[int]:
    """How often each tensor among the arguments has been written to.

    Example:
        >>> x = torch.ones(1)
        >>> before = versions((x,), {})
        >>> x += 1
        >>> versions((x,), {}) == before
        False
    """
    return [value._version for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors in nested tuples, lists, dicts and dataclasses, in order.

    Example:
        >>> len(tensors_in({"a": [torch.ones(1), 2], "b": torch.ones(2)}))
        2
    """
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    elif hasattr(value, "__dataclass_fields__"):
        value = list(vars(value).values())
    if isinstance(value, (tuple, list)):
        return [t for part in value for t in tensors_in(part)]
    return []


def _parts(model: nn.Module) -> list[nn.Module]:
    """The modules that a model calls by itself: its children, and those of mere containers."""
    parts = []
    for child in model.children():
        parts += _parts(child) if isinstance(child, nn.ModuleList | nn.ModuleDict) else [child]
    return parts


def _keeper(call: Call, i: int) -> Callable[[Tensor], None]:
    def keep(grad: Tensor) -> None:
        call.grads[i] = grad.detach()

    return keep
