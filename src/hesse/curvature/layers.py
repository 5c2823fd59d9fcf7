"""Every layer in one form: a gradient of a weight is a sum, over examples and positions, of outer products g a'.

For a linear map y = W a the gradient of a loss in W is the sum of ``g a'`` over everything it was applied to, with g
the gradient at y. A convolution is that linear map on patches, a transposed one is that map before the patches are
added up, an embedding that map on one-hot rows, attention and recurrent layers are several of them. A norm's scale
and every shift have a gradient of their own at each position. :func:`rows_of` brings a use of a parameter
(:mod:`hesse.curvature.uses`) into one of these three forms:

=============  =======================================  ==================================================
form           of                                       the parameter's gradient
=============  =======================================  ==================================================
``Rows``       weights of linear maps and convolutions  sum over b, t of g a', as matrices [groups, m, n]
``Lookups``    weights of embeddings                    g added up by index
``Entries``    scales, shifts, biases                   sum over b, t
=============  =======================================  ==================================================

To add an operation: a reader in :mod:`~hesse.curvature.uses`, a rule here and its line in ``_RULES``; a test compares
the sum with autograd's gradient for every option.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hesse.curvature.examples import Examples, by_example, leading
from hesse.curvature.uses import Use

__all__ = [
    "CONVOLUTIONS",
    "MATRICES",
    "Entries",
    "Form",
    "Lookups",
    "Rows",
    "as_matrix",
    "form_of",
    "from_matrix",
    "rows_of",
    "wide",
]


@dataclass(frozen=True, eq=False)
class Rows:
    """A weight's gradient is the sum over b and t of ``g a'``, for each group.

    Args:
        a: [B, T, G, n], from the inputs.
        g: [B, T, G, m], from the gradients at the outputs.
        part: which of the weight's matrix rows (m) these are; None for all.
    """

    a: Tensor
    g: Tensor
    part: slice | None = None

    def total(self) -> Tensor:
        """The gradient as matrices [G, m, n] (of the part)."""
        a, g = self.a.flatten(0, 1).movedim(1, 0), self.g.flatten(0, 1).movedim(1, 0)
        return g.mT @ a

    def joined(self) -> Rows:
        """With a one as last entry of every ``a``, so that the bias is the matrices' last column."""
        return Rows(torch.cat([self.a, self.a.new_ones(*self.a.shape[:-1], 1)], dim=-1), self.g, self.part)


@dataclass(frozen=True, eq=False)
class Lookups:
    """An embedding's gradient is the sum of ``g`` by index; ``a`` is the one-hot row of the index.

    Args:
        index: [B, T], integers.
        g: [B, T, m]; zero where the index is ``padding``.
        padding: the index whose row never moves, or None.
        size: how many rows the embedding has.
    """

    index: Tensor
    g: Tensor
    padding: int | None
    size: int

    def total(self) -> Tensor:
        """The gradient [size, m]."""
        return self.g.new_zeros(self.size, self.g.shape[-1]).index_add_(0, self.index.flatten(), self.g.flatten(0, 1))


@dataclass(frozen=True, eq=False)
class Entries:
    """The parameter's own gradient at each position: ``grads`` [B, T, d], d its number of elements.

    ``part`` says which elements of the flattened parameter these are; None for all.
    """

    grads: Tensor
    part: slice | None = None

    def total(self) -> Tensor:
        """The gradient [d] (of the part)."""
        return self.grads.sum((0, 1))


class Form(NamedTuple):
    """How a weight [rows, ...] is written as matrices [groups, m, n]: its rows are m, or n if ``transposed``."""

    groups: int = 1
    transposed: bool = False


def as_matrix(weight: Tensor, form: Form, bias: Tensor | None = None) -> Tensor:
    """A weight (or its gradient) as the matrices [G, m, n] that A (x) G acts on; a bias is their last column.

    Example:
        >>> as_matrix(torch.tensor([[1.0, 2.0]]), Form(), torch.tensor([3.0]))
        tensor([[[1., 2., 3.]]])
    """
    matrix = weight.reshape(form.groups, weight.shape[0] // form.groups, -1)
    matrix = matrix.mT if form.transposed else matrix
    return matrix if bias is None else torch.cat([matrix, bias.view(*matrix.shape[:2], 1)], dim=-1)


def from_matrix(matrix: Tensor, form: Form, shape: Sequence[int], bias: bool = False) -> tuple[Tensor, Tensor | None]:
    """The inverse of :func:`as_matrix`, for a weight of that shape, with its bias or None."""
    shift = matrix[..., -1].flatten() if bias else None
    matrix = matrix[..., :-1] if bias else matrix
    return (matrix.mT if form.transposed else matrix).reshape(tuple(shape)), shift


def form_of(use: Use) -> Form:
    """The form of the matrices of a use's weight. For an embedding, [1, m, number of rows], as of a linear map."""
    if use.operation is F.embedding:
        return Form(transposed=True)
    return Form(use.options.get("groups", 1), use.operation in _TRANSPOSED)


def rows_of(use: Use, g: Tensor, examples: Examples | None = None) -> dict[str, Rows | Lookups | Entries]:
    """What a use says about each of its parameters.

    Args:
        use: from :func:`hesse.curvature.uses.watch_uses`.
        g: the gradient at its output, with the output's elements.
        examples: where the examples are; None puts everything in T, with B = 1.

    Returns:
        By name of the weight and of the bias. Half precision comes back as float32.

    Example:
        >>> from hesse.curvature.uses import output_gradients, watch_uses
        >>> layer = torch.nn.Linear(2, 1)
        >>> with watch_uses(dict(layer.named_parameters())) as uses:
        ...     y = layer(torch.tensor([[3.0, 4.0]]))
        >>> (g,) = output_gradients(uses, y, torch.tensor([[10.0]]))
        >>> rows = rows_of(uses[0], g)
        >>> rows["weight"].total().tolist(), rows["bias"].total().tolist()
        ([[[30.0, 40.0]]], [10.0])
    """

    def arrange(t: Tensor, features: int) -> Tensor:
        return by_example(t, t.ndim - features, use, examples)

    with torch.no_grad():
        return _RULES[use.operation](use, wide(g.reshape(use.shape)), arrange)


def wide(x: Tensor) -> Tensor:
    """At least float32: sums over a batch need more than eight bits."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


Arrange = Callable[[Tensor, int], Tensor]
Found = dict[str, Rows | Lookups | Entries]


# The rules. ``arrange(t, k)`` makes [B, T, ...] of the dimensions before the last k.


def _linear(use: Use, g: Tensor, arrange: Arrange) -> Found:
    return _dense(use, wide(use.x)[..., None, :], g[..., None, :], g, arrange)


def _convolution(use: Use, g: Tensor, arrange: Arrange) -> Found:
    groups = use.options["groups"]
    x, g = _with_batch(use, wide(use.x)), _with_batch(use, g)
    shift = _channels_last(g)
    a = _patches(F.pad(x, _padding(use)), use)
    return _dense(use, a, shift.unflatten(-1, (groups, -1)), shift, arrange)


def _transposed_convolution(use: Use, g: Tensor, arrange: Arrange) -> Found:
    # The backward pass of this operation is a convolution of g: x at a position meets the patch of g it wrote to.
    groups = use.options["groups"]
    x, g = _with_batch(use, wide(use.x)), _with_batch(use, g)
    # Output padding and strides that do not come out even leave elements that no input wrote to.
    patches = _patches(F.pad(g, _padding(use)), use, x.shape[2:])
    return _dense(use, _channels_last(x).unflatten(-1, (groups, -1)), patches, _channels_last(g), arrange)


def _dense(use: Use, a: Tensor, g: Tensor, shift: Tensor, arrange: Arrange) -> Found:
    found: Found = {}
    if use.weight is not None:
        found[use.weight] = Rows(arrange(a, 2), arrange(g, 2), use.rows)
    if use.bias is not None:
        found[use.bias] = Entries(arrange(shift, 1), use.bias_rows)
    return found


def _with_batch(use: Use, t: Tensor) -> Tensor:
    return t if leading(use) else t[None]


def _padding(use: Use) -> list[int]:
    """Left and right padding in the order of ``F.pad``, last axis first."""
    axes = len(use.options["kernel"])
    padding, reach = use.options["padding"], _reach(use)
    if padding == "valid":
        return [0] * (2 * axes)
    if padding == "same":  # torch puts the odd one to the right
        return [side for r in reversed(reach) for side in ((r - 1) // 2, r - 1 - (r - 1) // 2)]
    return [side for p in reversed(_tuple(padding, axes)) for side in (p, p)]


def _reach(use: Use) -> list[int]:
    kernel = use.options["kernel"]
    return [d * (k - 1) + 1 for d, k in zip(_tuple(use.options["dilation"], len(kernel)), kernel, strict=True)]


def _tuple(value: Any, axes: int) -> tuple[int, ...]:
    given = (value,) if isinstance(value, int) else tuple(value)
    return given * axes if len(given) == 1 else given


def _patches(x: Tensor, use: Use, places: Sequence[int] | None = None) -> Tensor:
    """What the kernel sees of a padded [B, C, ...] at each position: [B, positions, groups, C / groups * kernel]."""
    groups, axes = use.options["groups"], len(use.options["kernel"])
    stride, dilation = _tuple(use.options["stride"], axes), _tuple(use.options["dilation"], axes)
    # By striding, one axis at a time, [B, C, L1, .., k1, ..] without a copy; then one copy that runs along positions.
    for axis, reach in enumerate(_reach(use)):
        x = x.unfold(2 + axis, reach, stride[axis])[..., :: dilation[axis]]
        if places is not None:
            x = x.narrow(2 + axis, 0, places[axis])
    x = x.unflatten(1, (groups, -1)).permute(1, 2, *range(3 + axes, 3 + 2 * axes), 0, *range(3, 3 + axes))
    return x.flatten(3 + axes).flatten(1, 1 + axes).permute(2, 3, 0, 1)


def _embedding(use: Use, g: Tensor, arrange: Arrange) -> Found:
    assert use.weight is not None
    padding = use.options["padding_idx"]
    if padding is not None:
        g = g.masked_fill((use.x == padding)[..., None], 0.0)
    return {use.weight: Lookups(arrange(use.x, 0), arrange(g, 1), padding, use.options["size"])}


def _layer_norm(use: Use, g: Tensor, arrange: Arrange) -> Found:
    shape = use.options["shape"]
    normalise = F.rms_norm if use.operation is F.rms_norm else F.layer_norm
    normal = wide(normalise(use.x, shape, eps=use.options["eps"]))
    return _scale_and_shift(use, normal.flatten(-len(shape)), g.flatten(-len(shape)), arrange)


def _group_norm(use: Use, g: Tensor, arrange: Arrange) -> Found:
    normal = F.group_norm(use.x, use.options["num_groups"], eps=use.options["eps"])
    return _scale_and_shift(use, _channels_last(wide(normal)), _channels_last(g), arrange)


def _running_norm(use: Use, g: Tensor, arrange: Arrange) -> Found:
    mean, var = use.options["statistics"]
    normalise = F.batch_norm if use.operation is F.batch_norm else F.instance_norm
    normal = normalise(use.x, mean, var, None, None, mean is None, 0.0, use.options["eps"])
    return _scale_and_shift(use, _channels_last(wide(normal)), _channels_last(g), arrange)


def _channels_last(x: Tensor) -> Tensor:
    """[B, C, ...] as [B, positions, C], stored with the channels first: such a copy runs along positions."""
    return x.transpose(0, 1).flatten(2).contiguous().permute(1, 2, 0) if x.ndim > 2 else x[:, None]


def _scale_and_shift(use: Use, normal: Tensor, g: Tensor, arrange: Arrange) -> Found:
    found: Found = {}
    if use.weight is not None:
        found[use.weight] = Entries(arrange(normal * g, 1))
    if use.bias is not None:
        found[use.bias] = Entries(arrange(g, 1))
    return found


_TRANSPOSED = (torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d)
CONVOLUTIONS = (torch.conv1d, torch.conv2d, torch.conv3d)
MATRICES = (F.linear, *CONVOLUTIONS, *_TRANSPOSED, F.embedding)
_RULES: dict[Callable[..., Any], Callable[[Use, Tensor, Arrange], Found]] = {
    F.linear: _linear,
    **dict.fromkeys(CONVOLUTIONS, _convolution),
    **dict.fromkeys(_TRANSPOSED, _transposed_convolution),
    F.embedding: _embedding,
    F.layer_norm: _layer_norm,
    F.rms_norm: _layer_norm,
    F.group_norm: _group_norm,
    F.batch_norm: _running_norm,
    F.instance_norm: _running_norm,
}
