"""Hooks: functions that were hung on modules, parameters and tensors, and may change a gradient on its way.

A hook is to blame for what goes wrong with it and not without it. So the hooks of a module can be taken off for
a while, all or one, and are put back in their places. Hooks that run after a gradient was accumulated are not
part of ``torch.autograd.grad``: they are run on a copy of their parameter.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as everywhere

__all__ = ["Hook", "hooks_of", "off", "rewritten", "title"]

OF_MODULES = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
OF_ALL = (
    "_global_forward_hooks",
    "_global_forward_pre_hooks",
    "_global_backward_hooks",
    "_global_backward_pre_hooks",
)


@dataclass(frozen=True, eq=False)
class Hook:
    """A hook, and the table that holds it.

    Args:
        path: of the module that carries it or owns the parameter; empty for a hook on all modules.
        function: the hook.
        table, key: where it is kept.
        backward: whether it is given gradients.
    """

    path: str
    function: Any
    table: MutableMapping[Any, Any]
    key: Any
    backward: bool


def hooks_of(model: nn.Module, path: str | None = None) -> list[Hook]:
    """The hooks on the modules and parameters of a model, and on all modules.

    Args:
        path: only those of this module and its own parameters.

    Torch's own hooks, for instance that of ``weight_norm``, are left out: they are how a layer works.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> _ = layer.register_full_backward_hook(lambda module, grad_in, grad_out: None)
        >>> _ = layer.weight.register_hook(lambda grad: grad)
        >>> [(hook.path, title(hook.function)) for hook in hooks_of(nn.Sequential(layer))]
        [('0', '<lambda>'), ('0', '<lambda>')]
    """
    found: list[Hook] = []
    for name, module in model.named_modules():
        if path is not None and name != path:
            continue
        tables = [(getattr(module, table), "backward" in table) for table in OF_MODULES]
        tables += [(p._backward_hooks, True) for p in module.parameters(recurse=False) if p._backward_hooks]
        found += [Hook(name, function, table, key, b) for table, b in tables for key, function in table.items()]
    for attribute in OF_ALL:
        table = getattr(everywhere, attribute)
        found += [Hook("", function, table, key, "backward" in attribute) for key, function in table.items()]
    return [hook for hook in found if not str(getattr(hook.function, "__module__", "")).startswith("torch.")]


@contextmanager
def off(hooks: Collection[Hook]) -> Iterator[None]:
    """Inside, the hooks are off; afterwards each table is what it was, in its order."""
    before = {id(hook.table): (hook.table, dict(hook.table)) for hook in hooks}
    try:
        for hook in hooks:
            del hook.table[hook.key]
        yield
    finally:
        for table, entries in before.values():
            table.clear()
            table.update(entries)


def rewritten(model: nn.Module, grads: dict[str, Tensor]) -> list[tuple[str, Any, Tensor, Tensor]]:
    """Hooks that change a gradient after it was accumulated: parameter, hook, gradient before and after.

    Each runs on a copy of its parameter. One that updates the copy or takes its gradient away is an optimiser
    that works during the backward pass, and is left out, and so is one that knows its own parameter only.
    """
    found = []
    for name, p in model.named_parameters():
        if name not in grads:
            continue
        for hook in list((p._post_accumulate_grad_hooks or {}).values()):
            twin = nn.Parameter(p.detach().clone())
            twin.grad = grads[name].clone()
            try:
                hook(twin)
            except (KeyError, ValueError, AttributeError):  # it looks the parameter up, and this is another
                continue
            if twin.grad is not None and torch.equal(twin, p) and not torch.equal(twin.grad, grads[name]):
                found.append((name, hook, grads[name], twin.grad))
    return found


def title(hook: Any) -> str:
    """The qualified name of a hook, without the function it was defined in."""
    name = getattr(hook, "__qualname__", None) or type(getattr(hook, "func", hook)).__qualname__
    return name.rpartition("<locals>.")[2]
