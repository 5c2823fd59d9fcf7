"""Operations at which a gradient stops: what went in carries one, what came out does not.

``detach()``, ``.data``, a ``no_grad`` block, ``item()``, ``numpy()`` and ``torch.tensor(x)`` all stop gradients,
mostly on purpose: targets, running statistics, logs. None is a fault by itself. What is noted here is only that
it happened, in which module, at which line of whose code, and what value came out; whether the value matters is
seen by holding it still (:mod:`hesse.check.passes.replay`).
"""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from hesse.check.passes.calls import Place, copy_of, differentiable

__all__ = ["Operations", "Stop", "in_checkpoint", "user_frame"]

TORCH = str(Path(torch.__file__).parent) + os.sep
HERE = str(Path(__file__).parents[1]) + os.sep  # the room of checks
# Frames that only pass a call on: a block entered there was entered by who called them.
PASSING = tuple(TORCH + f for f in ("overrides.py", "_tensor.py", "utils/_contextlib.py", "autograd/grad_mode.py"))
# Where torch's own layers stop gradients as part of what they are: the power iteration of spectral_norm.
ACCEPTED = tuple(TORCH + name for name in ("nn" + os.sep, "utils" + os.sep, "optim" + os.sep))
CHECKPOINT = str(Path(TORCH) / "utils" / "checkpoint.py")
ESCAPES = ("item", "tolist", "numpy", "__float__", "__int__", "__index__", "__array__", "__complex__")
VIEWS = ("data", "T", "mT", "H", "mH", "real", "imag")  # attributes that hold the tensor's numbers
FRESH = ("_like", "new_")  # results that take nothing but the shape from what went in


@dataclass(eq=False)
class Stop(Place):
    """A place where a gradient stopped.

    Args:
        operation: what stopped it, for instance ``"Tensor.detach"`` or ``"no_grad"``.
        file, line: the user's line: of the call, or of the ``with`` of a block.
        value: what came out, copied.
        target: the tensor that was written to, if it was a write; let go once noted.
        accepted: whether it happened in torch's own layers.
        params: ids of the parameters that went into it.
        recurrent: whether its value has met one of those parameters again.
    """

    operation: str = ""
    file: str | None = None
    line: int | None = None
    value: Any = None
    target: Tensor | None = None
    accepted: bool = False
    params: set[int] = field(default_factory=set)
    recurrent: bool = False

    @property
    def key(self) -> tuple[Any, ...]:
        return ("stop", self.operation, self.file, self.line)


class Operations(TorchFunctionMode):
    """Watches the operations of a forward pass.

    Args:
        here: tells the path of the module that is running.
        stopped: called with each stop and with what came out; returns what shall come out instead.
        used: called with each parameter that an operation is given.
    """

    def __init__(
        self,
        here: Callable[[], str],
        stopped: Callable[[Stop, Any], Any],
        used: Callable[[nn.Parameter], None] = lambda p: None,
    ) -> None:
        super().__init__()
        self.here = here
        self.stopped = stopped
        self.used = used
        self.hooked: list[tuple[str, Any, str | None, int | None]] = []  # path, hook, file and line of registration
        self.overflowed: tuple[str, str, str | None, int | None] | None = None  # path, operation, file and line
        self.writes: list[tuple[str, str, str, int | None]] = []  # past the graph: path, operation, file and line
        self.written: list[tuple[Any, int]] = []  # in blocks without gradients: the block's key, id of the tensor
        self.copying = False  # whether .data gives a copy
        self.silenced = False  # whether hooks on tensors are refused
        self.dtypes: set[torch.dtype] = set()
        self.untrained: list[tuple[Tensor, int | None]] = []  # weights of embeddings, and the row without a gradient
        self.quiet = 0  # inside the forward of a Function, which has its own backward
        self._block: tuple[str | None, int | None, bool] = (None, None, False)  # where no_grad was entered
        self._entered = "no_grad"  # or what of torch's has entered it
        self._home = ""  # in which module
        self._flow: dict[int, tuple[Tensor, frozenset[Stop]]] = {}  # tensors that hold what came out of a stop
        self._aliases: dict[int, tuple[Tensor, int]] = {}  # given by .data and detach(): writes escape the graph

    @contextmanager
    def hushed(self) -> Iterator[None]:
        """Inside, stops are not looked for."""
        self.quiet += 1
        try:
            yield
        finally:
            self.quiet -= 1

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.__name__ if hasattr(func, "__name__") else str(func)
        if sys._getframe(1).f_code.co_filename.startswith(HERE):  # the check's own copies
            result = func(*args, **kwargs)
            if name == "clone":
                self.flow(list(args), result)
            return result
        if name == "_set_grad_enabled":
            if torch.is_grad_enabled() and not args[0]:
                self._block = user_frame()
                self._entered = _library_call() or "no_grad"
                self._home = self.here()
            return func(*args, **kwargs)
        attribute = getattr(func.__self__, "__name__", "") if name in ("__get__", "__set__") else ""
        if name == "__get__" and attribute not in VIEWS:
            return func(*args, **kwargs)
        if name == "register_hook" and isinstance(args[0], Tensor):
            return self._hook(func, args, kwargs)
        if func is torch.nn.functional.embedding:
            given = inspect.signature(func).bind(*args, **kwargs).arguments
            if given.get("padding_idx") is not None:
                self.untrained.append((given["weight"], given["padding_idx"]))
            if given.get("scale_grad_by_freq"):
                self.untrained.append((given["weight"], None))
        tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        wrapped = any(torch._C._functorch.is_functorch_wrapped_tensor(x) for x in tensors)  # of vmap, jvp, ...
        carries = not wrapped and any(x.requires_grad for x in tensors)
        for x in tensors:
            if isinstance(x, nn.Parameter):
                self.used(x)
        if _writes(name) and isinstance(args[0], Tensor):
            self._write(name, args[0])
        if attribute == "data" and self.copying and args[0].requires_grad:
            return args[0].detach().clone()
        result = func(*args, **kwargs)
        if isinstance(result, Tensor) and result.dtype == torch.float16 and not self.overflowed:
            self._overflow(name, tensors, args, result)
        if attribute == "data" or name == "detach":
            self._aliases[id(result)] = result, id(args[0])
        if carries and not self.quiet and not any(part in name for part in FRESH):
            stop = self._stop(name, func, args, tensors, result)
            if stop is not None:
                result = self.stopped(stop, result)
                self._mark(result, frozenset({stop}))
        self.flow(tensors, result)
        return result

    def flow(self, tensors: list[Tensor], result: Any) -> None:
        """What came out of a stop flows from ``tensors`` into ``result``; has it met its parameters again?"""
        for y in pytree.tree_leaves(result):
            if isinstance(y, Tensor) and y.requires_grad and y.is_floating_point():
                self.dtypes.add(y.dtype)
        if not self._flow:
            return
        marks = frozenset[Stop]().union(*(self._flow[id(x)][1] for x in tensors if id(x) in self._flow))
        if not marks:
            return
        for x in tensors:
            for stop in marks:
                stop.recurrent |= id(x) in stop.params
        self._mark(result, marks)

    def _mark(self, result: Any, marks: frozenset[Stop]) -> None:
        for y in pytree.tree_leaves(result):
            if isinstance(y, Tensor) and differentiable(y):
                self._flow[id(y)] = y, marks | self._flow.get(id(y), (y, frozenset()))[1]

    def _stop(self, name: str, func: Any, args: Any, tensors: list[Tensor], result: Any) -> Stop | None:
        """The stop that an operation was, if it was one."""
        leaves = [y for y in pytree.tree_leaves(result) if isinstance(y, Tensor) and differentiable(y)]
        written = bool(args) and isinstance(args[0], Tensor) and id(args[0]) in self._aliases and _writes(name)
        value: Any = None
        if written:
            pass
        elif name in ESCAPES:
            value = result.copy() if hasattr(result, "copy") else result
        elif leaves and not any(y.requires_grad for y in leaves):
            value = pytree.tree_map_only(Tensor, copy_of, result)
        else:
            return None
        file, line, accepted = user_frame()
        if file is None:
            return None
        operation = f"Tensor.{func.__self__.__name__ if name == '__get__' else name}"
        if not torch.is_grad_enabled():
            operation, (file, line, accepted) = self._entered, self._block
            if any(f.f_code.co_qualname == "CheckpointFunction.forward" for f in _frames()):
                return None  # it runs its part again, with gradients, in the backward pass
        elif getattr(torch, name, None) is func:
            operation = f"torch.{name}"
        where = self.here() if torch.is_grad_enabled() else self._home
        stop = Stop(where, operation=operation, file=file, line=line, value=value, accepted=accepted)
        if _writes(name) and isinstance(args[0], Tensor):
            stop.target, stop.value = args[0], copy_of(args[0])
        stop.params = _parameters(tensors)
        # A teacher follows its student during the forward pass: what is frozen is meant to be constant.
        stop.accepted |= isinstance(stop.target, nn.Parameter) and not stop.target.requires_grad
        return stop

    def _write(self, name: str, target: Tensor) -> None:
        """Note what is written to past the graph."""
        _, source = self._aliases.get(id(target), (target, id(target)))
        if not torch.is_grad_enabled():
            self.written.append((("stop", self._entered, *self._block[:2]), source))
        if source != id(target):
            file, line, accepted = user_frame()
            if file is not None and not accepted:
                self.writes.append((self.here(), f"Tensor.{name}", file, line))

    def _overflow(self, name: str, tensors: list[Tensor], args: Any, result: Tensor) -> None:
        """Note the first operation that makes infinity of numbers in float16; a mask may hold it on purpose."""
        if "mask" in name or name in ("where", "full", "zeros", "tensor", "triu", "tril"):
            return
        if bool(result.isinf().any()) and all(bool(x.isfinite().all()) for x in tensors if differentiable(x)):
            file, line, _ = user_frame()
            self.overflowed = self.here(), f"Tensor.{name}", file, line

    def _hook(self, func: Any, args: Any, kwargs: Any) -> Any:
        file, line, accepted = user_frame()
        if accepted or sys._getframe(3).f_code.co_filename.startswith(HERE):
            return func(*args, **kwargs)
        self.hooked.append((self.here(), args[1], file, line))
        return func(args[0], lambda grad: None) if self.silenced else func(*args, **kwargs)


def user_frame() -> tuple[str | None, int | None, bool]:
    """File and line of the innermost frame outside torch and this package, and whether torch's own layers called."""
    accepted = None
    for frame in _frames():
        file = frame.f_code.co_filename
        if file.startswith((HERE, *PASSING, "<frozen")):
            continue
        if accepted is None:
            accepted = file.startswith(ACCEPTED)
        if not file.startswith(TORCH):
            return file, frame.f_lineno, accepted
    return None, None, bool(accepted)


def in_checkpoint() -> bool:
    """Whether an activation checkpoint is being filled."""
    return any(frame.f_code.co_filename == CHECKPOINT for frame in _frames())


def _library_call() -> str | None:
    """What of torch's the user's line calls, if it is more than the block itself: ``Normal.sample``."""
    name = None
    for frame in _frames():
        file = frame.f_code.co_filename
        if file.startswith((HERE, *PASSING)) or "contextlib" in file:
            continue
        if not file.startswith(TORCH):
            break
        name = frame.f_code.co_qualname
    return name


def _frames() -> Iterator[Any]:
    frame: Any = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _writes(name: str) -> bool:
    return name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))


def _parameters(tensors: list[Tensor]) -> set[int]:
    """Ids of the leaves that the tensors were computed from."""
    found = {id(x) for x in tensors if isinstance(x, nn.Parameter)}
    stack = [x.grad_fn for x in tensors if x.grad_fn is not None]
    seen = set(stack)
    while stack:
        node = stack.pop()
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        for after, _ in node.next_functions:
            if after is not None and after not in seen:
                seen.add(after)
                stack.append(after)
    return found
