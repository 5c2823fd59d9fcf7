"""Losses side by side: against dense Hessians by autograd, written out row by row."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hesse
from hesse import check
from hesse.curvature import fisher, ggn
from hesse.curvature.losses.several import Part, several_losses
from hesse.curvature.output import output_curvature, term_gradients
from hesse.optim import KFAC, GaussNewton
from loss_cases import assert_mean, matrix_of
from tolerances import ALGEBRA

N, NAN = 5, float("nan")
WEIGHT, POS_WEIGHT = torch.tensor([0.5, 2.0, 1.0]).double(), torch.tensor([3.0, 0.4]).double()
PARTS = (
    Part(F.cross_entropy, 3, 1.5, WEIGHT),
    Part(F.mse_loss, 1),
    Part(F.binary_cross_entropy_with_logits, 2, 0.7, POS_WEIGHT),
    Part(F.cross_entropy, 2),
)
LOSS = functools.partial(several_losses, parts=PARTS)
TARGETS = (
    torch.tensor([0, -100, 2, 1, -100]),
    torch.tensor([[0.3], [NAN], [NAN], [-1.0], [2.0]]).double(),
    torch.tensor([[0.0, 1.0], [1.0, 1.0], [NAN, NAN], [0.0, 0.0], [NAN, NAN]]).double(),
    torch.tensor([1, 0, -100, 1, -100]),
)


def outputs() -> Tensor:
    return torch.randn(N, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def written_out(o: Tensor) -> Tensor:
    """The same sum, a row and a target at a time, without any of torch's losses."""
    total = o.new_zeros(())
    classes, value, labels, second = TARGETS
    for n in range(N):
        if classes[n] >= 0:
            total = total - 1.5 * WEIGHT[classes[n]] * o[n, :3].log_softmax(0)[classes[n]]
        if not value[n].isnan():
            total = total + (o[n, 3] - value[n, 0]) ** 2
        for i in range(2):
            if not labels[n, i].isnan():
                p, w = o[n, 4 + i].sigmoid(), POS_WEIGHT[i]
                total = total - 0.7 * (w * labels[n, i] * p.log() + (1 - labels[n, i]) * (1 - p).log())
        if second[n] >= 0:
            total = total - o[n, 6:].log_softmax(0)[second[n]]
    return total / N


def test_the_loss_is_what_is_written_out() -> None:
    o = outputs()
    torch.testing.assert_close(LOSS(o, TARGETS), written_out(o), **ALGEBRA)


def test_product_is_the_dense_hessian_and_the_fisher_matrix() -> None:
    o = outputs()
    curvature = output_curvature(LOSS, o, TARGETS)
    dense = torch.autograd.functional.hessian(written_out, o).reshape(o.numel(), o.numel())
    torch.testing.assert_close(matrix_of(curvature.product, o.shape), dense, **ALGEBRA)
    torch.testing.assert_close(matrix_of(curvature.fisher, o.shape), dense, **ALGEBRA)
    assert curvature.psd
    assert curvature.total == N


def test_draws_and_labels_have_the_hessian_as_second_moment() -> None:
    o = outputs()
    curvature = output_curvature(LOSS, o, TARGETS)
    dense = matrix_of(curvature.product, o.shape)
    for sample in (curvature.draw, curvature.label):
        torch.manual_seed(0)
        flat = torch.stack([sample() for _ in range(600)]).reshape(600, -1)
        assert_mean(curvature.weight * flat.unsqueeze(2) * flat.unsqueeze(1), dense)


def test_roots_add_up_to_the_block_of_each_row() -> None:
    o = outputs()
    curvature = output_curvature(LOSS, o, TARGETS)
    dense = matrix_of(curvature.product, o.shape)
    for root in (curvature.root(), curvature.fisher_root()):
        columns = torch.stack(list(root))
        blocks = torch.einsum("kni,knj->nij", columns, columns)
        torch.testing.assert_close(torch.block_diag(*blocks), dense, **ALGEBRA)


def test_term_gradients_are_those_of_each_row() -> None:
    o = outputs().requires_grad_()
    (slope,) = torch.autograd.grad(written_out(o), o)
    found = term_gradients(LOSS, o, TARGETS, output_curvature(LOSS, o, TARGETS))
    torch.testing.assert_close(found, N * slope, **ALGEBRA)


def test_the_gauss_newton_matrix_of_a_model_is_dense_algebra() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 8)).double()
    x = torch.randn(N, 3).double()
    params = dict(model.named_parameters())
    jacobians = torch.autograd.functional.jacobian(
        lambda *p: torch.func.functional_call(model, dict(zip(params, p, strict=True)), (x,)), tuple(params.values())
    )
    j = torch.cat([part.reshape(N * 8, -1) for part in jacobians], 1)
    middle = torch.autograd.functional.hessian(written_out, model(x).detach()).reshape(N * 8, N * 8)
    for matrix in (ggn(model, LOSS, (x, TARGETS)), fisher(model, LOSS, (x, TARGETS))):
        torch.testing.assert_close(matrix @ torch.eye(matrix.shape[0]).double(), j.T @ middle @ j, **ALGEBRA)
    exact = ggn(model, LOSS, (x, TARGETS)).diagonal(method="exact").value
    torch.testing.assert_close(exact, (j.T @ middle @ j).diagonal(), **ALGEBRA)


def test_the_loss_of_a_batch_is_the_mean_of_those_of_its_halves() -> None:
    """So that processes which share a batch have its gradient, whichever of them has the rows with a target."""
    o = outputs()[:4]
    targets = tuple(each[:4] for each in TARGETS)
    halves = [LOSS(o[at], tuple(each[at] for each in targets)) for at in (slice(0, 2), slice(2, 4))]
    torch.testing.assert_close(LOSS(o, targets), (halves[0] + halves[1]) / 2, **ALGEBRA)


def test_rows_without_any_target_have_no_gradient_and_no_curvature() -> None:
    targets = (torch.tensor([-100]), torch.tensor([[NAN]]), torch.tensor([[NAN, NAN]]), torch.tensor([-100]))
    o = outputs()[:1].requires_grad_()
    loss = LOSS(o, targets)
    (slope,) = torch.autograd.grad(loss, o)
    assert float(loss.detach()) == 0.0
    assert not slope.any()
    assert not matrix_of(output_curvature(LOSS, o, targets).product, o.shape).any()


@pytest.mark.parametrize(
    ("loss", "part", "targets"),
    [
        pytest.param(F.cross_entropy, Part(F.cross_entropy, 3), torch.tensor([0, 2, 1, 1] * 4), id="classes"),
        pytest.param(F.mse_loss, Part(F.mse_loss, 3, 1 / 3), torch.arange(48.0).view(16, 3) / 20, id="values"),
    ],
)
@pytest.mark.parametrize("make", [KFAC, GaussNewton], ids=["kfac", "gauss-newton"])
def test_one_part_is_trained_as_the_loss_itself(
    make: type[KFAC | GaussNewton], loss: object, part: Part, targets: Tensor
) -> None:
    """K-FAC draws the same from the same seed, so the weights are the same."""
    losses = []
    for loss_fn, actual in ((loss, targets), (functools.partial(several_losses, parts=(part,)), (targets,))):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
        x = torch.randn(16, 4).double()
        actual = (actual.double() if loss is F.mse_loss else actual) if isinstance(actual, Tensor) else actual
        optimizer = make(model)
        losses.append([float(optimizer.step(hesse.closure(model, loss_fn, (x, actual)))) for _ in range(4)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    assert losses[0][-1] < losses[0][0]


def test_the_gradient_check_passes() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 8))
    assert check.gradients(hesse.closure(model, LOSS, (torch.randn(N, 3), TARGETS))).ok


def test_outputs_of_another_width_are_refused() -> None:
    with pytest.raises(ValueError, match=r"takes outputs \[n, 8\].*got outputs \[5, 7\]"):
        LOSS(outputs()[:, 1:], TARGETS)
    with pytest.raises(ValueError, match="and 3 targets"):
        output_curvature(LOSS, outputs(), TARGETS[:3])
