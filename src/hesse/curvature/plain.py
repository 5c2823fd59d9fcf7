"""Attention and recurrent layers from plain operations, every weight applied by a function that is handed in.

torch runs multi-head attention and recurrent networks as single calls, inside which no weight can be seen to meet its
input. Here they are written out: ``apply(x, weight, bias, ...)`` stands for ``x @ weight.T + bias``, and whoever passes
it sees each product. Results, returned states and gradients are torch's to rounding. Dropout draws the same numbers as
torch's own operation from the same generator (on a CPU; cuDNN's recurrent dropout has a generator of its own), since
attention is handed to the same kernel and dropout acts on tensors of the same shape in the same order.

What is out of the ordinary (wrong shapes, static keys, keyword arguments to a recurrent operation) is not handled: the
functions return None, and the caller lets torch do it, or complain.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["PLAIN", "Apply", "Order", "attention", "recurrent"]


class Order(NamedTuple):
    """Which of ``sequences`` examples each row of a packed input belongs to: ``example`` [rows]."""

    example: Tensor
    sequences: int


class Apply(Protocol):
    """``x @ weight[rows].T + bias[bias_rows]``, with None for all rows and for no bias."""

    def __call__(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        rows: slice | None = None,
        bias_rows: slice | None = None,
        order: Order | None = None,
    ) -> Tensor: ...


_ATTENTION = inspect.signature(F.multi_head_attention_forward)


def attention(apply: Apply, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None] | None:
    """``F.multi_head_attention_forward`` with the same arguments; None for calls that torch is to handle.

    Example:
        Each weight is seen to meet its input, and torch's result comes out:

        >>> seen = []
        >>> def apply(x, weight, bias=None, **parts):
        ...     seen.append(list(weight.shape))
        ...     return F.linear(x, weight, bias)
        >>> x, w, b, out = torch.randn(3, 1, 2), torch.randn(6, 2), torch.randn(6), torch.eye(2)
        >>> given = (x, x, x, 2, 1, w, b, None, None, False, 0.0, out, None)
        >>> torch.allclose(attention(apply, *given)[0], F.multi_head_attention_forward(*given)[0]), seen
        (True, [[6, 2], [2, 2]])
    """
    bound = _ATTENTION.bind(*args, **kwargs)
    bound.apply_defaults()
    o = SimpleNamespace(**bound.arguments)
    if not _is_usual(o):
        return None
    batched = o.query.ndim == 3
    q, k, v = _project(apply, o, batched)
    length, batch, width = q.shape
    heads, head = o.num_heads, width // o.num_heads
    mask, padding, causal = _masks(o, q.dtype, batched)
    if o.bias_k is not None:
        k, v = torch.cat([k, o.bias_k.repeat(1, batch, 1)]), torch.cat([v, o.bias_v.repeat(1, batch, 1)])
    # [positions, batch, heads * head] -> [batch, heads, positions, head]
    q, k, v = (t.unflatten(-1, (heads, head)).permute(1, 2, 0, 3) for t in (q, k, v))
    if o.add_zero_attn:
        k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
    added = (o.bias_k is not None) + bool(o.add_zero_attn)
    if mask is not None:  # [L, S] or [batch * heads, L, S]
        mask = F.pad(mask, (0, added))
        mask = mask.unflatten(0, (batch, heads)) if mask.ndim == 3 else mask
    if padding is not None:  # [batch, S]
        padding = F.pad(padding, (0, added))[:, None, None, :]
        mask = padding.expand(-1, heads, -1, -1) if mask is None else mask + padding
    dropout = o.dropout_p if o.training else 0.0
    weights = None
    if o.need_weights:
        weights = q * math.sqrt(1 / head) @ k.mT
        weights = (weights if mask is None else weights + mask).softmax(-1)
        weights = F.dropout(weights, dropout) if dropout > 0 else weights
        mixed = weights @ v
        weights = weights.mean(1) if o.average_attn_weights else weights
        weights = weights if batched else weights.squeeze(0)
    else:
        mixed = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal)
    out = apply(mixed.permute(2, 0, 1, 3).reshape(length, batch, width), o.out_proj_weight, o.out_proj_bias)
    return out if batched else out.squeeze(1), weights


def _is_usual(o: SimpleNamespace) -> bool:
    """Whether shapes and options are those of a call that torch would accept without a word."""
    q, k, v = o.query, o.key, o.value
    if not (q.ndim == k.ndim == v.ndim and q.ndim in (2, 3)) or o.static_k is not None or o.static_v is not None:
        return False
    if (o.bias_k is None) != (o.bias_v is None) or (o.is_causal and o.attn_mask is None):
        return False
    width, batch = q.shape[-1], q.shape[1] if q.ndim == 3 else 1
    if width != o.embed_dim_to_check or width % o.num_heads:
        return False
    masks = [m for m in (o.key_padding_mask, o.attn_mask) if m is not None]
    if any(m.dtype != torch.bool and not m.is_floating_point() for m in masks) or len({m.dtype for m in masks}) > 1:
        return False
    source, shape = k.shape[0], None if o.attn_mask is None else tuple(o.attn_mask.shape)
    if shape not in (None, (q.shape[0], source), (batch * o.num_heads, q.shape[0], source)):
        return False
    expected = (batch, source) if q.ndim == 3 else (source,)
    if o.key_padding_mask is not None and o.key_padding_mask.shape != expected:
        return False
    if o.use_separate_proj_weight:
        weights = ((o.q_proj_weight, q), (o.k_proj_weight, k), (o.v_proj_weight, v))
        right = all(w is not None and w.shape == (width, x.shape[-1]) for w, x in weights)
        return right and k.shape[:-1] == v.shape[:-1]
    return o.in_proj_weight is not None and o.in_proj_weight.shape == (3 * width, width) and k.shape == v.shape


def _project(apply: Apply, o: SimpleNamespace, batched: bool) -> tuple[Tensor, ...]:
    """Queries, keys and values [positions, batch, width]."""
    q, k, v = (t if batched else t.unsqueeze(1) for t in (o.query, o.key, o.value))
    weight, bias, width = o.in_proj_weight, o.in_proj_bias, q.shape[-1]
    if not o.use_separate_proj_weight and o.query is o.key is o.value:
        return apply(q, weight, bias).chunk(3, dim=-1)
    thirds = [slice(i * width, (i + 1) * width) for i in range(3)]
    if o.use_separate_proj_weight:
        weights = (o.q_proj_weight, o.k_proj_weight, o.v_proj_weight)
        return tuple(apply(x, w, bias, bias_rows=r) for x, w, r in zip((q, k, v), weights, thirds, strict=True))
    return tuple(apply(x, weight, bias, rows=r, bias_rows=r) for x, r in zip((q, k, v), thirds, strict=True))


def _masks(o: SimpleNamespace, dtype: torch.dtype, batched: bool) -> tuple[Tensor | None, Tensor | None, bool]:
    """Both masks as numbers that are added, and whether the kernel is to make the causal one itself."""
    mask, padding = (None if m is None else _additive(m, dtype) for m in (o.attn_mask, o.key_padding_mask))
    if padding is not None:
        return mask, padding if batched else padding[None], False
    return (None, None, True) if o.is_causal and not o.need_weights else (mask, None, o.is_causal)


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf)


State = tuple[Tensor, ...]
Cell = Callable[[Tensor, Tensor, State], State]


def _tanh(x: Tensor, h: Tensor, state: State) -> State:
    return (torch.tanh(x + h),)


def _relu(x: Tensor, h: Tensor, state: State) -> State:
    return (torch.relu(x + h),)


def _gru(x: Tensor, h: Tensor, state: State) -> State:
    reset_x, update_x, new_x = x.chunk(3, dim=-1)
    reset_h, update_h, new_h = h.chunk(3, dim=-1)
    update = torch.sigmoid(update_x + update_h)
    new = torch.tanh(new_x + torch.sigmoid(reset_x + reset_h) * new_h)
    return (new + update * (state[0] - new),)


def _lstm(x: Tensor, h: Tensor, state: State) -> State:
    enter, forget, new, leave = (x + h).chunk(4, dim=-1)
    memory = torch.sigmoid(forget) * state[1] + torch.sigmoid(enter) * torch.tanh(new)
    return torch.sigmoid(leave) * torch.tanh(memory), memory


def recurrent(apply: Apply, cell: Cell, *args: Any, **kwargs: Any) -> tuple[Tensor, ...] | None:
    """``torch.lstm``, ``torch.gru``, ``torch.rnn_tanh`` or ``torch.rnn_relu``, for padded and for packed sequences.

    Args:
        apply: the product with a weight.
        cell: from both products and the state [rows, hidden] the next state.
        args: as torch's operation takes them, with padded or with packed sequences.

    Returns:
        The outputs and the last states, shaped as torch's; None for calls that torch is to handle.

    Example:
        >>> def apply(x, weight, bias=None, **parts):
        ...     return F.linear(x, weight, bias)
        >>> x, h, layer = torch.randn(5, 1, 2), torch.zeros(1, 1, 3), torch.nn.GRU(2, 3)
        >>> given = (x, h, list(layer.parameters()), True, 1, 0.0, True, False, False)
        >>> torch.allclose(recurrent(apply, _gru, *given)[0], layer(x)[0], atol=1e-6)
        True
    """
    if kwargs or len(args) != 9 or not args[0].numel():
        return None
    packed = isinstance(args[3], list | tuple)  # (data, batch_sizes, hx, params, ..) instead of (input, hx, params, ..)
    x, sizes = args[0], [int(n) for n in args[1]] if packed else None
    hx, params, has_biases, layers, dropout, train, both_ways = args[2:] if packed else args[1:8]
    batch_first = not packed and args[8]
    x = x.transpose(0, 1) if batch_first else x
    states = hx if isinstance(hx, list | tuple) else (hx,)
    if x.ndim != 3 - packed or any(s.shape[1] != (sizes[0] if sizes else x.shape[1]) for s in states):
        return None
    directions = 2 if both_ways else 1
    each = len(params) // (layers * directions)
    finals: list[State] = []
    for layer in range(layers):
        outputs = []
        for direction in range(directions):
            number = layer * directions + direction
            weights = _Weights.of(params[number * each : (number + 1) * each], has_biases)
            output, final = _run(apply, cell, x, sizes, tuple(s[number] for s in states), weights, direction == 1)
            outputs.append(output)
            finals.append(final)
        x = torch.cat(outputs, dim=-1) if both_ways else outputs[0]
        if dropout > 0 and layer < layers - 1:
            x = torch.dropout(x, dropout, train)
    return x.transpose(0, 1) if batch_first else x, *(torch.stack(one) for one in zip(*finals, strict=True))


class _Weights(NamedTuple):
    """Of one layer in one direction: on the input, on the state, their biases, and on the LSTM's output."""

    x: Tensor
    h: Tensor
    bias_x: Tensor | None
    bias_h: Tensor | None
    out: Tensor | None

    @classmethod
    def of(cls, params: Sequence[Tensor], has_biases: bool) -> _Weights:
        biases, rest = (params[2:4], params[4:]) if has_biases else ((None, None), params[2:])
        return cls(params[0], params[1], biases[0], biases[1], rest[0] if rest else None)


def _run(
    apply: Apply, cell: Cell, x: Tensor, sizes: list[int] | None, start: State, weights: _Weights, reverse: bool
) -> tuple[Tensor, State]:
    """One layer in one direction: its outputs, shaped as torch's, and the last state of each sequence.

    ``x`` is [T, N, D], or the packed [sum of sizes, D], in which the sequences, longest first, thin out with time.
    """
    whole = len(start[0])
    if sizes is None:
        inputs = apply(x, weights.x, weights.bias_x).unbind(0)
        counts = [whole] * len(inputs)
    else:
        example = torch.cat([torch.arange(n, device=x.device) for n in sizes])
        inputs = apply(x, weights.x, weights.bias_x, order=Order(example, whole)).split(sizes)
        counts = sizes
    outputs: list[Tensor] = []
    ended: list[State] = []
    state = tuple(s[: counts[-1 if reverse else 0]] for s in start)
    steps = list(zip(inputs, counts, strict=True))
    for step, n in reversed(steps) if reverse else steps:
        rows = len(state[0])
        if n > rows:  # backwards in time the shorter sequences join at their ends
            state = tuple(torch.cat([s, first[rows:n]]) for s, first in zip(state, start, strict=True))
        elif n < rows:
            ended.append(tuple(s[n:] for s in state))
            state = tuple(s[:n] for s in state)
        order = None if n == whole else Order(torch.arange(n, device=x.device), whole)
        state = cell(step, apply(state[0], weights.h, weights.bias_h, order=order), state)
        if weights.out is not None:
            state = (apply(state[0], weights.out, order=order), *state[1:])
        outputs.append(state[0])
    outputs = outputs[::-1] if reverse else outputs
    final = tuple(torch.cat(parts) for parts in zip(state, *reversed(ended), strict=True)) if ended else state
    return torch.stack(outputs) if sizes is None else torch.cat(outputs), final


def recurrent_cell(apply: Apply, cell: Cell, *args: Any, **kwargs: Any) -> Any:
    """``torch.lstm_cell`` and its like: ``(input, hx, w_ih, w_hh, b_ih, b_hh)``."""
    if kwargs:
        return None
    x, hx, weight_x, weight_h, bias_x, bias_h = (*args, None, None)[:6]
    state = tuple(hx) if isinstance(hx, list | tuple) else (hx,)
    if x.ndim != 2 or x.shape[1] != weight_x.shape[1] or any(s.shape != (len(x), weight_h.shape[1]) for s in state):
        return None
    state = cell(apply(x, weight_x, bias_x), apply(state[0], weight_h, bias_h), state)
    return state if len(state) > 1 else state[0]


def _with(run: Callable[..., Any], cell: Cell) -> Callable[..., Any]:
    return lambda apply, *args, **kwargs: run(apply, cell, *args, **kwargs)


# torch's operation -> the same from plain ones, with ``apply`` as an additional first argument.
PLAIN: dict[Callable[..., Any], Callable[..., Any]] = {
    F.multi_head_attention_forward: attention,
    torch.lstm: _with(recurrent, _lstm),
    torch.gru: _with(recurrent, _gru),
    torch.rnn_tanh: _with(recurrent, _tanh),
    torch.rnn_relu: _with(recurrent, _relu),
    torch.lstm_cell: _with(recurrent_cell, _lstm),
    torch.gru_cell: _with(recurrent_cell, _gru),
    torch.rnn_tanh_cell: _with(recurrent_cell, _tanh),
    torch.rnn_relu_cell: _with(recurrent_cell, _relu),
}
