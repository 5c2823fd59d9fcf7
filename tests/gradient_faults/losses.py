"""Faults in losses and in what is added to them: means and sums, labels that do not count, penalties."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F
from torch.nn.utils import parametrize

import hesse
from gradient_faults.case import Fault, labels, mlp

__all__ = ["FAULTS"]


def mean_square_loss(broken: bool) -> tuple[Any, Any]:
    class MeanSquare(Function):
        @staticmethod
        def forward(ctx: Any, y: Tensor, t: Tensor) -> Tensor:
            ctx.save_for_backward(y - t)
            return (y - t).square().mean()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
            (gap,) = ctx.saved_tensors
            return grad * 2 * gap / (len(gap) if broken else gap.numel()), None

    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 5))
    batch = torch.randn(12, 6), torch.randn(12, 5)
    return hesse.closure(model, lambda y, t: MeanSquare.apply(y, t), batch), None


def summed_cross_entropy(broken: bool) -> tuple[Any, Any]:
    class CrossEntropy(Function):
        @staticmethod
        def forward(ctx: Any, scores: Tensor, labels: Tensor) -> Tensor:
            ctx.save_for_backward(scores.softmax(-1), labels)
            return F.cross_entropy(scores, labels)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
            p, labels = ctx.saved_tensors
            gap = p - F.one_hot(labels, p.shape[-1])
            return grad * gap / (1 if broken else len(p)), None

    class Criterion(nn.Module):
        def forward(self, scores: Tensor, labels: Tensor) -> Tensor:
            return CrossEntropy.apply(scores, labels)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten())
            self.head = nn.Linear(36, 4)
            self.criterion = Criterion()

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.criterion(self.head(self.features(x)), y)

    return Net(), (torch.randn(7, 1, 8, 8), labels(7))


def weight_scale(broken: bool) -> tuple[Any, Any]:
    """A parametrization that keeps weights on the sphere; its backward forgets the projection."""

    class Unit(Function):
        @staticmethod
        def forward(ctx: Any, w: Tensor) -> Tensor:
            size = w.norm()
            ctx.save_for_backward(w / size, size)
            return w / size

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            u, size = ctx.saved_tensors
            return (grad if broken else grad - (grad * u).sum() * u) / size

    class Sphere(nn.Module):
        def forward(self, w: Tensor) -> Tensor:
            return Unit.apply(w)

    model, x = mlp(nn.Linear(16, 16), nn.ReLU())
    parametrize.register_parametrization(model.body[1], "weight", Sphere())
    return model, x


def orthogonality(broken: bool) -> tuple[Any, Any]:
    """A penalty on the weights in the model's own forward; 4 w (w'w - I) is its gradient."""

    class Penalty(Function):
        @staticmethod
        def forward(ctx: Any, w: Tensor) -> Tensor:
            gap = w.T @ w - torch.eye(w.shape[1])
            ctx.save_for_backward(w, gap)
            return gap.square().sum()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            w, gap = ctx.saved_tensors
            return grad * (2 if broken else 4) * w @ gap

    class Regularised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(6, 16), nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.two(self.one(x).relu())
            return y.square().mean() + 0.1 * Penalty.apply(self.one.weight)

    return Regularised(), torch.randn(12, 6)


def huber(broken: bool) -> tuple[Any, Any]:
    class Huber(Function):
        @staticmethod
        def forward(ctx: Any, gap: Tensor) -> Tensor:
            ctx.save_for_backward(gap)
            size = gap.abs()
            return torch.where(size < 0.5, gap * gap / 2, 0.5 * (size - 0.25)).mean()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            (gap,) = ctx.saved_tensors
            slope = gap if broken else gap.clamp(-0.5, 0.5)
            return grad * slope / gap.numel()

    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 2))
    batch = torch.randn(16, 6), torch.randn(16, 2)
    return hesse.closure(model, lambda y, t: Huber.apply(y - t), batch), None


def ignored_labels(broken: bool) -> tuple[Any, Any]:
    """Padding does not count in the loss, and still pulls."""

    class CrossEntropy(Function):
        @staticmethod
        def forward(ctx: Any, scores: Tensor, labels: Tensor) -> Tensor:
            ctx.save_for_backward(scores.softmax(-1), labels)
            return F.cross_entropy(scores, labels, ignore_index=-1)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
            p, labels = ctx.saved_tensors
            kept = labels >= 0
            gap = p - F.one_hot(labels.clamp_min(0), p.shape[-1])
            gap = gap if broken else gap * kept[:, None]
            return grad * gap / kept.sum(), None

    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.rnn = nn.Embedding(20, 8), nn.LSTM(8, 8, batch_first=True)
            self.head = nn.Linear(8, 5)

        def forward(self, words: Tensor) -> Tensor:
            return self.head(self.rnn(self.words(words))[0]).flatten(0, 1)

    words, tags = torch.randint(0, 20, (3, 6)), torch.randint(0, 5, (3, 6))
    tags[1, 3:] = -1
    tags[2, 5:] = -1
    return hesse.closure(Tagger(), lambda y, t: CrossEntropy.apply(y, t), (words, tags.flatten())), None


def penalty_without_graph(broken: bool) -> tuple[Any, Any]:
    """The gradient penalty of a Wasserstein critic, without ``create_graph``."""

    class Critic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 12), nn.Softplus(), nn.Linear(12, 1))

        def forward(self, real: Tensor, fake: Tensor) -> Tensor:
            mix = (0.3 * real + 0.7 * fake).detach().requires_grad_()
            score = self.net(mix).sum()
            (slope,) = torch.autograd.grad(score, mix, create_graph=not broken)
            return self.net(fake).mean() - self.net(real).mean() + 10 * (slope.norm(dim=1) - 1).square().mean()

    return Critic(), (torch.randn(8, 4), torch.randn(8, 4))


def auxiliary_loss_logged(broken: bool) -> tuple[Any, Any]:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.head = nn.Linear(6, 12), nn.Linear(12, 4)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            h = self.encoder(x).relu()
            sparsity = h.mean(0).square().sum()
            return F.cross_entropy(self.head(h), y) + 0.5 * (sparsity.item() if broken else sparsity)

    return Net(), (torch.randn(9, 6), labels(9))


FAULTS = [
    Fault(mean_square_loss, "wrong_reduction", "loss_fn()", "MeanSquare"),
    Fault(summed_cross_entropy, "wrong_reduction", "criterion", "CrossEntropy"),
    Fault(weight_scale, "missing_sum wrong_gradient", "body.1.parametrizations.weight.0", "Unit"),
    Fault(orthogonality, "missing_factor", "Regularised", "Penalty"),
    Fault(huber, "some_elements", "loss_fn()", "Huber"),
    Fault(ignored_labels, "some_elements", "loss_fn()", "CrossEntropy"),
    Fault(penalty_without_graph, "detached", "Critic"),
    Fault(auxiliary_loss_logged, "detached", "Net"),
]
