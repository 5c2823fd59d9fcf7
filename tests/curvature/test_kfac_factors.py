"""K-FAC's factors: against plain loops, where K-FAC is exact, in the mean over draws, from several batches."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import oracles
from hesse.curvature import fisher, ggn, kfac
from hesse.curvature.factored import KroneckerFactored
from hesse.curvature.layers import Form, Lookups, rows_of
from hesse.curvature.output import output_curvature
from hesse.curvature.statistics import Diagonal, Kronecker
from hesse.curvature.uses import output_gradients, watch_uses
from hesse.objective.function import objective
from layer_problems import APART, CLASSES, MIXED, B, classes, layer, made
from problems import Problem
from processes import in_processes
from tolerances import ALGEBRA, STANDARD_ERRORS


def block_of(case: Problem, *names: str) -> Tensor:
    """The dense block of the Gauss-Newton matrix."""
    torch.manual_seed(5)  # for dropout
    o = objective(*case)
    rows = torch.cat([torch.arange(s.start, s.stop) for s in (oracles.rows_of(o, name) for name in names)])
    return oracles.gauss_newton(o)[rows][:, rows]


def factors(case: Problem, **options: Any) -> KroneckerFactored:
    torch.manual_seed(5)
    return kfac(*case, **{"fisher_type": "exact", **options})


# -- where K-FAC is exact ------------------------------------------------------------------------------------------


def test_one_example() -> None:
    """The block is one outer product of inputs, for each column of H_L: exact at one position."""
    x = torch.randn(1, 5, dtype=torch.float64)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    case = Problem(model, F.cross_entropy, (x, torch.tensor([1])))
    B_ = factors(case)
    for weight in ("0", "2"):
        names = (f"{weight}.weight", f"{weight}.bias")
        torch.testing.assert_close(B_.block(f"{weight}.*").dense(), block_of(case, *names), **ALGEBRA)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_linear_networks(reduction: str) -> None:
    """With the squared error of a linear network, what is sent back knows nothing of the inputs."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 4), nn.Linear(4, 2)).double()
    loss_fn = functools.partial(F.mse_loss, reduction=reduction)
    case = Problem(model, loss_fn, (torch.randn(7, 5).double(), torch.randn(7, 2).double()))
    found = factors(case)
    for i in range(3):
        expected = block_of(case, f"{i}.weight", f"{i}.bias")
        torch.testing.assert_close(found.block(f"{i}.*").dense(), expected, **ALGEBRA)


def test_embeddings_of_linear_networks() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 2)).double()
    case = Problem(model, F.mse_loss, (torch.randint(5, (9,)), torch.randn(9, 2).double()))
    torch.testing.assert_close(factors(case).block("0.weight").dense(), block_of(case, "0.weight"), **ALGEBRA)


def test_reduce_is_exact_where_positions_are_averaged() -> None:
    torch.manual_seed(0)
    case = classes(Averages(nn.Linear(4, CLASSES)), torch.randn(1, 5, 4))
    case = Problem(case.model.double(), case.loss_fn, (case.batch[0].double(), case.batch[1][:1]))
    names = ("layer.weight", "layer.bias")
    torch.testing.assert_close(factors(case, variant="reduce").dense(), block_of(case, *names), **ALGEBRA)


class Averages(nn.Module):
    """A linear layer on positions, averaged."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).mean(1)


# -- factors against plain loops -----------------------------------------------------------------------------------


def columns_at(case: Problem, forward: Callable[[Tensor], tuple[Tensor, Tensor]]) -> list[Tensor]:
    """For each example and column of a root of its H_L the gradient at a layer's output; forward gives (h, outputs)."""
    x, y = case.batch
    found = []
    for b in range(len(x)):
        h, outputs = forward(x[b : b + 1])
        H = oracles.loss_hessian(Problem_(case, outputs, y[b : b + 1])) / len(x)
        values, vectors = torch.linalg.eigh(H)
        for value, vector in zip(values.clamp_min(0), vectors.T, strict=True):
            (g,) = torch.autograd.grad(outputs, h, (value.sqrt() * vector).view_as(outputs), retain_graph=True)
            found.append(g[0])
    return found


def Problem_(case: Problem, outputs: Tensor, y: Tensor) -> Any:
    """An objective whose outputs are given."""
    return objective(_Given(outputs.detach()), case.loss_fn, (torch.zeros(1), y))


class _Given(nn.Module):
    def __init__(self, outputs: Tensor) -> None:
        super().__init__()
        self.outputs = nn.Parameter(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.outputs


@pytest.mark.parametrize("variant", ["expand", "reduce"])
def test_factors_of_positions(variant: Any) -> None:
    case = made(APART["Linear on many positions"])  # [B, 5, 3]
    model, x = case.model, case.batch[0]

    def forward(one: Tensor) -> tuple[Tensor, Tensor]:
        h = model.layer(one)
        return h, model.head(h.flatten(1).sin())

    sent = columns_at(case, forward)  # [5, 4]
    inputs = torch.cat([x, torch.ones(B, 5, 1, dtype=x.dtype)], dim=2)
    if variant == "expand":
        A = sum(torch.outer(a, a) for a in inputs.flatten(0, 1)) / (B * 5)
        G = sum(torch.outer(g, g) for one in sent for g in one)
    else:
        A = sum(torch.outer(a, a) for a in inputs.mean(1)) / B
        G = sum(torch.outer(g, g) for g in (one.sum(0) for one in sent))
    found = factors(case, variant=variant).factors["layer.weight"]
    assert isinstance(found, Kronecker) and found.bias == "layer.bias" and found.form == Form()
    torch.testing.assert_close(found.a, A, **ALGEBRA)
    torch.testing.assert_close(found.g, G, **ALGEBRA)


@pytest.mark.parametrize("variant", ["expand", "reduce"])
def test_factors_of_a_grouped_convolution(variant: Any) -> None:
    case = made(APART["Conv2d, grouped"])  # 4 to 6 channels in 2 groups, kernel 2, of 3 x 3
    model, x = case.model, case.batch[0]

    def forward(one: Tensor) -> tuple[Tensor, Tensor]:
        h = model.layer(one)
        return h, model.head(h.flatten(1).sin())

    sent = [g.flatten(1).T for g in columns_at(case, forward)]  # [4 positions, 6]
    patches = F.unfold(x, 2).mT  # [B, 4 positions, 4 channels * 4]
    found = factors(case, variant=variant).factors["layer.weight"]
    assert isinstance(found, Kronecker)
    for group in range(2):
        a, g = patches[..., group * 8 : group * 8 + 8], [one[:, group * 3 : group * 3 + 3] for one in sent]
        if variant == "expand":
            A, G = torch.einsum("bti,btj->ij", a, a) / (B * 4), sum(one.T @ one for one in g)
        else:
            mean, total = a.mean(1), [one.sum(0) for one in g]
            A, G = mean.T @ mean / B, sum(torch.outer(one, one) for one in total)
        torch.testing.assert_close(found.a[group], A, **ALGEBRA)
        torch.testing.assert_close(found.g[group], G, **ALGEBRA)


SEVERAL = (
    "a layer called three times",
    "GRU",
    "LSTM, packed",
    "MultiheadAttention, packed, whole and in parts",
    "Embedding, padding",
)


@pytest.mark.parametrize("name", SEVERAL)
def test_factors_of_several_uses_and_of_parts(name: str) -> None:
    """Outer products, one row of one use after the other."""
    case = made(APART[name])
    o = objective(*case)
    with o.at(o.params), watch_uses(o.params) as uses:
        outputs = o.run_model()
    columns = list(output_curvature(case.loss_fn, outputs, case.batch[1]).root())
    for weight, one in factors(case).factors.items():
        if isinstance(one, Diagonal):
            continue
        A, G = torch.zeros_like(one.a), torch.zeros_like(one.g)
        counts = torch.zeros(len(one.g) if one.g.ndim == 3 else 1)
        for use in uses:
            for k, column in enumerate(columns):
                (g,) = output_gradients([use], outputs, column)
                if use.weight == weight and g is not None:
                    _add_rows(A, G, counts, rows_of(use, g)[weight], one, first=k == 0)
        A = A / (counts if one.a.ndim == 1 else counts.view(-1, 1, 1) if one.a.ndim == 3 else counts)
        torch.testing.assert_close(one.a, A, **ALGEBRA)
        torch.testing.assert_close(one.g, G, **ALGEBRA)


def _add_rows(A: Tensor, G: Tensor, counts: Tensor, rows: Any, one: Kronecker, first: bool) -> None:
    if isinstance(rows, Lookups):
        for index, g in zip(rows.index[0], rows.g[0], strict=True):
            if first and index != rows.padding:
                A[index] += 1
                counts += 1
            G += torch.outer(g, g)
        return
    rows = rows.joined() if one.bias else rows
    for a, g in zip(rows.a[0, :, 0], rows.g[0, :, 0], strict=True):
        for i in range(len(counts)):  # the parts that this use sees
            if rows.part is not None and rows.part.start != i * len(g):
                continue
            own = g if rows.part is not None else g.chunk(len(counts))[i]
            (A[i] if A.ndim == 3 else A).add_(torch.outer(a, a) if first else 0.0)
            (G[i] if G.ndim == 3 else G).add_(torch.outer(own, own))
            counts[i] += first


def test_draws_have_the_exact_factors_as_their_mean() -> None:
    case = made(lambda: layer(nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.LayerNorm(4)), 5))
    exact = factors(case)
    draws = [kfac(*case, seed=seed) for seed in range(300)]
    for name, one in exact.factors.items():
        if isinstance(one, Kronecker):
            assert all(torch.allclose(draw.factors[name].a, one.a, rtol=1e-12) for draw in draws)
        values = torch.stack([_sampled(draw.factors[name]) for draw in draws])
        error = values.std(0) / len(draws) ** 0.5
        assert ((values.mean(0) - _sampled(one)).abs() <= STANDARD_ERRORS * error + 1e-12).all()


def _sampled(one: Kronecker | Diagonal) -> Tensor:
    return one.g if isinstance(one, Kronecker) else one.values


def test_many_draws_are_as_many_seeds() -> None:
    case = made(APART["Linear"])
    exact, many = factors(case), kfac(*case, samples=4000)
    torch.testing.assert_close(many.dense(), exact.dense(), rtol=0, atol=0.1 * float(exact.dense().abs().max()))
    assert not torch.equal(kfac(*case, seed=1).dense(), kfac(*case, seed=2).dense())
    assert torch.equal(kfac(*case, seed=1).dense(), kfac(*case, seed=1).dense())


def test_the_squares_of_a_draw_are_those_of_single_examples() -> None:
    """EKFAC's eigenvalues add up to the trace of the Fisher matrix of the same labels."""
    case = made(APART["Linear"])
    expected = fisher(*case, fisher_type="sampled", seed=4).dense().trace()
    torch.testing.assert_close(kfac(*case, ekfac=True, seed=4).trace().value, expected, **ALGEBRA)


def test_empirical() -> None:
    """One pass a term, of the data's own gradients."""
    case = made(APART["Linear"])
    x, y = case.batch
    grads = []
    for b in range(B):
        h = case.model.layer(x[b : b + 1])
        loss = F.cross_entropy(case.model.head(h.flatten(1).sin()), y[b : b + 1])
        grads.append(torch.autograd.grad(loss, h)[0][0])
    expected = sum(torch.outer(g, g) for g in grads) / B
    found = factors(case, fisher_type="empirical").factors["layer.weight"]
    torch.testing.assert_close(found.g, expected, **ALGEBRA)


# -- data sets and processes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("ekfac", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", ["Conv1d", "LayerNorm", "Embedding", "MultiheadAttention, packed in parts"])
def test_batches_are_one_batch(name: str, reduction: Any, ekfac: bool) -> None:
    model, _, (x, y) = made(APART[name])
    loss_fn = functools.partial(F.cross_entropy, reduction=reduction)
    whole = factors(Problem(model, loss_fn, (x, y)), ekfac=ekfac)
    parts = Problem(model, loss_fn, [(x[:4], y[:4]), (x[4:], y[4:])])
    torch.testing.assert_close(factors(parts, reduction=reduction, ekfac=ekfac).dense(), whole.dense(), **ALGEBRA)


class Routed(nn.Module):
    """Different layers for different batches, or one layer in another way."""

    def __init__(self, other: Callable[[Any, Tensor], Tensor] = lambda model, x: model.b(x)) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 2), nn.Linear(3, 2)
        self.other = other

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) if x[0, 0] > 0 else self.other(self, x)


def test_layers_that_some_batches_do_not_use() -> None:
    x, y = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64)
    x[:, 0] = torch.tensor([1.0, 1.0, -1.0, -1.0])
    model, batches = Routed().double(), [(x[:2], y[:2]), (x[2:], y[2:])]
    found = factors(Problem(model, F.mse_loss, batches))
    for weight, batch in (("a", batches[0]), ("b", batches[1])):
        alone = factors(Problem(model, F.mse_loss, batch))
        torch.testing.assert_close(
            found.block(f"{weight}.*").dense(), alone.block(f"{weight}.*").dense() / 2, **ALGEBRA
        )
    by_hand, without_bias = (lambda model, x: x @ model.a.weight.T), (lambda model, x: F.linear(x, model.a.weight))
    for other in (by_hand, without_bias):
        with pytest.raises(ValueError, match=r"uses 'a[.]weight' in one way in some batches"):
            factors(Problem(Routed(other).double(), F.mse_loss, batches))


def _rank(rank: int, ranks: int) -> dict[str, Tensor]:
    return {name: find() for name, find in _of_several().items()}


def _of_several() -> dict[str, Callable[[], Tensor]]:
    model, loss_fn, (x, y) = made(APART["LayerNorm"])
    one, two = [(x, y)], [(x[:4], y[:4]), (x[4:], y[4:])]  # of one, the second process has none
    torch.manual_seed(0)
    z, t = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64)
    z[:, 0] = torch.tensor([1.0, 1.0, -1.0, -1.0])
    routed = Routed().double()
    mixing, _, (u, w) = made(MIXED["BatchNorm, training"][0])
    dear = ggn(mixing, loss_fn, [(u[:5], w[:5]), (u[4:], w[4:])])
    return {
        "one": lambda: kfac(model, loss_fn, one, ekfac=True).dense(),
        "two": lambda: kfac(model, loss_fn, two, ekfac=True).dense(),
        "routed": lambda: kfac(routed, F.mse_loss, [(z[:2], t[:2]), (z[2:], t[2:])]).dense(),
        "diagonal of one": lambda: ggn(model, loss_fn, one).diagonal().value,
        "diagonal of two": lambda: ggn(model, loss_fn, two).diagonal(method="exact").value,
        "diagonal, too dear": lambda: dear.diagonal(max_products=CLASSES * B - 1, rtol=0.3).value,
    }


def test_two_processes_are_one(tmp_path: Path) -> None:
    for found in in_processes(_rank, tmp_path):
        for name, find in _of_several().items():
            torch.testing.assert_close(found[name], find(), rtol=0, atol=1e-12)  # sums in another order
