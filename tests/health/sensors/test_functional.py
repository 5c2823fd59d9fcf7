"""Calls of modules and functions: seen with the right path, and the run is not changed by being heard."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from hesse.health.sensors import SENSORS, Call, Calls
from hesse.health.stats import find_layers


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.act(self.fc(x)))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x)).sigmoid()


def heard(model: nn.Module, x: Any, names: set[str]) -> list[Call]:
    """The calls of modules and functions in one pass."""
    found: list[Call] = []
    calls = Calls(model)
    calls.on_modules(found.append)
    calls.on_functions(names, found.append)
    calls.listen()
    y = model(x)
    calls.rest((x,), y)
    return found


def everything(model: nn.Module) -> tuple[Calls, list[Any]]:
    calls = Calls(model)
    return calls, [make(model, find_layers(model), calls) for make in SENSORS]


def test_functions_go_by_the_path_of_the_module_that_calls_them() -> None:
    found = heard(Net(), torch.randn(3, 4), {"relu", "tanh", "sigmoid"})
    assert [(call.path, call.name, call.after) for call in found if call.function] == [
        ("blocks.0.act", "relu", "blocks.0.fc"),
        ("blocks.0.tanh", "tanh", "blocks.0.fc"),
        ("blocks.1.act", "relu", "blocks.1.fc"),
        ("blocks.1.tanh", "tanh", "blocks.1.fc"),
        ("Net.sigmoid", "sigmoid", "head"),
    ]
    assert [call.path for call in found if not call.function] == [
        "blocks.0.fc", "blocks.0.act", "blocks.0", "blocks.1.fc", "blocks.1.act", "blocks.1", "blocks", "head", "Net",
    ]  # fmt: skip


WAYS = {
    "F.relu": F.relu,
    "torch.relu": torch.relu,
    "method": lambda x: x.relu(),
    "in place": lambda x: (x + 0).relu_(),
    "F in place": lambda x: F.relu(x + 0, inplace=True),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_call_a_function_is_seen(way: str) -> None:
    class One(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return WAYS[way](x)

    x = torch.randn(3, 4)
    (call,) = [call for call in heard(One(), x, {"relu"}) if call.function]
    assert call.path == "One.relu"
    assert torch.equal(call.output, x.relu())


def test_a_part_may_be_heard_when_the_model_itself_is_not_called() -> None:
    model = Net()
    found: list[Call] = []
    calls = Calls(model)
    calls.on_modules(found.append)
    calls.on_functions({"tanh", "sigmoid"}, found.append)
    for part, again in ((model.blocks[0], False), (model.head, True)):
        first = part.register_forward_pre_hook(lambda module, args, again=again: calls.listen(module, again))
        last: list[Any] = []

        def rest(module: nn.Module, args: Any, output: Any) -> None:
            calls.rest()

        # As the monitor does it: its own hook comes after those of listening.
        def begin(module: nn.Module, args: Any, last: list[Any] = last) -> None:
            last.append(module.register_forward_hook(rest, always_call=True))

        second = part.register_forward_pre_hook(begin)
        part(torch.randn(2, 4))
        for handle in (first, second, *last):
            handle.remove()
    assert [call.path for call in found] == ["blocks.0.fc", "blocks.0.act", "blocks.0.tanh", "blocks.0", "head"]
    assert [calls.order[path] for path in ("blocks.0", "blocks.0.fc", "blocks.0.act", "head")] == [2, 3, 4, 6]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_function_comes_after_the_layer_whose_output_went_through_others() -> None:
    class Crossed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.drop = nn.Linear(4, 4), nn.Linear(4, 4), nn.Dropout(0.0)

        def forward(self, x: Tensor) -> Tensor:
            r = self.a(x).relu()
            d = self.drop(r)
            y = self.b(x)
            return r.tanh() + d.sigmoid() + y

    found = heard(Crossed(), torch.randn(2, 4), {"relu", "tanh", "sigmoid"})
    assert [(call.name, call.after) for call in found if call.function] == [
        ("relu", "a"), ("tanh", "a"), ("sigmoid", "a"),
    ]  # fmt: skip


def test_callbacks_run_without_gradient_autocast_and_modes() -> None:
    states: list[tuple[bool, bool, int]] = []

    def look(call: Call) -> None:
        modes = len(_get_current_function_mode_stack()) if torch._C._is_torch_function_mode_enabled() else 0
        states.append((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), modes))

    model = Net()
    calls = Calls(model)
    calls.on_modules(look)
    calls.on_functions({"tanh"}, look)
    with torch.autocast("cpu"):
        calls.listen()
        calls.rest((), model(torch.randn(2, 4)))
    assert set(states) == {(False, False, 0)}


def test_a_loop_is_one_chain_and_two_lines_are_two() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(3):
                x = self.fc(x)
            return self.fc(x) + self.fc(x)

    calls = [call for call in heard(Twice(), torch.randn(2, 4), set()) if call.path == "fc"]
    assert [len({calls[i].chain for i in part}) for part in ((0, 1, 2), (0, 3), (3, 4))] == [1, 2, 2]


def test_nothing_changes_in_the_run() -> None:
    def train(listen: bool) -> tuple[list[Tensor], Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(Net(), nn.Dropout(0.3), nn.TransformerEncoderLayer(2, 1, 4))
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        calls, sensors = everything(model)
        for _ in range(3):
            if listen:
                calls.listen()
                for sensor in sensors:
                    sensor.listen()
            y = model(torch.randn(5, 4))
            calls.rest((), y)
            for sensor in sensors:
                sensor.rest()
            optimizer.zero_grad()
            y.square().sum().backward()
            optimizer.step()
            for sensor in sensors:
                sensor.read()
        return list(model.parameters()), torch.get_rng_state()

    (plain, state), (watched, state_watched) = train(False), train(True)
    assert torch.equal(state, state_watched)
    assert all(torch.equal(p, q) for p, q in zip(plain, watched, strict=True))


def test_nothing_is_left_behind() -> None:
    model = Net()
    calls, sensors = everything(model)
    calls.listen()
    y = model(torch.randn(5, 4))
    calls.rest((), y)
    kept = weakref.ref(y)
    y.sum().backward()
    for sensor in sensors:
        sensor.rest()
        sensor.read()
    del y
    gc.collect()
    assert kept() is None
    assert not _get_current_function_mode_stack()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_forward_that_raises_leaves_neither_hooks_nor_mode() -> None:
    class Broken(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) @ x

    model = Broken()
    calls, _ = everything(model)
    model.register_forward_pre_hook(lambda *_: calls.listen())
    model.register_forward_hook(lambda m, args, output: calls.rest(args, output), always_call=True)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        model(torch.randn(5, 4))
    assert not _get_current_function_mode_stack()
    assert not model.head._forward_hooks


def test_a_module_that_raises_and_is_caught_does_not_shift_the_paths() -> None:
    class Picky(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise ValueError("no")

    class Patient(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.picky, self.fc = Picky(), nn.Linear(4, 4)
            self.inner = nn.ModuleDict({"block": Block()})

        def forward(self, x: Tensor) -> Tensor:
            try:
                x = self.picky(x)
            except ValueError:
                x = self.fc(x)
            return torch.tanh(self.inner["block"](x.sigmoid()))

    found = heard(Patient(), torch.randn(2, 4), {"tanh", "sigmoid"})
    assert [call.path for call in found if call.function] == ["Patient.sigmoid", "inner.block.tanh", "Patient.tanh"]
    assert found[-1].path == "Patient"


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo's own, of any tensor that is not a leaf
@pytest.mark.parametrize("whole", [True, False], ids=["whole", "part"])
def test_compiled_models_are_left_alone(whole: bool) -> None:
    torch._dynamo.reset()
    counter = CompileCounter()
    model = Net()
    watched: nn.Module = model
    if whole:
        watched = torch.compile(model, backend=counter)
    else:
        model.blocks[0].compile(backend=counter)
    found: list[Call] = []
    calls = Calls(watched)
    calls.on_modules(found.append)
    calls.on_functions({"tanh"}, found.append)
    for listen in (True, False, True):
        if listen:
            calls.listen()
        y = watched(torch.randn(5, 4))
        calls.rest((), y)
    assert counter.frame_count == 1
    assert not [call for call in found if call.path.startswith("blocks.0")]
    assert [call.path for call in found if call.path == "head"] == ([] if whole else ["head"] * 2)
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo's own, of any tensor that is not a leaf
def test_a_compiled_function_inside_still_runs() -> None:
    torch._dynamo.reset()

    class Partly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)
            self.part = torch.compile(lambda x: torch.tanh(x) * 2, backend="eager", fullgraph=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.part(self.fc(x))

    model, x = Partly(), torch.randn(2, 4)
    expected = model(x)
    calls, _ = everything(model)
    calls.listen()
    assert torch.equal(model(x), expected)
    calls.rest()
    torch._dynamo.reset()


def test_script_modules_and_function_transforms_are_not_heard() -> None:
    scripted = nn.Sequential(torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.ReLU())), nn.Tanh())
    assert [call.path for call in heard(scripted, torch.randn(2, 4), {"relu", "tanh"})] == ["1", "1", "Sequential"]

    class Mapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return torch.vmap(lambda row: torch.tanh(self.fc(row)))(x)

    assert [call.path for call in heard(Mapped(), torch.randn(2, 4), {"tanh"})] == ["Mapped"]


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_checkpoints_are_heard_once_and_their_gradients_are_right(reentrant: bool) -> None:
    class Saving(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.block = nn.Linear(4, 4), Block()
            self.tied = nn.Linear(4, 4)
            self.tied.weight = self.block.fc.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.tied(checkpoint(self.block, self.first(x), use_reentrant=reentrant))

    model, x = Saving(), torch.randn(3, 4)
    model(x).square().sum().backward()
    expected = [p.grad for p in model.parameters()]
    model.zero_grad()
    calls, sensors = everything(model)
    found: list[str] = []
    calls.on_functions({"tanh"}, lambda call: found.append(call.path))
    calls.listen()
    y = model(x)
    calls.rest((), y)
    y.square().sum().backward()
    assert found == ["block.tanh"]
    for p, grad in zip(model.parameters(), expected, strict=True):
        assert torch.allclose(p.grad, grad)
    assert sensors[0].read()["block.fc"]["out_rms"] > 0


def test_autocast_is_measured_in_full_precision() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
    nn.init.constant_(model[0].weight, 300.0)
    calls, (activations, *_) = everything(model)
    calls.listen()
    with torch.autocast("cpu", torch.float16):
        calls.rest((), model(torch.ones(2, 64)))
    reading = activations.read()
    assert reading["0"]["dtype"] == "torch.float16"
    for path, key in (("0", "out_rms"), ("2", "in_rms")):  # their squares are beyond float16
        assert reading[path][key].item() == pytest.approx(64 * 300, rel=1e-3)


class NoReading(TorchDispatchMode):
    """Fails when a number is read from a device, which would make the run wait."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        assert not any(word in name for word in ("_local_scalar_dense", "nonzero", "unique", "masked_select")), name
        return func(*args, **(kwargs or {}))


def test_nothing_is_read_from_the_device() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, 8),
        Mixed(),
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
        nn.GRU(8, 8, batch_first=True),
    )
    calls, sensors = everything(model)
    with NoReading():
        for _ in range(2):
            calls.listen()
            for sensor in sensors:
                sensor.listen()
            y = model(torch.randn(3, 5, 4))
            calls.rest((), y)
            for sensor in sensors:
                sensor.rest()
            y[0].square().sum().backward()
            readings = [sensor.read() for sensor in sensors]
    assert any(readings)


class Mixed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        h = F.gelu(x).softmax(-1)
        return torch.sigmoid(h @ h.mT).softmax(-1) @ F.elu(x)
