"""Uses of parameters: where, in one forward pass, a weight met an input.

Curvature by layers (K-FAC, exact diagonals) needs the input of every linear map and the gradient at its output. Modules
are the wrong place to look for them: attention calls its projections as functions, a weight may be tied or called
twice, a recurrent cell is one fused operation. So the operations are watched instead. While :func:`watch_uses` is open
every call of ``F.linear``, a convolution, ``F.embedding`` or a norm notes a :class:`Use` for the parameters that it is
given; multi-head attention and recurrent layers run as the plain operations of :mod:`hesse.curvature.plain`, whose
weights are applied by such calls. A tied weight, a layer called five times and a functional call are then the same
thing: several uses of one parameter.

What the watching did not see cannot go wrong unnoticed: :func:`coverage` walks the autograd graph, and a parameter
that influences the outputs by any other way than its uses is called loose.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.overrides import TorchFunctionMode

from hesse.curvature.plain import PLAIN, Order

__all__ = ["Coverage", "Use", "Uses", "coverage", "output_gradients", "watch_uses"]


@dataclass(frozen=True, eq=False)
class Use:
    """One operation that applied a parameter to an input.

    Args:
        operation: the torch function: ``F.linear``, ``torch.conv2d``, ``F.layer_norm``, ...
        weight, bias: full names of the parameters; None for what is absent, frozen or not a parameter.
        x: the input, detached.
        shape: of the output.
        edge: of the output in the autograd graph: ``torch.autograd.grad(.., use.edge)`` is the gradient there, with
            the elements of the output, perhaps in another shape.
        options: the operation's other arguments by name.
        rows, bias_rows: which part of the weight's (the bias's) first dimension was used; None for all of it.
        nodes: the operation's own nodes in the autograd graph, between its inputs and its output.
        version: of ``x`` when it was used; a later one tells of a change in place.
    """

    operation: Callable[..., Any]
    weight: str | None
    bias: str | None
    x: Tensor
    shape: torch.Size
    edge: GradientEdge
    options: dict[str, Any] = field(default_factory=dict)
    rows: slice | None = None
    bias_rows: slice | None = None
    nodes: frozenset[Node] = frozenset()
    version: int = 0

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters used, weight first."""
        return tuple(name for name in (self.weight, self.bias) if name is not None)


class Coverage(NamedTuple):
    """Names of parameters: ``known`` influence the outputs by their uses alone, ``loose`` ones (also) otherwise.

    A parameter in neither set does not influence the outputs.
    """

    known: frozenset[str]
    loose: frozenset[str]


class Uses(list[Use]):
    """Uses in the order of their calls; ``rewritten`` says whether a fused operation ran as plain ones on the way."""

    rewritten = False


@contextmanager
def watch_uses(params: Mapping[str, Tensor]) -> Iterator[Uses]:
    """Note every use of ``params`` while the context is open and gradients are recorded.

    Args:
        params: trainable parameters by name: the very tensors that the forward pass uses. A tied one appears once.

    Example:
        >>> layer = torch.nn.Linear(3, 2)
        >>> with watch_uses(dict(layer.named_parameters())) as uses:
        ...     y = layer(layer(torch.ones(4, 3)).sum(1, keepdim=True).expand(-1, 3))
        >>> [(use.weight, use.bias, list(use.x.shape)) for use in uses]
        [('weight', 'bias', [4, 3]), ('weight', 'bias', [4, 3])]
    """
    watch = _Watch(params)
    with _uncompiled(), watch:
        yield watch.uses


def output_gradients(uses: Iterable[Use], outputs: Tensor, r: Tensor) -> list[Tensor | None]:
    """The gradient of ``sum(r * outputs)`` at the output of each use, shaped as it; None where there is none."""
    uses = list(uses)
    if not uses:
        return []
    edges = [use.edge for use in uses]
    grads = torch.autograd.grad(outputs, edges, r.to(outputs.dtype), retain_graph=True, allow_unused=True)
    return [None if g is None else g.reshape(use.shape) for use, g in zip(uses, grads, strict=True)]


def coverage(uses: Sequence[Use], params: Mapping[str, Tensor], outputs: Tensor | Sequence[Tensor]) -> Coverage:
    """Which of ``params`` the uses explain, by a walk through the graph of ``outputs``.

    A parameter is known if all edges that lead to it, or into an operation noted for it, come from such operations, and
    no input has been changed in place since.

    Example:
        A weight that is also used by hand is not half covered:

        >>> layer = torch.nn.Linear(2, 2)
        >>> params = dict(layer.named_parameters())
        >>> with watch_uses(params) as uses:
        ...     y = layer(torch.ones(1, 2)) @ layer.weight
        >>> coverage(uses, params, y)
        Coverage(known=frozenset({'bias'}), loose=frozenset({'weight'}))
    """
    leaves = {id(p): name for name, p in params.items() if p.is_leaf}
    others = {_edge(p): name for name, p in params.items() if not p.is_leaf}
    roots = {use.edge.node for use in uses}
    owners: dict[str, set[Node]] = {}
    inside: dict[Node, set[str]] = {}
    for use in uses:
        for name in use.names:
            owners.setdefault(name, set()).update(use.nodes)
            for node in use.nodes - roots:
                inside.setdefault(node, set()).add(name)
    reached: set[str] = set()
    loose = {name for use in uses if use.x._version != use.version for name in use.names}
    tensors = [outputs] if isinstance(outputs, Tensor) else outputs
    stack: list[tuple[Node | None, Sequence[Any]]] = [(None, [_edge(t) for t in tensors if t.requires_grad])]
    seen: set[Node] = set()
    while stack:
        parent, edges = stack.pop()
        for child, number in edges:
            if child is None:
                continue
            here = others.get((child, number)) or leaves.get(id(_leaf_of(child)))
            entered = {here} if here else inside.get(child, set())
            reached |= {here} if here else set()
            loose |= {name for name in entered if parent is None or parent not in owners.get(name, ())}
            if child not in seen:
                seen.add(child)
                stack.append((child, child.next_functions))
    return Coverage(frozenset(reached - loose), frozenset(reached & loose))


class _Call(NamedTuple):
    """What a reader understands of an operation's arguments."""

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    options: dict[str, Any]


class _Watch(TorchFunctionMode):
    """Sees every torch function called in Python. Inside its own handler it is off, so nothing is noted twice."""

    def __init__(self, params: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.names = {id(p): name for name, p in params.items() if p.requires_grad}
        self.edges = {_edge(p) for p in params.values() if not p.is_leaf}
        self.params = params  # alive while their ids are compared
        self.uses = Uses()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in PLAIN and torch.is_grad_enabled() and not _is_saved_elsewhere() and self.concerns((args, kwargs)):
            result = PLAIN[func](self.apply, *args, **kwargs)
            if result is not None:
                self.uses.rewritten = True
                return result
        result = func(*args, **kwargs)
        if func in _READERS and isinstance(result, Tensor) and result.requires_grad:
            call = _READERS[func](*args, **kwargs)
            if call is not None:
                self.note(func, call, result)
        return result

    def concerns(self, value: Any) -> bool:
        """Whether one of the parameters is somewhere among the arguments."""
        if isinstance(value, Tensor):
            return id(value) in self.names
        return isinstance(value, dict | list | tuple) and any(
            self.concerns(one) for one in (value.values() if isinstance(value, dict) else value)
        )

    def apply(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        rows: slice | None = None,
        bias_rows: slice | None = None,
        order: Order | None = None,
    ) -> Tensor:
        """A product inside a layer made of plain operations, which is a use like any other."""
        part = weight if rows is None else weight[rows]
        shift = bias if bias is None or bias_rows is None else bias[bias_rows]
        y = F.linear(x, part, shift)
        if y.requires_grad:
            self.note(F.linear, _Call(x, weight, bias, {} if order is None else {"order": order}), y, rows, bias_rows)
        return y

    def note(
        self,
        operation: Callable[..., Any],
        call: _Call,
        result: Tensor,
        rows: slice | None = None,
        bias_rows: slice | None = None,
    ) -> None:
        """Append the use, if it is one of the parameters, of an ordinary input that is not itself a parameter."""
        weight, bias = (self.names.get(id(p)) for p in (call.weight, call.bias))
        if (weight is None and bias is None) or id(call.x) in self.names:
            return
        if call.x.is_nested or call.x.layout is not torch.strided or not result.is_floating_point():
            return  # the rules are for dense, real tensors
        # A view of what the operation computed (flattened positions) is bypassed in the graph once something changes it
        # in place; what it is a view of is not.
        base = result._base
        behind = base is not None and base.numel() == result.numel() and result.is_contiguous()
        edge = get_gradient_edge(base if behind and base is not None else result)
        inputs = [t for t in (call.x, call.weight, call.bias) if t is not None and not t.is_leaf]
        nodes = _between(edge.node, self.edges, {_edge(t) for t in inputs})
        x = call.x.detach()
        self.uses.append(
            Use(operation, weight, bias, x, result.shape, edge, call.options, rows, bias_rows, nodes, x._version)
        )


def _uncompiled() -> AbstractContextManager[Any]:
    """Compiled modules run as they are written: their compiler would trace the watching itself."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled then, and loading the compiler takes a second
        return nullcontext()
    return torch.compiler.set_stance("force_eager")


def _is_saved_elsewhere() -> bool:
    """Whether something else decides what is saved for the backward pass: a checkpoint runs the operation again there,
    without being watched, and must find the same one."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


def _edge(t: Tensor) -> tuple[Node, int]:
    edge = get_gradient_edge(t)
    return edge.node, edge.output_nr


def _between(root: Node, *stops: set[tuple[Node, int]]) -> frozenset[Node]:
    """The nodes that can be reached from ``root`` without passing one of the edges in ``stops``, or to a leaf."""
    found, stack = {root}, [root]
    while stack:
        for edge in stack.pop().next_functions:
            child = edge[0]
            if child is None or child in found or _leaf_of(child) is not None:
                continue
            if not any(edge in some for some in stops):
                found.add(child)
                stack.append(child)
    return frozenset(found)


def _leaf_of(node: Node) -> Tensor | None:
    """The leaf whose gradient the node gathers, if it is such a node."""
    return getattr(node, "variable", None) if type(node).__name__ == "AccumulateGrad" else None


# Readers have the signatures of the operations they read. None: a use that no rule knows.


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> _Call | None:
    plain = weight.ndim == 2 and (bias is None or bias.shape == weight.shape[:1])  # others broadcast
    return _Call(input, weight, bias, {}) if plain else None


def _convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> _Call:
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    return _Call(input, weight, bias, {**options, "kernel": weight.shape[2:]})


def _transposed(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> _Call:
    return _convolution(input, weight, bias, stride, padding, dilation, groups)


def _embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> _Call | None:
    if max_norm is not None or scale_grad_by_freq:  # the first moves the weight, the second bends its gradient
        return None
    if padding_idx is not None:
        padding_idx %= weight.shape[0]
    return _Call(input, weight, None, {"padding_idx": padding_idx, "size": weight.shape[0]})


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> _Call:
    return _Call(input, weight, bias, {"shape": tuple(normalized_shape), "eps": eps})


def _rms_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> _Call:
    return _Call(input, weight, None, {"shape": tuple(normalized_shape), "eps": eps})


def _group_norm(
    input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> _Call:
    return _Call(input, weight, bias, {"num_groups": num_groups, "eps": eps})


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> _Call:
    statistics = (None, None) if training else (_copy(running_mean), _copy(running_var))
    return _Call(input, weight, bias, {"statistics": statistics, "eps": eps})


def _instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> _Call:
    return _batch_norm(input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)


def _copy(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.detach().clone()


_READERS: dict[Callable[..., Any], Callable[..., _Call | None]] = {
    F.linear: _linear,
    torch.conv1d: _convolution,
    torch.conv2d: _convolution,
    torch.conv3d: _convolution,
    torch.conv_transpose1d: _transposed,
    torch.conv_transpose2d: _transposed,
    torch.conv_transpose3d: _transposed,
    F.embedding: _embedding,
    F.layer_norm: _layer_norm,
    F.rms_norm: _rms_norm,
    F.group_norm: _group_norm,
    F.batch_norm: _batch_norm,
    F.instance_norm: _instance_norm,
}
