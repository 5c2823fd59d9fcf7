"""hesse.check.passes.operations: stops are noted at the user's line; only those whose value matters are blamed."""

from __future__ import annotations

import copy
import linecache
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hesse
from hesse.check import gradients
from hesse.check.passes.operations import Operations, Stop


class Net(nn.Module):
    """``forward(self, *inputs)`` on the modules, parameters and buffers it is given."""

    def __init__(self, forward: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)
        self.run = forward

    def forward(self, *inputs: Any) -> Any:
        return self.run(self, *inputs)


def around(middle: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), middle, nn.Tanh(), nn.Linear(8, 1))


def loss_of(net: Net, x: Tensor) -> Tensor:
    return net.body(x).square().mean()


# ---- what is noted ---------------------------------------------------------------------------------------


def stops(function: Callable[[Tensor], Any]) -> list[Stop]:
    found: list[Stop] = []

    def note(stop: Stop, result: Any) -> Any:
        found.append(stop)
        return result

    with Operations(lambda: "here", note):
        function(torch.randn(3, 4, requires_grad=True) * 1)
    return found


def under_no_grad(x: Tensor) -> Tensor:
    with torch.no_grad():
        return (x * 2).sin()


def copied(x: Tensor) -> Tensor:
    with pytest.warns(UserWarning, match="copy construct"):
        return torch.tensor(x)


NOTED: dict[str, tuple[Callable[[Tensor], Any], list[str]]] = {
    "detach": (lambda x: x.detach(), ["Tensor.detach"]),
    "data": (lambda x: x.data, ["Tensor.data"]),
    "item": (lambda x: x.sum().item(), ["Tensor.item"]),
    "float": (lambda x: float(x.detach().sum()), ["Tensor.detach"]),
    "tolist": (lambda x: x.tolist(), ["Tensor.tolist"]),
    "tensor": (copied, ["torch.tensor"]),
    "no_grad": (under_no_grad, ["no_grad"]),
    "arithmetic": (lambda x: (x @ x.T).relu().sum(), []),
    "shape only": (lambda x: torch.zeros_like(x) + x.new_ones(4) + x.shape[0], []),
    "choices": (lambda x: x[x > 0].sum() + x.argmax() + x.round(), []),
}


@pytest.mark.parametrize("name", NOTED)
def test_stops_are_noted_at_the_line_of_the_call(name: str) -> None:
    function, operations = NOTED[name]
    found = stops(function)
    assert [stop.operation for stop in found] == operations
    code = function.__code__
    for stop in found:
        assert stop.file == __file__ and stop.path == "here"
        assert stop.line is not None and code.co_firstlineno <= stop.line <= code.co_firstlineno + 3


def test_the_line_of_a_block_is_that_of_its_with() -> None:
    (stop,) = stops(under_no_grad)
    assert stop.file is not None and stop.line is not None
    assert "with torch.no_grad" in linecache.getline(stop.file, stop.line)


def test_a_value_that_meets_its_parameters_again_is_recurrent() -> None:
    w = nn.Parameter(torch.randn(4, 4))
    other = nn.Parameter(torch.randn(4, 4))
    (again,) = stops(lambda x: ((x @ w).detach() + 1) @ w)
    (elsewhere,) = stops(lambda x: ((x @ w).detach() + 1) @ other)
    assert again.recurrent and not elsewhere.recurrent


# ---- who is blamed ---------------------------------------------------------------------------------------


def centred(net: Net, x: Tensor) -> Tensor:
    return (x - x.mean(0).detach()) * net.scale


def scaled_without(net: Net, x: Tensor) -> Tensor:
    with torch.no_grad():
        size = x.norm(dim=-1, keepdim=True)
    return x / size


def scaled_by_number(net: Net, x: Tensor) -> Tensor:
    return 3 * x / x.norm().item()


def through_numpy(net: Net, x: Tensor) -> Tensor:
    return torch.from_numpy(x.detach().numpy() ** 3) + x


def through_a_list(net: Net, x: Tensor) -> Tensor:
    return x / torch.as_tensor(x.abs().amax(-1, keepdim=True).tolist())


def through_a_buffer(net: Net, x: Tensor) -> Tensor:
    net.mean.data.copy_(x.mean(0))
    return x - net.mean


def sampled(net: Net, x: Tensor) -> Tensor:
    return torch.distributions.Normal(x, 0.1).sample() + 0.1 * x


CULPRITS: dict[str, tuple[Callable[..., Tensor], dict[str, Any], str]] = {
    "centred": (centred, {"scale": nn.Parameter(torch.rand(8) + 0.5)}, "Tensor.detach"),
    "no_grad": (scaled_without, {}, "no_grad"),
    "item": (scaled_by_number, {}, "Tensor.item"),
    "numpy": (through_numpy, {}, "Tensor.detach"),
    "list": (through_a_list, {}, "Tensor.tolist"),
    "buffer": (through_a_buffer, {"mean": torch.zeros(8)}, "Tensor.copy_"),
    "sample": (sampled, {}, "Normal.sample"),
}


@pytest.mark.parametrize("name", CULPRITS)
def test_a_stop_that_matters_is_blamed_where_it_stands(name: str) -> None:
    forward, parts, operation = CULPRITS[name]
    torch.manual_seed(0)
    body = around(Net(forward, **parts))
    report = gradients(Net(loss_of, body=body), torch.randn(9, 6))
    assert [(c.kind, c.where, c.function) for c in report.culprits] == [("detached", "body.1", operation)], str(report)
    culprit, code = report.culprits[0], forward.__code__
    assert culprit.file == __file__
    assert culprit.line is not None and code.co_firstlineno < culprit.line <= code.co_firstlineno + 3


def test_of_several_stops_only_the_one_that_matters_is_blamed() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        net.log = x.detach().mean()
        top = x.amax(-1, keepdim=True).detach()
        soft = (x - top).exp() / (x - top).exp().sum(-1, keepdim=True)
        return soft * x.abs().mean().detach()

    torch.manual_seed(0)
    report = gradients(Net(loss_of, body=around(Net(forward))), torch.randn(9, 6))
    (culprit,) = report.culprits
    assert culprit.line == forward.__code__.co_firstlineno + 4


def test_two_stops_that_matter_are_two_culprits() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        mean = x.mean(0).detach()
        size = x.std(0).detach()
        return (x - mean) / size

    torch.manual_seed(0)
    report = gradients(Net(loss_of, body=around(Net(forward))), torch.randn(9, 6))
    first = forward.__code__.co_firstlineno
    assert sorted(c.line for c in report.culprits if c.line) == [first + 1, first + 2]


def test_a_penalty_on_data_is_found_in_the_model_and_in_the_loss_of_a_closure() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        return loss_of(net, x) + 0.1 * sum(p.data.square().sum() for p in net.parameters())

    torch.manual_seed(0)
    x = torch.randn(9, 6)
    (culprit,) = gradients(Net(forward, body=around(nn.ReLU())), x).culprits
    assert (culprit.where, culprit.function) == ("Net", "Tensor.data")

    model = around(nn.ReLU())

    def loss(y: Tensor, t: Tensor) -> Tensor:
        return F.mse_loss(y, t) + 0.1 * sum(p.data.square().sum() for p in model.parameters())

    (culprit,) = gradients(hesse.closure(model, loss, (x, torch.randn(9, 1)))).culprits
    assert (culprit.where, culprit.function) == ("loss_fn()", "Tensor.data")


def test_a_stop_in_a_function_is_blamed_beside_its_argument() -> None:
    def product(left: Tensor, right: Tensor) -> Tensor:
        return left * right.exp().detach()

    (culprit,) = gradients(product, (torch.randn(5), torch.randn(5))).culprits
    assert (culprit.kind, culprit.where, culprit.function) == ("detached", "right", "Tensor.detach")


def cut(net: Net, x: Tensor) -> Tensor:
    h = x.new_zeros(x.shape[0], 8)
    for t in range(x.shape[1]):
        h = net.cell(x[:, t], h)
        if t % 2:
            h = h.detach()
    return net.cell(x[:, 0], h)


def warmed_up(net: Net, x: Tensor) -> Tensor:
    h = x.new_zeros(x.shape[0], 8)
    for t in range(x.shape[1]):
        with torch.set_grad_enabled(t > 2):
            h = net.cell(x[:, t], h)
    return h


@pytest.mark.parametrize("forward", [cut, warmed_up])
def test_a_stop_between_steps_truncates_the_recurrence(forward: Callable[..., Tensor]) -> None:
    torch.manual_seed(0)
    rnn = Net(forward, cell=nn.GRUCell(4, 8))
    model = Net(lambda net, x: net.out(net.rnn(x)).square().mean(), rnn=rnn, out=nn.Linear(8, 2))
    (culprit,) = gradients(model, torch.randn(3, 6, 4)).culprits
    assert (culprit.kind, culprit.where) == ("truncated_recurrence", "rnn")


# ---- who is not ------------------------------------------------------------------------------------------


def teacher(frozen: bool) -> tuple[nn.Module, Any]:
    student = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    copied = copy.deepcopy(student).requires_grad_(not frozen)

    def forward(net: Net, x: Tensor) -> Tensor:
        with torch.no_grad():
            for slow, fast in zip(net.teacher.parameters(), net.student.parameters(), strict=True):
                slow.mul_(0.99).add_(fast, alpha=0.01)
            target = net.teacher(x)
        return F.mse_loss(net.student(x), target)

    return Net(forward, student=student, teacher=copied), torch.randn(9, 6)


def logs() -> tuple[nn.Module, Any]:
    def forward(net: Net, x: Tensor) -> Tensor:
        y = net.body(x)
        net.norm = y.norm().item()
        net.last = y.detach().numpy().mean()
        return (y - y.detach().max()).exp().sum().log() + y.detach().max()

    return Net(forward, body=around(nn.ReLU())), torch.randn(9, 6)


def running_statistics() -> tuple[nn.Module, Any]:
    def forward(net: Net, x: Tensor) -> Tensor:
        with torch.no_grad():
            net.mean.lerp_(x.mean(0), 0.1)
        return (x - x.mean(0)) / (x.var(0) + 1e-3).sqrt()

    return Net(loss_of, body=around(Net(forward, mean=torch.zeros(8)))), torch.randn(9, 6)


def power_iteration() -> tuple[nn.Module, Any]:
    layer = nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8))
    return Net(loss_of, body=around(layer)), torch.randn(9, 6)


def policy() -> tuple[nn.Module, Any]:
    def forward(net: Net, x: Tensor, actions: Tensor, rewards: Tensor) -> Tensor:
        return -(torch.distributions.Categorical(logits=net.body(x)).log_prob(actions) * rewards.detach()).mean()

    return Net(forward, body=nn.Linear(6, 4)), (torch.randn(9, 6), torch.arange(9) % 4, torch.randn(9))


INNOCENT: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "frozen teacher": lambda: teacher(True),
    "trainable teacher": lambda: teacher(False),
    "logs and a maximum": logs,
    "running statistics": running_statistics,
    "power iteration": power_iteration,
    "policy gradient": policy,
}


@pytest.mark.parametrize("name", INNOCENT)
def test_stops_that_are_meant_are_left_in_peace(name: str) -> None:
    for seed in range(2):
        torch.manual_seed(seed)
        report = gradients(*INNOCENT[name](), seed=seed)
        assert report.ok, str(report)


def test_what_is_taken_for_a_teacher_is_said() -> None:
    assert any("teacher" in note for note in gradients(*teacher(False)).notes)


def test_a_tower_of_its_own_without_gradients_is_no_teacher() -> None:
    def forward(net: Net, x: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            other = net.right(y)
        return (net.left(x) * other).sum(-1).sigmoid().log().mean()

    torch.manual_seed(0)
    towers = [nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)) for _ in range(2)]
    report = gradients(Net(forward, left=towers[0], right=towers[1]), (torch.randn(9, 6), torch.randn(9, 6)))
    assert [(c.kind, c.function) for c in report.culprits] == [("detached", "no_grad")]


# ---- edits past the graph, half precision ----------------------------------------------------------------


def test_a_write_past_the_graph_is_named_by_its_line() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        y = x * x + net.layer(x.sin())
        x.data.mul_(0.5)
        return y

    torch.manual_seed(0)
    report = gradients(Net(loss_of, body=around(Net(forward, layer=nn.Linear(8, 8)))), torch.randn(9, 6))
    (culprit,) = report.culprits
    assert (culprit.kind, culprit.where, culprit.function) == ("stale_value", "body.1", "Tensor.mul_")
    assert culprit.line == forward.__code__.co_firstlineno + 2


def test_weights_edited_between_forward_and_backward_are_named_by_their_layer() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        y = net.layer(x)
        net.layer.weight.data.mul_(0.9)
        return y

    torch.manual_seed(0)
    model = Net(loss_of, body=around(Net(forward, layer=nn.Linear(8, 8))))
    weight = model.body[1].layer.weight
    before = weight.detach().clone()
    (culprit,) = gradients(model, torch.randn(9, 6)).culprits
    assert (culprit.kind, culprit.where) == ("stale_value", "body.1.layer")
    assert torch.equal(weight, before)


@pytest.mark.parametrize("scale", [1e-5, 300.0], ids=["underflow", "overflow"])
def test_numbers_that_half_precision_loses(scale: float) -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        y = (x * scale).half() * (0.01 if scale < 1 else scale)
        return y.float() / scale / (0.01 if scale < 1 else scale)

    torch.manual_seed(0)
    report = gradients(Net(loss_of, body=around(Net(forward))), torch.randn(9, 6))
    assert [(c.kind, c.where) for c in report.culprits] == [("overflow", "body.1")], str(report)


def test_half_precision_that_loses_nothing_is_well() -> None:
    torch.manual_seed(0)
    half = Net(lambda net, x: (x.half().tanh() * 2).float())
    assert gradients(Net(loss_of, body=around(half)), torch.randn(9, 6)).ok
