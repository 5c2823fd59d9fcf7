"""Trace, diagonal and Frobenius norm against the dense ones, and error bars that are as wide as they should be."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from hesse.linalg import Estimate, LinearOperator, diagonal, frobenius, trace
from hesse.linalg.sampling import LeaveOneOut, Probes, diagonals, student, traces
from spectra import SPECTRA, Counted, counted, symmetric

DTYPES = [torch.float64, torch.float32]
METHODS: dict[str, Callable[..., Estimate]] = {
    "hutchinson": partial(trace, method="hutchinson"),
    "hutch++": partial(trace, method="hutch++"),
    "xtrace": partial(trace, method="xtrace"),
    "trace": trace,
    "bekas": partial(diagonal, method="bekas"),
    "low-rank": partial(diagonal, method="low-rank"),
    "diagonal": diagonal,
    "frobenius": frobenius,
}
TRUTH: dict[str, Callable[[Tensor], Tensor]] = {
    **dict.fromkeys(["hutchinson", "hutch++", "xtrace", "trace"], torch.trace),
    **dict.fromkeys(["bekas", "low-rank", "diagonal"], torch.diagonal),
    "frobenius": torch.linalg.matrix_norm,
}


def size(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["network", "zipf", "identity", "zero", "both ends"])
def test_every_method_on_every_spectrum(name: str, method: str, dtype: torch.dtype) -> None:
    A = counted(SPECTRA[name], dtype)
    truth = TRUTH[method](A.matrix.double())
    found = METHODS[method](A, rtol=0.1, max_products=200)
    assert found.products == A.columns <= 200
    assert found.value.dtype == found.error.dtype == torch.float64
    assert found.value.shape == found.error.shape == truth.shape
    # Five standard errors: of 80 cases, and one number each, none is beyond by bad luck.
    rounding = 1e3 * torch.finfo(dtype).eps * float(A.matrix.double().norm())
    assert size(found.value - truth) <= 5 * size(found.error) + rounding
    assert found.converged == (size(found.error) <= 0.1 * size(found.value))


@pytest.mark.parametrize("method", METHODS)
def test_so_small_an_operator_is_exact(method: str) -> None:
    matrix = torch.arange(400, dtype=torch.float64).reshape(20, 20)  # and not symmetric
    found = METHODS[method](Counted(matrix, symmetric=False))
    torch.testing.assert_close(found.value, TRUTH[method](matrix), rtol=1e-14, atol=0)
    assert torch.equal(found.error, torch.zeros_like(found.value))
    assert (found.products, found.converged, found.method) == (20, True, "exact")


@pytest.mark.parametrize("method", METHODS)
def test_the_value_itself_is_taken_where_an_estimate_would_cost_more(method: str) -> None:
    A = counted(SPECTRA["both ends"])
    found = METHODS[method](A, rtol=1e-6, max_products=500)
    torch.testing.assert_close(found.value, TRUTH[method](A.matrix), rtol=1e-9, atol=1e-12)
    assert found.converged
    assert found.products == A.columns <= 2 * 240
    assert size(found.error) == 0 or size(found.error) <= 1e-6 * size(found.value)


@pytest.mark.parametrize("method", METHODS)
def test_an_operator_that_is_not_symmetric(method: str) -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(150, 150, generator=generator, dtype=torch.float64) / 12 + torch.eye(150, dtype=torch.float64)
    found = METHODS[method](Counted(matrix, symmetric=False), rtol=0.02, max_products=100)
    assert size(found.value - TRUTH[method](matrix)) <= 4 * size(found.error)


@pytest.mark.parametrize("rtol", [0.05, 1e-9], ids=["stopped early", "all products spent"])
@pytest.mark.parametrize("method", ["hutchinson", "hutch++", "xtrace", "trace", "frobenius"])
@pytest.mark.parametrize("name", ["network", "zipf"])
def test_two_standard_errors_hold_the_truth_as_often_as_they_should(name: str, method: str, rtol: float) -> None:
    A = counted(SPECTRA[name])
    truth = TRUTH[method](A.matrix)
    found = [METHODS[method](A, rtol=rtol, max_products=60, seed=seed) for seed in range(150)]
    inside = sum(float((e.value - truth).abs()) <= 2 * float(e.error) for e in found) / len(found)
    # 95 in 100; stopping at the first error that is small enough costs a few of them, leave-one-out gives some more.
    assert inside >= 0.87
    # And the bars are no wider than needed: an error has the size of the typical deviation.
    deviation = math.sqrt(sum(float(e.value - truth) ** 2 for e in found) / len(found))
    claimed = math.sqrt(sum(float(e.error) ** 2 for e in found) / len(found))
    assert 0.7 * deviation <= claimed <= 2 * deviation


@pytest.mark.parametrize("method", ["bekas", "low-rank", "diagonal"])
def test_the_error_bars_of_a_diagonal_hold_entry_by_entry(method: str) -> None:
    A = counted(SPECTRA["network"])
    truth = A.matrix.diagonal()
    found = [METHODS[method](A, rtol=1e-9, max_products=60, seed=seed) for seed in range(10)]
    inside = torch.stack([((e.value - truth).abs() <= 2 * e.error).double() for e in found])
    assert 0.93 <= float(inside.mean()) <= 1


@pytest.mark.parametrize(("samples", "truth"), [(traces, torch.trace), (diagonals, torch.diagonal)])
def test_leave_one_out_is_the_plain_definition(
    samples: Callable[[LeaveOneOut], Tensor], truth: Callable[[Tensor], Tensor]
) -> None:
    # Each vector left out in turn, with a QR factorisation of the others: slow, and what the paper writes first.
    A = Counted(torch.randn(40, 40, generator=torch.Generator().manual_seed(1), dtype=torch.float64), symmetric=False)
    probes = Probes(A, 0)
    sampler = LeaveOneOut(probes, samples)
    for _ in range(3):  # by blocks, as it grows in use
        sampler.draw(4)
    assert probes.products == A.columns == 24
    M, z = A.matrix, sampler.z
    for i, found in enumerate(samples(sampler).unbind(-1)):
        others = torch.cat([z[:, :i], z[:, i + 1 :]], dim=1)
        Q = torch.linalg.qr(M @ others).Q
        P = Q @ Q.T
        if samples is traces:
            y = z[:, i] - P @ z[:, i]
            expected = torch.trace(Q.T @ M @ Q) + y @ M @ y
        else:
            expected = torch.diagonal(M @ P) + z[:, i] * (M @ (z[:, i] - P @ z[:, i]))
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    # The mean over many draws is the truth: no sample is biased.
    many = []
    for seed in range(400):
        sampler = LeaveOneOut(Probes(A, seed), samples)
        sampler.draw(4)
        many.append(samples(sampler).mean(-1))
    mean, spread = torch.stack(many).mean(0), torch.stack(many).std(0) / 20
    assert bool(((mean - truth(M)).abs() <= 5 * spread).all())


@pytest.mark.parametrize("method", ["xtrace", "hutch++", "low-rank"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_low_rank_is_found_to_be_exact(method: str, dtype: torch.dtype) -> None:
    values = torch.cat([torch.tensor([5.0, 3, -1]), torch.zeros(197)])
    A = counted(values, dtype)
    found = METHODS[method](A)
    truth = TRUTH[method](A.matrix.double())
    assert found.products <= 30
    assert found.converged
    assert size(found.error) <= 1e2 * torch.finfo(dtype).eps * 7
    assert size(found.value - truth) <= 1e2 * torch.finfo(dtype).eps * 7


def test_dominated_spectra_need_far_fewer_products_than_averaging() -> None:
    def spent(method: str) -> int:
        A = Counted(symmetric(SPECTRA["network"]))
        found = METHODS[method](A, rtol=0.02, max_products=239)
        return found.products if found.converged else 10**6

    assert spent("xtrace") <= 60
    assert spent("hutch++") <= 80
    assert spent("hutchinson") == 10**6


@pytest.mark.parametrize(
    ("function", "name", "expected"),
    [
        (trace, "network", "xtrace"),
        (trace, "identity", "hutchinson"),
        (diagonal, "network", "low-rank"),
        (diagonal, "identity", "bekas"),
    ],
)
def test_auto_chooses_by_the_spectrum_and_says_why(function: Callable[..., Estimate], name: str, expected: str) -> None:
    found = function(counted(SPECTRA[name]), rtol=0.02, max_products=200)
    assert found.method == expected
    assert found.reason
    assert function(counted(SPECTRA[name]), method=expected, rtol=0.02, max_products=200).reason == ""


def test_hutchinson_is_exact_for_a_diagonal_matrix() -> None:
    matrix = torch.diag(torch.linspace(1, 3, 100, dtype=torch.float64))
    for method in ("hutchinson", "trace", "bekas", "diagonal"):
        found = METHODS[method](Counted(matrix))
        torch.testing.assert_close(found.value, TRUTH[method](matrix), rtol=1e-13, atol=0)
        assert found.converged
        assert found.products == 10


def test_the_frobenius_error_is_that_of_the_delta_method() -> None:
    A = counted(SPECTRA["zipf"])
    found = frobenius(A, max_products=40, rtol=1e-9)
    probes = Probes(A, 0)
    squares = torch.cat([probes.product(probes.signs(k)).square().sum(0) for k in (10, 10, 16, 4)])
    assert float(found.value) == pytest.approx(math.sqrt(float(squares.mean())), rel=1e-12)
    error = student(40) * float(squares.std()) / math.sqrt(40)
    assert float(found.error) == pytest.approx(error / (2 * float(found.value)), rel=1e-12)


def test_students_factor() -> None:
    # The 97.5 percent points of Student's distribution, over that of the normal one.
    for count, point in ((6, 2.5706), (10, 2.2622), (20, 2.0930), (100, 1.9842)):
        assert student(count) == pytest.approx(point / 1.95996, rel=3e-3)


def test_seeds_are_reproducible_and_the_global_state_untouched() -> None:
    A = counted(SPECTRA["zipf"])
    before = torch.get_rng_state()
    for method in METHODS.values():
        first, again, other = (method(A, seed=seed, max_products=50) for seed in (1, 1, 2))
        assert torch.equal(first.value, again.value)
        assert not torch.equal(first.value, other.value)
    assert torch.equal(before, torch.get_rng_state())


def test_columns_come_in_blocks() -> None:
    A = counted(SPECTRA["zipf"])
    trace(A, rtol=1e-9, max_products=96, method="hutchinson")
    assert A.columns == 96
    assert A.calls <= 10
    A = counted(torch.ones(30))
    trace(A)
    assert A.calls == 2


@pytest.mark.parametrize("n", [20, 100])
@pytest.mark.parametrize("method", METHODS)
def test_a_product_that_is_not_finite_is_said(method: str, n: int) -> None:
    matrix = torch.eye(n)
    matrix[3, 3] = math.nan
    with pytest.raises(torch.linalg.LinAlgError, match="not finite"):
        METHODS[method](Counted(matrix))


def test_what_cannot_be_asked() -> None:
    A = counted(SPECTRA["zipf"])
    with pytest.raises(ValueError, match=r"'auto', 'hutchinson', 'xtrace', 'hutch\+\+'; got 'xdiag'"):
        trace(A, method="xdiag")
    with pytest.raises(ValueError, match="'auto', 'bekas', 'low-rank'; got 'hutchinson'"):
        diagonal(A, method="hutchinson")
    for method in METHODS.values():
        with pytest.raises(ValueError, match="max_products=5"):
            method(A, max_products=5)
        assert method(A, max_products=6).products <= 6
    assert isinstance(float(trace(LinearOperator.of(torch.eye(3)))), float)
