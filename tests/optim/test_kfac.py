"""K-FAC with no argument: it trains everything, steps like Newton where that is exact, and survives what goes wrong."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import hesse
from hesse.optim import KFAC
from hesse.optim.factors import Factors
from problems import PROBLEMS, Problem, SelfAttention, Tied, Unused, mlp, problem


def closure_of(p: Problem) -> Any:
    return hesse.closure(p.model, p.loss_fn, p.batch)


def train(optimizer: KFAC, p: Problem, steps: int) -> list[float]:
    return [float(optimizer.step(closure_of(p))) for _ in range(steps)]


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("name", PROBLEMS)
def test_it_trains_every_kind_of_model_with_no_argument(name: str) -> None:
    p = problem(name)
    torch.manual_seed(0)
    losses = train(KFAC(p.model), p, 20)
    assert all(math.isfinite(loss) for loss in losses)
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("name", PROBLEMS)
def test_no_parameter_is_left_out(name: str) -> None:
    p = problem(name)
    optimizer, before = KFAC(p.model), snapshot(p.model)
    for steps in range(1, 20):
        optimizer.step(closure_of(p))
        if optimizer.param_groups[0]["rejections"] < steps:
            break
    after = snapshot(p.model)
    # Softmax does not see a shift of all keys: the gradient of the key bias, the middle third, is zero up to rounding.
    still = [n for n, q in p.model.named_parameters() if q.requires_grad and torch.equal(before[n], after[n])]
    assert not still


def least_squares(outputs: int) -> tuple[nn.Module, tuple[Tensor, Tensor], Tensor]:
    """A linear layer, data, and the closed-form solution [outputs, inputs + 1], bias last."""
    torch.manual_seed(0)
    x, y = torch.randn(40, 4).double() * torch.tensor([1.0, 2.0, 5.0, 10.0]), torch.randn(40, outputs).double()
    rows = torch.cat([x, torch.ones(40, 1).double()], 1)
    return nn.Linear(4, outputs).double(), (x, y), torch.linalg.lstsq(rows, y).solution.T


def distance(model: nn.Module, solution: Tensor) -> float:
    found = torch.cat([model.weight, model.bias[:, None]], 1).detach()
    return float((found - solution).norm() / solution.norm())


def test_one_step_on_least_squares_is_newtons_in_the_limit_of_no_damping() -> None:
    # One output: G is a number, A (x) G is the Hessian up to a factor that the step size takes up. A quadratic model
    # that is right about everything makes the calibration lower the damping until its decades run out, at 1e-12; the
    # factored damping is its root, 1e-6 of A times the condition of A, about 1e2.
    model, batch, solution = least_squares(1)
    before = distance(model, solution)
    optimizer = KFAC(model)
    optimizer.step(hesse.closure(model, F.mse_loss, batch))
    assert optimizer.param_groups[0]["damping"] < 1e-6
    assert distance(model, solution) < 1e-3 * before


def test_least_squares_is_solved_for_many_outputs_too() -> None:
    model, batch, solution = least_squares(3)
    optimizer = KFAC(model)
    for _ in range(30):
        optimizer.step(hesse.closure(model, F.mse_loss, batch))
    assert distance(model, solution) < 1e-6


def test_the_loss_returned_is_that_before_the_step_and_the_gradient_is_left() -> None:
    p = problem("mlp, cross-entropy")
    x, y = p.batch
    expected = F.cross_entropy(p.model(x), y)
    grads = torch.autograd.grad(expected, list(p.model.parameters()))
    for q in p.model.parameters():
        q.grad = torch.ones_like(q)  # left over: replaced, not added to
    loss = KFAC(p.model).step(closure_of(p))
    assert torch.equal(loss, expected.detach())
    assert loss.ndim == 0
    assert not loss.requires_grad
    for q, g in zip(p.model.parameters(), grads, strict=True):
        torch.testing.assert_close(q.grad, g)


def test_what_it_found_is_in_the_group() -> None:
    p = problem("mlp, cross-entropy")
    optimizer = KFAC(p.model)
    train(optimizer, p, 3)
    group = optimizer.param_groups[0]
    assert group["steps"] == 3
    assert group["lr"] > 0
    assert group["damping"] > 0
    assert group["effective_dimension"] > 0
    assert group["rejections"] == 0
    assert group["param_names"] == [name for name, _ in p.model.named_parameters()]


def test_a_nan_batch_changes_nothing_but_the_damping_and_training_goes_on() -> None:
    p = problem("convnet, BatchNorm")
    optimizer = KFAC(p.model)
    train(optimizer, p, 5)
    before, group = snapshot(p.model), dict(optimizer.param_groups[0])
    x, y = p.batch
    broken = x.clone()
    broken[3, 0, 0, 0] = math.nan
    for count in (1, 2):
        loss = optimizer.step(hesse.closure(p.model, p.loss_fn, (broken, y)))
        assert math.isnan(float(loss))
        assert same(before, snapshot(p.model))
        assert optimizer.param_groups[0]["rejections"] == group["rejections"] + count
    assert optimizer.param_groups[0]["damping"] > group["damping"]
    losses = train(optimizer, p, 5)
    assert losses[-1] < losses[0] < math.inf


def test_a_nan_in_the_first_batch() -> None:
    p = problem("convnet, BatchNorm")
    x, y = p.batch
    optimizer, before = KFAC(p.model), snapshot(p.model)
    optimizer.step(hesse.closure(p.model, p.loss_fn, (x * math.nan, y)))
    assert same(before, snapshot(p.model))
    assert optimizer.param_groups[0]["rejections"] == 1
    losses = train(optimizer, p, 10)
    assert losses[-1] < losses[0]


class Cliff(nn.Module):
    """A linear layer whose outputs jump once the weight is off ``ground`` by a thousandth: no local model can know."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 3)
        self.ground: Tensor | None = None
        self.jump = 0.0

    def forward(self, x: Tensor) -> Tensor:
        outputs = self.linear(x)
        safe = self.ground is None or (self.linear.weight - self.ground).norm() <= 1e-3 * self.ground.norm()
        return outputs if safe else outputs + self.jump


@pytest.mark.parametrize("jump", [math.nan, math.inf, 1e6])
def test_a_step_that_would_raise_its_loss_is_not_taken(jump: float) -> None:
    torch.manual_seed(0)
    model = Cliff()
    p = Problem(model, F.mse_loss, (torch.randn(16, 5), torch.randn(16, 3)))
    optimizer = KFAC(model)
    train(optimizer, p, 2)
    model.ground, model.jump = model.linear.weight.detach().clone(), jump
    before, damping = snapshot(model), optimizer.param_groups[0]["damping"]
    losses = train(optimizer, p, 3)
    assert len(set(losses)) == 1
    assert math.isfinite(losses[0])
    assert same(before, snapshot(model))
    assert optimizer.param_groups[0]["rejections"] == 3
    assert optimizer.param_groups[0]["damping"] > damping
    model.ground = None
    losses = train(optimizer, p, 5)
    assert losses[-1] < losses[0]


def test_statistics_that_overflow_are_not_averaged_in() -> None:
    p = problem("mlp, squared error")
    optimizer = KFAC(p.model)
    train(optimizer, p, 3)
    x, y = p.batch
    optimizer.step(hesse.closure(p.model, p.loss_fn, (1e25 * x, y)))  # its second moments are beyond float32
    for q in p.model.parameters():
        assert all(bool(value.isfinite().all()) for value in optimizer.state[q].values())
    losses = train(optimizer, p, 20)
    assert losses[-1] < losses[0]


def test_a_prediction_that_is_no_number_is_a_rejection() -> None:
    torch.manual_seed(0)
    model = nn.Linear(5, 3)
    x, y = 1e25 * torch.randn(16, 5), torch.randint(3, (16,))
    optimizer, before = KFAC(model), snapshot(model)
    loss = optimizer.step(hesse.closure(model, F.cross_entropy, (x, y)))
    assert math.isfinite(float(loss))
    assert same(before, snapshot(model))
    assert optimizer.param_groups[0]["rejections"] == 1


def saved(optimizer: KFAC) -> dict[str, Any]:
    """The state by way of a file, as a resumed run reads it."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


RESUMED = ["convnet, BatchNorm", "convnet, grouped", "text", "attention", "transformer", "GRU", "tied weights"]


@pytest.mark.parametrize("name", RESUMED)
@pytest.mark.parametrize("steps", [1, 13])
def test_resumed_ends_where_uninterrupted_ends_bit_for_bit(name: str, steps: int) -> None:
    whole = problem(name)
    optimizer = KFAC(whole.model)
    torch.manual_seed(0)
    train(optimizer, whole, steps)
    state, weights, random = saved(optimizer), snapshot(whole.model), torch.get_rng_state()
    expected = train(optimizer, whole, 9)

    resumed = problem(name, seed=1)  # another start, to be overwritten
    resumed.model.load_state_dict(weights)
    again = KFAC(resumed.model)
    again.load_state_dict(state)
    torch.set_rng_state(random)
    assert train(again, Problem(resumed.model, whole.loss_fn, whole.batch), 9) == expected
    assert same(snapshot(whole.model), snapshot(resumed.model))


def test_state_keeps_its_dtype_through_a_reload() -> None:
    p = problem("text")
    p.model.bfloat16()
    optimizer = KFAC(p.model)
    train(optimizer, p, 3)
    again = KFAC(p.model)
    again.load_state_dict(saved(optimizer))
    dtypes = set()
    for q in p.model.parameters():
        assert optimizer.state[q].keys() == again.state[q].keys()
        for key, value in optimizer.state[q].items():
            assert torch.equal(value, again.state[q][key])
            assert value.dtype == again.state[q][key].dtype
            dtypes.add(value.dtype)
    assert dtypes == {torch.float32, torch.bfloat16}


@pytest.mark.parametrize("name", ["mlp, cross-entropy", "free parameter", "text", "convnet, BatchNorm"])
def test_bfloat16_models_train(name: str) -> None:
    p = problem(name)
    x, y = p.batch
    batch = (x.bfloat16() if x.is_floating_point() else x, y)
    p = Problem(p.model.bfloat16(), p.loss_fn, batch)
    losses = train(KFAC(p.model), p, 20)
    assert losses[-1] < 0.8 * losses[0]
    assert all(q.dtype == torch.bfloat16 for q in p.model.parameters())


def test_a_deep_copy_goes_its_own_way() -> None:
    p = problem("text")
    optimizer = KFAC(p.model)
    train(optimizer, p, 3)
    before, random = snapshot(p.model), torch.get_rng_state()
    model, twin = copy.deepcopy((p.model, optimizer))
    assert twin.model is model
    losses = train(twin, Problem(model, p.loss_fn, p.batch), 3)
    assert same(before, snapshot(p.model))
    torch.set_rng_state(random)
    assert train(optimizer, p, 3) == losses


@pytest.mark.parametrize("name", ["text", "transformer"])
def test_the_same_seed_gives_the_same_run(name: str) -> None:
    runs = []
    for _ in range(2):
        p = problem(name)
        torch.manual_seed(3)
        runs.append(train(KFAC(p.model), p, 6))
    assert runs[0] == runs[1]


def test_frozen_parameters_stay_and_the_others_move() -> None:
    p = problem("mlp, cross-entropy")
    p.model[0].weight.requires_grad_(False)
    before = snapshot(p.model)
    losses = train(KFAC(p.model), p, 5)
    after = snapshot(p.model)
    assert losses[-1] < losses[0]
    assert [name for name in before if torch.equal(before[name], after[name])] == ["0.weight"]
    assert p.model[0].weight.grad is None


def test_parameters_that_the_loss_does_not_reach_stay_where_they_are() -> None:
    torch.manual_seed(0)
    p = Problem(Unused(), F.mse_loss, (torch.randn(16, 5), torch.randn(16, 3)))
    before = snapshot(p.model)
    losses = train(KFAC(p.model), p, 5)
    after = snapshot(p.model)
    assert losses[-1] < losses[0]
    moved = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"used"}


def test_a_layer_that_joins_later_is_trained_from_then_on() -> None:
    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(5, 3)
            self.second = nn.Linear(5, 3)
            self.both = False

        def forward(self, x: Tensor) -> Tensor:
            return self.first(x) + self.second(x) if self.both else self.first(x)

    torch.manual_seed(0)
    p = Problem(Late(), F.mse_loss, (torch.randn(16, 5), torch.randn(16, 3)))
    optimizer = KFAC(p.model)
    train(optimizer, p, 12)
    p.model.both = True
    before = snapshot(p.model)
    train(optimizer, p, 12)
    assert not torch.equal(before["second.weight"], p.model.second.weight)
    assert not torch.equal(before["second.bias"], p.model.second.bias)


@pytest.mark.parametrize(
    ("name", "blocks", "diagonal"),
    [
        ("convnet, grouped", {"0.weight": (2, False, "0.bias")}, {"1.weight", "1.bias"}),
        ("attention", {"middle.attention.in_proj_weight": (1, False, "middle.attention.in_proj_bias")}, set()),
        ("LSTM", {f"cell.weight_{kind}_l0": (1, False, f"cell.bias_{kind}_l0") for kind in ("ih", "hh")}, set()),
        ("tied weights", {"encoder.weight": (1, False, None)}, {"encoder.bias", "decoder.bias"}),
        ("text", {"embedding.weight": (1, True, None)}, {"middle.1.weight", "middle.1.bias"}),
        ("free parameter", {"linear.weight": (1, False, "linear.bias")}, {"scale"}),
    ],
)
def test_which_parameters_have_a_block(
    name: str, blocks: dict[str, tuple[int, bool, str | None]], diagonal: set[str]
) -> None:
    p = problem(name)
    optimizer = KFAC(p.model)
    train(optimizer, p, 1)
    found, params = optimizer.param_groups[0]["blocks"], dict(p.model.named_parameters())
    assert blocks.items() <= found.items()
    assert {n for n, q in params.items() if "diagonal" in optimizer.state[q]} == diagonal
    assert {n for n, q in params.items() if "factor_a" in optimizer.state[q]} == set(found)
    assert diagonal | set(found) | {bias for *_, bias in found.values()} >= set(params)


@pytest.mark.parametrize("name", ["convnet, grouped", "text", "free parameter"])
def test_the_direction_is_that_of_the_inverses_in_the_state(name: str) -> None:
    p = problem(name)
    optimizer = KFAC(p.model)
    train(optimizer, p, 2)
    params = dict(p.model.named_parameters())
    grad = {n: torch.randn_like(q) for n, q in params.items()}
    blocks, damping = optimizer.param_groups[0]["blocks"], optimizer.param_groups[0]["damping"]
    direction = Factors(optimizer.state, params, blocks).direction(grad, damping)
    for n, (groups, transposed, bias) in blocks.items():
        state = optimizer.state[params[n]]
        a, g = (state[key] if groups > 1 else state[key][None] for key in ("inverse_a", "inverse_g"))
        weights, biases = grad[n].chunk(groups), grad[bias].chunk(groups) if bias else [None]
        ours, shifts = direction[n].chunk(groups), direction[bias].chunk(groups) if bias else [None]
        for one, other, weight, shift, found, moved in zip(a, g, weights, biases, ours, shifts, strict=True):
            matrix = weight.T if transposed else weight.flatten(1)
            matrix = matrix if shift is None else torch.cat([matrix, shift[:, None]], 1)
            natural = -(other @ matrix @ (one if one.ndim == 2 else one.diag()))
            inner = natural if shift is None else natural[:, :-1]
            torch.testing.assert_close(found, (inner.T if transposed else inner).reshape(weight.shape))
            assert shift is None or torch.allclose(moved, natural[:, -1])
    for n in params.keys() - blocks.keys() - {bias for *_, bias in blocks.values()}:
        torch.testing.assert_close(direction[n], -grad[n] / (optimizer.state[params[n]]["diagonal"] + damping))


def test_a_layer_that_is_used_in_another_way_begins_anew() -> None:
    class Changing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(5, 5)
            self.use = 0

        def forward(self, x: Tensor) -> Tensor:
            y = self.layer(x)
            if self.use == 1:
                y = F.linear(y, self.layer.weight)  # the bias goes with half of the uses
            return y @ self.layer.weight if self.use == 2 else y

    torch.manual_seed(0)
    p = Problem(Changing(), F.mse_loss, (torch.randn(16, 5), torch.randn(16, 5)))
    optimizer = KFAC(p.model)
    weight, bias = p.model.layer.weight, p.model.layer.bias
    kronecker = {"factor_a", "factor_g", "inverse_a", "inverse_g", "rank"}
    for use, expected, size in (
        (0, {"layer.weight": (1, False, "layer.bias")}, 6),
        (1, {"layer.weight": (1, False, None)}, 5),
        (2, {}, None),
        (0, {"layer.weight": (1, False, "layer.bias")}, 6),
    ):
        p.model.use = use
        assert all(math.isfinite(loss) for loss in train(optimizer, p, 2))
        assert optimizer.param_groups[0]["blocks"] == expected
        assert optimizer.state[weight].keys() - {"update"} == (kronecker if expected else {"diagonal"})
        assert optimizer.state[bias].keys() - {"update"} == ({"diagonal"} if size != 6 else set())
        if size:
            assert optimizer.state[weight]["factor_a"].shape == (size, size)


def test_a_state_that_was_taken_is_not_changed_by_going_on() -> None:
    p = problem("text")
    optimizer = KFAC(p.model)
    before = optimizer.state_dict()
    train(optimizer, p, 1)
    assert before["param_groups"][0]["blocks"] == {}
    assert KFAC(p.model).param_groups[0]["blocks"] == {}


def test_checkpointed_layers_are_trained() -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.GRU(3, 6, batch_first=True)
            self.head = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(checkpoint(self.cell, x, use_reentrant=False)[0][:, -1])

    p = problem("GRU")
    model = Checkpointed()
    model.load_state_dict(p.model.state_dict())
    optimizer = KFAC(model)
    losses = train(optimizer, Problem(model, p.loss_fn, p.batch), 10)
    assert losses[-1] < 0.8 * losses[0]
    assert set(optimizer.param_groups[0]["blocks"]) == {"head.weight"}  # the cell's have their diagonal


def test_compiled_models_are_trained_as_they_are_written() -> None:
    p = problem("mlp, cross-entropy")
    plain, compiled = copy.deepcopy(p.model), torch.compile(p.model, backend="eager")
    runs = []
    for model in (plain, compiled):
        torch.manual_seed(0)
        runs.append(train(KFAC(model), Problem(model, p.loss_fn, p.batch), 12))
    assert runs[0] == pytest.approx(runs[1], rel=1e-4)


def test_attention_out_of_reach_of_hooks_is_trained() -> None:
    torch.manual_seed(0)
    model = SelfAttention(need_weights=True)
    x = torch.randn(16, 3, 8)
    before = snapshot(model)
    train(KFAC(model), Problem(model, F.mse_loss, (x, x.roll(1, 1))), 3)
    assert not torch.equal(before["attention.out_proj.weight"], model.attention.out_proj.weight)


def test_tied_weights_stay_tied() -> None:
    p = problem("tied weights")
    assert isinstance(p.model, Tied)
    train(KFAC(p.model), p, 3)
    assert p.model.encoder.weight is p.model.decoder.weight


def test_a_step_without_closure_and_gradients_does_nothing() -> None:
    model = mlp()
    optimizer, before = KFAC(model), snapshot(model)
    assert optimizer.step() is None
    for q in model.parameters():
        q.grad = torch.zeros_like(q)
    assert optimizer.step(None) is None
    assert same(before, snapshot(model))


def test_a_step_without_closure_but_with_gradients_is_an_error() -> None:
    model = mlp()
    optimizer = KFAC(model)
    model(torch.randn(4, 5)).sum().backward()
    with pytest.raises(TypeError, match=r"gradients alone do not say.*optimizer.step\(hesse.closure"):
        optimizer.step()


def make_frozen() -> KFAC:
    return KFAC(mlp().requires_grad_(False))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: KFAC(mlp().parameters()), TypeError, r"not its parameters.*KFAC\(model\)"),  # type: ignore[arg-type]
        (lambda: KFAC(nn.ReLU()), ValueError, "no trainable parameter"),
        (make_frozen, ValueError, "no trainable parameter"),
    ],
)
def test_a_wrong_model_is_named(make: Callable[[], KFAC], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_a_wrong_closure_is_named_before_anything_moves() -> None:
    p = problem("mlp, squared error")
    x, y = p.batch
    optimizer, before = KFAC(p.model), snapshot(p.model)
    with pytest.raises(TypeError, match=r"takes hesse.closure\(.*got function"):
        optimizer.step(lambda: torch.zeros(()))
    with pytest.raises(ValueError, match="of another model"):
        optimizer.step(hesse.closure(mlp(2), F.mse_loss, (x, y)))
    with pytest.raises(TypeError, match="no Gauss-Newton factor is known for the loss 'l1_loss'"):
        optimizer.step(hesse.closure(p.model, F.l1_loss, (x, y)))
    with pytest.warns(UserWarning, match="target size"), pytest.raises(ValueError, match="view_as"):
        optimizer.step(hesse.closure(p.model, F.mse_loss, (x, y[:, :1])))
    assert same(before, snapshot(p.model))
    losses = train(optimizer, p, 5)
    assert losses[-1] < losses[0]


def test_further_parameter_groups_are_refused() -> None:
    model = nn.Linear(2, 1)
    optimizer = hesse.optim.KFAC(model)
    with pytest.raises(ValueError, match="no further parameter groups"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})


def test_calibration_stays_in_the_range_that_can_be_left_again() -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 3)
    model = nn.Linear(3, 1)
    optimizer = hesse.optim.KFAC(model)
    optimizer.step(hesse.closure(model, nn.functional.mse_loss, (x, x @ torch.ones(3, 1))))
    assert 1e-8 <= optimizer.param_groups[0]["damping"] <= 1e4


def test_many_rejections_leave_a_damping_that_can_come_back() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    optimizer = hesse.optim.KFAC(model)
    for _ in range(60):
        optimizer.step(hesse.closure(model, nn.functional.mse_loss, (torch.full((8, 3), math.nan), torch.zeros(8, 1))))
    assert optimizer.param_groups[0]["rejections"] == 60
    assert optimizer.param_groups[0]["damping"] == 1e4


def test_settings_that_are_fixed_stay_and_schedulers_act_on_them() -> None:
    p = problem("mlp, cross-entropy")
    optimizer = KFAC(p.model, lr=0.2, momentum=0.5, damping=1e-2)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    losses = train(optimizer, p, 3)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["momentum"], group["damping"]) == (0.2, 0.5, 1e-2)
    scheduler.step()
    losses += train(optimizer, p, 3)
    assert group["lr"] == 0.1
    assert losses[-1] < losses[0]


def test_where_the_damping_is_fixed_a_step_that_is_too_long_is_shortened() -> None:
    """Otherwise every step at a damping that is too small would be rejected, for ever."""
    losses = []
    for damping in (1e-6, None):
        p = problem("convnet, grouped")
        optimizer = KFAC(p.model, damping=damping)
        losses.append(train(optimizer, p, 15))
        assert optimizer.param_groups[0]["rejections"] < 8
    assert losses[0][-1] < losses[0][0]


def test_l1_leaves_exact_zeros_and_the_optimum_of_the_penalised_loss() -> None:
    """At the optimum a weight is zero with a slope below l1, or has a slope of -l1 times its sign."""
    torch.manual_seed(0)
    x = torch.randn(200, 12, dtype=torch.float64)
    y = x[:, :3] @ torch.tensor([[2.0], [-1.0], [0.5]], dtype=torch.float64) + 0.1 * torch.randn(200, 1).double()
    model = nn.Linear(12, 1, bias=False, dtype=torch.float64)
    optimizer = KFAC(model, l1=0.2, weight_decay=0.1)
    train(optimizer, Problem(model, F.mse_loss, (x, y)), 60)
    w = model.weight.detach()
    model.zero_grad()
    F.mse_loss(model(x), y).backward()
    slope = model.weight.grad + 0.1 * w
    assert int((w == 0).sum()) >= 8
    assert bool((slope[w == 0].abs() <= 0.2).all())
    torch.testing.assert_close(slope[w != 0], -0.2 * w[w != 0].sign(), atol=1e-4, rtol=0)


def test_products_by_differences_give_way_to_exact_ones_where_they_do_not_agree() -> None:
    class Coarse(nn.Module):
        """Outputs rounded to four bits in the forward pass, as a kernel of low precision does."""

        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.linear(x)
            return y + ((8 * y).round() / 8 - y).detach()

    for model, expected in ((nn.Linear(5, 3), "differences"), (Coarse(), "forward")):
        torch.manual_seed(0)
        p = Problem(model, F.mse_loss, (torch.randn(32, 5), torch.randn(32, 3)))
        optimizer = KFAC(model)
        train(optimizer, p, 1)
        assert optimizer.param_groups[0]["products"] == expected
