"""Hessian products against differences of gradients in float64, for every kind of layer, mode and precision."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from hesse.curvature import hessian
from hesse.curvature.hessian import MODES
from hesse.objective import Objective
from oracles import gradient_differences
from problems import PROBLEMS, Problem, as_double, mlp, problem, still, vectors
from tolerances import ALGEBRA, DIFFERENCES, ROUNDING


def operator_and_oracle(made: Problem, **options: Any) -> tuple[Any, Objective]:
    """Both draw the same random numbers in random layers."""
    torch.manual_seed(5)
    operator = hessian(*made, **options)
    torch.manual_seed(5)
    return operator, Objective(made.model, made.loss_fn, *made.batch)


@pytest.mark.parametrize("name", PROBLEMS)
def test_products_are_differences_of_gradients(name: str) -> None:
    made = as_double(problem(name))
    operator, objective = operator_and_oracle(made)
    v = vectors(operator.shape[0], 2)
    expected = torch.stack([gradient_differences(objective, column) for column in still(made, v).T], dim=1)
    torch.testing.assert_close(operator @ v, expected, **DIFFERENCES)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["mlp, cross-entropy", "convnet, BatchNorm", "transformer", "LSTM", "weight norm"])
def test_modes_agree(name: str, mode: str) -> None:
    made = as_double(problem(name))
    operator, objective = operator_and_oracle(made, mode=mode)
    assert operator.mode == mode
    v = vectors(operator.shape[0], 1)[:, 0]
    torch.testing.assert_close(operator @ v, gradient_differences(objective, still(made, v)), **DIFFERENCES)


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_dense_matrix_is_symmetric_and_blocks_are_its_parts(name: str) -> None:
    made = as_double(problem(name))
    operator, _ = operator_and_oracle(made)
    dense = operator.dense()
    torch.testing.assert_close(dense, dense.T, **ALGEBRA)
    first = next(iter(operator.layout.shapes))
    rows = operator.layout.slices[first]
    block = operator.block(first)
    assert list(block.layout.shapes) == [first]
    torch.testing.assert_close(block.dense(), dense[rows, rows], **ALGEBRA)


def test_flat_vectors_columns_and_dicts_are_the_same_product() -> None:
    operator, _ = operator_and_oracle(as_double(problem("mlp, cross-entropy")))
    v = vectors(operator.shape[0], 40)
    together = operator @ v
    torch.testing.assert_close(torch.stack([operator @ c for c in v.T], 1), together, **ALGEBRA)
    named = operator @ operator.layout.split(v[:, 0])
    assert {name: x.shape for name, x in named.items()} == operator.layout.shapes
    torch.testing.assert_close(operator.layout.flatten(named), together[:, 0], **ALGEBRA)
    columns = operator @ operator.layout.split(v)
    torch.testing.assert_close(operator.layout.flatten(columns), together, **ALGEBRA)


@pytest.mark.parametrize("way", ["one by one", "kept graph", "forward over reverse"])
def test_blocks_of_columns_are_single_products(way: str) -> None:
    operator, _ = operator_and_oracle(as_double(problem("transformer, eval")))
    v = vectors(operator.shape[0], 33)
    operator._way = way
    torch.testing.assert_close((operator @ v)[:, ::16], operator @ v[:, ::16], **ALGEBRA)


def test_a_linear_model_in_closed_form() -> None:
    x = vectors(6, 3)
    operator = hessian(nn.Linear(3, 1, bias=False).double(), F.mse_loss, (x, torch.zeros(6, 1, dtype=torch.float64)))
    torch.testing.assert_close(operator.dense(), 2 * x.T @ x / 6, **ALGEBRA)
    assert (operator.symmetric, operator.psd) == (True, False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precisions_give_float32_products(dtype: torch.dtype) -> None:
    made = problem("text")
    low = copy.deepcopy(made.model).to(dtype)
    operator = hessian(low, made.loss_fn, made.batch)
    exact = hessian(copy.deepcopy(low).double(), made.loss_fn, made.batch)
    v = vectors(operator.shape[0], 1)[:, 0]
    found = operator @ v
    assert operator.dtype == found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact @ v, rtol=1e-3, atol=1e-5)
    assert all(p.dtype == dtype for p in low.parameters())


def test_the_model_is_left_as_it_was() -> None:
    made = problem("convnet, BatchNorm")
    before = {name: x.clone() for name, x in made.model.state_dict().items()}
    operator = hessian(*made)
    _ = operator @ torch.ones(operator.shape[0])
    assert all(torch.equal(x, before[name]) for name, x in made.model.state_dict().items())
    assert all(p.grad is None for p in made.model.parameters())
    assert not any(m._forward_hooks for m in made.model.modules())


def test_hooks_count() -> None:
    made = as_double(problem("mlp, cross-entropy"))
    made.model[0].register_forward_hook(lambda module, args, output: output**2)
    operator, objective = operator_and_oracle(made)
    v = vectors(operator.shape[0], 1)[:, 0]
    torch.testing.assert_close(operator @ v, gradient_differences(objective, v), **DIFFERENCES)


class Checkpointed(nn.Module):
    """Its hidden layer, with BatchNorm and dropout, is computed again during backward."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Tanh())
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(self.hidden, x, use_reentrant=False))


def test_activation_checkpointing() -> None:
    torch.manual_seed(0)
    model, x = Checkpointed().double(), torch.randn(12, 5, dtype=torch.float64)
    made = Problem(model, F.cross_entropy, (x, x[:, :3].argmax(1)))
    before = {name: b.clone() for name, b in model.named_buffers()}
    operator, objective = operator_and_oracle(made)
    v = vectors(operator.shape[0], 2)
    expected = torch.stack([gradient_differences(objective, c) for c in v.T], 1)
    torch.testing.assert_close(operator @ v, expected, **DIFFERENCES)
    assert all(torch.equal(b, before[name]) for name, b in model.named_buffers())


def test_unreached_parameters_have_rows_of_zeros_and_are_named() -> None:
    from problems import Unused

    torch.manual_seed(0)
    model, x = Unused(), torch.randn(8, 5)
    operator = hessian(model, F.cross_entropy, (x, x[:, :3].argmax(1)))
    assert operator.unreached == [f"{m}.{p}" for m in ("never_called", "called_in_vain") for p in ("weight", "bias")]
    assert not operator.block("never_called.*").dense().any()
    assert operator.block("used.*").dense().any()


def test_frozen_parameters_are_no_rows() -> None:
    made = problem("mlp, cross-entropy")
    made.model[0].requires_grad_(False)
    operator = hessian(*made)
    assert list(operator.layout.shapes) == ["2.weight", "2.bias"]
    assert operator.shape == (27, 27)


def test_a_stale_operator_says_so() -> None:
    made = problem("mlp, cross-entropy")
    operator = hessian(*made)
    torch.optim.SGD(made.model.parameters(), lr=0.1).step(lambda: _backward(made))
    with pytest.raises(RuntimeError, match="parameters have changed since this operator was made"):
        operator @ torch.ones(operator.shape[0])


def _backward(made: Problem) -> float:
    loss = made.loss_fn(made.model(made.batch[0]), made.batch[1])
    loss.backward()
    return float(loss.detach())


def _nan(module: nn.Sequential) -> nn.Module:
    nn.init.constant_(module[2].weight, float("nan"))
    return module


class Divides(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / (x * 0)


X, Y = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 0, 1, 2])
CE = F.cross_entropy
BAD: dict[str, tuple[Callable[[], tuple[Any, ...]], type[Exception], str]] = {
    "no module": (lambda: (mlp().parameters(), CE, (X, Y)), TypeError, "is a torch.nn.Module"),
    "no loss": (lambda: (mlp(), "mse", (X, Y)), TypeError, "loss_fn must be callable"),
    "no batch": (lambda: (mlp(), CE, []), ValueError, "there is no batch"),
    "an iterator": (lambda: (mlp(), CE, iter([(X, Y)])), TypeError, "gone through only once"),
    "empty batch": (lambda: (mlp(), CE, (X[:0], Y[:0])), ValueError, "batch is empty"),
    "loss of many": (lambda: (mlp(), lambda o, t: o.square(), (X, Y)), ValueError, r"one number; got \[6, 3\]"),
    "loss cut off": (lambda: (mlp(), lambda o, t: CE(o.detach(), t), (X, Y)), ValueError, "depends on no trainable"),
    "NaN in the batch": (lambda: (mlp(), CE, (X * torch.nan, Y)), ValueError, "loss is nan.*the input has"),
    "NaN in the model": (lambda: (_nan(mlp()), CE, (X, Y)), ValueError, "parameter '2.weight' has"),
    "NaN made within": (
        lambda: (nn.Sequential(mlp(), Divides()), CE, (X, Y)),
        ValueError,
        r"'1' \(Divides\) is the first",
    ),
    "all frozen": (lambda: (mlp().requires_grad_(False), CE, (X, Y)), ValueError, "no trainable parameter"),
    "no shape yet": (lambda: (nn.Sequential(nn.LazyLinear(3)), CE, (X, Y)), ValueError, "has no shape yet"),
    "complex": (lambda: (nn.Linear(5, 3, dtype=torch.cfloat), _size, (X + 0j, Y)), TypeError, "is complex"),
    "random loss": (lambda: (mlp(), lambda o, t: CE(o, t) * random.random(), (X, Y)), ValueError, "not the same twice"),
}


def _size(outputs: Tensor, targets: Tensor) -> Tensor:
    return outputs.abs().sum()


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
@pytest.mark.parametrize("name", BAD)
def test_bad_input_gets_a_sentence(name: str) -> None:
    make, kind, message = BAD[name]
    with pytest.raises(kind, match=message):
        hessian(*make())


def test_bad_vectors_and_names() -> None:
    operator = hessian(mlp(), F.cross_entropy, (X, Y))
    n = operator.shape[0]
    with pytest.raises(ValueError, match=rf"{n} rows .* got shape \[3\]"):
        operator @ torch.ones(3)
    with pytest.raises(ValueError, match=r"missing \['0.bias'"):
        operator @ {"0.weight": torch.ones(8, 5)}
    with pytest.raises(ValueError, match=r"named like 'encoder.\*'. The names are: 0.weight"):
        operator.block("encoder.*")
    with pytest.raises(ValueError, match="mode must be 'auto' or one of 'double-backward'"):
        hessian(mlp(), F.cross_entropy, (X, Y), mode="reverse")
    product = operator @ torch.ones(n, requires_grad=True)
    assert not product.requires_grad
    torch.testing.assert_close(product, operator @ torch.ones(n, dtype=torch.float64), **ROUNDING[torch.float32])
    with pytest.raises(TypeError, match=r"got torch.int64. Cast it"):
        operator @ torch.ones(n, dtype=torch.int64)


def test_an_input_of_no_columns_beside_others_is_no_empty_batch() -> None:
    class Beside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 2)

        def forward(self, numbers: Tensor, codes: Tensor) -> Tensor:
            return self.linear(torch.cat([numbers, codes], dim=1))

    model = Beside()
    x, y = torch.randn(5, 3), torch.tensor([0, 1, 1, 0, 1])
    beside = hessian(model, CE, ((x, torch.zeros(5, 0)), y))
    alone = hessian(model.linear, CE, (x, y))
    torch.testing.assert_close(beside.dense(), alone.dense())
