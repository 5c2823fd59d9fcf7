"""Recorded Functions: what is recorded of a custom Function's calls is what happened; classes are put back."""

from __future__ import annotations

import inspect
import linecache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from hesse.check import gradients
from hesse.check.passes.functions import Functions, backward_of, defined, name_of, user_functions


class Product(Function):
    """The context comes first; the second argument may be a number."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Any, note: str = "") -> Tensor:
        ctx.save_for_backward(x)
        ctx.y = y
        return x * y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        (x,) = ctx.saved_tensors
        return grad * ctx.y, grad * x if isinstance(ctx.y, Tensor) else None, None


class Separate(Function):
    """The context comes last, and the backward is called vjp."""

    @staticmethod
    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        return x.sin(), x.cos()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def vjp(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return a * x.cos() - b * x.sin()


class Heir(Product):
    """Calls its parent's forward, which is no call of the parent."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Any, note: str = "") -> Tensor:
        return Product.forward(ctx, x, y, note) + 1


class Editing(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 3 * x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.mul_(3)


bound = Product.apply


def record(function: Any, *args: Any) -> list[Any]:
    functions = Functions()
    with functions.recording():
        y = function(*args)
        (y * torch.arange(1.0, 4.0)).sum().backward()
    return functions.calls


@pytest.fixture
def x() -> Tensor:
    return torch.tensor([0.5, -1.0, 2.0], requires_grad=True)


def test_gradients_that_arrived_and_left_are_recorded_whatever_the_style(x: Tensor) -> None:
    w = torch.arange(1.0, 4.0)
    y = torch.tensor([2.0, 3.0, 4.0], requires_grad=True)
    (call,) = record(bound, x, y, "note")
    assert (call.name, call.cls, call.key) == ("Product", Product, ("function", Product))
    assert torch.equal(call.inputs[0], x) and torch.equal(call.inputs[1], y)
    assert torch.equal(call.out_grads[0], w)
    assert torch.equal(call.in_grads[0], w * y) and torch.equal(call.in_grads[1], w * x)
    assert not call.edited

    (call,) = record(lambda x: (lambda s, c: s + 2 * c)(*Separate.apply(x)), x)
    assert torch.equal(call.out_grads[0], w) and torch.equal(call.out_grads[1], 2 * w)
    assert torch.allclose(call.in_grads[0], w * x.cos() - 2 * w * x.sin())


def test_an_heir_is_one_call_of_its_own(x: Tensor) -> None:
    assert [call.name for call in record(Heir.apply, x, 2.0)] == ["Heir"]
    calls = record(lambda x: Heir.apply(Product.apply(x, 2.0), 3.0), x)
    assert [call.name for call in calls] == ["Product", "Heir"]


def test_the_gradient_is_copied_before_the_backward_edits_it(x: Tensor) -> None:
    (call,) = record(Editing.apply, x)
    assert call.edited
    assert torch.equal(call.out_grads[0], torch.arange(1.0, 4.0))
    assert torch.equal(call.in_grads[0], 3 * torch.arange(1.0, 4.0))


def test_protected_backwards_edit_copies_only(x: Tensor) -> None:
    seen = []
    functions = Functions(protect=True)
    with functions.recording():
        y = Editing.apply(x)
        y.register_hook(seen.append)
        (y * torch.ones(3)).sum().backward()
    assert torch.equal(seen[0], torch.ones(3))


def test_a_call_can_be_run_again_from_its_copies(x: Tensor) -> None:
    (call,) = record(lambda x: Product.apply(x, 2.0), x)
    with torch.no_grad():
        x.zero_()
    assert torch.equal(call()[0], 2 * torch.tensor([0.5, -1.0, 2.0]))
    with torch.no_grad():
        call.inputs[0].fill_(1.0)
    assert torch.equal(call.weighted(), 2 * torch.arange(1.0, 4.0).double())


def test_classes_are_what_they_were_also_after_an_error(x: Tensor) -> None:
    before = {cls: dict(vars(cls)) for cls in (Product, Separate, Heir, Editing)}
    record(Product.apply, x, 2.0)
    with pytest.raises(RuntimeError, match="in the middle"), Functions().recording():
        Separate.apply(x)
        raise RuntimeError("in the middle")
    assert all(dict(vars(cls)) == entries for cls, entries in before.items())


def test_torchs_own_functions_are_not_custom_and_operators_of_users_are() -> None:
    @torch.library.custom_op("hesse_test::halve", mutates_args=())
    def halve(x: Tensor) -> Tensor:
        return x / 2

    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad / 2

    halve.register_autograd(backward)
    halve(torch.ones(2, requires_grad=True))  # its Function is made at the first call
    found = user_functions()
    assert {Product, Separate, Heir, Editing} <= set(found)
    (operator,) = [cls for cls in found if name_of(cls) == "hesse_test::halve"]
    assert backward_of(operator) is backward
    assert all(not cls.__module__.startswith("torch.") or name_of(cls).count("::") == 1 for cls in found)


@pytest.mark.parametrize("cls", [Product, Editing])
def test_the_line_of_a_backward_is_that_of_its_def(cls: type[Function]) -> None:
    file, line = defined(backward_of(cls))
    assert file == __file__ and line is not None
    assert linecache.getline(file, line).strip().startswith("def backward")
    assert line > inspect.getsourcelines(cls)[1]


class Reciprocal(Function):
    """1 / x whose backward has lost its sign, unless told otherwise."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sign: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.sign = sign
        return 1 / x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.sign * grad / ctx.saved_tensors[0] ** 2, None


class Layer(nn.Module):
    def __init__(self, sign: float) -> None:
        super().__init__()
        self.sign = sign

    def forward(self, x: Tensor) -> Tensor:
        return Reciprocal.apply(2 + x.tanh(), self.sign)


def test_a_wrong_function_is_named_where_it_is_wrong_and_only_there() -> None:
    torch.manual_seed(0)
    layers = nn.Linear(4, 8), Layer(-1.0), nn.Linear(8, 8), Layer(1.0), nn.Linear(8, 1)
    (culprit,) = gradients(nn.Sequential(*layers), torch.randn(8, 4)).culprits
    assert (culprit.kind, culprit.where, culprit.function) == ("wrong_sign", "3", "Reciprocal")
    assert (culprit.file, culprit.line) == defined(Reciprocal.backward)
    layers[3].sign = -1.0
    assert gradients(nn.Sequential(*layers), torch.randn(8, 4)).ok


def test_a_gradient_of_the_wrong_shape_is_a_finding() -> None:
    class Flat(Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return 2 * x

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad.flatten()[:2]

    class Doubling(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return Flat.apply(x)

    model = nn.Sequential(nn.Linear(4, 3), Doubling(), nn.Linear(3, 1))
    (culprit,) = gradients(model, torch.randn(5, 4)).culprits
    assert (culprit.where, culprit.function) == ("1", "Flat")
    assert "invalid gradient" in culprit.message


def test_an_edit_that_spoils_a_neighbours_gradient_is_seen() -> None:
    class Tripled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return Editing.apply(x) + x

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), Tripled(), nn.Tanh(), nn.Linear(6, 1))
    (culprit,) = gradients(model, torch.randn(5, 4)).culprits
    assert (culprit.kind, culprit.where, culprit.function) == ("inplace_grad", "1", "Editing")


def test_complex_arguments_have_the_gradient_of_their_parts() -> None:
    class Times(Function):
        @staticmethod
        def forward(ctx: Any, z: Tensor, w: Tensor, right: bool) -> Tensor:
            ctx.save_for_backward(z, w)
            ctx.right = right
            return z * w

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
            z, w = (t.conj() if ctx.right else t for t in ctx.saved_tensors)
            return grad * w, (grad * z).sum(0), None

    class Mix(nn.Module):
        def __init__(self, right: bool) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, dtype=torch.complex64))
            self.right = right

        def forward(self, x: Tensor) -> Tensor:
            z = torch.view_as_complex(x.view(-1, 4, 2))
            return torch.view_as_real(Times.apply(z, self.w, self.right)).flatten(1)

    for right in (True, False):
        torch.manual_seed(0)
        report = gradients(nn.Sequential(nn.Linear(6, 8), Mix(right), nn.Tanh(), nn.Linear(8, 1)), torch.randn(5, 6))
        assert [(c.where, c.function) for c in report.culprits] == ([] if right else [("1", "Times")])


class Recomputed(Function):
    """Checkpointing as diffusion models write it: the module computes, its parameters are given so that autograd
    knows them.
    """

    @staticmethod
    def forward(ctx: Any, run: Any, sign: float, x: Tensor, *params: Tensor) -> Tensor:
        ctx.run, ctx.sign, ctx.x, ctx.params = run, sign, x, params
        with torch.no_grad():
            return run(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        with torch.enable_grad():
            x = ctx.x.detach().requires_grad_()
            first, *rest = torch.autograd.grad(ctx.run(x), (x, *ctx.params), grad)
        return (None, None, first, *(ctx.sign * g for g in rest))


class Adjoint(Function):
    """Euler steps of dz/dt = f(z), differentiated by the adjoint method, backwards in time."""

    @staticmethod
    def forward(ctx: Any, f: Any, sign: float, z: Tensor, *params: Tensor) -> Tensor:
        ctx.f, ctx.sign, ctx.params, ctx.states = f, sign, params, []
        for _ in range(4):
            ctx.states.append(z)
            z = z + 0.2 * f(z)
        return z

    @staticmethod
    def backward(ctx: Any, a: Tensor) -> tuple[Tensor | None, ...]:
        total = [torch.zeros_like(p) for p in ctx.params]
        for z in reversed(ctx.states):
            with torch.enable_grad():
                z = z.detach().requires_grad_()
                first, *rest = torch.autograd.grad(ctx.f(z), (z, *ctx.params), a)
            a = a + 0.2 * first
            total = [t + 0.2 * ctx.sign * g for t, g in zip(total, rest, strict=True)]
        return (None, None, a, *total)


class Flattened(Function):
    """The adjoint's older form: the parameters arrive as one vector, which the forward never looks at."""

    @staticmethod
    def forward(ctx: Any, f: Any, sign: float, z: Tensor, flat: Tensor) -> Tensor:
        ctx.f, ctx.sign, ctx.z = f, sign, z
        with torch.no_grad():
            return z + f(z)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        with torch.enable_grad():
            z = ctx.z.detach().requires_grad_()
            first, *rest = torch.autograd.grad(ctx.f(z), (z, *ctx.f.parameters()), grad)
        return None, None, grad + first, ctx.sign * torch.cat([g.flatten() for g in rest])


class Field(nn.Module):
    def __init__(self, cls: type[Function], sign: float) -> None:
        super().__init__()
        self.f = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 5))
        self.cls, self.sign = cls, sign

    def forward(self, x: Tensor) -> Tensor:
        params = list(self.f.parameters())
        if self.cls is Flattened:
            params = [torch.cat([p.flatten() for p in params])]
        return self.cls.apply(self.f, self.sign, x, *params)


def field_model(cls: type[Function], sign: float, other: float = 1.0) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    layers = nn.Linear(4, 5), Field(cls, sign), nn.Tanh(), Field(cls, other), nn.Linear(5, 2)
    return nn.Sequential(*layers), torch.randn(6, 4)


WHOLE_OR_PARTS = pytest.mark.parametrize("parts", [False, True], ids=["whole", "parts"])


@WHOLE_OR_PARTS
@pytest.mark.parametrize("cls", [Recomputed, Adjoint, Flattened])
def test_parameters_given_to_a_function_that_computes_with_their_module_are_no_fault(
    cls: type[Function], parts: bool
) -> None:
    model, x = field_model(cls, 1.0)
    before = [p.detach().clone() for p in model.parameters()]
    assert gradients(model, x, parts=parts).ok
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


@WHOLE_OR_PARTS
@pytest.mark.parametrize("cls", [Recomputed, Adjoint])
def test_a_wrong_gradient_of_parameters_so_given_is_named_with_its_function(cls: type[Function], parts: bool) -> None:
    (culprit,) = gradients(*field_model(cls, -1.0), parts=parts).culprits
    assert (culprit.kind, culprit.where, culprit.function) == ("wrong_sign", "1", cls.__name__)
    assert (culprit.file, culprit.line) == defined(cls.backward)


@WHOLE_OR_PARTS
def test_of_two_functions_with_flattened_parameters_the_wrong_one_is_blamed(parts: bool) -> None:
    culprits = gradients(*field_model(Flattened, -1.0), parts=parts).culprits
    assert {culprit.where for culprit in culprits} == {"1"}
    assert culprits[0].function == "Flattened"


def test_a_parameter_is_moved_itself_where_a_call_is_run_again_and_put_back() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(3, 3)
    (call,) = record(lambda x: Recomputed.apply(layer, 1.0, x, layer.weight, layer.bias).sum(0), torch.randn(2, 3))
    weight, version = layer.weight.detach().clone(), layer.weight._version
    before = call()[0]
    assert layer.weight._version == version  # not written to without need
    with torch.no_grad():
        call.inputs[0].mul_(2)
    assert torch.allclose(call()[0] - layer.bias, 2 * (before - layer.bias), atol=1e-6)
    assert torch.equal(layer.weight, weight)
    layer.register_forward_hook(lambda module, args, y: y.view(-7))
    with pytest.raises(RuntimeError):
        call()
    assert torch.equal(layer.weight, weight)
