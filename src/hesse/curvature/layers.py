"""Layer rules: what one layer's inputs and output gradients say about the curvature of its parameters.

A rule is one function of the layer, an input x and the gradient g of a sampled loss at the matching output. It returns
either the two sides of a Kronecker block, F = A (x) G (Martens and Grosse, 2015; for convolutions Grosse and
Martens, 2016), or the diagonal of a block. Both are sums over everything that the layer was applied to in this call:
examples, positions, tokens.

- Linear, Conv1d/2d/3d: A is the second moment of the inputs (patches, for a convolution), with a 1 appended for the
  bias; G that of g.
- Embedding: A is the diagonal of how often each row was looked up, G the second moment of g.
- LayerNorm, BatchNorm, GroupNorm (scale and shift): the exact diagonal, by squaring each example's own gradient.

To add a layer: write its function and its line in ``_RULES``; a test compares it with dense autograd in a case where
it is exact.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Diagonal", "Kronecker", "as_matrix", "from_matrix", "rule_for", "wide"]


@dataclass(frozen=True)
class Kronecker:
    """Sums over rows: ``a`` = sum a a' ([n, n], or [n] when diagonal), ``g`` = sum g g' [m, m], and how many rows."""

    a: Tensor
    g: Tensor
    rows: int


@dataclass(frozen=True)
class Diagonal:
    """Sums over examples of squared gradients, for the layer's parameters by attribute name."""

    squares: dict[str, Tensor]


Rule = Callable[[nn.Module, Tensor, Tensor], Kronecker | Diagonal]


def rule_for(module: nn.Module) -> Rule | None:
    """The rule for ``module``, or None. Subclasses count only if they keep the forward pass of their base."""
    for kind, rule in _RULES.items():
        if isinstance(module, kind) and type(module).forward is kind.forward:
            if isinstance(module, nn.modules.conv._ConvNd) and module.groups > 1:
                return None
            if isinstance(module, nn.Embedding) and (module.max_norm is not None or module.scale_grad_by_freq):
                return None
            return rule
    return None


def as_matrix(module: nn.Module, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A layer's weight and bias (or their gradients) as the [m, n] matrix that ``A (x) G`` acts on: ``G @ W @ A``."""
    if isinstance(module, nn.Embedding):
        return weight.t()
    matrix = weight.flatten(1)
    return matrix if bias is None else torch.cat([matrix, bias[:, None]], dim=1)


def from_matrix(module: nn.Module, matrix: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The inverse of :func:`as_matrix`; ``weight`` and ``bias`` give the shapes."""
    if isinstance(module, nn.Embedding):
        return matrix.t(), None
    if bias is None:
        return matrix.reshape(weight.shape), None
    return matrix[:, :-1].reshape(weight.shape), matrix[:, -1]


def _linear(module: nn.Module, x: Tensor, g: Tensor) -> Kronecker:
    return _second_moments(x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1]), module.bias is not None)


def _convolution(module: nn.Module, x: Tensor, g: Tensor) -> Kronecker:
    assert isinstance(module, nn.modules.conv._ConvNd)
    axes = len(module.kernel_size)
    if x.ndim == axes + 1:  # without a batch
        x, g = x[None], g[None]
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    x = F.pad(x, module._reversed_padding_repeated_twice, mode=mode)
    # Patches by striding, one axis at a time: [B, C, L1, .., k1, ..] without a copy until the matrix product.
    for axis in range(axes):
        reach = module.dilation[axis] * (module.kernel_size[axis] - 1) + 1
        x = x.unfold(2 + axis, reach, module.stride[axis])[..., :: module.dilation[axis]]
    positions = list(range(2, 2 + axes))
    patches = x.permute(0, *positions, 1, *range(2 + axes, 2 + 2 * axes)).flatten(1 + axes).flatten(0, axes)
    return _second_moments(patches, g.movedim(1, -1).reshape(-1, g.shape[1]), module.bias is not None)


def _embedding(module: nn.Module, x: Tensor, g: Tensor) -> Kronecker:
    assert isinstance(module, nn.Embedding)
    index, g = x.reshape(-1), wide(g.reshape(-1, g.shape[-1]))
    if module.padding_idx is not None:  # its row never moves: its gradient is dropped by autograd
        looked_up = index != module.padding_idx
        index, g = index[looked_up], g[looked_up]
    counts = torch.bincount(index, minlength=module.num_embeddings).to(g.dtype)
    return Kronecker(counts, g.t() @ g, len(index))


def _layer_norm(module: nn.Module, x: Tensor, g: Tensor) -> Diagonal:
    assert isinstance(module, nn.LayerNorm)
    # The first dimension counts as examples. With a sequence in front, a position passes for one: squares of sums over
    # the batch instead of sums of squares, off by what examples have in common.
    normal = F.layer_norm(x, module.normalized_shape, eps=module.eps)
    examples = g.shape[0] if g.ndim > len(module.normalized_shape) else 1
    shape = (examples, -1, *module.normalized_shape)
    return _scale_and_shift(normal.reshape(shape), g.reshape(shape), module)


def _batch_norm(module: nn.Module, x: Tensor, g: Tensor) -> Diagonal:
    assert isinstance(module, nn.modules.batchnorm._BatchNorm)
    by_batch = module.training or module.running_mean is None
    mean, var = (None, None) if by_batch else (module.running_mean, module.running_var)
    normal = F.batch_norm(x, mean, var, training=by_batch, eps=module.eps)
    return _scale_and_shift(_channels_last(normal), _channels_last(g), module)


def _group_norm(module: nn.Module, x: Tensor, g: Tensor) -> Diagonal:
    assert isinstance(module, nn.GroupNorm)
    normal = F.group_norm(x, module.num_groups, eps=module.eps)
    return _scale_and_shift(_channels_last(normal), _channels_last(g), module)


def _channels_last(x: Tensor) -> Tensor:
    """[B, C, ...] as [B, positions, C]."""
    return x.flatten(2).mT if x.ndim > 2 else x[:, None]


def _scale_and_shift(normal: Tensor, g: Tensor, module: nn.Module) -> Diagonal:
    """From [examples, positions, *parameter]: an example's gradient sums over its positions, then is squared."""
    normal, g = wide(normal), wide(g)
    squares = {"weight": (normal * g).sum(1).square().sum(0)}
    if getattr(module, "bias", None) is not None:
        squares["bias"] = g.sum(1).square().sum(0)
    return Diagonal(squares)


def _second_moments(a: Tensor, g: Tensor, bias: bool) -> Kronecker:
    a, g = wide(a), wide(g)
    if bias:
        a = torch.cat([a, a.new_ones(len(a), 1)], dim=1)
    return Kronecker(a.t() @ a, g.t() @ g, len(a))


def wide(x: Tensor) -> Tensor:
    """At least float32: sums over a batch need more than eight bits."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


_RULES: dict[type[nn.Module], Rule] = {
    nn.Linear: _linear,
    nn.Conv1d: _convolution,
    nn.Conv2d: _convolution,
    nn.Conv3d: _convolution,
    nn.Embedding: _embedding,
    nn.LayerNorm: _layer_norm,
    nn.BatchNorm1d: _batch_norm,
    nn.BatchNorm2d: _batch_norm,
    nn.BatchNorm3d: _batch_norm,
    nn.GroupNorm: _group_norm,
}
