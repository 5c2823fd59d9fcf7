"""Spectral densities and log-determinants against all eigenvalues, and quadrature rules against their definition."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hesse.linalg import LinearOperator, logdet, spectral_density
from hesse.linalg.lanczos import Lanczos, generator_of
from hesse.linalg.quadrature import _gauss, _radau
from spectra import SPECTRA, Counted, N, counted

DTYPES = [torch.float64, torch.float32]


def bells(grid: Tensor, eigenvalues: Tensor, width: float) -> Tensor:
    """The smoothed density of all eigenvalues, by the plain sum."""
    bell = torch.exp(-0.5 * ((grid[:, None] - eigenvalues.double()) / width) ** 2) / (width * math.sqrt(2 * math.pi))
    return bell.mean(1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SPECTRA)
def test_the_density_is_that_of_all_eigenvalues(name: str, dtype: torch.dtype) -> None:
    A = counted(SPECTRA[name], dtype)
    found = spectral_density(A, steps=28, vectors=8)
    assert found.products == A.columns == 28 * 8
    assert A.calls == 28  # all vectors side by side
    assert float(torch.trapezoid(found.density, found.grid)) == pytest.approx(1, abs=1e-6)
    torch.testing.assert_close(found.weights.sum(1), torch.ones(8, dtype=torch.float64))
    truth = bells(found.grid, SPECTRA[name], found.width)
    # The standard error, and what 28 steps leave: a few percent of the highest peak.
    assert bool(((found.density - truth).abs() <= 4 * found.error + 0.03 * float(truth.max())).all())
    spread = SPECTRA[name].double()
    slack = 1e-3 * float(spread.abs().max())
    assert float(spread.min()) - slack <= found.lower <= found.upper <= float(spread.max()) + slack
    assert found.upper == pytest.approx(float(spread.max()), rel=2e-2, abs=1e-6)
    assert found.lower == float(found.nodes.min())


def test_moments_of_the_rule_are_those_of_the_operator() -> None:
    # m steps integrate polynomials of degree 2 m - 1 exactly, for each vector.
    A = counted(SPECTRA["both ends"] / 8)
    generator = generator_of(A, 0)
    z = torch.randn(N, 3, generator=generator, dtype=torch.float64)
    run = Lanczos(A, z, 6, generator)
    for _ in range(5):
        run.step()
    nodes, weights = _gauss(run)
    z = z / z.norm(dim=0)
    power = z.clone()
    for degree in range(10):
        torch.testing.assert_close((weights * nodes**degree).sum(1), (z * power).sum(0), rtol=1e-10, atol=1e-12)
        power = A.matrix @ power
    assert not torch.allclose((weights * nodes**10).sum(1), (z * power).sum(0), rtol=1e-6, atol=0)


def test_the_radau_rule_has_a_node_at_zero_and_one_more_moment() -> None:
    A = counted(SPECTRA["zipf"], psd=True)
    generator = generator_of(A, 0)
    z = torch.randn(N, 2, generator=generator, dtype=torch.float64)
    run = Lanczos(A, z, 5, generator)
    for _ in range(4):
        run.step()
    nodes, weights = _radau(run)
    torch.testing.assert_close(nodes[:, 0], torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-14)
    z = z / z.norm(dim=0)
    power = z.clone()
    for degree in range(9):
        torch.testing.assert_close((weights * nodes**degree).sum(1), (z * power).sum(0), rtol=1e-10, atol=1e-13)
        power = A.matrix @ power


def test_a_small_operator_is_exact() -> None:
    values = torch.linspace(-2, 3, 50)
    found = spectral_density(counted(values))
    assert found.products == 50
    torch.testing.assert_close(found.nodes[0], values.double(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.density, bells(found.grid, values, found.width), rtol=1e-9, atol=1e-12)
    assert torch.equal(found.error, torch.zeros_like(found.grid))
    assert (found.lower, found.upper) == (float(found.nodes.min()), float(found.nodes.max()))


def test_another_width_needs_no_product() -> None:
    A = counted(SPECTRA["network"])
    found = spectral_density(A, steps=20, vectors=4)
    spent = A.columns
    fine = found.smoothed(found.width / 10)
    assert A.columns == spent
    assert torch.equal(fine.nodes, found.nodes)
    assert float(torch.trapezoid(fine.density, fine.grid)) == pytest.approx(1, abs=1e-6)
    direct = spectral_density(counted(SPECTRA["network"]), steps=20, vectors=4, width=found.width / 10)
    torch.testing.assert_close(fine.density, direct.density)
    with pytest.raises(ValueError, match=r"need .* points: widen them"):
        found.smoothed(1e-9)


def test_the_standard_error_is_that_of_the_mean_over_vectors() -> None:
    # Sixty densities of eight vectors each: they spread as each of them says.
    found = [spectral_density(counted(SPECTRA["zipf"]), steps=15, vectors=8, width=0.05, seed=s) for s in range(60)]
    values = torch.stack([torch.tensor([(e.weights * (e.nodes < 0.1)).sum() / 8 for e in found])])
    assert float(values.mean()) == pytest.approx(float((SPECTRA["zipf"] < 0.1).double().mean()), abs=0.01)
    at = [int((e.grid - 0.2).abs().argmin()) for e in found]
    spread = torch.stack([e.density[i] for e, i in zip(found, at, strict=True)]).std()
    claimed = torch.stack([e.error[i] for e, i in zip(found, at, strict=True)]).mean()
    assert 0.8 * float(spread) <= float(claimed) <= 2 * float(spread)


LOGDETS = [
    ("network, psd", 0.1),
    ("network, psd", 1.0),
    ("zipf", 1e-3),
    ("identity", 0.5),
    ("zero", 2.0),
    ("geometric", 1.0),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "damping"), LOGDETS)
def test_the_log_determinant_is_that_of_all_eigenvalues(name: str, damping: float, dtype: torch.dtype) -> None:
    A = counted(SPECTRA[name], dtype, psd=True)
    truth = float((SPECTRA[name].double() + damping).log().sum())
    found = logdet(A, damping, max_products=239)  # fewer than would make it exact
    assert found.products == A.columns <= 239
    assert abs(float(found.value) - truth) <= 4 * float(found.error) + 1e-4 * abs(truth)
    assert found.converged == (float(found.error) <= 0.05 * abs(float(found.value)))
    assert found.value.dtype == found.error.dtype == torch.float64


def test_an_indefinite_operator_that_damping_makes_definite() -> None:
    A = counted(SPECTRA["both ends"])
    truth = float((SPECTRA["both ends"].double() + 7).log().sum())
    found = logdet(A, 7.0, max_products=239)
    assert found.converged
    assert abs(float(found.value) - truth) <= 4 * float(found.error)


def test_two_standard_errors_hold_the_truth_as_often_as_they_should() -> None:
    truth = float((SPECTRA["zipf"] + 0.1).log().sum())
    found = [logdet(counted(SPECTRA["zipf"], psd=True), 0.1, max_products=120, rtol=1e-9, seed=s) for s in range(60)]
    inside = sum(abs(float(e.value) - truth) <= 2 * float(e.error) for e in found) / len(found)
    assert inside >= 0.87


def test_few_steps_widen_the_error_by_what_they_leave() -> None:
    # Seven decades, which ten steps cannot resolve: the bracket of the two rules, not the vectors, sets the error.
    values = torch.logspace(-6, 1, N, dtype=torch.float64)
    truth = float((values + 1e-6).log().sum())
    found = logdet(counted(values, psd=True), 1e-6, max_products=100)
    assert not found.converged
    assert abs(float(found.value) - truth) <= float(found.error)
    undeclared = logdet(counted(values), 1e-6, max_products=100)
    assert not undeclared.converged


@pytest.mark.parametrize("n", [60, 240])
def test_the_value_itself_is_taken_where_it_costs_less(n: int) -> None:
    values = torch.linspace(0.5, 1.5, n)
    A = counted(values, psd=True)
    found = logdet(A, 0.0, rtol=1e-6)
    assert float(found.value) == pytest.approx(float(values.double().log().sum()), rel=1e-9)
    assert (found.converged, found.method) == (True, "exact")
    assert float(found.error) <= 1e-12 * n
    assert found.products == A.columns <= 2 * n + 200


def test_the_absolute_tolerance_is_for_log_determinants_near_zero() -> None:
    A = counted(torch.exp(torch.linspace(-1, 1, N)), psd=True)
    assert not logdet(A, 0.0, max_products=100).converged
    found = logdet(A, 0.0, max_products=100, atol=10.0)
    assert found.converged
    assert abs(float(found.value)) <= 3 * float(found.error) <= 30


@pytest.mark.parametrize("n", [60, 240])
def test_an_operator_that_is_not_definite_is_refused(n: int) -> None:
    values = torch.cat([torch.tensor([-2.0]), torch.linspace(1, 3, n - 1)])
    with pytest.raises(torch.linalg.LinAlgError, match=r"damping 0\.5.* is -[12].* not positive definite"):
        logdet(counted(values), 0.5)
    singular = torch.cat([torch.zeros(10), torch.linspace(1, 3, n - 10)])
    with pytest.raises(torch.linalg.LinAlgError, match="no log-determinant with damping 0"):
        logdet(counted(singular, psd=True), 0.0)
    # Rounding below zero is no negative eigenvalue of an operator that was declared psd.
    truth = float((singular.double() + 1e-9).log().sum())
    found = logdet(counted(singular, torch.float32, psd=True), 1e-9)
    assert abs(float(found.value) - truth) <= 3 * float(found.error)
    assert not found.converged  # float32 does not know the logarithm of 1e-9 plus its own rounding


def test_memory_is_shared_out_in_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = spectral_density(counted(SPECTRA["zipf"]), steps=10, vectors=6)
    monkeypatch.setattr("hesse.linalg.quadrature.GROUP", 2 * N * 11)
    A = counted(SPECTRA["zipf"])
    parts = spectral_density(A, steps=10, vectors=6)
    assert A.calls == 30  # three groups of two vectors
    assert parts.nodes.shape == whole.nodes.shape == (6, 10)
    torch.testing.assert_close(parts.weights.sum(1), torch.ones(6, dtype=torch.float64))


def test_seeds_are_reproducible_and_the_global_state_untouched() -> None:
    A = counted(SPECTRA["network, psd"], psd=True)
    before = torch.get_rng_state()
    first, again, other = (spectral_density(A, steps=10, vectors=3, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.density, again.density)
    assert not torch.equal(first.nodes, other.nodes)
    values = [float(logdet(A, 1.0, max_products=100, seed=seed)) for seed in (1, 1, 2)]
    assert values[0] == values[1] != values[2]
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("n", [20, 300])
def test_a_product_that_is_not_finite_is_said(n: int) -> None:
    matrix = torch.eye(n)
    matrix[3, 3] = math.nan
    for call in (lambda A: logdet(A, 1.0), lambda A: spectral_density(A, steps=10, vectors=4)):
        with pytest.raises(torch.linalg.LinAlgError, match="not finite"):
            call(Counted(matrix, psd=True))


def test_what_cannot_be_asked() -> None:
    A = counted(SPECTRA["zipf"], psd=True)
    skew = LinearOperator.of(torch.tensor([[1.0, 2.0], [0.0, 1.0]]))
    with pytest.raises(TypeError, match="symmetric=True"):
        spectral_density(skew)
    with pytest.raises(TypeError, match="symmetric=True"):
        logdet(skew, 1.0)
    with pytest.raises(ValueError, match="steps=1"):
        spectral_density(A, steps=1)
    with pytest.raises(ValueError, match="vectors=1"):
        spectral_density(A, vectors=1)
    with pytest.raises(ValueError, match="width must be positive; got 0"):
        spectral_density(A, width=0.0)
    for damping in (-1.0, math.nan):
        with pytest.raises(ValueError, match="damping must not be negative"):
            logdet(A, damping)
    with pytest.raises(ValueError, match="max_products=20"):
        logdet(A, 1.0, max_products=20)
    assert A.columns == 0
