"""The log-determinant against slogdet, the spectral density against bells at the eigenvalues, and both error bars."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hesse.linalg import Density, LinearOperator, logdet, spectral_density
from hesse.linalg.lanczos import Lanczos, generator_of
from hesse.linalg.quadrature import _radau
from spectra import Counted, counted
from tolerances import ALGEBRA, ROUNDING, STANDARD_ERRORS

N = 200
DTYPES = [torch.float64, torch.float32]

SPECTRA: dict[str, Tensor] = {
    "flat": torch.linspace(0.5, 1.5, N, dtype=torch.float64),
    "decay": 1 / (1 + torch.arange(N, dtype=torch.float64)),
    "outliers": torch.cat([torch.tensor([20.0, 12, 9, 7, 5]), torch.linspace(0, 0.3, N - 5)]).double(),
    "low rank": torch.cat([torch.tensor([3.0, 2, 1]), torch.zeros(N - 3)]).double(),
}
INDEFINITE = torch.linspace(-1, 2, N, dtype=torch.float64)


def slogdet(A: Counted, damping: float) -> Tensor:
    matrix = A.matrix.double()
    return torch.linalg.slogdet(matrix + damping * torch.eye(len(matrix), dtype=matrix.dtype)).logabsdet


# -- the log-determinant ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("psd", [True, False])
@pytest.mark.parametrize("damping", [1.0, 0.01])
@pytest.mark.parametrize("name", SPECTRA)
def test_logdet_is_that_of_the_dense_matrix(name: str, damping: float, psd: bool, dtype: torch.dtype) -> None:
    A = counted(SPECTRA[name], dtype, psd=psd)
    found = logdet(A, damping, max_products=N - 1)
    expected = slogdet(A, damping)
    assert found.method == "lanczos"
    assert found.value.dtype == found.error.dtype == torch.float64
    assert found.products == A.columns < N
    assert found.converged == (float(found.error) <= 0.05 * abs(float(found.value)))
    # Half an ulp of the largest eigenvalue for each of n eigenvalues, seen through a logarithm of slope 1 / damping.
    rounding = N * torch.finfo(dtype).eps * float(SPECTRA[name].max()) / damping
    assert abs(float(found.value - expected)) <= STANDARD_ERRORS * float(found.error) + rounding


@pytest.mark.parametrize("psd", [True, False])
@pytest.mark.parametrize(("name", "damping"), [("flat", 1.0), ("decay", 0.01), ("outliers", 1.0)])
def test_error_bars_of_logdet_are_honest(name: str, damping: float, psd: bool) -> None:
    # In units of the standard error the root mean square is one (0.7 to 1.25 over sixty seeds of these), and
    # 95 of 100 are below two. Error bars wrong by two either way leave the interval.
    A = counted(SPECTRA[name], psd=psd)
    expected = slogdet(A, damping)
    found = [logdet(A, damping, rtol=0.01, max_products=150, seed=seed) for seed in range(60)]
    ratio = torch.stack([(one.value - expected).abs() / one.error for one in found])
    assert 0.65 < float(ratio.square().mean().sqrt()) < 1.35
    assert float((ratio <= 2).double().mean()) >= 0.85


def test_steps_left_over_are_part_of_the_error() -> None:
    # The samples of a psd operator are bracketed by two rules; with four steps only these are far apart.
    values = torch.logspace(-4, 1, N, dtype=torch.float64)
    A = counted(values, psd=True)
    found = logdet(A, 1e-4, max_products=40)
    assert found.products == A.columns == 40
    assert not found.converged
    assert abs(float(found.value - slogdet(A, 1e-4))) <= 2 * float(found.error)


def test_logdet_of_a_small_operator_is_exact() -> None:
    for psd in (True, False):
        A = counted(SPECTRA["outliers"], psd=psd)
        found = logdet(A, 0.1)
        assert (found.method, found.products, found.converged) == ("exact", N, True)
        assert A.columns == N
        assert float(found.error) < 1e-10  # of rounding
        torch.testing.assert_close(found.value, slogdet(A, 0.1), **ALGEBRA)


def test_multiples_of_the_identity_cost_one_step_each() -> None:
    A = counted(torch.full((N,), 3.0, dtype=torch.float64), psd=True)
    found = logdet(A, 1.0, max_products=N - 1)
    assert found.converged
    assert found.products == A.columns <= 10 * 5
    torch.testing.assert_close(found.value, torch.tensor(N * math.log(4.0), dtype=torch.float64), **ALGEBRA)


def test_logdet_draws_until_the_error_is_as_small_as_asked_for() -> None:
    spent = []
    for rtol in (0.1, 0.01):
        A = counted(SPECTRA["decay"], psd=True)
        found = logdet(A, 0.01, rtol=rtol, max_products=N - 1)
        assert found.converged
        assert float(found.error) <= rtol * abs(float(found.value))
        spent.append(A.columns)
    assert spent[0] < spent[1]
    # log det (A + I) is near zero for small A: what counts there is the absolute error.
    A = counted(SPECTRA["decay"] - 0.03, psd=False)
    near = logdet(A, 1.0, rtol=0.0, atol=2.0, max_products=N - 1)
    assert near.converged
    assert float(near.error) <= 2.0


def test_an_indefinite_operator_has_no_log_determinant() -> None:
    for most in (1000, N - 1):  # multiplied out, and by Lanczos
        with pytest.raises(torch.linalg.LinAlgError, match="not positive definite"):
            logdet(counted(INDEFINITE), 0.1, max_products=most)
    A = counted(INDEFINITE)
    found = logdet(A, 1.5, max_products=N - 1)
    assert abs(float(found.value - slogdet(A, 1.5))) <= STANDARD_ERRORS * float(found.error)


def test_what_logdet_cannot_be_asked() -> None:
    A = counted(SPECTRA["flat"])
    with pytest.raises(TypeError, match="symmetric=True"):
        logdet(LinearOperator.of(torch.tensor([[1.0, 2.0], [0.0, 1.0]])), 1.0)
    for damping in (-0.5, math.nan):
        with pytest.raises(ValueError, match=f"must not be negative; got {damping}"):
            logdet(A, damping)
    with pytest.raises(ValueError, match="40 products; got max_products=39"):
        logdet(A, 1.0, max_products=39)
    assert A.columns == 0


# -- the spectral density ---------------------------------------------------------------------------------------------


def bells(eigenvalues: Tensor, found: Density) -> Tensor:
    """The density of all eigenvalues, each with a bell of the same width: a plain loop."""
    total = torch.zeros_like(found.grid)
    for value in eigenvalues.tolist():
        normal = torch.distributions.Normal(torch.tensor(value, dtype=torch.float64), found.width)
        total += normal.log_prob(found.grid).exp()
    return total / len(eigenvalues)


def integral(found: Density) -> float:
    return float(torch.trapezoid(found.density, found.grid))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["decay", "outliers", "indefinite"])
def test_the_density_is_that_of_the_eigenvalues(name: str, dtype: torch.dtype) -> None:
    values = INDEFINITE if name == "indefinite" else SPECTRA[name]
    A = counted(values, dtype)
    found = spectral_density(A, steps=12, vectors=16)
    assert found.products == A.columns == 192
    assert found.nodes.shape == found.weights.shape == (16, 12)
    assert abs(integral(found) - 1) < 1e-6
    assert found.density.dtype == found.error.dtype == found.grid.dtype == torch.float64
    # What the error bars leave out is the tails, of which no vector sees more than the nearest node.
    for smooth in (found, found.smoothed(3 * found.width)):
        exact = bells(values, smooth)
        allowed = STANDARD_ERRORS * smooth.error + 1e-3 * float(exact.max())
        assert bool(((smooth.density - exact).abs() <= allowed).all())


def test_error_bars_of_the_density_are_honest() -> None:
    A = counted(INDEFINITE)
    ratio = []
    for seed in range(60):
        found = spectral_density(A, steps=12, vectors=8, width=0.5, seed=seed)
        at = [int((found.grid - x).abs().argmin()) for x in (-0.9, 0.0, 1.9)]
        ratio.append(((found.density - bells(INDEFINITE, found)) / found.error)[at])
    spread = torch.stack(ratio).square().mean(0).sqrt()
    assert bool(((spread > 0.65) & (spread < 1.35)).all())


def test_nodes_are_seen_inside_of_the_spectrum_and_weights_are_shares() -> None:
    values = SPECTRA["outliers"]
    found = spectral_density(counted(values), steps=20, vectors=8)
    ones = torch.ones(8, dtype=torch.float64)
    torch.testing.assert_close(found.weights.sum(1), ones, **ROUNDING[torch.float64])
    assert bool((found.weights >= 0).all())
    assert bool((found.nodes[:, 1:] >= found.nodes[:, :-1]).all())
    assert float(values.min()) - 1e-10 <= found.lower == float(found.nodes.min())
    assert float(values.max()) + 1e-10 >= found.upper == float(found.nodes.max())
    # The ends stand out sharply: every vector has found the five outliers.
    torch.testing.assert_close(found.nodes[:, -5:].flip(1), values[:5].expand(8, 5), rtol=1e-8, atol=0)


def test_each_row_is_a_gauss_rule() -> None:
    # m nodes integrate every polynomial of degree 2 m - 1 as the vector itself does: z' A^p z / n for signs z.
    A = counted(INDEFINITE)
    found = spectral_density(A, steps=4, vectors=3, seed=5)
    bits = torch.randint(2, (N, 3), generator=torch.Generator().manual_seed(5))
    z = (2 * bits - 1).double()
    y = z
    for power in range(8):
        moments = (found.weights * found.nodes**power).sum(1)
        torch.testing.assert_close(moments, (z * y).sum(0) / N, **ALGEBRA)
        y = A.matrix @ y


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_small_operator_is_multiplied_out(dtype: torch.dtype) -> None:
    A = counted(INDEFINITE, dtype)
    found = spectral_density(A, steps=50, vectors=4)
    assert found.products == A.columns == N
    torch.testing.assert_close(found.nodes, torch.linalg.eigvalsh(A.matrix.double())[None], rtol=0, atol=1e-6)
    torch.testing.assert_close(found.weights, torch.full((1, N), 1 / N, dtype=torch.float64), **ALGEBRA)
    torch.testing.assert_close(found.density, bells(found.nodes[0], found), **ALGEBRA)
    assert float(found.error.abs().max()) == 0
    assert found.width == pytest.approx((found.upper - found.lower) / 50)
    assert abs(integral(found) - 1) < 1e-6


@pytest.mark.parametrize("value", [0.0, 1.0, -1e-9])
def test_one_value_n_times_has_a_bell_of_its_own(value: float) -> None:
    found = spectral_density(counted(torch.full((N,), value, dtype=torch.float64)), steps=3, vectors=2)
    assert found.width > 0
    assert abs(integral(found) - 1) < 1e-6
    # Rounding gives the exhausted runs further nodes, of no weight.
    torch.testing.assert_close((found.nodes * found.weights).sum(1), torch.full((2,), value).double(), **ALGEBRA)


def test_another_width_costs_no_product() -> None:
    A = counted(INDEFINITE)
    found = spectral_density(A, steps=20, vectors=8)
    wide = found.smoothed(0.7)
    assert A.columns == 160
    assert wide.width == 0.7
    assert torch.equal(wide.nodes, found.nodes)
    assert abs(integral(wide) - 1) < 1e-6
    asked = spectral_density(A, steps=20, vectors=8, width=0.7)
    assert torch.equal(asked.density, wide.density)


def test_seeds_are_reproducible_and_the_global_state_untouched() -> None:
    A = counted(INDEFINITE)
    before = torch.get_rng_state()
    densities = [spectral_density(A, steps=5, vectors=2, seed=seed).nodes for seed in (1, 1, 2)]
    logs = [logdet(A, 1.5, max_products=100, seed=seed).value for seed in (1, 1, 2)]
    assert torch.equal(before, torch.get_rng_state())
    for first, again, other in (densities, logs):
        assert torch.equal(first, again)
        assert not torch.equal(first, other)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("options", [{}, {"steps": 5, "vectors": 2}])
def test_a_product_that_is_not_finite_is_said(options: dict[str, int], bad: float) -> None:
    matrix = torch.eye(100)
    matrix[1, 1] = bad
    A = LinearOperator.of(matrix, symmetric=True)
    with pytest.raises(torch.linalg.LinAlgError, match="not finite"):
        spectral_density(A, **options)
    with pytest.raises(torch.linalg.LinAlgError, match="not finite"):
        logdet(A, 1.0, max_products=99 if options else 1000)


def test_what_the_density_cannot_be_asked() -> None:
    A = counted(INDEFINITE)
    with pytest.raises(TypeError, match="symmetric=True"):
        spectral_density(LinearOperator.of(torch.tensor([[1.0, 2.0], [0.0, 1.0]])))
    with pytest.raises(ValueError, match="steps=1"):
        spectral_density(A, steps=1)
    with pytest.raises(ValueError, match="vectors=1"):
        spectral_density(A, vectors=1)
    for width in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match=f"width must be positive; got {width}"):
            spectral_density(A, width=width)
    with pytest.raises(ValueError, match="widen them"):
        spectral_density(A, width=1e-9)


# -- rounding, and the memory of the bases ----------------------------------------------------------------------------


def test_the_radau_rule_has_a_node_at_zero_and_one_more_moment() -> None:
    A = counted(SPECTRA["decay"], psd=True)
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


@pytest.mark.parametrize("n", [60, 240])
def test_the_value_itself_is_taken_where_it_costs_less(n: int) -> None:
    values = torch.linspace(0.5, 1.5, n)
    A = counted(values, psd=True)
    found = logdet(A, 0.0, rtol=1e-6)
    assert float(found.value) == pytest.approx(float(values.double().log().sum()), rel=1e-9)
    assert (found.converged, found.method) == (True, "exact")
    assert float(found.error) <= 1e-12 * n
    assert found.products == A.columns <= 2 * n + 200


def test_memory_is_shared_out_in_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = spectral_density(counted(SPECTRA["decay"]), steps=10, vectors=6)
    monkeypatch.setattr("hesse.linalg.quadrature.GROUP", 2 * N * 11)
    A = counted(SPECTRA["decay"])
    parts = spectral_density(A, steps=10, vectors=6)
    assert A.calls == 30  # three groups of two vectors
    assert parts.nodes.shape == whole.nodes.shape == (6, 10)
    torch.testing.assert_close(parts.weights.sum(1), torch.ones(6, dtype=torch.float64))
