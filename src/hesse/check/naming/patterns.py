"""Words for numbers and places: which constant a factor is, which elements a mask picks, how an order is wrong.

A ratio of 0.0625 says little, "1/16, and 16 is the batch size" says what to look for; twelve positions say
little, "the last column" or "where x < 0" says which branch of the code.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import combinations, pairwise

import torch
from torch import Tensor

__all__ = ["coordinates", "named_factor", "orders", "sizes_of", "where_words"]

CONSTANTS = {
    "3": 3.0,
    "4": 4.0,
    "pi": math.pi,
    "2 pi": 2 * math.pi,
    "sqrt(2)": math.sqrt(2),
    "sqrt(pi)": math.sqrt(math.pi),
    "sqrt(2 pi)": math.sqrt(2 * math.pi),
    "sqrt(2/pi)": math.sqrt(2 / math.pi),
    "ln 2": math.log(2),
    "ln 10": math.log(10),
    "e": math.e,
}
SIGNIFICANT = 0.02  # a slice with a smaller part of wrong elements is not one where the gradient is wrong


def sizes_of(shapes: dict[str, Sequence[int]], outputs: int, batch: int | None) -> dict[int, str]:
    """Numbers that a mean may divide by, in words: the batch, single axes, their products, all elements.

    Example:
        >>> sizes_of({"x": (8, 5)}, 8, 8)
        {8: 'the batch size', 5: 'the size of axis 1 of x', 40: 'the number of elements of x'}
    """
    sizes: dict[int, str] = {}
    if batch:
        sizes[batch] = "the batch size"
    for name, shape in shapes.items():
        for axis, size in enumerate(shape):
            sizes.setdefault(size, f"the size of axis {axis} of {name}")
    for name, shape in shapes.items():
        sizes.setdefault(math.prod(shape), f"the number of elements of {name}")
    sizes.setdefault(outputs, "the number of outputs")
    for name, shape in shapes.items():
        for start in range(len(shape)):
            for end in range(start + 2, len(shape) + 1):
                sizes.setdefault(math.prod(shape[start:end]), f"the size of axes {start} to {end - 1} of {name}")
    return {size: words for size, words in sizes.items() if size > 2}


def named_factor(factor: float, blur: float, sizes: dict[int, str], batch: int | None) -> tuple[str, str]:
    """The kind of a constant factor and what the number means, ``""`` when it means nothing known.

    Args:
        factor: gradient as given divided by the true one, positive.
        blur: its relative error.
        sizes: as of :func:`sizes_of`.
        batch: the size that is believed even where a root of another would do.

    Example:
        >>> named_factor(1 / 16, 1e-3, {16: "the batch size"}, 16)
        ('wrong_reduction', '16 is the batch size, and a mean stands where the sum belongs')
        >>> named_factor(0.25, 1e-3, {16: "the size of axis 1 of q"}, None)
        ('missing_factor', '4 is sqrt(16), and 16 is the size of axis 1 of q')
        >>> named_factor(0.5, 1e-3, {}, None)
        ('missing_factor', '')
    """

    def same(value: float) -> bool:
        return abs(factor / value - 1) <= blur

    plain = same(2) or same(0.5)
    decimal = abs(factor * 20 - round(factor * 20)) < 20 * blur * factor  # somebody's constant, more likely
    if not plain:
        # The root of an axis is a scale of attention or of an initialisation; an axis as small is rarer.
        roots = [n for n in sizes if n > 4 and (same(math.sqrt(n)) or same(1 / math.sqrt(n)))]
        for n in sizes:
            if (n == batch or not roots) and same(1 / n):
                return "wrong_reduction", f"{n} is {sizes[n]}, and a mean stands where the sum belongs"
            if (n == batch or not roots) and same(n):
                return "wrong_reduction", f"{n} is {sizes[n]}, and a sum stands where the mean belongs"
        if roots:
            return (
                "missing_factor",
                f"{math.sqrt(roots[0]):.3g} is sqrt({roots[0]}), and {roots[0]} is {sizes[roots[0]]}",
            )
        for n in sizes:
            if n > 4 and blur < 0.2 / n and not decimal and (same(n / (n - 1)) or same((n - 1) / n)):
                return "wrong_reduction", f"that is {n} and {n} - 1, and {n} is {sizes[n]}: counted in two ways"
    for words, value in CONSTANTS.items():
        if not value.is_integer() and (same(value) or same(1 / value)):
            return "missing_factor", f"that is {words}" if same(value) else f"that is 1 / ({words})"
    for n in sizes:  # a count of some of the elements
        part = factor * n
        if not plain and not decimal and 1 <= round(part) < n and abs(part - round(part)) < 0.02 and blur < 0.05 / n:
            return "wrong_reduction", f"that is {round(part)} of {n}, and {n} is {sizes[n]}: another count of elements"
    return "missing_factor", ""


def coordinates(index: Tensor, shape: Sequence[int]) -> list[Tensor]:
    """Coordinates along each axis of flat positions ``index`` [k].

    Example:
        >>> coordinates(torch.tensor([0, 4]), (2, 3))
        [tensor([0, 1]), tensor([0, 1])]
    """
    places = []
    for size in reversed(shape):
        places.append(index % size)
        index = index // size
    return places[::-1]


def where_words(
    wrong: Tensor, right: Tensor, index: Tensor, shape: Sequence[int], values: Tensor, given: Tensor
) -> str:
    """Which elements are wrong, as a place or a condition; ``""`` when they follow no pattern known here.

    Args:
        wrong, right: masks [k]; elements in neither are not judged.
        index: flat positions [k].
        shape: of the tensor.
        values: of the tensor, [k].
        given: the gradient as given, [k].

    Example:
        >>> bad = torch.tensor([False, True, False, True])
        >>> where_words(bad, ~bad, torch.arange(4), (2, 2), torch.tensor([1.0, -3.0, -2.0, 4.0]), torch.ones(4))
        'in the last column'
    """
    places = coordinates(index, shape)
    for axis, place in enumerate(places):
        words = _slices(wrong, right, place, axis, shape)
        if words:
            return words
    for a in range(len(shape)):
        for b in range(a + 1, len(shape)):
            offset = places[b] - places[a]
            names = "the diagonal" if len(shape) == 2 else f"the diagonal of axes {a} and {b}"
            for mask, words in (
                (offset > 0, f"above {names}"),
                (offset < 0, f"below {names}"),
                (offset == 0, f"on {names}"),
                (offset >= 0, f"on and above {names}"),
                (offset <= 0, f"on and below {names}"),
                (offset != 0, f"off {names}"),
            ):
                if _is(mask, wrong, right):
                    return words
    for numbers, words in ((values, "x"), (values.abs(), "|x|"), (given.abs(), "its size")):
        if wrong.sum() >= 2 and right.sum() >= 2:
            low, high = numbers[wrong], numbers[right]
            if low.max() < high.min():
                return f"where {words} {_threshold(float(low.max()), float(high.min()), '<')}"
            if low.min() > high.max():
                return f"where {words} {_threshold(float(high.max()), float(low.min()), '>')}"
    edge = torch.zeros_like(wrong)
    for place, size in zip(places, shape, strict=True):
        if size > 2:
            edge |= (place == 0) | (place == size - 1)
    if _is(edge, wrong, right):
        return "at the borders"
    if _is(~edge, wrong, right):
        return "away from the borders"
    return ""


def orders(shape: Sequence[int]) -> Iterator[tuple[str, Tensor]]:
    """Ways to have put the elements into the wrong places, in words, and where each would be found, flat.

    Example:
        >>> words, order = next(orders((2, 2)))
        >>> words, order.tolist()
        ('is transposed', [0, 2, 1, 3])
    """
    places = torch.arange(math.prod(shape)).reshape(tuple(shape))
    for a, b in combinations(range(len(shape)), 2):
        if shape[a] == shape[b] > 1:
            words = "is transposed" if len(shape) == 2 else f"has axes {a} and {b} exchanged"
            yield words, places.transpose(a, b).flatten()
        elif shape[a] > 1 and shape[b] > 1:
            turned = list(shape)
            turned[a], turned[b] = turned[b], turned[a]
            words = f"was reshaped where axes {a} and {b} should have been exchanged"
            yield words, places.reshape(turned).transpose(a, b).flatten()
            yield words, places.transpose(a, b).reshape(tuple(shape)).flatten()
    for axis, size in enumerate(shape):
        if size > 1:
            yield f"is reversed along axis {axis}", places.flip(axis).flatten()
            for shift in (1, -1):
                yield f"is shifted by one along axis {axis}", places.roll(shift, axis).flatten()


def _is(mask: Tensor, wrong: Tensor, right: Tensor) -> bool:
    return bool(mask[wrong].all()) and not bool(mask[right].any()) and bool(wrong.any()) and bool(right.any())


def _slices(wrong: Tensor, right: Tensor, place: Tensor, axis: int, shape: Sequence[int]) -> str:
    """Words for slices along one axis that hold all wrong elements and none that are right."""
    bad, good = set(place[wrong].tolist()), set(place[right].tolist())
    if not bad or not good or bad & good:
        return ""
    size = shape[axis]
    one, many = ("row", "rows") if axis == 0 else ("column", "columns") if len(shape) == 2 else ("index", "indices")
    tail = "" if len(shape) <= 2 and axis < 2 else f" of axis {axis}"
    if len(shape) == 1:
        one, many, tail = "element", "elements", ""
    if len(good) == 1 and (g := good.pop()) in (0, size - 1) and len(bad) > 1:
        return f"in all {many}{tail} but the {'last' if g else 'first'}"
    if len(bad) == 1:
        (b,) = bad
        name = "first" if b == 0 else "last" if b == size - 1 else ""
        return f"in the {name} {one}{tail}" if name else f"in {one} {b}{tail}"
    ordered = sorted(bad)
    if ordered[-1] - ordered[0] + 1 == len(ordered) or not any(ordered[0] < g < ordered[-1] for g in good):
        return f"in {many} {ordered[0]} to {ordered[-1]}{tail}"
    steps = {b - a for a, b in pairwise(ordered)}
    if steps == {2} and not any(g % 2 == ordered[0] % 2 for g in good):
        return f"in every second {one}{tail}"
    return f"in {many} {', '.join(map(str, ordered[:6]))}{' ...' if len(ordered) > 6 else ''}{tail}"


def _threshold(low: float, high: float, sign: str) -> str:
    """A comparison with the roundest number between two."""
    if low <= 0 <= high:
        return f"{sign} 0"
    for digits in range(-6, 9):
        rounded = round((low + high) / 2, digits)
        if low <= rounded <= high:
            return f"{sign} {rounded:g}"
    return f"{sign} {(low + high) / 2:.3g}"
