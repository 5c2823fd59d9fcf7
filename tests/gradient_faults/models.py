"""Correct whole models, of the kinds that people train."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

import hesse
from gradient_faults.case import Block, Classifier, Healthy, Loss, labels, mlp

__all__ = ["MODELS"]


def vision_transformer() -> tuple[Any, Any]:
    """Layer scales of 1e-6: what the blocks do is hardly there yet."""

    class Scaled(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner, self.gamma = inner, nn.Parameter(torch.full((16,), 1e-6))

        def forward(self, x: Tensor) -> Tensor:
            return self.gamma * self.inner(x)

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (t.unflatten(-1, (4, 4)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
            return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    class ViT(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patch = nn.Conv2d(1, 16, 4, 4)
            self.token, self.place = nn.Parameter(torch.zeros(1, 1, 16)), nn.Parameter(torch.randn(1, 10, 16) * 0.02)
            self.blocks = nn.Sequential(*(Block(Scaled(Attention())) for _ in range(2)))
            self.head = nn.Linear(16, 4)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            h = self.patch(x).flatten(2).mT
            h = self.blocks(torch.cat([self.token.expand(len(x), -1, -1), h], 1) + self.place)
            return F.cross_entropy(self.head(h[:, 0]), y, label_smoothing=0.1)

    return ViT(), (torch.randn(3, 1, 12, 12), labels(3))


def unet() -> tuple[Any, Any]:
    class UNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down = nn.Sequential(nn.Conv2d(2, 4, 3, 2, 1), nn.GroupNorm(2, 4), nn.SiLU(inplace=True))
            self.middle = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Hardswish())
            self.up = nn.ConvTranspose2d(8, 2, 4, 2, 1)
            self.time = nn.Sequential(nn.Linear(1, 4), nn.Mish())

        def forward(self, x: Tensor) -> Tensor:
            t = torch.rand(len(x), 1)
            noise = torch.randn_like(x)
            a = (math.pi / 2 * t)[..., None, None]
            h = self.down(a.cos() * x + a.sin() * noise) + self.time(t)[..., None, None]
            return F.mse_loss(self.up(torch.cat([h, self.middle(h)], 1)), noise)

    return UNet(), torch.randn(2, 2, 8, 8)


def variational() -> tuple[Any, Any]:
    class Autoencoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.decoder = nn.Linear(12, 8), nn.Linear(4, 12)

        def forward(self, x: Tensor) -> Tensor:
            mean, log_variance = self.encoder(x).chunk(2, -1)
            posterior = torch.distributions.Normal(mean, (log_variance / 2).exp())
            z = posterior.rsample()
            prior = torch.distributions.Normal(torch.zeros_like(mean), 1.0)
            likelihood = torch.distributions.Bernoulli(logits=self.decoder(z)).log_prob(x).sum(-1)
            return (torch.distributions.kl_divergence(posterior, prior).sum(-1) - likelihood).mean()

    return Autoencoder(), torch.rand(6, 12).round()


def packed_sequences() -> tuple[Any, Any]:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(30, 6, padding_idx=0)
            self.rnn = nn.LSTM(6, 8, num_layers=2, batch_first=True, dropout=0.2)
            self.head = nn.Linear(8, 4)

        def forward(self, words: Tensor, y: Tensor) -> Tensor:
            lengths = (words > 0).sum(1)
            packed = pack_padded_sequence(self.words(words), lengths, batch_first=True, enforce_sorted=False)
            out, _ = pad_packed_sequence(self.rnn(packed)[0], batch_first=True)
            return F.cross_entropy(self.head(out[torch.arange(len(words)), lengths - 1]), y)

    words = torch.randint(1, 30, (4, 6)) * (torch.arange(6) < torch.tensor([6, 2, 4, 5])[:, None])
    return Reader(), (words, labels(4))


def graph_network() -> tuple[Any, Any]:
    class Conv(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.message, self.score = nn.Linear(8, 8), nn.Linear(16, 1)

        def forward(self, x: Tensor, source: Tensor, target: Tensor) -> Tensor:
            e = F.leaky_relu(self.score(torch.cat([x[source], x[target]], -1)), 0.2)
            top = torch.full((len(x), 1), -1e9).scatter_reduce(0, target[:, None], e, "amax")
            w = (e - top[target]).exp()
            total = torch.zeros(len(x), 1).index_add(0, target, w) + 1e-9
            return torch.zeros_like(x).index_add(0, target, w / total[target] * self.message(x)[source])

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.conv, self.head = nn.Linear(5, 8), Conv(), nn.Linear(8, 4)

        def forward(self, x: Tensor, source: Tensor, target: Tensor, y: Tensor) -> Tensor:
            h = F.elu(self.conv(self.embed(x), source, target))
            return F.nll_loss(self.head(h).log_softmax(-1)[:6], y)

    edges = torch.randint(0, 9, (2, 25))
    return Net(), (torch.randn(9, 5), edges[0], edges[1], labels(6))


def q_learning() -> tuple[Any, Any]:
    class Agent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.online = nn.Sequential(nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 3))
            self.target = copy.deepcopy(self.online).requires_grad_(False)

        def forward(self, s: Tensor, a: Tensor, r: Tensor, s2: Tensor) -> Tensor:
            with torch.no_grad():
                best = self.online(s2).argmax(-1, keepdim=True)
                goal = r + 0.99 * self.target(s2).gather(1, best)[:, 0]
            return F.smooth_l1_loss(self.online(s).gather(1, a[:, None])[:, 0], goal)

    return Agent(), (torch.randn(10, 4), labels(10, 3), torch.randn(10), torch.randn(10, 4))


def masked_language_model() -> tuple[Any, Any]:
    """Of all places three have labels; of all words a few occur."""

    class Bert(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.kinds = nn.Embedding(200, 8), nn.Embedding(2, 8)
            self.norm = nn.LayerNorm(8)
            self.block = nn.TransformerEncoderLayer(8, 2, 16, 0.1, "gelu", batch_first=True)
            self.bias = nn.Parameter(torch.zeros(200))

        def forward(self, words: Tensor, tags: Tensor) -> Tensor:
            h = self.norm(self.words(words) + self.kinds(torch.zeros_like(words)))
            h = self.block(h, src_key_padding_mask=words == 0)
            scores = h @ self.words.weight.T + self.bias
            return F.cross_entropy(scores.flatten(0, 1), tags.flatten(), ignore_index=-100)

    words = torch.randint(1, 200, (3, 6))
    words[1, 4:] = 0
    tags = torch.full((3, 6), -100)
    tags[0, 2], tags[1, 1], tags[2, 5] = 7, 3, 190
    return Bert(), (words, tags)


def correct_functions() -> tuple[Any, Any]:
    """Custom Functions with several outputs, integers, flags, in-place work and no gradient for some arguments."""

    class Split(Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, power: int) -> tuple[Tensor, Tensor, Tensor]:
            order = x.argsort(-1)
            ctx.save_for_backward(x)
            ctx.power = power
            ctx.mark_non_differentiable(order)
            ctx.set_materialize_grads(False)
            return x**power, x.relu(), order

        @staticmethod
        def backward(ctx: Any, a: Tensor | None, b: Tensor | None, _: Any) -> tuple[Tensor | None, None]:
            (x,) = ctx.saved_tensors
            total = torch.zeros_like(x)
            if a is not None:
                total = total + a * ctx.power * x ** (ctx.power - 1)
            if b is not None:
                total = total + b * (x > 0)
            return total, None

    class Scale(Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, s: Tensor) -> Tensor:
            ctx.save_for_backward(s)
            ctx.mark_dirty(x)
            return x.mul_(s)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
            return grad * ctx.saved_tensors[0], None

    class Layer(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            a, _, order = Split.apply(x, 3)
            return Scale.apply(a + order * 0.1, torch.tensor(0.5))

    return mlp(nn.Tanh(), Layer())


def watching_hooks() -> tuple[Any, Any]:
    """Hooks that look and log, and change nothing."""
    model, x = mlp(nn.Linear(16, 16), nn.ReLU())
    log: list[float] = []
    for module in model.body[1:]:  # the first has no input that is differentiated, and torch warns of it
        module.register_full_backward_hook(lambda m, i, o: log.append(float(o[0].norm())))
        module.register_forward_hook(lambda m, i, o: None)
    for p in model.parameters():
        p.register_hook(lambda g: None if g.isfinite().all() else g.nan_to_num())
        p.register_post_accumulate_grad_hook(lambda p: None)
    return model, x


def stochastic_depth() -> tuple[Any, Any]:
    class Skipped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            if torch.rand(()) < 0.4:
                return x
            kept = torch.empty(len(x), 1).bernoulli_(0.8) / 0.8
            return x + kept * self.inner(x).relu()

    return mlp(Skipped(), Skipped(), Skipped(), nn.LayerNorm(16))


def saturated() -> tuple[Any, Any]:
    """Scores far apart: softmax and sigmoid have no slope left that float32 could show."""
    model, x = mlp(nn.Sigmoid())
    with torch.no_grad():
        model.body[0].weight.mul_(60)
        model.body[2].weight.mul_(300)
    return Loss(model.body, lambda y: F.cross_entropy(y, labels(12, 3))), x


def converged() -> tuple[Any, Any]:
    """The loss is zero to the last digit, and so is its gradient."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))
    x = torch.randn(9, 6)
    return hesse.closure(model, F.mse_loss, (x, model(x).detach().clone())), None


def checkpoint_reentrant() -> tuple[Any, Any]:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(16, 16), nn.Dropout(0.2), nn.ReLU())

        def forward(self, x: Tensor) -> Tensor:
            return x + checkpoint(self.inner, x, use_reentrant=True)

    return mlp(nn.ReLU(), Checkpointed(), nn.LayerNorm(16))


def sorted_and_clipped() -> tuple[Any, Any]:
    class Order(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.sort(-1).values.clamp(-0.4, 0.4).cumsum(-1) + x.median(-1, keepdim=True).values

    return mlp(Order(), nn.Hardtanh(), nn.ReLU6())


def derivative_inside() -> tuple[Any, Any]:
    """A network for a differential equation: its own derivatives are in its loss."""

    class Equation(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(1, 12), nn.Tanh(), nn.Linear(12, 1))

        def forward(self, t: Tensor) -> Tensor:
            t = t.clone().requires_grad_()
            u = self.net(t)
            (slope,) = torch.autograd.grad(u.sum(), t, create_graph=True)
            (bend,) = torch.autograd.grad(slope.sum(), t, create_graph=True)
            return (bend + u).square().mean() + (u[0] - 1).square().sum()

    return Equation(), torch.linspace(0, 3, 15)[:, None]


def mixture_density() -> tuple[Any, Any]:
    class Mixture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(3, 16), nn.Linear(16, 9)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            w, mean, width = self.head(self.body(x).tanh()).chunk(3, -1)
            z = (y - mean) / F.softplus(width)
            return -torch.logsumexp(w.log_softmax(-1) - z.square() / 2 - F.softplus(width).log(), -1).mean()

    return Mixture(), (torch.randn(14, 3), torch.randn(14, 1))


def random_field() -> tuple[Any, Any]:
    """The forward algorithm of a conditional random field, with forbidden transitions of -1e4."""

    class Field(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scores, self.steps = nn.Linear(5, 4), nn.Parameter(torch.randn(4, 4))
            with torch.no_grad():
                self.steps[0, 3] = -1e4

        def forward(self, x: Tensor, tags: Tensor) -> Tensor:
            e = self.scores(x)
            total, gold = e[:, 0], e[:, 0].gather(1, tags[:, :1])[:, 0]
            for t in range(1, x.shape[1]):
                total = torch.logsumexp(total[:, :, None] + self.steps, 1) + e[:, t]
                gold = gold + self.steps[tags[:, t - 1], tags[:, t]] + e[:, t].gather(1, tags[:, t : t + 1])[:, 0]
            return (total.logsumexp(-1) - gold).mean()

    return Field(), (torch.randn(3, 5, 5), torch.randint(0, 3, (3, 5)))


def autocast() -> tuple[Any, Any]:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(6, 32), nn.LayerNorm(32), nn.GELU(), nn.Linear(32, 4))

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                scores = self.net(x)
            return F.cross_entropy(scores.float(), y)

    return Mixed(), (torch.randn(16, 6), labels(16))


def frozen_backbone() -> tuple[Any, Any]:
    class Adapted(nn.Module):
        """A low-rank adapter whose second factor is zero yet."""

        def __init__(self) -> None:
            super().__init__()
            self.base = nn.Linear(16, 16).requires_grad_(False)
            self.a, self.b = nn.Parameter(torch.randn(2, 16) / 4), nn.Parameter(torch.zeros(16, 2))

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) + x @ self.a.T @ self.b.T

    backbone = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 16)).eval()
    backbone.requires_grad_(False)
    return Classifier(nn.Sequential(backbone, Adapted(), nn.ReLU()), 16), (torch.randn(5, 1, 6, 6), labels(5))


def transposed_and_shared() -> tuple[Any, Any]:
    """Non-contiguous weights, an unused one, and one that is used in three ways."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(8, 6).T)
            self.unused = nn.Parameter(torch.randn(3))
            self.scale = nn.Parameter(torch.tensor(1e-8))

        def forward(self, x: Tensor) -> Tensor:
            h = (x @ self.w).tanh()
            return (h @ self.w.T - x).abs().mean() + 1e4 * self.scale * self.w.square().sum()

    return Net(), torch.randn(7, 6)


def margins() -> tuple[Any, Any]:
    class Triplet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 4))

        def forward(self, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
            a, b, c = self.embed(a), self.embed(b), self.embed(c)
            hardest = torch.cdist(a, c).min(1).values
            return (torch.linalg.vector_norm(a - b, dim=-1) - hardest + 0.2).relu().mean()

    return Triplet(), (torch.randn(8, 6), torch.randn(8, 6), torch.randn(8, 6))


MODELS = [
    *map(
        Healthy,
        [
            vision_transformer,
            unet,
            variational,
            packed_sequences,
            graph_network,
            q_learning,
            masked_language_model,
            correct_functions,
            watching_hooks,
            stochastic_depth,
            saturated,
            converged,
            checkpoint_reentrant,
            sorted_and_clipped,
            derivative_inside,
            mixture_density,
            random_field,
            autocast,
            frozen_backbone,
            transposed_and_shared,
            margins,
        ],
    )
]
