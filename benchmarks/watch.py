"""What watching costs: the same training watched and plain, in turns, as the ratio of processor times.

The monitor's own choice of when to look is on trial (``every=None``). It looks more often at the start, so a whole
training of a few seconds pays more than its later steps do: both are measured.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from statistics import median, quantiles
from time import process_time

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hesse

PAIRS = 3
BLOCKS = 14  # of plain and watched steps in turns, once the start is over
SECONDS = 5.0  # about as long is each of the two trainings of a pair
Batch = tuple[Tensor, Tensor]


class Transformer(nn.Module):
    """Two blocks of width 64 on sequences of 32."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(64, 64), nn.Parameter(torch.zeros(32, 64))
        layer = nn.TransformerEncoderLayer(64, 4, 256, 0.0, batch_first=True)
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.embed(x) + self.place)).flatten(0, 1)


def mlp(width: int) -> nn.Module:
    parts = [nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)]
    return nn.Sequential(*parts)


def convnet() -> nn.Module:
    first = [nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()]
    return nn.Sequential(*first, nn.Conv2d(16, 32, 3, 2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 64, 10))


TRAININGS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Batch]]] = {
    "MLP 64-128-128-10, 32 rows": (
        lambda: mlp(128),
        lambda: (torch.randn(32, 64), torch.randint(10, (32,))),
    ),
    "MLP 64-512-512-10, 256 rows": (
        lambda: mlp(512),
        lambda: (torch.randn(256, 64), torch.randint(10, (256,))),
    ),
    "convnet 16 x 16, 32 rows": (
        convnet,
        lambda: (torch.randn(32, 3, 16, 16), torch.randint(10, (32,))),
    ),
    "transformer of width 64, 8 x 32": (
        Transformer,
        lambda: (torch.randint(64, (8, 32)), torch.randint(64, (256,))),
    ),
}


def main() -> None:
    """Print the ratio for each training as median and quartiles of pairs."""
    torch.set_num_threads(1)
    logging.getLogger("hesse.health").setLevel(logging.CRITICAL)  # findings are not what is measured
    print("### Overhead of watching\n")
    print(
        "| training | plain step, ms | 5 s of training: watched / plain | range | later: watched / plain | quartiles |"
    )
    print("|---|---|---|---|---|---|")
    for name, (make, batch) in TRAININGS.items():
        steps = max(60, int(SECONDS * 20 / _plain(make, batch, 20)))
        times = [_pair(make, batch, steps) for _ in range(PAIRS)]
        whole = [watched / plain for plain, watched in times]
        later = _later(make, batch, steps)
        low, _, high = quantiles(later, n=4)
        print(
            f"| {name} | {1e3 * median(plain for plain, _ in times) / steps:.2f} | {median(whole):.3f} "
            f"| {min(whole):.3f} to {max(whole):.3f} | {median(later):.3f} | {low:.3f} to {high:.3f} |",
            flush=True,
        )
    print()


def _pair(make: Callable[[], nn.Module], batch: Callable[[], Batch], steps: int) -> tuple[float, float]:
    """Processor seconds of the plain and of the watched training."""
    plain = _plain(make, batch, steps)
    model, optimizer, rows = _begun(make, batch)
    began = process_time()
    with hesse.watch(model) as w:
        for _ in range(steps):
            w.step(loss=_step(model, optimizer, rows))
    return plain, process_time() - began


def _later(make: Callable[[], nn.Module], batch: Callable[[], Batch], steps: int) -> list[float]:
    """The ratio of blocks of steps of two trainings that go on side by side, the first ``steps`` of each left out."""
    plain, watched = _begun(make, batch), _begun(make, batch)
    with hesse.watch(watched[0]) as w:

        def block(count: int) -> float:
            began = process_time()
            for _ in range(count):
                w.step(loss=_step(*watched))
            middle = process_time()
            for _ in range(count):
                _step(*plain)
            return (middle - began) / (process_time() - middle)

        block(steps)
        return [block(steps // 10) for _ in range(BLOCKS)]


def _plain(make: Callable[[], nn.Module], batch: Callable[[], Batch], steps: int) -> float:
    model, optimizer, rows = _begun(make, batch)
    began = process_time()
    for _ in range(steps):
        _step(model, optimizer, rows)
    return process_time() - began


def _begun(make: Callable[[], nn.Module], batch: Callable[[], Batch]) -> tuple[nn.Module, torch.optim.Optimizer, Batch]:
    torch.manual_seed(0)
    model = make()
    return model, torch.optim.AdamW(model.parameters(), 1e-3), batch()


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch) -> Tensor:
    optimizer.zero_grad()
    loss = F.cross_entropy(model(batch[0]), batch[1])
    loss.backward()
    optimizer.step()
    return loss
