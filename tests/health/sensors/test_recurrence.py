"""Gradients over time, against those of an unrolled net whose states keep their gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from hesse.health.sensors.functional import Calls
from hesse.health.sensors.recurrence import Recurrence


def heard(model: nn.Module, *inputs: Any, loss: Callable[[Any], Tensor] = lambda y: y.square().sum()) -> dict[str, Any]:
    """What the sensor reads of one pass, gradients as lists."""
    calls = Calls(model)
    sensor = Recurrence(model, [], calls)
    calls.listen()
    sensor.listen()
    output = model(*inputs)
    calls.rest(inputs, output)
    sensor.rest()
    loss(output).backward()
    reading = sensor.read()
    assert not any(module._forward_pre_hooks for module in model.modules())
    return {path: numbers["grad"].tolist() for path, numbers in reading.items()}  # type: ignore[union-attr]


class Last(nn.Module):
    """The last output of a fused recurrence."""

    def __init__(self, rnn: nn.RNNBase) -> None:
        super().__init__()
        self.rnn = rnn

    def forward(self, x: Tensor) -> Tensor:
        y = self.rnn(x)[0]
        return y[:, -1] if self.rnn.batch_first and x.dim() == 3 else y[-1]


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU], ids=["rnn", "lstm", "gru"])
@pytest.mark.parametrize("batch_first", [False, True], ids=["time first", "batch first"])
def test_fused_modules(kind: type[nn.RNNBase], batch_first: bool) -> None:
    torch.manual_seed(0)
    model = Last(kind(3, 5, num_layers=2, batch_first=batch_first))
    x = torch.randn(4, 12, 3) if batch_first else torch.randn(12, 4, 3)
    found = heard(model, x)
    seen = x.clone().requires_grad_()
    model(seen).square().sum().backward()
    assert seen.grad is not None
    assert found["rnn"] == pytest.approx(seen.grad.abs().sum((0, 2) if batch_first else (1, 2)).tolist(), rel=1e-4)
    assert x.grad is None and not x.requires_grad


def test_a_fused_input_that_has_a_gradient_of_its_own_gets_it_all_the_same() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), Last(nn.GRU(3, 4, batch_first=True)))
    x = torch.randn(5, 9, 2)
    model(x).square().sum().backward()
    plain = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    assert len(heard(model, x)["1.rnn"]) == 9
    again = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(torch.equal(a, b) for a, b in zip(again, plain, strict=True))


def test_packed_sequences_and_single_ones() -> None:
    torch.manual_seed(0)
    rnn = nn.GRU(3, 4, batch_first=True)

    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = rnn

        def forward(self, x: Tensor) -> Tensor:
            lengths = torch.tensor([9, 4])
            return self.rnn(pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False))[1]

    x = torch.randn(2, 10, 3)
    seen = x.clone().requires_grad_()
    found = heard(Packed(), x)["rnn"]
    Packed()(seen).square().sum().backward()
    assert seen.grad is not None
    assert found == pytest.approx(seen.grad.abs().sum((0, 2))[:9].tolist(), rel=1e-4)
    assert len(heard(Last(rnn), torch.randn(10, 3))["rnn"]) == 10


class Loop(nn.Module):
    """A recurrence of one's own: with a cell, with a linear layer, with a raw or a parametrized weight."""

    def __init__(self, kind: str, head_each_step: bool = False) -> None:
        super().__init__()
        self.kind = kind
        self.inward = nn.Linear(3, 4)
        self.head = nn.Linear(4, 2)
        self.head_each_step = head_each_step
        if kind == "cell":
            self.cell = nn.LSTMCell(3, 4)
        elif kind == "raw":
            self.weight = nn.Parameter(0.5 * torch.randn(4, 4))
        else:
            self.recur = nn.Linear(4, 4)
        if kind == "parametrized":
            nn.utils.parametrizations.weight_norm(self.recur)
        self.states: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        h = c = x.new_zeros(x.shape[0], 4)
        self.states, outputs = [], []
        for step in x.unbind(1):
            if self.kind == "cell":
                h, c = self.cell(step, (h, c))
            else:
                back = h @ self.weight.T if self.kind == "raw" else self.recur(h)
                back.retain_grad() if back.requires_grad else None
                self.states.append(back)
                h = torch.tanh(self.inward(step) + back)
            outputs.append(self.head(h))
        return torch.stack(outputs, 1) if self.head_each_step else outputs[-1]


@pytest.mark.parametrize(("kind", "where"), [("linear", "recur"), ("raw", "Loop"), ("parametrized", "recur")], ids=str)
@pytest.mark.parametrize("head_each_step", [False, True], ids=["last output", "every output"])
def test_loops(kind: str, where: str, head_each_step: bool) -> None:
    torch.manual_seed(0)
    model = Loop(kind, head_each_step)
    found = heard(model, torch.randn(5, 20, 3))
    true = [h.grad.abs().sum().item() for h in model.states if h.grad is not None]
    assert list(found) == [where]
    assert found[where] == pytest.approx(true, rel=1e-4)


def test_cells() -> None:
    torch.manual_seed(0)
    found = heard(Loop("cell"), torch.randn(5, 20, 3))
    assert list(found) == ["cell"] and len(found["cell"]) == 20
    assert found["cell"] == sorted(found["cell"])  # it forgets


def test_long_sequences_are_thinned_and_keep_both_ends_and_what_is_nearly_gone() -> None:
    torch.manual_seed(0)
    model = Last(nn.LSTM(3, 4, batch_first=True))
    x = torch.randn(2, 150, 3)
    found = heard(model, x)["rnn"]
    seen = x.clone().requires_grad_()
    model(seen).square().sum().backward()
    assert seen.grad is not None
    true = seen.grad.abs().sum((0, 2)).tolist()
    assert len(found) == 32
    assert (found[0], found[-1]) == (pytest.approx(true[0], rel=1e-3), pytest.approx(true[-1], rel=1e-3))
    assert 0 < found[0] < 1e-25


class Views(nn.Module):
    """One encoder for many views, side by side: shared, not recurrent."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = nn.Linear(3, 4), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.head(self.encoder(view).relu()) for view in x.unbind(1)]).sum(0)


@pytest.mark.parametrize(
    ("model", "x"),
    [
        (Views(), torch.ones(2, 12, 3)),
        (nn.Sequential(*[nn.Linear(3, 3) for _ in range(20)]), torch.ones(2, 3)),
        (nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 8, batch_first=True), 9), torch.ones(2, 12, 8)),
        (Loop("linear"), torch.ones(2, 7, 3)),
    ],
    ids=["views", "depth", "transformer", "few steps"],
)
def test_what_is_not_recurrent_is_not_heard(model: nn.Module, x: Tensor) -> None:
    assert heard(model, x) == {}


def test_a_block_shared_along_the_depth_is_a_recurrence() -> None:
    block = nn.Linear(3, 3)
    found = heard(nn.Sequential(*[part for _ in range(12) for part in (block, nn.Tanh())]), torch.ones(2, 3))
    assert len(found["0"]) == 12


def test_graphs_without_recurrence_are_not_searched_for_ever_and_resume_knows() -> None:
    model = Loop("linear")
    calls = Calls(model)
    sensor = Recurrence(model, [], calls)
    lengths = [2, 2, 2, 20]
    for length in lengths:
        calls.listen()
        sensor.listen()
        output = model(torch.randn(1, length, 3))
        calls.rest((), output)
        sensor.rest()
        output.sum().backward()
    assert sensor.read() == {}
    again = Recurrence(model, [], Calls(model))
    again.load_state_dict(sensor.state_dict())
    assert again.state_dict() == sensor.state_dict() == {"barren": 3}


def test_evaluation_leaves_the_input_alone() -> None:
    model = Last(nn.GRU(3, 4, batch_first=True))
    calls = Calls(model)
    sensor = Recurrence(model, [], calls)
    sensor.listen()
    with torch.no_grad():
        assert not model(torch.ones(2, 9, 3)).requires_grad
    sensor.rest()
    assert sensor.read() == {}
