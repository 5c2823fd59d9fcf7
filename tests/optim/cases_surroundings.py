"""Cases of the contract that look at where steps come from: frameworks, precisions, odd parameters, bad batches."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

import hesse
from optim.cases_steps import close
from optim.contract import Row, backward, closure_of, double, same, snapshot, train
from problems import Problem, Tied, Unused, problem

__all__ = ["SURROUNDINGS"]


def wrapper(model: nn.Module, optimizer: Optimizer, closure: Callable[[], Any]) -> Any:
    """What Lightning puts between an optimiser and the user's closure."""
    result = closure()
    assert all(p.grad is not None for p in model.parameters())
    return result


def lightnings_closure(row: Row) -> None:
    p, other = double(), double()
    one, two = row.of(p.model), row.of(other.model)
    for seed in range(5):
        torch.manual_seed(seed)  # some draw from torch's generator
        loss = one.step(functools.partial(wrapper, p.model, one, closure_of(p)))
        assert loss is not None
        torch.manual_seed(seed)
        two.step(closure_of(other))
    close(p.model, other.model)


def skorchs_closure(row: Row) -> None:
    p = problem("mlp, cross-entropy")
    optimizer = row.of(p.model)

    def step_fn() -> Tensor:
        optimizer.zero_grad()
        return backward(p)

    losses = [float(optimizer.step(step_fn)) for _ in range(8)]
    assert losses[-1] < losses[0]


def accelerates_exchange(row: Row) -> None:
    """The state goes out and in at the start, and the parameters become other objects."""
    p, other = double(), double()
    one, two = row.of(p.model), row.of(other.model)
    one.load_state_dict(one.state_dict())
    for module in p.model.modules():
        for name, q in list(module.named_parameters(recurse=False)):
            new = nn.Parameter(q.detach().clone())
            setattr(module, name, new)
            for group in one.param_groups:
                group["params"] = [new if old is q else old for old in group["params"]]
    assert train(one, p, 5) == train(two, other, 5)
    assert same(p.model, other.model)


def bfloat16_parameters(row: Row) -> None:
    p = problem("mlp, cross-entropy")
    x, y = p.batch
    p = Problem(p.model.bfloat16(), p.loss_fn, (x.bfloat16(), y))
    losses = train(row.of(p.model), p, 15)
    assert losses[-1] < losses[0]
    assert all(q.dtype == torch.bfloat16 for q in p.model.parameters())


def autocast(row: Row) -> None:
    p = problem("mlp, cross-entropy")
    optimizer, losses = row.of(p.model), []
    torch.manual_seed(0)
    for _ in range(15):
        with torch.autocast("cpu", torch.bfloat16):
            losses.append(float(optimizer.step(closure_of(p))))
    assert losses[-1] < losses[0]
    assert all(q.dtype == torch.float32 for q in p.model.parameters())


def grad_scaler(row: Row) -> None:
    p, other = double(), double()
    one, two = row.of(p.model), row.of(other.model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for optimizer, q in ((one, p), (two, other)):
        if row.looks:
            row.gradient_step(optimizer, q)
    x, y = p.batch
    for i in range(2):
        one.zero_grad()
        scaler.scale(p.loss_fn(p.model(x), y)).backward()
        if i == 1:
            p.model[0].weight.grad[0, 0] = math.inf
        before = snapshot(p.model)
        scaler.step(one)
        scaler.update()
        assert same(before, snapshot(p.model)) == (i == 1)  # what overflowed is not taken
    row.gradient_step(two, other)
    close(p.model, other.model)


def unused_parameters(row: Row) -> None:
    torch.manual_seed(0)
    p = Problem(Unused(), F.mse_loss, (torch.randn(16, 5), torch.randn(16, 3)))
    before, losses = snapshot(p.model), train(row.of(p.model, **no_decay(row)), p, 6)
    moved = {name.split(".")[0] for name, value in snapshot(p.model).items() if not torch.equal(value, before[name])}
    assert moved == {"used"}
    assert losses[-1] < losses[0]


def no_decay(row: Row) -> dict[str, Any]:
    return {"weight_decay": 0.0} if "weight_decay" in row.offers else {}


class Ignored(nn.Module):
    """A scale that the loss sees times nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 3)
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + 0.0 * self.scale


def zero_gradient(row: Row) -> None:
    torch.manual_seed(0)
    p = Problem(Ignored(), F.mse_loss, (torch.randn(16, 5), torch.randn(16, 3)))
    losses = train(row.of(p.model, **no_decay(row)), p, 6)
    assert losses[-1] < losses[0]
    assert torch.equal(p.model.scale, torch.ones(3))


def frozen_in_between(row: Row) -> None:
    p = problem("mlp, cross-entropy")
    optimizer = row.of(p.model, **no_decay(row))
    train(optimizer, p, 3)
    p.model[0].weight.requires_grad_(False)
    before = snapshot(p.model)
    losses = train(optimizer, p, 4)
    assert losses[-1] < losses[0]
    still = [name for name, value in snapshot(p.model).items() if torch.equal(value, before[name])]
    assert still == ["0.weight"]
    p.model[0].weight.requires_grad_(True)
    train(optimizer, p, 2)
    assert not torch.equal(before["0.weight"], p.model[0].weight)


class Words(nn.Module):
    def __init__(self, sparse: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(12, 6, sparse=sparse)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embedding(x)).mean(1))


def sparse_gradients(row: Row) -> None:
    models = []
    for sparse in (True, False):
        torch.manual_seed(0)
        model, x = Words(sparse).double(), torch.randint(8, (24, 5))
        losses = train(row.of(model), Problem(model, F.cross_entropy, (x, x[:, 0] % 3)), 6)
        assert losses[-1] < losses[0]
        models.append(model)
    close(*models)


def tied_parameters(row: Row) -> None:
    p = problem("tied weights")
    assert isinstance(p.model, Tied)
    losses = train(row.of(p.model), p, 8)
    assert losses[-1] < losses[0]
    assert p.model.encoder.weight is p.model.decoder.weight


def batches_that_are_not_finite(row: Row) -> None:
    for value in (math.nan, math.inf):
        for when in (0, 4):
            p = problem("mlp, squared error")
            optimizer = row.of(p.model)
            train(optimizer, p, when)
            before, state = snapshot(p.model), {q: dict(optimizer.state[q]) for q in p.model.parameters()}
            state = {q: {key: v.clone() for key, v in values.items()} for q, values in state.items()}
            x, y = p.batch
            broken = x.clone()
            broken[3, 0] = value
            count = optimizer.param_groups[0]["rejections"]
            loss = optimizer.step(hesse.closure(p.model, p.loss_fn, (broken, y)))
            assert not math.isfinite(float(loss)) or value == math.inf  # tanh(inf) is 1
            if not math.isfinite(float(loss)) or any(not bool(q.grad.isfinite().all()) for q in p.model.parameters()):
                assert same(before, snapshot(p.model))
                assert optimizer.param_groups[0]["rejections"] == count + 1
                for q, values in state.items():
                    kept = values.keys() & optimizer.state[q].keys() if "groups" not in row.offers else values.keys()
                    assert all(same(values[key], optimizer.state[q][key]) for key in kept)
            losses = train(optimizer, p, 8)
            assert losses[-1] < losses[0]


class Odd(nn.Module):
    """An empty parameter, a scalar, and ordinary ones."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 3)
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.empty = nn.Parameter(torch.empty(0))
        self.flat = nn.Parameter(torch.empty(3, 0))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.linear(x) + self.empty.sum() + self.flat.sum(1)


def empty_and_scalar_parameters(row: Row) -> None:
    torch.manual_seed(0)
    p = Problem(Odd(), F.mse_loss, (torch.randn(16, 5), torch.randn(16, 3)))
    losses = train(row.of(p.model), p, 12)
    assert losses[-1] < losses[0]
    assert float(p.model.scale.detach()) != 1.0
    assert p.model.empty.shape == (0,)


def model_moved(row: Row) -> None:
    p = problem("mlp, cross-entropy")
    optimizer = row.of(p.model)
    train(optimizer, p, 4)
    places: list[Any] = [torch.float64, *(["cuda"] if torch.cuda.is_available() else [])]
    for place in places:
        x, y = p.batch
        x, y = x.to(place), y if isinstance(place, torch.dtype) else y.to(place)
        p = Problem(p.model.to(place), p.loss_fn, (x, y))
        losses = train(optimizer, p, 6)
        assert losses[-1] < losses[0]


def compiled_model(row: Row) -> None:
    p, other = double(), double()
    compiled = torch.compile(other.model, backend="eager")
    one = train(row.of(p.model), p, 6)
    two = train(row.of(compiled), Problem(compiled, other.loss_fn, other.batch), 6)
    assert one == pytest.approx(two, rel=1e-6)
    close(p.model, other.model)


class ComplexModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.spectrum = nn.Parameter(torch.zeros(3, dtype=torch.complex64))


def complex_parameters(row: Row) -> None:
    model = ComplexModel()
    with pytest.raises(TypeError, match=r"'spectrum'.*complex"):
        row.on(model.named_parameters()) if "groups" in row.offers else row.of(model)


SURROUNDINGS: dict[str, tuple[Callable[..., None], set[str]]] = {
    "Lightning's closure": (lightnings_closure, set()),
    "skorch's closure": (skorchs_closure, set()),
    "Accelerate's exchange": (accelerates_exchange, set()),
    "bfloat16 parameters": (bfloat16_parameters, set()),
    "autocast": (autocast, set()),
    "GradScaler": (grad_scaler, set()),
    "unused parameters": (unused_parameters, set()),
    "zero gradient": (zero_gradient, set()),
    "frozen in between": (frozen_in_between, set()),
    "sparse gradients": (sparse_gradients, {"guarded"}),
    "tied parameters": (tied_parameters, set()),
    "batches that are not finite": (batches_that_are_not_finite, {"guarded"}),
    "empty and scalar parameters": (empty_and_scalar_parameters, set()),
    "model moved": (model_moved, set()),
    "compiled model": (compiled_model, set()),
    "complex parameters": (complex_parameters, {"guarded"}),
}
