"""Layer rules: exact where K-FAC is exact, against outer products of gradients by autograd in float64."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hesse.curvature.layers import Diagonal, Kronecker, as_matrix, from_matrix, rule_for
from tolerances import ALGEBRA


def ask(module: nn.Module, x: Tensor, g: Tensor) -> Any:
    rule = rule_for(module)
    assert rule is not None
    with torch.no_grad():
        return rule(module, x, g)


def gradients(module: nn.Module, y: Tensor, g: Tensor) -> dict[str, Tensor]:
    own = dict(module.named_parameters())
    return dict(zip(own, torch.autograd.grad(y, list(own.values()), g, retain_graph=True), strict=True))


def run(module: nn.Module, x: Tensor, seed: int = 1) -> tuple[Tensor, Tensor]:
    """The module's output, and random gradients at it."""
    y = module(x)
    return y, torch.randn(y.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(y.dtype)


# One row: the gradient is g a', its outer product with itself (a a') (x) (g g'), and nothing is approximated.
ONE_ROW = {
    "linear": (lambda: nn.Linear(4, 3), (1, 4)),
    "linear, no bias": (lambda: nn.Linear(4, 3, bias=False), (1, 4)),
    "linear, no batch": (lambda: nn.Linear(4, 3), (4,)),
    "linear, one of a sequence": (lambda: nn.Linear(4, 3), (1, 1, 4)),
    "conv1d": (lambda: nn.Conv1d(2, 3, 4), (1, 2, 4)),
    "conv2d": (lambda: nn.Conv2d(2, 3, (2, 3)), (1, 2, 2, 3)),
    "conv2d, no bias": (lambda: nn.Conv2d(2, 3, 2, bias=False), (1, 2, 2, 2)),
    "conv2d, no batch": (lambda: nn.Conv2d(2, 3, 2), (2, 2, 2)),
    "conv2d, dilated": (lambda: nn.Conv2d(2, 3, 2, dilation=2), (1, 2, 3, 3)),
    "conv3d": (lambda: nn.Conv3d(2, 3, (1, 2, 2)), (1, 2, 1, 2, 2)),
}


@pytest.mark.parametrize("name", ONE_ROW)
def test_one_row_is_the_outer_product_of_its_gradient(name: str) -> None:
    torch.manual_seed(0)
    make, shape = ONE_ROW[name]
    module, x = make().double(), torch.randn(shape, dtype=torch.float64)
    y, g = run(module, x)
    found = ask(module, x, g)
    grads = gradients(module, y, g)
    vector = as_matrix(module, grads["weight"], grads.get("bias")).flatten()
    assert found.rows == 1
    torch.testing.assert_close(torch.kron(found.g, found.a), vector.outer(vector), **ALGEBRA)


SETTINGS = [
    {"kernel_size": 3},
    {"kernel_size": 1},
    {"kernel_size": 2, "stride": 2},
    {"kernel_size": 2, "stride": 3},
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 3, "padding": "same"},
    {"kernel_size": 2, "padding": "same"},  # one side gets more padding than the other
    {"kernel_size": 2, "padding": "valid", "dilation": 2},
    {"kernel_size": 3, "padding": 2, "dilation": 2, "stride": 2},
    {"kernel_size": 2, "padding": "same", "dilation": 3},
]
MODES = ["zeros", "reflect", "replicate", "circular"]
CONVOLUTIONS = [(nn.Conv1d, (7,)), (nn.Conv2d, (5, 6)), (nn.Conv3d, (3, 4, 5))]


def patches(module: nn.Module, x: Tensor) -> Tensor:
    """What the kernel sees at each position: the derivative of that output in the kernel. [rows, C k1 k2 ..]"""
    outputs = module(x)[:, 0].flatten()
    rows = [torch.autograd.grad(y, module.weight, retain_graph=True)[0][0].flatten() for y in outputs]
    return torch.stack(rows)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize(("kind", "size"), CONVOLUTIONS, ids=["1d", "2d", "3d"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_patches_are_what_the_kernel_sees(
    kind: type[nn.Module], size: tuple[int, ...], mode: str, settings: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    module = kind(2, 2, padding_mode=mode, **settings).double()
    x = torch.randn(2, 2, *size, dtype=torch.float64)
    _, g = run(module, x)
    found = ask(module, x, g)
    rows = patches(module, x)
    rows = torch.cat([rows, torch.ones(len(rows), 1, dtype=torch.float64)], 1)
    g_rows = torch.stack(
        [g[(i, slice(None), *at)] for i in range(2) for at in itertools.product(*map(range, g.shape[2:]))]
    )
    assert found.rows == len(rows) == len(g_rows)
    torch.testing.assert_close(found.a, rows.T @ rows, **ALGEBRA)
    torch.testing.assert_close(found.g, g_rows.T @ g_rows, **ALGEBRA)


def test_uneven_settings_agree_with_unfold() -> None:
    torch.manual_seed(0)
    module = nn.Conv2d(2, 3, (3, 2), stride=(1, 2), padding=(2, 1), dilation=(2, 1), bias=False).double()
    x = torch.randn(3, 2, 6, 7, dtype=torch.float64)
    rows = F.unfold(x, (3, 2), dilation=(2, 1), padding=(2, 1), stride=(1, 2)).mT.flatten(0, 1)
    torch.testing.assert_close(ask(module, x, run(module, x)[1]).a, rows.T @ rows, **ALGEBRA)


@pytest.mark.parametrize("padding_idx", [None, 2, -1])
def test_an_embedding_is_a_linear_layer_on_one_hot_rows(padding_idx: int | None) -> None:
    torch.manual_seed(0)
    module = nn.Embedding(5, 3, padding_idx=padding_idx).double()
    x = torch.randint(5, (4, 6))
    g = torch.randn(4, 6, 3, dtype=torch.float64)
    found = ask(module, x, g)
    kept = torch.ones_like(x, dtype=torch.bool) if padding_idx is None else x != padding_idx % 5
    rows, g_rows = F.one_hot(x[kept], 5).double(), g[kept]
    torch.testing.assert_close(found.a.diag(), rows.T @ rows, **ALGEBRA)
    torch.testing.assert_close(found.g, g_rows.T @ g_rows, **ALGEBRA)
    assert found.rows == len(rows)


def test_an_embedding_of_one_token_is_exact_whatever_the_padding() -> None:
    torch.manual_seed(0)
    module = nn.Embedding(4, 3, padding_idx=0).double()
    x = torch.tensor([[2, 0, 0], [2, 2, 0]])
    g = torch.randn(2, 3, 3, dtype=torch.float64)
    found = ask(module, x, g)
    each = [
        as_matrix(module, gradients(module, module(x[i, j]), g[i, j])["weight"], None).flatten() for i, j in x.nonzero()
    ]
    exact = sum(vector.outer(vector) for vector in each)
    torch.testing.assert_close(torch.kron(found.g, (found.a / found.rows).diag()), exact, **ALGEBRA)


NORMS = {
    "LayerNorm": (lambda: nn.LayerNorm(4), (5, 4)),
    "LayerNorm, no batch": (lambda: nn.LayerNorm(4), (4,)),
    "LayerNorm, sequence": (lambda: nn.LayerNorm(4), (5, 3, 4)),
    "LayerNorm, two axes": (lambda: nn.LayerNorm((3, 4)), (5, 2, 3, 4)),
    "LayerNorm, no bias": (lambda: nn.LayerNorm(4, bias=False), (5, 3, 4)),
    "BatchNorm1d": (lambda: nn.BatchNorm1d(4), (5, 4)),
    "BatchNorm1d, sequence": (lambda: nn.BatchNorm1d(4), (5, 4, 3)),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(4, eps=0.1), (5, 4, 2, 3)),
    "BatchNorm2d, eval": (lambda: nn.BatchNorm2d(4).eval(), (5, 4, 2, 3)),
    "BatchNorm2d, eval without running statistics": (
        lambda: nn.BatchNorm2d(4, track_running_stats=False).eval(),
        (5, 4, 2, 3),
    ),
    "BatchNorm3d": (lambda: nn.BatchNorm3d(4), (3, 4, 2, 1, 2)),
    "GroupNorm": (lambda: nn.GroupNorm(2, 4), (5, 4, 2, 3)),
    "GroupNorm, vectors": (lambda: nn.GroupNorm(2, 4), (5, 4)),
}


@pytest.mark.parametrize("name", NORMS)
def test_a_norm_layer_squares_each_examples_gradient(name: str) -> None:
    torch.manual_seed(0)
    make, shape = NORMS[name]
    module, x = make().double(), 2 + 3 * torch.randn(shape, dtype=torch.float64)
    with torch.no_grad():
        for p in module.parameters():
            p.normal_()
        if getattr(module, "running_mean", None) is not None:
            module.running_mean.normal_()
            module.running_var.uniform_(1, 2)
    y, g = run(module, x)
    expected = {own: torch.zeros_like(p) for own, p in module.named_parameters()}
    examples = (
        [g]
        if "no batch" in name
        else [g * (torch.arange(len(g)) == i).view(-1, *[1] * (g.ndim - 1)) for i in range(len(g))]
    )
    for only in examples:
        for own, grad in gradients(module, y, only).items():
            expected[own] += grad.square()
    found = ask(module, x, g)
    assert isinstance(found, Diagonal)
    assert found.squares.keys() == expected.keys()
    for own, squares in found.squares.items():
        torch.testing.assert_close(squares, expected[own], **ALGEBRA)


@pytest.mark.parametrize(
    "module",
    [
        nn.Linear(4, 3),
        nn.Linear(4, 3, bias=False),
        nn.Conv2d(2, 3, (2, 3)),
        nn.Conv1d(2, 3, 2, bias=False),
        nn.Embedding(5, 3),
    ],
    ids=str,
)
def test_a_layer_comes_back_from_its_matrix(module: nn.Module) -> None:
    weight, bias = module.weight, getattr(module, "bias", None)
    matrix = as_matrix(module, weight, bias)
    assert matrix.ndim == 2
    assert matrix.shape[0] == (3 if not isinstance(module, nn.Embedding) else module.embedding_dim)
    back = from_matrix(module, matrix, weight, bias)
    assert torch.equal(back[0], weight)
    assert back[1] is None if bias is None else torch.equal(back[1], bias)


class Scaled(nn.Linear):
    """A subclass with a forward pass of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Renamed(nn.Linear):
    """A subclass that keeps it."""


@pytest.mark.parametrize(
    "module",
    [
        Scaled(2, 2),
        nn.Conv2d(2, 2, 1, groups=2),
        nn.ConvTranspose2d(2, 2, 1),
        nn.Embedding(3, 2, max_norm=1.0),
        nn.Embedding(3, 2, scale_grad_by_freq=True),
        nn.EmbeddingBag(3, 2),
        nn.Bilinear(2, 2, 2),
        nn.InstanceNorm2d(2, affine=True),
        nn.RMSNorm(2),
        nn.LSTMCell(2, 2),
        nn.PReLU(),
        nn.ReLU(),
        nn.Sequential(nn.Linear(2, 2)),
    ],
    ids=lambda module: type(module).__name__,
)
def test_layers_without_a_rule(module: nn.Module) -> None:
    assert rule_for(module) is None


def test_a_subclass_that_keeps_the_forward_pass_has_the_rule() -> None:
    assert rule_for(Renamed(2, 2)) is rule_for(nn.Linear(2, 2)) is not None


@pytest.mark.parametrize("name", ["linear", "embedding", "norm"])
def test_sums_over_a_bfloat16_batch_are_float32(name: str) -> None:
    torch.manual_seed(0)
    x: Tensor = torch.randint(3, (3000,)) if name == "embedding" else torch.randn(3000, 4).bfloat16()
    module = {"linear": nn.Linear(4, 2), "embedding": nn.Embedding(3, 2), "norm": nn.LayerNorm(4)}[name].bfloat16()
    _, g = run(module, x)
    found = ask(module, x, g)
    slow = ask(module.double(), x if name == "embedding" else x.double(), g.double())
    pairs = (
        [(found.a, slow.a), (found.g, slow.g)]
        if isinstance(found, Kronecker)
        else [(found.squares["bias"], slow.squares["bias"])]
    )
    for one, other in pairs:
        assert one.dtype == torch.float32
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-3)  # 3000 products, float32 sums
