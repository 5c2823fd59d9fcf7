"""The operator of Kronecker blocks: every layer against dense matrices, and what it knows of itself."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import oracles
from hesse.curvature import ggn, kfac
from hesse.curvature.factored import KroneckerFactored
from hesse.curvature.layers import Form, as_matrix
from hesse.curvature.statistics import Diagonal, Kronecker
from hesse.linalg import LinearOperator
from hesse.objective.function import objective
from layer_problems import APART, MIXED, made
from problems import Problem
from tolerances import ALGEBRA

EVERY: dict[str, Callable[[], Problem]] = {**APART, **{name: make for name, (make, _) in MIXED.items()}}
DAMPING = 0.1


def block_of(case: Problem, *names: str) -> Tensor:
    """The dense block of the Gauss-Newton matrix."""
    torch.manual_seed(5)  # for dropout
    o = objective(*case)
    rows = torch.cat([torch.arange(s.start, s.stop) for s in (oracles.rows_of(o, name) for name in names)])
    return oracles.gauss_newton(o)[rows][:, rows]


def factors(case: Problem, **options: Any) -> KroneckerFactored:
    torch.manual_seed(5)
    return kfac(*case, **{"fisher_type": "exact", **options})


# -- the rest is the diagonal, and EKFAC the diagonal in another basis ---------------------------------------------


@pytest.mark.parametrize("name", EVERY)
def test_every_layer(name: str) -> None:
    """What has no block has the exact diagonal; EKFAC's eigenvalues are the diagonal of the true block in the basis."""
    case = made(EVERY[name])
    found, corrected = factors(case), factors(case, ekfac=True)
    for parameter, one in found.factors.items():
        if isinstance(one, Diagonal):
            expected = block_of(case, parameter).diagonal().view_as(one.values)
            torch.testing.assert_close(one.values, expected, **ALGEBRA)
            continue
        names = (parameter,) if one.bias is None else (parameter, one.bias)
        true = block_of(case, *names)
        basis = corrected.eigenbasis()[parameter]
        torch.testing.assert_close(_quadratic(corrected, names, true), basis.values.flatten(), **ALGEBRA)
    torch.testing.assert_close(corrected.trace().value, block_of(case, *found.layout.shapes).trace(), **ALGEBRA)
    _consistent(found)
    _consistent(corrected)


def _quadratic(operator: KroneckerFactored, names: tuple[str, ...], true: Tensor) -> Tensor:
    """q' M q for every eigenvector q of the block, in the order of its eigenvalues."""
    part = operator.block(list(names))
    assert isinstance(part, KroneckerFactored)
    n = part.shape[0]
    vectors = torch.stack([part.layout.flatten(part._eigenvector(i)) for i in range(n)], dim=1)
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(n, dtype=vectors.dtype), **ALGEBRA)
    return torch.einsum("ni,nm,mi->i", vectors, true, vectors)


def _consistent(operator: KroneckerFactored) -> None:
    """Inverse, trace, diagonal and determinant against the dense matrix."""
    dense = operator.dense()
    eye = torch.eye(len(dense), dtype=dense.dtype)
    torch.testing.assert_close(dense, dense.T, **ALGEBRA)
    torch.testing.assert_close(operator.inverse(DAMPING).dense() @ (dense + DAMPING * eye), eye, **ALGEBRA)
    torch.testing.assert_close(operator.diagonal().value, dense.diagonal(), **ALGEBRA)
    torch.testing.assert_close(operator.trace().value, dense.trace(), **ALGEBRA)
    torch.testing.assert_close(operator.frobenius().value, dense.norm(), **ALGEBRA)
    torch.testing.assert_close(operator.logdet(DAMPING).value, torch.logdet(dense + DAMPING * eye), **ALGEBRA)


# -- the operator --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ekfac", [False, True])
def test_vectors_columns_and_names(ekfac: bool) -> None:
    case = made(APART["Conv2d"])
    operator = factors(case, ekfac=ekfac)
    dense = operator.dense()
    v = torch.randn(len(dense), 3, dtype=torch.float64)
    torch.testing.assert_close(operator @ v, dense @ v, **ALGEBRA)
    torch.testing.assert_close(operator @ v[:, 0], dense @ v[:, 0], **ALGEBRA)
    named = operator @ operator.layout.split(v[:, 0])
    torch.testing.assert_close(operator.layout.flatten(named), dense @ v[:, 0], **ALGEBRA)
    assert operator.psd and operator.symmetric and list(operator.layout.shapes) == list(objective(*case).params)


@pytest.mark.parametrize("ekfac", [False, True])
def test_blocks(ekfac: bool) -> None:
    operator = factors(made(APART["LayerNorm"]), ekfac=ekfac)
    dense, rows = operator.dense(), operator.layout.slices
    for pattern, kind in (
        ("layer.*", KroneckerFactored),
        ("head.*", KroneckerFactored),
        ("head.weight", LinearOperator),
    ):
        found = operator.block(pattern)
        inside = torch.cat([torch.arange(s.start, s.stop) for s in (rows[n] for n in found.layout.shapes)])
        torch.testing.assert_close(found.dense(), dense[inside][:, inside], **ALGEBRA)
        assert isinstance(found, kind)
    with pytest.raises(ValueError, match="no parameter is named like 'tail"):
        operator.block("tail.*")


@pytest.mark.parametrize("which", ["LA", "SA", "LM", "BE"])
@pytest.mark.parametrize("ekfac", [False, True])
def test_eigenpairs(which: str, ekfac: bool) -> None:
    operator = factors(made(APART["LayerNorm"]), ekfac=ekfac)
    dense = operator.dense()
    pairs = operator.eigsh(5, which=which)
    rising = torch.linalg.eigvalsh(dense)
    ends = {"LA": rising.flip(0)[:5], "LM": rising.flip(0)[:5], "SA": rising[:5]}
    expected = ends.get(which, torch.cat([rising.flip(0)[:3], rising.flip(0)[-2:]]))
    torch.testing.assert_close(pairs.values, expected, **ALGEBRA)
    torch.testing.assert_close(dense @ pairs.vectors, pairs.vectors * pairs.values, **ALGEBRA)
    assert pairs.converged and pairs.products == 0
    rest = operator.eigsh(2, which=which, deflate=pairs.vectors[:, :1], rtol=1e-9)
    torch.testing.assert_close(rest.values[0], pairs.values[1], rtol=1e-6, atol=1e-8)  # iterated, bounds of 1e-9
    with pytest.raises(ValueError, match="which must be"):
        operator.eigsh(2, which="largest")
    with pytest.raises(ValueError, match="k must be between 1"):
        operator.eigsh(0)


def test_factored_damping_is_that_of_the_optimiser() -> None:
    operator = factors(made(APART["Linear"]))
    one = operator.factors["head.weight"]
    assert isinstance(one, Kronecker)
    pi = ((one.a.trace() / len(one.a)) / (one.g.trace() / len(one.g))).sqrt()
    a = one.a + pi * DAMPING**0.5 * torch.eye(len(one.a), dtype=one.a.dtype)
    g = one.g + DAMPING**0.5 / pi * torch.eye(len(one.g), dtype=one.g.dtype)
    found = operator.inverse(DAMPING, factored=True).block("head.*")
    x = {name: torch.randn(shape, dtype=torch.float64) for name, shape in found.layout.shapes.items()}
    y = found @ x
    expected = torch.linalg.solve(g, as_matrix(x["head.weight"], Form(), x["head.bias"])[0]) @ torch.linalg.inv(a)
    torch.testing.assert_close(as_matrix(y["head.weight"], Form(), y["head.bias"])[0], expected, **ALGEBRA)


def test_solve() -> None:
    operator = factors(made(APART["Conv1d"]))
    b = torch.randn(operator.shape[0], dtype=torch.float64)
    solution = operator.solve(b, damping=DAMPING)
    torch.testing.assert_close(operator @ solution.x + DAMPING * solution.x, b, **ALGEBRA)
    assert solution.converged
    named = operator.solve(operator.layout.split(b), damping=DAMPING)
    torch.testing.assert_close(operator.layout.flatten(named.x), solution.x, **ALGEBRA)


def test_it_preconditions_the_matrix_it_stands_for() -> None:
    case = made(APART["Linear"])
    G, P = ggn(*case), factors(case).inverse(1e-3)
    b = torch.randn(G.shape[0], dtype=torch.float64)
    plain, helped = G.solve(b, damping=1e-3, rtol=1e-8), G.solve(b, damping=1e-3, rtol=1e-8, preconditioner=P)
    torch.testing.assert_close(
        helped.x, plain.x, rtol=1e-5, atol=1e-5
    )  # both stop at a residual of 1e-8, condition 1e3


def test_low_precision_has_float32_factors() -> None:
    case = made(APART["Linear"])
    model = copy.deepcopy(case.model).to(torch.bfloat16)
    x, y = case.batch[0].bfloat16(), case.batch[1]
    found = kfac(model, case.loss_fn, (x, y), fisher_type="exact", ekfac=True)
    expected = factors(Problem(model.double(), case.loss_fn, (x.double(), y)), ekfac=True)
    assert found.dtype == torch.float32 and found.factors["head.weight"].a.dtype == torch.float32
    torch.testing.assert_close(found.dense().double(), expected.dense(), rtol=1e-4, atol=1e-6)  # float32 rounds to 6e-8
    assert model.head.weight.dtype == torch.float64


def test_what_the_loss_does_not_depend_on() -> None:
    operator = factors(made(APART["layers in vain"]))
    rows = operator.layout.slices["never_called.weight"]
    assert not operator.dense()[rows].any()
    v = torch.ones(operator.shape[0], dtype=torch.float64)
    torch.testing.assert_close((operator.inverse(0.5) @ v)[rows], 2 * v[rows], **ALGEBRA)


def test_the_model_is_left_alone() -> None:
    model, loss_fn, batch = made(MIXED["BatchNorm, training"][0])
    called: list[Any] = []
    model.head.register_forward_hook(lambda *_: called.append(1))
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    kfac(model, loss_fn, batch, ekfac=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert called and len(model.head._forward_hooks) == 1


# -- bad input -----------------------------------------------------------------------------------------------------


def test_reduce_needs_examples_that_do_not_mix() -> None:
    case = made(MIXED["BatchNorm, training"][0])
    with pytest.raises(ValueError, match=r"'layer.0.weight' met, in inputs of shape .* batch norm in training"):
        factors(case, variant="reduce", fisher_type="sampled")
    factors(Problem(case.model.eval(), case.loss_fn, case.batch), variant="reduce", fisher_type="sampled")


@pytest.mark.parametrize("option", [{"fisher_type": "mc"}, {"variant": "sum"}, {"samples": 0}, {"reduction": "none"}])
def test_unknown_options(option: dict[str, Any]) -> None:
    case = made(APART["Linear"])
    with pytest.raises(ValueError, match=next(iter(option))):
        kfac(*case, **option)


def test_bad_damping() -> None:
    operator = factors(made(APART["Linear"]))
    for damping in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="damping"):
            operator.inverse(damping)
        with pytest.raises(ValueError, match="damping"):
            operator.logdet(damping)
    with pytest.raises(ValueError, match="EKFAC's eigenvalues are no products"):
        factors(made(APART["Linear"]), ekfac=True).inverse(0.1, factored=True)


def test_a_loss_without_curvature_and_a_model_without_parameters() -> None:
    x = torch.randn(3, 2)
    with pytest.raises(TypeError, match="l1_loss"):
        kfac(nn.Linear(2, 1), F.l1_loss, (x, torch.zeros(3, 1)))
    with pytest.raises(ValueError, match="no trainable parameter"):
        kfac(nn.Tanh(), F.mse_loss, (x, x))


def test_factors_that_are_no_numbers() -> None:
    case = made(APART["Linear"])
    operator = factors(case)
    broken = Kronecker(torch.full((2, 2), torch.nan), torch.eye(1), Form(), None)
    bad = KroneckerFactored(
        {"w": broken}, operator.layout.restrict([]).of({"w": torch.zeros(1, 2)}), dtype=torch.float32
    )
    with pytest.raises(torch.linalg.LinAlgError, match="'w' has elements that are not finite"):
        bad.inverse(0.1) @ torch.ones(2)
    with pytest.raises(torch.linalg.LinAlgError, match=r"'w' with damping 0.1 have no inverse"):
        bad.inverse(0.1, factored=True)
