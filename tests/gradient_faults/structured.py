"""Faults in custom Functions that mix elements: products, attention, norms, pooling, embeddings, losses."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F

from gradient_faults.case import Block, Classifier, Fault, Loss, labels, mlp

__all__ = ["FAULTS"]


def linear(broken: str) -> tuple[Any, Any]:
    class Product(Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
            ctx.save_for_backward(x, w)
            return x @ w

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
            x, w = ctx.saved_tensors
            to_x = grad @ w if broken == "input" else grad @ w.T
            to_w = grad.T @ x if broken == "weight" else x.T @ grad
            return to_x, to_w

    class Dense(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(16, 16) / 4)

        def forward(self, x: Tensor) -> Tensor:
            return Product.apply(x, self.w)

    return mlp(nn.ReLU(), Dense(), nn.Tanh())


def linear_input(broken: bool) -> tuple[Any, Any]:
    return linear("input" if broken else "")


def linear_weight(broken: bool) -> tuple[Any, Any]:
    return linear("weight" if broken else "")


def attention_scale(broken: bool) -> tuple[Any, Any]:
    class Attention(Function):
        @staticmethod
        def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            p = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)
            ctx.save_for_backward(q, k, v, p)
            return p @ v

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            q, k, v, p = ctx.saved_tensors
            to_p = grad @ v.mT
            scores = p * (to_p - (to_p * p).sum(-1, keepdim=True))
            if not broken:
                scores = scores / math.sqrt(q.shape[-1])
            return scores @ k, scores.mT @ q, p.mT @ grad

    class SelfAttention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(16, 48)
            self.out = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
            return self.out(Attention.apply(q, k, v).transpose(1, 2).flatten(2))

    return Loss(Block(SelfAttention())), torch.randn(3, 5, 16)


def masked_softmax(broken: bool) -> tuple[Any, Any]:
    """The backward of a softmax without its sum."""

    class Softmax(Function):
        @staticmethod
        def forward(ctx: Any, scores: Tensor, mask: Tensor) -> Tensor:
            p = scores.masked_fill(mask, -math.inf).softmax(-1)
            ctx.save_for_backward(p)
            return p

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
            (p,) = ctx.saved_tensors
            return p * (grad if broken else grad - (grad * p).sum(-1, keepdim=True)), None

    class Weights(nn.Module):
        def forward(self, q: Tensor, k: Tensor) -> Tensor:
            mask = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).triu(1)
            return Softmax.apply(q @ k.mT / 4, mask)

    class SelfAttention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)
            self.weights = Weights()

        def forward(self, x: Tensor) -> Tensor:
            return self.weights(self.q(x), self.k(x)) @ self.v(x)

    return Loss(Block(SelfAttention())), torch.randn(3, 6, 16)


def layer_norm(broken: bool) -> tuple[Any, Any]:
    class Norm(Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
            scale = x.var(-1, unbiased=False, keepdim=True).add(1e-5).rsqrt()
            z = (x - x.mean(-1, keepdim=True)) * scale
            ctx.save_for_backward(z, scale, w)
            return z * w

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
            z, scale, w = ctx.saved_tensors
            g = grad * w
            centred = g - (g * z).mean(-1, keepdim=True) * z
            if not broken:
                centred = centred - g.mean(-1, keepdim=True)
            return centred * scale, (grad * z).flatten(0, -2).sum(0)

    class LayerNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.rand(16) + 0.5)

        def forward(self, x: Tensor) -> Tensor:
            return Norm.apply(x, self.weight)

    return mlp(LayerNorm(), nn.ReLU())


def batch_norm_constants(broken: bool) -> tuple[Any, Any]:
    class Norm(Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            scale = x.var(0, unbiased=False).add(1e-5).rsqrt()
            z = (x - x.mean(0)) * scale
            ctx.save_for_backward(z, scale)
            return z

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            z, scale = ctx.saved_tensors
            return grad * scale if broken else (grad - grad.mean(0) - z * (grad * z).mean(0)) * scale

    class BatchNorm(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return Norm.apply(x)

    return mlp(BatchNorm(), nn.Tanh())


def embedding_overwrites(broken: bool) -> tuple[Any, Any]:
    """Words that occur twice keep the gradient of one occurrence."""

    class Lookup(Function):
        @staticmethod
        def forward(ctx: Any, table: Tensor, words: Tensor) -> Tensor:
            ctx.save_for_backward(words)
            ctx.rows = len(table)
            return table[words]

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
            (words,) = ctx.saved_tensors
            full = grad.new_zeros(ctx.rows, grad.shape[-1])
            return full.index_put_((words.flatten(),), grad.flatten(0, 1), accumulate=not broken), None

    class Embedding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(20, 8))

        def forward(self, words: Tensor) -> Tensor:
            return Lookup.apply(self.table, words)

    body = nn.Sequential(Embedding(), nn.Linear(8, 8), nn.Tanh(), nn.Flatten(), nn.Linear(32, 3))
    return Loss(body), torch.tensor([[1, 2, 3, 4], [5, 1, 6, 7], [8, 9, 2, 10], [11, 12, 13, 1]])


def embedding_mean(broken: bool) -> tuple[Any, Any]:
    """A bag of words whose backward forgets that the forward averaged."""

    class Bag(Function):
        @staticmethod
        def forward(ctx: Any, table: Tensor, words: Tensor) -> Tensor:
            ctx.save_for_backward(words)
            ctx.rows = len(table)
            return table[words].mean(1)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
            (words,) = ctx.saved_tensors
            each = grad if broken else grad / words.shape[1]
            full = grad.new_zeros(ctx.rows, grad.shape[-1])
            return full.index_add_(0, words.flatten(), each.repeat_interleave(words.shape[1], 0)), None

    class EmbeddingBag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(30, 8))

        def forward(self, words: Tensor) -> Tensor:
            return Bag.apply(self.table, words)

    return Classifier(EmbeddingBag(), 8), (torch.arange(35).reshape(7, 5) % 30, labels(7))


def max_pool(broken: bool) -> tuple[Any, Any]:
    """Where a window holds its maximum the gradient goes, not to the window's first element."""

    class Pool(Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            windows = x.unflatten(-1, (-1, 2))
            values, places = windows.max(-1)
            ctx.save_for_backward(places)
            return values

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            (places,) = ctx.saved_tensors
            places = torch.zeros_like(places) if broken else places
            full = grad.new_zeros(*grad.shape, 2)
            return full.scatter_(-1, places[..., None], grad[..., None]).flatten(-2)

    class MaxPool(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return Pool.apply(x)

    features = nn.Sequential(nn.Conv1d(2, 4, 3), MaxPool(), nn.ReLU(), nn.Flatten())
    return Classifier(features, 24), (torch.randn(6, 2, 14), labels(6))


def upsampling(broken: bool) -> tuple[Any, Any]:
    """Nearest neighbours: each input feeds four outputs, and one of them comes back."""

    class Nearest(Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.repeat_interleave(2, -1).repeat_interleave(2, -2)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad[..., ::2, ::2] if broken else F.avg_pool2d(grad, 2) * 4

    class Upsample(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return Nearest.apply(x)

    body = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), Upsample(), nn.Conv2d(3, 1, 3))
    return Loss(body), torch.randn(3, 2, 6, 6)


def convolution(broken: bool) -> tuple[Any, Any]:
    """The gradient of the input is a convolution with the kernel reversed."""

    class Conv(Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
            ctx.save_for_backward(x, w)
            return F.conv1d(x, w, padding=1)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
            x, w = ctx.saved_tensors
            kernel = w.transpose(0, 1) if broken else w.transpose(0, 1).flip(-1)
            to_x = F.conv1d(grad, kernel, padding=1)
            to_w = F.conv1d(F.pad(x, (1, 1)).transpose(0, 1), grad.transpose(0, 1)).transpose(0, 1)
            return to_x, to_w

    class Conv1d(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 3, 3) / 3)

        def forward(self, x: Tensor) -> Tensor:
            return Conv.apply(x, self.weight)

    features = nn.Sequential(nn.Conv1d(1, 3, 3), nn.Tanh(), Conv1d(), nn.ReLU(), nn.Flatten())
    return Classifier(features, 32), (torch.randn(6, 1, 10), labels(6))


def permutation(broken: bool) -> tuple[Any, Any]:
    class Shuffle(Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, order: Tensor) -> Tensor:
            ctx.save_for_backward(order)
            return x[:, order]

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
            (order,) = ctx.saved_tensors
            return grad[:, order if broken else order.argsort()], None

    class Permute(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("order", torch.randperm(16))

        def forward(self, x: Tensor) -> Tensor:
            return Shuffle.apply(x, self.order)

    return mlp(nn.ReLU(), Permute())


def running_sum(broken: bool) -> tuple[Any, Any]:
    class CumSum(Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.cumsum(-1)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad.cumsum(-1) if broken else grad.flip(-1).cumsum(-1).flip(-1)

    class Running(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return CumSum.apply(x)

    return mlp(nn.Tanh(), Running())


def border(broken: bool) -> tuple[Any, Any]:
    """Differences along time whose backward forgets the last step."""

    class Difference(Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x[:, 1:] - x[:, :-1]

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            later = F.pad(grad, (0, 0, 1, 0))
            if broken:
                later[:, -1] = 0
            return later - F.pad(grad, (0, 0, 0, 1))

    class Delta(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return Difference.apply(x)

    body = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), Delta(), nn.Flatten(), nn.Linear(30, 3))
    return Loss(body), torch.randn(5, 6, 4)


FAULTS = [
    Fault(linear_input, "transposed", "body.2", "Product"),
    Fault(linear_weight, "transposed", "body.2", "Product"),
    Fault(attention_scale, "missing_factor", "body.attention", "Attention"),
    Fault(masked_softmax, "missing_sum wrong_gradient", "body.attention.weights", "Softmax"),
    Fault(layer_norm, "missing_sum wrong_gradient", "body.1", "Norm"),
    Fault(batch_norm_constants, "missing_sum wrong_gradient", "body.1", "Norm"),
    Fault(embedding_overwrites, "some_elements", "body.0", "Lookup"),
    Fault(embedding_mean, "wrong_reduction missing_factor", "body", "Bag"),
    Fault(max_pool, "some_elements", "body.1", "Pool"),
    Fault(upsampling, "missing_sum wrong_gradient", "body.2", "Nearest"),
    Fault(convolution, "wrong_gradient transposed", "body.2", "Conv"),
    Fault(permutation, "transposed", "body.2", "Shuffle"),
    Fault(running_sum, "wrong_gradient transposed", "body.2", "CumSum"),
    Fault(border, "some_elements", "body.2", "Difference"),
]
