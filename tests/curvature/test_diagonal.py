"""The exact diagonal of Gauss-Newton and Fisher matrices against dense ones, made of autograd's Jacobian row by row."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import oracles
from hesse.curvature import DerivativeError, fisher, ggn, hessian
from hesse.curvature import collect as collecting
from hesse.curvature import squares as squaring
from hesse.objective.function import objective
from layer_problems import APART, CLASSES, MIXED, B, classes, layer, made
from problems import Problem
from tolerances import ALGEBRA


def right(case: Problem) -> Tensor:
    torch.manual_seed(5)  # for dropout
    return oracles.gauss_newton(objective(*case)).diagonal()


def exact(case: Problem, **options: Any) -> Any:
    torch.manual_seed(5)
    return ggn(*case, verify=False, **options).diagonal(method="exact")


@pytest.mark.parametrize("name", APART)
def test_layers(name: str) -> None:
    case = made(APART[name])
    found = exact(case)
    torch.testing.assert_close(found.value, right(case), **ALGEBRA)
    assert not found.error.any() and found.converged and found.method == "exact"
    assert found.products == case.model(case.batch[0]).shape[1]  # a pass a class


@pytest.mark.parametrize("name", MIXED)
def test_layers_that_mix_examples(name: str) -> None:
    make, passes = MIXED[name]
    case = made(make)
    found = exact(case)
    torch.testing.assert_close(found.value, right(case), **ALGEBRA)
    assert found.products == passes


def test_mixing_that_no_value_shows() -> None:
    """Alone, an example has the outputs that it has in the batch, and other derivatives."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.head = nn.Parameter(torch.ones(5)), nn.Linear(5, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            h = x * self.scale
            mean = h.mean(0)
            return self.head(h + mean - mean.detach())

    case = made(lambda: classes(Model(), torch.randn(B, 5)))
    found = exact(case)
    torch.testing.assert_close(found.value, right(case), **ALGEBRA)
    assert found.products == CLASSES + CLASSES * B


# -- sums of squares: small sizes take every path ------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 40, 400])
@pytest.mark.parametrize("name", ["Conv2d, grouped", "Linear on many positions", "tied embedding", "LSTM, packed"])
def test_whatever_is_kept_at_a_time(name: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = made(APART[name])
    expected = right(case)
    monkeypatch.setattr(squaring, "FORMED", size)
    monkeypatch.setattr(collecting, "ON_CPU", size)
    monkeypatch.setattr(collecting, "BATCHED", size)
    monkeypatch.setattr(collecting, "PATCHES", size)
    torch.testing.assert_close(exact(case).value, expected, **ALGEBRA)


def test_an_operation_that_cannot_be_batched() -> None:
    class Strange(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x.sin()

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            (x,) = ctx.saved_tensors
            return g * x.cos() if float(g.detach().abs().sum()) else g  # asks for a number

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(5, 4), nn.Linear(4, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(Strange.apply(self.first(x)))

    case = made(lambda: classes(Model(), torch.randn(B, 5)))
    torch.testing.assert_close(exact(case).value, right(case), **ALGEBRA)


# -- losses --------------------------------------------------------------------------------------------------------


class Tagger(nn.Module):
    """Sequences to classes at each position: [B, C, T], or the positions as rows."""

    def __init__(self, rows: bool, first: bool = True) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 6, 0.0, batch_first=first)
        self.head = nn.Linear(4, CLASSES)
        self.rows = rows

    def forward(self, x: Tensor) -> Tensor:
        h = self.head(self.layer(x))
        return h.flatten(0, 1) if self.rows else h.mT


def labels(*shape: int) -> Tensor:
    y = torch.randint(CLASSES, shape)
    y.view(-1)[:2] = -100
    return y


def tagged(rows: bool, first: bool = True, length: int = 5) -> Problem:
    x = torch.randn(4, length, 4)
    return Problem(Tagger(rows, first), F.cross_entropy, (x, labels(4 * length) if rows else labels(4, length)))


def numbers(loss_fn: Callable[..., Tensor], target: Callable[[Tensor], Tensor], outputs: int = 2) -> Problem:
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, outputs))
    x = torch.randn(B, 5)
    return Problem(model, loss_fn, (x, target(torch.randn(B, outputs))))


def quartic(o: Tensor, t: Tensor) -> Tensor:
    return (o - t).pow(4).sum()


WEIGHTS = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
LOSSES: dict[str, Callable[[], Problem]] = {
    "tokens": lambda: tagged(rows=False),
    "tokens as rows": lambda: tagged(rows=True),
    "tokens as rows, square": lambda: tagged(rows=True, length=4),
    "tokens as rows, examples second": lambda: tagged(rows=True, first=False),
    "cross-entropy, weighted and smoothed": lambda: Problem(
        nn.Linear(5, CLASSES),
        functools.partial(F.cross_entropy, weight=WEIGHTS, label_smoothing=0.1, ignore_index=1),
        (torch.randn(B, 5), torch.arange(B) % CLASSES),
    ),
    "mean of squares": lambda: numbers(F.mse_loss, lambda t: t),
    "sum of squares": lambda: numbers(nn.MSELoss(reduction="sum"), lambda t: t),
    "squares of images": lambda: Problem(
        nn.Conv2d(1, 2, 2), F.mse_loss, (torch.randn(3, 1, 3, 2), torch.zeros(3, 2, 2, 1))
    ),
    "squares of numbers": lambda: Problem(
        nn.Sequential(nn.Linear(5, 1), nn.Flatten(0)), F.mse_loss, (torch.randn(B, 5), torch.randn(B))
    ),
    "binary": lambda: numbers(F.binary_cross_entropy_with_logits, lambda t: (t > 0).to(t)),
    "Huber": lambda: numbers(F.huber_loss, lambda t: t),
    "Poisson": lambda: numbers(F.poisson_nll_loss, lambda t: t.abs().round()),
    "soft margin": lambda: numbers(F.soft_margin_loss, torch.sign),
    "one's own": lambda: numbers(quartic, lambda t: t),
    "one example": lambda: Problem(nn.Linear(5, CLASSES), F.cross_entropy, (torch.randn(1, 5), torch.tensor([1]))),
    "no batch dimension": lambda: Problem(nn.Linear(5, CLASSES), F.cross_entropy, (torch.randn(5), torch.tensor(1))),
}


# Sequences whose positions are rows of the outputs are told apart, whichever comes first: a pass for each position
# and class of what they share, and for each class of what knows of one position only.
PASSES = {"tokens": 5 * CLASSES, "tokens as rows, examples second": 4 * CLASSES, "squares of numbers": 1}


@pytest.mark.parametrize("name", LOSSES)
def test_losses(name: str) -> None:
    case = made(LOSSES[name])
    found = exact(case)
    torch.testing.assert_close(found.value, right(case), **ALGEBRA)
    assert found.products == PASSES.get(name, found.products)


def test_log_probabilities_curve_as_logits_do() -> None:
    logits = made(lambda: layer(nn.Linear(5, 4), 5))
    model = nn.Sequential(logits.model, nn.LogSoftmax(1))
    found = exact(Problem(model, F.nll_loss, logits.batch))
    torch.testing.assert_close(found.value, right(logits), **ALGEBRA)


@pytest.mark.parametrize("name", ["tokens", "tokens as rows", "mean of squares", "one's own", "squares of numbers"])
@pytest.mark.parametrize("fisher_type", ["exact", "sampled", "empirical"])
def test_fisher_matrices(fisher_type: Any, name: str) -> None:
    case = made(LOSSES[name])
    if name == "one's own" and fisher_type != "empirical":
        with pytest.raises(TypeError, match="no probability model"):
            fisher(*case, fisher_type=fisher_type)
        return
    matrix = fisher(*case, fisher_type=fisher_type, seed=3)
    torch.testing.assert_close(matrix.diagonal(method="exact").value, matrix.dense().diagonal(), **ALGEBRA)


# -- the operator --------------------------------------------------------------------------------------------------


def test_blocks() -> None:
    case = made(APART["Conv2d"])
    whole = ggn(*case)
    expected = whole.layout.split(whole.diagonal(method="exact").value)
    for pattern in ("layer.*", "*.bias", "head.weight"):
        block = whole.block(pattern)
        found = block.layout.split(block.diagonal(method="exact").value)
        for name, values in found.items():
            torch.testing.assert_close(values, expected[name], **ALGEBRA)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_batches_make_one_matrix(reduction: Any) -> None:
    model, _, (x, y) = made(APART["Conv1d"])
    loss_fn = functools.partial(F.cross_entropy, reduction=reduction)
    expected = exact(Problem(model, loss_fn, (x, y)))
    parts = [(x[:4], y[:4]), (x[4:], y[4:])]
    found = exact(Problem(model, loss_fn, parts), reduction=reduction)
    torch.testing.assert_close(found.value, expected.value, **ALGEBRA)
    assert found.products == 2 * expected.products


def test_draws_differ_from_batch_to_batch() -> None:
    model, loss_fn, (x, y) = made(APART["Linear"])
    matrix = fisher(model, loss_fn, [(x, y), (x, y)], fisher_type="sampled", seed=3)
    torch.testing.assert_close(matrix.diagonal(method="exact").value, matrix.dense().diagonal(), **ALGEBRA)


def test_half_precision_is_computed_in_float32() -> None:
    case = made(APART["Linear"])
    model = copy.deepcopy(case.model).to(torch.bfloat16)
    rounded = Problem(copy.deepcopy(model).double(), case.loss_fn, (case.batch[0].bfloat16().double(), case.batch[1]))
    found = exact(Problem(model, case.loss_fn, (case.batch[0].bfloat16(), case.batch[1])))
    torch.testing.assert_close(found.value, right(rounded), rtol=1e-5, atol=1e-8)  # float32 rounds to 6e-8


def test_auto_is_exact_where_that_is_cheap() -> None:
    case = made(MIXED["BatchNorm, training"][0])
    matrix, passes = ggn(*case), MIXED["BatchNorm, training"][1]
    assert matrix.diagonal().method == "exact" and matrix.diagonal().products == passes
    assert matrix.diagonal(max_products=passes).products == passes
    assert matrix.diagonal(max_products=passes - 1, rtol=10.0).products < passes
    estimate = matrix.diagonal(method="bekas", rtol=0.5)
    assert estimate.error.any()
    assert hessian(*case).diagonal(rtol=10.0).products > 0


def test_no_root_no_exact_diagonal() -> None:
    case = made(lambda: numbers(lambda o, t: (o * t).cos().sum(), lambda t: t))
    matrix = ggn(*case)
    with pytest.raises(ValueError, match="negative eigenvalues: the loss is not convex there"):
        matrix.diagonal(method="exact")
    torch.testing.assert_close(matrix.diagonal(rtol=1e-9).value, matrix.dense().diagonal(), **ALGEBRA)
    with pytest.raises(ValueError, match="method"):
        hessian(*case).diagonal(method="exact")


def test_stale() -> None:
    case = made(APART["Linear"])
    matrix = ggn(*case)
    with torch.no_grad():
        case.model.head.weight.mul_(2)
    with pytest.raises(RuntimeError, match="parameters have changed"):
        matrix.diagonal()


def test_what_autograd_sees_only_in_its_backward_pass_is_refused() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(5, 4), nn.Linear(4, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(checkpoint(self.body, x.clone().requires_grad_(), use_reentrant=True))

    case = made(lambda: classes(Model(), torch.randn(B, 5)))
    with pytest.raises(DerivativeError, match="use_reentrant=False"):
        exact(case)


def test_the_model_is_left_alone() -> None:
    model, loss_fn, batch = made(MIXED["BatchNorm, training"][0])
    model.layer.append(nn.Dropout(0.5))
    matrix = ggn(model, loss_fn, batch, verify=False)
    called: list[Any] = []
    model.head.register_full_backward_hook(lambda *_: called.append(1))
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    matrix.diagonal(method="exact")
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert len(model.head._backward_hooks) == 1
    assert torch.backends.mha.get_fastpath_enabled()
