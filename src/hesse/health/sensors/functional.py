"""Who calls what during one forward pass: every call of a module and of a watched function, with its place.

A network written with functions (``F.relu(self.fc(x))``, ``scores.softmax(-1)``) has no module to hook where its
units die or its attention saturates. So one ``TorchFunctionMode`` sees the functions, and hooks on all modules keep a
stack of who is at work, so that a function gets a path like a module's: ``encoder.relu`` is the ReLU that
``encoder`` calls. torch's own leaf modules (``nn.ReLU``, ``nn.Linear``) call one function each and lend it their path.
FlopCounterMode and ModuleTracker of torch keep the same stack in order to count.

Nothing is heard under ``torch.compile`` (hooks and modes would be traced and would compile the model again) or of
ScriptModules, of tensors that vmap, grad or jvp have wrapped, or of other tensor classes (DTensor).
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Collection, Hashable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from threading import get_ident
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from hesse.health.sensors.samples import tensors

__all__ = ["Call", "Calls"]

Site = tuple[str, int, int]  # file, line, instruction: where the user's code makes a call


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a module or of a watched function.

    Args:
        path: of the module (``"encoder.0"``, the class's name for the model itself); for a function that of the module
            that calls it and the function's name (``"encoder.relu"``).
        name: the class's or the function's name.
        module: that was called, or that calls the function.
        function: None for the call of a module.
        args, kwargs, output: as given and returned; live, to be read now and not kept.
        after: path of the layer whose output is read, or else of the layer that was called last, or None.
        direct: whether it is known that the layer's output is read.
        chain: the lines of code that led here, outermost first: the same in every turn of a loop, different for two
            uses of one module.
    """

    path: str
    name: str
    module: nn.Module
    function: Callable[..., Any] | None
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any
    after: str | None
    direct: bool
    chain: tuple[Site, ...]

    def argument(self, index: int, name: str, default: Any = None) -> Any:
        """An argument given by place or by name."""
        return self.args[index] if index < len(self.args) else self.kwargs.get(name, default)


Callback = Callable[[Call], None]
Give = Callable[[Call], tuple[tuple[Any, ...], dict[str, Any]]]


class Calls:
    """The calls of the modules of ``model`` and of functions within its forward, between ``listen`` and ``rest``.

    Subscribers are called after each call, without gradients, autocast and function modes, so that they may use torch
    freely. ``anatomy`` says of each function seen what it is and after which layer it comes.

    Example:
        >>> class Net(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.fc = nn.Linear(2, 3)
        ...
        ...     def forward(self, x):
        ...         return self.fc(x).relu()
        >>> net, heard = Net(), []
        >>> calls = Calls(net)
        >>> calls.on_functions({"relu"}, lambda call: heard.append((call.path, call.after)))
        >>> calls.listen()
        >>> _ = net(torch.ones(1, 2))
        >>> calls.rest()
        >>> heard
        [('Net.relu', 'fc')]
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.root = type(model).__name__
        self.anatomy: dict[str, dict[str, Any]] = {}
        self.order: dict[str, int] = {}  # of this pass: when a module was first called, 1 for the first
        self.count = 0  # calls of modules and watched functions so far
        self._modules: list[tuple[Callback, Callable[[nn.Module], bool] | None]] = []
        self._functions: dict[str, list[Callback]] = {}
        self._replacements: dict[str, list[Give]] = {}
        self._hooks: list[RemovableHandle] = []
        self._mode: _Mode | None = None
        self._stack: list[tuple[str, nn.Module, Site]] = []
        self._makers: dict[int, tuple[weakref.ref[Tensor], str]] = {}
        self._last: str | None = None
        self._thread = 0  # replicas of DataParallel run in others and are not heard
        self._keys: dict[tuple[str, str], dict[Hashable, str]] = {}

    def on_modules(self, callback: Callback, modules: Callable[[nn.Module], bool] | None = None) -> None:
        """Hear every call of a module, or of those modules for which ``modules`` is true."""
        self._modules.append((callback, modules))

    def on_functions(self, names: Collection[str], callback: Callback) -> None:
        """Hear every call of functions by name: "relu" is ``F.relu``, ``torch.relu``, ``x.relu()`` and ``x.relu_()``.

        Functions called by functions of torch are not heard: of ``F.multi_head_attention_forward`` only itself.
        """
        for name in names:
            self._functions.setdefault(name, []).append(callback)

    def on_arguments(self, names: Collection[str], give: Give) -> None:
        """Before a call of these functions, give it other arguments (equal in value, or the run would change).

        The call has no output yet, and gradients flow through what ``give`` does.
        """
        for name in names:
            self._replacements.setdefault(name, []).append(give)

    def key(self, kind: str, path: str, identity: Hashable) -> str:
        """A name for one of several uses of a path: the path itself for the first, then ``path#2``, ``path#3``.

        What makes uses differ, a sensor decides: those of different kinds are numbered apart.
        """
        uses = self._keys.setdefault((kind, path), {})
        if identity not in uses:
            uses[identity] = f"{path}#{len(uses) + 1}" if uses else path
        return uses[identity]

    @property
    def listening(self) -> bool:
        """Whether the forward is going on: a gradient that arrives now is one that the model takes for itself."""
        return bool(self._stack)

    def listen(self, part: nn.Module | None = None, again: bool = False) -> None:
        """Hooks and mode on: call it from a pre-hook of the model's forward.

        Args:
            part: the module within the model whose pre-hook it is, when the model itself is not called.
            again: go on counting ``order``: another part of the same pass.
        """
        self.rest()
        if torch.compiler.is_compiling() or _closed(self.model):
            return
        self._stack = [(self.root, self.model, _site())]
        self._thread = get_ident()
        if not again:
            self.order, self.count = {self.root: 1}, 1
        watched = self._functions.keys() | self._replacements.keys()
        compiled = False
        for path, module in _open_modules(self.model):
            if _closed(module):
                compiled |= not isinstance(module, torch.jit.ScriptModule)
                continue
            if module is self.model:
                continue
            callbacks = self._chosen(module)
            if module is part:  # its own pre-hooks are running already
                self._enter(path)(module, ())
            self._hooks.append(module.register_forward_pre_hook(self._enter(path)))
            leave = module.register_forward_hook(self._leave(path, callbacks), with_kwargs=True, always_call=True)
            self._hooks.append(leave)
        if watched and not compiled:
            self._mode = _Mode(self)
            self._mode.__enter__()

    def rest(self, args: tuple[Any, ...] = (), output: Any = None) -> None:
        """Hooks and mode off. With the model's own arguments and output, subscribers hear of its call too."""
        if self._mode is not None:
            self._mode.__exit__(None, None, None)
            self._mode = None
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        if self._stack and output is not None:
            del self._stack[1:]
            self._tell(self._chosen(self.model), self._call(self.root, self.model, args, {}, output))
        self._stack.clear()
        self._makers.clear()
        self._last = None

    def _chosen(self, module: nn.Module) -> list[Callback]:
        return [callback for callback, wanted in self._modules if wanted is None or wanted(module)]

    def _enter(self, path: str) -> Callable[..., None]:
        def enter(module: nn.Module, args: Any) -> None:
            if torch.compiler.is_compiling() or get_ident() != self._thread:
                return
            self._stack.append((path, module, _site()))
            self.count += 1
            self.order.setdefault(path, self.count)
            if isinstance(module, nn.MultiheadAttention):  # uses its output layer's weights without calling it
                self.order.setdefault(f"{path}.out_proj", self.count)

        return enter

    def _leave(self, path: str, callbacks: list[Callback]) -> Callable[..., None]:
        def leave(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if torch.compiler.is_compiling() or get_ident() != self._thread:
                return
            if not self._stack or self._stack[-1][0] != path:  # listening began within this call
                return
            if output is None:  # the forward raised, and the model may catch it
                self._stack.pop()
                return
            if callbacks:
                self._tell(callbacks, self._call(path, module, args, kwargs, output))
            self._stack.pop()
            if any(True for _ in module.parameters(recurse=False)):
                self._last = path
            if self._last == path or not any(True for _ in module.children()):
                self._remember(path, args, output)

        return leave

    def _remember(self, path: str, args: tuple[Any, ...], output: Any) -> None:
        """Which layer made this tensor; modules without parameters pass on the maker of what they read."""
        maker = path if self._last == path else self._maker(args)
        for y in tensors(output):
            if maker is not None:
                self._makers[id(y)] = weakref.ref(y), maker

    def _maker(self, args: Any) -> str | None:
        for x in tensors(args):
            known = self._makers.get(id(x))
            if known is not None and known[0]() is x:  # an id may have passed to another tensor
                return known[1]
        return None

    def _chain(self) -> tuple[Site, ...]:
        return tuple(site for _, _, site in self._stack)

    def _call(self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Call:
        maker = self._maker((args, kwargs))
        after, name = maker or self._last, type(module).__name__
        return Call(path, name, module, None, args, kwargs, output, after, maker is not None, self._chain())

    def _tell(self, callbacks: list[Callback], call: Call) -> None:
        if any(torch._C._functorch.is_functorch_wrapped_tensor(t) for t in tensors((call.args, call.output))):
            return
        with torch._C.DisableTorchFunction(), torch.no_grad(), _full_precision(call.output):
            for callback in callbacks:
                callback(call)

    def _function(self, func: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        path, module, _ = self._stack[-1]
        if not _one_function(module):
            path = f"{path}.{name}"
        chain = (*self._chain(), _site())
        self.count += 1
        maker = self._maker((args, kwargs))
        for give in self._replacements.get(name, ()):
            args, kwargs = give(Call(path, name, module, func, args, kwargs, None, maker or self._last, False, chain))
        output = func(*args, **kwargs)
        callbacks = self._functions.get(name, [])
        if callbacks:
            call = Call(path, name, module, func, args, kwargs, output, maker or self._last, maker is not None, chain)
            self._tell(callbacks, call)
            if maker is not None:
                for y in tensors(output):
                    self._makers[id(y)] = weakref.ref(y), maker
        return output


class _Mode(TorchFunctionMode):
    """Hands the watched functions to ``Calls``."""

    def __init__(self, calls: Calls) -> None:
        super().__init__()
        self.calls = calls
        self.watched = calls._functions.keys() | calls._replacements.keys()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if not torch.compiler.is_compiling():
            name = _name(func)
            if name in self.watched:
                return self.calls._function(func, name, args, kwargs or {})
        return func(*args, **(kwargs or {}))


def _name(func: Callable[..., Any]) -> str:
    """A function's name; of an attribute like ``x.T``, whose getter is called, the attribute's."""
    name: str = getattr(func, "__name__", "")
    if name == "__get__":
        name = getattr(getattr(func, "__self__", None), "__name__", name)
    return name.strip("_")


def _site() -> Site:
    """The line of the user's code that is calling: the first frame outside torch and this package."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__", "").startswith(("torch.", "hesse.health.")):
        frame = frame.f_back
    return ("", 0, 0) if frame is None else (frame.f_code.co_filename, frame.f_lineno, frame.f_lasti)


def _one_function(module: nn.Module) -> bool:
    """Whether it is one of torch's own layers, whose functions go by the module's path."""
    if not type(module).__module__.startswith("torch.nn"):
        return False
    return isinstance(module, nn.MultiheadAttention) or all(name == "parametrizations" for name in module._modules)


def _closed(module: nn.Module) -> bool:
    """Compiled or scripted: no hook may go in."""
    compiled = getattr(module, "_compiled_call_impl", None) is not None or hasattr(module, "_orig_mod")
    return compiled or isinstance(module, torch.jit.ScriptModule)


def _open_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Paths and modules, each once, in the order of ``named_modules``; nothing below a compiled or scripted one."""
    shut: set[int] = set()
    for path, module in model.named_modules():
        if id(module) in shut:
            continue
        if _closed(module):
            shut |= {id(inner) for inner in module.modules()}
        yield path, module


def _full_precision(output: Any) -> AbstractContextManager[Any]:
    device = next((y.device.type for y in tensors(output)), "cpu")
    on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if on else nullcontext()
