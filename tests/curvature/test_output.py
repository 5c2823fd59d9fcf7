"""Output curvature of each loss, against the dense Hessian of the loss in the outputs, by autograd in float64."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hesse.curvature import OutputCurvature, output_curvature
from tolerances import ALGEBRA, STANDARD_ERRORS


class Case(NamedTuple):
    loss_fn: Callable[..., Tensor]
    outputs: Tensor
    targets: Tensor
    terms: float


def random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def case(name: str, reduction: str) -> Case:
    torch.manual_seed(0)
    weight = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)
    pos_weight = torch.tensor([3.0, 0.2], dtype=torch.float64)
    y = torch.tensor([0, 2, 1, 1])
    ignored = torch.tensor([0, -100, 1, -100])
    grid, grid_ignored = torch.tensor([[0, 1], [2, 2]]), torch.tensor([[0, 7], [2, 7]])
    binary, smooth = torch.tensor([[0.0, 1.0], [1.0, 1.0], [0.0, 0.3]]).double(), random(4, 3).softmax(1)
    cross = functools.partial(F.cross_entropy, reduction=reduction)
    bce = functools.partial(F.binary_cross_entropy_with_logits, reduction=reduction)
    cases = {
        "cross-entropy": Case(cross, random(4, 3), y, 4),
        "cross-entropy, no batch": Case(cross, random(3), torch.tensor(2), 1),
        "cross-entropy, class weights": Case(functools.partial(cross, weight=weight), random(4, 3), y, 4),
        "cross-entropy, ignored": Case(cross, random(4, 3), ignored, 2),
        "cross-entropy, ignored and weighted": Case(
            functools.partial(cross, ignore_index=7, weight=weight), random(2, 3, 2), grid_ignored, 2
        ),
        "cross-entropy, smoothed": Case(functools.partial(cross, label_smoothing=0.2), random(4, 3), y, 4),
        "cross-entropy, smoothed and weighted": Case(
            functools.partial(cross, label_smoothing=0.2, weight=weight), random(4, 3), y, 4
        ),
        "cross-entropy, probabilities": Case(cross, random(4, 3), smooth, 4),
        "cross-entropy, probabilities, smoothed and weighted": Case(
            functools.partial(cross, label_smoothing=0.2, weight=weight), random(4, 3), smooth, 4
        ),
        "cross-entropy, positions": Case(cross, random(2, 3, 2), grid, 4),
        "cross-entropy, positions, probabilities": Case(cross, random(2, 3, 2), random(2, 3, 2).softmax(1), 4),
        "cross-entropy, images": Case(cross, random(1, 3, 2, 2), grid[None], 4),
        "binary": Case(bce, random(3, 2), binary, 6),
        "binary, one dimension": Case(bce, random(3), binary[:, 0], 3),
        "binary, positive weight": Case(functools.partial(bce, pos_weight=pos_weight), random(3, 2), binary, 6),
        "binary, weights": Case(
            functools.partial(bce, weight=torch.tensor([[1.0], [0.0], [2.0]]).double(), pos_weight=pos_weight),
            random(3, 2),
            binary,
            6,
        ),
        "squared error": Case(functools.partial(F.mse_loss, reduction=reduction), random(3, 2), random(3, 2), 6),
        "squared error, images": Case(
            functools.partial(F.mse_loss, reduction=reduction), random(2, 1, 2, 2), random(2, 1, 2, 2), 8
        ),
    }
    return cases[name]


NAMES = [
    "cross-entropy",
    "cross-entropy, no batch",
    "cross-entropy, class weights",
    "cross-entropy, ignored",
    "cross-entropy, ignored and weighted",
    "cross-entropy, smoothed",
    "cross-entropy, smoothed and weighted",
    "cross-entropy, probabilities",
    "cross-entropy, probabilities, smoothed and weighted",
    "cross-entropy, positions",
    "cross-entropy, positions, probabilities",
    "cross-entropy, images",
    "binary",
    "binary, one dimension",
    "binary, positive weight",
    "binary, weights",
    "squared error",
    "squared error, images",
]

every_case = pytest.mark.parametrize("name", NAMES)
each_reduction = pytest.mark.parametrize("reduction", ["mean", "sum"])


def dense_hessian(c: Case) -> Tensor:
    hessian = torch.autograd.functional.hessian(lambda outputs: c.loss_fn(outputs, c.targets), c.outputs)
    return hessian.reshape(c.outputs.numel(), c.outputs.numel())


def matrix_of(curvature: OutputCurvature, shape: torch.Size) -> Tensor:
    units = torch.eye(shape.numel(), dtype=torch.float64)
    return torch.stack([curvature.product(unit.view(shape)).flatten() for unit in units])


@every_case
@each_reduction
def test_product_is_the_dense_hessian(name: str, reduction: str) -> None:
    c = case(name, reduction)
    curvature = output_curvature(c.loss_fn, c.outputs, c.targets)
    torch.testing.assert_close(matrix_of(curvature, c.outputs.shape), dense_hessian(c), **ALGEBRA)


@every_case
@each_reduction
def test_draws_have_the_hessian_as_second_moment(name: str, reduction: str) -> None:
    c = case(name, reduction)
    curvature = output_curvature(c.loss_fn, c.outputs, c.targets)
    draws = [curvature.draw() for _ in range(600)]
    weight = draws[0][1]
    assert all(w == weight and r.shape == c.outputs.shape for r, w in draws)
    squares = torch.stack([weight * r.flatten().outer(r.flatten()) for r, _ in draws])
    error = (squares.mean(0) - dense_hessian(c)).abs()
    # A product of two rare events may not occur in 600 draws: its sample variance says 0 where its mean is below 1/600.
    limit = STANDARD_ERRORS * (squares.std(0) / 600**0.5).clamp_min(1e-12)
    assert bool((error <= limit).all()), f"off by {float((error / limit).max()) * STANDARD_ERRORS:.1f} standard errors"


@every_case
@each_reduction
def test_terms_are_what_the_loss_counts(name: str, reduction: str) -> None:
    c = case(name, reduction)
    assert output_curvature(c.loss_fn, c.outputs, c.targets).terms == pytest.approx(c.terms)


@pytest.mark.parametrize(
    ("module", "function"),
    [
        (nn.MSELoss(), F.mse_loss),
        (nn.MSELoss(reduction="sum"), functools.partial(F.mse_loss, reduction="sum")),
        (
            nn.BCEWithLogitsLoss(pos_weight=torch.tensor(3.0)),
            functools.partial(F.binary_cross_entropy_with_logits, pos_weight=torch.tensor(3.0)),
        ),
        (
            nn.CrossEntropyLoss(weight=torch.tensor([0.5, 2.0, 1.0]).double(), label_smoothing=0.2, ignore_index=1),
            functools.partial(
                F.cross_entropy,
                weight=torch.tensor([0.5, 2.0, 1.0]).double(),
                label_smoothing=0.2,
                ignore_index=1,
            ),
        ),
    ],
    ids=["MSELoss", "MSELoss, sum", "BCEWithLogitsLoss", "CrossEntropyLoss"],
)
def test_a_module_is_its_function(module: nn.Module, function: Callable[..., Tensor]) -> None:
    torch.manual_seed(0)
    outputs = random(4, 3)
    targets = torch.randint(3, (4,)) if isinstance(module, nn.CrossEntropyLoss) else torch.rand(4, 3).double()
    one, other = (output_curvature(loss_fn, outputs, targets) for loss_fn in (module, function))
    assert torch.equal(matrix_of(one, outputs.shape), matrix_of(other, outputs.shape))
    assert one.terms == other.terms


def test_outputs_with_a_graph_give_curvature_without() -> None:
    outputs = random(4, 3).requires_grad_()
    curvature = output_curvature(F.cross_entropy, outputs, torch.randint(3, (4,)))
    assert not curvature.draw()[0].requires_grad
    assert not curvature.product(random(4, 3)).requires_grad


def my_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets)


class Focal(nn.CrossEntropyLoss):
    """A subclass may compute anything."""


@pytest.mark.parametrize(
    ("loss_fn", "name"),
    [(my_loss, "my_loss"), (F.l1_loss, "l1_loss"), (nn.HuberLoss(), "HuberLoss"), (Focal(), "Focal")],
)
def test_an_unknown_loss_is_named_with_the_known_ones(loss_fn: Callable[..., Any], name: str) -> None:
    with pytest.raises(TypeError, match=rf"no Gauss-Newton factor .* '{name}'.*cross_entropy, mse_loss"):
        output_curvature(loss_fn, random(4, 3), torch.zeros(4, dtype=torch.long))


def test_outputs_that_are_no_tensor_are_named() -> None:
    with pytest.raises(TypeError, match="it returned tuple"):
        output_curvature(F.mse_loss, (random(2), random(2)), random(2))


@pytest.mark.parametrize(("outputs", "targets"), [((4, 1), (4,)), ((4,), (4, 1)), ((4, 2), (1, 2))])
def test_squared_error_refuses_to_broadcast(outputs: tuple[int, ...], targets: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"broadcasts outputs \[4.*view_as"):
        output_curvature(F.mse_loss, random(*outputs), random(*targets))


@pytest.mark.parametrize("loss_fn", [F.cross_entropy, F.binary_cross_entropy_with_logits, F.mse_loss])
def test_a_loss_that_is_not_one_number_is_refused(loss_fn: Callable[..., Tensor]) -> None:
    with pytest.raises(ValueError, match="must be one number; got reduction='none'"):
        output_curvature(functools.partial(loss_fn, reduction="none"), random(4, 3), torch.rand(4, 3).double())
