"""The jvp of custom Functions against differences."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hesse.check.differences import Slope
from hesse.check.parts.forward_mode import forward_slopes, function_jvps, has_jvp, words
from hesse.check.passes.functions import FunctionCall, Functions
from hesse.finding import Finding

Function = torch.autograd.Function


def calls_of(run: Callable[[], Any]) -> list[FunctionCall]:
    recorder = Functions()
    with recorder.recording():
        run()
    return recorder.calls


def judged(run: Callable[[], Any], eps: float = 1e-7) -> list[Finding]:
    return function_jvps(calls_of(run), eps, torch.Generator().manual_seed(0))


def product(jvp: Callable[..., Any] | None) -> type[Function]:
    """``a * b.exp()`` with the jvp given."""

    class Product(Function):
        @staticmethod
        def forward(ctx: Any, a: Tensor, b: Tensor, note: str = "") -> Tensor:
            ctx.save_for_backward(a, b)
            ctx.save_for_forward(a, b)
            return a * b.exp()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Any:
            a, b = ctx.saved_tensors
            return grad * b.exp(), grad * a * b.exp(), None

    if jvp is not None:
        Product.jvp = staticmethod(jvp)
    return Product


def right(ctx: Any, ta: Tensor, tb: Tensor, note: None) -> Tensor:
    a, b = ctx.saved_tensors
    return (ta + a * tb) * b.exp()


def no_second_term(ctx: Any, ta: Tensor, tb: Tensor, note: None) -> Tensor:
    _, b = ctx.saved_tensors
    return ta * b.exp()


def negative(ctx: Any, ta: Tensor, tb: Tensor, note: None) -> Tensor:
    return -right(ctx, ta, tb, note)


def nothing(ctx: Any, ta: Tensor, tb: Tensor, note: None) -> Tensor:
    return torch.zeros_like(ta)


def nearly(ctx: Any, ta: Tensor, tb: Tensor, note: None) -> Tensor:
    return 1.02 * right(ctx, ta, tb, note)


def infinite(ctx: Any, ta: Tensor, tb: Tensor, note: None) -> Tensor:
    return right(ctx, ta, tb, note) / 0.0


def crashing(ctx: Any, ta: Tensor, tb: Tensor, note: None) -> Tensor:
    raise ValueError("not written yet")


def none(ctx: Any, *tangents: Tensor) -> Tensor:
    raise NotImplementedError("no forward mode")


def too_few(ctx: Any, ta: Tensor) -> Tensor:
    return ta


FAULTS = {
    "a term is missing": (no_second_term, "is off by"),
    "sign": (negative, "wrong sign"),
    "zero": (nothing, "is zero"),
    "two per cent": (nearly, "off by 2%"),
    "infinite": (infinite, "not finite"),
    "crashes": (crashing, "not written yet"),
    "arguments": (too_few, "TypeError"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", FAULTS)
def test_wrong_jvps_are_named_with_their_line(name: str, dtype: torch.dtype) -> None:
    jvp, says = FAULTS[name]
    cls = product(jvp)
    a, b = (torch.randn(5, 3, dtype=dtype, requires_grad=True) for _ in range(2))
    (finding,) = judged(lambda: cls.apply(a, b, "x"), torch.finfo(dtype).eps)
    assert (finding.kind, finding.severity) == ("forward_mode", "error")
    assert (finding.function, finding.file) == ("Product", __file__)
    assert finding.line == inspect.getsourcelines(jvp)[1]
    assert says in finding.message


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_right_and_missing_jvps_are_left_in_peace(dtype: torch.dtype) -> None:
    for cls in (product(right), product(None), product(none)):
        for scale in (1.0, 1e-6, 1e4):
            a, b = (torch.randn(5, 3, dtype=dtype, requires_grad=True) for _ in range(2))
            assert not judged(lambda a=a, b=b, s=scale, cls=cls: cls.apply(s * a, b, ""), torch.finfo(dtype).eps)
            assert not judged(lambda a=a, b=b, cls=cls: cls.apply(a, b.detach(), ""), torch.finfo(dtype).eps)
    assert has_jvp(product(right))
    assert not has_jvp(product(None))


def test_kinks_are_no_faults() -> None:
    class Relu(Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_forward(x)
            ctx.save_for_backward(x)
            return x.clamp_min(0)

        @staticmethod
        def jvp(ctx: Any, tangent: Tensor) -> Tensor:
            (x,) = ctx.saved_tensors
            return tangent * (x > 0)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            (x,) = ctx.saved_tensors
            return grad * (x > 0)

    assert not judged(lambda: Relu.apply(torch.randn(400, requires_grad=True)))
    assert not judged(lambda: Relu.apply(torch.zeros(4, requires_grad=True)))


def test_modules_are_told_apart_and_setup_context_is_known() -> None:
    class Square(Function):
        @staticmethod
        def forward(x: Tensor) -> tuple[Tensor, Tensor]:
            return x * x, x.sum()

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            ctx.save_for_forward(*inputs)
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx: Any, grad: Tensor, total: Tensor) -> Tensor:
            return 2 * ctx.saved_tensors[0] * grad + total

        @staticmethod
        def jvp(ctx: Any, tangent: Tensor) -> tuple[Tensor, Tensor]:
            return ctx.saved_tensors[0] * tangent, tangent.sum()

    (finding,) = judged(lambda: [Square.apply(torch.randn(4, requires_grad=True)) for _ in range(3)])
    assert finding.where == finding.function == "Square"
    assert not judged(lambda: Square.apply(torch.randn(4)))


def test_each_tensor_has_its_say() -> None:
    """A wrong tangent for a small argument, which the curvature along a large one hides when both move."""
    x = {"large.x": torch.ones(300).double(), "small.x": torch.full((1,), 1e-2).double()}

    def evaluate() -> Tensor:
        return torch.cat([10 * (1000 * x["large.x"]).sin(), 100 * x["small.x"]])

    def along(v: Any) -> float:
        return float(1e4 * (1000 * x["large.x"]).cos() @ v[0] + 0.5 * 100 * v[1].sum())

    slopes = forward_slopes(evaluate, along, x, 1.2e-7, torch.Generator().manual_seed(0))
    assert not any(s.wrong for s in slopes[:3])
    assert [s.wrong for s in slopes[3:]] == [False, True]
    assert torch.equal(x["large.x"], torch.ones(300).double())


def test_words() -> None:
    assert words([Slope(-2.0, 2.0, 1e-3, 1e-3), Slope(1.0, -1.0, 1e-3, 1e-3)]) == "has the wrong sign"
    assert words([Slope(1.0, 2.0, 1e-3, 1e-3), Slope(1.0, 1.0, 1e-3, 1e-3)]) == "is off by 50%"


def test_layers_keep_their_paths() -> None:
    class Layer(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return product(negative).apply(x, x)

    path = ["body.1"]
    recorder = Functions(lambda: path[0])
    x = torch.randn(4, requires_grad=True)
    with recorder.recording():
        cls = product(negative)
    cls.apply(x, x)
    with recorder.recording():
        Layer()(x)  # a class made while recording is not seen: it was not there when the recording began
        cls.apply(x, x)
    findings = function_jvps(recorder.calls, 1e-7, torch.Generator().manual_seed(0))
    assert [f.where for f in findings] == ["body.1"]
