"""Parameters spread over two processes train as in one, and their state goes through the distributed checkpoint."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from hesse.optim.shampoo import Shampoo
from hesse.optim.soap import SOAP
from processes import in_processes

CLASSES: dict[str, Callable[..., torch.optim.Optimizer]] = {"SOAP": SOAP, "Shampoo": Shampoo}
SETTINGS: dict[str, Any] = {"lr": 0.01, "max_dim": 8, "weight_decay": 0.1, "l1": 1e-3, "period": 4}
STEPS, RESUMED = 9, 5
FULL = StateDictOptions(full_state_dict=True)

# Two processes add their halves of a gradient in another order: rounding of 1e-16, divided by a shift of 3e-4 where a
# basis is arbitrary but for that, and what nine steps make of it.
CLOSE = {"rtol": 1e-9, "atol": 1e-11}


class Net(nn.Module):
    """Weights that two processes share unevenly, one row apiece or none, a vector, a kernel and a scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Conv1d(1, 3, 2)
        self.hidden = nn.Linear(15, 9)
        self.again = nn.Linear(9, 9)
        self.scale = nn.Parameter(torch.ones(1))
        self.head = nn.Linear(9, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.hidden(self.kernel(x[:, None]).flatten(1)).tanh()
        return self.scale * self.head(self.again(x).tanh())


def begin(sharded: bool) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model, x = Net().double(), torch.randn(16, 6, dtype=torch.float64)
    if sharded:
        fully_shard(model.hidden)
        fully_shard(model)
    return model, x, x.sin().sum(1, keepdim=True)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        optimizer.step()


def _rank(folder: str, rank: int, _: int) -> dict[str, Any]:
    return {name: _train_sharded(cls, rank, f"{folder}/{name}") for name, cls in CLASSES.items()}


def _train_sharded(cls: Callable[..., torch.optim.Optimizer], rank: int, folder: str) -> dict[str, Any]:
    model, x, y = begin(sharded=True)
    x, y = x.chunk(2)[rank], y.chunk(2)[rank]  # the two processes' gradients are averaged
    optimizer = cls(model.parameters(), **SETTINGS)
    train(model, optimizer, x, y, RESUMED)
    state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    checkpoint.save(state, checkpoint_id=folder)
    kinds = {type(value) for state in optimizer.state.values() for name, value in state.items() if name != "step"}
    train(model, optimizer, x, y, STEPS - RESUMED)

    resumed, *_ = begin(sharded=True)
    with torch.no_grad():
        for p in resumed.parameters():
            p.add_(1.0)
    second = cls(resumed.parameters(), **SETTINGS)
    state = dict(zip(("model", "optimizer"), get_state_dict(resumed, second), strict=True))
    checkpoint.load(state, checkpoint_id=folder)
    set_state_dict(resumed, second, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    train(resumed, second, x, y, STEPS - RESUMED)

    broken = {name: p.full_tensor().clone() for name, p in model.named_parameters()}
    optimizer.zero_grad()
    F.mse_loss(model(x), y * (torch.nan if rank == 1 else 1.0)).backward()  # in one of the two
    optimizer.step()
    untouched = all(torch.equal(broken[name], p.full_tensor()) for name, p in model.named_parameters())
    return {
        "model": get_model_state_dict(model, options=FULL),
        "state": get_optimizer_state_dict(model, optimizer, options=FULL)["state"],
        "resumed": get_model_state_dict(resumed, options=FULL),
        "all are DTensors": kinds == {DTensor},
        "counters are plain": all(type(state["step"]) is Tensor for state in optimizer.state.values()),
        "untouched": untouched,
        "rejections": optimizer.param_groups[0]["rejections"],
    }


@pytest.fixture(scope="module")
def of_two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What the first of two processes has; full state dicts are collected there."""
    folder = tmp_path_factory.mktemp("sharded")
    return in_processes(functools.partial(_rank, str(folder)), folder)[0]


@pytest.mark.parametrize("name", CLASSES)
def test_two_processes_are_one(name: str, of_two: dict[str, dict[str, Any]]) -> None:
    model, x, y = begin(sharded=False)
    optimizer = CLASSES[name](model.parameters(), **SETTINGS)
    train(model, optimizer, x, y, STEPS)
    found = of_two[name]
    for key, value in model.state_dict().items():
        torch.testing.assert_close(found["model"][key], value, **CLOSE)
        start = begin(sharded=False)[0].state_dict()[key]
        assert not torch.equal(value, start)
    for key, p in model.named_parameters():
        state = optimizer.state[p]
        assert found["state"][key].keys() == state.keys()
        for part, value in state.items():
            other = found["state"][key][part]
            assert type(other) is Tensor
            torch.testing.assert_close(other.abs(), value.abs(), rtol=1e-6, atol=1e-8)  # an eigenvector's sign is free


@pytest.mark.parametrize("name", CLASSES)
def test_a_run_resumed_from_the_distributed_checkpoint_is_uninterrupted(
    name: str, of_two: dict[str, dict[str, Any]]
) -> None:
    for key, value in of_two[name]["model"].items():
        assert torch.equal(of_two[name]["resumed"][key], value)


@pytest.mark.parametrize("name", CLASSES)
def test_state_is_distributed_tensors_beside_a_plain_counter(name: str, of_two: dict[str, dict[str, Any]]) -> None:
    assert of_two[name]["all are DTensors"]
    assert of_two[name]["counters are plain"]


@pytest.mark.parametrize("name", CLASSES)
def test_a_gradient_that_is_broken_in_one_process_stops_both(name: str, of_two: dict[str, dict[str, Any]]) -> None:
    assert of_two[name]["untouched"]
    assert of_two[name]["rejections"] == 1


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")  # as intended
@pytest.mark.parametrize("name", CLASSES)
def test_the_distributed_checkpoint_brings_one_process_back_too(name: str, tmp_path: Path) -> None:
    model, x, y = begin(sharded=False)
    optimizer = CLASSES[name](model.parameters(), **SETTINGS)
    train(model, optimizer, x, y, RESUMED)
    state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    checkpoint.save(state, checkpoint_id=tmp_path, no_dist=True)
    train(model, optimizer, x, y, STEPS - RESUMED)

    resumed, *_ = begin(sharded=False)
    second = CLASSES[name](resumed.parameters(), **SETTINGS)
    state = dict(zip(("model", "optimizer"), get_state_dict(resumed, second), strict=True))
    checkpoint.load(state, checkpoint_id=tmp_path, no_dist=True)
    set_state_dict(resumed, second, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    train(resumed, second, x, y, STEPS - RESUMED)
    for p, q in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q)
