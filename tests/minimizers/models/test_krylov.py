"""In the Krylov space of the gradient the steps are those of the whole matrix, and a refused step costs no product."""

from __future__ import annotations

import math

import pytest
import torch

from hesse.minimizers.models.dense import Dense
from hesse.minimizers.models.krylov import Krylov, Lanczos
from minimizers.points import normal, point, quadratic, symmetric, vector

# The space is grown until the residual is this part of the gradient.
TIGHT = 1e-12


def krylov(H: torch.Tensor, g: torch.Tensor, forcing: float = TIGHT, radius: float | None = None) -> Krylov:
    return Krylov(lambda v: H @ v, g, forcing, radius)


def test_lanczos_makes_the_matrix_tridiagonal_in_an_orthonormal_basis() -> None:
    H = symmetric(8, 0)
    space = Lanczos(lambda v: H @ v, normal(8, 1), 8)
    while not space.ended:
        space.grow()
    Q = torch.stack(space.basis)
    torch.testing.assert_close(Q @ Q.T, torch.eye(8, dtype=torch.float64), rtol=0, atol=1e-12)
    w, U = space.eigen()
    torch.testing.assert_close(w, torch.linalg.eigvalsh(H), rtol=1e-10, atol=1e-12)
    v = space.vector(U[:, 0])
    torch.testing.assert_close(H @ v, w[0] * v, rtol=1e-8, atol=1e-10)


def test_lanczos_ends_where_the_space_is_closed() -> None:
    H = torch.diag(vector(1, 1, 2, 2, 2))
    space, products = Lanczos(lambda v: H @ v, normal(5, 0), 5), 0
    while not space.ended:
        space.grow()
        products += 1
    assert products == 2  # as many as there are different eigenvalues
    torch.testing.assert_close(space.eigen()[0], vector(1, 2), rtol=1e-12, atol=0)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("radius", [1e-3, 0.7, 30.0])
def test_the_step_is_that_of_the_dense_model(seed: int, radius: float) -> None:
    H, g = symmetric(10, seed), normal(10, seed + 50)
    found, wanted = krylov(H, g).within(radius), Dense(H, g, 0 * g).within(radius)
    torch.testing.assert_close(found.s, wanted.s, rtol=1e-6, atol=1e-7 * radius)
    assert found.predicted == pytest.approx(wanted.predicted, rel=1e-9)
    assert found.length == pytest.approx(float(found.s.norm()), rel=1e-10)
    cube, exact = krylov(H, g).cubed(2.0), Dense(H, g, 0 * g).cubed(2.0)
    torch.testing.assert_close(cube.s, exact.s, rtol=1e-6, atol=1e-8)
    assert cube.predicted == pytest.approx(exact.predicted, rel=1e-9)


def test_the_whole_step_of_a_convex_model_is_newtons_and_has_its_promise() -> None:
    H, g = symmetric(7, 0, eigenvalues=torch.linspace(1, 9, 7, dtype=torch.float64)), normal(7, 2)
    model = krylov(H, g)
    newton = -torch.linalg.solve(H, g)
    torch.testing.assert_close(model.whole, newton, rtol=1e-8, atol=1e-10)
    assert model.predicted == pytest.approx(-0.5 * float(g @ newton), rel=1e-9)
    assert not model.lowest < 0


def test_of_directions_beside_its_space_it_claims_nothing() -> None:
    model = krylov(torch.diag(vector(1, 2, -3)), vector(1, 1, 0))
    assert math.isnan(model.lowest)
    whole = krylov(torch.diag(vector(1, 2, 3)), vector(1, 1, 1))
    assert whole.lowest == pytest.approx(1)


def test_negative_curvature_in_the_space_is_seen_and_leaves_no_promise() -> None:
    model = krylov(symmetric(6, 0, eigenvalues=vector(-3, 1, 2, 3, 4, 5)), normal(6, 2))
    assert model.lowest == pytest.approx(-3, rel=1e-6)
    assert model.predicted == math.inf


@pytest.mark.parametrize("forcing", [0.5, 0.1, 1e-4])
def test_the_residual_is_as_small_as_it_was_asked_to_be(forcing: float) -> None:
    H, g = symmetric(40, 0, eigenvalues=torch.logspace(0, 3, 40, dtype=torch.float64)), normal(40, 1)
    s = krylov(H, g, forcing).whole
    assert float((H @ s + g).norm()) <= forcing * float(g.norm()) * (1 + 1e-9)


def test_a_loose_solution_takes_fewer_products_than_a_tight_one() -> None:
    H, g = symmetric(60, 0, eigenvalues=torch.logspace(0, 2, 60, dtype=torch.float64)), normal(60, 1)
    spent = []
    for forcing in (0.1, 1e-3, 1e-8):
        p = point(quadratic(H, g), torch.zeros_like(g))
        Krylov(p.product, g, forcing, None)
        spent.append(p.function.counts.nhvp)
    assert spent[0] < spent[1] < spent[2] <= 60


def test_a_shorter_step_costs_no_product() -> None:
    H, g = symmetric(12, 0), normal(12, 1)
    p = point(quadratic(H, g), torch.zeros_like(g))
    model = Krylov(p.product, g, 1e-6, 2.0)
    before = p.function.counts.nhvp
    for radius in (1.0, 0.5, 0.1):
        model.within(radius)
    assert p.function.counts.nhvp == before


def test_at_a_stationary_point_it_stays_and_knows_no_curvature() -> None:
    model = krylov(torch.diag(vector(-1, 1)), vector(0, 0))
    assert model.within(1.0).s.tolist() == [0, 0]
    assert model.cubed(1.0).s.tolist() == [0, 0]
    assert math.isnan(model.lowest)
    assert model.predicted == 0


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_scaling_the_function_changes_no_step(scale: float) -> None:
    H, g = symmetric(9, 2), normal(9, 3)
    torch.testing.assert_close(
        krylov(H, g).within(0.4).s, krylov(scale * H, scale * g).within(0.4).s, rtol=1e-7, atol=1e-9
    )


def test_a_zero_matrix_is_a_line_down() -> None:
    model = krylov(torch.zeros(3, 3, dtype=torch.float64), vector(1, 2, 2))
    step = model.within(6.0)
    assert step.s.tolist() == pytest.approx([-2, -4, -4])
    assert step.predicted == pytest.approx(18)
    assert model.predicted == math.inf
