"""Which curvature a loss gets: torch's functions and modules, and losses of one's own, by autograd in float64."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hesse.curvature import output_curvature
from hesse.curvature.output import term_gradients
from loss_cases import batch_of, matrix_of, random
from tolerances import ALGEBRA

Loss = Callable[..., Any]


def power(outputs: Tensor, targets: Tensor) -> Tensor:
    """A loss of one's own."""
    return (outputs - targets).pow(4).mean()


WEIGHT = torch.tensor([0.5, 2.0, 1.0]).double()
MODULES: list[tuple[nn.Module, Loss, str]] = [
    (
        nn.CrossEntropyLoss(weight=WEIGHT, label_smoothing=0.2, ignore_index=1),
        functools.partial(F.cross_entropy, weight=WEIGHT, label_smoothing=0.2, ignore_index=1),
        "labels",
    ),
    (
        nn.NLLLoss(weight=WEIGHT, ignore_index=1, reduction="sum"),
        functools.partial(F.nll_loss, weight=WEIGHT, ignore_index=1, reduction="sum"),
        "labels",
    ),
    (
        nn.KLDivLoss(log_target=True, reduction="batchmean"),
        functools.partial(F.kl_div, log_target=True, reduction="batchmean"),
        "logarithms",
    ),
    (nn.MSELoss(), F.mse_loss, "numbers"),
    (nn.MSELoss(reduction="sum"), functools.partial(F.mse_loss, reduction="sum"), "numbers"),
    (
        functools.partial(nn.GaussianNLLLoss(eps=0.4, reduction="sum"), var=0.3),  # type: ignore[list-item]
        functools.partial(F.gaussian_nll_loss, eps=0.4, reduction="sum", var=0.3),
        "numbers",
    ),
    (
        nn.BCEWithLogitsLoss(weight=WEIGHT, pos_weight=torch.tensor(3.0)),
        functools.partial(F.binary_cross_entropy_with_logits, weight=WEIGHT, pos_weight=torch.tensor(3.0)),
        "numbers",
    ),
    (
        nn.BCELoss(weight=WEIGHT, reduction="sum"),
        functools.partial(F.binary_cross_entropy, weight=WEIGHT, reduction="sum"),
        "probabilities",
    ),
    (nn.MultiLabelSoftMarginLoss(WEIGHT), functools.partial(F.multilabel_soft_margin_loss, weight=WEIGHT), "numbers"),
    (nn.SoftMarginLoss(reduction="sum"), functools.partial(F.soft_margin_loss, reduction="sum"), "numbers"),
    (
        nn.PoissonNLLLoss(log_input=False, eps=0.2, full=True),
        functools.partial(F.poisson_nll_loss, log_input=False, eps=0.2),
        "probabilities",
    ),
    (nn.HuberLoss(delta=0.3), functools.partial(F.huber_loss, delta=0.3), "numbers"),
    (nn.SmoothL1Loss(beta=0.3), functools.partial(F.smooth_l1_loss, beta=0.3), "numbers"),
    (
        nn.MultiMarginLoss(p=2, margin=0.5, weight=WEIGHT),
        functools.partial(F.multi_margin_loss, p=2, margin=0.5, weight=WEIGHT),
        "labels",
    ),
]


@pytest.mark.parametrize(("module", "function", "kind"), MODULES)
def test_a_module_is_its_function(module: nn.Module, function: Loss, kind: str) -> None:
    outputs, targets = batch_of(kind)
    one, other = (output_curvature(loss_fn, outputs, targets) for loss_fn in (module, function))
    assert torch.equal(matrix_of(one.product, outputs.shape), matrix_of(other.product, outputs.shape))
    assert (one.terms, one.total, one.weight) == (other.terms, other.total, other.weight)
    gradient, again = (term_gradients(f, outputs, targets, one) for f in (module, function))
    torch.testing.assert_close(gradient, again, **ALGEBRA)


@pytest.mark.parametrize(
    ("options", "reduction"),
    [({}, "mean"), ({"size_average": False}, "sum"), ({"size_average": True}, "mean"), ({"reduce": True}, "mean")],
)
def test_the_old_words_for_reductions_are_understood(options: dict[str, Any], reduction: str) -> None:
    outputs, targets = batch_of("numbers")
    curvature = output_curvature(functools.partial(F.mse_loss, reduction="mean", **options), outputs, targets)
    assert curvature.reduction == reduction
    assert curvature.weight == (1 if reduction == "sum" else 1 / 18)
    with pytest.raises(ValueError, match="got reduction='none'"):
        output_curvature(functools.partial(F.mse_loss, reduce=False), outputs, targets)


def test_outputs_with_a_graph_give_curvature_without() -> None:
    weight = torch.ones(3, requires_grad=True)
    for loss_fn in (functools.partial(F.cross_entropy, weight=weight), F.mse_loss, power):
        outputs = torch.randn(4, 3, requires_grad=True)
        targets = torch.randn(4, 3).softmax(1).requires_grad_()
        curvature = output_curvature(loss_fn, outputs, targets, reduction="mean")
        for found in (
            curvature.draw(),
            curvature.product(torch.randn(4, 3)),
            next(curvature.root()),
            term_gradients(loss_fn, outputs, targets, curvature),
        ):
            assert not found.requires_grad
        assert outputs.is_leaf
        assert outputs.grad is None


@pytest.mark.parametrize("loss_fn", [F.mse_loss, lambda outputs, targets: outputs.sum()])
def test_outputs_that_are_no_tensor_of_real_numbers_are_named(loss_fn: Loss) -> None:
    for outputs, error, message in (
        ((random(2), random(2)), TypeError, "it returned tuple"),
        ({"logits": random(2)}, TypeError, "it returned dict"),
        (torch.zeros(2).long(), TypeError, "int64.*argmax"),
        (torch.zeros(2).to(torch.complex64), TypeError, "complex64.*view_as_real"),
        (torch.zeros(0, 3), ValueError, r"empty, of shape \[0, 3\]"),
    ):
        with pytest.raises(error, match=message):
            output_curvature(loss_fn, outputs, random(2))


@pytest.mark.parametrize(("outputs", "targets"), [((4, 1), (4,)), ((4,), (4, 1)), ((4, 2), (1, 2))])
@pytest.mark.parametrize(
    "loss_fn", [F.mse_loss, F.huber_loss, F.smooth_l1_loss, F.poisson_nll_loss, F.soft_margin_loss]
)
def test_losses_of_elements_refuse_to_broadcast(
    loss_fn: Loss, outputs: tuple[int, ...], targets: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match=rf"{loss_fn.__name__} broadcasts outputs \[4.*view_as"):
        output_curvature(loss_fn, random(*outputs), random(*targets))


@pytest.mark.parametrize("loss_fn", [F.cross_entropy, F.binary_cross_entropy_with_logits, F.mse_loss, F.kl_div])
def test_a_loss_that_is_not_one_number_is_refused(loss_fn: Loss) -> None:
    with pytest.raises(ValueError, match="must be one number; got reduction='none'"):
        output_curvature(functools.partial(loss_fn, reduction="none"), *batch_of("logarithms"))


@pytest.mark.parametrize(
    "module", [nn.L1Loss(), nn.HingeEmbeddingLoss(), nn.MultiLabelMarginLoss(), nn.CTCLoss(), nn.CosineEmbeddingLoss()]
)
def test_modules_of_losses_without_curvature_are_refused(module: nn.Module) -> None:
    with pytest.raises(TypeError, match=r"no Gauss-Newton factor is known for the loss '\w+_loss': it"):
        output_curvature(module, random(4, 3), random(4, 3))


def test_a_torch_loss_says_its_reduction_itself() -> None:
    outputs, targets = batch_of("numbers")
    assert output_curvature(F.mse_loss, outputs, targets, reduction="mean").reduction == "mean"
    with pytest.raises(ValueError, match=r"'mse_loss' has reduction='mean' itself; got reduction='sum'"):
        output_curvature(F.mse_loss, outputs, targets, reduction="sum")
    with pytest.raises(ValueError, match="must be 'mean' or 'sum'; got 'average'"):
        output_curvature(power, outputs, targets, reduction="average")


@pytest.mark.parametrize("shape", [(4, 3), (4,), (2, 3, 2)])
def test_outer_products_keep_terms_apart(shape: tuple[int, ...]) -> None:
    outputs, r, u = random(*shape), random(*shape), random(*shape)
    curvature = output_curvature(F.mse_loss, outputs, outputs)
    expected = torch.stack([w * (w * v).sum() for w, v in zip(r, u, strict=True)]) / outputs.numel()
    torch.testing.assert_close(curvature.outer(r, u), expected, **ALGEBRA)
