"""Outermost eigenpairs against torch.linalg.eigh: values, order, bounds, and the products they may cost."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hesse.linalg import Eigenpairs, LinearOperator, eigsh
from hesse.linalg.lanczos import Lanczos, generator_of
from spectra import SPECTRA, Counted, counted, symmetric

DTYPES = [torch.float64, torch.float32]


def ends(eigenvalues: Tensor, k: int, which: str) -> Tensor:
    """The values that eigsh promises, in its order."""
    down = eigenvalues.double().sort(descending=True).values
    if which == "LA":
        return down[:k]
    if which == "SA":
        return down.flip(0)[:k]
    if which == "LM":
        return down[down.abs().argsort(descending=True, stable=True)][:k]
    return torch.cat([down[: (k + 1) // 2], down[len(down) - k // 2 :]])


def check(A: Counted, found: Eigenpairs, expected: Tensor, rtol: float = 1e-3) -> None:
    """Converged, right, and every claim kept."""
    assert found.converged
    assert found.products == A.columns
    values, vectors = found.values.double(), found.vectors.double()
    rounding = 32 * torch.finfo(A.dtype).eps * float(A.matrix.double().norm())
    assert bool(((values - expected).abs() <= found.bounds.double()).all())
    assert bool((found.bounds.double() <= rtol * values.abs() + rounding).all())
    gram = vectors.T @ vectors
    torch.testing.assert_close(
        gram, torch.eye(len(gram), dtype=gram.dtype), rtol=0, atol=1e3 * torch.finfo(A.dtype).eps
    )
    # The residuals come from the recursion, at no product; these are computed.
    residuals = torch.linalg.vector_norm(A.matrix.double() @ vectors - vectors * values, dim=0)
    claimed = found.residuals.double()
    assert bool((residuals <= 1.001 * claimed + rounding).all())
    assert bool((claimed <= 1.001 * residuals + 0.5 * rtol * values.abs() + rounding).all())
    assert found.values.dtype == found.vectors.dtype == found.residuals.dtype == found.bounds.dtype == A.dtype


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("which", ["LA", "LM"])
@pytest.mark.parametrize("name", SPECTRA)
def test_the_largest_are_those_of_eigh(name: str, which: str, dtype: torch.dtype) -> None:
    A = counted(SPECTRA[name], dtype)
    check(A, eigsh(A, 5, which=which), ends(SPECTRA[name], 5, which))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("which", "k"), [("SA", 2), ("BE", 5), ("BE", 1), ("LM", 4)])
def test_the_lower_end_and_both(which: str, k: int, dtype: torch.dtype) -> None:
    A = counted(SPECTRA["both ends"], dtype)
    found = eigsh(A, k, which=which)
    check(A, found, ends(SPECTRA["both ends"], k, which))


def test_the_order_is_the_documented_one() -> None:
    A = counted(SPECTRA["both ends"])
    assert eigsh(A, 3, which="LA").values.round().tolist() == [8, 5, 3]
    assert eigsh(A, 2, which="SA").values.round().tolist() == [-6, -4]
    assert eigsh(A, 5, which="LM").values.round().tolist() == [8, -6, 5, -4, 3]
    assert eigsh(A, 5, which="BE").values.round().tolist() == [8, 5, 3, -4, -6]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["network", "network, psd", "zipf", "geometric"])
def test_five_of_a_networks_spectrum_cost_at_most_35_products(name: str, dtype: torch.dtype) -> None:
    spent = [eigsh(counted(SPECTRA[name], dtype), 5, seed=seed) for seed in range(10)]
    assert all(found.converged for found in spent)
    assert max(found.products for found in spent) <= 35


def test_no_seed_misses_a_copy_or_a_neighbour() -> None:
    # A search that trusts one Krylov space returns 9, 6, 4, 1, .. for the first, and skips one of ten for the second.
    for name in ("copies", "crowded"):
        for seed in range(30):
            found = eigsh(counted(SPECTRA[name]), 5, seed=seed)
            assert found.converged
            torch.testing.assert_close(found.values, ends(SPECTRA[name], 5, "LA"), rtol=1e-3, atol=0)


def test_a_tighter_tolerance_restarts_within_its_basis() -> None:
    values = torch.linspace(-1, 1, 240)
    A = counted(values)
    found = eigsh(A, 5, rtol=1e-8, basis=20, max_products=2000)
    check(A, found, ends(values, 5, "LA"), rtol=1e-8)


def test_the_basis_holds_no_more_vectors_than_allowed() -> None:
    A = counted(torch.linspace(-1, 1, 240))
    run = Lanczos(A, torch.ones(240, 1), 12, generator_of(A, 0))
    most = 0
    for _ in range(40):
        if run.full:
            theta, S, _ = run.ritz()
            run.restart(theta[:, -4:], S[:, :, -4:])
        run.step()
        most = max(most, run.basis.shape[1])
    assert most == 12


def test_known_eigenvectors_are_projected_out() -> None:
    values = SPECTRA["network"]
    A = counted(values)
    _, Q = torch.linalg.eigh(A.matrix)
    top = Q[:, -3:]
    mixed = top @ torch.tensor([[1.0, 0, 0], [2, 1, 0], [0, 3, 1]], dtype=torch.float64)  # any basis of them will do
    found = eigsh(A, 4, deflate=mixed)
    check(A, found, ends(values, 7, "LA")[3:])
    assert float((top.T @ found.vectors).abs().max()) < 1e-12


def test_a_small_operator_is_multiplied_out() -> None:
    values = torch.linspace(-3, 5, 20)
    for which in ("LA", "SA", "LM", "BE"):
        A = counted(values)
        found = eigsh(A, 7, which=which)
        assert found.products == 20
        check(A, found, ends(values, 7, which), rtol=1e-12)
    Q = torch.linalg.eigh(A.matrix).eigenvectors
    torch.testing.assert_close(eigsh(A, 18, deflate=Q[:, :2]).values, ends(values, 18, "LA"), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("k", [1, 2, 50])
def test_all_of_a_space_may_be_asked_for(k: int) -> None:
    values = torch.linspace(1, 2, 50)
    A = counted(values)
    check(A, eigsh(A, k), ends(values, k, "LA"))


def test_too_few_products_are_an_answer_and_say_so() -> None:
    A = counted(SPECTRA["network"])
    found = eigsh(A, 5, max_products=8)
    assert (found.converged, found.products, A.columns) == (False, 8, 8)
    expected = torch.linalg.eigvalsh(A.matrix)
    nearest = (found.values[:, None] - expected).abs().min(1).values
    assert bool((nearest <= found.residuals).all())  # holds always: an eigenvalue lies within the residual
    assert bool((found.bounds <= found.residuals + 1e-12).all())


def test_the_absolute_tolerance_is_for_values_near_zero() -> None:
    values = SPECTRA["network, psd"]
    loose = eigsh(counted(values, psd=True), 1, which="SA", atol=1e-2)
    tight = eigsh(counted(values, psd=True), 1, which="SA")
    assert loose.converged
    assert loose.products < 50 < tight.products
    assert abs(float(loose.values) - float(values.min())) <= float(loose.bounds) <= 1.1e-2


def test_seeds_are_reproducible_and_the_global_state_untouched() -> None:
    A = counted(SPECTRA["network"])
    before = torch.get_rng_state()
    first, again, other = (eigsh(A, 3, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first.vectors, again.vectors)
    assert not torch.equal(first.vectors, other.vectors)


def test_bfloat16_operators_are_searched_in_float32() -> None:
    matrix = symmetric(SPECTRA["network"]).bfloat16()
    found = eigsh(LinearOperator.of(matrix), 3, rtol=1e-2)
    assert found.values.dtype == torch.float32
    torch.testing.assert_close(
        found.values.double(), ends(torch.linalg.eigvalsh(matrix.double()), 3, "LA"), rtol=0.02, atol=0
    )


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("n", [10, 100])
def test_a_product_that_is_not_finite_is_said(n: int, bad: float) -> None:
    matrix = torch.eye(n)
    matrix[1, 1] = bad
    with pytest.raises(torch.linalg.LinAlgError, match="not finite"):
        eigsh(LinearOperator.of(matrix, symmetric=True), 2)


def test_what_cannot_be_asked() -> None:
    A = counted(SPECTRA["network"])
    with pytest.raises(TypeError, match="symmetric=True"):
        eigsh(LinearOperator.of(torch.tensor([[1.0, 2.0], [0.0, 1.0]])), 1)
    for k in (0, 241):
        with pytest.raises(ValueError, match=f"between 1 and the 240 .* got {k}"):
            eigsh(A, k)
    with pytest.raises(ValueError, match="got 'TOP'"):
        eigsh(A, 1, which="TOP")
    with pytest.raises(ValueError, match="k \\+ 3 = 8; got 6"):
        eigsh(A, 5, basis=6)
    with pytest.raises(ValueError, match="max_products=4"):
        eigsh(A, 5, max_products=4)
    with pytest.raises(ValueError, match="\\[240, j\\]"):
        eigsh(A, 1, deflate=torch.ones(7, 1))
    assert A.columns == 0
