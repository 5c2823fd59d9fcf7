"""Every call of a custom autograd Function inside one real pass: what went in, what came out, the gradients that
arrived and those that were returned.

A Function is often bound before anybody looks (``gelu = Gelu.apply``), so the class itself is where its calls
can be met: ``forward`` and ``backward`` (or ``vjp``, or a separate ``setup_context``) are replaced while a pass
is watched and put back afterwards. Operators of ``torch.library`` whose backward was registered in Python are
Functions too. The gradient that arrives is copied before the backward may edit it.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import linecache
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from hesse.check.passes.calls import Call, RandomState, copy_of, differentiable, mapped

__all__ = ["FunctionCall", "Functions", "backward_of", "defined", "name_of", "patched", "user_functions"]

LIBRARY = "GeneratedBackwardFor_"  # the Functions that torch.library makes for operators


@dataclass(eq=False)
class FunctionCall(Call):
    """One call of a custom Function; ``path`` (``where``) is the module inside which it was made.

    Args:
        cls: the Function.
        backwards: what its backward has done, one entry for each time it ran: the gradients that arrived, and
            those it returned. ``out_grads`` and ``in_grads`` are those of the last time.
        edited: whether the backward changed, in place, a gradient that had arrived.
        masks: which arguments, and which outputs, are differentiated.
    """

    cls: type[Function] = Function
    backwards: list[tuple[list[Tensor | None], list[Tensor | None]]] = field(default_factory=list)
    edited: bool = False
    masks: tuple[Sequence[bool], Sequence[bool]] = ((), ())

    @property
    def key(self) -> tuple[Any, ...]:
        return ("function", self.cls)

    @property
    def where(self) -> str:
        return self.path

    @property
    def name(self) -> str:
        """The class name, or that of the operator. Not to be asked while the classes are patched."""
        return name_of(self.cls)

    @property
    def source(self) -> tuple[str | None, int | None]:
        """File and line of the backward. Not to be asked while the classes are patched."""
        return defined(backward_of(self.cls))


class Functions:
    """Records the calls of custom Functions.

    Args:
        here: tells the path of the module that is running.
        devices: indices of the CUDA devices in use.
        protect: whether each backward is given copies, so that it cannot edit what others need too.
        begun, ended: called before and after each forward, with the arguments and outputs themselves.
    """

    def __init__(
        self,
        here: Callable[[], str] = str,
        devices: Sequence[int] = (),
        begun: Callable[[FunctionCall, tuple[Any, ...]], None] = lambda call, args: None,
        ended: Callable[[FunctionCall, tuple[Any, ...], Any], None] = lambda call, args, result: None,
        protect: bool = False,
    ) -> None:
        self.here = here
        self.devices = devices
        self.begun = begun
        self.ended = ended
        self.protect = protect
        self.tokens: dict[int, tuple[Any, Any]] = {}
        self.calls: list[FunctionCall] = []

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record the calls made inside, forward and backward."""
        with patched(self._forward, self._backward, self.tokens):
            yield

    def _forward(
        self, cls: type[Function], args: tuple[Any, ...], run: Callable[[], Any]
    ) -> tuple[Any, FunctionCall | None]:
        if any(torch._C._functorch.is_functorch_wrapped_tensor(x) for x in args if isinstance(x, Tensor)):
            return run(), None
        call = FunctionCall(self.here(), cls.apply, (), {}, RandomState(self.devices))
        call.cls = cls
        call.args = tuple(mapped(copy_of, x) for x in args)
        asked = [isinstance(x, Tensor) and x.requires_grad and differentiable(x) for x in args]
        call.inputs = list(itertools.compress(call.args, asked))
        # A module may be given with its own parameters, only so that autograd knows them: it computes with them, not
        # with copies. Given twice, it is not known which copy counts.
        times = Counter(map(id, args))
        owned = [
            given and isinstance(x, nn.Parameter) and times[id(x)] == 1 for x, given in zip(args, asked, strict=True)
        ]
        call.owners = {id(copy): x for copy, x in itertools.compress(zip(call.args, args, strict=True), owned)}
        call.in_grads = [None] * len(call.inputs)
        self.begun(call, args)
        result = run()
        self.ended(call, args, result)
        self.calls.append(call)
        call.result = mapped(copy_of, result)
        leaves = result if isinstance(result, tuple) else (result,)
        given = [isinstance(y, Tensor) and differentiable(y) for y in leaves]
        call.outputs = [copy_of(y) for y in itertools.compress(leaves, given)]
        call.out_grads = [None] * len(call.outputs)
        call.masks = (asked, given)
        return result, call

    def _backward(self, call: FunctionCall, grads: tuple[Any, ...], run: Callable[..., Any]) -> Any:
        before = [copy_of(g) if isinstance(g, Tensor) else None for g in grads]
        if self.protect:
            grads = tuple(g.clone() if isinstance(g, Tensor) else g for g in grads)
        result = run(*grads)
        for g, kept in zip(grads, before, strict=True):
            if kept is not None and not torch.equal(torch.nan_to_num(g.detach()), torch.nan_to_num(kept)):
                call.edited = True
        call.twice |= torch.is_grad_enabled()  # the derivative of this backward is wanted too
        asked, given = call.masks
        returned = result if isinstance(result, tuple) else (result,)
        sent: list[Tensor | None] = [None] * len(call.inputs)
        for i, (g, x) in enumerate(zip(itertools.compress(returned, asked), call.inputs, strict=False)):
            if isinstance(g, Tensor):  # autograd itself sums what was broadcast
                sent[i] = copy_of(g.sum_to_size(x.shape) if _covers(g, x) else g)
        call.out_grads, call.in_grads = list(itertools.compress(before, given)), sent
        call.backwards.append((call.out_grads, call.in_grads))
        return result


@contextmanager
def patched(
    forward: Callable[[type[Function], tuple[Any, ...], Callable[[], Any]], tuple[Any, Any]],
    backward: Callable[[Any, tuple[Any, ...], Callable[..., Any]], Any] | None = None,
    tokens: dict[int, tuple[Any, Any]] | None = None,
) -> Iterator[None]:
    """Inside, ``forward(cls, args, run)`` stands for the forward of every custom Function; ``run()`` is what was
    there (for the backward ``run(*grads)``). It returns the outputs and a token that ``backward(token, grads, run)``
    is given for the same call; None for one whose backward is left alone. ``tokens`` keeps them, by id of a context,
    from one time to the next.
    """
    undo: list[tuple[type[Function], str, Any]] = []
    tokens = {} if tokens is None else tokens  # they keep the contexts, so that an id stays its owner's

    def put(cls: type[Function], name: str, function: Callable[..., Any]) -> None:
        undo.append((cls, name, cls.__dict__.get(name)))
        setattr(cls, name, staticmethod(function))

    def early(cls: type[Function], plain: Callable[..., Any]) -> Callable[..., Any]:
        def run(ctx: Any, *args: Any) -> Any:
            if getattr(ctx, "_forward_cls", None) is not cls:  # a subclass calls up
                return plain(ctx, *args)
            result, token = forward(cls, args, lambda: plain(ctx, *args))
            tokens[id(ctx)] = ctx, token
            return result

        return run

    def late(cls: type[Function], plain: Callable[..., Any], setup: Callable[..., Any]) -> None:
        latest: list[Any] = []  # the token of the forward that has just run, for the context that comes after it

        def run(*args: Any) -> Any:
            result, token = forward(cls, args, lambda: plain(*args))
            latest[:] = [token]
            return result

        def setup_context(ctx: Any, inputs: Any, output: Any) -> Any:
            if latest and getattr(ctx, "_forward_cls", None) is cls:
                tokens[id(ctx)] = ctx, latest.pop()
            return setup(ctx, inputs, output)

        put(cls, "forward", run)
        put(cls, "setup_context", setup_context)

    def watched(plain: Callable[..., Any]) -> Callable[..., Any]:
        def run(ctx: Any, *grads: Any) -> Any:
            token = tokens.get(id(ctx), (None, None))[1]
            if token is None or backward is None:
                return plain(ctx, *grads)
            return backward(token, grads, functools.partial(plain, ctx))

        return run

    try:
        for cls in user_functions():
            if cls.setup_context is Function.setup_context:
                put(cls, "forward", early(cls, cls.forward))
            else:
                late(cls, cls.forward, cls.setup_context)
            name = "backward" if cls.vjp is Function.vjp else "vjp"
            put(cls, name, watched(getattr(cls, name)))
        yield
    finally:
        for cls, name, value in reversed(undo):
            if value is None:
                delattr(cls, name)
            else:
                setattr(cls, name, value)


def user_functions() -> list[type[Function]]:
    """The custom Functions there are: subclasses of ``torch.autograd.Function`` that torch did not bring."""
    found: dict[type[Function], None] = {}
    stack: list[type[Function]] = [Function]
    while stack:
        for cls in stack.pop().__subclasses__():
            stack.append(cls)
            if not _of_torch(cls.__module__) or _registered(cls) is not None:
                found[cls] = None
    return list(found)


def backward_of(cls: type[Function]) -> Callable[..., Any]:
    """What the user wrote as the backward of a Function."""
    return _registered(cls) or (cls.backward if cls.vjp is Function.vjp else cls.vjp)


def name_of(cls: type[Function]) -> str:
    """The name of a Function, or of the operator it stands for.

    Example:
        >>> class Cube(Function): ...
        >>> name_of(Cube)
        'Cube'
    """
    if _registered(cls) is None:
        return cls.__name__
    op = inspect.getclosurevars(inspect.unwrap(cls.backward)).nonlocals["op"]
    return f"{op._namespace}::{op._opname}"


def defined(function: Any) -> tuple[str | None, int | None]:
    """File and line of a function's ``def``, below its decorators; (None, None) where there is no source.

    Example:
        >>> file, line = defined(defined)
        >>> linecache.getline(file, line).startswith("def defined")
        True
    """
    function = inspect.unwrap(function)
    while isinstance(function, functools.partial):
        function = function.func
    function = getattr(function, "__func__", function)
    code = getattr(function, "__code__", None)
    if code is None and not isinstance(function, type):
        code = getattr(type(function).__call__, "__code__", None)
    if code is None:
        return None, None
    first = code.co_firstlineno
    for line in range(first, first + 20):
        if re.match(r"\s*(async\s+)?def\b", linecache.getline(code.co_filename, line)) or code.co_name == "<lambda>":
            return code.co_filename, line
    return code.co_filename, first


def _covers(g: Tensor, x: Tensor) -> bool:
    """Whether a gradient has more axes or longer ones than its tensor, which autograd sums."""
    shape = (1,) * (g.ndim - x.ndim) + tuple(x.shape)
    return g.shape != x.shape and len(shape) == g.ndim and all(n in (1, m) for n, m in zip(shape, g.shape, strict=True))


def _of_torch(module: str) -> bool:
    return module == "torch" or module.startswith("torch.")


def _registered(cls: type[Function]) -> Callable[..., Any] | None:
    """The backward that was registered with ``torch.library`` outside torch, if this Function stands for one."""
    if not cls.__name__.startswith(LIBRARY):
        return None
    info = inspect.getclosurevars(inspect.unwrap(cls.backward)).nonlocals.get("info")
    function = getattr(info, "_backward_fn", None)
    return None if function is None or _of_torch(function.__module__) else function
