"""hesse.check.gradients: healthy models are left in peace, planted faults are found where they sit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

import hesse
from hesse.check import gradients
from hesse.finding import InputError

# ---- healthy models that look suspicious -----------------------------------------------------------------


class Loss(nn.Module):
    """``model(x)`` against fixed targets: a module whose output is the loss."""

    def __init__(self, body: nn.Module, loss: Callable[[Tensor], Tensor] = lambda y: y.square().mean()) -> None:
        super().__init__()
        self.body = body
        self.loss = loss

    def forward(self, x: Tensor) -> Tensor:
        return self.loss(self.body(x))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0]


class Last(nn.Module):
    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor) -> Tensor:
        return self.cell(x)[0][:, -1]


class Reused(nn.Module):
    """One layer called twice, one weight used both by its layer and outside it, one activation everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.act(self.layer(self.act(self.layer(x)))), self.layer.weight)


def mlp(*middle: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 24), *middle, nn.Linear(24, 3))


def x(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(shape)


def decades() -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 3))
    with torch.no_grad():
        model[2].weight.mul_(1e-6)
        model[4].weight.mul_(1e5)
        model[0].bias.mul_(1e-4)
    return model


def zero_head() -> nn.Module:
    model = mlp(nn.Tanh())
    nn.init.zeros_(model[2].weight)
    nn.init.zeros_(model[2].bias)
    return model


def fitted() -> nn.Module:
    """At its minimum every gradient is rounding: nothing can be seen in the whole, all can in the parts."""
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    nn.init.zeros_(model[2].bias)
    nn.init.zeros_(model[2].weight)
    return model


def zero_bias() -> nn.Module:
    """Inputs of exact zeros and biases of zero put every unit on its kink."""
    model = mlp(nn.ReLU())
    nn.init.zeros_(model[0].bias)
    return model


def deep() -> nn.Module:
    return mlp(*[m for _ in range(8) for m in (nn.ReLU(), nn.Linear(24, 24))])


def frozen() -> nn.Module:
    model = mlp(nn.ReLU())
    model[0].requires_grad_(False)
    return model


def convnet() -> nn.Module:
    features = nn.Conv2d(1, 6, 3, 2), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 8, 3), nn.ReLU()
    return nn.Sequential(*features, nn.Flatten(), nn.Linear(8, 3))


def blank_images() -> Tensor:
    return torch.randn(4, 1, 14, 14).clamp_min(1.0) - 1


def blank_rows() -> Tensor:
    return torch.cat([torch.zeros(12, 6), torch.randn(4, 6)])


def words() -> Tensor:
    return torch.arange(12).reshape(3, 4)


HEALTHY: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "relu": (lambda: Loss(mlp(nn.ReLU())), x(16, 6)),
    "tanh": (lambda: Loss(mlp(nn.Tanh())), x(16, 6)),
    "one row": (lambda: Loss(mlp(nn.ReLU())), x(1, 6)),
    "deep relu": (lambda: Loss(deep()), x(16, 6)),
    "convnet": (lambda: Loss(convnet()), x(4, 1, 14, 14)),
    "convnet on blank images": (lambda: Loss(convnet()), blank_images),
    "layer norm": (lambda: Loss(mlp(nn.LayerNorm(24), nn.GELU())), x(16, 6)),
    "batch norm in training": (lambda: Loss(mlp(nn.BatchNorm1d(24), nn.ReLU())), x(16, 6)),
    "dropout": (lambda: Loss(mlp(nn.Dropout(0.5), nn.ReLU())), x(16, 6)),
    "embedding": (lambda: Loss(nn.Sequential(nn.Embedding(500, 8), nn.Linear(8, 3))), words),
    "sparse embedding": (lambda: Loss(nn.Embedding(50, 8, sparse=True)), words),
    "attention": (lambda: Loss(Attention()), x(3, 5, 8)),
    "encoder layer": (lambda: Loss(nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)), x(3, 5, 8)),
    "gru": (lambda: Loss(Last(nn.GRU(8, 8, batch_first=True))), x(3, 6, 8)),
    "lstm": (lambda: Loss(Last(nn.LSTM(8, 8, batch_first=True))), x(3, 6, 8)),
    "reused layer": (lambda: Loss(Reused()), x(5, 8)),
    "many decades": (lambda: Loss(decades()), x(16, 6)),
    "zero head": (lambda: Loss(zero_head(), lambda y: F.cross_entropy(y, torch.arange(16) % 3)), x(16, 6)),
    "zero bias and blank rows": (lambda: Loss(zero_bias()), blank_rows),
    "at the minimum": (lambda: Loss(fitted()), x(16, 6)),
    "large loss": (lambda: Loss(mlp(nn.ReLU()), lambda y: 1e6 * y.square().sum() + 1e8), x(16, 6)),
    "loss with a large offset": (lambda: Loss(mlp(nn.ReLU()), lambda y: y.square().mean() + 1e6), x(16, 6)),
    "tiny loss": (lambda: Loss(mlp(nn.ReLU()), lambda y: 1e-12 * y.square().mean()), x(16, 6)),
    "in-place relu": (lambda: Loss(mlp(nn.ReLU(inplace=True))), x(16, 6)),
    "spectral norm": (lambda: Loss(spectral_norm(nn.Linear(6, 6)).eval()), x(16, 6)),
    "frozen backbone": (lambda: Loss(frozen()), x(16, 6)),
    "l1 loss": (lambda: Loss(mlp(nn.ReLU()), lambda y: y.abs().mean()), x(16, 6)),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", HEALTHY)
def test_healthy_models_are_left_in_peace(name: str, dtype: torch.dtype) -> None:
    make, data = HEALTHY[name]
    for seed in range(2):
        torch.manual_seed(seed)
        inputs = data()
        inputs = inputs.to(dtype) if inputs.is_floating_point() else inputs
        report = gradients(make().to(dtype), inputs, seed=seed)
        assert report.ok, f"seed {seed}: {report}"


# ---- planted faults --------------------------------------------------------------------------------------


def faulty(backward: Callable[[Any, Tensor], Tensor]) -> type[nn.Module]:
    """A tanh layer without parameters whose backward is ``backward(saved output, grad)``."""

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            y = x.tanh()
            ctx.save_for_backward(y)
            return y

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return backward(ctx.saved_tensors[0], grad)

    class Tanh(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return Function.apply(x)

    return Tanh


class Shift(nn.Module):
    """``x + b`` whose backward forgets to sum over the rows."""

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, b: Tensor) -> Tensor:
            return x + b

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
            return grad, grad[0]

    def __init__(self) -> None:
        super().__init__()
        self.b = nn.Parameter(torch.randn(24))

    def forward(self, x: Tensor) -> Tensor:
        return self.Function.apply(x, self.b)


class Stale(nn.Module):
    """A linear layer whose backward uses the input of the call before."""

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, w: Tensor, module: Stale) -> Tensor:
            ctx.save_for_backward(x if module.kept is None else module.kept, w)
            module.kept = x.detach().clone()
            return x @ w

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
            x, w = ctx.saved_tensors
            return grad @ w.T, x.T @ grad, None

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(24, 24) / 5)
        self.kept: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        return self.Function.apply(x, self.w, self)


class Detached(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.tanh() + x.detach().sin()


class Cut(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(24, 24)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).detach().tanh()


class Transposed(nn.Module):
    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
            ctx.save_for_backward(x, w)
            return x @ w

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
            x, w = ctx.saved_tensors
            return grad @ w, x.T @ grad

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(24, 24) / 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.Function.apply(x, self.w)


def hooked(kind: str, hook: Callable[..., Any]) -> nn.Module:
    layer = nn.Tanh()
    getattr(layer, f"register_{kind}")(hook)
    return layer


def double_the_gradient(module: nn.Module, args: Any, output: Tensor) -> None:
    output.register_hook(lambda grad: 2 * grad)


def parameter_hook() -> nn.Module:
    layer = nn.Linear(24, 24)
    layer.weight.register_hook(lambda grad: 2 * grad)
    return layer


def edit_in_place(y: Tensor, grad: Tensor) -> Tensor:
    return grad.mul_(1 - y * y).mul_(1.3)


FAULTS: dict[str, tuple[Callable[[], nn.Module], str, str | None]] = {
    "wrong sign": (faulty(lambda y, g: -g * (1 - y * y)), "wrong_sign", "Function"),
    "factor 2 missing": (faulty(lambda y, g: 0.5 * g * (1 - y * y)), "missing_factor", "Function"),
    "three per cent": (faulty(lambda y, g: 1.03 * g * (1 - y * y)), "missing_factor", "Function"),
    "wrong activation": (faulty(lambda y, g: g * (1 - y)), "wrong_gradient", "Function"),
    "some elements only": (
        faulty(lambda y, g: F.pad(g[:, :12], (0, 12)) * (1 - y * y)),
        "some_elements",
        "Function",
    ),
    "edit of grad_output": (faulty(edit_in_place), "missing_factor", "Function"),
    "sum over rows missing": (Shift, "missing_sum", "Function"),
    "stale value": (Stale, "stale_value", "Function"),
    "transposed": (Transposed, "transposed", "Function"),
    "detached part": (Detached, "detached", "Tensor.detach"),
    "detached": (Cut, "detached", "Tensor.detach"),
    "backward hook": (lambda: hooked("full_backward_hook", lambda m, i, o: (i[0] * 0.5,)), "hook", "<lambda>"),
    "backward pre-hook": (lambda: hooked("full_backward_pre_hook", lambda m, o: (o[0] * 3,)), "hook", "<lambda>"),
    "tensor hook in forward hook": (
        lambda: hooked("forward_hook", double_the_gradient),
        "hook",
        "double_the_gradient",
    ),
    "parameter hook": (parameter_hook, "hook", "<lambda>"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", FAULTS)
def test_planted_faults_are_located(name: str, dtype: torch.dtype) -> None:
    make, kind, function = FAULTS[name]
    for seed in range(2):
        torch.manual_seed(seed)
        inner = nn.Sequential(nn.Linear(24, 24), make(), nn.LayerNorm(24))
        model = Loss(nn.Sequential(nn.Linear(6, 24), nn.ReLU(), inner, nn.Linear(24, 3))).to(dtype)
        report = gradients(model, torch.randn(16, 6, dtype=dtype), seed=seed)
        assert not report.ok
        assert [c.where for c in report.culprits] == ["body.2.1"], str(report)
        culprit = report.culprits[0]
        assert culprit.kind == kind, str(report)
        assert culprit.function == function
        assert culprit.file == __file__ and culprit.line


def test_fault_in_the_models_own_code_is_named_by_its_class() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            h = self.one(x)
            return (self.two(h) * h.detach()).square().mean()

    report = gradients(Net(), torch.randn(8, 4))
    assert [c.where for c in report.culprits] == ["Net"]


def test_closure_brings_its_own_inputs_and_its_loss_is_a_suspect() -> None:
    class Halved(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, y: Tensor, t: Tensor) -> Tensor:
            ctx.save_for_backward(y - t)
            return (y - t).square().sum()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
            return grad * ctx.saved_tensors[0], None

    batch = torch.randn(8, 6), torch.randn(8, 3)
    assert gradients(hesse.closure(mlp(nn.ReLU()), F.mse_loss, batch)).ok
    report = gradients(hesse.closure(mlp(nn.ReLU()), Halved.apply, batch))
    assert report.culprits[0].where == "loss_fn()"
    assert "0.5 times" in report.culprits[0].message


def test_two_faults_are_two_culprits() -> None:
    bad = faulty(lambda y, g: -g * (1 - y * y))
    model = nn.Sequential(nn.Linear(6, 24), bad(), nn.Linear(24, 24), faulty(lambda y, g: g)(), nn.Linear(24, 1))
    assert {c.where for c in gradients(model, torch.randn(8, 6)).culprits} == {"1", "3"}


# ---- functions, notes, determinism, numbers --------------------------------------------------------------


def test_functions_name_their_arguments() -> None:
    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
            ctx.save_for_backward(a, b)
            return a * b

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
            _, b = ctx.saved_tensors
            return grad * b, grad * b

    def product(left: Tensor, right: Tensor) -> Tensor:
        return Product.apply(left, right)

    inputs = torch.randn(5), torch.randn(5)
    report = gradients(product, inputs)
    assert [c.where for c in report.culprits] == ["right"]
    assert "random weights" in str(report)
    assert gradients(torch.mul, inputs).ok
    assert gradients(lambda a, b: (a.abs() * b.relu()).sum(), (torch.zeros(5), torch.randn(5))).ok
    with pytest.raises(AssertionError, match="right"):
        report.raise_if_failed()


def test_domain_edges_take_smaller_steps() -> None:
    edge = torch.tensor([1.0, 2.0, 1e-4], dtype=torch.float64)
    assert gradients(lambda a: a.log().sum(), edge).ok


@pytest.mark.parametrize("wrong", [False, True])
def test_half_precision(wrong: bool) -> None:
    bad = faulty(lambda y, g: -g * (1 - y * y))
    for seed in range(3):
        torch.manual_seed(seed)
        model = Loss(mlp(bad() if wrong else nn.Tanh()))
        with torch.autocast("cpu", torch.bfloat16):
            assert gradients(model, torch.randn(16, 6), seed=seed).ok is not wrong
        report = gradients(model.to(torch.bfloat16), torch.randn(16, 6, dtype=torch.bfloat16), seed=seed)
        assert report.ok is not wrong


def test_losses_that_take_derivatives_themselves() -> None:
    class Slope(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1))

        def forward(self, t: Tensor) -> Tensor:
            t = t.detach().requires_grad_()
            (slope,) = torch.autograd.grad(self.net(t).sum(), t, create_graph=True)
            return (slope - t.cos()).square().mean()

    assert gradients(Slope(), torch.randn(32, 1)).ok


def test_a_large_float32_model_is_seen_clearly_enough() -> None:
    """Random directions drown in rounding here; the others decide, and the modules need not be judged."""
    torch.manual_seed(0)
    middle = [layer for _ in range(3) for layer in (nn.ReLU(), nn.Linear(512, 512))]
    model = nn.Sequential(nn.Linear(64, 512), *middle, nn.ReLU(), nn.Linear(512, 10))
    calls = []
    model[2].register_forward_hook(lambda *_: calls.append(1))
    target = torch.arange(64) % 10
    report = gradients(hesse.closure(model, F.cross_entropy, (torch.randn(64, 64), target)))
    assert report.ok and report.noise < 0.25
    assert len(calls) < 45


def test_random_and_stateful_forwards_are_not_called_wrong() -> None:
    class Drift(nn.Module):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return x * (1 + 0.01 * self.calls)

    report = gradients(nn.Sequential(nn.Linear(6, 4), Drift(), nn.Linear(4, 1)), torch.randn(8, 6))
    assert [(f.kind, f.where) for f in report.findings] == [("non_deterministic", "1")]


def test_non_finite_values_are_placed() -> None:
    class Log(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x - 100).log()

    class Root(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x * 0).sqrt()  # finite, with an infinite slope

    for layer in (Log(), Root()):
        report = gradients(nn.Sequential(nn.Linear(6, 4), layer, nn.Linear(4, 1)), torch.randn(8, 6))
        assert [(f.kind, f.where) for f in report.findings] == [("non_finite", "1")], type(layer)


def test_kink_at_the_point_is_said_to_be_one() -> None:
    report = gradients(lambda a: a.relu().sum() - (2 * a[:3]).relu().sum(), torch.zeros(6))
    assert report.ok
    assert {f.kind for f in report.findings} <= {"kink"}


@pytest.mark.parametrize("fail", [False, True])
def test_everything_is_left_as_it_was(fail: bool) -> None:
    torch.manual_seed(0)
    bad = faulty(lambda y, g: -g * (1 - y * y))
    model = nn.Sequential(nn.Linear(6, 24), nn.BatchNorm1d(24), nn.Dropout(), bad(), nn.Linear(24, 1))
    inputs = torch.randn(8, 6)
    model(inputs).sum().backward()
    calls = 0

    def explode(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if fail and calls == 8:
            raise RuntimeError("in the middle")

    model[4].register_forward_hook(explode)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    before = {name: t.detach().clone() for name, t in tensors.items()}
    grads = {name: (p.grad, p.grad.clone()) for name, p in model.named_parameters()}
    state = torch.get_rng_state()
    call = nn.Module.__call__
    if fail:
        with pytest.raises(RuntimeError, match="in the middle"):
            gradients(model, inputs)
    else:
        assert gradients(model, inputs).culprits[0].where == "3"
    assert all(torch.equal(t, before[name]) for name, t in tensors.items())
    assert all(model.get_buffer(name) is t for name, t in tensors.items() if "running" in name)
    assert all(model.get_parameter(n).grad is g and torch.equal(g, value) for n, (g, value) in grads.items())
    assert torch.equal(torch.get_rng_state(), state)
    assert nn.Module.__call__ is call


def test_a_healthy_check_costs_a_few_gradients() -> None:
    model = mlp(nn.ReLU())
    forwards = 0

    def count(*_: Any) -> None:
        nonlocal forwards
        forwards += 1

    model.register_forward_hook(count)
    assert gradients(Loss(model), torch.randn(64, 6)).ok
    assert forwards <= 24  # a gradient is worth three forward passes


def test_nothing_to_check_and_wrong_kinds_are_refused() -> None:
    with pytest.raises(InputError, match="nothing to check"):
        gradients(nn.ReLU(), torch.zeros(3))
    with pytest.raises(InputError, match="Return the loss"):
        gradients(lambda a: a.argmax(), torch.zeros(3))
    with pytest.raises(TypeError, match="module, a function"):
        gradients(3)  # type: ignore[arg-type]
