"""Towers: parts of a model that read different inputs and meet later, and what each has understood so far.

A tower is a module whose output depends on its own parameters and on the model's inputs only, taken as large as
possible, when there are two or more that read different tensors. They are found once, by walking the autograd graph
of one pass: image and text encoders, the branches of a two-stream network, the modalities of a late fusion.

What a tower has understood is asked with a linear probe (Alain and Bengio, 2017): how well ridge regression from its
features explains the target, rows left out one by one. The target is not given to the monitor; it is read off
the gradient at the model's output: for cross-entropy the one negative entry of a row is its label, and a mean
squared error's gradient is proportional to output minus target.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import reduce
from operator import or_
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hesse.health.sensors.functional import Call, Calls
from hesse.health.sensors.protocol import Reading, Section
from hesse.health.sensors.samples import plain, rms, tensors
from hesse.health.stats import Layer

__all__ = ["Branches", "Tower", "explained", "target"]

ROWS = 512  # of a batch are looked at
WIDTH = 64  # features of a tower are looked at
PAST = 384  # rows of earlier samples from which the probe learns besides
CLASSES = 4096  # wider outputs are not probed
DAMPINGS = 1e-3, 1e-2, 1e-1, 1.0, 10.0  # of the mean eigenvalue of the features' Gram matrix

Key = tuple[tuple[int, int], ...]  # which memory a call read


@dataclass(frozen=True)
class Tower:
    """``path`` names it, the output of the module ``end`` is its output, ``layers`` are those it is made of."""

    path: str
    end: str
    layers: tuple[str, ...]


@dataclass(frozen=True)
class _Seen:
    path: str
    module: nn.Module
    node: Any  # of the autograd graph, that made the output
    key: Key
    rows: int


class Branches:
    """Reads ``{tower: {"grad", "out", "varies", "curvature", "probe", "share", "missing", "layers"}}``.

    - ``grad``: norm of the gradient at the tower's output; ``out``: root mean square of the output.
    - ``varies``: by how much the features of a row differ from the rows' mean, root mean square: all that the rest of
      the model can tell examples apart by.
    - ``curvature``: trace of the empirical Fisher matrix of a linear layer on the tower's features, with factors
      taken as independent: mean |row of the gradient|^2, for a mean loss times rows^2, times mean |row of features|^2.
    - ``probe``, ``share``, ``missing``: part of the variance of the target, of the model's output, and of the
      gradient at the output (what the model still lacks) that ridge regression on the tower's features explains,
      each row left out in turn. At most 1; about 0 or a little below for features that say nothing.
    - ``layers``: paths of its layers, separated by spaces.

    Nothing is read of models without towers, and of outputs that are not tensors ``[rows, ...]``. A model that returns
    more than its answer while it trains says by an attribute ``answer_columns``, a slice of dimension 1, where that is,
    and by ``auxiliary``, names of modules, what is not on the way to it. Where some towers have a loss of their own
    besides, ``own_losses`` has the last parts of their paths, and the reading ``"own": 1``.
    """

    section: ClassVar[Section] = "branches"

    def __init__(self, model: nn.Module, layers: Sequence[Layer], calls: Calls) -> None:
        self.model = model
        self.layers = tuple(layers)
        self.towers: tuple[Tower, ...] | None = None  # not looked for yet
        self._past: dict[str, tuple[Tensor, Tensor]] = {}  # features [rows, features], targets [rows, outputs]
        calls.on_modules(self._hear)
        self.listen()

    def listen(self) -> None:
        """Forget the pass before."""
        self._seen: list[_Seen] = []
        self._features: dict[str, Tensor] = {}
        self._sizes: dict[str, Tensor] = {}
        self._grads: dict[str, Tensor] = {}
        self._output: Tensor | None = None
        self._slope: Tensor | None = None

    def rest(self) -> None:
        """Nothing: hooks on tensors wait for the backward."""

    def read(self) -> Reading:
        """The numbers of each tower, of the pass that was listened to."""
        reading: Reading = {}
        output, slope = self._output, self._slope
        for tower in self.towers or ():
            h, g = self._features.get(tower.end), self._grads.get(tower.end)
            if h is None or g is None:
                continue
            n = g.shape[0]
            reading[tower.path] = {
                "grad": torch.linalg.vector_norm(g.float()),
                "out": self._sizes[tower.end],
                "varies": rms(h - h.mean(0)),
                "curvature": n * g.float().square().sum() * h.square().sum() / h.shape[0],
                "layers": " ".join(tower.layers),
            }
            if tower.path.rpartition(".")[2] in getattr(self.model, "own_losses", ()):
                reading[tower.path]["own"] = 1
            if output is None or slope is None or len(output) != n or output[0].numel() > CLASSES:
                continue
            if bool(slope.any()):  # a loss without a slope says nothing of its target
                y, o, r = (_few(_flat(t)) for t in (target(output, slope), output, slope))
                reading[tower.path]["probe"] = self._probe(tower.path, h, y)
                reading[tower.path]["share"], reading[tower.path]["missing"] = explained(h, (o, r))
        self.listen()
        return reading

    def state_dict(self) -> dict[str, Any]:
        """Which towers there are, once they have been looked for, and the rows that probes remember."""
        if self.towers is None:
            return {}
        past = {path: [_packed(t) for t in pair] for path, pair in self._past.items()}
        return {"towers": [asdict(tower) for tower in self.towers], "past": past}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the towers of ``state``."""
        if "towers" in state:
            self.towers = tuple(Tower(t["path"], t["end"], tuple(t["layers"])) for t in state["towers"])
            self._past = {path: (_unpacked(h), _unpacked(y)) for path, (h, y) in state["past"].items()}

    def _probe(self, path: str, h: Tensor, y: Tensor) -> Tensor:
        """How well the target of these rows is found from the others and from those of the samples before.

        A batch is centred and brought to unit size first: features grow from sample to sample, and change slowly.
        """
        h = h - h.mean(0)
        h = h / (h.square().mean().sqrt() + torch.finfo(h.dtype).tiny)
        x, t = h, y
        old = self._past.get(path)
        if old is not None and (old[0].shape[1], old[1].shape[1]) == (h.shape[1], y.shape[1]):
            x, t = torch.cat([h, old[0].to(h)]), torch.cat([y, old[1].to(y)])
        self._past[path] = x[:PAST], t[:PAST]
        return explained(x, (t,), len(h))[0]

    def _hear(self, call: Call) -> None:
        if self.towers == ():
            return
        output = plain(call.output)
        if output is None or output.grad_fn is None or output.dim() < 1:
            return
        if call.module is self.model:
            self._conclude(output)
        elif self.towers is None:
            if call.path.partition(".")[0] in getattr(self.model, "auxiliary", ()):
                return
            read = tuple((x.data_ptr(), x.numel()) for x in tensors((call.args, call.kwargs)))
            self._seen.append(_Seen(call.path, call.module, output.grad_fn, read, output.shape[0]))
        elif any(call.path == tower.end for tower in self.towers):
            self._features[call.path] = _few(_narrow(_flat(output)))
            self._sizes[call.path] = rms(output)
            output.register_hook(self._keep(call.path))

    def _conclude(self, output: Tensor) -> None:
        """The model's own output: the last thing of a pass."""
        if self.towers is None:
            self.towers = find(self._seen, output, self.layers)
            self._seen = []
            return
        self._output = self._answer(output.detach())
        output.register_hook(self._keep(None))

    def _answer(self, t: Tensor) -> Tensor:
        """The part of the model's output, or of its gradient, that is its answer."""
        columns = getattr(self.model, "answer_columns", None)
        return t[:, columns] if isinstance(columns, slice) and t.dim() > 1 else t

    def _keep(self, path: str | None) -> Callable[[Tensor], None]:
        def keep(grad: Tensor) -> None:
            if path is None:
                self._slope = self._answer(grad.detach()).clone()
            else:
                self._grads[path] = grad.detach().clone()

        return keep


def find(seen: Sequence[_Seen], output: Tensor, layers: Sequence[Layer]) -> tuple[Tower, ...]:
    """The towers of a pass, from its calls in their order and the model's output."""
    bits = {id(p): 1 << i for i, p in enumerate(p for layer in layers for p in layer.params)}
    reach = _reach([call.node for call in seen] + [output.grad_fn], bits)
    rows = output.shape[0] if output.dim() else 0
    inner = {}
    for call in seen:
        own = _joined(bits.get(id(p), 0) for p in call.module.parameters())
        alone = reach[call.node] & ~own == 0 and not isinstance(call.module, (nn.Embedding, nn.EmbeddingBag))
        if reach[call.node] and alone and call.rows == rows:
            inner[call.path] = call
    roots = _split(inner)
    masks = {path: reach[call.node] for path, call in roots.items()}
    if len(masks) < 2 or any(mask & ~reach[output.grad_fn] for mask in masks.values()):
        return ()
    towers = []
    for path, mask in masks.items():
        others = _joined(m for other, m in masks.items() if other != path)
        grown = [c for c in seen if reach[c.node] & mask and not reach[c.node] & others and c.rows == rows]
        grown = [c for c in grown if c.path == path or not c.path.startswith(f"{path}.")]
        own = _joined(reach[call.node] for call in grown)
        names = tuple(layer.path for layer in layers if any(bits[id(p)] & own for p in layer.params))
        towers.append(Tower(_common([c.path for c in grown]) or path, grown[-1].path, names))
    return tuple(towers) if len({tower.path for tower in towers}) == len(towers) else ()


def _joined(masks: Iterable[int]) -> int:
    return reduce(or_, masks, 0)


def _reach(nodes: Sequence[Any], bits: dict[int, int]) -> dict[Any, int]:
    """The parameters, as bits, on which each node of the autograd graph depends."""
    reach: dict[Any, int] = {}
    for start in nodes:
        stack = [start]
        while stack:
            node = stack[-1]
            following = [following for following, _ in node.next_functions if following is not None]
            todo = [f for f in following if f not in reach]
            if node in reach or not todo:
                leaf = getattr(node, "variable", None)
                mask = 0 if leaf is None else bits.get(id(leaf), 0)
                for f in following:
                    mask |= reach[f]
                reach[node] = mask
                stack.pop()
            else:
                stack += todo
    return reach


def _split(inner: dict[str, _Seen]) -> dict[str, _Seen]:
    """The largest modules that read different tensors; inside a single largest one, those within it."""
    while inner:
        largest = {p: c for p, c in inner.items() if not any(p.startswith(f"{other}.") for other in inner)}
        different: dict[Any, str] = {}
        for path, call in largest.items():
            different.setdefault(call.key if len(call.key) == 1 else path, path)
        if len(different) > 1:
            return {path: largest[path] for path in different.values()}
        inner = {p: c for p, c in inner.items() if p not in largest} if len(largest) == 1 else {}
    return {}


def _common(paths: Sequence[str]) -> str:
    """What the paths begin with in common, in whole names."""
    parts = [path.split(".") for path in paths]
    common = []
    for names in zip(*parts, strict=False):
        if len(set(names)) > 1:
            break
        common.append(names[0])
    return ".".join(common)


def target(output: Tensor, slope: Tensor) -> Tensor:
    """What the output ``[rows, ...]`` should have been, from the gradient of the loss with respect to it, same shape.

    Cross-entropy's gradient is probabilities minus one-hot labels: rows that sum to zero, with the label at the most
    negative entry, at any scale of the loss. Anything else is taken for a mean squared error, 2 (output - target) / n,
    which is right up to scale for all losses that pull the output towards a target.

    Example:
        >>> output = torch.randn(4, 3, requires_grad=True)
        >>> nn.functional.cross_entropy(output, torch.tensor([2, 0, 1, 1])).backward()
        >>> target(output.detach(), output.grad).argmax(1)
        tensor([2, 0, 1, 1])
    """
    slope = slope.to(torch.promote_types(slope.dtype, torch.float32))
    if slope.dim() > 1 and slope.shape[1] > 1:
        sums, sizes = slope.sum(1), slope.abs().sum(1)
        probabilities = (sums.abs() <= 1e-3 * sizes.amax()).all()
        labels = torch.zeros_like(slope).scatter_(1, slope.argmin(1, keepdim=True), 1.0)
        return torch.where(probabilities, labels, output - slope * (slope.numel() / 2))
    return output - slope * (slope.numel() / 2)


def explained(x: Tensor, targets: Sequence[Tensor], first: int | None = None) -> list[Tensor]:
    """Part of the variance of each target [rows, outputs] that ridge regression on x [rows, features] explains.

    Of the ``first`` rows, or all.

    Every row is predicted from the others: e_i / (1 - h_ii) for the residuals e and leverages h of the fit with all
    rows (Allen, 1974). The best of a few dampings, relative to the features' own variance, counts.

    Example:
        >>> x = torch.randn(200, 5, generator=torch.Generator().manual_seed(0))
        >>> known, unknown = explained(x, [x[:, :1] - x[:, 1:2], torch.randn(200, 1)])
        >>> bool(known > 0.99), bool(unknown < 0.1)
        (True, True)
    """
    n = x.shape[0]
    x = x.float() - x.float().mean(0)
    # In double precision: of features that are mostly dead the solver gives up in single.
    values, vectors = (t.float() for t in torch.linalg.eigh(torch.nan_to_num((x.T @ x).double())))
    rotated = x @ vectors
    best: list[Tensor] = []
    for damping in DAMPINGS:
        scale = values.clamp_min(0) + damping * values.clamp_min(0).mean() + torch.finfo(x.dtype).tiny
        fitted = rotated / scale
        left = (1 - 1 / n - (fitted * rotated).sum(1)).clamp_min(1e-3)
        for i, y in enumerate(targets):
            y = y.float() - y.float().mean(0)
            error = ((y - fitted @ (rotated.T @ y)) / left[:, None])[:first]
            alone = y[:first] * (n / (n - 1))  # left out of the mean, which is what there is without features
            part = 1 - error.square().sum() / (alone.square().sum() + torch.finfo(y.dtype).tiny)
            if len(best) == len(targets):
                best[i] = torch.maximum(best[i], part)
            else:
                best.append(part)
    return best


def _flat(t: Tensor) -> Tensor:
    """[rows, features]: channels of images and the last axis of sequences, averaged over places."""
    t = t.detach().float()
    if t.dim() == 1:
        return t[:, None]
    if t.dim() == 2:
        return t
    return t.flatten(2).mean(2) if t.dim() > 3 else t.mean(1)


def _narrow(t: Tensor) -> Tensor:
    return t[:, :: -(-t.shape[1] // WIDTH)]


def _packed(t: Tensor) -> dict[str, Any]:
    data = t.detach().to("cpu", torch.float32).contiguous().numpy().tobytes()
    return {"shape": list(t.shape), "data": base64.b64encode(data).decode()}


def _unpacked(packed: dict[str, Any]) -> Tensor:
    data = bytearray(base64.b64decode(packed["data"]))
    return torch.frombuffer(data, dtype=torch.float32).reshape(packed["shape"])


def _few(t: Tensor) -> Tensor:
    return t[:: -(-t.shape[0] // ROWS)]
