"""How much gradient reaches each step of a recurrence: the size of the loss's gradient at every use in time.

A recurrent net is one whose weight is used many times, each use depending on the one before. Backpropagation
through time multiplies one Jacobian a step, so the gradient at early steps can be lost or blown up although the
weight's own gradient, the sum over all steps, looks well (Bengio, Simard and Frasconi 1994; Pascanu, Mikolov and
Bengio 2013, https://arxiv.org/abs/1211.5063). ``nn.RNN``, ``nn.LSTM`` and ``nn.GRU`` are one case: one call, read at
a twin of their input. Cells in a Python loop, a module called T times, a raw parameter in a loop and a block shared
along the depth are the other: read in the autograd graph, where such a weight has many uses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.rnn import PackedSequence
from torch.utils.hooks import RemovableHandle

from hesse.health.sensors.functional import Call, Calls
from hesse.health.sensors.protocol import Reading, Section
from hesse.health.sensors.samples import tensors
from hesse.health.stats import Layer

__all__ = ["Recurrence"]

USES = 8  # a weight used less often in one pass is shared, not recurrent; so little depth loses no gradient either
KEPT = 32  # steps of time that are written down, evenly spaced, first and last among them
NODES = 50_000  # of the graph are looked at: a walk is linear, yet it is Python
DEPTH = 4  # operations that a parametrization (weight norm, spectral norm, a low-rank update) may take
LOOKUPS = ("Embedding", "Index", "Gather")  # operations on a weight alone, as the graph has it, that depend on data
TRIES = 3  # passes without any recurrence before the graph is no longer searched

Node = Any  # torch.autograd.graph.Node lacks next_functions in its stub


class Recurrence:
    """Gradients over time (sums of absolute values), first step to last: ``{path: {"grad": [steps]}}``, at most 32.

    A path is that of a fused module, or of the module that holds the weight that recurs.
    """

    section: ClassVar[Section] = "times"

    def __init__(self, model: nn.Module, layers: Sequence[Layer], calls: Calls) -> None:
        del layers  # a frozen recurrence loses the gradient too
        self._fused: dict[str, nn.RNNBase] = {}
        self._weights: dict[int, str] = {}
        for path, module in model.named_modules():
            path = path or type(model).__name__
            if isinstance(module, nn.RNNBase):
                self._fused[path] = module
            elif not isinstance(module, nn.Embedding | nn.EmbeddingBag):
                owner = path.split(".parametrizations.")[0]
                for param in module.parameters(recurse=False):
                    if not is_lazy(param) and param.dim() > 1:
                        self._weights.setdefault(id(param), owner)
        self._hooks: list[RemovableHandle] = []
        self._norms: dict[str, dict[int, Tensor]] = {}
        self._barren = 0
        calls.on_modules(self._search, lambda module: module is model)

    def listen(self) -> None:
        """Fused modules will see a twin of their input, which asks for a gradient."""
        self.rest()
        self._norms = {}
        for path, module in self._fused.items():
            if not isinstance(module, torch.jit.ScriptModule):
                hook = module.register_forward_pre_hook(self._twin(path), with_kwargs=True)
                self._hooks.append(hook)

    def rest(self) -> None:
        """Hooks on modules go; those in the graph go with the graph."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def read(self) -> Reading:
        """Norms over time of what the backward pass has brought."""
        heard, self._norms = self._norms, {}
        reading: Reading = {}
        for path, norms in heard.items():
            if norms:
                steps = [norms[i] for i in sorted(norms)]
                reading[path] = {"grad": steps[0] if steps[0].dim() else torch.stack(steps)}
        return reading

    def state_dict(self) -> dict[str, Any]:
        """Nothing is counted from sample to sample but the searches that found nothing."""
        return {"barren": self._barren}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state``."""
        self._barren = state["barren"]

    def _twin(self, path: str) -> Any:
        def replace(module: nn.RNNBase, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            given = args[0] if args else kwargs.get("input")
            packed = given if isinstance(given, PackedSequence) else None
            data: Any = given if packed is None else packed.data
            if path in self._norms or not torch.is_grad_enabled() or not _differentiable(data):
                return None
            # A leaf of its own where the input is data: nothing of it reaches the user's .grad.
            twin = data.view_as(data) if data.requires_grad else data.detach().requires_grad_()
            heard = self._norms[path] = {}
            axis = 1 if module.batch_first and data.dim() == 3 else 0
            sizes = None if packed is None else packed.batch_sizes
            twin.register_hook(lambda grad: heard.update({0: _over_time(grad, axis, sizes)}))
            if packed is not None:
                twin = PackedSequence(twin, packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices)
            return ((twin, *args[1:]), kwargs) if args else (args, {**kwargs, "input": twin})

        return replace

    def _search(self, call: Call) -> None:
        """Hooks on the uses of every weight that recurs in the graph of the model's output."""
        if self._barren >= TRIES or not self._weights:
            return
        found = recurrences([t for t in tensors(call.output) if _differentiable(t)], self._weights)
        self._barren = 0 if found else self._barren + 1
        for path, uses in found.items():
            heard = self._norms.setdefault(path, {})
            for i in _thinned(len(uses)):
                uses[i].register_prehook(_listener(heard, i))


def recurrences(outputs: Sequence[Tensor], weights: Mapping[int, str]) -> dict[str, list[Node]]:
    """The nodes of the autograd graph of ``outputs`` at which a weight is used again and again, in order of time.

    Args:
        outputs: tensors with a graph.
        weights: paths of the modules by ``id`` of the weight.

    Returns:
        By path the nodes that join the weight with data, for weights with at least 8 such uses of which each
        depends on the one before; of several such weights of a module the first.

    Example:
        >>> cell, head = nn.RNNCell(2, 3), nn.Linear(3, 1)
        >>> h = torch.zeros(1, 3)
        >>> for _ in range(10):
        ...     h = cell(torch.randn(1, 2), h)
        >>> paths = {id(cell.weight_hh): "cell", id(head.weight): "head"}
        >>> {path: len(uses) for path, uses in recurrences([head(h)], paths).items()}
        {'cell': 10}
    """
    consumers: dict[Node, list[Node]] = {}
    leaves: list[Node] = []
    todo: list[Node] = [t.grad_fn for t in outputs if t.grad_fn is not None]
    seen: set[Node] = set(todo)
    while todo and len(seen) < NODES:
        node = todo.pop()
        for source, _ in node.next_functions:
            if source is None:
                continue
            consumers.setdefault(source, []).append(node)
            if source not in seen:
                seen.add(source)
                todo.append(source)
                if hasattr(source, "variable") and id(source.variable) in weights:
                    leaves.append(source)
    order = {key: i for i, key in enumerate(weights)}
    found: dict[str, list[Node]] = {}
    for leaf in sorted(leaves, key=lambda node: order[id(node.variable)]):
        path = weights[id(leaf.variable)]
        uses = _uses(leaf, consumers)
        if path not in found and len(uses) >= USES and all(_depends(uses[i + 1], uses[i]) for i in (0, len(uses) - 2)):
            found[path] = uses
    return found


def _uses(leaf: Node, consumers: Mapping[Node, list[Node]]) -> list[Node]:
    """Where a weight meets data: transposition, casts and parametrizations of weights alone are passed by."""
    uses: set[Node] = set()
    seen: set[Node] = set()
    todo = list(consumers.get(leaf, ()))
    while todo:
        consumer = todo.pop()
        if consumer in seen:
            continue
        seen.add(consumer)
        if len(consumer.next_functions) == 1 or _of_weights(consumer, DEPTH):
            todo += consumers.get(consumer, ())
        else:
            uses.add(consumer)
    return sorted(uses, key=lambda use: use._sequence_nr())


def _of_weights(node: Node, depth: int) -> bool:
    """Whether all that a node joins comes from parameters, by few operations and none that looks rows up."""
    if hasattr(node, "variable"):
        return True
    if not depth or not node.next_functions or any(word in node.name() for word in LOOKUPS):
        return False
    return all(source is not None and _of_weights(source, depth - 1) for source, _ in node.next_functions)


def _depends(later: Node, earlier: Node) -> bool:
    """Whether a path of the graph leads from the later node back to the earlier one."""
    oldest = earlier._sequence_nr()
    todo, seen = [later], {later}
    while todo:
        for source, _ in todo.pop().next_functions:
            if source is earlier:
                return True
            if source is not None and source not in seen and source.next_functions and source._sequence_nr() > oldest:
                seen.add(source)
                todo.append(source)
    return False


def _listener(heard: dict[int, Tensor], i: int) -> Any:
    def listen(grads: tuple[Tensor | None, ...]) -> None:
        grad = grads[0]
        if grad is not None and not torch._C._functorch.is_functorch_wrapped_tensor(grad):
            heard[i] = _size(grad)

    return listen


def _over_time(grad: Tensor, axis: int, sizes: Tensor | None) -> Tensor:
    """Sizes [<= 32] of a gradient [time, ..., features], or of packed rows, ``sizes`` of them a step of time."""
    steps = grad.movedim(axis, 0).unbind() if sizes is None else grad.split(sizes.tolist())
    return torch.stack([_size(steps[i]) for i in _thinned(len(steps))])


def _size(grad: Tensor) -> Tensor:
    """The sum of absolute values: squares of what is left after a hundred steps are below float32."""
    return torch.linalg.vector_norm(grad.detach().float(), 1)


def _thinned(count: int) -> list[int]:
    """At most 32 of ``count`` indices, evenly spaced, first and last among them."""
    if count <= KEPT:
        return list(range(count))
    return [round(i * (count - 1) / (KEPT - 1)) for i in range(KEPT)]


def _differentiable(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point() and not torch._C._functorch.is_functorch_wrapped_tensor(x)
