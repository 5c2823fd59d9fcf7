"""A forward pass in pieces, each a function of its own tensors that can be differentiated twice or forwards, alone.

A piece is a call of a module, a custom autograd Function, of the loss function or of one torch operation, with copies
of what went in. Unlike the gradients of :mod:`hesse.check.passes.calls`, which are those of the real backward pass,
second derivatives are never formed in training: they have no real pass, and every piece can be asked by itself. Run
again, it gives its outputs as a function of live tensors: the inputs that carried a gradient, and the parameters
inside.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from hesse.check.passes.calls import RandomState, cuda_devices
from hesse.check.passes.functions import FunctionCall, Functions, defined, name_of
from hesse.check.passes.operations import user_frame

__all__ = ["Piece", "Pieces", "operations_of", "piece_of"]


@dataclass(eq=False)
class Piece:
    """One call.

    Args:
        path: of the module that it is, or inside which it was made.
        run: called with ``args`` and ``kwargs``, in which tensors are copies.
        live: those tensors among them that carried a gradient.
        params: by name, the trainable parameters inside.
        random: the generators as they were.
        kind: "module", "loss", "function" or "operation".
        name: of the Function, the operation or the module's class.
        file, line: of a module its forward, of an operation the user's call; of a Function, see ``cls``.
    """

    path: str
    run: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    live: list[Tensor]
    params: dict[str, Tensor]
    random: RandomState
    kind: str
    name: str
    cls: type[Function] | None = None
    file: str | None = None
    line: int | None = None

    @property
    def plain(self) -> bool:
        """Whether it is one of torch's own layers, with nothing in it."""
        module = self.run
        return (
            isinstance(module, nn.Module)
            and type(module).__module__.startswith("torch.nn.modules.")
            and not any(True for _ in module.children())
        )

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What it is a function of, by name: inputs and parameters; may be moved in place."""
        return {**{f"input {i}": x for i, x in enumerate(self.live)}, **self.params}

    def outputs(self, instead: Mapping[int, Tensor] | None = None) -> list[Tensor]:
        """Its floating outputs, with a graph to ``tensors``.

        Args:
            instead: by id of an input, what stands for it (a dual number).
        """
        live = {id(x): x for x in self.live} | dict(instead or {})

        def fresh(x: Tensor) -> Tensor:  # the call may edit its arguments in place
            return live.get(id(x), x.detach()).clone()

        args, kwargs = pytree.tree_map_only(Tensor, fresh, (self.args, self.kwargs))
        with torch.enable_grad(), self.random.again():
            return _floating(self.run(*args, **kwargs))


@dataclass
class Pieces:
    """The pieces of one forward pass, innermost first.

    Args:
        model: whose modules are told apart; None for a function of tensors.
    """

    model: nn.Module | None
    modules: list[Piece] = field(default_factory=list)
    functions: list[Piece] = field(default_factory=list)
    within: list[tuple[str, RandomState, Any, list[bool]]] = field(default_factory=list)  # calls that have not returned

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record the calls made inside."""
        handles = []
        model = self.model
        devices = cuda_devices([*model.parameters(), *model.buffers()]) if model is not None else []

        def before(path: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
                copies, carried = _taken((args, kwargs))
                self.within.append((path, RandomState(devices), copies, carried))

            return hook

        def after(module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
            path, random, (args, kwargs), carried = self.within.pop()
            file, line = defined(type(module).forward)
            params: dict[str, Tensor] = {n: p for n, p in module.named_parameters() if p.requires_grad and p.numel()}
            live = _live((args, kwargs), carried)
            name = type(module).__name__
            self.modules.append(
                Piece(path, module, args, kwargs, live, params, random, "module", name, None, file, line)
            )

        for path, module in model.named_modules() if model is not None else ():
            if not isinstance(module, torch.jit.ScriptModule):
                handles.append(module.register_forward_pre_hook(before(path), with_kwargs=True))
                handles.append(module.register_forward_hook(after, with_kwargs=True))
        functions = Functions(lambda: self.within[-1][0] if self.within else "", devices)
        try:
            with functions.recording():
                yield
        finally:
            for handle in handles:
                handle.remove()
        self.functions += [piece_of(call) for call in functions.calls]

    def whole(self, name: str, function: Callable[..., Any], args: Any, kwargs: Any) -> None:
        """Add the function itself, which is all there is where there are no modules."""
        copies, carried = _taken((args, kwargs))
        random = RandomState(cuda_devices(_tensors(args)))
        live = _live(copies, carried)
        file, line = defined(function)
        self.modules.append(Piece("", function, *copies, live, {}, random, "module", name, None, file, line))

    def called(self, path: str, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        """Call the loss function and record it."""
        copies, carried = _taken((args, {}))
        random = RandomState(cuda_devices(_tensors(args)))
        self.within.append((path, random, copies, carried))
        try:
            result = function(*args)
        finally:
            self.within.pop()
        live = _live(copies, carried)
        self.modules.append(Piece(path, function, *copies, live, {}, random, "loss", "the loss"))
        return result


def piece_of(call: FunctionCall) -> Piece:
    """A recorded call of a custom Function as a piece."""
    tree: Any = (call.args, {})
    copies, _ = _taken(tree)
    asked = {id(x) for x in call.inputs}
    carried = [id(x) in asked and x.is_floating_point() and x.numel() > 0 for x in _tensors(tree)]
    name = name_of(call.cls)
    return Piece(call.path, call.target, *copies, _live(copies, carried), {}, call.random, "function", name, call.cls)


def operations_of(piece: Piece) -> list[Piece]:
    """The torch operations inside a piece, in the order of their calls."""
    found: list[Piece] = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            if not any(x.requires_grad for x in _tensors((args, kwargs))) or not torch.is_grad_enabled():
                return func(*args, **kwargs)
            copies, carried = _taken((args, kwargs))
            random = RandomState(list(piece.random.cuda))
            result = func(*args, **kwargs)
            if any(y.requires_grad for y in _floating(result)):
                name = getattr(func, "__name__", str(func))
                file, line, _ = user_frame()
                live = _live(copies, carried)
                found.append(Piece(piece.path, func, *copies, live, {}, random, "operation", name, None, file, line))
            return result

    with Watch():
        piece.outputs()
    return found


def _taken(tree: tuple[Any, Any]) -> tuple[tuple[Any, Any], list[bool]]:
    """Arguments and keyword arguments with copies of the tensors, and of each whether it carries a gradient."""
    carried = [x.requires_grad and x.is_floating_point() and x.numel() > 0 for x in _tensors(tree)]
    return pytree.tree_map_only(Tensor, lambda x: x.detach().clone(), tree), carried


def _live(copies: Any, carried: Sequence[bool]) -> list[Tensor]:
    """Those copies that carry a gradient, made to do so."""
    return [x.requires_grad_() for x, asked in zip(_tensors(copies), carried, strict=True) if asked]


def _tensors(tree: Any) -> list[Tensor]:
    return [x for x in pytree.tree_leaves(tree) if isinstance(x, Tensor)]


def _floating(result: Any) -> list[Tensor]:
    return [y for y in _tensors(result) if y.is_floating_point()]
