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
