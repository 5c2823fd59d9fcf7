"""Named tensors as one vector, against the same arithmetic on the concatenated vector."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hesse import tree
from tolerances import ROUNDING


def random_tree(seed: int, dtype: torch.dtype = torch.float64) -> tree.Params:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"weight": (3, 4), "größe": (2,), "scalar": (), "empty": (0, 5)}
    return {name: torch.randn(shape, generator=generator, dtype=dtype) for name, shape in shapes.items()}


def flat(x: tree.Params) -> Tensor:
    return torch.cat([value.flatten().double() for value in x.values()])


def test_dot_is_that_of_the_concatenated_vector() -> None:
    x, y = random_tree(0), random_tree(1)
    torch.testing.assert_close(tree.dot(x, y), flat(x) @ flat(y))


def test_dot_pairs_by_name_not_by_order() -> None:
    x = random_tree(0)
    assert tree.dot(x, dict(reversed(x.items()))) == tree.dot(x, x)


def test_dot_sums_in_float64() -> None:
    # Ten million ones after 1e8: float32 has no 1e8 + 1.
    x = {"a": torch.tensor([1e4]), "b": torch.ones(1000)}
    assert tree.dot(x, x).item() == 1e8 + 1000
    assert tree.dot(x, x).dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_add_is_the_linear_combination(dtype: torch.dtype) -> None:
    x, y, z = (random_tree(seed, dtype) for seed in range(3))
    kept = {name: value.clone() for name, value in x.items()}
    total = tree.add((2.0, x), (-0.5, y), (3.0, z))
    torch.testing.assert_close(flat(total), 2 * flat(x) - 0.5 * flat(y) + 3 * flat(z), **ROUNDING[dtype])
    assert all(total[name].dtype == dtype and torch.equal(x[name], kept[name]) for name in x)


def test_scale() -> None:
    x = random_tree(0)
    torch.testing.assert_close(flat(tree.scale(torch.tensor(2.0), x)), 2 * flat(x))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["weight", "größe", "scalar"])
def test_is_finite_sees_one_bad_element_anywhere(bad: float, where: str) -> None:
    x = random_tree(0)
    assert tree.is_finite(x)
    x[where].view(-1)[-1] = bad
    assert not tree.is_finite(x)
    assert not tree.is_finite(list(x.values()))


def test_nothing_is_finite() -> None:
    assert tree.is_finite({})
    assert tree.is_finite({"empty": torch.zeros(0, 3)})
    assert tree.is_finite([torch.zeros(0), torch.ones(1)])


# -- Layout ------------------------------------------------------------------------------------------------------

LAYOUT = tree.Layout(
    {"b.weight": torch.Size([2, 3]), "a": torch.Size([4]), "b.bias": torch.Size([1]), "none": torch.Size([0, 5])}
)


def test_a_layout_is_the_order_of_the_names() -> None:
    x = random_tree(0)
    layout = tree.Layout.of(x)
    assert list(layout.shapes) == list(x)
    assert layout.size == len(flat(x)) == 15
    assert LAYOUT.size == 11
    assert LAYOUT.slices == {"b.weight": slice(0, 6), "a": slice(6, 10), "b.bias": slice(10, 11), "none": slice(11, 11)}


@pytest.mark.parametrize("tail", [(), (1,), (3,)])
def test_flatten_and_split_are_inverse(tail: tuple[int, ...]) -> None:
    v = torch.arange(11.0 * math.prod(tail)).reshape(11, *tail)
    parts = LAYOUT.split(v)
    assert {name: part.shape for name, part in parts.items()} == {
        name: shape + tail for name, shape in LAYOUT.shapes.items()
    }
    assert torch.equal(LAYOUT.flatten(parts), v)
    assert torch.equal(LAYOUT.flatten(dict(reversed(parts.items()))), v)  # by name, not by order


def test_columns_are_the_last_dimension_of_each_part() -> None:
    v = torch.randn(11, 3, generator=torch.Generator().manual_seed(0))
    for j in range(3):
        for name, part in LAYOUT.split(v[:, j]).items():
            assert torch.equal(LAYOUT.split(v)[name][..., j], part)


def test_flatten_is_that_of_the_concatenated_vector() -> None:
    x = random_tree(0)
    assert torch.equal(tree.Layout.of(x).flatten(x), flat(x))


def test_the_parts_are_views() -> None:
    v = torch.zeros(11)
    LAYOUT.split(v)["a"].fill_(1)
    assert v.tolist() == [0] * 6 + [1] * 4 + [0]


def test_tensors_that_do_not_fit_a_layout() -> None:
    parts = LAYOUT.split(torch.zeros(11))
    with pytest.raises(ValueError, match=r"missing \['a'\], unknown \['c'\]"):
        LAYOUT.flatten({("c" if name == "a" else name): part for name, part in parts.items()})
    with pytest.raises(ValueError, match=r"'a' must have shape \[4\]; got \[2, 2\]"):
        LAYOUT.flatten(parts | {"a": torch.zeros(2, 2)})
    # As many columns in every part, or in none.
    columns = LAYOUT.split(torch.zeros(11, 3))
    for bad in (torch.zeros(4), torch.zeros(4, 2)):
        with pytest.raises(ValueError, match=r"'a' must have shape \[4, 3\]"):
            LAYOUT.flatten(columns | {"a": bad})


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("*", ["b.weight", "a", "b.bias", "none"]),
        ("b.*", ["b.weight", "b.bias"]),
        ("a", ["a"]),
        ("?", ["a"]),
        (["none", "b.bias"], ["b.bias", "none"]),  # in the layout's order
        (["a", "c"], ["a"]),
        (["*", "a"], ["b.weight", "a", "b.bias", "none"]),  # each name once
    ],
)
def test_names_are_matched_by_patterns(pattern: str | list[str], names: list[str]) -> None:
    assert LAYOUT.match(pattern) == names


@pytest.mark.parametrize("pattern", ["c", "A", "B.*", "weight", "", []])
def test_a_pattern_that_matches_nothing_lists_the_names(pattern: str | list[str]) -> None:
    with pytest.raises(ValueError, match=r"The names are: b\.weight, a, b\.bias, none\."):
        LAYOUT.match(pattern)


def test_of_many_names_twenty_are_listed() -> None:
    many = tree.Layout({f"layer{i}": torch.Size([1]) for i in range(25)})
    with pytest.raises(ValueError, match="layer18, layer19 and 5 more"):
        many.match("head")


def test_a_layout_is_restricted_in_its_own_order() -> None:
    part = LAYOUT.restrict(["b.bias", "b.weight"])
    assert part == tree.Layout({"b.weight": torch.Size([2, 3]), "b.bias": torch.Size([1])})
    assert part.slices["b.bias"] == slice(6, 7)
