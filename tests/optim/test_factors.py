"""The running curvature of K-FAC and EKFAC against dense float64 algebra, with factors whole and in parts."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from hesse.curvature import tiles
from hesse.curvature.layers import Form, as_matrix
from hesse.curvature.statistics import Diagonal, Kronecker
from hesse.optim.corrected import Corrected
from hesse.optim.factors import Factors
from tolerances import ALGEBRA

DAMPING = 0.1
PLAIN = Form()


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


@dataclass(frozen=True)
class Weight:
    """The shape of a weight and how it is used."""

    shape: tuple[int, ...]
    form: Form = PLAIN
    bias: bool = False
    lookup: bool = False
    max_dim: int = 100

    @property
    def sides(self) -> tuple[int, int]:
        m, n = as_matrix(torch.zeros(self.shape), self.form).shape[1:]
        return m, n + self.bias


# fmt: off
WEIGHTS = {
    "linear": Weight((3, 4)),
    "with bias": Weight((3, 4), bias=True),
    "convolution": Weight((3, 2, 2, 2), bias=True),
    "grouped": Weight((6, 2, 3), Form(2), bias=True),
    "transposed, grouped": Weight((4, 3, 2), Form(2, True)),
    "embedding": Weight((7, 3), Form(transposed=True), lookup=True),
    "both sides in parts": Weight((7, 8), bias=True, max_dim=3),
    "one side in parts": Weight((3, 9), max_dim=4),
    "the other side in parts": Weight((9, 2), bias=True, max_dim=4),
    "grouped in parts": Weight((10, 2, 3), Form(2), bias=True, max_dim=4),
    "transposed in parts": Weight((8, 3, 2), Form(2, True), max_dim=3),
    "embedding in parts": Weight((7, 5), Form(transposed=True), lookup=True, max_dim=3),
}
# fmt: on
WHOLE = [name for name, weight in WEIGHTS.items() if weight.max_dim == 100]


def moments(rows: int, groups: int, n: int, max_dim: int, parts: bool) -> tuple[Tensor, Tensor]:
    """A random factor as it is kept, and the dense [groups, n, n] that it stands for."""
    x = noise(groups, rows, n)
    b = math.ceil(n / math.ceil(n / max_dim))
    number = torch.arange(n) // b
    whole = (x.mT @ x) * (number[:, None] == number)
    kept = tiles.moments(x, max_dim) if parts else x.mT @ x
    return kept if groups > 1 else kept[0], whole


def draw(weight: Weight, bias: str | None = "bias") -> tuple[Kronecker, Tensor, Tensor]:
    """A random statistic and its dense factors [groups, n, n] and [groups, m, m]."""
    m, n = weight.sides
    parts = max(m, 0 if weight.lookup else n) > weight.max_dim
    g, dense_g = moments(m + 2, weight.form.groups, m, weight.max_dim, parts)
    if weight.lookup:
        counts = torch.rand(n, dtype=torch.float64)
        a, dense_a = counts[None] if parts else counts, counts.diag()[None]
    else:
        a, dense_a = moments(n - 1, weight.form.groups, n, weight.max_dim, parts)  # of low rank
    return Kronecker(a, g, weight.form, bias if weight.bias else None), dense_a, dense_g


def learned(
    weights: dict[str, Weight], kind: type[Factors] = Factors
) -> tuple[Factors, dict[str, tuple[Tensor, Tensor]]]:
    """Factors that have seen one batch, and the dense ones by name; the bias of ``w`` is ``w.bias``."""
    params: dict[str, Tensor] = {}
    statistics, dense = {}, {}
    for name, weight in weights.items():
        params[name] = noise(*weight.shape)
        if weight.bias:
            params[f"{name}.bias"] = noise(weight.shape[0])
        statistics[name], *both = draw(weight, f"{name}.bias")
        dense[name] = (both[0], both[1])
    factors = kind({p: {} for p in params.values()}, params, {})
    factors.learn(statistics, 1.0)
    return factors, dense


def gradient(factors: Factors) -> dict[str, Tensor]:
    return {name: noise(*p.shape) for name, p in factors.params.items()}


def matrices(weight: Weight, name: str, x: dict[str, Tensor]) -> Tensor:
    return as_matrix(x[name], weight.form, x[f"{name}.bias"] if weight.bias else None)


def damped(a: Tensor, g: Tensor, damping: float = DAMPING) -> tuple[Tensor, Tensor]:
    """The dense factors, each with its share of the damping."""
    pi = math.sqrt(float(a.trace()) / len(a) / (float(g.trace()) / len(g)))
    eye_a, eye_g = (torch.eye(len(t), dtype=t.dtype) for t in (a, g))
    return a + pi * math.sqrt(damping) * eye_a, g + math.sqrt(damping) / pi * eye_g


def dense_direction(a: Tensor, g: Tensor, matrix: Tensor) -> Tensor:
    """``-B^{-1} vec(W)`` by a dense solve, group by group."""
    found = []
    for one, other, w in zip(a, g, matrix, strict=True):
        left, right = damped(one, other)
        found.append(-torch.linalg.solve(torch.kron(right, left), w.flatten()).view_as(w))
    return torch.stack(found)


@pytest.mark.parametrize("name", WEIGHTS)
def test_the_direction_is_that_of_the_dense_damped_product(name: str) -> None:
    torch.manual_seed(0)
    weight = WEIGHTS[name]
    factors, dense = learned({"w": weight})
    factors.refresh(DAMPING)
    grad = gradient(factors)
    found = factors.direction(grad, DAMPING)
    exact = dense_direction(*dense["w"], matrices(weight, "w", grad))
    torch.testing.assert_close(matrices(weight, "w", found), exact, **ALGEBRA)
    assert found.keys() == grad.keys()


@pytest.mark.parametrize("name", WEIGHTS)
def test_the_effective_dimension_is_the_trace_it_stands_for(name: str) -> None:
    torch.manual_seed(0)
    factors, dense = learned({"w": WEIGHTS[name]})
    factors.refresh(DAMPING)
    exact = sum(
        torch.linalg.solve(torch.kron(*damped(a, g)[::-1]), torch.kron(g, a)).trace()
        for a, g in zip(*dense["w"], strict=True)
    )
    torch.testing.assert_close(factors.effective_dimension(DAMPING), exact, **ALGEBRA)


def test_other_parameters_have_their_diagonal_or_plain_descent() -> None:
    torch.manual_seed(0)
    params = {"scale": noise(3), "unreached": noise(2)}
    factors = Factors({p: {} for p in params.values()}, params, {})
    squares = torch.tensor([0.0, 1.0, 4.0], dtype=torch.float64)
    factors.learn({"scale": Diagonal(squares)}, 1.0)
    found = factors.direction(params, DAMPING)
    torch.testing.assert_close(found["scale"], -params["scale"] / (squares + DAMPING), **ALGEBRA)
    torch.testing.assert_close(found["unreached"], -params["unreached"] / DAMPING, **ALGEBRA)
    exact = (squares / (squares + DAMPING)).sum()
    torch.testing.assert_close(factors.effective_dimension(DAMPING), exact, **ALGEBRA)


@pytest.mark.parametrize("kind", [Factors, Corrected])
@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_of_one_shape_together_are_as_one_by_one(name: str, kind: type[Factors]) -> None:
    torch.manual_seed(0)
    weight = WEIGHTS[name]
    # One among them is larger, and may be in parts of the same number and size: those of 7 and of 8 are three of 3.
    rows, *rest = weight.shape
    larger = replace(weight, shape=(rows + weight.form.groups, *rest))
    together, _ = learned({"v": weight, "w": weight, "u": larger, "x": weight}, kind)
    together.refresh(DAMPING)
    grad = gradient(together)
    found = together.direction(grad, DAMPING)
    for one in ("u", "v", "w", "x"):
        params = {n: p for n, p in together.params.items() if n.startswith(one)}
        states = {p: {k: v.clone() for k, v in together.states[n].items() if "factor" in k} for n, p in params.items()}
        alone = kind(states, params, {one: together.blocks[one]})
        alone.refresh(DAMPING)
        direction = alone.direction(grad, DAMPING)
        for n in params:
            torch.testing.assert_close(found[n], direction[n], **ALGEBRA)


# -- learning -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["with bias", "both sides in parts"])
def test_factors_are_running_means(name: str) -> None:
    torch.manual_seed(0)
    weight = WEIGHTS[name]
    factors, _ = learned({"w": weight})
    before = dict(factors.states["w"])
    first = {key: value.clone() for key, value in before.items()}
    one, *_ = draw(weight, "w.bias")
    factors.learn({"w": one}, 0.25)
    torch.testing.assert_close(factors.states["w"]["factor_a"], 0.75 * first["factor_a"] + 0.25 * one.a, **ALGEBRA)
    torch.testing.assert_close(factors.states["w"]["factor_g"], 0.75 * first["factor_g"] + 0.25 * one.g, **ALGEBRA)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("side", ["a", "g"])
def test_statistics_that_overflow_are_not_averaged_in(side: str, bad: float) -> None:
    torch.manual_seed(0)
    factors, _ = learned({"w": WEIGHTS["linear"]})
    one, *_ = draw(WEIGHTS["linear"])
    broken = replace(one, **{side: getattr(one, side).clone().fill_(bad)})
    before = {key: value.clone() for key, value in factors.states["w"].items()}
    factors.learn({"w": broken}, 0.25)
    assert all(torch.equal(before[key], value) for key, value in factors.states["w"].items())
    factors._forget("w", None)
    factors.learn({"w": broken}, 1.0)
    assert not factors.known
    assert factors.blocks == {}


def test_a_weight_that_is_cut_in_another_way_begins_anew() -> None:
    torch.manual_seed(0)
    weight = WEIGHTS["both sides in parts"]
    factors, _ = learned({"w": weight})
    factors.refresh(DAMPING)
    one, a, g = draw(replace(weight, max_dim=5), "w.bias")
    factors.learn({"w": one}, 0.25)
    assert factors.states["w"].keys() == {"factor_a", "factor_g"}
    factors.refresh(DAMPING)
    grad = gradient(factors)
    found = factors.direction(grad, DAMPING)
    torch.testing.assert_close(
        matrices(weight, "w", found), dense_direction(a, g, matrices(weight, "w", grad)), **ALGEBRA
    )


# -- when inverses are made -----------------------------------------------------------------------------------------


def distance(
    weight: Weight, old: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor], w: Tensor, damping: float
) -> float:
    """How far ``B_new B_old^{-1}`` is from one on a mix of the gradient's rows and of its columns, at worst."""
    worst = 0.0
    for a, g, b, h, matrix in zip(*old, *new, w, strict=True):
        rows, columns = (torch.arange(size, dtype=matrix.dtype).cos() for size in matrix.shape)
        vectors = (rows @ matrix, matrix @ columns)
        for before, after, v in zip(damped(a, g), damped(b, h, damping), vectors, strict=True):
            off = after @ torch.linalg.solve(before, v) - v
            worst = max(worst, float(off.norm() / v.norm()))
    return worst


@pytest.mark.parametrize("name", WEIGHTS)
def test_inverses_are_remade_just_where_they_are_off_by_more_than_the_limit(name: str) -> None:
    torch.manual_seed(0)
    weight = WEIGHTS[name]
    factors, old = learned({"w": weight})
    factors.refresh(DAMPING)
    grad = gradient(factors)
    made = factors.states["w"]["inverse_g"].clone()
    assert not factors.refresh(DAMPING, 1e-9, grad)  # fresh: exact up to rounding
    one, a, g = draw(weight, "w.bias")
    factors.learn({"w": one}, 0.1)
    new = (0.9 * old["w"][0] + 0.1 * a, 0.9 * old["w"][1] + 0.1 * g)
    off = distance(weight, old["w"], new, matrices(weight, "w", grad), 2 * DAMPING)
    assert off > 0.01
    assert not factors.refresh(2 * DAMPING, 1.001 * off, grad)
    assert torch.equal(factors.states["w"]["inverse_g"], made)
    assert factors.refresh(2 * DAMPING, 0.999 * off, grad)
    assert not torch.equal(factors.states["w"]["inverse_g"], made)
    assert not factors.refresh(2 * DAMPING, 1e-9, grad)


def test_kinds_are_remade_apart_and_without_a_limit_all_are() -> None:
    torch.manual_seed(0)
    factors, _ = learned({"stale": WEIGHTS["linear"], "fresh": WEIGHTS["both sides in parts"]})
    factors.refresh(DAMPING)
    before = {name: factors.states[name]["inverse_a"] for name in ("stale", "fresh")}
    factors.states["stale"]["factor_a"] *= 3
    assert factors.refresh(DAMPING, 0.1, gradient(factors))
    assert factors.states["fresh"]["inverse_a"] is before["fresh"]
    assert factors.states["stale"]["inverse_a"] is not before["stale"]
    assert factors.refresh(DAMPING)
    assert factors.states["fresh"]["inverse_a"] is not before["fresh"]


def test_a_gradient_of_zeros_keeps_what_there_is() -> None:
    torch.manual_seed(0)
    factors, _ = learned({"w": WEIGHTS["both sides in parts"]})
    factors.refresh(DAMPING)
    factors.states["w"]["factor_a"] *= 3
    assert not factors.refresh(DAMPING, 0.1, {name: torch.zeros_like(p) for name, p in factors.params.items()})


def test_a_kind_without_an_inverse_keeps_its_old_one() -> None:
    torch.manual_seed(0)
    factors, _ = learned({"w": WEIGHTS["both sides in parts"]})
    factors.refresh(DAMPING)
    before = factors.states["w"]["inverse_a"]
    factors.states["w"]["factor_a"][1, 0, 0] = math.nan
    factors.refresh(DAMPING)
    assert factors.states["w"]["inverse_a"] is before


# -- corrected eigenvalues ------------------------------------------------------------------------------------------


def corrected_direction(factors: Factors, weight: Weight, values: Tensor, grad: dict[str, Tensor]) -> Tensor:
    """``-(Q diag(values) Q' + damping I)^{-1} vec(W)`` with the Q = Q_G (x) Q_A of the state, by a dense solve."""
    state, found = factors.states["w"], []
    for i, w in enumerate(matrices(weight, "w", grad)):
        one = state["basis_g"][i] if weight.form.groups > 1 else state["basis_g"]
        other = state["basis_a"] if "basis_a" in state else torch.eye(w.shape[1], dtype=w.dtype)
        q = torch.kron(one.contiguous(), (other[i] if weight.form.groups > 1 else other).contiguous())
        b = q @ values[i].flatten().diag() @ q.T + DAMPING * torch.eye(w.numel(), dtype=w.dtype)
        found.append(-torch.linalg.solve(b, w.flatten()).view_as(w))
    return torch.stack(found)


@pytest.mark.parametrize("name", WHOLE)
def test_to_begin_with_corrected_is_the_product_with_exact_damping(name: str) -> None:
    torch.manual_seed(0)
    weight = WEIGHTS[name]
    factors, dense = learned({"w": weight}, Corrected)
    factors.refresh(DAMPING)
    grad = gradient(factors)
    exact = [
        -torch.linalg.solve(torch.kron(g, a) + DAMPING * torch.eye(w.numel(), dtype=w.dtype), w.flatten()).view_as(w)
        for a, g, w in zip(*dense["w"], matrices(weight, "w", grad), strict=True)
    ]
    found = factors.direction(grad, DAMPING)
    torch.testing.assert_close(matrices(weight, "w", found), torch.stack(exact), **ALGEBRA)


@pytest.mark.parametrize("name", WHOLE)
def test_corrected_is_dense_algebra_in_the_basis_of_the_state(name: str) -> None:
    torch.manual_seed(0)
    weight = WEIGHTS[name]
    factors, _ = learned({"w": weight}, Corrected)
    factors.refresh(DAMPING)
    (m, n), grad = weight.sides, gradient(factors)
    one, *_ = draw(weight, "w.bias")
    values = torch.rand(weight.form.groups, m, n, dtype=torch.float64)
    before = factors.states["w"]["values"].clone()
    factors.learn({"w": replace(one, values=values)}, 0.25)
    values = 0.75 * before + 0.25 * values
    assert factors.bases()["w"].values.shape == values.shape
    assert "inverse_g" not in factors.states["w"]  # for nothing
    exact = corrected_direction(factors, weight, values, grad)
    torch.testing.assert_close(matrices(weight, "w", factors.direction(grad, DAMPING)), exact, **ALGEBRA)
    exact = (values / (values + DAMPING)).sum()
    torch.testing.assert_close(factors.effective_dimension(DAMPING), exact, **ALGEBRA)


@pytest.mark.parametrize("late", [False, True])
def test_eigenvalues_follow_their_basis(late: bool) -> None:
    torch.manual_seed(0)
    weight = WEIGHTS["linear"]
    factors, _ = learned({"w": weight, "x": weight}, Corrected)
    if late:
        second = dict(factors.states["x"]), factors.blocks["x"]
        factors._forget("x", None)
    factors.refresh(DAMPING)
    old = {key: factors.states["w"][key].clone() for key in ("basis_a", "basis_g", "values")}
    if late:
        factors.states["x"].update(second[0])  # a weight of the same shape that the loss has not met before
        factors.blocks["x"] = second[1]
    for key, size in (("factor_a", 4), ("factor_g", 3)):
        x = noise(size, size)
        factors.states["w"][key] = x @ x.T
    factors.refresh(DAMPING)
    state = factors.states["w"]
    turn = torch.kron(state["basis_g"].T @ old["basis_g"], state["basis_a"].T @ old["basis_a"])
    assert float((turn - torch.eye(12, dtype=turn.dtype)).norm()) > 0.1
    exact = (turn @ old["values"].flatten().diag() @ turn.T).diagonal().reshape(1, 3, 4)
    torch.testing.assert_close(state["values"], exact, **ALGEBRA)


@pytest.mark.parametrize("name", [name for name in WEIGHTS if name not in WHOLE])
def test_in_parts_there_is_no_correction(name: str) -> None:
    found = []
    for kind in (Factors, Corrected):
        torch.manual_seed(0)
        factors, _ = learned({"w": WEIGHTS[name]}, kind)
        factors.refresh(DAMPING)
        found.append((factors.direction(gradient(factors), DAMPING), factors.effective_dimension(DAMPING)))
        assert "basis_g" not in factors.states["w"]
        assert factors.bases() == {}
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)
