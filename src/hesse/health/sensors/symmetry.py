"""Units that are the same and will stay the same: equal weights with equal gradients.

Two hidden units with the same weights, in and out, get the same gradient for ever; a layer initialised with a constant
has one unit, however wide it is (Goodfellow, Bengio and Courville 2016, section 8.4). Neither half alone is a fault:
a zero-initialised head has equal rows whose gradients differ, dead units have equal gradients (zero) and weights that
differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hesse.health.sensors.functional import Calls
from hesse.health.sensors.protocol import Reading, Section
from hesse.health.sensors.samples import plain
from hesse.health.stats import Layer

__all__ = ["Symmetry", "twins"]

OFTEN, SELDOM = 10, 100  # the first ten samples, then ten in a hundred: symmetry is there from the start
UNITS = 4096  # of a layer that are compared
DIRECTIONS = 4  # that rows are projected on
WEIGHTS, GRADS = 4e-6, 1e-3  # relative differences that rounding makes in float32; a gradient is a sum that may cancel

Group = list[tuple[Tensor, Tensor]]  # weights and gradients [units, ...] that belong together


class Symmetry:
    """Key of layers: ``twins``, the fraction of units whose weight and gradient coincide with another unit's.

    Units are the rows of dense layers and convolutions with their biases, all gates of one unit in recurrent layers.
    Of a matrix in a module of the user's, whose orientation is unknown, both axes are tried, units without gradient
    left aside (rows of a table that were not looked up). Other layers are not measured.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        >>> for p in net.parameters():
        ...     _ = nn.init.constant_(p, 0.1)
        >>> net(torch.randn(8, 3)).square()[:, 0].sum().backward()
        >>> layers = [Layer("0", net[0], tuple(net[0].parameters())), Layer("2", net[2], tuple(net[2].parameters()))]
        >>> {path: x["twins"].item() for path, x in Symmetry(net, layers, Calls(net)).read().items()}
        {'0': 1.0, '2': 0.0}
    """

    section: ClassVar[Section] = "layers"

    def __init__(self, model: nn.Module, layers: Sequence[Layer], calls: Calls) -> None:
        self.layers = layers
        self._reads = 0
        self._directions: dict[tuple[int, int, torch.dtype, torch.device], Tensor] = {}

    def listen(self) -> None:
        """Weights and gradients are all it needs."""

    def rest(self) -> None:
        """Weights and gradients are all it needs."""

    def read(self) -> Reading:
        self._reads += 1
        if self._reads > OFTEN and self._reads % SELDOM >= OFTEN:
            return {}
        alike: dict[tuple[Any, ...], list[tuple[str, Tensor, Tensor]]] = {}  # layers of one width, compared at once
        found: dict[str, list[Tensor]] = {}
        with torch.no_grad():
            for layer in self.layers:
                for group, alive in _units(layer):
                    rows, norms = self._project(group)
                    alike.setdefault((norms.shape, alive, rows.dtype, rows.device), []).append(
                        (layer.path, rows, norms)
                    )
            for (_, alive, *_), parts in alike.items():
                fractions = twins(torch.stack([r for _, r, _ in parts]), torch.stack([n for _, _, n in parts]), alive)
                for (path, _, _), fraction in zip(parts, fractions.unbind(), strict=True):
                    found.setdefault(path, []).append(fraction)
        return {path: {"twins": torch.stack(fractions).amax()} for path, fractions in found.items()}

    def state_dict(self) -> dict[str, Any]:
        return {"reads": self._reads}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._reads = state["reads"]

    def _project(self, group: Group) -> tuple[Tensor, Tensor]:
        """Rows of weights and of gradients on a few directions, [2, directions, units], and norms [2, units]."""
        projected, squares = [], []
        for side in zip(*group, strict=True):
            parts = [part[:: -(-part.shape[0] // UNITS)].flatten(1) for part in side]
            parts = [part if part.dtype == torch.float64 else part.float() for part in parts]
            projected.append(sum(self._basis(part, i) @ part.mT for i, part in enumerate(parts)))
            squares.append(sum(torch.linalg.vector_norm(part, dim=1).square() for part in parts))
        return torch.stack(projected), torch.stack(squares).sqrt()

    def _basis(self, rows: Tensor, index: int) -> Tensor:
        """Random directions for the rows of one part, always the same, without touching torch's random state."""
        key = index, rows.shape[1], rows.dtype, rows.device
        if key not in self._directions:
            generator = torch.Generator().manual_seed(index)
            self._directions[key] = torch.randn(DIRECTIONS, rows.shape[1], generator=generator).to(rows)
        return self._directions[key]


def twins(rows: Tensor, norms: Tensor, alive: bool = False) -> Tensor:
    """The fraction of units whose weights and gradients coincide with those of another unit, [...].

    Equal rows have equal projections, and unequal ones have unequal projections but for chance: so units are sorted
    by one and compared with their neighbours in all, O(units log units).

    Args:
        rows: projections of the units' weights and of their gradients, [..., 2, directions, units].
        norms: of the units' weights and gradients, [..., 2, units], that differences are held against.
        alive: units without gradient do not count.

    Example:
        >>> rows = torch.tensor([[1.0, 2.0, 1.0, 2.0], [3.0, 4.0, 3.0, 5.0]])
        >>> twins(rows[:, None], rows)
        tensor(0.5000)
    """
    largest = norms.amax(-1, keepdim=True).clamp_min(torch.finfo(norms.dtype).tiny)
    order = (rows[..., 0, :] / largest).sum(-2).argsort()
    rows = rows.gather(-1, order[..., None, None, :].expand_as(rows))
    norms = norms.gather(-1, order[..., None, :].expand_as(norms))
    apart = (rows[..., 1:] - rows[..., :-1]).abs().amax(-2)
    larger = torch.maximum(norms[..., 1:], norms[..., :-1])
    same = (apart[..., 0, :] <= WEIGHTS * larger[..., 0, :]) & (apart[..., 1, :] <= GRADS * larger[..., 1, :])
    if alive:
        same &= torch.minimum(norms[..., 1, 1:], norms[..., 1, :-1]) > 0
    return (nn.functional.pad(same, (0, 1)) | nn.functional.pad(same, (1, 0))).float().mean(-1)


def _units(layer: Layer) -> list[tuple[Group, bool]]:
    """Groups of (weights, gradients) whose first axis is the units, and whether only living units count."""
    module = layer.module
    trainable = {id(p) for p in layer.params}
    known: dict[str, tuple[Tensor, Tensor]] = {}
    for name, p in module.named_parameters(recurse=False):
        if id(p) in trainable and plain(p) is not None and (grad := plain(p.grad)) is not None:
            known[name] = p.detach(), grad.detach()
    if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Bilinear)):
        return _dense(known, "weight", "bias")
    if isinstance(module, nn.MultiheadAttention):
        return _dense(known, "in_proj_weight", "in_proj_bias")
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        return _recurrent(module.hidden_size, known)
    if type(module).__module__.startswith("torch.nn"):
        return []  # norms and the like, whose units see one number each, and tables
    square = [pair for pair in known.values() if pair[0].dim() == 2]
    return [([pair], True) for pair in square] + [([(pair[0].mT, pair[1].mT)], True) for pair in square]


def _dense(known: dict[str, tuple[Tensor, Tensor]], weight: str, bias: str) -> list[tuple[Group, bool]]:
    """A row and its bias are a unit."""
    if weight not in known:
        return []
    return [([_rows(known[name]) for name in (weight, bias) if name in known], False)]


def _recurrent(hidden: int, known: dict[str, tuple[Tensor, Tensor]]) -> list[tuple[Group, bool]]:
    """The units of each layer and direction: all their gates, from the input and from the state."""
    layers: dict[str, Group] = {}
    for name, pair in known.items():
        kind, _, layer = name.removeprefix("weight_").removeprefix("bias_").partition("_")
        if kind in ("ih", "hh") and pair[0].shape[0] % hidden == 0:
            parts = [part.unflatten(0, (-1, hidden)).transpose(0, 1) for part in pair]
            layers.setdefault(layer, []).append((parts[0], parts[1]))
    return [(group, False) for group in layers.values()]


def _rows(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Vectors as columns."""
    weight, grad = pair
    return (weight, grad) if weight.dim() > 1 else (weight[:, None], grad[:, None])
