"""Losses of one's own: products, draws and refusals, against dense Hessians by autograd in float64."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hesse.curvature import OutputCurvature, output_curvature
from hesse.curvature.output import term_gradients
from loss_cases import assert_mean, batch_of, dense_hessian, matrix_of, random
from tolerances import ALGEBRA

Loss = Callable[..., Any]
WEIGHT = torch.tensor([0.5, 2.0, 1.0]).double()


def fourth(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).pow(4).sum()


def focal(outputs: Tensor, targets: Tensor) -> Tensor:
    """Focal loss (Lin et al., 2017): not convex."""
    log_p = outputs.log_softmax(1).gather(1, targets.unsqueeze(1))
    return -((1 - log_p.exp()) ** 2 * log_p).mean()


def root_mean_square(outputs: Tensor, targets: Tensor) -> Tensor:
    """Examples meet under the root."""
    return F.mse_loss(outputs, targets).sqrt()


class Weighted(nn.Module):
    """A loss with state, of outputs in columns: a mean and the logarithm of a deviation."""

    def __init__(self) -> None:
        super().__init__()
        self.floor = nn.Parameter(torch.tensor(0.3).double())

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        variance = outputs[:, 1].exp() + self.floor
        return (0.5 * (outputs[:, 0] - targets[:, 0]) ** 2 / variance + 0.5 * variance.log()).mean()


class Focal(nn.CrossEntropyLoss):
    """A subclass may compute anything."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return focal(input, target)


def in_place(outputs: Tensor, targets: Tensor) -> Tensor:
    return outputs.sub_(targets).pow(4).mean()


OWN: dict[str, tuple[Loss, str]] = {
    "fourth power": (fourth, "numbers"),
    "focal": (focal, "labels"),
    "subclass": (Focal(), "labels"),
    "module": (Weighted(), "numbers"),
    "partial": (
        functools.partial(lambda outputs, targets, scale: scale * fourth(outputs, targets), scale=2.0),
        "numbers",
    ),
    "lambda around a torch loss": (lambda outputs, targets: F.cross_entropy(outputs, targets, WEIGHT), "labels"),
    "in place": (in_place, "numbers"),
}
every_own = pytest.mark.parametrize("name", list(OWN))


@every_own
def test_products_of_an_own_loss_are_the_dense_hessian_again_and_again(name: str) -> None:
    loss_fn, kind = OWN[name]
    outputs, targets = batch_of(kind)
    before = outputs.clone()
    with torch.no_grad():  # optimisers call from there
        curvature = output_curvature(loss_fn, outputs, targets)
        found = matrix_of(curvature.product, outputs.shape)
    expected = dense_hessian(lambda o, t: loss_fn(o.clone(), t), outputs, targets)
    torch.testing.assert_close(found, expected, **ALGEBRA)
    many = random(4, *outputs.shape)
    each = torch.stack([curvature.product(u) for u in many])
    torch.testing.assert_close(torch.vmap(curvature.product)(many), each, **ALGEBRA)
    torch.testing.assert_close(curvature.products(many), each, **ALGEBRA)
    assert torch.equal(outputs, before)
    assert not curvature.psd


def without_negative_eigenvalues(matrix: Tensor, examples: int) -> Tensor:
    width = len(matrix) // examples
    blocks = [matrix[i * width : (i + 1) * width, i * width : (i + 1) * width] for i in range(examples)]
    parts = [torch.linalg.eigh(block) for block in blocks]
    return torch.block_diag(*[vectors @ values.clamp_min(0).diag() @ vectors.T for values, vectors in parts])


@every_own
@pytest.mark.parametrize("reduction", ["mean", "sum", None])
def test_draws_and_roots_of_an_own_loss_have_the_nearest_convex_hessian(name: str, reduction: str | None) -> None:
    loss_fn, kind = OWN[name]
    outputs, targets = batch_of(kind)
    curvature = output_curvature(loss_fn, outputs, targets, reduction)
    expected = without_negative_eigenvalues(matrix_of(curvature.product, outputs.shape), 6)
    columns = torch.stack([s.view(6, -1) for s in curvature.root()])
    assert len(columns) == 3
    torch.testing.assert_close(torch.block_diag(*torch.einsum("kbi,kbj->bij", columns, columns)), expected, **ALGEBRA)
    assert curvature.weight == (1 / 6 if reduction == "mean" else 1)
    flat = torch.stack([curvature.draw().flatten() for _ in range(600)])
    assert_mean(curvature.weight * flat.unsqueeze(2) * flat.unsqueeze(1), expected)
    first, again = (curvature.draw(torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, again)


def test_the_loss_with_a_logarithm_above_is_not_convex() -> None:
    loss_fn, kind = OWN["module"]
    assert float(torch.linalg.eigvalsh(dense_hessian(loss_fn, *batch_of(kind))).min()) < -1e-3


def test_an_own_loss_agrees_with_the_torch_loss_it_hides() -> None:
    outputs, targets = batch_of("labels")
    own: OutputCurvature = output_curvature(lambda o, t: F.cross_entropy(o, t), outputs, targets, reduction="mean")
    known = output_curvature(F.cross_entropy, outputs, targets)
    u = random(6, 3)
    torch.testing.assert_close(own.product(u), known.product(u), **ALGEBRA)
    assert (own.weight, own.terms, own.total, own.axes) == (known.weight, known.terms, known.total, known.axes)
    gradients = [term_gradients(f, outputs, targets, c) for f, c in ((F.cross_entropy, known), (own_cross, own))]
    torch.testing.assert_close(*gradients, **ALGEBRA)


def own_cross(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets)


def test_an_own_loss_that_has_not_said_its_reduction_has_no_terms_of_known_weight() -> None:
    outputs, targets = batch_of("labels")
    with pytest.raises(TypeError, match=r"'focal' needs to know what a term weighs.*reduction='mean'"):
        term_gradients(focal, outputs, targets, output_curvature(focal, outputs, targets))


def test_outputs_of_an_own_loss_have_any_shape() -> None:
    for shape in ((), (5,), (2, 3, 2)):
        outputs, targets = random(*shape), random(*shape)
        curvature = output_curvature(fourth, outputs, targets)
        torch.testing.assert_close(
            matrix_of(curvature.product, outputs.shape), dense_hessian(fourth, outputs, targets), **ALGEBRA
        )
        assert curvature.terms == (shape[0] if shape else 1)
        assert curvature.draw().shape == shape
        assert {s.shape for s in curvature.root()} == {outputs.shape}


def test_low_precision_outputs_of_an_own_loss_are_computed_with_in_float32() -> None:
    outputs, targets = (t.bfloat16() for t in batch_of("numbers"))
    curvature = output_curvature(fourth, outputs, targets)
    u = torch.randn(6, 3)
    torch.testing.assert_close(curvature.product(u), 12 * (outputs.float() - targets.float()) ** 2 * u)
    assert {t.dtype for t in (curvature.product(u.bfloat16()), curvature.draw())} == {torch.float32}


def test_examples_that_are_coupled_have_products_but_no_draws() -> None:
    outputs, targets = batch_of("numbers")
    curvature = output_curvature(root_mean_square, outputs, targets)
    expected = dense_hessian(root_mean_square, outputs, targets)
    torch.testing.assert_close(matrix_of(curvature.product, outputs.shape), expected, **ALGEBRA)
    for ask in (curvature.draw, curvature.root):
        with pytest.raises(ValueError, match=r"'root_mean_square' couples examples.*root of a mean square"):
            ask()


def test_one_coupled_pair_among_many_is_found() -> None:
    outputs = random(7, 2)
    for i in range(7):
        for j in range(i):
            curvature = output_curvature(
                lambda o, t, i=i, j=j: o.pow(4).sum() + 1e-3 * o[i, 0] * o[j, 1], outputs, None
            )
            with pytest.raises(ValueError, match="couples examples"):
                curvature.draw()


def test_an_own_loss_of_many_outputs_has_products_but_no_draws() -> None:
    outputs = random(2, 65)
    curvature = output_curvature(fourth, outputs, torch.zeros(2, 65))
    torch.testing.assert_close(curvature.product(torch.ones(2, 65).double()), 12 * outputs**2, **ALGEBRA)
    with pytest.raises(ValueError, match=r"65 x 65 here; it is formed for up to 64"):
        curvature.draw()


def test_an_own_loss_has_no_fisher_matrix() -> None:
    curvature = output_curvature(focal, *batch_of("labels"))
    for ask in (curvature.label, curvature.fisher_root, lambda: curvature.fisher(random(6, 3))):
        with pytest.raises(TypeError, match=r"'focal' has no probability model.*Gauss-Newton"):
            ask()


def test_a_loss_linear_in_the_outputs_curves_nothing() -> None:
    outputs, targets = batch_of("numbers")
    for loss_fn in (lambda o, t: (o * t).mean(), lambda o, t: F.l1_loss(o, t)):
        curvature = output_curvature(loss_fn, outputs, targets)
        assert torch.equal(curvature.product(random(6, 3)), torch.zeros(6, 3).double())
        assert torch.equal(curvature.draw(), torch.zeros(6, 3).double())


class Cube(torch.autograd.Function):
    """A backward that vmap cannot run, since it looks at a value, but that can be differentiated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return Triple.apply(g * x * x)


class Triple(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 3 * x

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 3 * g if float(g.sum()) < torch.inf else g


class Once(torch.autograd.Function):
    """torch takes it for linear when the gradient that comes in is a constant, and does not say so."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0] ** 2 * g


class Keeps(torch.autograd.Function):
    """Its square is kept from forward, as a constant."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.square = x * x
        return x**3

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 3 * ctx.square * g


def test_products_of_a_loss_that_cannot_be_batched_run_in_a_loop() -> None:
    outputs, many = random(3, 2), random(4, 3, 2)
    curvature = output_curvature(lambda o, t: Cube.apply(o).sum(), outputs, None)
    with pytest.raises(RuntimeError, match=r"vmap"):
        torch.vmap(curvature.product)(many)
    torch.testing.assert_close(curvature.products(many), 6 * outputs * many, **ALGEBRA)


@pytest.mark.parametrize("function", [Once, Keeps])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_function_with_a_wrong_second_derivative_is_named(
    function: type[torch.autograd.Function], dtype: torch.dtype
) -> None:
    def loss_fn(outputs: Tensor, targets: None) -> Tensor:
        return function.apply(outputs).square().mean() + function.apply(outputs).sum()

    with pytest.raises(RuntimeError, match=rf"'loss_fn' through autograd.Function {function.__name__} is wrong"):
        output_curvature(loss_fn, torch.randn(30, 2, dtype=dtype), None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kinks_do_not_hide_a_wrong_function(dtype: torch.dtype) -> None:
    for seed in range(20):
        torch.manual_seed(seed)
        with pytest.raises(RuntimeError, match="Function Keeps is wrong"):
            output_curvature(
                lambda o, t: Keeps.apply(o).sum() + 10 * o.abs().sum(), torch.randn(200, 2, dtype=dtype), None
            )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kinks_beside_a_right_function_are_no_error(dtype: torch.dtype) -> None:
    for seed in range(20):
        torch.manual_seed(seed)
        outputs = torch.randn(200, 2, dtype=dtype)
        curvature = output_curvature(
            lambda o, t: Cube.apply(o).sum() + 10 * o.abs().clamp_max(0.5).sum(), outputs, None
        )
        torch.testing.assert_close(curvature.product(torch.ones_like(outputs)), 6 * outputs)


def test_an_operation_without_second_derivative_is_named() -> None:
    labels = torch.tensor([0, 1, 1])
    curvature = output_curvature(lambda o, t: F.multi_margin_loss(o, t, p=2), random(3, 2), labels)
    for ask in (curvature.product, lambda u: curvature.products(u.unsqueeze(0))):
        with pytest.raises(RuntimeError, match=r"'<lambda>' .* cannot be differentiated.*multi_margin_loss_backward"):
            ask(random(3, 2))


@pytest.mark.parametrize(
    ("loss_fn", "error", "message"),
    [
        (lambda o, t: (o - t) ** 2, ValueError, r"must be one number; '<lambda>' returned a tensor of shape \[6, 3\]"),
        (lambda o, t: 0.5, TypeError, "must return one number as a tensor; it returned float"),
        (lambda o, t: (o.argmax(1) == t[:, 0]).float().mean(), ValueError, "does not depend on the outputs.*argmax"),
        (lambda o, t: t.clone().requires_grad_().sum(), ValueError, "does not depend on the outputs.*swapped"),
    ],
)
def test_what_is_no_loss_of_the_outputs_is_refused(loss_fn: Loss, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        output_curvature(loss_fn, *batch_of("numbers"))
