"""What a shared parameter is told by each of its uses: the norm of the gradient that arrives through every one.

A parameter's gradient is the sum over its uses. When an embedding is also the output layer, or one encoder reads two
inputs, one use can drown the other, and the sum does not show it. So a parameter that has several uses is replaced at
each by a view of itself with a hook. Turns of a loop are one use.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hesse.health.sensors.functional import Call, Calls
from hesse.health.sensors.protocol import Reading, Section
from hesse.health.stats import Layer

__all__ = ["Ties"]

# Where weights are used. Not every function: p.grad and p.add_ must see the parameter itself.
USES = {
    "linear", "bilinear", "matmul", "rmatmul", "mm", "bmm", "mv", "addmm", "baddbmm", "einsum", "tensordot",
    "embedding", "embedding_bag", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d",
    "conv_transpose3d", "layer_norm", "rms_norm", "batch_norm", "group_norm", "instance_norm", "prelu",
    "multi_head_attention_forward", "lstm", "gru", "rnn_tanh", "rnn_relu", "lstm_cell", "gru_cell", "rnn_tanh_cell",
    "rnn_relu_cell", "t", "T", "mT", "transpose", "permute", "getitem", "index_select", "mul", "add", "sub", "div",
    "unsqueeze", "expand", "view", "reshape",
}  # fmt: skip


class Ties:
    """``{parameter: {use: norm}}`` of the parameters with two or more uses in one forward.

    A use goes by the module's path, or by the calling module's and the function. Uses that no module tells apart are
    found in the first pass that is listened to and measured from the next one on.

    Example:
        A tied embedding: the input side gets what comes through the one matrix, the output side through the other.

        >>> net = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5, bias=False))
        >>> net[1].weight = net[0].weight
        >>> calls = Calls(net)
        >>> sensor = Ties(net, [], calls)
        >>> calls.listen()
        >>> y = net(torch.tensor([1, 2]))
        >>> calls.rest()
        >>> y.sum().backward()
        >>> uses = sensor.read()["0.weight"]
        >>> list(uses), torch.allclose(uses["1"], net[0].weight[[1, 2]].sum(0).norm() * 5**0.5)
        (['0', '1'], True)
    """

    section: ClassVar[Section] = "ties"

    def __init__(self, model: nn.Module, layers: Sequence[Layer], calls: Calls) -> None:
        self.calls = calls
        self._names: dict[int, str] = {}
        times: Counter[int] = Counter()
        for name, p in model.named_parameters(remove_duplicate=False):
            if p.requires_grad:
                self._names.setdefault(id(p), name)
                times[id(p)] += 1
        self._tied = {i for i, n in times.items() if n > 1}
        self._uses: dict[int, set[str]] = {}  # of every parameter in this pass
        self._arrivals: dict[tuple[str, str], _Arrivals] = {}
        calls.on_arguments(USES, self._watch)

    def listen(self) -> None:
        self._uses, self._arrivals = {}, {}

    def rest(self) -> None:
        self._tied |= {i for i, uses in self._uses.items() if len(uses) > 1}

    def read(self) -> Reading:
        reading: Reading = {}
        for (name, use), arrivals in self._arrivals.items():
            norm = arrivals.norm()
            if norm is not None:
                reading.setdefault(name, {})[use] = norm
        self.listen()
        return {name: uses for name, uses in reading.items() if len(uses) > 1}

    def state_dict(self) -> dict[str, Any]:
        return {"tied": sorted(self._names[i] for i in self._tied)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._tied |= {i for i, name in self._names.items() if name in state["tied"]}

    def _watch(self, call: Call) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments, with a view in the place of each tied parameter."""
        if torch._C._functorch.peek_interpreter_stack() is not None or not torch.is_grad_enabled():
            return call.args, call.kwargs
        args = tuple(self._view(x, call) for x in call.args)
        return args, {name: self._view(x, call) for name, x in call.kwargs.items()}

    def _view(self, value: Any, call: Call) -> Any:
        if isinstance(value, (tuple, list)):
            return type(value)([self._view(x, call) for x in value]) if type(value) in (tuple, list) else value
        if not isinstance(value, nn.Parameter) or id(value) not in self._names:
            return value
        use = self.calls.key("tie", call.path, call.chain)
        self._uses.setdefault(id(value), set()).add(use)
        if id(value) not in self._tied:
            return value
        arrivals = self._arrivals.setdefault((self._names[id(value)], use), _Arrivals(self.calls))
        view = value.expand_as(value)  # not view_as, whose backward refuses sparse gradients
        view.register_hook(arrivals.hook())
        return view


class _Arrivals:
    """The gradients that come through one use: their sum until all turns of a loop have brought theirs."""

    def __init__(self, calls: Calls) -> None:
        self.calls = calls
        self.waiting = 0
        self.total: Tensor | None = None
        self.result: Tensor | None = None

    def hook(self) -> Callable[[Tensor], None]:
        self.waiting += 1
        heard = False

        def hear(grad: Tensor) -> None:
            nonlocal heard
            if heard or self.calls.listening or torch._C._functorch.is_functorch_wrapped_tensor(grad):
                return  # a second backward through the same pass, or products with the Hessian
            heard = True
            with torch.no_grad():
                g = grad.detach()
                self.total = g if self.total is None else self.total + g
                self.waiting -= 1
                if not self.waiting:
                    self.result, self.total = _norm(self.total), None

        return hear

    def norm(self) -> Tensor | None:
        """None when no gradient has come."""
        return _norm(self.total) if self.total is not None else self.result


def _norm(g: Tensor) -> Tensor:
    g = g.coalesce().values() if g.is_sparse else g
    return torch.linalg.vector_norm(g, dtype=torch.promote_types(g.dtype, torch.float32))
