"""Where a derivative is refused or wrong: the innermost module whose own second derivative fails.

torch names the operation that has no derivative ("derivative for aten::... is not implemented") but not the layer, and
says nothing when a custom ``autograd.Function`` has a wrong one. The model is run once more, and each module is
put to the test alone, on the inputs it saw, in the order in which the modules finish: children before parents. The
first that fails is the culprit.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from hesse.objective import Objective
from hesse.objective.purity import random_state, set_random_state

__all__ = ["DerivativeError", "culprit", "custom_functions", "operation"]

Test = Callable[[Callable[[list[Tensor]], Tensor], list[Tensor]], str | None]


class DerivativeError(RuntimeError):
    """A derivative that torch cannot form, or forms wrongly; the message says where and what to do instead."""


def culprit(objective: Objective, test: Test) -> str:
    """Where ``test`` fails first, as words: the module's path and type, and the custom Functions in it.

    Args:
        objective: its model is run once, unchanged.
        test: of a scalar function of tensors and the tensors: what is wrong with its derivative, or None.
    """
    found: list[str] = []
    busy = False

    def hook(path: str) -> Callable[..., None]:
        def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            nonlocal busy
            if busy or found:
                return
            busy = True  # the module's own children run again below
            try:
                with torch.enable_grad():
                    wrong, functions = _test_alone(module, args, kwargs, test)
            finally:
                busy = False
            if wrong is not None:
                name = f"module {path!r} ({type(module).__name__})" if path else f"the model ({type(module).__name__})"
                through = f", through autograd.Function {', '.join(functions)}" if functions else ""
                found.append(f"{name}{through}: {wrong}")

        return after

    handles = [
        module.register_forward_hook(hook(path), with_kwargs=True)
        for path, module in objective.model.named_modules()
        if not isinstance(module, torch.jit.ScriptModule)
    ]
    try:
        outputs = objective.outputs(objective.params)
    finally:
        for handle in handles:
            handle.remove()
    if found:
        return found[0]
    wrong, functions = _test_loss(objective, outputs, test)
    through = f", through autograd.Function {', '.join(functions)}" if functions else ""
    return f"the loss function{through}: {wrong}" if wrong else "no module alone: it is in how they are put together"


def operation(error: BaseException) -> str:
    """The operation that torch's message names, or the message."""
    text = str(error)
    match = re.search(r"derivative for (\S+) is not implemented|does not support (.+?)\.|for the operator (\S+)", text)
    named = next((group for group in match.groups() if group), None) if match else None
    return named or text.split("\n")[0]


def _test_alone(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], test: Test
) -> tuple[str | None, list[str]]:
    leaves, spec = pytree.tree_flatten((args, kwargs))
    moving = [i for i, x in enumerate(leaves) if isinstance(x, Tensor) and x.is_floating_point()]
    own = [p.detach() for p in module.parameters(recurse=False) if p.requires_grad]
    names = [name for name, p in module.named_parameters(recurse=False) if p.requires_grad]
    functions: list[str] = []
    random = random_state(module)

    def scalar(tensors: list[Tensor]) -> Tensor:
        inputs = list(leaves)
        for i, x in zip(moving, tensors, strict=False):
            inputs[i] = x * 1  # a module that works in place may not touch a leaf
        new_args, new_kwargs = pytree.tree_unflatten(inputs, spec)
        kept = {name: module._parameters[name] for name in names}
        set_random_state(random)
        try:
            for name, p in zip(names, tensors[len(moving) :], strict=True):
                module._parameters[name] = p  # type: ignore[assignment]
            output = module(*new_args, **new_kwargs)
        finally:
            module._parameters.update(kept)
        return _curved(output, functions)

    return test(scalar, [leaves[i].detach() for i in moving] + own), functions


def _test_loss(objective: Objective, outputs: Any, test: Test) -> tuple[str | None, list[str]]:
    leaves, spec = pytree.tree_flatten(outputs)
    moving = [i for i, x in enumerate(leaves) if isinstance(x, Tensor) and x.is_floating_point()]
    functions: list[str] = []

    def scalar(tensors: list[Tensor]) -> Tensor:
        filled = list(leaves)
        for i, x in zip(moving, tensors, strict=True):
            filled[i] = x
        return _curved(objective.loss_fn(pytree.tree_unflatten(filled, spec), objective.targets), functions)

    with torch.enable_grad():
        return test(scalar, [leaves[i].detach() for i in moving]), functions


def _curved(output: Any, functions: list[str]) -> Tensor:
    """A number whose second derivative feels every element of ``output``."""
    parts = [x for x in pytree.tree_leaves(output) if isinstance(x, Tensor) and x.is_floating_point()]
    functions[:] = sorted({name for x in parts if x.grad_fn is not None for name in custom_functions(x.grad_fn)})
    total = torch.zeros((), dtype=torch.float64)
    for x in parts:
        weights = torch.linspace(0.5, 1.5, x.numel(), dtype=x.dtype, device=x.device).view(x.shape)
        total = total + (torch.tanh(x) * weights).sum().double().cpu()
    return total


def custom_functions(root: Any) -> Iterator[str]:
    """Names of the ``autograd.Function`` classes in the graph below ``root``."""
    seen, stack = set(), [root]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            yield type(node).__name__.removesuffix("Backward")
        stack.extend(parent for parent, _ in node.next_functions if parent is not None)
