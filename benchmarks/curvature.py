"""Curvature products in units of one gradient, beside other libraries, in one interleaved run.

A gradient is one forward and backward pass of the same loss. Floors count the multiplications that the product cannot
do without, layer by layer, over those of the gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from statistics import median, quantiles
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hesse
from benchmarks.peers import Call, calls
from hesse.linalg import LinearOperator

ROUNDS = 15
COLUMNS = 32
# What the issue asks for: product -> goal for MLP, CNN, transformer.
GOALS: dict[str, tuple[float | str, ...]] = {
    "HVP, kept": (1.6, 1.9, 2.1),
    "HVP, set-up": (1.5, 1.5, 1.5),
    "HVP, fresh": (2.7, 2.9, 3.3),
    "GGN product": (1.3, 1.3, 1.5),
    "GGN, set-up": (2.0, 2.0, 2.0),
    "32 HVPs, each": (1.5, 1.2, 1.2),
    "top-5 eigenvalues": ("35 products", "35 products", "35 products"),
    "K-FAC factors": (2.0, 2.5, "works"),
    "exact GGN diagonal": (3.2, 5, "works"),
}


class Transformer(nn.Module):
    """Tokens to one of ten classes."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(64, width)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embedding(x)).mean(1))


def models() -> dict[str, tuple[nn.Module, tuple[Tensor, Tensor]]]:
    """The three models with a batch each, of ten classes around means of their own, after twenty steps of Adam.

    Spectra are asked of trained models: a few eigenvalues stand out then, one or two a class.
    """
    torch.manual_seed(0)
    pictures, labels = _pictures(256)
    tokens, topics = _texts(16)
    mlp = nn.Sequential(nn.Linear(784, 512), nn.Tanh(), nn.Linear(512, 512), nn.Tanh(), nn.Linear(512, 10))
    cnn = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(32 * 49, 10),
    )  # fmt: skip
    made = {
        "MLP": (mlp, (pictures.flatten(1), labels)),
        "CNN": (cnn, (pictures[:128], labels[:128])),
        "transformer": (Transformer(), (tokens, topics)),
    }
    for model, (x, y) in made.values():
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        for _ in range(20):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return made


def _pictures(n: int) -> tuple[Tensor, Tensor]:
    labels = torch.arange(n) % 10
    return (torch.randn(10, 1, 28, 28)[labels] + 2 * torch.randn(n, 1, 28, 28)) / 5**0.5, labels


def _texts(n: int) -> tuple[Tensor, Tensor]:
    """Tokens drawn from a distribution of each topic's own."""
    labels = torch.arange(n) % 10
    return torch.multinomial((2 * torch.randn(10, 64)).softmax(1)[labels], 32, replacement=True), labels


def main() -> None:
    """Print one table."""
    print("### Curvature products, in gradients\n")
    print("| model | product | goal | hesse, median (quartiles) | peers |\n|---|---|---|---|---|")
    for place, (name, (model, batch)) in enumerate(models().items()):
        _measure(place, name, model, batch)
    print()


def _measure(place: int, name: str, model: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    make = {
        kind: partial(getattr(hesse.curvature, kind), model, F.cross_entropy, batch)
        for kind in ("hessian", "ggn", "kfac")
    }
    began = perf_counter()
    hessian = make["hessian"]()
    first = perf_counter() - began
    ggn = make["ggn"]()
    torch.manual_seed(1)
    n = hessian.shape[0]
    v, block = torch.randn(n), torch.randn(n, COLUMNS)
    params = list(model.parameters())

    def gradient() -> None:
        torch.autograd.grad(F.cross_entropy(model(batch[0]), batch[1]), params)

    ours: dict[str, Callable[[], Any]] = {
        "HVP, kept": lambda: hessian @ v,
        "HVP, set-up": make["hessian"],
        "HVP, fresh": lambda: make["hessian"]() @ v,
        "GGN product": lambda: ggn @ v,
        "GGN, set-up": make["ggn"],
        "32 HVPs, each": lambda: hessian @ block,
        "the same, one by one": lambda: torch.stack([hessian @ column for column in block.T]),
        "K-FAC factors": make["kfac"],
        "exact GGN diagonal": ggn.diagonal,
    }
    theirs = calls(model, batch, v, block)
    runs: dict[tuple[str, str], Call] = {("gradient", ""): gradient}
    runs |= {(product, "hesse"): call for product, call in ours.items()}
    runs |= {(product, peer): call for product, found in theirs.items() for peer, call in found.items()}
    runs.pop(("top-5 eigenvalues", "PyHessian"), None)
    seconds = _interleaved({key: call for key, call in runs.items() if not isinstance(call, str)})
    unit = median(seconds["gradient", ""])
    for product in ours:
        goal = GOALS[product][place] if product in GOALS else ""
        share = COLUMNS if product in ("32 HVPs, each", "the same, one by one") else 1
        peers = "; ".join(
            f"{peer} {call if isinstance(call, str) else _ratio(seconds[product, peer], unit, share)}"
            for peer, call in {**theirs.get(product, {}), **theirs.get("", {})}.items()
        )
        print(
            f"| {name} | {product} | {goal} | {_ratio(seconds[product, 'hesse'], unit, share)} | {peers} |", flush=True
        )
    goal = GOALS["top-5 eigenvalues"][place]
    print(f"| {name} | top-5 eigenvalues | {goal} | {_eigenvalues(hessian)} | {_peer_eigenvalues(theirs)} |")
    note = f"a gradient is {1e3 * unit:.1f} ms"
    print(f"| {name} | first operator, with its check | | {first / unit:.1f} | {note} |", flush=True)


def _eigenvalues(operator: LinearOperator) -> str:
    pairs = operator.eigsh(5, which="LM", rtol=1e-3)
    exact = operator.eigsh(5, which="LM", rtol=1e-6).values
    error = float(((pairs.values - exact).abs() / exact.abs()).max())
    return f"**{pairs.products}** products, error {error:.0e}, converged {pairs.converged}"


def _peer_eigenvalues(theirs: dict[str, dict[str, Call]]) -> str:
    call = theirs.get("top-5 eigenvalues", {}).get("PyHessian", "")
    return call if isinstance(call, str) else f"PyHessian {call()} products, without bounds"


def _interleaved(runs: dict[tuple[str, str], Callable[[], Any]]) -> dict[tuple[str, str], list[float]]:
    """Seconds of every call, each once a round, so that all meet the same machine."""
    for call in runs.values():
        call()
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in runs}
    for _ in range(ROUNDS):
        for key, call in runs.items():
            began = perf_counter()
            call()
            seconds[key].append(perf_counter() - began)
    return seconds


def _ratio(seconds: Sequence[float], unit: float, share: int) -> str:
    low, _, high = quantiles(seconds, n=4)
    return f"**{median(seconds) / unit / share:.2f}** ({low / unit / share:.2f} to {high / unit / share:.2f})"


if __name__ == "__main__":
    main()
