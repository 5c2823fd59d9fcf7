"""One call of a module, a custom Function or a loss: what went in, what came out, and the gradients of both.

A call holds copies, so that it can be run again on its own, with the same random numbers, whatever has happened
to its tensors since. What it is given and what it returns may be tensors in tuples, dicts, dataclasses or
objects that carry them.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

__all__ = [
    "BROKEN",
    "Call",
    "Key",
    "Place",
    "RandomState",
    "copy_of",
    "cuda_devices",
    "differentiable",
    "finite",
    "first_difference",
    "first_non_finite",
    "gradients_of",
    "inside",
    "mapped",
    "products",
    "real",
    "tensors_of",
]


Key = tuple[Any, ...]  # what a place has in common with the same place in another pass
# What a call may raise when it is run outside its surroundings, or with something of it taken away.
BROKEN = (RuntimeError, AttributeError, TypeError, ValueError, LookupError, ArithmeticError, AssertionError)


class RandomState:
    """The state of the random generators now, and of autocast, to draw the same numbers again.

    Args:
        devices: indices of the CUDA devices whose generators count beside the CPU's.
    """

    def __init__(self, devices: Sequence[int]) -> None:
        self.cpu = torch.get_rng_state()
        self.cuda = {device: torch.cuda.get_rng_state(device) for device in devices}
        kinds = ("cpu", "cuda") if devices else ("cpu",)
        self.autocast = {kind: (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds}

    @contextmanager
    def again(self) -> Iterator[None]:
        """Inside, the numbers drawn are those drawn after the state was taken; outside, none were."""
        torch.clear_autocast_cache()  # it holds casts of weights that may have been moved since
        with torch.random.fork_rng(devices=list(self.cuda)), ExitStack() as stack:
            torch.set_rng_state(self.cpu)
            for device, state in self.cuda.items():
                torch.cuda.set_rng_state(state, device)
            for kind, (enabled, dtype) in self.autocast.items():
                if enabled or torch.is_autocast_enabled(kind):
                    stack.enter_context(torch.autocast(kind, dtype, enabled))
            yield


def cuda_devices(tensors: Iterable[Tensor]) -> list[int]:
    """Indices of the CUDA devices that hold any of the tensors."""
    return sorted({t.get_device() for t in tensors if t.is_cuda})


def differentiable(t: Tensor) -> bool:
    """Whether a gradient can have to do with a tensor: its elements are real or complex numbers."""
    return t.is_floating_point() or t.is_complex()


def copy_of(t: Tensor) -> Tensor:
    """A copy of the values, of the same layout, without a graph."""
    return t.detach().resolve_conj().resolve_neg().clone()


def real(t: Tensor) -> Tensor:
    """The tensor itself, or the real and imaginary parts of a complex one: autograd's gradient is theirs."""
    return torch.view_as_real(t.resolve_conj().resolve_neg()) if t.is_complex() else t


def mapped(function: Callable[[Tensor], Any], tree: Any) -> Any:
    """``tree`` with each tensor in it replaced by ``function(tensor)``; the same tensor is replaced once.

    Example:
        >>> @dataclass
        ... class Output:
        ...     loss: Tensor
        >>> mapped(lambda t: t + 1, {"a": [Output(torch.zeros(()))], "b": "text"})
        {'a': [Output(loss=tensor(1.))], 'b': 'text'}
    """
    done: dict[int, Any] = {}

    def one(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            if id(leaf) not in done:
                done[id(leaf)] = function(leaf)
            return done[id(leaf)]
        if isinstance(leaf, tuple) and hasattr(leaf, "_fields"):  # PackedSequence
            return type(leaf)(*(every(part) for part in leaf))
        if isinstance(leaf, dict):
            twin = copy.copy(leaf)
            for key, part in leaf.items():
                twin[key] = every(part)
            return twin
        if _carries(leaf):
            twin = copy.copy(leaf)
            for name, part in vars(leaf).items():
                object.__setattr__(twin, name, every(part))
            return twin
        return leaf

    def every(part: Any) -> Any:
        return pytree.tree_map(one, part)

    return every(tree)


def tensors_of(tree: Any) -> list[Tensor]:
    """The tensors in ``tree``, each once."""
    found: list[Tensor] = []

    def note(t: Tensor) -> Tensor:
        found.append(t)
        return t

    mapped(note, tree)
    return found


def _carries(leaf: Any) -> bool:
    """Whether an object is a record of tensors, not a thing with a life of its own."""
    if isinstance(leaf, type | nn.Module) or not hasattr(leaf, "__dict__") or callable(leaf):
        return False
    if dataclasses.is_dataclass(leaf):
        return not hasattr(type(leaf), "__slots__")
    return any(isinstance(part, Tensor) for part in vars(leaf).values())


@dataclass(eq=False)
class Place:
    """Where in a forward pass a derivative may be wrong.

    Args:
        path: of the module inside which it lies; of a module's call, that module's own.
        index, end: where it begins and ends among the places of the pass; -1 for one met in the backward pass.
        declared: whether its gradient was declared not to be the derivative.
    """

    path: str
    index: int = field(default=-1, init=False)
    end: int = field(default=-1, init=False)
    declared: bool = field(default=False, init=False)

    @property
    def key(self) -> Key:
        """What it has in common with the same place in another pass."""
        return ("module", self.path)


@dataclass(eq=False)
class Call(Place):
    """One call of a module (or of the loss function) and what the backward pass did at its boundary.

    ``args`` and ``kwargs`` hold copies of the tensors; ``inputs`` are those copies that a gradient can
    reach, ``in_grads`` what reached them (None: nothing). ``result`` is a copy of what came out, ``outputs`` are
    the tensors in it that can be differentiated, ``out_grads`` what arrived there. ``twice``: the forward pass
    itself differentiated it, so that its gradients are not those of its outputs alone. ``checkpointed``: the
    backward pass runs it again. ``owners``: by id of a copy, the parameter that was given itself. Others hold it too,
    so it is moved in the place of the copy when the call is run again, and put back.
    """

    target: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    random: RandomState
    inputs: list[Tensor] = field(default_factory=list)
    in_grads: list[Tensor | None] = field(default_factory=list)
    result: Any = None
    outputs: list[Tensor] = field(default_factory=list)
    out_grads: list[Tensor | None] = field(default_factory=list)
    twice: bool = False
    checkpointed: bool = False
    owners: dict[int, nn.Parameter] = field(default_factory=dict)

    def __call__(self) -> list[Tensor]:
        """Run the same call again; returns its differentiable outputs."""
        return self.live()[1]

    def live(self) -> tuple[list[Tensor], list[Tensor]]:
        """Run the same call again; returns leaves in the place of ``inputs``, and the differentiable outputs."""
        leaves = {id(x): self.owners.get(id(x), x.detach().requires_grad_()) for x in self.inputs}

        def fresh(x: Tensor) -> Tensor:
            if id(x) in self.owners:
                return self.owners[id(x)]
            return leaves.get(id(x), x).clone()  # it may be edited in place, and hooked if it has a graph

        args, kwargs = mapped(fresh, (self.args, self.kwargs))
        with self._owners_moved(), torch.enable_grad(), self.random.again():
            outputs = tensors_of(self.target(*args, **kwargs))
        return list(leaves.values()), [y for y in outputs if differentiable(y)]

    @contextmanager
    def _owners_moved(self) -> Iterator[None]:
        """Inside, parameters that were given have the values of their copies; afterwards, bit for bit, their own."""
        pairs = [(self.owners[id(x)], x) for x in self.inputs if id(x) in self.owners]
        before = [p.detach().clone() for p, _ in pairs]
        # Without need nothing is written: autograd refuses graphs whose tensors were written to.
        moved = [not torch.equal(p, x) for p, x in pairs]
        try:
            with torch.no_grad():
                for (p, x), moves in zip(pairs, moved, strict=True):
                    if moves:
                        p.copy_(x)
            yield
        finally:
            with torch.no_grad():
                for (p, _), value, moves in zip(pairs, before, moved, strict=True):
                    if moves or not torch.equal(p, value):
                        p.copy_(value)

    def weighted(self) -> Tensor:
        """The outputs times the gradients that arrived at them, [n]; the sum is what is differentiated."""
        return products(self(), self.out_grads)


def products(tensors: Sequence[Tensor], weights: Sequence[Tensor | None]) -> Tensor:
    """Elementwise products of real parts, float64, [n]; nothing for a tensor without weights."""
    pairs = [(real(y.detach()), real(w)) for y, w in zip(tensors, weights, strict=True) if w is not None]
    return torch.cat([(y.double() * w.double()).flatten() for y, w in pairs] or [torch.zeros(0).double()])


def gradients_of(loss: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Gradients by the real backward pass, dense, zero where none arrives; ``.grad`` is left alone."""
    if not loss.requires_grad:
        return [torch.zeros_like(t) for t in tensors]
    if _checkpointed(loss):
        return _accumulated(loss, tensors)
    grads = torch.autograd.grad(loss, list(tensors), allow_unused=True)
    dense = [None if g is None else g.to_dense() if g.is_sparse else g for g in grads]
    return [torch.zeros_like(t) if g is None else g.detach().clone() for t, g in zip(tensors, dense, strict=True)]


def _checkpointed(loss: Tensor) -> bool:
    """Whether a reentrant checkpoint is in the graph: it only works with ``backward()``."""
    stack = [loss.grad_fn]
    seen = set(stack)
    while stack:
        node = stack.pop()
        if node is None:
            continue
        if node.name() == "CheckpointFunctionBackward":
            return True
        fresh = {after for after, _ in node.next_functions} - seen
        seen |= fresh
        stack += fresh
    return False


def _accumulated(loss: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Gradients by ``backward()``; hooks that run after accumulation, which may be optimisers, are kept from it."""
    before: list[tuple[Any, Tensor | None, Any]] = [(t, t.grad, t._post_accumulate_grad_hooks) for t in tensors]
    try:
        for t, _, _ in before:
            t.grad, t._post_accumulate_grad_hooks = None, None
        loss.backward()
        grads = [torch.zeros_like(t) if t.grad is None else t.grad.to_dense() for t in tensors]
    finally:
        for t, grad, hooks in before:
            t.grad, t._post_accumulate_grad_hooks = grad, hooks
    return [g.detach().clone() for g in grads]


def finite(tensors: Sequence[Tensor | None]) -> bool:
    """Whether every element that is there is a number."""
    return all(bool(t.isfinite().all()) for t in tensors if t is not None)


def first_non_finite(calls: Sequence[Call]) -> Call | None:
    """The innermost, earliest call that turns numbers into NaN or infinity, forward or else backward."""
    for call in calls:
        if finite(tensors_of((call.args, call.kwargs))) and not finite(call.outputs):
            return call
    for call in calls:
        if finite(call.out_grads) and not finite(call.in_grads):
            return call
    return None


def first_difference(calls: Sequence[Call], again: Sequence[Call]) -> Call | None:
    """Where two passes that should be the same part: the innermost, earliest call that makes different outputs of
    the same inputs; else the innermost around the earliest call whose inputs differ, where something else comes in.
    Where other modules are called, it is the innermost around both, which chose them.
    """
    for one, two in zip(calls, again, strict=False):
        if one.path != two.path:
            around = [call for call in calls if call.index <= one.index and one.end <= call.end]
            choosing = [call for call in around if inside(two.path, call.path)]
            return max(choosing, key=lambda call: call.index) if choosing else one
        if _same(one.outputs, two.outputs):
            continue
        if _same(tensors_of((one.args, one.kwargs)), tensors_of((two.args, two.kwargs))):
            return one
        around = [call for call in calls if call.index < one.index and one.end <= call.end]
        return max(around, key=lambda call: call.index) if around else one
    return None


def _same(one: Sequence[Tensor], two: Sequence[Tensor]) -> bool:
    return len(one) == len(two) and all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def inside(path: str, container: str) -> bool:
    """Whether a module path lies in another, or is it.

    Example:
        >>> inside("encoder.0", "encoder"), inside("encoder2", "encoder"), inside("encoder", "")
        (True, False, True)
    """
    return not container or path == container or path.startswith(f"{container}.")
