"""Closed forms of torch's losses, against dense Hessians and enumerated labels by autograd in float64."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hesse.curvature.output import OutputCurvature, output_curvature, term_gradients
from loss_cases import Case, assert_mean, bound, cases, matrix_of, random
from tolerances import ALGEBRA

DRAWS = 600


NAMES = list(cases("mean"))
NO_MODEL = [name for name in NAMES if name.startswith(("Huber", "smooth L1", "squared margin"))]

every_case = pytest.mark.parametrize("name", NAMES)
each_reduction = pytest.mark.parametrize("reduction", ["mean", "sum"])
# torch's own, at "mean": the user has seen it when calling the loss
pytestmark = pytest.mark.filterwarnings("ignore:reduction. 'mean' divides the total loss:UserWarning")


def case(name: str, reduction: str) -> Case:
    return cases(reduction)[name]


def curvature_of(c: Case) -> OutputCurvature:
    return output_curvature(c.loss_fn, c.outputs, c.targets)


def inner_jacobian(c: Case) -> Tensor:
    return torch.autograd.functional.jacobian(c.inner, c.x).reshape(c.x.numel(), c.x.numel())


def hessian_in_x(c: Case) -> Tensor:
    """Of the loss in x, which is J' H_L J in the Jacobian J of ``inner``: log-softmax adds no term of its own.

    The gradient of cross-entropy in the log-probabilities sums to a constant, and so does the loss's second part.
    """
    loss_fn = c.reference or c.loss_fn
    hessian = torch.autograd.functional.hessian(lambda x: loss_fn(c.inner(x), c.targets), c.x)
    return hessian.reshape(c.x.numel(), c.x.numel())


@pytest.mark.parametrize("name", [name for name in NAMES if case(name, "mean").reference])
@each_reduction
def test_references_are_the_loss(name: str, reduction: str) -> None:
    c = case(name, reduction)
    assert c.reference is not None
    torch.testing.assert_close(c.reference(c.outputs, c.targets), c.loss_fn(c.outputs, c.targets), **ALGEBRA)


@every_case
@each_reduction
def test_product_is_the_dense_hessian(name: str, reduction: str) -> None:
    c = case(name, reduction)
    j = inner_jacobian(c)
    product = matrix_of(curvature_of(c).product, c.x.shape)
    torch.testing.assert_close(j.T @ product @ j, hessian_in_x(c), **ALGEBRA)
    assert bool(hessian_in_x(c).any())  # not 0 = 0


@every_case
def test_products_of_many_are_those_of_each(name: str) -> None:
    c = case(name, "mean")
    curvature, many = curvature_of(c), random(5, *c.x.shape)
    each = torch.stack([curvature.product(u) for u in many])
    torch.testing.assert_close(curvature.products(many), each, **ALGEBRA)
    torch.testing.assert_close(torch.vmap(curvature.product)(many), each, **ALGEBRA)


@every_case
@each_reduction
def test_draws_have_the_hessian_as_second_moment(name: str, reduction: str) -> None:
    c = case(name, reduction)
    curvature, j = curvature_of(c), inner_jacobian(c)
    draws = torch.stack([curvature.draw() for _ in range(DRAWS)])
    assert draws.shape[1:] == c.x.shape
    flat = draws.reshape(DRAWS, -1) @ j
    hessian = j.T @ matrix_of(curvature.product, c.x.shape) @ j
    assert_mean(curvature.weight * flat.unsqueeze(2) * flat.unsqueeze(1), hessian)


@every_case
@each_reduction
def test_roots_add_up_to_the_hessian(name: str, reduction: str) -> None:
    c = case(name, reduction)
    curvature = curvature_of(c)
    assert_root(curvature.root(), curvature.product, c)
    if name not in NO_MODEL:
        assert_root(curvature.fisher_root(), curvature.fisher, c)


def assert_root(root: Iterable[Tensor], product: Callable[[Tensor], Tensor], c: Case) -> None:
    """The squares of the root add up to the block of each example, and the matrix has nothing beside the blocks."""
    examples = c.examples
    columns = torch.stack([s.reshape(examples, -1) for s in root])
    matrix = matrix_of(product, c.x.shape)
    blocks = torch.einsum("kbi,kbj->bij", columns, columns)
    torch.testing.assert_close(torch.block_diag(*blocks), matrix, **ALGEBRA)


@every_case
def test_squares_of_per_example_gradients_of_the_root_are_the_exact_diagonal(name: str) -> None:
    c = case(name, "mean")
    curvature = curvature_of(c)
    examples = c.examples
    matrix = matrix_of(curvature.product, c.x.shape)
    jacobian = random(examples, c.x.numel() // examples, 4)  # of each example's outputs in four parameters
    flat = jacobian.flatten(0, 1)
    squares = torch.zeros(4).double()
    for s in curvature.root():
        squares += torch.einsum("bo,bop->bp", s.reshape(examples, -1), jacobian).square().sum(0)
    torch.testing.assert_close(squares, (flat.T @ matrix @ flat).diagonal(), **ALGEBRA)


@every_case
@each_reduction
def test_counts_are_those_of_the_loss(name: str, reduction: str) -> None:
    c = case(name, reduction)
    curvature = curvature_of(c)
    total = c.terms if c.total is None or reduction == "sum" else c.total
    assert (curvature.terms, curvature.total) == pytest.approx((c.terms, total))
    if name.startswith("multi-label") and reduction == "sum":
        assert curvature.weight == pytest.approx(1 / c.x.shape[-1])  # torch averages over the labels all the same
    else:
        assert curvature.weight == pytest.approx(1 / total if reduction == "mean" else 1)
    assert curvature.reduction == reduction
    assert curvature.psd


@every_case
@each_reduction
def test_term_gradients_are_those_of_the_sum(name: str, reduction: str) -> None:
    c = case(name, reduction)
    curvature = curvature_of(c)
    found = term_gradients(c.loss_fn, c.outputs, c.targets, curvature)
    x = c.outputs.requires_grad_()
    (gradient,) = torch.autograd.grad(functools.partial(c.loss_fn, reduction="sum")(x, c.targets), x)
    labels = c.x.shape[-1] if name.startswith("multi-label") else 1
    torch.testing.assert_close(found, labels * gradient, **ALGEBRA)


def test_term_gradients_are_those_of_single_terms() -> None:
    for name in ("cross-entropy, ignored and weighted", "NLL, positions"):
        c = case(name, "mean")
        found = term_gradients(c.loss_fn, c.outputs, c.targets, curvature_of(c))
        one = functools.partial(c.loss_fn, reduction="sum")
        for b in range(2):
            for position in range(2):
                x = c.outputs[b, :, position].requires_grad_()
                (expected,) = torch.autograd.grad(one(x, c.targets[b, position]), x)
                torch.testing.assert_close(found[b, :, position], expected, **ALGEBRA)
                assert bool(found[b, :, position].any()) == (c.targets[b, position] != 7)
    c = case("squared error", "mean")
    found = term_gradients(c.loss_fn, c.outputs, c.targets, curvature_of(c))
    torch.testing.assert_close(found, 2 * (c.outputs - c.targets), **ALGEBRA)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in NO_MODEL])
def test_labels_have_the_fisher_matrix_as_second_moment(name: str) -> None:
    c = case(name, "mean")
    curvature, j = curvature_of(c), inner_jacobian(c)
    flat = torch.stack([curvature.label() for _ in range(DRAWS)]).reshape(DRAWS, -1) @ j
    fisher = j.T @ matrix_of(curvature.fisher, c.x.shape) @ j
    assert_mean(curvature.weight * flat.unsqueeze(2) * flat.unsqueeze(1), fisher)


Labels = Iterable[tuple[Tensor, Tensor]]


def classes(p: Tensor, axis: int) -> Labels:
    for c in range(p.shape[axis]):
        yield p.select(axis, c).unsqueeze(axis), torch.full_like(p.select(axis, 0), c, dtype=torch.long)


def one_hot_classes(p: Tensor) -> Labels:
    return [(q, F.one_hot(y, p.shape[1]).to(p.dtype)) for q, y in classes(p, 1)]


def bernoulli(p: Tensor) -> Labels:
    return [(p, torch.ones_like(p)), (1 - p, torch.zeros_like(p))]


def normal(mean: Tensor, std: float) -> Labels:
    """Two labels with the mean and the variance of the normal distribution: the gradient is linear in the label."""
    half = torch.full_like(mean, 0.5)
    return [(half, mean + std), (half, mean - std)]


def poisson(rate: Tensor) -> Labels:
    for k in range(60):
        yield torch.exp(k * rate.log() - rate - math.lgamma(k + 1)), torch.full_like(rate, k)


@pytest.mark.parametrize(
    ("name", "labels"),
    [
        ("cross-entropy", lambda o: classes(o.softmax(1), 1)),
        ("cross-entropy, positions", lambda o: classes(o.softmax(1), 1)),
        ("NLL", lambda o: classes(o.exp(), 1)),
        ("KL", lambda o: one_hot_classes(o.exp())),
        ("squared error", lambda o: normal(o, 0.5**0.5)),
        ("Gaussian", lambda o: normal(o, 0.5)),
        ("binary", lambda o: bernoulli(o.sigmoid())),
        ("binary of probabilities", bernoulli),
        ("multi-label", lambda o: bernoulli(o.sigmoid())),
        ("soft margin", lambda o: [(p, 2 * y - 1) for p, y in bernoulli(o.sigmoid())]),
        ("soft margin, other targets", lambda o: [(p, 2 * y - 1) for p, y in bernoulli(o.sigmoid())]),
        ("Poisson", lambda o: poisson(o.exp())),
        ("Poisson, rates", lambda o: poisson(o + 0.1)),
    ],
)
def test_fisher_is_the_expected_square_of_the_score(name: str, labels: Callable[[Tensor], Labels]) -> None:
    c = case(name, "mean")
    curvature, outputs = curvature_of(c), c.outputs
    expected, u = torch.zeros_like(outputs), random(*outputs.shape)
    for p, y in labels(outputs):
        score = term_gradients(c.loss_fn, outputs, y, output_curvature(c.loss_fn, outputs, y))
        one_of_many = p.shape != score.shape  # a probability for each vector of classes
        along = (score * u).sum(1, keepdim=True) if one_of_many else score * u
        expected += curvature.weight * p * score * along
    torch.testing.assert_close(curvature.fisher(u), expected, **ALGEBRA)


def test_fisher_of_weighted_terms_is_their_gauss_newton_matrix() -> None:
    for name in NAMES:
        if name not in NO_MODEL and not name.startswith(("binary of prob", "soft margin", "Poisson, rates")):
            c = case(name, "mean")
            u = random(*c.x.shape)
            assert torch.equal(curvature_of(c).fisher(u), curvature_of(c).product(u)), name


@pytest.mark.parametrize("name", NO_MODEL)
def test_losses_without_a_probability_model_say_so(name: str) -> None:
    c = case(name, "mean")
    curvature = curvature_of(c)
    for ask in (curvature.label, curvature.fisher_root, lambda: curvature.fisher(c.outputs)):
        with pytest.raises(TypeError, match=r"_loss' has no probability model.*empirical Fisher"):
            ask()


def test_batchmean_divides_by_the_batch() -> None:
    c = case("KL, classes last of three", "batchmean")
    curvature, j = curvature_of(c), inner_jacobian(c)
    torch.testing.assert_close(j.T @ matrix_of(curvature.product, c.x.shape) @ j, hessian_in_x(c), **ALGEBRA)
    assert (curvature.weight, curvature.terms, curvature.total, curvature.reduction) == (0.5, 4, 2, "batchmean")


@pytest.mark.parametrize(
    ("name", "axes"),
    [
        ("cross-entropy", (1,)),
        ("cross-entropy, images", (1,)),
        ("cross-entropy, no batch", (0,)),
        ("NLL, positions", (1,)),
        ("KL, classes last of three", (2,)),
        ("KL, classes second of three", (1,)),
        ("squared error, images", (1, 2, 3)),
        ("binary, one dimension", ()),
        ("squared error, one number", ()),
        ("squared margin", (1,)),
    ],
)
def test_axes_of_a_term(name: str, axes: tuple[int, ...]) -> None:
    assert curvature_of(case(name, "mean")).axes == axes


def test_uniform_probabilities_leave_the_class_dimension_to_the_targets() -> None:
    outputs = torch.full((2, 3, 3), -math.log(3)).double()
    targets = random(2, 3, 3).softmax(1)
    assert output_curvature(F.kl_div, outputs, targets).axes == (1,)
    assert output_curvature(F.kl_div, outputs, targets.mT).axes == (2,)


def test_a_batch_in_which_nothing_counts_curves_nothing() -> None:
    outputs, targets = random(2, 3), torch.tensor([-100, -100])
    curvature = output_curvature(F.cross_entropy, outputs, targets)
    assert (curvature.weight, curvature.terms, curvature.total) == (0, 0, 0)
    for found in (
        curvature.product(outputs),
        curvature.draw(),
        term_gradients(F.cross_entropy, outputs, targets, curvature),
    ):
        assert torch.equal(found, torch.zeros(2, 3).double())


@every_case
def test_low_precision_is_computed_in_float32(name: str) -> None:
    c = case(name, "mean")

    def rounded(value: Any) -> Any:
        floating = isinstance(value, Tensor) and value.is_floating_point()
        return value.bfloat16() if floating else value

    def widened(value: Any) -> Any:
        return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value

    assert isinstance(c.loss_fn, functools.partial)
    low = {key: rounded(value) for key, value in c.loss_fn.keywords.items()}
    wide = {key: widened(value) for key, value in low.items()}
    outputs, targets = rounded(c.outputs), rounded(c.targets)
    one, other = bound(c.loss_fn.func, **low), bound(c.loss_fn.func, **wide)
    curvature = output_curvature(one, outputs, targets)
    expected = output_curvature(other, widened(outputs), widened(targets))
    u = random(*c.x.shape).float()
    assert torch.equal(curvature.product(u), expected.product(u))
    assert {t.dtype for t in (curvature.product(u.bfloat16()), curvature.draw(), *curvature.root())} == {torch.float32}
    found = term_gradients(one, outputs, targets, curvature)
    assert torch.equal(found, term_gradients(other, widened(outputs), widened(targets), expected))


@every_case
def test_a_generator_decides_the_draws_alone(name: str) -> None:
    curvature = curvature_of(case(name, "mean"))
    for ask in (curvature.draw,) if name in NO_MODEL else (curvature.draw, curvature.label):
        state = torch.get_rng_state()
        first, again = (ask(torch.Generator().manual_seed(3)) for _ in range(2))
        assert torch.equal(first, again)
        assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", ["cross-entropy, images", "squared error, images", "NLL, positions"])
def test_outputs_may_lie_in_memory_in_any_order(name: str) -> None:
    c = case(name, "mean")
    strided = c.outputs.transpose(0, -1).contiguous().transpose(0, -1)
    curvature, expected = output_curvature(c.loss_fn, strided, c.targets), curvature_of(c)
    for s, other in zip(curvature.root(), expected.root(), strict=True):
        assert torch.equal(s, other)
    assert curvature.draw().shape == c.x.shape
    torch.testing.assert_close(curvature.product(c.x), expected.product(c.x), **ALGEBRA)


def test_confident_logits_keep_their_small_curvature() -> None:
    # In float32 sigmoid(20) is 1, and p (1 - p) would be 0.
    curvature = output_curvature(F.binary_cross_entropy_with_logits, torch.tensor([[20.0]]), torch.tensor([[1.0]]))
    assert float(curvature.product(torch.ones(1, 1))) == pytest.approx(math.exp(-20), rel=1e-6)


@pytest.mark.parametrize(
    ("loss_fn", "outputs", "targets", "error", "message"),
    [
        (
            F.nll_loss,
            torch.randn(4, 3),
            torch.zeros(4).long(),
            ValueError,
            "add up to 1 along dimension 1.*log_softmax",
        ),
        (F.kl_div, torch.randn(4, 3), torch.rand(4, 3), ValueError, r"along no dimension of the outputs \[4, 3\]"),
        (F.binary_cross_entropy, 2 * torch.ones(2), torch.ones(2), ValueError, r"lie in \[2, 2\].*with_logits"),
        (
            bound(F.poisson_nll_loss, log_input=False),
            -torch.ones(2),
            torch.ones(2),
            ValueError,
            "least .* is -1.*softplus",
        ),
        (F.gaussian_nll_loss, torch.ones(2), torch.ones(2), TypeError, r"partial\(gaussian_nll_loss, var="),
        (bound(F.gaussian_nll_loss, var=-1.0), torch.ones(2), torch.ones(2), ValueError, "variance of at least 0.*-1"),
        (F.l1_loss, torch.ones(2), torch.ones(2), TypeError, "'l1_loss': it is piecewise linear.*huber_loss"),
        (bound(F.smooth_l1_loss, beta=0), torch.ones(2), torch.ones(2), TypeError, "beta=0: it is l1_loss.*beta > 0"),
        (F.multi_margin_loss, torch.ones(2, 3), torch.tensor([0, 1]), TypeError, "p=1: it is piecewise linear.*p=2"),
        (F.hinge_embedding_loss, torch.ones(2), torch.ones(2), TypeError, "piecewise linear.*soft_margin_loss"),
        (F.multilabel_margin_loss, torch.ones(2), torch.ones(2), TypeError, "multilabel_soft_margin_loss"),
        (F.triplet_margin_loss, torch.ones(2), torch.ones(2), TypeError, "compares embeddings.*of your own"),
        (bound(F.ctc_loss, input_lengths=2), torch.ones(2), torch.ones(2), TypeError, "no second derivative"),
        (F.cross_entropy, torch.ones(4, 3), torch.tensor([1]), ValueError, r"targets \[4\]; got \[1\]"),
        (F.cross_entropy, torch.ones(2, 3, 5), torch.ones(2).long(), ValueError, r"targets \[2, 5\]; got \[2\]"),
        (F.cross_entropy, torch.ones(4, 3), torch.ones(1, 3), ValueError, r"broadcasts outputs \[4, 3\]"),
        (
            bound(F.multi_margin_loss, p=2),
            torch.ones(2, 3),
            torch.ones(1).long(),
            ValueError,
            r"targets \[2\]; got \[1\]",
        ),
        (
            bound(F.mse_loss, reduction="batchmean"),
            torch.ones(2),
            torch.ones(2),
            ValueError,
            "got reduction='batchmean'",
        ),
    ],
)
def test_what_a_loss_cannot_take_is_refused(
    loss_fn: Callable[..., Tensor], outputs: Tensor, targets: Tensor, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        output_curvature(loss_fn, outputs, targets)


@pytest.mark.parametrize(
    ("loss_fn", "outputs", "targets"),
    [
        (bound(F.poisson_nll_loss, log_input=False), torch.ones(2).double(), torch.tensor([1.0, -1.0]).double()),
        (bound(F.cross_entropy, weight=torch.tensor([3.0, -1.0]).double()), random(2, 2), torch.tensor([0, 1])),
        (bound(F.mse_loss, weight=-torch.ones(2).double()), random(2), random(2)),
        (
            bound(F.multi_margin_loss, p=2, weight=torch.tensor([-1.0, 1.0]).double()),
            torch.zeros(2, 2).double(),
            torch.tensor([0, 1]),
        ),
    ],
)
def test_negative_weights_have_products_but_no_root(
    loss_fn: Callable[..., Tensor], outputs: Tensor, targets: Tensor
) -> None:
    curvature = output_curvature(loss_fn, outputs, targets)
    assert not curvature.psd
    if getattr(loss_fn, "func", None) is not F.multi_margin_loss:
        hessian = torch.autograd.functional.hessian(lambda o: loss_fn(o, targets), outputs)
        expected = hessian.reshape(outputs.numel(), outputs.numel())
        torch.testing.assert_close(matrix_of(curvature.product, outputs.shape), expected, **ALGEBRA)
    for ask in (curvature.draw, curvature.root):
        with pytest.raises(ValueError, match=r"has negative entries.*negative weights"):
            ask()
