"""Scalar functions of a flat tensor whose Hessians have a structure, shared by the tests of sparse Hessians."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Flat(NamedTuple):
    """A function of n numbers.

    Args:
        exact: whether the traced pattern has no place that is zero at a general point.
    """

    fun: Callable[[Tensor], Tensor]
    n: int = 24
    exact: bool = True

    def start(self) -> Tensor:
        """A general point: no number is there twice, none is zero, none is at a kink."""
        generator = torch.Generator().manual_seed(self.n)
        return torch.linspace(-1.3, 1.4, self.n, dtype=torch.float64)[torch.randperm(self.n, generator=generator)]

    def hessian(self, x: Tensor) -> Tensor:
        return torch.autograd.functional.hessian(self.fun, x)

    def gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """With its graph, and the point that it starts from."""
        point = x.detach().clone().requires_grad_()
        value = self.fun(point)
        if not value.requires_grad:
            return torch.zeros_like(x), point
        (slope,) = torch.autograd.grad(value, point, create_graph=True)
        return slope, point


def chained_rosenbrock(x: Tensor) -> Tensor:
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


def extended_rosenbrock(x: Tensor) -> Tensor:
    a, b = x[::2], x[1::2]
    return (100 * (b - a**2) ** 2 + (1 - a) ** 2).sum()


def chained_wood(x: Tensor) -> Tensor:
    a, b, c, d = x[:-3:2], x[1:-2:2], x[2:-1:2], x[3::2]
    return (
        100 * (a**2 - b) ** 2 + (a - 1) ** 2 + 90 * (c**2 - d) ** 2 + (1 - c) ** 2 + 10 * (b + d - 2) ** 2
    ).sum() + ((b - d) ** 2).sum() / 10


def broyden_banded(x: Tensor) -> Tensor:
    around = sum(torch.cat([x.new_zeros(k), x[:-k]]) * (1 + torch.cat([x.new_zeros(k), x[:-k]])) for k in range(1, 4))
    return ((x * (2 + 5 * x**2) + 1 - around) ** 2).sum()


def minimal_surface(x: Tensor) -> Tensor:
    m = int(x.numel() ** 0.5)
    u = F.pad(x.view(m, m), (1, 1, 1, 1))
    down, across = u[1:, 1:] - u[:-1, :-1], u[1:, :-1] - u[:-1, 1:]
    return (1 + m * m * (down**2 + across**2) / 2).sqrt().sum() / m**2


def in_place(x: Tensor) -> Tensor:
    y = x.clone()
    y[1:] *= x[:-1].sin()
    y.view(4, 6)[1:, ::2].add_(x.view(4, 6)[:-1, ::2] ** 2)
    z = torch.zeros_like(x)
    z[3:9] = y[3:9].exp()
    z[5] = 7.0
    return (y * z).sum() + y.square().sum()


def overwritten(x: Tensor) -> Tensor:
    y = x.clone()
    y[1:4] = x[7:10]
    y[0] = 2.0
    return (y**3 * x.roll(5)).sum() + y.index_add(0, torch.tensor([2, 2, 9]), x[14:17]).pow(3).sum()


def conv(x: Tensor) -> Tensor:
    kernel = torch.tensor([[[1.0, 0.0, -2.0, 0.5]]], dtype=x.dtype)
    return (F.conv1d(x[None, None], kernel, stride=2, padding=1) ** 4).sum()


def laplace(x: Tensor) -> Tensor:
    kernel = torch.tensor([[[[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]]]], dtype=x.dtype)
    return torch.cosh(F.conv2d(x.view(1, 1, 4, 6), kernel, padding=1)).sum()


def sparse_product(x: Tensor) -> Tensor:
    n = x.numel()
    A = torch.diag(x.new_ones(n)) - 2 * torch.diag(x.new_ones(n - 2), 2)
    return torch.cosh(A @ x).sum() + (x[None] @ A[:, :5]).pow(3).sum()


def coo_product(x: Tensor) -> Tensor:
    n = x.numel()
    index = torch.stack([torch.arange(n - 1), torch.arange(1, n)])
    A = torch.sparse_coo_tensor(index, x.new_ones(n - 1), (n, n), check_invariants=True)
    return (torch.sparse.mm(A, x[:, None] ** 2).squeeze(1) ** 2).sum()


def loop(x: Tensor) -> Tensor:
    total = x.new_zeros(())
    for i in range(0, x.numel() - 3, 3):
        total = total + x[i] * x[i + 1] ** 2 * x[i + 3].exp()
    return total


def scattered(x: Tensor) -> Tensor:
    to = torch.arange(x.numel()) // 3
    sums = x.new_zeros(x.numel() // 3).index_add(0, to, x.square())
    other = x.new_zeros(x.numel() // 3).scatter_add(0, to.flip(0), x)
    return (sums**2).sum() + (other**3).sum()


def several_segments(x: Tensor) -> Tensor:
    a, b = x.view(2, 12).unbind(0)
    joined = torch.stack([a.roll(1), b.flip(0)], 1).reshape(-1)
    return (joined[torch.tensor([3, 1, 1, 7, 20])] ** 2 * joined.gather(0, torch.tensor([0, 2, 4, 6, 8]))).sum()


def switched(x: Tensor) -> Tensor:
    y = torch.where(x > 0, x**3, x.roll(1) * x)
    return y.sum() + F.relu(x.roll(2) - x).square().sum() + x.clamp(-1, 1).square().sum() + (x[1:] * x[:-1]).abs().sum()


def row_softmax(x: Tensor) -> Tensor:
    rows = x.view(6, 4)
    return -torch.log_softmax(rows, 1)[:, 0].sum() + torch.logsumexp(rows[:, :2], 1).square().sum()


def block_matrices(x: Tensor) -> Tensor:
    a, b = x[:12].view(3, 2, 2), x[12:].view(3, 2, 2)
    return torch.bmm(a, b).pow(3).sum()


def network(x: Tensor) -> Tensor:
    inputs = torch.linspace(-1, 1, 14, dtype=x.dtype).view(7, 2)
    return (torch.tanh(inputs @ x[:12].view(2, 6)) @ x[12:18] + x[18] - inputs[:, 0]).square().mean() + x[
        19:
    ].cos().sum()


FLAT: dict[str, Flat] = {
    "separable": Flat(lambda x: (x**4 + torch.sin(3 * x)).sum()),
    "chained Rosenbrock": Flat(chained_rosenbrock),
    "extended Rosenbrock": Flat(extended_rosenbrock),
    "chained Wood": Flat(chained_wood),
    "banded Broyden": Flat(broyden_banded),
    "minimal surface": Flat(minimal_surface, 25),
    "arrowhead": Flat(lambda x: (x[0] ** 2 * x[1:] ** 2).sum() + x.exp().sum()),
    "arrowhead, last": Flat(lambda x: ((x[:-1] - x[-1]) ** 4).sum()),
    "linear parts, unused elements": Flat(
        lambda x: x.sum() + 3 * x[:5].mean() + (x[6:9] * x[7:10]).prod() + x[11] ** 2
    ),
    "linear": Flat(lambda x: (2 * x).sum()),
    "constant": Flat(lambda x: x.new_tensor(3.0)),
    "powers of 0 and 1": Flat(
        lambda x: ((x[1:9] + x[:8]) ** 1).sum() + (x[9:] ** 0 * x[:15]).sum() + x[3] ** 2 * x[4] ** 1
    ),
    "in place": Flat(in_place),
    "overwritten": Flat(overwritten),
    "convolution": Flat(conv),
    "convolution in two dimensions": Flat(laplace),
    "constant matrix with zeros": Flat(sparse_product),
    "sparse matrix": Flat(coo_product),
    "matrix products added": Flat(
        lambda x: (
            torch.addmv(x[:5], torch.eye(5, 3, dtype=x.dtype) + 1, x[5:8]).pow(3).sum()
            + torch.addmm(x[8:14].view(3, 2), x[14:20].view(3, 2), x[20:24].view(2, 2)).square().sum()
        )
    ),
    "loop": Flat(loop),
    "scattered": Flat(scattered),
    "stack, flip, gather, repeated index": Flat(several_segments),
    "where, relu, clamp, abs": Flat(switched, exact=False),
    "detached": Flat(lambda x: (x.detach().roll(1) * x**2).sum()),
    "batch norm": Flat(
        lambda x: (F.batch_norm(x.view(6, 4), x.new_zeros(4), x.new_ones(4), training=True).view(-1) * x).sum(),
        exact=False,
    ),
    "softmax of rows": Flat(row_softmax),
    "blocks multiplied": Flat(block_matrices, exact=False),
    "cumulative sum": Flat(lambda x: (x[:4].cumsum(0) ** 3).sum() + x.square().sum()),
    "sorted": Flat(lambda x: (x.sort()[0][1:] * x.sort()[0][:-1]).sum() + x.view(6, 4).max(1)[0].square().sum()),
    "largest": Flat(lambda x: x.view(6, 4).amax(1).square().sum() + x.square().sum(), exact=False),
    "unfold": Flat(lambda x: x.unfold(0, 3, 2).prod(1).sum()),
    "transposed grid": Flat(lambda x: (x.view(4, 6).T[1:] * x.view(4, 6).T[:-1] ** 2).sum()),
    "norm of triples": Flat(lambda x: torch.linalg.vector_norm(x.view(8, 3), dim=1).sum()),
    "cross products": Flat(
        lambda x: torch.linalg.cross(x[:12].view(4, 3), x[12:].view(4, 3)).square().sum(), exact=False
    ),
    "complex numbers": Flat(lambda x: torch.complex(x[:12], x[12:]).square().abs().square().sum(), exact=False),
    "determinants": Flat(lambda x: torch.linalg.det(x.view(6, 2, 2)).square().sum(), exact=False),
    "Fourier transform": Flat(lambda x: torch.fft.rfft(x).abs().pow(3).sum(), exact=False),
    "losses": Flat(lambda x: F.mse_loss(x[:6] * x[6:12], x[12:18]) + F.huber_loss(x[:4], x[4:8]), exact=False),
    "norm": Flat(lambda x: x.norm()),
    "network": Flat(network),
}
