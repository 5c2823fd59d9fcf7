"""Statistics of whole models, against dense Gauss-Newton blocks by autograd in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import oracles
from hesse.curvature.output import output_curvature
from hesse.curvature.statistics import find_blocks, statistics, watch_layers
from hesse.objective import Objective
from problems import FreeParameter, SelfAttention, Tied, Unused, mlp, problem
from tolerances import ALGEBRA, STANDARD_ERRORS

Statistics = dict[str, dict[str, Tensor]]


def learn(objective: Objective, draws: int = 1, seed: int = 0) -> list[Statistics]:
    """Statistics of one forward pass, from so many draws."""
    torch.manual_seed(seed)
    blocks, loose = find_blocks(objective.model)
    with watch_layers(blocks) as calls:
        outputs = objective.forward()
    curvature = output_curvature(objective.loss_fn, outputs, objective.targets)
    params = {name: objective.params[name] for name in loose}
    return [statistics(blocks, calls, outputs, curvature, params) for _ in range(draws)]


def objective_of(name: str) -> Objective:
    model, loss_fn, (x, y) = problem(name)
    model.double()
    double = [t.double() if t.is_floating_point() else t for t in (x, y)]
    return Objective(model, loss_fn, *double)


def assert_mean(samples: Tensor, expected: Tensor) -> None:
    """The mean over the first dimension is ``expected``, to so many of its standard errors."""
    error = (samples.mean(0) - expected).abs()
    limit = STANDARD_ERRORS * samples.std(0) / len(samples) ** 0.5 + 1e-12
    assert bool((error <= limit).all()), f"off by {float((error / limit).max()) * STANDARD_ERRORS:.1f} standard errors"


def test_deep_linear_network_with_squared_error_is_exact() -> None:
    # The gradient at a layer's output is W' times noise that knows nothing of the inputs, so A (x) E[G] is the block.
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(2, 3)).double()
    objective = Objective(model, F.mse_loss, torch.randn(6, 3).double(), torch.randn(6, 3).double())
    exact = oracles.gauss_newton(objective)
    draws = learn(objective, 300)
    for layer in ("0", "1", "2"):
        mean_g = torch.stack([draw[f"{layer}.weight"]["factor_g"] for draw in draws])
        a = draws[0][f"{layer}.weight"]["factor_a"]
        below = [child.weight.detach() for child in model[int(layer) + 1 :]]
        down = (
            torch.linalg.multi_dot([*reversed(below), torch.eye(len(mean_g[0])).double()])
            if below
            else torch.eye(3).double()
        )
        closed = 6 * (2 / 18) * down.T @ down
        assert_mean(mean_g, closed)
        weight, n = oracles.rows_of(objective, f"{layer}.weight"), a.shape[0]
        block = torch.kron(closed, a).view(len(closed), n, len(closed), n)[:, :-1, :, :-1].flatten(2).flatten(0, 1)
        torch.testing.assert_close(block, exact[weight, weight], **ALGEBRA)


def test_one_example_is_exact_for_every_loss() -> None:
    for name in ("mlp, cross-entropy", "mlp, binary cross-entropy", "mlp, squared error"):
        objective = objective_of(name)
        objective.inputs, objective.targets = objective.inputs[:1], objective.targets[:1]
        exact, weight = oracles.gauss_newton(objective), oracles.rows_of(objective, "0.weight")
        blocks = []
        for draw in learn(objective, 300):
            a, g = draw["0.weight"]["factor_a"], draw["0.weight"]["factor_g"]
            blocks.append(torch.kron(g, a[:-1, :-1]))
        assert_mean(torch.stack(blocks), exact[weight, weight])


def diagonals(objective: Objective, draws: list[Statistics], name: str) -> tuple[Tensor, Tensor]:
    where = oracles.rows_of(objective, name)
    exact = oracles.gauss_newton(objective).diagonal()[where].view_as(objective.params[name])
    return torch.stack([draw[name]["diagonal"] for draw in draws]), exact


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("free parameter", ["scale"]),
        ("tied weights", ["encoder.weight"]),
        ("weight norm", ["0.parametrizations.weight.original0", "0.bias"]),
        ("RNN", ["cell.weight_hh_l0"]),
        ("convnet, grouped", ["0.weight", "0.bias", "1.weight", "1.bias"]),
        ("text", ["middle.1.weight", "middle.1.bias"]),
        ("attention", ["middle.attention.in_proj_weight"]),
    ],
)
def test_diagonals_have_that_of_the_gauss_newton_matrix_as_mean(name: str, params: list[str]) -> None:
    objective = objective_of(name)
    draws = learn(objective, 200)
    for param in params:
        assert_mean(*diagonals(objective, draws, param))


def test_batch_norm_in_eval_mode_has_the_diagonal_as_mean() -> None:
    objective = objective_of("convnet, BatchNorm")
    objective.model.eval()
    draws = learn(objective, 200)
    for param in ("1.weight", "1.bias"):
        assert_mean(*diagonals(objective, draws, param))


class Twice(nn.Module):
    """One layer called twice, or two layers called once with the same weights."""

    def __init__(self, shared: bool) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = self.first if shared else nn.Linear(4, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x).tanh()))


def test_a_layer_called_twice_adds_up() -> None:
    torch.manual_seed(0)
    shared, apart = Twice(True).double(), Twice(False).double()
    apart.load_state_dict(shared.state_dict())
    x, y = torch.randn(8, 4).double(), torch.randint(2, (8,))
    (one,), (two,) = (learn(Objective(model, F.cross_entropy, x, y)) for model in (shared, apart))
    first, second = two["first.weight"], two["second.weight"]
    torch.testing.assert_close(one["first.weight"]["factor_a"], (first["factor_a"] + second["factor_a"]) / 2, **ALGEBRA)
    torch.testing.assert_close(one["first.weight"]["factor_g"], first["factor_g"] + second["factor_g"], **ALGEBRA)


def test_an_activation_in_place_corrupts_nothing() -> None:
    def model(inplace: bool) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 3, 2), nn.ReLU(inplace), nn.BatchNorm2d(3), nn.ReLU(inplace), nn.Flatten(), nn.Linear(12, 2)
        ).double()

    x, y = torch.randn(6, 1, 3, 3).double(), torch.randint(2, (6,))
    (one,), (other,) = (learn(Objective(model(inplace), F.cross_entropy, x, y)) for inplace in (True, False))
    assert one.keys() == other.keys() == {"0.weight", "2.weight", "2.bias", "5.weight"}
    for name, parts in one.items():
        for key, value in parts.items():
            assert torch.equal(value, other[name][key]), f"{name} {key}"


def extra_parameter() -> nn.Module:
    model = mlp()
    model[0].temperature = nn.Parameter(torch.ones(()))
    return model


def frozen_bias() -> nn.Module:
    model = mlp()
    model[0].bias.requires_grad_(False)
    return model


def parametrized() -> nn.Module:
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(5, 3)), nn.Linear(3, 3))


@pytest.mark.parametrize(
    ("make", "loose"),
    [
        (mlp, []),
        (FreeParameter, ["scale"]),
        (Tied, ["encoder.weight", "encoder.bias", "decoder.bias"]),
        (frozen_bias, ["0.weight"]),
        (extra_parameter, ["0.weight", "0.bias", "0.temperature"]),
        (parametrized, ["0.bias", "0.parametrizations.weight.original0", "0.parametrizations.weight.original1"]),
        (lambda: nn.Sequential(nn.Linear(5, 4), nn.Conv2d(4, 4, 1, groups=2)), ["1.weight", "1.bias"]),
        (lambda: nn.LSTM(2, 2), ["weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"]),
    ],
)
def test_blocks_and_the_parameters_that_none_covers(make: Callable[[], nn.Module], loose: list[str]) -> None:
    model = make()
    blocks, found = find_blocks(model)
    assert found == loose
    covered = [name for block in blocks for name in block.names.values()]
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert sorted(covered + found) == sorted(trainable)
    params = dict(model.named_parameters())
    assert all(getattr(block.module, own) is params[name] for block in blocks for own, name in block.names.items())


def test_attentions_projection_is_passed_by_and_so_is_what_the_loss_does_not_reach() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 8)
    (found,) = learn(Objective(SelfAttention(True), F.mse_loss, x, x))
    assert found.keys() == {"attention.in_proj_weight", "attention.in_proj_bias"}
    (found,) = learn(Objective(Unused(), F.mse_loss, torch.randn(4, 5), torch.randn(4, 3)))
    assert found.keys() == {"used.weight"}


def test_a_loose_parameter_that_the_loss_does_not_reach_has_no_curvature() -> None:
    model = FreeParameter()
    model.idle = nn.Parameter(torch.ones(2))
    (found,) = learn(Objective(model, F.mse_loss, torch.randn(4, 5), torch.randn(4, 3)))
    assert torch.equal(found["idle"]["diagonal"], torch.zeros(2))


def test_hooks_are_gone_afterwards_even_after_a_crash() -> None:
    model = mlp()
    blocks, _ = find_blocks(model)
    with pytest.raises(RuntimeError), watch_layers(blocks):
        model(torch.zeros(1, 7))
    assert not any(module._forward_hooks for module in model.modules())


def test_a_text_of_nothing_but_padding_gives_numbers() -> None:
    model, loss_fn, (x, y) = problem("text")
    (found,) = learn(Objective(model, loss_fn, torch.zeros_like(x), y))
    assert all(bool(value.isfinite().all()) for parts in found.values() for value in parts.values())


def test_bfloat16_models_have_float32_statistics() -> None:
    for name in ("text", "free parameter"):
        model, loss_fn, (x, y) = problem(name)
        x = x.bfloat16() if x.is_floating_point() else x
        (found,) = learn(Objective(model.bfloat16(), loss_fn, x, y))
        assert {value.dtype for parts in found.values() for value in parts.values()} == {torch.float32}
