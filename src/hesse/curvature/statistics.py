"""Curvature statistics of one batch: one sampled gradient is sent back, and every use of a parameter says its part.

For a weight the block of the Gauss-Newton matrix is a sum over examples and positions of ``(a g')(a g')'``, and K-FAC
approximates it by one Kronecker product A (x) G of second moments. How the positions of an example and the several
uses of one weight are merged is the ``variant`` (Eschenhagen et al., 2023): "expand" takes each of them as an example
of its own, as for convolutions (Grosse and Martens, 2016) and recurrent networks; "reduce" averages a and adds up g
over an example's positions first.

Whatever has no matrix gets the diagonal of the same sampled matrix: for scales, shifts and biases that belong to no
single weight the squares of each example's own gradient; for loose parameters, since the terms of a loss are drawn
independently, E[(J'r)^2] is the diagonal of J' H_L J for a draw r over the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hesse.curvature import tiles
from hesse.curvature.examples import guess_examples, lengths
from hesse.curvature.layers import CONVOLUTIONS, MATRICES, Entries, Form, Lookups, Rows, form_of, rows_of, wide
from hesse.curvature.output import OutputCurvature
from hesse.curvature.uses import Use, coverage

__all__ = ["Block", "Diagonal", "Kronecker", "Statistics", "factors", "find_blocks", "statistics"]

Variant = Literal["expand", "reduce"]


@dataclass(frozen=True, eq=False)
class Kronecker:
    """``A (x) G``, which approximates the block of a weight with its bias, if it has one of its own.

    Args:
        a: [n, n], or [n] for a diagonal one (embeddings), or [G, n, n] for a weight of G independent matrices.
        g: [m, m] or [G, m, m]. Of a weight with a side above the limit both factors are in parts, with one dimension
            more: [k, b, b] or [G, k, b, b], and a diagonal [1, n].
        form: of those matrices.
        bias: name of the bias that is their last column, or None.
        values: [G, m, n], corrected eigenvalues in a given basis, or None.
    """

    a: Tensor
    g: Tensor
    form: Form
    bias: str | None
    values: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Diagonal:
    """The diagonal of a parameter's block, shaped as the parameter."""

    values: Tensor


Statistics = dict[str, Kronecker | Diagonal]


@dataclass(frozen=True, eq=False)
class Block:
    """A weight that has a Kronecker block: its uses, by number, the form of its matrices and the bias they take in."""

    weight: str
    bias: str | None
    form: Form
    uses: tuple[int, ...]


def statistics(
    uses: Sequence[Use],
    params: Mapping[str, Tensor],
    outputs: Tensor,
    curvature: OutputCurvature,
    variant: Variant = "expand",
    patches: int | None = None,
    draw: Tensor | None = None,
    values: Callable[[Block, Sequence[tuple[Use, Tensor]], int], Tensor | None] | None = None,
    max_dim: int | None = None,
) -> Statistics:
    """Curvature statistics by parameter, from one sampled backward pass.

    Args:
        uses: what :func:`hesse.curvature.uses.watch_uses` noted in the forward pass that gave ``outputs``.
        params: the trainable parameters by name.
        outputs: with their graph; dimension 0 counts examples.
        curvature: of the loss at the outputs.
        variant: how positions are merged, "expand" or "reduce".
        patches: about how many patches of a convolution's input are enough for its A ("expand" only); None for all.
            They are the dearest part: every element of the input comes in as many as the kernel has.
        draw: what is sent back, by default ``curvature.draw()``.
        values: what gives a block's eigenvalues from its uses, the gradients at their outputs and the number of
            examples, as :func:`hesse.curvature.turned.turned_squares` does; None where there is no basis yet.
        max_dim: the largest factor; longer sides are cut into parts (:mod:`hesse.curvature.tiles`). None for no limit.

    Returns:
        By name of a weight its :class:`Kronecker` block, which takes in its bias; by name of any other parameter its
        :class:`Diagonal`. A parameter that does not influence the outputs is absent.

    Example:
        A is the second moment of the inputs, (1 + 9) / 2:

        >>> from hesse.curvature.output import output_curvature
        >>> from hesse.curvature.uses import watch_uses
        >>> layer = torch.nn.Linear(1, 1, bias=False)
        >>> params = dict(layer.named_parameters())
        >>> with watch_uses(params) as uses:
        ...     y = layer(torch.tensor([[1.0], [3.0]]))
        >>> statistics(uses, params, y, output_curvature(F.mse_loss, y, torch.zeros(2, 1)))["weight"].a
        tensor([[5.]])
    """
    found = coverage(uses, params, outputs)
    blocks, mixed = find_blocks(uses, params, found.known)
    loose = sorted(found.loose | mixed)
    r = (curvature.draw() if draw is None else draw).to(outputs.dtype)
    # None among the gradients: no way leads there, or a custom function on the way passes nothing on.
    wanted: list[Any] = [*(use.edge for use in uses), *(params[name] for name in loose)]
    if not wanted:
        return {}
    grads = torch.autograd.grad(outputs, wanted, r, retain_graph=True, allow_unused=True)
    batch = len(outputs) if outputs.ndim else 1
    result: Statistics = {}
    taken = set(loose)
    for block in blocks:
        taken |= {block.weight} | ({block.bias} if block.bias else set())
        pairs = [(uses[i], g) for i in block.uses if (g := grads[i]) is not None]
        if pairs:
            a, g = factors(block, pairs, variant, batch, patches, max_dim)
            corrected = values(block, pairs, batch) if values is not None else None
            result[block.weight] = Kronecker(
                a,
                curvature.weight * g,
                block.form,
                block.bias,
                None if corrected is None else curvature.weight * corrected,
            )
    for name in sorted(found.known - taken):
        pairs = [(use, g) for use, g in zip(uses, grads, strict=False) if g is not None and name in use.names]
        if pairs:
            result[name] = Diagonal(curvature.weight * _squares(name, params[name], pairs, batch))
    for name, g in zip(loose, grads[len(uses) :], strict=True):
        if g is not None:
            result[name] = Diagonal(curvature.weight * wide(g).square())
    return result


def find_blocks(
    uses: Sequence[Use], params: Mapping[str, Tensor], known: frozenset[str]
) -> tuple[list[Block], frozenset[str]]:
    """The weights that have a Kronecker block, and those among the known parameters that no rule can hold.

    A bias joins its weight if the two are used together only; that of a transposed convolution never does, since its
    positions are those of the output and the weight's those of the input. A weight that is applied in two ways whose
    matrices are not alike (an embedding that is also the head's weight, a decoder's transposed convolution with the
    encoder's weight) is returned in the second set: its uses put the inputs on opposite sides of the product, where one
    Kronecker product of both would multiply the scales of activations and gradients of one by those of the other.
    """
    by_weight: dict[str, list[int]] = {}
    by_bias: dict[str, list[int]] = {}
    for i, use in enumerate(uses):
        for names, name in ((by_weight, use.weight), (by_bias, use.bias)):
            if name in known:
                names.setdefault(name, []).append(i)
    blocks, mixed = [], set(by_weight) & set(by_bias)
    for weight, numbers in by_weight.items():
        if weight in mixed or not any(uses[i].operation in MATRICES for i in numbers):
            continue
        forms = {form_of(uses[i]) if uses[i].operation in MATRICES else None for i in numbers}
        form = next(iter(forms))
        parts = _parts([uses[i].rows for i in numbers], params[weight].shape[0])
        if len(forms) > 1 or form is None or not parts or (parts > 1 and form != Form()):
            mixed.add(weight)
            continue
        bias = uses[numbers[0]].bias
        together = bias in known and by_bias[bias] == numbers and bias not in mixed and not form.transposed
        together = together and all(uses[i].rows == uses[i].bias_rows for i in numbers)
        blocks.append(Block(weight, bias if together else None, Form(parts) if parts > 1 else form, tuple(numbers)))
    return blocks, frozenset(mixed)


def factors(
    block: Block,
    pairs: Sequence[tuple[Use, Tensor]],
    variant: Variant = "expand",
    batch: int = 1,
    patches: int | None = None,
    max_dim: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The factors A and G of a block from its uses and the gradients at their outputs.

    "expand": A is the mean of a a' over the rows (examples, positions, uses), G the sum of g g', so that A (x) G is
    a sum over rows. "reduce": the same over examples, with the mean of an example's a and the sum of its g. An
    embedding's A stays the diagonal of "expand" in both: the mean of one-hot rows is not one-hot.

    Returns:
        A [n, n] ([n] for an embedding, [G, n, n] for grouped matrices), G [m, m] or [G, m, m]; or both in parts, as
        :class:`Kronecker` says.

    Raises:
        ValueError: "reduce", and no dimension of an input is known to hold the ``batch`` examples.
    """
    if variant not in ("expand", "reduce"):
        raise ValueError(f"variant must be 'expand' or 'reduce'; got {variant!r}.")
    if pairs[0][0].operation is F.embedding:
        return _lookup_factors(block.weight, pairs, max_dim)
    rows: list[_Seen] = []
    for use, g in pairs:
        place = guess_examples(use, batch) if variant == "reduce" else None
        if variant == "reduce" and place is None and batch > 1:
            raise ValueError(
                f"variant='reduce' adds up the positions of each example, and an input of {block.weight!r}, of shape "
                f"{list(use.x.shape)}, has no dimension, or more than one, that could be the {batch} examples. Use "
                "variant='expand', which takes positions as examples."
            )
        every = _every(use, patches) if variant == "expand" and patches is not None else 1
        row = rows_of(*_part_of_batch(use, g, every), place)[block.weight]
        assert isinstance(row, Rows)
        rows.append(_Seen(use, row.a, row.g if every == 1 else _all_rows(use, g), row.part))
    groups, ones = block.form.groups, block.bias is not None
    if all(row.part is None for row in rows):
        return _moments(rows, variant, ones, max_dim)
    parts = [_moments(_part(rows, i, groups), variant, ones, max_dim) for i in range(groups)]
    return torch.stack([a for a, _ in parts]), torch.stack([g for _, g in parts])


def _every(use: Use, patches: int) -> int:
    """Of a convolution's batch every which example is enough for so many patches."""
    return max(1, use.shape[0] * use.shape[2:].numel() // patches) if use.operation in CONVOLUTIONS else 1


def _part_of_batch(use: Use, g: Tensor, every: int) -> tuple[Use, Tensor]:
    if every == 1:
        return use, g
    g = g.reshape(use.shape)[::every]
    return replace(use, x=use.x[::every], shape=g.shape), g


def _all_rows(use: Use, g: Tensor) -> Tensor:
    """The rows g [1, B * T, G, m] of a convolution, without its patches."""
    rows = wide(g.reshape(use.shape)).movedim(1, -1).flatten(0, -2)
    return rows.unflatten(-1, (use.options["groups"], -1))[None]


class _Seen(NamedTuple):
    """Rows a [B, T, G, n] and g [B, T, G, m] of one use, and the part of the weight they are of."""

    use: Use
    a: Tensor
    g: Tensor
    part: slice | None


def _moments(rows: Sequence[_Seen], variant: Variant, ones: bool, max_dim: int | None) -> tuple[Tensor, Tensor]:
    """The mean of a a' and the sum of g g', without the dimension G if it is 1.

    With ``ones`` every a has a one behind its last entry, which is not written there: copying the rows takes longer.
    """
    if variant == "reduce":
        number = torch.stack([lengths(row.use, row.a) for row in rows]).sum(0).clamp_min(1)[:, None, None]
        a = torch.stack([row.a.sum(1) for row in rows]).sum(0) / number
        g = torch.stack([row.g.sum(1) for row in rows]).sum(0)
    else:
        flat = [(row.a.flatten(0, 1), row.g.flatten(0, 1)) for row in rows]
        a, g = flat[0] if len(flat) == 1 else (torch.cat(side) for side in zip(*flat, strict=True))
    a, g = (a[:, 0], g[:, 0]) if a.shape[1] == 1 else (a.movedim(1, 0), g.movedim(1, 0))
    count = max(1, a.shape[-2])
    if max_dim is not None and max(a.shape[-1] + ones, g.shape[-1]) > max_dim:
        return tiles.moments(a, max_dim, ones) / count, tiles.moments(g, max_dim)
    moment = a.mT @ a / count
    if ones:
        mean = a.sum(-2) / count
        moment = F.pad(moment, (0, 1, 0, 1), value=1.0)
        moment[..., -1, :-1] = moment[..., :-1, -1] = mean
    return moment, g.mT @ g


def _part(rows: Sequence[_Seen], number: int, parts: int) -> list[_Seen]:
    """What the uses of a packed weight, whole or one of equal parts, say about the part of that number."""
    found = []
    for row in rows:
        if row.part is None:
            found.append(row._replace(g=row.g.chunk(parts, dim=-1)[number]))
        elif row.part.start == number * row.g.shape[-1]:
            found.append(row)
    first = next(row for row in rows if row.part is not None)
    return found or [first._replace(a=torch.zeros_like(first.a), g=torch.zeros_like(first.g))]


def _lookup_factors(
    name: str, pairs: Sequence[tuple[Use, Tensor]], max_dim: int | None = None
) -> tuple[Tensor, Tensor]:
    counts: Tensor | float = 0.0
    moments: Tensor | float = 0.0
    for use, g in pairs:
        found = rows_of(use, g)[name]
        assert isinstance(found, Lookups)
        count = torch.bincount(found.index.flatten(), minlength=found.size).to(found.g.dtype)
        if found.padding is not None:
            count[found.padding] = 0.0  # its row never moves
        g = found.g.flatten(0, 1)
        moment = tiles.moments(g, max_dim) if max_dim is not None and g.shape[-1] > max_dim else g.t() @ g
        counts, moments = counts + count, moments + moment
    assert isinstance(counts, Tensor) and isinstance(moments, Tensor)
    counts = counts.view(1, -1) if moments.ndim == 3 else counts
    return counts / counts.sum().clamp_min(1.0), moments  # it may have looked up nothing but padding


def _squares(name: str, p: Tensor, pairs: Sequence[tuple[Use, Tensor]], batch: int) -> Tensor:
    """Sums over examples of their squared gradients; the square of the whole gradient where examples are not known.

    Both have the diagonal as mean, since the draws of different examples are independent. The first varies less.
    """
    places = [guess_examples(use, batch) for use, _ in pairs]
    known = all(places)
    total = wide(p).new_zeros(batch if known else 1, p.numel())
    for (use, g), place in zip(pairs, places, strict=True):
        found = rows_of(use, g, place if known else None)[name]
        assert isinstance(found, Entries)
        total[:, found.part or slice(None)] += found.grads.sum(1)
    return total.square().sum(0).view(p.shape)


def _parts(rows: Sequence[slice | None], size: int) -> int:
    """How many equal parts of a weight the uses see: 1 if all see the whole, 0 if the parts are not equal."""
    sizes = {part.stop - part.start for part in rows if part is not None}
    if not sizes:
        return 1
    length = sizes.pop()
    aligned = not sizes and size % length == 0 and all(part is None or part.start % length == 0 for part in rows)
    return size // length if aligned else 0
