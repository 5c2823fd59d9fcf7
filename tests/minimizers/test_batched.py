"""All rows at once end where each ends alone, at its own pace, and rows that are not independent are refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hesse.minimizers.batched import minimize_rows, regions
from hesse.minimizers.models.secular import trust_region
from hesse.minimizers.result import Status


def draw(*shape: int, scale: float = 1.0, seed: int = 0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rosenbrock(x: Tensor) -> Tensor:
    return (100 * (x[:, 1:] - x[:, :-1] ** 2) ** 2 + (1 - x[:, :-1]) ** 2).sum(1)


def beale(x: Tensor) -> Tensor:
    u, v = x[:, 0], x[:, 1]
    return (1.5 - u + u * v) ** 2 + (2.25 - u + u * v**2) ** 2 + (2.625 - u + u * v**3) ** 2


def himmelblau(x: Tensor) -> Tensor:
    u, v = x[:, 0], x[:, 1]
    return (u**2 + v - 11) ** 2 + (u + v**2 - 7) ** 2


MINIMA = {
    rosenbrock: [[1.0, 1.0]],
    beale: [[3.0, 0.5]],
    himmelblau: [[3.0, 2.0], [-2.805118, 3.131312], [-3.779310, -3.283186], [3.584428, -1.848126]],
}
STARTS = {
    rosenbrock: draw(100, 2, scale=3.0),
    beale: torch.tensor([1.0, 0.8], dtype=torch.float64) + draw(100, 2, scale=0.2),
    himmelblau: draw(100, 2, scale=4.0),
}


@pytest.mark.parametrize("fun", MINIMA)
def test_every_start_ends_in_a_minimum(fun: Callable[[Tensor], Tensor]) -> None:
    r = minimize_rows(fun, STARTS[fun])
    assert bool(r.success.all())
    minima = torch.tensor(MINIMA[fun], dtype=torch.float64)
    # The minima above have seven digits; a value that is 1e-12 of the first leaves x its square root.
    assert float(torch.cdist(r.x, minima).amin(1).max()) < 2e-5
    torch.testing.assert_close(r.fun, fun(r.x))
    assert float(r.jac.abs().max()) < 1e-3
    assert r.nit.unique().numel() > 3


@pytest.mark.parametrize("fun", MINIMA)
def test_a_row_takes_the_steps_that_it_takes_alone(fun: Callable[[Tensor], Tensor]) -> None:
    starts = STARTS[fun][:20]
    together = minimize_rows(fun, starts)
    for b in range(len(starts)):
        alone = minimize_rows(fun, starts[b : b + 1])
        assert int(alone.nit) == int(together.nit[b])
        assert int(alone.status) == int(together.status[b])
        torch.testing.assert_close(alone.x[0], together.x[b], rtol=1e-6, atol=1e-8)


def spd(b: int, n: int) -> Tensor:
    A = draw(b, n, n, seed=2)
    return A @ A.mT + 0.1 * torch.eye(n, dtype=A.dtype)


@pytest.mark.parametrize("start", [torch.zeros(7, 5).double(), draw(7, 5)], ids=["zero", "random"])
def test_each_row_may_be_another_problem(start: Tensor) -> None:
    A, b = spd(7, 5), draw(7, 5, seed=3)
    calls = []

    def fun(x: Tensor) -> Tensor:
        calls.append(len(x))
        return 0.5 * torch.einsum("bi,bij,bj->b", x, A, x) - (b * x).sum(1)

    r = minimize_rows(fun, start)
    assert bool(r.success.all())
    torch.testing.assert_close(r.x, torch.linalg.solve(A, b), rtol=1e-7, atol=1e-9)
    assert bool((r.nit <= 2).all())
    assert set(calls[4:]) <= {7}


@pytest.mark.parametrize("exponents", [(-6, 3), (3, -6)])
def test_problems_that_agree_at_the_start_are_not_taken_for_one(exponents: tuple[int, int]) -> None:
    # All values and gradients are equal at zero, and any number of rows passes.
    weight = torch.logspace(*exponents, 4, dtype=torch.float64)
    r = minimize_rows(lambda x: (x[:, 0] - 1) ** 4 + weight[: len(x)] * x[:, 0] ** 4, torch.zeros(4, 1).double())
    # (x - 1)^3 = -w x^3; where a value of fourth order is known to 1e-12, x is to 1e-3.
    torch.testing.assert_close(r.x[:, 0], 1 / (1 + weight ** (1 / 3)), rtol=1e-2, atol=0)
    assert r.nit.unique().numel() > 1


def test_rows_that_are_done_are_not_evaluated_again() -> None:
    sizes = []

    def fun(x: Tensor) -> Tensor:
        sizes.append(len(x))
        return rosenbrock(x)

    starts = STARTS[rosenbrock].clone()
    starts[10:] = 1.0
    r = minimize_rows(fun, starts)
    assert bool(r.success.all()) and int(r.nit[10:].max()) == 0
    assert sizes[4] == 100 and max(sizes[5:]) <= 10 and sizes[-1] == 1
    assert r.nfev == len(sizes)


def test_rows_may_be_dicts_and_of_any_shape() -> None:
    def fun(p: dict[str, Tensor]) -> Tensor:
        return (p["A"] - 2).square().flatten(1).sum(1) + ((p["b"] - p["A"][:, 0, 0]) ** 4 + p["b"] ** 2)

    r = minimize_rows(fun, {"A": draw(6, 2, 3), "b": draw(6, seed=1)})
    assert bool(r.success.all())
    assert r.x["A"].shape == r.jac["A"].shape == (6, 2, 3) and r.x["b"].shape == (6,)
    torch.testing.assert_close(r.x["A"][:, 1], torch.full((6, 3), 2.0).double())
    assert float(r.jac["b"].abs().max()) < 1e-5
    cube = minimize_rows(lambda x: (x - 1).square().flatten(1).sum(1), draw(3, 2, 2, 2))
    torch.testing.assert_close(cube.x, torch.ones(3, 2, 2, 2).double())


def double_well(x: Tensor) -> Tensor:
    return (x[:, 0] ** 2 - 1) ** 2 + x[:, 1:].square().sum(1)


def test_saddles_and_maxima_are_left() -> None:
    starts = torch.tensor([[0.0, 0.0], [0.0, 3.0], [1e-9, 0.0], [0.5, -1.0]], dtype=torch.float64)
    r = minimize_rows(double_well, starts)
    assert bool(r.success.all()) and float(r.fun.max()) < 1e-12


def test_every_end_has_its_own_status() -> None:
    """Eight functions, a row each."""

    def fun(x: Tensor) -> Tensor:
        x = x[:, 0]
        rows = [
            (x[0] - 3) ** 2,
            3.0 + 0 * x[1],
            x[2],
            (x[3] - 0.3).abs() + 0.01 * x[3] ** 2,
            torch.where(x[4] > 0, x[4] - x[4].log(), math.nan),
            torch.where(x[5] > 9, x[5], math.nan),
            1e8 + (x[6] - 2) ** 2,
            x[7] ** 4,
        ]
        return torch.stack(rows)

    r = minimize_rows(fun, torch.ones(8, 1).double() * 5, max_steps=60)
    found = [Status(s) for s in r.status.tolist()]
    assert found[0] is Status.CONVERGED and float(r.x[0]) == pytest.approx(3)
    assert found[1] is Status.CONVERGED and float(r.x[1]) == 5
    assert found[2] is Status.UNBOUNDED
    assert found[3] is Status.KINK
    assert found[4] is Status.CONVERGED and float(r.x[4]) == pytest.approx(1)
    assert found[5] is Status.NOT_FINITE
    assert found[6] in (Status.CONVERGED, Status.PRECISION) and float(r.x[6]) == pytest.approx(2, abs=1e-3)
    assert found[7].success and float(r.x[7]) < 1e-2
    assert r.success.tolist() == [s.success for s in found]
    assert "not finite" in r.message and "kink" in r.message and "5 of 8" in repr(r)


def test_steps_run_out() -> None:
    r = minimize_rows(rosenbrock, STARTS[rosenbrock], max_steps=3)
    assert int(r.nit.max()) == 3
    late = r.status == int(Status.MAX_STEPS)
    assert bool(late.any()) and not bool(r.success[late].any())


@pytest.mark.parametrize("scale", [1e-12, 1e12])
@pytest.mark.parametrize("size", [1e-6, 1e6])
def test_the_scale_of_values_and_of_x_does_not_matter(scale: float, size: float) -> None:
    plain = minimize_rows(rosenbrock, STARTS[rosenbrock])
    r = minimize_rows(lambda x: scale * rosenbrock(x / size), STARTS[rosenbrock] * size)
    assert bool(r.success.all())
    torch.testing.assert_close(r.x / size, plain.x, rtol=1e-4, atol=1e-4)
    # Rounding may turn a step that is just taken into one that is just refused.
    assert float((r.nit - plain.nit).abs().double().mean()) < 1


def test_float32_ends_by_its_own_tolerance() -> None:
    r = minimize_rows(rosenbrock, STARTS[rosenbrock].float())
    assert r.x.dtype == r.fun.dtype == r.jac.dtype == torch.float32
    assert bool(r.success.all())
    # The promise that is let go is 1e-6^1.5 of what was gained.
    assert bool((r.fun <= 1e-8 * rosenbrock(STARTS[rosenbrock])).all())


def test_no_row_and_no_variable() -> None:
    assert minimize_rows(rosenbrock, torch.zeros(0, 2)).x.shape == (0, 2)
    r = minimize_rows(lambda x: x.sum(1) + 2, torch.zeros(3, 0))
    assert r.fun.tolist() == [2, 2, 2] and bool(r.success.all())


def test_regions_match_the_solution_of_one() -> None:
    n = 6
    w, c = draw(300, n).sort(1).values, draw(300, n, seed=1)
    w[:60] = w[:60].abs().sort(1).values + 0.01
    w[60:80] = w[60:80, :1]  # all alike
    c[80:140, 0] = 0  # the hard case, or next to it
    c[140:160, 0] = 1e-30
    c[160:180] = 0
    w[180:200, 1] = w[180:200, 0]
    c[180:200, :2] = 0
    radius = torch.exp(draw(300, seed=4, scale=3.0))
    y, predicted = regions(w, c, radius)
    for i in range(300):
        one, _ = trust_region(w[i], c[i], float(radius[i]))
        size = float(one.norm())
        decrease = -float(c[i] @ one + 0.5 * (w[i] * one) @ one)
        assert float(y[i].norm()) <= float(radius[i]) * (1 + 1e-9)
        assert float(predicted[i]) == pytest.approx(decrease, rel=1e-8, abs=1e-14)
        torch.testing.assert_close(y[i].abs(), one.abs(), rtol=1e-6, atol=1e-7 * size)


@pytest.mark.parametrize(
    ("fun", "said"),
    [
        (lambda x: x.square().sum(), r"one value for each row of x, \[4\]; got \[\].*added up the rows"),
        (lambda x: x.square(), r"got \[4, 2\].*flatten"),
        (lambda x: x.square().sum(1, keepdim=True), r"got \[4, 1\]"),
        (lambda x: (x - x.mean(0)).square().sum(1), "depend on each other.*batch normalisation"),
        (lambda x: x.square().sum(1) + 1e-6 * x.flip(0)[:, 0], "value for row 0 changes when other rows"),
        (lambda x: x.square().sum(1) + torch.rand(4), "random number"),
    ],
)
def test_functions_of_another_kind_are_refused(fun: Callable[[Tensor], Any], said: str) -> None:
    with pytest.raises(ValueError, match=f"(?s){said}"):
        minimize_rows(fun, draw(4, 2))


@pytest.mark.parametrize(
    ("fun", "x0", "said"),
    [
        (lambda x: None, draw(2, 1), "real numbers, one for each row of x; got NoneType"),
        (lambda x: x.sum(1).long(), draw(2, 1), "got torch.int64"),
        (lambda x: x.detach().sum(1), draw(2, 1), "without a gradient"),
        (rosenbrock, torch.zeros(2, 2, dtype=torch.int64), "x0 must be a float32 or float64 tensor; got torch.int64"),
        (rosenbrock, [[1.0, 2.0]], "got list"),
        (rosenbrock, {"a": torch.zeros(2, 1).half()}, r"x0\['a'\].*float16"),
    ],
)
def test_values_and_starts_of_another_type_are_refused(fun: Callable[[Any], Any], x0: Any, said: str) -> None:
    with pytest.raises(TypeError, match=said):
        minimize_rows(fun, x0)


def test_starts_without_one_batch_are_refused() -> None:
    with pytest.raises(ValueError, match="one number"):
        minimize_rows(rosenbrock, torch.tensor(1.0))
    with pytest.raises(ValueError, match="first dimension B"):
        minimize_rows(rosenbrock, {"a": torch.zeros(2, 1), "b": torch.zeros(3)})
