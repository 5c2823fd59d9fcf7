"""Shampoo divides by roots of its factors: held against dense Kronecker roots, with each grafted length."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hesse.linalg import inverse_root
from hesse.optim import frames
from hesse.optim.shampoo import Shampoo
from tolerances import ALGEBRA

BETAS, EPS, BETA = (0.9, 0.99), 1e-8, 0.8

# Roots of factors whose eigenvalues are up to 1e4 apart, in float64.
ROOTS = {"rtol": 1e-7, "atol": 1e-9}


def gradients(m: int, n: int, steps: int = 10, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    left, right, mean = (torch.randn(*s, generator=generator).double() for s in ((m, m), (n, n), (m, n)))
    return [left @ torch.randn(m, n, generator=generator).double() @ right + mean for _ in range(steps)]


def run(grads: list[Tensor], **settings: Any) -> list[Tensor]:
    """The steps taken along the gradients by one matrix."""
    p = torch.zeros_like(grads[0], requires_grad=True)
    optimizer = Shampoo([p], 1.0, betas=BETAS, factor_beta=BETA, **settings)
    steps = []
    for grad in grads:
        before = p.detach().clone()
        p.grad = grad.clone()
        optimizer.step()
        steps.append(p.detach() - before)
    return steps


def averaged(values: list[Tensor], beta: float) -> Tensor:
    """Corrected for the start at zero."""
    weights = [(1 - beta) * beta**k for k in range(len(values))]
    return sum(w * x for w, x in zip(weights, reversed(values), strict=True)) / (1 - beta ** len(values))


def factor(products: list[Tensor]) -> Tensor:
    """The mean of the first few, then a running average."""
    found = torch.zeros_like(products[0])
    for k, product in enumerate(products, 1):
        found = found + max(1 / k, 1 - BETA) * (product - found)
    return found


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Settings under which eigenvectors are found anew at every step: then they are those of the factors, all of which
    have their full rank here."""
    monkeypatch.setattr(frames, "LOST", 0.0)
    monkeypatch.setattr(frames, "SHIFT", 0.0)
    return {"period": 1, "statistics": 1, "tolerance": 0.0}


@pytest.mark.parametrize("exponent", [None, 0.5, 0.3])
def test_without_grafting_it_is_the_first_papers_dense_root(exact: dict[str, Any], exponent: float | None) -> None:
    """vec(D) = (R (x) L)^{-e} vec(M), with the matrix of all m n rows formed and its root taken by eigh."""
    grads, e = gradients(3, 4), exponent or 0.25
    found = run(grads, kl=False, grafting=None, damping=1e-12, exponent=exponent, **exact)
    for t in range(3, len(grads)):  # R has its full rank after two
        seen = grads[: t + 1]
        left, right = factor([g @ g.T for g in seen]), factor([g.T @ g for g in seen])
        values, vectors = torch.linalg.eigh(torch.kron(left, right))
        root = vectors @ torch.diag(values**-e) @ vectors.T
        expected = -(root @ averaged(seen, BETAS[0]).flatten()).view(3, 4)
        torch.testing.assert_close(found[t], expected, **ROOTS)


def test_damping_is_relative_to_the_mean_eigenvalue(exact: dict[str, Any]) -> None:
    grads = gradients(3, 4)
    for scale in (1.0, 1e3):
        found = run([scale * g for g in grads], kl=False, grafting=None, damping=0.2, **exact)
        left, right = factor([g @ g.T for g in grads]), factor([g.T @ g for g in grads])
        expected = -inverse_root(left, 4, 0.2) @ averaged(grads, BETAS[0]) @ inverse_root(right, 4, 0.2)
        torch.testing.assert_close(found[-1], expected, **ROOTS)


def kl_factors(grads: list[Tensor]) -> tuple[Tensor, Tensor]:
    """By inverses, in plain coordinates."""
    m, n = grads[0].shape
    first = grads[0]
    left = first @ first.T / n / first.square().mean()
    right = first.T @ first / m
    for k, g in enumerate(grads[1:], 2):
        w = max(1 / k, 1 - BETA)
        inverses = [_floored(A) for A in (left, right)]
        left, right = left + w * (g @ inverses[1] @ g.T / n - left), right + w * (g.T @ inverses[0] @ g / m - right)
    return left, right


def _floored(A: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(A)
    return vectors @ torch.diag(1 / values.clamp_min(frames.FLOOR * float(values.mean()))) @ vectors.T


def test_the_kl_variant_whitens_one_side_by_the_other(exact: dict[str, Any]) -> None:
    grads = gradients(3, 4)
    found = run(grads, grafting=None, damping=0.1, **exact)
    for t in range(len(grads)):
        left, right = kl_factors(grads[: t + 1])
        mean = averaged(grads[: t + 1], BETAS[0])
        expected = -inverse_root(left, 2, 0.1) @ mean @ inverse_root(right, 2, 0.1)
        torch.testing.assert_close(found[t], expected, **ROOTS)


def test_kl_factors_of_many_gradients_are_their_covariance() -> None:
    """A fixed point of the two equations: for gradients A Z B with Z white, L (x) R = A A' (x) B'B."""
    generator = torch.Generator().manual_seed(0)
    A, B = (torch.randn(d, d, generator=generator).double() for d in (3, 4))
    grads = [A @ torch.randn(3, 4, generator=generator).double() @ B for _ in range(2000)]
    p = torch.zeros(3, 4, dtype=torch.float64, requires_grad=True)
    optimizer = Shampoo([p], factor_beta=0.998, statistics=1, period=20)
    for g in grads:
        p.grad = g
        optimizer.step()
    state = optimizer.state[p]
    left, right = (state[f"basis_{s}"][0] @ state[f"factor_{s}"][0] @ state[f"basis_{s}"][0].T for s in range(2))
    expected = torch.kron(A @ A.T, B.T @ B)
    # 2000 draws with weights of an average of about 1000 leave 3 % on every element of a factor.
    assert (torch.kron(left, right) - expected).norm() < 0.1 * expected.norm()


@pytest.mark.parametrize("grafting", ["adam", "rmsprop", "sgd"])
def test_the_step_is_as_long_as_the_grafted_methods(grafting: str) -> None:
    grads = gradients(3, 4)
    found, alone = run(grads, grafting=grafting), run(grads, grafting=None)
    for t, (step, direction) in enumerate(zip(found, alone, strict=True), 1):
        mean = averaged(grads[:t], BETAS[0])
        square = averaged([g.square() for g in grads[:t]], BETAS[1])
        other = {"adam": mean / (square.sqrt() + EPS), "rmsprop": grads[t - 1] / (square.sqrt() + EPS), "sgd": mean}
        torch.testing.assert_close(step.norm(), other[grafting].norm(), **ALGEBRA)
        torch.testing.assert_close(step / step.norm(), direction / direction.norm(), **ALGEBRA)


def test_each_block_has_its_own_length() -> None:
    """One half of the rows has gradients a million times as large; Adam's steps are as long in both."""
    grads = [torch.cat([g[:2], 1e6 * g[2:]]) for g in gradients(4, 3)]
    last = run(grads, max_dim=3)[-1]
    assert 0.2 < float(last[:2].norm() / last[2:].norm()) < 5


def test_a_padded_row_changes_nothing(exact: dict[str, Any]) -> None:
    """[3, 3] as it is, and as one of the blocks of [5, 3], whose second has two rows and one of zeros."""
    grads = gradients(5, 3)
    settings: dict[str, Any] = {"kl": False, "grafting": "adam", "damping": 1e-12, **exact}
    found = run(grads, max_dim=3, **settings)
    for rows in (slice(0, 3), slice(3, 5)):
        alone = run([g[rows] for g in grads], **settings)
        for step, expected in zip(found, alone, strict=True):
            torch.testing.assert_close(step[rows], expected, rtol=1e-6, atol=1e-6)  # the damping's mean has a zero more


def test_one_factor_takes_the_root_of_two(exact: dict[str, Any]) -> None:
    """Of rows longer than 16 times the columns and more than eight blocks the columns' factor is left: full-matrix
    RMSprop of rows."""
    grads = gradients(40, 2)
    found = run(grads, kl=False, grafting=None, max_dim=4, damping=1e-9, **exact)[-1]
    expected = -averaged(grads, BETAS[0]) @ inverse_root(factor([g.T @ g for g in grads]), 2, 1e-9)
    torch.testing.assert_close(found, expected, **ROOTS)


@pytest.mark.parametrize("tall", [True, False])
def test_one_factor_has_no_other_to_be_whitened_by(exact: dict[str, Any], tall: bool) -> None:
    """Then the covariance of rows is what the nearest normal distribution has: the step does not see the scale."""
    grads = gradients(40, 2)
    for scale in (1.0, 1e3):
        given = [scale * (g if tall else g.T) for g in grads]
        found = run(given, kl=True, grafting=None, max_dim=4, damping=1e-9, **exact)[-1]
        expected = -averaged(grads, BETAS[0]) @ inverse_root(factor([g.T @ g / 40 for g in grads]), 2, 1e-9)
        torch.testing.assert_close(found, expected if tall else expected.T, **ROOTS)


def test_roots_follow_the_factors_between_turns() -> None:
    """Gradients that grow a thousandfold along axes that stay: no turn is due, and steps are scaled as ever."""
    grads = [g * s for s, g in zip((1.0, 1.0, 1.0, 1e3, 1e3, 1e3), [gradients(3, 4)[0]] * 6, strict=True)]
    last = run(grads, kl=False, grafting=None, statistics=1, tolerance=1.0)[-1]
    first = run(grads[:1], kl=False, grafting=None, statistics=1, tolerance=1.0)[-1]
    assert 0.5 < float(last.norm() / first.norm()) < 2


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"grafting": "lion"}, "grafting must be one of 'adam', 'rmsprop', 'sgd', None; got 'lion'"),
        ({"exponent": 0.0}, "Invalid exponent: 0.0"),
        ({"damping": 0.0}, "Invalid damping: 0.0"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Shampoo([torch.zeros(2, 2, requires_grad=True)], **settings)
