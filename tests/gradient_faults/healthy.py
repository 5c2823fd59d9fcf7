"""Correct models that look suspicious: kinks, ties, zeros, decades, gradients that stop by design."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import hesse
from gradient_faults.case import Block, Classifier, Healthy, Loss, labels, mlp
from hesse.check.straight_through import straight_through

__all__ = ["HEALTHY"]


def checkpointed() -> tuple[Any, Any]:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Block(nn.Linear(16, 16)) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=False)
            return x

    return Loss(nn.Sequential(nn.Linear(4, 16), Checkpointed())), torch.randn(3, 4, 4)


def weight_and_spectral_norm() -> tuple[Any, Any]:
    one = parametrizations.weight_norm(nn.Linear(16, 16))
    return mlp(one, nn.ReLU(), parametrizations.spectral_norm(nn.Linear(16, 16)))


def quantile_loss() -> tuple[Any, Any]:
    def pinball(y: Tensor, t: Tensor) -> Tensor:
        q = torch.tensor([0.1, 0.5, 0.9])
        gap = t - y
        return torch.maximum(q * gap, (q - 1) * gap).mean()

    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
    return hesse.closure(model, pinball, (torch.randn(20, 6), torch.randn(20, 1))), None


def hinge_with_margin_met() -> tuple[Any, Any]:
    """Most rows have a margin and no gradient."""
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4))
    with torch.no_grad():
        model[2].bias.copy_(torch.tensor([4.0, 0, 0, 0]))
    target = torch.zeros(12, dtype=torch.long).index_fill(0, torch.tensor([3]), 2)
    return hesse.closure(model, nn.MultiMarginLoss(), (torch.randn(12, 6), target)), None


def top_k_routing() -> tuple[Any, Any]:
    class Mixture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router = nn.Linear(16, 4, bias=False)
            self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            values, chosen = self.router(x).topk(2, -1)
            gates = torch.zeros(len(x), 4).scatter(-1, chosen, values.softmax(-1))
            out = torch.zeros_like(x)
            for i, expert in enumerate(self.experts):
                rows = (chosen == i).any(-1).nonzero()[:, 0]
                if len(rows):
                    out = out.index_add(0, rows, gates[rows, i, None] * expert(x[rows]))
            return out

    return mlp(Mixture(), nn.LayerNorm(16))


def max_pool_ties() -> tuple[Any, Any]:
    """Flat images: every window of the pooling is a tie."""
    features = nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten())
    x = torch.randn(4, 1, 14, 14).clamp_min(0.5)
    return Classifier(features, 16), (x.requires_grad_(), labels(4))


def half_dead() -> tuple[Any, Any]:
    model, x = mlp(nn.ReLU(), nn.Linear(16, 16), nn.ReLU())
    with torch.no_grad():
        model.body[0].bias[:8] = -50.0
    return model, x


def rows_of_zeros() -> tuple[Any, Any]:
    model, x = mlp(nn.ReLU(), nn.LayerNorm(16))
    nn.init.zeros_(model.body[0].bias)
    return model, x * (torch.arange(12) % 3 > 0)[:, None]


def many_decades() -> tuple[Any, Any]:
    model, x = mlp(nn.Tanh(), nn.Linear(16, 16), nn.Softplus(), rows=16)
    with torch.no_grad():
        model.body[0].weight.mul_(1e-4)
        model.body[2].weight.mul_(1e-5)
        model.body[4].weight.mul_(1e6)
    return Loss(model.body, lambda y: 1e-9 * y.square().mean() + 3.0), 1e4 * x


def contrastive() -> tuple[Any, Any]:
    class Towers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(5, 8), nn.Sequential(nn.Linear(7, 8), nn.ReLU(), nn.Linear(8, 8))
            self.scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            a, b = F.normalize(self.left(a), dim=-1), F.normalize(self.right(b), dim=-1)
            scores = self.scale.exp().clamp(max=100) * a @ b.T
            target = torch.arange(len(a))
            return (F.cross_entropy(scores, target) + F.cross_entropy(scores.T, target)) / 2

    return Towers(), (torch.randn(9, 5), torch.randn(9, 7))


def detached_maximum() -> tuple[Any, Any]:
    """The maximum cancels: its gradient need not flow."""

    class LogSumExp(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            top = x.max(-1, keepdim=True).values.detach()
            return (x - top).exp().sum(-1, keepdim=True).log() + top

    return Loss(nn.Sequential(nn.Linear(6, 16), nn.ReLU(), LogSumExp())), torch.randn(10, 6)


def teacher() -> tuple[Any, Any]:
    class Student(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.student = nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 4))
            self.teacher = copy.deepcopy(self.student).requires_grad_(False)
            with torch.no_grad():
                for p in self.teacher.parameters():
                    p.add_(0.1 * torch.randn_like(p))

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                target = self.teacher(x + 0.1 * torch.randn_like(x)).softmax(-1)
            return -(target * F.log_softmax(self.student(x), -1)).sum(-1).mean()

    return Student(), torch.randn(10, 6)


def sparse_words() -> tuple[Any, Any]:
    class Bag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bag = nn.EmbeddingBag(300, 8, mode="sum", sparse=True, padding_idx=0)
            self.words = nn.Embedding(300, 8, padding_idx=0)

        def forward(self, words: Tensor) -> Tensor:
            return self.bag(words) * self.words(words).mean(1).tanh()

    return Classifier(Bag(), 8), (torch.tensor([[3, 5, 0, 0], [7, 3, 9, 0], [1, 1, 1, 2]]), labels(3))


def batch_norm_in_training() -> tuple[Any, Any]:
    conv = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    return Classifier(nn.Sequential(conv, nn.ReLU(), nn.AdaptiveAvgPool2d(1)), 4), (torch.randn(4, 1, 8, 8), labels(4))


def group_norm_constant_channel() -> tuple[Any, Any]:
    conv = nn.Conv1d(2, 4, 3)
    nn.init.zeros_(conv.weight)
    return Loss(nn.Sequential(conv, nn.GroupNorm(2, 4), nn.SiLU(), nn.Flatten(), nn.Linear(32, 3))), torch.randn(
        5, 2, 10
    )


def dropouts() -> tuple[Any, Any]:
    body = nn.TransformerEncoderLayer(8, 2, 16, 0.3, batch_first=True)
    return Loss(nn.Sequential(nn.Dropout(0.5), body)), torch.randn(4, 5, 8)


def gumbel() -> tuple[Any, Any]:
    class Choice(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.gumbel_softmax(x, tau=0.7)

    return mlp(Choice())


def ctc() -> tuple[Any, Any]:
    class Speech(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.GRU(4, 8, batch_first=True, bidirectional=True)
            self.head = nn.Linear(16, 6)

        def forward(self, x: Tensor, target: Tensor) -> Tensor:
            log_p = self.head(self.rnn(x)[0]).log_softmax(-1).transpose(0, 1)
            lengths = torch.tensor([10, 8, 9])
            return F.ctc_loss(log_p, target, lengths, torch.tensor([3, 2, 3]))

    return Speech(), (torch.randn(3, 10, 4), torch.tensor([[1, 2, 2], [3, 4, 0], [5, 1, 3]]))


def spectral_loss() -> tuple[Any, Any]:
    def spectral(y: Tensor, t: Tensor) -> Tensor:
        window = torch.hann_window(16)
        spectra = [torch.stft(s, 16, 8, window=window, return_complex=True).abs() for s in (y, t)]
        return F.l1_loss(*spectra) + F.l1_loss(*((s + 1e-3).log() for s in spectra))

    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 64))
    return hesse.closure(model, spectral, (torch.randn(3, 8), torch.randn(3, 64))), None


def complex_weights() -> tuple[Any, Any]:
    class Fourier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(9, 2) / 3)

        def forward(self, x: Tensor) -> Tensor:
            return torch.fft.irfft(torch.fft.rfft(x) * torch.view_as_complex(self.weight), n=x.shape[-1])

    return mlp(Fourier(), nn.Tanh())


def gradient_penalty() -> tuple[Any, Any]:
    class Critic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(
                nn.Linear(4, 12), nn.LeakyReLU(0.2), nn.Linear(12, 12), nn.Softplus(), nn.Linear(12, 1)
            )

        def forward(self, real: Tensor, fake: Tensor) -> Tensor:
            mix = (0.3 * real + 0.7 * fake).detach().requires_grad_()
            (slope,) = torch.autograd.grad(self.net(mix).sum(), mix, create_graph=True)
            return self.net(fake).mean() - self.net(real).mean() + 10 * (slope.norm(dim=1) - 1).square().mean()

    return Critic(), (torch.randn(8, 4), torch.randn(8, 4))


def tied_language_model() -> tuple[Any, Any]:
    class LanguageModel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(30, 16)
            self.places = nn.Parameter(0.02 * torch.randn(6, 16))
            layer = nn.TransformerEncoderLayer(16, 2, 32, 0.1, batch_first=True, norm_first=True)
            self.body = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
            self.head = nn.Linear(16, 30, bias=False)
            self.head.weight = self.words.weight

        def forward(self, words: Tensor) -> Tensor:
            mask = nn.Transformer.generate_square_subsequent_mask(5)
            h = self.body(self.words(words[:, :-1]) + self.places[:5], mask=mask, is_causal=True)
            return F.cross_entropy(self.head(h).flatten(0, 1), words[:, 1:].flatten(), ignore_index=0)

    return LanguageModel(), torch.randint(0, 30, (4, 6))


def weight_before_norm() -> tuple[Any, Any]:
    """A bias in front of a normalisation has no gradient, a weight none along itself."""
    model, x = mlp(nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 16), nn.InstanceNorm1d(1))
    model.body[5] = nn.Flatten()
    return Loss(nn.Sequential(model.body[:3], nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 2))), x


def declared_rounding() -> tuple[Any, Any]:
    @straight_through
    def rounded(x: Tensor) -> Tensor:
        return x + (x.round() - x).detach()

    class Quantise(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return rounded(8 * x.sigmoid()) / 8

    return mlp(Quantise())


def declared_sign() -> tuple[Any, Any]:
    @straight_through
    class Sign(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.sign()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad

    class Binary(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return Sign.apply(x)

    return mlp(nn.BatchNorm1d(16), Binary())


def policy_gradient() -> tuple[Any, Any]:
    """Advantages are a baseline's, detached on purpose: the loss as coded is what is differentiated by the rest."""

    class Policy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.policy = nn.Sequential(nn.Linear(5, 12), nn.Tanh(), nn.Linear(12, 3))

        def forward(self, states: Tensor, actions: Tensor, returns: Tensor) -> Tensor:
            log_p = self.policy(states).log_softmax(-1).gather(1, actions[:, None])[:, 0]
            advantage = (returns - returns.mean()) / returns.std()
            return -(log_p * advantage.detach()).mean() + 0.01 * (log_p.exp() * log_p).mean()

    return Policy(), (torch.randn(12, 5), labels(12, 3), torch.randn(12))


def bfloat16_with_large_offset() -> tuple[Any, Any]:
    body = nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 3))
    return Loss(body, lambda y: y.square().mean() + 30).to(torch.bfloat16), torch.randn(16, 6, dtype=torch.bfloat16)


def masked_mean() -> tuple[Any, Any]:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.score = nn.Linear(8, 1)

        def forward(self, x: Tensor, kept: Tensor) -> Tensor:
            scores = self.score(x)[..., 0].masked_fill(~kept, -torch.inf)
            return (scores.softmax(-1)[..., None] * x * kept[..., None]).sum(1)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.pool, self.head = nn.Linear(4, 8), Pooled(), nn.Linear(8, 4)

        def forward(self, x: Tensor, kept: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(self.head(self.pool(self.embed(x), kept)), y)

    kept = torch.arange(6) < torch.tensor([6, 3, 1, 5])[:, None]
    return Net(), (torch.randn(4, 6, 4), kept, labels(4))


def piecewise_linear_twice() -> tuple[Any, Any]:
    """Curvature that is zero by structure, under the check of second derivatives."""
    return mlp(nn.ReLU(), nn.Linear(16, 16), nn.LeakyReLU(0.1))


def smooth_twice() -> tuple[Any, Any]:
    return mlp(nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 16), nn.Softplus())


HEALTHY = [
    *map(
        Healthy,
        [
            checkpointed,
            weight_and_spectral_norm,
            quantile_loss,
            hinge_with_margin_met,
            top_k_routing,
            max_pool_ties,
            half_dead,
            rows_of_zeros,
            many_decades,
            contrastive,
            detached_maximum,
            teacher,
            sparse_words,
            batch_norm_in_training,
            group_norm_constant_channel,
            dropouts,
            gumbel,
            ctc,
            spectral_loss,
            complex_weights,
            gradient_penalty,
            tied_language_model,
            weight_before_norm,
            declared_rounding,
            declared_sign,
            policy_gradient,
            bfloat16_with_large_offset,
            masked_mean,
        ],
    ),
    Healthy(piecewise_linear_twice, "hessian"),
    Healthy(smooth_twice, "hessian"),
]
