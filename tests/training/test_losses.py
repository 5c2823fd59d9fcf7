"""Which loss a schema is trained with: torch's own where it can be, so that its curvature is known."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from hesse.curvature.losses import FORMS, function_of
from hesse.curvature.output import output_curvature
from hesse.multimodal import Schema
from hesse.multimodal.target import Target
from hesse.training.losses import Scaled, loss_of

CLASSES = Target("c", "classification", ("a", "b", "c"))
WEIGHED = Target("c", "classification", ("a", "b", "c"), weights=(0.5, 1.0, 2.0), share=0.5)
LABELS = Target("l", "multilabel", ("x", "y"))
WEIGHED_LABELS = Target("l", "multilabel", ("x", "y"), weights=(3.0, 0.5))
VALUE = Target("v", "regression", (), 10.0, 2.0, share=0.25)


def schema(*targets: Target) -> Schema:
    return Schema((), targets)


@pytest.mark.parametrize(
    ("target", "function", "options"),
    [
        pytest.param(CLASSES, F.cross_entropy, {}, id="classes"),
        pytest.param(LABELS, F.binary_cross_entropy_with_logits, {}, id="labels"),
        pytest.param(VALUE, F.mse_loss, {}, id="value"),
        pytest.param(
            WEIGHED_LABELS, F.binary_cross_entropy_with_logits, {"pos_weight": [3.0, 0.5]}, id="weighted labels"
        ),
    ],
)
def test_one_target_has_torchs_own_loss(target: Target, function: object, options: dict[str, list[float]]) -> None:
    found, bound = function_of(loss_of(schema(target)))
    assert found is function
    assert {name: weights.tolist() for name, weights in bound.items()} == options


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weighted_classes_are_a_mean_over_rows(dtype: torch.dtype) -> None:
    """So that the loss of a batch is that of its halves, whichever of them has the rare class."""
    torch.manual_seed(0)
    out, classes = torch.randn(6, 3, dtype=dtype), torch.tensor([0, 0, 0, 1, 2, 0])
    loss = loss_of(schema(WEIGHED))
    weights = torch.tensor([0.5, 1.0, 2.0], dtype=dtype)
    rows = F.cross_entropy(out, classes, reduction="none") * weights[classes]
    torch.testing.assert_close(loss(out, classes), rows.mean())
    halves = [loss(out[at], classes[at]) for at in (slice(0, 3), slice(3, 6))]
    torch.testing.assert_close(loss(out, classes), (halves[0] + halves[1]) / 2)
    _same_curvature(loss, out, classes)


def test_a_multiple_of_a_loss_has_that_of_its_curvature() -> None:
    torch.manual_seed(0)
    out, classes = torch.randn(6, 3, dtype=torch.float64), torch.tensor([0, 0, 0, 1, 2, 0])
    for inner in (F.cross_entropy, loss_of(schema(WEIGHED))):
        loss = Scaled(inner, 0.7)
        torch.testing.assert_close(loss(out, classes), 0.7 * inner(out, classes))
        _same_curvature(loss, out, classes)


def _same_curvature(loss: Any, out: torch.Tensor, targets: torch.Tensor) -> None:
    """That products with the curvature are those with the dense Hessian, and it is known in closed form."""
    u = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(out)
    dense = torch.autograd.functional.hessian(lambda o: loss(o, targets), out)
    curvature = output_curvature(loss, out, targets)
    torch.testing.assert_close(curvature.product(u), (dense.flatten(2).flatten(0, 1) @ u.flatten()).view_as(u))
    assert curvature.psd


def test_several_targets_add_up_and_a_rare_one_counts_no_less() -> None:
    """Half of the rows have a class and a quarter a value, as their shares say: then the parts are means over these."""
    torch.manual_seed(0)
    out = torch.randn(8, 6)
    classes = torch.tensor([0, 1, 2, 1, -100, -100, -100, -100])
    labels = torch.randint(2, (8, 2)).float()
    values = torch.full((8, 1), float("nan"))
    values[:2, 0] = torch.tensor([1.0, -1.0])
    loss = loss_of(schema(WEIGHED, LABELS, VALUE))
    weights = torch.tensor([0.5, 1.0, 2.0])
    expected = (
        F.cross_entropy(out[:4, :3], classes[:4], weight=weights, reduction="sum") / 4
        + F.binary_cross_entropy_with_logits(out[:, 3:5], labels, reduction="sum") / 8
        + F.mse_loss(out[:2, 5:], values[:2])
    )
    torch.testing.assert_close(loss(out, (classes, labels, values)), expected)
    assert isinstance(loss, functools.partial)
    assert function_of(loss)[0] in FORMS
