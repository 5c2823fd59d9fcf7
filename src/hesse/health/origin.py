"""Where NaN or infinity arose: the last pass is run once more, and everything in it is looked at.

A number that is not finite is carried on by all that follows, so only the first place is worth a word. Forward, each
operation is held against its inputs: the one that made infinity or NaN out of finite numbers is to blame, or a weight,
or what the batch brought. Infinities that a mask put there on purpose are not. Backward, each node of the graph is
held against the gradients that came to it: the square root of zero, the norm of a zero vector, a division that
``where`` hides only forward. What is finite in both arose in the loss. torch's anomaly mode finds the backward half,
for the first NaN, when it was on before.
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

from hesse.health.passes import Call, tensors_in, versions

__all__ = ["Origin", "find_origin", "loss_operation"]

RAISED = (RuntimeError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError, AssertionError, OSError)
ROWS = 10  # of the batch that are named
MASKING = {"masked_fill", "masked_fill_", "where", "full", "full_like", "triu", "tril", "new_full", "fill_"}
SINGULAR = ("Log", "Sqrt", "Rsqrt", "Div", "Pow", "Norm", "Exp", "Reciprocal", "Acos", "Asin", "Atanh", "Log1P")


@dataclass
class Origin:
    """Where it arose. ``stage`` is "input", "weight", "forward", "loss", "backward" or "unknown".

    Args:
        where: path of the module (its class's name for the model itself), name of the argument, or "loss".
        operation: what made it: a function's name, a parameter's, an optimiser's; None when that is not known.
        file, line: of the user's code that called it.
        rows: of the batch that are not finite there, the first few; empty when all are or none is known.
        note: why no more is known.
    """

    where: str
    operation: str | None
    stage: str
    file: str | None = None
    line: int | None = None
    rows: list[int] = field(default_factory=list)
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """As a JSON object."""
        return asdict(self)


@dataclass
class Event:
    """An operation whose output was not finite."""

    name: str
    where: str
    site: tuple[str | None, int | None]
    nan: bool
    sources: list[Tensor]  # inputs that were not finite
    output: Tensor


def find_origin(model: nn.Module, calls: Sequence[Call], updater: str | None, layers: Sequence[str] = ()) -> Origin:
    """Where the NaN or infinity in the gradients of ``model`` arose. The run is left as it was.

    Args:
        model: with the weights that the passes were made with.
        calls: the training passes of this step, as :class:`~hesse.health.passes.Passes` keeps them.
        updater: name of what made the last update, to blame when a weight is not finite; None when the weights have
            been updated since the passes, so that nothing can be told from them if they are not finite.
        layers: paths of those whose gradient is not finite, in the order of the model.

    Example:
        >>> class Net(nn.Module):
        ...     def forward(self, x):
        ...         return (x - 1).log()
        >>> x = torch.ones(2, 1)
        >>> origin = find_origin(Net(), [Call((x,), {}, (torch.get_rng_state(), None), None, [0])], "SGD")
        >>> origin.where, origin.operation, origin.stage, origin.rows
        ('Net', 'log', 'forward', [])
    """
    last = layers[-1] if layers else type(model).__name__
    for path, module in model.named_modules():
        for name, p in module.named_parameters(recurse=False):
            if not finite(p.detach()):
                if updater is None:
                    return Origin(last, None, "unknown", note="The weights were updated since and are lost.")
                return Origin(path or type(model).__name__, f"{updater}.step", "weight", note=f"parameter {name}")
    if any(hasattr(p, "to_local") for p in model.parameters()) or _synchronised(model):
        return Origin(last, None, "unknown", note="A sharded model is not run again by one process alone.")
    for call in calls:
        if versions(call.args, call.kwargs) != call.versions:
            return Origin(last, None, "unknown", note="The batch was changed since, so the pass was not run again.")
        try:
            origin = _run_again(model, call)
        except RAISED as error:  # user code that runs once only must not end the training
            return Origin(last, None, "unknown", note=f"The pass could not be run again: {error}")
        if origin is not None:
            return origin
    if not calls:
        return Origin(last, None, "unknown", note="The model itself was not called, so no pass could be run again.")
    return Origin("loss", None, "loss")


def loss_operation(loss: Tensor, limit: int = 100) -> str | None:
    """The operation nearest to the loss whose value or slope has poles, by the names in its graph.

    Example:
        >>> x = torch.ones(3, requires_grad=True)
        >>> loss_operation((x - 1).sqrt().mean())
        'sqrt'
    """
    nodes, seen = [loss.grad_fn], 0
    while nodes and seen < limit:
        node = nodes.pop(0)
        seen += 1
        if node is None:
            continue
        name = node.name().split("Backward")[0]
        if name in SINGULAR or (name.endswith("Norm") and "Layer" not in name and "Batch" not in name):
            return name.lower()
        nodes += [following for following, _ in node.next_functions]
    return None


def finite(t: Tensor) -> bool:
    """Whether all elements are finite.

    Example:
        >>> finite(torch.tensor([1.0, math.inf])), finite(torch.tensor([1]))
        (False, True)
    """
    t = t.coalesce().values() if t.is_sparse else t
    return not (t.is_floating_point() or t.is_complex()) or bool(t.isfinite().all())


class Recorder(TorchFunctionMode):
    """Remembers which operations gave what is not finite, and which operation each node of the graph belongs to."""

    def __init__(self, path: Callable[[], str]) -> None:
        super().__init__()
        self.path = path
        self.events: dict[int, Event] = {}  # by the id of the output, which the event keeps alive
        self.nodes: dict[Node, tuple[str, str, tuple[str | None, int | None]]] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        inputs = [t for t in tensors_in((args, kwargs or {})) if not finite(t.detach())]  # before in-place changes
        output = func(*args, **(kwargs or {}))
        outputs = tensors_in(output)
        if not outputs:
            return output
        name = getattr(func, "__name__", str(func)).strip("_")
        for t in outputs:
            if t.grad_fn is not None:
                self._label(t.grad_fn, name)
            if not finite(t.detach()):
                if id(t) in self.events and any(t is given for given in inputs):
                    continue  # changed in place, and bad before
                self.events[id(t)] = Event(name, self.path(), site(), bool(t.detach().isnan().any()), inputs, t)
        return output

    def _label(self, node: Node, name: str) -> None:
        """All nodes that one operation made: from its output to the nodes that are known."""
        waiting = [node]
        while waiting:
            node = waiting.pop()
            if node not in self.nodes:
                self.nodes[node] = name, self.path(), site()
                waiting += [following for following, _ in node.next_functions if following is not None]


def _run_again(model: nn.Module, call: Call) -> Origin | None:
    """The pass of ``call`` under observation; None when everything in it is finite."""
    given = tensors_in((call.args, call.kwargs))
    rows = len(given[0]) if given and given[0].dim() else None
    device = given[0].device.type if given else "cpu"
    with _as_it_was(model, call), _paths(model) as path, torch.enable_grad():
        recorder = Recorder(path)
        precision: AbstractContextManager[Any] = (
            nullcontext() if call.autocast is None else torch.autocast(device, call.autocast)
        )
        with precision, recorder:
            outputs = tensors_in(model(*call.args, **call.kwargs))
        for bad in sorted((t for t in outputs if not finite(t.detach())), key=lambda t: not bool(t.isnan().any())):
            origin = _forward(model, call, recorder, bad, rows)
            if origin is not None:
                return origin
        return _backward(model, call, recorder, outputs, rows)


def _forward(model: nn.Module, call: Call, recorder: Recorder, bad: Tensor, rows: int | None) -> Origin | None:
    """From a tensor that is not finite back to what made it so; None for infinities put there by a mask."""
    event: Event | None = None
    while True:
        maker = recorder.events.get(id(bad))
        if maker is None or maker is event:
            name = _argument(model, call, bad)
            if name is not None and not (event is not None and event.nan and _is_mask(bad)):
                return Origin(name, None, "input", rows=_bad_rows(bad, rows))
            break
        made_here = maker.nan and not any(bool(s.detach().isnan().any()) for s in maker.sources)
        if event is not None and event.nan and not maker.nan and maker.name in MASKING:
            break  # NaN where a mask left nothing: the operation on it is to blame, not the mask
        event = maker
        if not event.sources:
            break
        if made_here:
            bad = event.sources[0]
        else:
            bad = next((s for s in event.sources if bool(s.detach().isnan().any())), event.sources[0])
    if event is None or (event.name in MASKING and not event.nan and _is_mask(event.output)):
        return None
    return Origin(event.where, event.name, "forward", *event.site, rows=_bad_rows(event.output, rows))


def _backward(
    model: nn.Module, call: Call, recorder: Recorder, outputs: Sequence[Tensor], rows: int | None
) -> Origin | None:
    """The node of the graph that makes a gradient infinite; with the gradients that came to the outputs if known."""
    live = {i: t for i, t in enumerate(outputs) if t.requires_grad and (i in call.grads or not call.grads)}
    for i in live:
        if i in call.grads and not finite(call.grads[i]):
            return Origin("loss", None, "loss", rows=_bad_rows(call.grads[i], rows))
    params = [p for p in model.parameters() if p.requires_grad]
    if not live or not params:
        return None
    found: list[tuple[Node, Tensor]] = []

    def watch(node: Node) -> Callable[[Any, Any], None]:
        def look(grad_inputs: Sequence[Tensor | None], grad_outputs: Sequence[Tensor | None]) -> None:
            if not found and all(g is None or finite(g) for g in grad_outputs):
                bad = [g for g in grad_inputs if g is not None and not finite(g)]
                if bad:
                    found.append((node, bad[0]))

        return look

    for node in _graph([t.grad_fn for t in live.values()]):
        node.register_hook(watch(node))
    generator = torch.Generator().manual_seed(0)
    grads = [
        call.grads[i]
        if i in call.grads
        else (torch.randn(t.shape, generator=generator) / max(t.numel(), 1)).to(t.device, t.dtype)
        for i, t in live.items()
    ]
    torch.autograd.grad(list(live.values()), params, grads, allow_unused=True)
    if not found:
        return None
    node, grad = found[0]
    name, where, (file, line) = recorder.nodes.get(node, (node.name(), type(model).__name__, (None, None)))
    return Origin(where, name, "backward", file, line, _bad_rows(grad, rows), note=node.name())


def _graph(roots: Sequence[Node | None]) -> list[Node]:
    """All nodes that lead to ``roots``."""
    seen: dict[Node, None] = {}
    waiting = [node for node in roots if node is not None]
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen[node] = None
            waiting += [following for following, _ in node.next_functions if following is not None]
    return list(seen)


def _argument(model: nn.Module, call: Call, t: Tensor) -> str | None:
    """The name of the argument that a tensor came in."""
    try:
        bound = inspect.signature(model.forward).bind_partial(*call.args, **call.kwargs).arguments
    except TypeError:
        bound = {f"argument {i}": value for i, value in enumerate(call.args)} | call.kwargs
    for name, value in bound.items():
        if any(t is part for part in tensors_in(value)):
            return str(name)
    return None


def _bad_rows(t: Tensor, rows: int | None) -> list[int]:
    """The first rows of a batch that are not finite, unless all are not."""
    if rows is None or not t.dim() or len(t) != rows:
        return []
    bad = (~t.detach().isfinite()).reshape(rows, -1).any(1)
    return [] if bool(bad.all()) else bad.nonzero().flatten()[:ROWS].tolist()


def _is_mask(t: Tensor) -> bool:
    """Whether nothing but minus infinity is not finite: what is added to scores to hide them."""
    return bool((t.detach() < math.inf).all())


def _synchronised(model: nn.Module) -> bool:
    """Whether the pass waits for other processes."""
    together = torch.distributed.is_available() and torch.distributed.is_initialized()
    return together and any(isinstance(module, nn.SyncBatchNorm) for module in model.modules())


@contextmanager
def _as_it_was(model: nn.Module, call: Call) -> Iterator[None]:
    """Random numbers as before the pass; they and the buffers are put back."""
    cpu, there = call.random
    devices = [] if there is None else [next(p.device.index for p in model.parameters())]
    buffers = [(b, b.detach().clone()) for b in model.buffers()]
    with torch.random.fork_rng(devices=devices):
        torch.set_rng_state(cpu)
        if there is not None:
            torch.cuda.set_rng_state(there, devices[0])
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, value in buffers:
                    buffer.copy_(value)


@contextmanager
def _paths(model: nn.Module) -> Iterator[Callable[[], str]]:
    """The path of the module at work."""
    names = {id(module): path or type(model).__name__ for path, module in model.named_modules()}
    stack = [type(model).__name__]

    def enter(module: nn.Module, *_: Any) -> None:
        stack.append(names.get(id(module), stack[-1]))

    def leave(*_: Any) -> None:
        stack.pop()

    hooks = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave, always_call=True)]
    try:
        yield lambda: stack[-1]
    finally:
        for hook in hooks:
            hook.remove()


def site() -> tuple[str | None, int | None]:
    """The line of the user's code that is calling: the first frame outside torch and this package."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__", "").split(".")[0] in ("torch", "hesse"):
        frame = frame.f_back
    return (None, None) if frame is None else (frame.f_code.co_filename, frame.f_lineno)
