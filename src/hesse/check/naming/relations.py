"""How a wrong gradient relates to the true one: a multiple, one row's share, another order, equal but somewhere.

A relation is a function of the case and of the measured elements of one tensor (:mod:`hesse.check.naming.elements`),
and returns what it found, or None. :data:`RELATIONS` holds them from the most particular to the most general: a
transposed matrix is right on its diagonal, but "wrong at some elements" is not what one wants to hear then.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from hesse.check.differences import Slope
from hesse.check.naming.elements import SHARP, Case, Elements
from hesse.check.naming.patterns import coordinates, named_factor, orders, sizes_of, where_words

__all__ = ["RELATIONS", "Relation", "common_ratio", "different", "scaled"]

CLOSE = 0.004  # numbers that differ by less than this part are called the same
OUTLIERS = 0.03  # part of the elements that need not fit: kinks may lie anywhere
ALIKE = 0.97  # cosine from which on two blunt vectors are called the same
CLEAR = 0.15  # "right elsewhere" takes at least this part of the elements; fewer may agree by chance
AVERAGE = 3.0  # a gradient that is right for long moves, up to this factor, is meant to be one on average
ADDED = 0.03  # what of a difference may be left over when it is called a known term
GROUPS = 32  # slices along an axis that are looked at
ELEMENTS = 64  # with this many, sums over parts are compared


@dataclass(frozen=True)
class Relation:
    """What was found.

    Args:
        kind: name of the kind of fault.
        message: completes the sentence "The gradient of X with respect to Y ...".
        evidence: the numbers behind it, as a JSON object.
    """

    kind: str
    message: str
    evidence: dict[str, Any]


def _found(kind: str, message: str, **evidence: Any) -> Relation:
    return Relation(kind, message, evidence)


def _same(one: Tensor, other: Tensor, limit: Tensor) -> bool:
    """Whether two vectors [k] agree within the limits [k], where the limits say something."""
    seen = limit.isfinite()
    if not bool(seen.any()):
        return False
    size = torch.maximum(one.abs(), other.abs())
    close = (one - other).abs() <= limit + CLOSE * size
    if float(close.double().mean()) < 1 - 2 * OUTLIERS:
        return False
    judged = (limit <= SHARP * size) & (size > 1e-6 * size[seen].max())
    if int(judged.sum()) >= max(1, min(3, int((size > 0).sum()))):
        return float(close[judged].double().mean()) >= 1 - OUTLIERS
    # Each by itself is too blunt, in half precision: many together may still be clear.
    one, other = one[seen], other[seen]
    product = float(one.norm() * other.norm())
    return (
        len(one) >= 16 and float(one @ other) > ALIKE * product > 0 and float((one - other).norm()) < 0.3 * other.norm()
    )


def _constant(case: Case, e: Elements, measured: Sequence[Elements]) -> Relation | None:
    """The function hardly moves with small steps and moves with large ones, as the gradient says it should."""
    asked = e.given.abs() > 1e-3 * e.given.abs().max()
    if not bool(asked.any()):
        return None
    flat = (e.true.abs() <= 1e-4 * e.given.abs().max()) & (e.limit <= SHARP * e.given.abs())
    part = float(flat[asked].double().mean())
    if part >= 0.9 and e.far is None:
        return _found("wrong_gradient", "is not zero although the function does not depend on it", flat=part)
    if part >= 0.9 or (e.far is not None and 1 / AVERAGE < e.far < AVERAGE):
        message = (
            "is not zero although the function does not change along small steps, as in a straight-through estimator"
        )
        return _found("straight_through", message, flat=part, long_steps=e.far)
    return None


def _zero(case: Case, e: Elements, measured: Sequence[Elements]) -> Relation | None:
    if bool(e.grad.any()) and float(e.grad.abs().max()) > 1e-6 * float(e.true.abs().max()):
        return None
    return _found("detached", "is zero although the function depends on it: the path is detached")


def _share(case: Case, e: Elements, measured: Sequence[Elements]) -> Relation | None:
    """One row's share, where the shares of all rows should have been added."""
    n = e.parts.shape[1]
    some = torch.linspace(0, len(e.parts) - 1, min(ELEMENTS, len(e.parts))).long()
    parts, given, true, limit = e.parts[some], e.given[some], e.true[some], e.limit[some]
    if n == 1 or bool(e.right[e.given != 0].all()):  # what is there is right: the rest is missing by itself
        return None
    for shape in _output_shapes(case, n):
        folded, blurred = parts.reshape(-1, *shape), e.blurs[some].reshape(-1, *shape)
        for size in range(1, len(shape) + 1):
            for axes in combinations(range(len(shape)), size):
                kept = [a + 1 for a in range(len(shape)) if a not in axes]
                shares, blurs = ((t.sum(kept) if kept else t).flatten(1) for t in (folded, blurred))
                chosen = {0, shares.shape[1] - 1}
                if len(axes) == 1 and len(given) > 2:  # a single number is the share of some row by chance
                    chosen.add(int((shares - given[:, None]).norm(dim=0).argmin()))
                for i in sorted(chosen):
                    # One row is measured better than the sum of all; a small one hides below the limit of that.
                    own = torch.minimum(limit, blurs[:, i] + CLOSE * shares[:, i].abs())
                    alike = _same(shares[:, i], given, limit) or _same(shares[:, i], given, own)
                    if alike and not _same(shares[:, i], true, limit):
                        which = "first" if i == 0 else "last" if i == shares.shape[1] - 1 else f"{i}th"
                        what = "row" if axes == (0,) else "index"
                        over = f"axis {axes[0]}" if size == 1 else f"axes {' and '.join(map(str, axes))}"
                        message = f"lacks the sum over {over} (it is that of the {which} {what} alone)"
                        return _found("missing_sum", message, axes=list(axes), index=i)
    if n == e.grad.numel() and n > 1:
        own = parts.gather(1, e.index[some][:, None])[:, 0]
        if _same(own, given, limit) and not _same(own, true, limit):
            message = "lacks the sum over the outputs (each element counts the output at its own place alone)"
            return _found("missing_sum", message)
    return None


def _multiple(case: Case, e: Elements, measured: Sequence[Elements]) -> Relation | None:
    """The true gradient times a constant."""
    sharp = e.sharp & (e.true != 0) & (e.given != 0)
    if int(sharp.sum()) >= min(3, e.grad.numel()):
        ratio = float((e.given / e.true)[sharp].median())
        inside = sharp & ((e.given - ratio * e.true).abs() <= abs(ratio) * e.limit + 0.02 * e.given.abs())
        if bool(inside.any()):
            ratio = float((e.given * e.true)[inside].sum() / e.true[inside].square().sum())
        if not _same(e.given, ratio * e.true, abs(ratio) * e.limit):
            return None
        blur = float((e.limit / e.true.abs())[sharp].median()) / math.sqrt(int(sharp.sum()))
    else:
        found = common_ratio(e.blocks)
        if found is None:
            return None
        ratio, blur = found
        # Directions blur what single elements, blunt as they are, may contradict.
        apart = (e.given - ratio * e.true).abs() > abs(ratio) * e.limit + CLOSE * e.size
        if float(apart.double().mean()) > OUTLIERS:
            return None
    return scaled(case, ratio, max(CLOSE, blur), alone=e.grad.numel() == 1)


def _reordered(case: Case, e: Elements, measured: Sequence[Elements]) -> Relation | None:
    """The same numbers at other places."""
    if e.grad.numel() < 4:
        return None
    for words, order in orders(e.shape):
        if _same(e.grad[order[e.index]], e.true, e.limit):
            return _found("transposed", words)
    for axis in range(len(e.shape)):
        slices = _slice_order(e, axis)
        if slices is not None:
            words = f"has its slices along axis {axis} in another order: {str(slices[:6])[:-1]}"
            return _found("transposed", words + (" ...]" if len(slices) > 6 else "]"), axis=axis, order=slices)
    if e.complete and int(e.sharp.sum()) >= 4 and int(e.right.sum()) < CLEAR * int(e.sharp.sum()):
        given, _ = e.given.sort()
        true, by = e.true.sort()
        if _same(given, true, e.limit[by]):
            return _found("transposed", "holds the right numbers in the wrong order")
    return None


def _slice_order(e: Elements, axis: int) -> list[int] | None:
    """Where along ``axis`` each slice of the true gradient is found in the given one, when all are found."""
    size, stride = e.shape[axis], math.prod(e.shape[axis + 1 :])
    place = coordinates(e.index, e.shape)[axis]
    if not 3 <= size <= GROUPS or int(torch.bincount(place, minlength=size).min()) < 2:
        return None
    seen = e.limit.isfinite()
    gaps = torch.stack([(e.grad[e.index + (other - place) * stride] - e.true) * seen for other in range(size)])
    each = torch.zeros(size, size, dtype=torch.float64).index_add(1, place, gaps.square())
    order = each.argmin(0)
    if len(order.unique()) < size or bool((order == torch.arange(size)).all()):
        return None
    return order.tolist() if _same(e.grad[e.index + (order[place] - place) * stride], e.true, e.limit) else None


def _swapped(case: Case, e: Elements, measured: Sequence[Elements]) -> Relation | None:
    """The gradient of another argument of the same shape."""
    for other in measured:
        if other is not e and other.shape == e.shape:
            true, limit, *_ = other.more(e.index)
            if _same(e.given, true, limit):
                message = f"equals the gradient with respect to {other.name}: the two are swapped or mixed up"
                return _found("wrong_gradient", message, equals=other.name)
    return None


def _unmixed(case: Case, e: Elements, measured: Sequence[Elements]) -> Relation | None:
    """Off by what a mean or a scale along an axis would have contributed, as in the backward of norms and softmax."""
    if float((e.parts != 0).sum(1).double().median()) < 2:  # elements that do not mix leave no such term
        return None
    gap = e.given - e.true
    own = float(gap @ e.values / e.values.square().sum().clamp_min(1e-300))
    if len(gap) >= 8 and float((gap - own * e.values).norm()) < ADDED * float(gap.norm()):
        message = f"is off by {own:.3g} times the tensor itself, as a decay or a projection would add"
        return _found("wrong_gradient", message, times=own)
    for axis, place in enumerate(coordinates(e.index, e.shape)):
        groups = e.index - place * math.prod(e.shape[axis + 1 :])
        left, seen = 0.0, 0
        for group in groups.unique().tolist()[:GROUPS]:
            mine = groups == group
            if int(mine.sum()) < 5 or float(gap[mine].norm()) <= float(e.limit[mine].norm()):
                continue
            x = e.values[mine]
            line = torch.stack([torch.ones_like(x), x], 1)
            share = torch.exp((x - x.max()).clamp_min(-50))[:, None]
            left += min(_rest(line, gap[mine]), _rest(share, gap[mine])) / float(gap[mine].norm())
            seen += 1
        if seen >= min(2, e.grad.numel() // e.shape[axis]) and left < ADDED * seen:
            message = f"lacks a term that sums over axis {axis}, as a mean, a norm or a softmax over it would give"
            return _found("missing_sum", message, axes=[axis])
    return None


def _somewhere(case: Case, e: Elements, measured: Sequence[Elements]) -> Relation | None:
    """Right at many elements and wrong at others."""
    wrong = e.wrong & (e.size > 1e-6 * e.size.max())
    right = e.right & ~wrong
    judged = int(wrong.sum()) + int(right.sum())
    if not bool(wrong.any()) or int(right.sum()) < 2:
        return None
    # What is zero on both sides does not depend on these elements, and takes part in patterns only.
    words = where_words(wrong, right, e.index, e.shape, e.values, e.given)
    # Few that are right may be so by chance, unless they are a place of their own.
    if int(right.sum()) < CLEAR * judged and (int(right.sum()) < 3 or not words.startswith(("in ", "on ", "at "))):
        return None
    # A small constant error hides below the limit of some elements: then it is no pattern, it is everywhere.
    ratio = (e.given - e.true).abs() / e.size.clamp_min(1e-300)
    if not words and float(ratio[wrong].median()) < 3 * float((e.limit / e.size.clamp_min(1e-300))[right].median()):
        return None
    given, true = e.given[wrong], e.true[wrong]
    if bool((given == 0).all()):
        how = ": it is zero there"
    elif bool((true.abs() <= 1e-6 * given.abs()).all()):
        how = ": the function does not depend on these"
    elif _same(given, -true, e.limit[wrong]):
        how = ": its sign is wrong there"
    else:
        quotient = float((given / true).nan_to_num(posinf=0, neginf=0).median())
        how = (
            f": it is {quotient:.3g} times the true one there" if _same(given, quotient * true, e.limit[wrong]) else ""
        )
    first = torch.stack(coordinates(e.index[wrong][:5], e.shape), 1).tolist() if e.shape else [[]]
    part = int(wrong.sum()) / judged
    if not words:
        words = "at " + ", ".join(str(tuple(place)) for place in first[:3]) + (" ..." if int(wrong.sum()) > 3 else "")
    amount = f" ({part:.0%} of them)" if e.complete else ""
    message = f"is wrong at some elements only{amount}, {words}{how}"
    return _found("some_elements", message, fraction=part, indices=first, where=words)


def _crossed(case: Case, e: Elements, measured: Sequence[Elements]) -> Relation | None:
    """``grad @ w`` in place of ``grad @ w.T``: per row, the Jacobian's columns were added in place of its rows.

    With J[i, j] the slope of output j times its gradient w_j along element i, the true gradient is J 1. The
    crossed one is sum_j J[j, i] w_j / w_i, so that (J' - diag(given)) w = 0: that matrix is singular.
    """
    if len(e.shape) < 2 or e.parts.shape[1] != e.grad.numel() or not 3 <= e.shape[-1] <= 128:
        return None
    width = e.shape[-1]
    if float((e.given - e.true).norm()) < 0.3 * float(e.true.norm()):
        return None
    rows = e.grad.reshape(-1, width).abs().sum(1).topk(min(3, e.grad.numel() // width)).indices
    for row in rows.tolist():
        index = torch.arange(row * width, (row + 1) * width)
        true, limit, parts, _ = e.more(index)
        if len(parts) < width or float(limit.norm()) > SHARP * float(true.norm()):
            return None
        jacobian = parts[:, index]
        if float((parts.sum(1) - jacobian.sum(1)).norm()) > 1e-3 * float(parts.norm()):
            return None  # rows that see one another
        values = torch.linalg.svdvals(jacobian.T - torch.diag(e.grad[index]))
        if values[-1] > max(CLOSE, 2 * float(limit.norm() / e.grad[index].norm())) * values[-2]:
            return None
    return _found("transposed", "is that of the transposed matrix (grad @ w where grad @ w.T belongs, or the reverse)")


def _slicewise(case: Case, e: Elements, measured: Sequence[Elements]) -> Relation | None:
    """The true gradient times a factor that differs from slice to slice, perhaps one of the other tensors."""
    usable = e.sharp & (e.true != 0)
    for axis, place in enumerate(coordinates(e.index, e.shape)):
        size = e.shape[axis]
        count = torch.zeros(size).index_add_(0, place[usable], torch.ones(int(usable.sum())))
        if size < 2 or int((count >= 2).sum()) < 2 or int(usable.sum()) < 3 * int((count > 0).sum()) / 2:
            continue
        zeros = torch.zeros(size, dtype=torch.float64)
        above = zeros.index_add(0, place[usable], (e.given * e.true)[usable])
        factors = above / zeros.index_add(0, place[usable], e.true.square()[usable])
        if not _same(e.given[usable], (factors[place] * e.true)[usable], (factors[place].abs() * e.limit)[usable]):
            continue
        low, high = float(factors[count > 0].min()), float(factors[count > 0].max())
        message = f"is too large or too small by a factor that differs along axis {axis}, from {low:.3g} to {high:.3g}"
        for other, tensor in case.tensors.items():
            values = tensor.detach().double().cpu().flatten()
            if values.numel() == size:
                known, seen = count > 0, torch.full((size,), 0.02, dtype=torch.float64)
                if _same((factors * values)[known], torch.ones(int(known.sum())).double(), seen[known]):
                    return _found("missing_factor", f"lacks the factor {other}", factors=factors.tolist()[:8])
                if _same(factors[known], values[known], seen[known] * values[known].abs()):
                    return _found("missing_factor", f"has the factor {other} too much", factors=factors.tolist()[:8])
        return _found("wrong_gradient", message, axis=axis, factors=factors.tolist()[:8])
    return None


def _rest(basis: Tensor, gap: Tensor) -> float:
    """What of ``gap`` [k] the columns of ``basis`` [k, p] leave over."""
    q, _ = torch.linalg.qr(basis)
    return float((gap - q @ (q.T @ gap)).norm())


def different(e: Elements) -> Relation:
    """None of the known relations: how far apart the two are."""
    finite = e.limit.isfinite()
    given, true = e.given[finite], e.true[finite]
    norms = float(given.norm()), float(true.norm())
    if not norms[0] * norms[1]:
        return _found("wrong_gradient", "differs from differences of the function", given=norms[0], true=norms[1])
    cosine, ratio = float(given @ true) / (norms[0] * norms[1]), norms[0] / norms[1]
    error = float((given - true).norm()) / max(norms)
    message = f"is off by {error:.0%} (cosine with the true one {cosine:.2f}, norm {ratio:.3g} times)"
    return _found("wrong_gradient", message, cosine=cosine, ratio=ratio, error=error)


def scaled(case: Case, ratio: float, blur: float, alone: bool = False) -> Relation | None:
    """The kind of a constant ratio; ``alone`` when it is that of a single number, where any error is one."""
    if abs(ratio - 1) <= blur:
        return None
    if abs(ratio + 1) <= blur:
        return _found("wrong_sign", "has the wrong sign", ratio=ratio)
    outputs = case.evaluate().numel()
    sizes = sizes_of({n: tuple(t.shape) for n, t in case.tensors.items()}, outputs, case.batch)
    kind, words = named_factor(abs(ratio), blur, sizes, case.batch)
    message = f"is {abs(ratio):.3g} times what it should be" + (f": {words}" if words else "")
    if ratio < 0:
        return _found("wrong_sign", f"has the wrong sign, and {message}", ratio=ratio)
    known = words or abs(ratio * 20 - round(ratio * 20)) < 20 * blur * ratio
    return _found("wrong_gradient" if alone and not known else kind, message, ratio=ratio)


def common_ratio(slopes: Sequence[Slope]) -> tuple[float, float] | None:
    """Given over true and its error where several slopes agree on it."""
    seen = [s for s in slopes if s.noise < 0.3]
    if len(seen) < 2:
        return None
    sharpest = min(seen, key=lambda s: s.noise)
    if not sharpest.numeric:
        return None
    ratio = sharpest.analytic / sharpest.numeric
    if any(abs(s.analytic - ratio * s.numeric) > abs(ratio) * s.limit + 0.02 * abs(s.analytic) for s in seen):
        return None
    return ratio, sharpest.noise


def _output_shapes(case: Case, n: int) -> Iterator[tuple[int, ...]]:
    """Shapes that ``n`` outputs may have, as the shapes of the tensors suggest."""
    shapes: dict[tuple[int, ...], None] = {}
    if case.batch and n % case.batch == 0:
        shapes[case.batch, n // case.batch] = None
    for tensor in case.tensors.values():
        shape = tuple(tensor.shape)
        if math.prod(shape) == n and 0 < len(shape) <= 5:
            shapes[shape] = None
        for k in range(1, min(len(shape), 3) + 1):
            head = math.prod(shape[:k])
            if n % head == 0:
                shapes[*shape[:k], n // head] = None
        if len(shape) == 1 and case.batch and n % (case.batch * shape[0]) == 0:
            shapes[case.batch, shape[0], n // (case.batch * shape[0])] = None
    shapes[(n,)] = None
    yield from shapes


RELATIONS: tuple[Callable[[Case, Elements, Sequence[Elements]], Relation | None], ...] = (
    _constant,
    _zero,
    _share,
    _multiple,
    _reordered,
    _swapped,
    _unmixed,
    _somewhere,
    _crossed,
    _slicewise,
)
