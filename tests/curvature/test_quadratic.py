"""The quadratic model, against dense Jacobians and Gauss-Newton matrices by autograd in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import oracles
from hesse import tree
from hesse.curvature import QuadraticModel, jvp, output_curvature, quadratic_model
from hesse.curvature.jacobian import double_backward
from hesse.objective import Objective
from problems import PROBLEMS, problem
from tolerances import ALGEBRA


def objective_of(name: str) -> Objective:
    model, loss_fn, (x, y) = problem(name)
    model.double()
    x, y = (t.double() if t.is_floating_point() else t for t in (x[:4], y[:4]))
    return Objective(model, loss_fn, x, y)


def random_direction(objective: Objective, seed: int) -> tree.Params:
    generator = torch.Generator().manual_seed(seed)
    v = {name: torch.randn(p.shape, generator=generator, dtype=p.dtype) for name, p in objective.params.items()}
    if "embedding.weight" in v:
        v["embedding.weight"][0] = 0  # the padding row: autograd declares its gradient zero, though the outputs use it
    return v


def by_backward(objective: Objective, v: tree.Params) -> Tensor:
    """``J v`` from the graph of the backward pass."""
    params = objective.params
    (tangent,) = double_backward(objective, params, objective.outputs(params)).apply(v)
    return tangent


@pytest.mark.parametrize("name", PROBLEMS)
def test_jvp_is_the_dense_jacobian_times_the_direction(name: str) -> None:
    objective = objective_of(name)
    v = random_direction(objective, 0)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):  # rounding, and dropout, differ otherwise
        expected = oracles.jacobian(objective) @ oracles.flat(v)
    found = jvp(objective, v)
    torch.testing.assert_close(found.flatten(), expected, **ALGEBRA)
    assert not found.requires_grad


@pytest.mark.parametrize(
    "name", ["mlp, cross-entropy", "convnet, BatchNorm", "text", "GRU", "tied weights", "weight norm"]
)
def test_the_detour_by_the_backward_pass_gives_the_same(name: str) -> None:
    objective = objective_of(name)
    v = random_direction(objective, 0)
    expected = oracles.jacobian(objective) @ oracles.flat(v)
    torch.testing.assert_close(by_backward(objective, v).flatten(), expected, **ALGEBRA)


def test_jvp_moves_nothing() -> None:
    objective = objective_of("convnet, BatchNorm")
    objective.forward()
    before, random = {k: t.clone() for k, t in objective.model.state_dict().items()}, torch.get_rng_state()
    for product in (jvp, by_backward):
        product(objective, random_direction(objective, 0))
        assert all(torch.equal(t, before[k]) for k, t in objective.model.state_dict().items())
        assert torch.equal(random, torch.get_rng_state())
        assert all(p.grad is None for p in objective.params.values())


def test_jvp_sees_the_dropout_mask_of_the_forward_pass() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 40, bias=False), nn.Dropout(0.5))
    objective = Objective(model, F.mse_loss, torch.randn(3, 5), None)
    outputs = objective.forward()
    weight = {"0.weight": model[0].weight.detach()}
    # Linear in the weight: the derivative along the weight is the output, mask and all.
    torch.testing.assert_close(jvp(objective, weight), outputs.detach())
    torch.testing.assert_close(by_backward(objective, weight), outputs.detach())


def test_jvp_along_some_of_the_parameters() -> None:
    objective = objective_of("mlp, cross-entropy")
    v = random_direction(objective, 0)
    part = {"2.weight": v["2.weight"]}
    whole = {name: value if name in part else torch.zeros_like(value) for name, value in v.items()}
    torch.testing.assert_close(jvp(objective, part), jvp(objective, whole))


def test_outputs_that_no_parameter_reaches_do_not_move() -> None:
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.idle = nn.Parameter(torch.ones(2))

        def forward(self, x: Tensor) -> Tensor:
            return x

    objective = Objective(Constant(), F.mse_loss, torch.ones(3), torch.ones(3))
    assert torch.equal(jvp(objective, {"idle": torch.ones(2)}), torch.zeros(3))


def test_an_error_in_the_model_is_not_taken_for_a_missing_derivative() -> None:
    objective = Objective(nn.Linear(2, 1), F.mse_loss, torch.ones(3, 5), torch.ones(3, 1))
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        jvp(objective, random_direction(objective, 0))


def model_of(objective: Objective, directions: list[tree.Params]) -> QuadraticModel:
    outputs = objective.outputs(objective.params)
    curvature = output_curvature(objective.loss_fn, outputs, objective.targets)
    return quadratic_model(objective, curvature.product, oracles.gradient(objective), directions)


@pytest.mark.parametrize(
    "name", ["mlp, cross-entropy", "mlp, binary cross-entropy", "mlp, squared error", "convnet", "LSTM"]
)
@pytest.mark.parametrize("k", [1, 2, 3])
def test_slope_curvature_and_gram_are_those_of_the_dense_matrix(name: str, k: int) -> None:
    objective = objective_of(name)
    directions = [random_direction(objective, seed) for seed in range(k)]
    found = model_of(objective, directions)
    v = torch.stack([oracles.flat(direction) for direction in directions], 1)
    g, dense = oracles.flat(oracles.gradient(objective)), oracles.gauss_newton(objective)
    for value, expected in ((found.slope, v.T @ g), (found.curvature, v.T @ dense @ v), (found.gram, v.T @ v)):
        torch.testing.assert_close(torch.tensor(value, dtype=torch.float64), expected, **ALGEBRA)
    c = torch.linspace(-1, 1, k + 1, dtype=torch.float64)[1:]
    step = v @ c
    change = g @ step + 0.5 * step @ (dense @ step + 0.3 * step)
    assert found.value(c.tolist(), 0.3) == pytest.approx(float(change), rel=1e-10)


def test_on_a_linear_model_with_squared_error_the_prediction_is_the_change_itself() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    objective = Objective(model, F.mse_loss, torch.randn(5, 3).double(), torch.randn(5, 2).double())
    directions = [random_direction(objective, seed) for seed in (0, 1)]
    found = model_of(objective, directions)
    c = found.minimiser(0.0)
    moved = tree.add((1.0, objective.params), *zip(c, directions, strict=True))
    assert float((objective(moved) - objective(objective.params)).detach()) == pytest.approx(found.value(c), rel=1e-10)


@pytest.mark.parametrize("damping", [0.0, 0.5])
def test_no_other_coefficients_do_better_than_the_minimiser(damping: float) -> None:
    objective = objective_of("mlp, cross-entropy")
    found = model_of(objective, [random_direction(objective, seed) for seed in (0, 1)])
    best = found.minimiser(damping)
    assert found.value(best, damping) < 0
    for angle in range(0, 360, 15):
        for radius in (1e-3, 1.0):
            turned = radius * math.cos(math.radians(angle)), radius * math.sin(math.radians(angle))
            assert found.value([best[0] + turned[0], best[1] + turned[1]], damping) > found.value(best, damping)


def test_a_zero_direction_gets_nothing_and_leaves_the_other_its_step() -> None:
    objective = objective_of("mlp, cross-entropy")
    v = random_direction(objective, 0)
    alone = model_of(objective, [v]).minimiser(0.1)
    c = model_of(objective, [v, tree.scale(0.0, v)]).minimiser(0.1)
    assert c[0] == pytest.approx(alone[0], rel=1e-10)
    assert c[1] == 0


@pytest.mark.parametrize("factor", [1.0, -3.0, 1e-6])
def test_parallel_directions_make_the_step_of_one(factor: float) -> None:
    objective = objective_of("mlp, cross-entropy")
    v = random_direction(objective, 0)
    (alone,) = model_of(objective, [v]).minimiser(0.1)
    c = model_of(objective, [v, tree.scale(factor, v)]).minimiser(0.1)
    assert c[0] + factor * c[1] == pytest.approx(alone, rel=1e-6)
