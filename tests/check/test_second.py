"""hesse.check.hessian: second derivatives that are refused or wrong are found where they sit, others left alone."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

import hesse
from hesse.check import hessian, straight_through


class Loss(nn.Module):
    def __init__(self, body: nn.Module, loss: Callable[[Tensor], Tensor] = lambda y: y.square().mean()) -> None:
        super().__init__()
        self.body = body
        self.loss = loss

    def forward(self, x: Tensor) -> Tensor:
        return self.loss(self.body(x))


class Last(nn.Module):
    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor) -> Tensor:
        return self.cell(x)[0][:, -1]


class Math(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return self.layer(x)


def mlp(*middle: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), *middle, nn.Linear(8, 3))


def x(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(shape)


def words() -> Tensor:
    return torch.arange(12).view(3, 4)


def zero_head() -> nn.Module:
    model = mlp(nn.Tanh())
    nn.init.zeros_(model[2].weight)
    nn.init.zeros_(model[2].bias)
    return model


def decades() -> nn.Module:
    model = mlp(nn.Tanh())
    with torch.no_grad():
        model[0].weight.mul_(1e-4)
        model[2].weight.mul_(1e4)
    return model


def hooked() -> nn.Module:
    model = mlp(nn.Tanh())
    model[1].register_forward_hook(lambda m, a, y: 2 * y)
    return model


HEALTHY: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]] = {
    "tanh": (lambda: Loss(mlp(nn.Tanh())), x(16, 6)),
    "relu": (lambda: Loss(mlp(nn.ReLU())), x(16, 6)),
    "one row": (lambda: Loss(mlp(nn.ReLU())), x(1, 6)),
    "piecewise linear": (lambda: Loss(mlp(nn.ReLU()), lambda y: y.abs().sum()), x(16, 6)),
    "linear": (lambda: Loss(nn.Linear(6, 3), lambda y: y.sum()), x(16, 6)),
    "deep relu": (lambda: Loss(mlp(*[m for _ in range(5) for m in (nn.ReLU(), nn.Linear(8, 8))])), x(16, 6)),
    "in-place relu": (lambda: Loss(mlp(nn.ReLU(inplace=True))), x(16, 6)),
    "gelu, layer norm": (lambda: Loss(mlp(nn.LayerNorm(8), nn.GELU())), x(16, 6)),
    "batch norm in training": (lambda: Loss(mlp(nn.BatchNorm1d(8), nn.Tanh())), x(16, 6)),
    "dropout": (lambda: Loss(mlp(nn.Dropout(0.5), nn.Tanh())), x(16, 6)),
    "convnet": (
        lambda: Loss(nn.Sequential(nn.Conv2d(1, 4, 3, 2), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 3))),
        x(4, 1, 14, 14),
    ),
    "embedding": (lambda: Loss(nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 3))), words),
    "sparse embedding": (lambda: Loss(nn.Sequential(nn.Embedding(20, 8, sparse=True), nn.Tanh())), words),
    "lstm": (lambda: Loss(Last(nn.LSTM(8, 8, batch_first=True))), x(3, 4, 8)),
    "gru": (lambda: Loss(Last(nn.GRU(8, 8, batch_first=True))), x(3, 4, 8)),
    "attention, math": (lambda: Loss(Math(nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True))), x(3, 5, 8)),
    "cross-entropy": (lambda: Loss(mlp(nn.Tanh()), lambda y: F.cross_entropy(y, torch.arange(16) % 3)), x(16, 6)),
    "zero head": (lambda: Loss(zero_head()), x(16, 6)),
    "many decades": (lambda: Loss(decades()), x(16, 6)),
    "tiny loss": (lambda: Loss(mlp(nn.Tanh()), lambda y: 1e-10 * y.square().sum()), x(16, 6)),
    "large loss": (lambda: Loss(mlp(nn.Tanh()), lambda y: 1e8 + 1e4 * y.square().sum()), x(16, 6)),
    "forward hook": (lambda: Loss(hooked()), x(16, 6)),
    "spectral norm in training": (lambda: Loss(mlp(spectral_norm(nn.Linear(8, 8)), nn.Tanh())), x(16, 6)),
    "hardswish": (lambda: Loss(mlp(nn.Hardswish())), x(16, 6)),
}  # fmt: skip


@pytest.mark.parametrize("name", HEALTHY)
def test_healthy_models_are_left_in_peace(name: str) -> None:
    make, data = HEALTHY[name]
    for seed in range(2):
        torch.manual_seed(seed)
        model, inputs = make(), data()
        before = {n: t.clone() for n, t in model.state_dict().items()}
        report = hessian(model, inputs, seed=seed)
        assert report.ok, f"seed {seed}: {report}"
        assert all(torch.equal(t, before[n]) and t.dtype == before[n].dtype for n, t in model.state_dict().items())
        assert torch.get_default_dtype() == torch.float32


# ---- planted faults --------------------------------------------------------------------------------------------------


def layer(
    forward: Callable[..., Any], backward: Callable[..., Any], jvp: Callable[..., Any] | None = None
) -> nn.Module:
    """A layer that applies a Function made of these."""

    class Curve(Function):
        pass

    Curve.forward, Curve.backward = staticmethod(forward), staticmethod(backward)
    if jvp is not None:
        Curve.jvp = staticmethod(jvp)

    class Layer(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return Curve.apply(x)

    return Layer()


def keeps_slope(ctx: Any, x: Tensor) -> Tensor:
    y = x.tanh()
    ctx.slope = 1 - y * y
    return y


def uses_slope(ctx: Any, grad: Tensor) -> Tensor:
    return grad * ctx.slope


def saves_input(ctx: Any, x: Tensor) -> Tensor:
    ctx.save_for_backward(x)
    ctx.save_for_forward(x)
    return x.tanh()


def right(ctx: Any, grad: Tensor) -> Tensor:
    return grad * (1 - ctx.saved_tensors[0].tanh() ** 2)


def detaches_input(ctx: Any, grad: Tensor) -> Tensor:
    return grad * (1 - ctx.saved_tensors[0].detach().tanh() ** 2)


def detaches_gradient(ctx: Any, grad: Tensor) -> Tensor:
    return grad.detach() * (1 - ctx.saved_tensors[0].tanh() ** 2)


def detaches_all(ctx: Any, grad: Tensor) -> Tensor:
    with torch.no_grad():
        return grad * (1 - ctx.saved_tensors[0].tanh() ** 2)


def detaches_part(ctx: Any, grad: Tensor) -> Tensor:
    y = ctx.saved_tensors[0].tanh()
    return grad * (1 - y * y.detach())


@once_differentiable
def once(ctx: Any, grad: Tensor) -> Tensor:
    return grad * (1 - ctx.saved_tensors[0].tanh() ** 2)


def through_numpy(ctx: Any, grad: Tensor) -> Tensor:
    return torch.from_numpy(grad.detach().numpy() * (1 - ctx.saved_tensors[0].detach().tanh().numpy() ** 2))


FAULTS: dict[str, tuple[Callable[..., Any], Callable[..., Any], str]] = {
    "intermediate kept on ctx": (keeps_slope, uses_slope, "is zero"),
    "input detached": (saves_input, detaches_input, "is zero"),
    "arriving gradient detached": (saves_input, detaches_gradient, "arrives is zero"),
    "backward without grad": (saves_input, detaches_all, "is zero"),
    "part detached": (saves_input, detaches_part, "off by"),
    "once differentiable": (saves_input, once, "refused"),
    "numpy": (saves_input, through_numpy, "is zero"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_planted_faults_are_located(name: str) -> None:
    forward, backward, says = FAULTS[name]
    for seed in range(2):
        torch.manual_seed(seed)
        inner = nn.Sequential(nn.Linear(8, 8), layer(forward, backward), nn.LayerNorm(8))
        report = hessian(Loss(mlp(nn.Tanh(), inner, nn.Tanh())), torch.randn(16, 6), seed=seed)
        (culprit,) = report.culprits
        assert (culprit.kind, culprit.where, culprit.function) == ("second_derivative", "body.2.1", "Curve")
        written, first = inspect.getsourcelines(inspect.unwrap(backward))
        assert culprit.file == __file__
        assert culprit.line in range(first, first + 2)
        assert f"def {backward.__name__}(" in written[culprit.line - first]
        assert says in culprit.message, culprit.message
    assert hessian(Loss(mlp(layer(saves_input, right))), torch.randn(16, 6)).ok


def test_two_faults_are_two_culprits() -> None:
    model = Loss(mlp(layer(keeps_slope, uses_slope), nn.Linear(8, 8), layer(saves_input, detaches_input)))
    assert {c.where for c in hessian(model, torch.randn(16, 6)).culprits} == {"body.1", "body.3"}


def test_functions_and_closures() -> None:
    bad = layer(keeps_slope, uses_slope)
    (culprit,) = hessian(lambda a, b: (bad(a) * b).sum(), (torch.randn(5), torch.randn(5))).culprits
    assert culprit.function == "Curve"
    assert hessian(torch.logsumexp, {"input": torch.randn(4, 5), "dim": 1}).ok
    batch = torch.randn(8, 6), torch.randn(8, 3)
    assert hessian(hesse.closure(mlp(nn.Tanh()), F.mse_loss, batch)).ok
    (culprit,) = hessian(hesse.closure(mlp(nn.Tanh()), lambda o, t: bad(o - t).square().sum(), batch)).culprits
    assert (culprit.where, culprit.function) == ("loss_fn()", "Curve")


def test_wrong_first_derivatives_come_first() -> None:
    model = Loss(mlp(layer(keeps_slope, lambda ctx, grad: 0.5 * grad * ctx.slope)))
    report = hessian(model, torch.randn(16, 6))
    assert report.culprits[0].kind == "missing_factor"
    assert "first derivative is wrong" in report.notes[0]


# ---- torch's own -----------------------------------------------------------------------------------------------------


def test_torchs_own_operations_are_named_with_the_way_round() -> None:
    (culprit,) = hessian(Loss(weight_norm(nn.Linear(6, 3))), torch.randn(16, 6)).culprits
    assert culprit.function == "_weight_norm"
    assert culprit.where.startswith("body")
    assert "norm(dim" in culprit.remedy
    encoder = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)
    (culprit,) = hessian(Loss(encoder), torch.randn(3, 5, 8)).culprits
    assert culprit.where == "body.self_attn"
    assert "refused" in culprit.message
    assert "SDPBackend.MATH" in culprit.remedy
    (culprit,) = hessian(Loss(nn.Sequential(nn.EmbeddingBag(20, 8), nn.Linear(8, 3))), words()).culprits
    assert (culprit.where, culprit.function) == ("body.0", "embedding_bag")
    assert "nn.Embedding" in culprit.remedy


def test_second_derivatives_that_are_not_finite_are_told_where() -> None:
    class Power(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.abs() ** 1.5  # the slope at zero is zero, the bend infinite

    model = Loss(nn.Sequential(nn.Linear(6, 4), Power()))
    assert hessian(model, torch.randn(8, 6)).ok
    nn.init.zeros_(model.body[0].bias)
    (culprit,) = hessian(model, torch.zeros(8, 6)).culprits
    assert (culprit.kind, culprit.where) == ("non_finite", "body.1")
    assert culprit.function in ("pow", "__pow__")
    assert "finite" in culprit.message


# ---- forward mode ----------------------------------------------------------------------------------------------------


def tangent(ctx: Any, t: Tensor) -> Tensor:
    return t * (1 - ctx.saved_tensors[0].tanh() ** 2)


def wrong_tangent(ctx: Any, t: Tensor) -> Tensor:
    return t * (1 - ctx.saved_tensors[0].tanh())


def test_wrong_jvps_are_found_and_missing_ones_noted() -> None:
    (culprit,) = hessian(Loss(mlp(layer(saves_input, right, wrong_tangent))), torch.randn(16, 6)).culprits
    assert (culprit.kind, culprit.where, culprit.function) == ("forward_mode", "body.1", "Curve")
    assert culprit.line == inspect.getsourcelines(wrong_tangent)[1]
    report = hessian(Loss(mlp(layer(saves_input, right, tangent))), torch.randn(16, 6))
    assert report.ok and not report.notes
    report = hessian(Loss(mlp(layer(saves_input, right))), torch.randn(16, 6))
    assert report.ok
    assert "Curve defines no jvp" in report.notes[0]


@pytest.mark.parametrize("wrong", ["", "jvp", "backward"], ids=["right", "jvp", "backward"])
def test_functions_that_a_backward_calls_are_seen(wrong: str) -> None:
    """The backward is a Function itself; forward over reverse calls its jvp, double backward its backward."""

    class Slope(Function):
        @staticmethod
        def forward(ctx: Any, grad: Tensor, x: Tensor) -> Tensor:
            ctx.save_for_backward(grad, x)
            ctx.save_for_forward(grad, x)
            return grad * (1 - x.tanh() ** 2)

        @staticmethod
        def backward(ctx: Any, to: Tensor) -> tuple[Tensor, Tensor]:
            grad, x = ctx.saved_tensors
            y = x.tanh()
            return to * (1 - y * y), (2 if wrong == "backward" else -2) * to * grad * y * (1 - y * y)

        @staticmethod
        def jvp(ctx: Any, tg: Tensor, tx: Tensor) -> Tensor:
            grad, x = ctx.saved_tensors
            y = x.tanh()
            return tg * (1 - y * y) - (0 if wrong == "jvp" else 2) * grad * y * (1 - y * y) * tx

    outer = layer(saves_input, lambda ctx, grad: Slope.apply(grad, ctx.saved_tensors[0]), tangent)
    report = hessian(Loss(mlp(outer)), torch.randn(16, 6))
    assert report.ok is not bool(wrong)
    if wrong:
        (culprit,) = report.culprits
        kind = {"jvp": "forward_mode", "backward": "second_derivative"}[wrong]
        assert (culprit.kind, culprit.where, culprit.function) == (kind, "body.1", "Slope")
        assert culprit.line == inspect.getsourcelines(getattr(Slope, wrong))[1] + 1


def test_linear_solves_are_right_in_every_mode() -> None:
    def solve(A: Tensor, b: Tensor) -> Tensor:
        return torch.linalg.solve(A @ A.T + torch.eye(3), b).sin().sum()

    report = hessian(solve, (torch.randn(3, 3), torch.randn(3)))
    assert report.ok and not report.findings and not report.notes


# ---- numbers and state -----------------------------------------------------------------------------------------------


def test_models_that_insist_on_float32_are_checked_in_it() -> None:
    class Insists(nn.Module):
        def __init__(self, middle: nn.Module) -> None:
            super().__init__()
            self.net = mlp(middle)

        def forward(self, x: Tensor) -> Tensor:
            if x.dtype != torch.float32 or self.net[0].weight.dtype != torch.float32:
                raise TypeError("float32 only")
            return self.net(x).square().mean()

    for seed in range(2):
        torch.manual_seed(seed)
        assert hessian(Insists(nn.Tanh()), torch.randn(16, 6)).ok
        (culprit,) = hessian(Insists(layer(keeps_slope, uses_slope)), torch.randn(16, 6)).culprits
        assert culprit.where == "net.1"


def test_half_precision_is_checked_in_its_own_format() -> None:
    assert hessian(Loss(mlp(nn.Tanh())).to(torch.bfloat16), torch.randn(16, 6, dtype=torch.bfloat16)).ok


def test_everything_is_left_as_it_was() -> None:
    model = Loss(mlp(nn.BatchNorm1d(8), nn.Dropout(0.3), layer(keeps_slope, uses_slope)))
    inputs = torch.randn(16, 6)
    state = {n: t.clone() for n, t in model.state_dict().items()}
    ids = {n: id(t) for n, t in model.state_dict(keep_vars=True).items()}
    copy, random = inputs.clone(), torch.get_rng_state()
    hessian(model, inputs)
    assert all(torch.equal(t, state[n]) and t.dtype == state[n].dtype for n, t in model.state_dict().items())
    assert ids == {n: id(t) for n, t in model.state_dict(keep_vars=True).items()}
    assert torch.equal(inputs, copy) and inputs.dtype == torch.float32
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p.grad is None for p in model.parameters())


def test_straight_through_estimators_are_no_faults() -> None:
    rounded = straight_through(lambda x: x + ((4 * x).round() / 4 - x).detach())

    class Quantised(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return rounded(x)

    assert hessian(Loss(mlp(nn.Tanh(), Quantised())), torch.randn(16, 6)).ok
    (culprit,) = hessian(Loss(mlp(layer(keeps_slope, uses_slope), Quantised())), torch.randn(16, 6)).culprits
    assert culprit.where == "body.1"
