"""One real backward pass, taken apart: every module call with what went in, what came out and the gradients
of both.

Modules are intercepted where ``torch.fx`` does it, at ``nn.Module.__call__``, outside their hooks, so that
hooks count as part of the module that carries them. Each tensor is cloned where it crosses a boundary: that
gives every call its own gradients, and copies that later in-place edits do not reach. A call can be run
again on its own, with the same random numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

__all__ = [
    "Call",
    "RandomState",
    "Recorder",
    "cuda_devices",
    "finite",
    "first_difference",
    "first_non_finite",
    "gradients_of",
]


class RandomState:
    """The state of the random generators now, to draw the same numbers again.

    Args:
        devices: indices of the CUDA devices whose generators count beside the CPU's.
    """

    def __init__(self, devices: Sequence[int]) -> None:
        self.cpu = torch.get_rng_state()
        self.cuda = {device: torch.cuda.get_rng_state(device) for device in devices}

    @contextmanager
    def again(self) -> Iterator[None]:
        """Inside, the numbers drawn are those drawn after the state was taken; outside, none were."""
        torch.clear_autocast_cache()  # it holds casts of weights that may have been moved since
        with torch.random.fork_rng(devices=list(self.cuda)):
            torch.set_rng_state(self.cpu)
            for device, state in self.cuda.items():
                torch.cuda.set_rng_state(state, device)
            yield


def cuda_devices(tensors: Iterable[Tensor]) -> list[int]:
    """Indices of the CUDA devices that hold any of the tensors."""
    return sorted({t.get_device() for t in tensors if t.is_cuda})


@dataclass(eq=False)
class Call:
    """One call of a module (or of the loss function) and what the backward pass did at its boundary.

    ``args`` and ``kwargs`` hold copies of the tensors; ``inputs`` are those copies that a gradient can
    reach, ``in_grads`` what reached them (None: nothing). ``outputs`` are all floating outputs,
    ``out_grads`` what arrived there.
    """

    path: str
    target: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    random: RandomState
    inputs: list[Tensor]
    in_grads: list[Tensor | None]
    outputs: list[Tensor] = field(default_factory=list)
    out_grads: list[Tensor | None] = field(default_factory=list)

    def __call__(self) -> list[Tensor]:
        """Run the same call again; returns its floating outputs."""
        tracked = {id(x) for x in self.inputs}

        def copy(x: Tensor) -> Tensor:
            # The call may edit its arguments in place, and may hook what has a graph.
            return (x.detach().requires_grad_() if id(x) in tracked else x).clone()

        args, kwargs = pytree.tree_map_only(Tensor, copy, (self.args, self.kwargs))
        with torch.enable_grad(), self.random.again():
            return _floating(self.target(*args, **kwargs))

    def weighted(self) -> Tensor:
        """The outputs times the gradients that arrived at them, [n]; the sum is what is differentiated."""
        pairs = [(y, w) for y, w in zip(self(), self.out_grads, strict=True) if w is not None]
        return torch.cat([(y.double() * w.double()).flatten() for y, w in pairs])


class Recorder:
    """Records the calls of one forward pass, innermost first, and their gradients when it is differentiated.

    Args:
        model: the modules to record; calls of others pass through.
    """

    def __init__(self, model: nn.Module) -> None:
        self.paths = {module: path for path, module in model.named_modules()}
        self.devices = cuda_devices([*model.parameters(), *model.buffers()])
        self.calls: list[Call] = []
        self.within: list[str] = []  # paths of the calls that have not returned, outermost first
        # By id of a parameter: the innermost calls that used it.
        self.uses: dict[int, set[str]] = {id(p): set() for p in model.parameters()}
        # Outputs that no gradient can leave, each replaced by a leaf that shows what would arrive.
        self.cut: list[tuple[Call, int, Tensor]] = []

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record the calls made inside. Leave before the backward pass: checkpoints call modules there."""
        plain = nn.Module.__call__

        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            path = self.paths.get(module)
            if path is None or not torch.is_grad_enabled():
                return plain(module, *args, **kwargs)
            return self._record(path, lambda *a, **k: plain(module, *a, **k), module, args, kwargs)

        nn.Module.__call__ = call  # type: ignore[method-assign]
        try:
            with _Uses(self):
                yield
        finally:
            nn.Module.__call__ = plain  # type: ignore[method-assign]

    def function(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function`` recorded under ``name``, for a loss that is no module."""
        return lambda *args: self._record(name, function, function, args, {})

    def differentiate(self, loss: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Gradients of ``loss``, zero where none arrives; fills in those of the recorded calls on the way."""
        leaves = [leaf for _, _, leaf in self.cut]
        grads = gradients_of(loss, [*tensors, *leaves])
        for (call, i, _), grad in zip(self.cut, grads[len(tensors) :], strict=True):
            call.out_grads[i] = grad
        return grads[: len(tensors)]

    def _record(
        self, path: str, run: Callable[..., Any], target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        call = Call(path, run, (), {}, RandomState(self.devices), [], [])

        def enter(x: Tensor) -> tuple[Tensor, Tensor]:
            copy = x.detach().clone()
            if not (x.requires_grad and x.is_floating_point()):
                return x, copy
            inside = x.clone()
            i = len(call.inputs)
            call.inputs.append(copy)
            call.in_grads.append(None)
            inside.register_hook(lambda grad: call.in_grads.__setitem__(i, grad.detach().clone()))
            return inside, copy

        leaves, spec = pytree.tree_flatten((args, kwargs))
        entered = [enter(x) if isinstance(x, Tensor) else (x, x) for x in leaves]
        args, kwargs = pytree.tree_unflatten([live for live, _ in entered], spec)
        call.args, call.kwargs = pytree.tree_unflatten([copy for _, copy in entered], spec)
        trains = bool(call.inputs) or (
            isinstance(target, nn.Module) and any(p.requires_grad for p in target.parameters())
        )

        def leave(y: Tensor) -> Tensor:
            if not y.is_floating_point():
                return y
            i = len(call.outputs)
            call.outputs.append(y.detach())
            call.out_grads.append(None)
            if not y.requires_grad:
                if not trains:
                    return y
                leaf = y.detach().requires_grad_()
                self.cut.append((call, i, leaf))
                return leaf.clone()
            outside = y.clone()
            outside.register_hook(lambda grad: call.out_grads.__setitem__(i, grad.detach().clone()))
            return outside

        self.within.append(path)
        try:
            result = run(*args, **kwargs)
        finally:
            self.within.pop()
        self.calls.append(call)
        return pytree.tree_map_only(Tensor, leave, result)


class _Uses(TorchFunctionMode):
    """Notes which call uses which parameter: a module's weight may be used by others, or only by others."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.recorder.within:
            for x in pytree.tree_leaves((args, kwargs)):
                if isinstance(x, nn.Parameter) and id(x) in self.recorder.uses:
                    self.recorder.uses[id(x)].add(self.recorder.within[-1])
        return func(*args, **(kwargs or {}))


def gradients_of(loss: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Gradients by the real backward pass, dense, zero where none arrives; ``.grad`` is left alone."""
    if not loss.requires_grad:
        return [torch.zeros_like(t) for t in tensors]
    grads = torch.autograd.grad(loss, list(tensors), allow_unused=True)
    dense = [None if g is None else g.to_dense() if g.is_sparse else g for g in grads]
    return [torch.zeros_like(t) if g is None else g.detach().clone() for t, g in zip(tensors, dense, strict=True)]


def _floating(outputs: Any) -> list[Tensor]:
    return [y for y in pytree.tree_leaves(outputs) if isinstance(y, Tensor) and y.is_floating_point()]


def finite(tensors: Sequence[Tensor | None]) -> bool:
    """Whether every element that is there is a number."""
    return all(bool(t.isfinite().all()) for t in tensors if t is not None)


def first_non_finite(calls: Sequence[Call]) -> Call | None:
    """The innermost, earliest call that turns numbers into NaN or infinity, forward or else backward."""
    for call in calls:
        values = [x for x in pytree.tree_leaves((call.args, call.kwargs)) if isinstance(x, Tensor)]
        if finite(values) and not finite(call.outputs):
            return call
    for call in calls:
        if finite(call.out_grads) and not finite(call.in_grads):
            return call
    return None


def first_difference(calls: Sequence[Call], again: Sequence[Call]) -> Call | None:
    """The innermost, earliest call whose outputs differ between two passes that should be the same."""
    for one, two in zip(calls, again, strict=False):
        if one.path != two.path or any(not torch.equal(a, b) for a, b in zip(one.outputs, two.outputs, strict=False)):
            return one
    return None
