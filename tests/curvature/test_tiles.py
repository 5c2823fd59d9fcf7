"""Factors in parts are the diagonal blocks of the whole ones, and nothing as large as those is ever formed."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from hesse.curvature import tiles
from hesse.curvature.kronecker import apply_inverse, invert
from hesse.curvature.output import output_curvature
from hesse.curvature.statistics import Kronecker, Statistics, statistics
from hesse.curvature.uses import watch_uses
from hesse.objective import Objective
from problems import PROBLEMS, problem
from tolerances import ALGEBRA, ROUNDING


def blocks_of(whole: Tensor, max_dim: int) -> Tensor:
    """The diagonal blocks of [n, n], element by element."""
    n = len(whole)
    b = math.ceil(n / math.ceil(n / max_dim))
    blocks = whole.new_zeros(math.ceil(n / b), b, b)
    for i in range(n):
        for j in range(n):
            if i // b == j // b:
                blocks[i // b, i % b, j % b] = whole[i, j]
    return blocks


def dense(blocks: Tensor, n: int) -> Tensor:
    """The block-diagonal [n, n] that blocks [k, b, b] stand for, or a diagonal [1, n]."""
    return torch.block_diag(*blocks)[:n, :n] if blocks.ndim == 3 else blocks[0].diag()


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


@pytest.mark.parametrize("ones", [False, True])
@pytest.mark.parametrize(("n", "max_dim"), [(6, 3), (7, 3), (4, 4), (5, 1), (10, 4), (3, 9)])
def test_moments_are_the_diagonal_blocks_of_the_whole(n: int, max_dim: int, ones: bool) -> None:
    torch.manual_seed(0)
    rows = noise(2, 8, n)
    whole = torch.cat([rows, torch.ones(2, 8, 1)], -1) if ones else rows
    found = tiles.moments(rows, max_dim, ones)
    expected = torch.stack([blocks_of(x.T @ x, max_dim) for x in whole])
    assert found.shape[-1] <= max_dim
    torch.testing.assert_close(found, expected, **ALGEBRA)


@pytest.mark.parametrize(("k", "b", "n"), [(1, 3, 3), (2, 3, 6), (3, 3, 7), (3, 2, 5)])
def test_times_is_the_product_with_the_block_diagonal(k: int, b: int, n: int) -> None:
    torch.manual_seed(0)
    blocks, x = noise(2, k, b, b), noise(2, n, 4)
    expected = torch.stack([dense(one, n) @ other for one, other in zip(blocks, x, strict=True)])
    torch.testing.assert_close(tiles.times(blocks, x), expected, **ALGEBRA)


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("damping", [1e-3, 1.0])
@pytest.mark.parametrize(("m", "n", "max_dim"), [(6, 9, 3), (7, 5, 3), (4, 10, 4)])
def test_the_inverse_in_parts_is_that_of_the_dense_block_diagonal(
    m: int, n: int, max_dim: int, damping: float, diagonal: bool
) -> None:
    torch.manual_seed(0)
    a, g, w = tiles.moments(noise(4, 20, n), max_dim), tiles.moments(noise(4, 20, m), max_dim), noise(4, m, n)
    g[1] *= 1e6  # each weight splits the damping by its own pi, and all its parts by the same
    a[2, 0] *= 1e4
    a = torch.rand(4, 1, n, dtype=torch.float64) if diagonal else a
    inverse = invert(a, g, damping, (m, n))
    assert inverse is not None
    assert inverse.a.shape == a.shape
    found = apply_inverse(inverse.a, inverse.g, w)
    for i in range(4):
        whole_a, whole_g = dense(a[i], n), dense(g[i], m)
        single = invert(whole_a, whole_g, damping)
        assert single is not None
        torch.testing.assert_close(found[i], apply_inverse(single.a, single.g, w[i]), **ALGEBRA)
        torch.testing.assert_close(inverse.rank[i], single.rank, **ALGEBRA)
        alone = invert(a[i], g[i], damping, (m, n))
        assert alone is not None
        torch.testing.assert_close(apply_inverse(alone.a, alone.g, w[i]), found[i], **ALGEBRA)


def learn(objective: Objective, max_dim: int | None, variant: Any = "expand") -> Statistics:
    """Statistics of one forward pass from one draw, the same at every call."""
    torch.manual_seed(0)
    with watch_uses(objective.params) as uses:
        outputs = objective.forward()
    curvature = output_curvature(objective.loss_fn, outputs, objective.targets)
    return statistics(uses, objective.params, outputs, curvature, variant, max_dim=max_dim)


def assert_in_parts(found: Statistics, whole: Statistics, max_dim: int) -> int:
    """Every block above the limit is in parts, and these are those of the whole one; returns how many are."""
    count = 0
    assert found.keys() == whole.keys()
    for name, one in whole.items():
        other = found[name]
        if not isinstance(one, Kronecker):
            assert torch.equal(other.values, one.values)
            continue
        assert isinstance(other, Kronecker)
        assert (other.form, other.bias) == (one.form, one.bias)
        lookup = one.a.ndim == 1
        if max([one.g.shape[-1]] + ([] if lookup else [one.a.shape[-1]])) <= max_dim:
            assert torch.equal(one.a, other.a)
            assert torch.equal(one.g, other.g)
            continue
        count += 1
        for here, there in ((one.a, other.a), (one.g, other.g)):
            if here.ndim == 1:
                assert torch.equal(there, here[None])
                continue
            alike = here.ndim == 3
            parts = [blocks_of(part, max_dim) for part in (here if alike else here[None])]
            torch.testing.assert_close(there, torch.stack(parts) if alike else parts[0], **ROUNDING[here.dtype])
            assert there.shape[-1] <= max_dim
    return count


@pytest.mark.parametrize("variant", ["expand", "reduce"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_statistics_in_parts_are_the_diagonal_blocks_of_the_whole(name: str, variant: str) -> None:
    model, loss_fn, (x, y) = problem(name)
    x = x.double() if x.is_floating_point() else x
    whole, found, alike = (learn(Objective(model.double(), loss_fn, x, y), n, variant) for n in (None, 4, 10**6))
    assert assert_in_parts(found, whole, 4) > 0
    assert assert_in_parts(alike, whole, 10**6) == 0


@pytest.mark.parametrize(
    ("model", "widest"), [(nn.Linear(4, 3), 5), (nn.Linear(4, 3, bias=False), 4), (nn.Linear(2, 6), 6)]
)
def test_a_side_of_the_limit_is_whole_and_the_bias_counts(model: nn.Module, widest: int) -> None:
    objective = Objective(model, F.mse_loss, torch.randn(8, model.in_features), torch.zeros(8, model.out_features))
    for limit, ndim in ((widest, 2), (widest - 1, 3)):
        one = learn(objective, limit)["weight"]
        assert isinstance(one, Kronecker)
        assert one.a.ndim == one.g.ndim == ndim


class Attended(nn.Module):
    """Keys and values from elsewhere: the packed weight has three matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, x.roll(1, 1), x.flip(1))[0]


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (Attended(), (3, 4, 6)),
        (nn.ConvTranspose1d(6, 4, 3, groups=2), (3, 6, 5)),
        (nn.Conv2d(6, 10, 2, groups=2), (3, 6, 4, 4)),
    ],
    ids=["packed", "transposed", "grouped"],
)
def test_weights_of_several_matrices_are_cut_one_by_one(model: nn.Module, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model.double()
    x = noise(*shape)
    objective = Objective(model, F.mse_loss, x, torch.zeros_like(model(x)))
    whole, found = learn(objective, None), learn(objective, 4)
    assert assert_in_parts(found, whole, 4) > 0
    assert any(isinstance(one, Kronecker) and one.g.ndim == 4 for one in found.values())


class Sizes(TorchDispatchMode):
    """The most elements that one operation has made."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, tuple | list) else [out]:
            if isinstance(one, Tensor):
                self.largest = max(self.largest, one.numel())
        return out


@pytest.mark.parametrize("max_dim", [None, 32])
def test_no_factor_of_the_whole_side_is_formed(max_dim: int | None) -> None:
    objective = Objective(nn.Linear(200, 200), F.mse_loss, torch.randn(8, 200), torch.zeros(8, 200))
    torch.manual_seed(0)
    with watch_uses(objective.params) as uses:
        outputs = objective.forward()
    curvature = output_curvature(objective.loss_fn, outputs, objective.targets)
    with Sizes() as sizes:
        found = statistics(uses, objective.params, outputs, curvature, max_dim=max_dim)["weight"]
        assert isinstance(found, Kronecker)
        invert(found.a, found.g, 1.0, None if max_dim is None else (200, 201))
    assert sizes.largest == (201**2 if max_dim is None else 7 * 29**2)
