"""One batch, many batches, many processes: the same matrix, however the data are cut."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from hesse.curvature import fisher, ggn, hessian
from hesse.curvature.operator import Curvature
from problems import as_double, mlp, problem, vectors
from processes import in_processes
from tolerances import ALGEBRA

MAKERS: dict[str, Callable[..., Curvature]] = {
    "hessian": hessian,
    "ggn": ggn,
    "exact": fisher,
    "empirical": functools.partial(fisher, fisher_type="empirical"),
}


def cut(x: Tensor, y: Tensor, *sizes: int) -> list[tuple[Tensor, Tensor]]:
    return list(zip(x.split(sizes), y.split(sizes), strict=True))


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("name", ["mlp, cross-entropy", "mlp, squared error", "transformer, eval"])
def test_batches_make_one_matrix(name: str, make: Callable[..., Curvature]) -> None:
    model, loss_fn, (x, y) = as_double(problem(name))
    whole = make(model, loss_fn, (x, y))
    parts = make(model, loss_fn, cut(x, y, 10, 10, 4))
    v = vectors(whole.shape[0], 2)
    torch.testing.assert_close(parts @ v, whole @ v, **ALGEBRA)


@pytest.mark.parametrize("make", [hessian, ggn])
def test_sums_add_up(make: Callable[..., Curvature]) -> None:
    model, _, (x, y) = as_double(problem("mlp, cross-entropy"))
    loss_fn = functools.partial(F.cross_entropy, reduction="sum")
    whole = make(model, loss_fn, (x, y))
    v = vectors(whole.shape[0], 1)
    torch.testing.assert_close(make(model, loss_fn, cut(x, y, 20, 4), reduction="sum") @ v, whole @ v, **ALGEBRA)


class Tagger(nn.Module):
    """Tokens [B, T] to classes at each position, [B, C, T]."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(7, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embedding(x).tanh()).mT


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_batches_count_by_their_tokens(make: Callable[..., Curvature]) -> None:
    """The first batch ignores most of its tokens and classes weigh differently: neither batch size nor token count is
    what a mean divides by."""
    torch.manual_seed(0)
    model, x = Tagger().double(), torch.randint(7, (9, 6))
    y = torch.randint(3, (9, 6))
    y[:4, 1:] = -100
    loss_fn = functools.partial(F.cross_entropy, weight=torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64))
    whole = make(model, loss_fn, (x, y))
    v = vectors(whole.shape[0], 1)
    torch.testing.assert_close(make(model, loss_fn, cut(x, y, 4, 5)) @ v, whole @ v, **ALGEBRA)


def test_a_loss_of_ones_own_counts_by_examples() -> None:
    model, _, (x, y) = as_double(problem("mlp, squared error"))

    def loss_fn(o: Tensor, t: Tensor) -> Tensor:
        return (o - t).pow(4).sum(1).mean()

    whole = hessian(model, loss_fn, (x, y))
    v = vectors(whole.shape[0], 1)
    torch.testing.assert_close(hessian(model, loss_fn, cut(x, y, 5, 19)) @ v, whole @ v, **ALGEBRA)


def test_what_a_data_loader_yields_is_a_batch_and_the_loader_a_data_set() -> None:
    model, loss_fn, (x, y) = as_double(problem("mlp, cross-entropy"))
    whole = hessian(model, loss_fn, (x, y))
    v = vectors(whole.shape[0], 1)
    loader = DataLoader(TensorDataset(x, y), batch_size=7, shuffle=True)
    torch.testing.assert_close(hessian(model, loss_fn, loader) @ v, whole @ v, **ALGEBRA)
    torch.testing.assert_close(hessian(model, loss_fn, [x, y]) @ v, whole @ v, **ALGEBRA)
    torch.testing.assert_close(hessian(model, loss_fn, cut(x, y, 12, 12)) @ v, whole @ v, **ALGEBRA)


def test_one_graph_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """While a batch is worked on, the graphs of the others are gone."""
    import gc
    import weakref

    model, loss_fn, (x, y) = as_double(problem("mlp, cross-entropy"))
    operator = ggn(model, loss_fn, cut(x, y, *[4] * 6))
    alive: list[Any] = []
    build = operator._build

    def watched(*arguments: Any) -> Any:
        gc.collect()
        assert sum(reference() is not None for reference in alive) <= 1
        product = build(*arguments)
        alive.append(weakref.ref(product.outputs))
        return product

    operator._build = watched
    _ = operator @ vectors(operator.shape[0], 3)
    assert len(alive) == 6


def test_the_bar_is_on_stderr_and_only_on_request(capsys: pytest.CaptureFixture[str]) -> None:
    model, loss_fn, (x, y) = as_double(problem("mlp, cross-entropy"))
    for progress in (False, True):
        operator = ggn(model, loss_fn, cut(x, y, 12, 12), progress=progress)
        _ = operator @ vectors(operator.shape[0], 1)
        shown = capsys.readouterr()
        assert shown.out == ""
        assert ("batches" in shown.err) == progress


def test_unreached_in_every_batch() -> None:
    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(2, 1, bias=False) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) if x[0, 0] > 0 else self.b(x)

    x = torch.tensor([[1.0, 2.0], [-1.0, 1.0]])
    y = torch.zeros(1, 1)
    operator = hessian(Routed(), F.mse_loss, [(x[:1], y), (x[1:], y)])
    assert operator.unreached == ["c.weight"]


def test_unknown_reduction() -> None:
    with pytest.raises(ValueError, match="reduction must be 'mean' or 'sum'; got 'none'"):
        hessian(mlp(), F.cross_entropy, (torch.zeros(2, 5), torch.zeros(2, dtype=torch.long)), reduction="none")  # type: ignore[arg-type]


# -- processes -------------------------------------------------------------------------------------------------------


def _rank(rank: int, ranks: int) -> dict[str, Tensor]:
    model, loss_fn, (x, y) = as_double(problem("mlp, cross-entropy"))
    found = {}
    for name, make in MAKERS.items():
        operator = make(model, loss_fn, cut(x, y, 10, 7, 4, 3))
        found[name] = operator @ vectors(operator.shape[0], 10)
    sampled = fisher(model, loss_fn, cut(x, y, 10, 7, 4, 3), fisher_type="sampled", seed=3)
    found["sampled"] = sampled @ vectors(sampled.shape[0], 10)
    one = hessian(model, loss_fn, (x, y))  # a batch of its own belongs to its process
    found["one batch"] = one @ vectors(one.shape[0], 10)
    return found


def test_two_processes_are_one(tmp_path: Path) -> None:
    ranks = in_processes(_rank, tmp_path)
    model, loss_fn, (x, y) = as_double(problem("mlp, cross-entropy"))
    makers = {**MAKERS, "sampled": functools.partial(fisher, fisher_type="sampled", seed=3)}
    for name, make in makers.items():
        alone = make(model, loss_fn, cut(x, y, 10, 7, 4, 3))
        expected = alone @ vectors(alone.shape[0], 10)
        for rank in ranks:
            torch.testing.assert_close(rank[name], expected, rtol=0, atol=1e-12)
    one = hessian(model, loss_fn, (x, y))
    torch.testing.assert_close(ranks[0]["one batch"], one @ vectors(one.shape[0], 10), rtol=0, atol=1e-12)
