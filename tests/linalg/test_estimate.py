"""Trace, diagonal and Frobenius norm against the dense matrix: the value, its error bar, and the products it took."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hesse.linalg import Estimate, LinearOperator, diagonal, frobenius, trace
from hesse.linalg.sampling import LeaveOneOut, Probes, diagonals, student, traces
from spectra import Counted, symmetric
from tolerances import ALGEBRA, ROUNDING, STANDARD_ERRORS

N = 160
TOP = torch.tensor([20.0, 12, 9, 7, 5])
LOW_RANK = torch.cat([torch.tensor([3.0, 2, 1, -0.5]), torch.zeros(N - 4)])

Estimator = Callable[..., Estimate]


def lopsided() -> Tensor:
    """A matrix that is not symmetric, with a trace that is not small."""
    generator = torch.Generator().manual_seed(5)
    return torch.eye(N, dtype=torch.float64) + 0.1 * torch.randn(N, N, generator=generator, dtype=torch.float64)


MATRICES: dict[str, Tensor] = {
    "flat": symmetric(torch.linspace(0.5, 1.5, N)),
    "decay": symmetric(1 / (1 + torch.arange(N, dtype=torch.float64))),
    "outliers": symmetric(torch.cat([TOP, torch.linspace(0, 0.3, N - 5)])),
    "indefinite": symmetric(torch.linspace(-1, 2, N)),
    "low rank": symmetric(LOW_RANK),
    "not symmetric": lopsided(),
    "identity": torch.eye(N, dtype=torch.float64),
    "zero": torch.zeros(N, N, dtype=torch.float64),
}

# What is estimated, by which method: the function with its options.
METHODS: dict[str, tuple[Estimator, dict[str, str]]] = {
    **{f"trace, {name}": (trace, {"method": name}) for name in ("hutchinson", "xtrace", "hutch++", "auto")},
    **{f"diagonal, {name}": (diagonal, {"method": name}) for name in ("bekas", "low-rank", "auto")},
    "frobenius": (frobenius, {}),
}


def truth(estimator: Estimator, matrix: Tensor) -> Tensor:
    matrix = matrix.double()
    return matrix.trace() if estimator is trace else matrix.diagonal() if estimator is diagonal else matrix.norm()


def operator(name: str, dtype: torch.dtype = torch.float64) -> Counted:
    return Counted(MATRICES[name].to(dtype), symmetric=name != "not symmetric")


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", MATRICES)
def test_the_value_is_that_of_the_dense_matrix(name: str, method: str, dtype: torch.dtype) -> None:
    A = operator(name, dtype)
    estimator, options = METHODS[method]
    found = estimator(A, max_products=100, **options)
    expected = truth(estimator, A.matrix)
    assert found.value.dtype == found.error.dtype == torch.float64
    assert found.value.shape == found.error.shape == expected.shape
    assert found.products == A.columns <= 100
    # The rounding is that of the terms summed, which may cancel: all eigenvalues count with their size.
    size = float(torch.linalg.svdvals(A.matrix.double()).sum()) if estimator is trace else float(A.matrix.norm())
    rounding = ROUNDING[dtype]["rtol"] * size
    # Of a vector, the length of the error; its entries' own are judged below, over many seeds.
    assert float((found.value - expected).norm()) <= STANDARD_ERRORS * float(found.error.norm()) + rounding
    assert found.converged == (float(found.error.norm()) <= 0.05 * float(found.value.norm()))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["flat", "decay", "outliers", "indefinite", "not symmetric"])
def test_error_bars_are_honest(name: str, method: str) -> None:
    # In units of the standard error the deviations have a root mean square of one (over sixty seeds 0.7 to 1.25 for
    # these), and are below two 95 times in 100. Error bars wrong by two either way leave the interval.
    A = operator(name)
    estimator, options = METHODS[method]
    expected = truth(estimator, A.matrix)
    deviations = []
    for seed in range(60):
        found = estimator(A, rtol=1e-9, max_products=60, seed=seed, **options)
        assert found.method != "exact"
        deviations.append((found.value - expected).norm() / found.error.norm())
    ratio = torch.stack(deviations)
    assert 0.65 < float(ratio.square().mean().sqrt()) < 1.35
    assert float((ratio <= 2).double().mean()) >= 0.85


@pytest.mark.parametrize("method", ["bekas", "low-rank"])
def test_each_entry_of_the_diagonal_has_its_own_error(method: str) -> None:
    # Rows of very different size: an error common to all of them would be wrong for most.
    scale = torch.logspace(-2, 1, N, dtype=torch.float64)
    A = LinearOperator.of(scale[:, None] * MATRICES["flat"] * scale)
    ratio = []
    for seed in range(60):
        found = diagonal(A, method=method, rtol=1e-9, max_products=60, seed=seed)
        ratio.append((found.value - truth(diagonal, scale[:, None] * MATRICES["flat"] * scale)) / found.error)
    spread = torch.stack(ratio).square().mean(0).sqrt()
    # The mean over the tenths of the rows, from the smallest to the largest.
    assert all(0.6 < float(part) < 1.4 for part in spread.reshape(10, -1).mean(1))


@pytest.mark.parametrize("method", METHODS)
def test_n_products_give_the_value_itself(method: str) -> None:
    estimator, options = METHODS[method]
    for matrix in (MATRICES["outliers"][:40, :40], MATRICES["not symmetric"][:40, :40]):
        A = Counted(matrix, symmetric=torch.equal(matrix, matrix.mT))
        found = estimator(A, rtol=0.0, **options)
        assert (found.method, found.products, found.converged) == ("exact", 40, True)
        assert A.columns == 40
        assert float(found.error.norm()) == 0
        torch.testing.assert_close(found.value, truth(estimator, matrix), **ALGEBRA)


@pytest.mark.parametrize("method", METHODS)
def test_an_estimate_dearer_than_the_value_is_dropped_for_it(method: str) -> None:
    A = operator("indefinite")
    estimator, options = METHODS[method]
    found = estimator(A, rtol=1e-4, max_products=300, **options)
    assert (found.method, found.converged) == ("exact", True)
    assert found.reason
    assert N < found.products == A.columns <= 300
    assert float(found.error.norm()) == 0
    torch.testing.assert_close(found.value, truth(estimator, A.matrix), **ALGEBRA)


@pytest.mark.parametrize("method", ["trace, xtrace", "trace, hutch++", "trace, auto", "diagonal, low-rank"])
def test_a_range_that_is_spanned_is_taken_exactly(method: str) -> None:
    A = operator("low rank")
    estimator, options = METHODS[method]
    found = estimator(A, rtol=1e-6, max_products=100, **options)
    assert found.converged
    assert found.products == A.columns <= 30
    torch.testing.assert_close(found.value, truth(estimator, A.matrix), **ALGEBRA)


def test_a_diagonal_matrix_takes_ten_products() -> None:
    # z * D z is D's diagonal for any signs z: no sample differs from the other.
    D = torch.linspace(-1, 3, N, dtype=torch.float64)
    for estimator in (trace, diagonal):
        A = Counted(torch.diag(D))
        found = estimator(A)
        assert (found.products, found.converged, A.columns) == (10, True, 10)
        torch.testing.assert_close(found.value, D if estimator is diagonal else D.sum(), **ALGEBRA)


def test_auto_spans_a_range_where_few_eigenvalues_dominate_and_averages_elsewhere() -> None:
    steep = symmetric(10 * 0.8 ** torch.arange(N, dtype=torch.float64))
    for estimator, spanning, averaging in ((trace, "xtrace", "hutchinson"), (diagonal, "low-rank", "bekas")):
        found = estimator(Counted(steep), rtol=0.01, max_products=150)
        assert (found.method, found.converged) == (spanning, True)
        assert spanning in found.reason
        assert estimator(operator("indefinite"), rtol=0.01, max_products=150).method == averaging


@pytest.mark.parametrize("method", METHODS)
def test_it_draws_until_the_error_is_as_small_as_asked_for(method: str) -> None:
    estimator, options = METHODS[method]
    spent = []
    spanning = method in ("trace, xtrace", "trace, hutch++")  # dear on a flat spectrum
    for rtol in (0.5, {trace: 0.012 if spanning else 0.006, diagonal: 0.1, frobenius: 0.006}[estimator]):
        A = operator("flat")
        found = estimator(A, rtol=rtol, max_products=150, **options)
        assert found.method != "exact"
        assert found.converged
        assert float(found.error.norm()) <= rtol * float(found.value.norm())
        assert found.products == A.columns <= 150
        spent.append(found.products)
    assert spent[0] <= 30  # the first ten samples, at three products each for hutch++
    assert spent[0] < spent[1]


@pytest.mark.parametrize("most", [6, 7, 20, 61])
@pytest.mark.parametrize("method", METHODS)
def test_the_most_products_are_an_answer_and_say_so(method: str, most: int) -> None:
    A = operator("not symmetric")
    estimator, options = METHODS[method]
    found = estimator(A, rtol=1e-9, max_products=most, **options)
    assert not found.converged
    assert most - 3 < found.products == A.columns <= most  # a sample of hutch++ takes three
    assert float(found.error.norm()) > 0


@pytest.mark.parametrize("method", METHODS)
def test_seeds_are_reproducible_and_the_global_state_untouched(method: str) -> None:
    A = operator("decay")
    estimator, options = METHODS[method]
    before = torch.get_rng_state()
    first, again, other = (estimator(A, seed=seed, max_products=40, **options) for seed in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first.value, again.value)
    assert torch.equal(first.error, again.error)
    assert not torch.equal(first.value, other.value)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("n", [10, 100])
@pytest.mark.parametrize("method", METHODS)
def test_a_product_that_is_not_finite_is_said(method: str, n: int, bad: float) -> None:
    matrix = torch.eye(n)
    matrix[1, 1] = bad
    estimator, options = METHODS[method]
    with pytest.raises(torch.linalg.LinAlgError, match="not finite"):
        estimator(LinearOperator.of(matrix, symmetric=True), **options)


def test_the_methods_of_an_operator_are_these() -> None:
    A = operator("decay")
    assert torch.equal(A.trace(seed=3).value, trace(A, seed=3).value)
    assert torch.equal(A.diagonal(seed=3).value, diagonal(A, seed=3).value)
    assert torch.equal(A.frobenius(seed=3).value, frobenius(A, seed=3).value)


def test_what_cannot_be_asked() -> None:
    A = operator("decay")
    with pytest.raises(ValueError, match="'hutchinson', 'xtrace', 'hutch\\+\\+'; got 'bekas'"):
        trace(A, method="bekas")
    with pytest.raises(ValueError, match="'bekas', 'low-rank'; got 'xtrace'"):
        diagonal(A, method="xtrace")
    for estimator in (trace, diagonal, frobenius):
        with pytest.raises(ValueError, match="max_products=5"):
            estimator(A, max_products=5)
    assert A.columns == 0


# -- the formulas ------------------------------------------------------------------------------------------------


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


def test_the_frobenius_error_is_that_of_the_delta_method() -> None:
    A = operator("decay")
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


def test_columns_come_in_blocks() -> None:
    A = operator("decay")
    trace(A, rtol=1e-9, max_products=96, method="hutchinson")
    assert A.columns == 96
    assert A.calls <= 10
    A = Counted(torch.eye(30))
    trace(A)
    assert A.calls == 2


def test_dominated_spectra_need_far_fewer_products_than_averaging() -> None:
    def spent(method: str) -> int:
        found = trace(operator("outliers"), method=method, rtol=0.01, max_products=N - 1)
        return found.products if found.converged else 10**6

    assert spent("xtrace") <= 60
    assert spent("hutch++") <= 80
    assert spent("hutchinson") == 10**6
