"""Eigenbases and inverse roots: right where eigh is, followed where they move, and kept where nothing can be found."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hesse.linalg import eigenbasis, inverse_root, off_diagonal
from hesse.linalg.roots import SHIFT
from tolerances import ALGEBRA, ROUNDING


def factors(count: int, n: int, rank: int | None = None, seed: int = 0) -> Tensor:
    """Semidefinite matrices [count, n, n] in float64, eigenvalues about one and, up to the rank, apart."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, n, rank or n, generator=generator, dtype=torch.float64)
    return x @ torch.linspace(1, 3, rank or n, dtype=torch.float64).diag() @ x.mT / n


def orthonormal(Q: Tensor) -> Tensor:
    return (Q.mT @ Q - torch.eye(Q.shape[-1], dtype=Q.dtype)).abs().amax((-2, -1))


def test_off_diagonal_is_the_share_of_the_norm() -> None:
    A = factors(3, 5)
    expected = [float((a - a.diagonal().diag()).norm() / a.norm()) for a in A]
    torch.testing.assert_close(off_diagonal(A), torch.tensor(expected, dtype=A.dtype), **ALGEBRA)
    assert off_diagonal(torch.zeros(4, 4)) == 0
    assert off_diagonal(torch.eye(4)) == 0


@pytest.mark.parametrize("n", [1, 2, 7])
def test_a_basis_diagonalises_values_descending(n: int) -> None:
    A = factors(4, n)
    Q = eigenbasis(A)
    values = torch.linalg.eigvalsh(A).flip(-1)
    torch.testing.assert_close(Q.mT @ A @ Q, torch.diag_embed(values), **ALGEBRA)
    assert orthonormal(Q).max() < 1e-12


def test_only_the_symmetric_part_counts() -> None:
    A = factors(1, 4)[0]
    skew = torch.randn(4, 4, dtype=torch.float64)
    torch.testing.assert_close(eigenbasis(A + skew - skew.mT).abs(), eigenbasis(A).abs(), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1e15])
def test_a_scale_does_not_matter(scale: float) -> None:
    A = factors(3, 6).float()
    Q = eigenbasis(A * scale)
    assert off_diagonal(Q.mT @ A @ Q).max() < 1e-5  # float32


def test_a_step_from_a_guess_is_a_qr_step_of_its_sorted_columns() -> None:
    A, guess = factors(3, 6), eigenbasis(factors(3, 6, seed=1))
    found = eigenbasis(A, guess)
    for one, columns, step in zip(A, guess, found, strict=True):
        quotients = torch.tensor([float(q @ one @ q) for q in columns.T])
        ordered = columns[:, quotients.argsort(descending=True)]
        shifted = one + SHIFT * one.diagonal().mean() * torch.eye(6).double()
        torch.testing.assert_close(step.abs(), torch.linalg.qr(shifted @ ordered)[0].abs(), rtol=1e-10, atol=1e-10)
        assert ((step * ordered).sum(0) >= 0).all()
    assert orthonormal(found).max() < 1e-12


def test_steps_from_a_guess_reach_the_eigenbasis() -> None:
    A = factors(2, 6)
    Q = torch.eye(6, dtype=torch.float64).expand(2, 6, 6)
    shares = []
    for _ in range(60):
        Q = eigenbasis(A, Q)
        shares.append(float(off_diagonal(Q.mT @ A @ Q).max()))
    assert shares[-1] < 1e-3 < shares[0]  # linear, at the ratio of neighbouring eigenvalues


def test_a_basis_that_is_right_stays() -> None:
    A = factors(3, 6)
    Q = eigenbasis(A)
    torch.testing.assert_close(eigenbasis(A, Q), Q, rtol=1e-9, atol=1e-9)


def test_columns_in_the_wrong_order_are_exchanged() -> None:
    A = torch.diag(torch.tensor([1.0, 3.0, 2.0]))
    torch.testing.assert_close(eigenbasis(A, torch.eye(3)), torch.eye(3)[:, [1, 2, 0]], **ROUNDING[torch.float32])


def test_a_null_space_stays_where_it_is() -> None:
    """Without the shift Householder reflections would complete the basis anyhow."""
    A = torch.diag(torch.tensor([4.0, 1.0, 0.0, 0.0, 0.0], dtype=torch.float64))
    eye = torch.eye(5, dtype=torch.float64)
    torch.testing.assert_close(eigenbasis(A, eye), eye, **ALGEBRA)
    torch.testing.assert_close(eigenbasis(torch.zeros(5, 5).double(), eye), eye, **ALGEBRA)


@pytest.mark.parametrize("rank", [1, 3])
def test_low_rank_is_no_trouble(rank: int) -> None:
    A = factors(3, 6, rank).float()
    for Q in (eigenbasis(A), eigenbasis(A, eigenbasis(factors(3, 6, seed=1).float()))):
        assert orthonormal(Q).max() < 1e-5
        assert Q.isfinite().all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_matrix_that_is_not_finite_keeps_its_guess_and_harms_no_other(bad: float) -> None:
    A, guess = factors(3, 4), eigenbasis(factors(3, 4, seed=1))
    broken = A.clone()
    broken[1, 2, 3] = bad
    torch.testing.assert_close(eigenbasis(broken, guess)[[0, 2]], eigenbasis(A, guess)[[0, 2]])
    assert torch.equal(eigenbasis(broken, guess)[1], guess[1])
    assert torch.equal(eigenbasis(broken)[1], torch.eye(4, dtype=torch.float64))
    torch.testing.assert_close(eigenbasis(broken)[[0, 2]], eigenbasis(A)[[0, 2]])


def test_where_float32_does_not_converge_float64_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    A, eigh, seen = factors(2, 4).float(), torch.linalg.eigh, []

    def only_double(x: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(x.dtype)
        if x.dtype == torch.float32:
            raise torch.linalg.LinAlgError("did not converge")
        return eigh(x)

    monkeypatch.setattr(torch.linalg, "eigh", only_double)
    Q = eigenbasis(A)
    assert seen == [torch.float32, torch.float64]
    assert Q.dtype == torch.float32
    assert off_diagonal(Q.mT @ A @ Q).max() < 1e-5


def test_one_that_never_converges_keeps_its_basis_and_harms_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    A, eigh = factors(3, 4), torch.linalg.eigh
    expected, trouble = eigenbasis(A), A[1] / A[1].diagonal().mean()

    def fails(x: Tensor) -> tuple[Tensor, Tensor]:
        if any(torch.allclose(one, trouble) for one in x.reshape(-1, 4, 4)):
            raise torch.linalg.LinAlgError("did not converge")
        return eigh(x)

    monkeypatch.setattr(torch.linalg, "eigh", fails)
    found = eigenbasis(A)
    assert torch.equal(found[1], torch.eye(4, dtype=torch.float64))
    torch.testing.assert_close(found[[0, 2]], expected[[0, 2]])


def test_half_precision_is_computed_in_float32() -> None:
    A = factors(2, 4).bfloat16()
    Q = eigenbasis(A)
    assert Q.dtype == torch.float32
    assert off_diagonal(Q.mT @ A.float() @ Q).max() < 1e-5
    assert inverse_root(A, 4, 1e-3).dtype == torch.float32


@pytest.mark.parametrize("p", [1, 2, 4])
def test_a_root_undoes_its_matrix(p: int) -> None:
    A = factors(3, 5)
    mean = A.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    damped = A + 0.1 * mean * torch.eye(5, dtype=A.dtype)
    power = torch.linalg.matrix_power(inverse_root(A, p, 0.1), p)
    torch.testing.assert_close(power @ damped, torch.eye(5, dtype=A.dtype).expand(3, 5, 5), rtol=1e-9, atol=1e-9)


def test_a_root_of_nothing_is_the_identity() -> None:
    for A in (torch.zeros(3, 3), torch.full((3, 3), torch.nan)):
        torch.testing.assert_close(inverse_root(A, 4, 1e-6), torch.eye(3), **ROUNDING[torch.float32])
