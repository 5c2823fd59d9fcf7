"""The numbers of one step, by layer: how long gradient, weights and update are, and how the step agrees with others.

Lengths are taken over all elements, one kernel for all parameters. What needs tensors of other steps (the gradient
of the sample before, the weights at the start, the last update) is taken on at most :data:`MOST` elements of each
parameter, a fixed stride apart, so that nothing the size of the model is kept between steps. Everything stays on the
device until :meth:`Meter.read`, which makes one transfer.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from hesse.health.stats import Layer

__all__ = ["MOST", "Meter"]

MOST = 1024  # elements of a parameter that stand for it; a cosine between random ones is then 0.03
GLANCED = 20  # layers that are asked for a gradient before the glance is given up
FEW = 8  # fewer elements than this that differ from zero say nothing about an angle
SUMS = ("size", "zero", "tiny", "live", "stuck", "gg", "gl", "ll", "dd", "ww", "gs", "w", "start")

Numbers = dict[str, Any]


class Meter:
    """Reads one step at a time: :meth:`gradients` before it, :meth:`moved` after it, :meth:`read` for the numbers.

    Each may be called for some of the parameters only, as when several optimisers share a model; what is read last
    stands. ``params`` are those of the layers, in their order.
    """

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.layers = tuple(layers)
        self.params = [p for layer in layers for p in layer.params]
        self.everything = range(len(self.params))
        self._strides = [_stride(p) for p in self.params]
        sizes = [-(-_local(p).numel() // k) for p, k in zip(self.params, self._strides, strict=True)]
        self._size = sum(sizes)
        device = self.params[0].device if self.params else torch.device("cpu")
        self._wide = torch.float32 if device.type == "mps" else torch.float64
        # float32 on CPU: twenty times as fast, and what leaves its range is seen and done again
        self._norm = None if device.type in ("cpu", "mps") else torch.float64
        self._device = device
        lengths = torch.tensor(sizes, dtype=torch.int64)
        self._owner = torch.arange(len(sizes)).repeat_interleave(lengths).to(device)
        tiny = [torch.finfo(p.dtype).smallest_normal if p.is_floating_point() else 0.0 for p in self.params]
        self._tiny = torch.tensor(tiny, dtype=self._wide).repeat_interleave(lengths).to(device)
        smallest = [min(layer.params, key=Tensor.numel) for layer in layers[:GLANCED]]
        self._glanced = smallest if device.type == "cpu" else []
        self._copies: dict[int, Tensor] = {}
        self._start: Tensor | None = None  # samples, [elements]: of the weights at the start,
        self._last: Tensor | None = None  # of the gradient of the sample before,
        self._move: Tensor | None = None  # of the last step that was sampled,
        self._slope: Tensor | None = None  # and how the loss fell along it, [parameters]
        self._turned: list[Tensor] = []  # that slope and the same one step later, [parameters]
        self.checks: dict[str, tuple[float, float, float, float]] = {}  # of the step read last, see hesse.health.teams
        self.clear()

    def clear(self) -> None:
        """Forget the step that is being read; copies for the next one stay."""
        self._norms: dict[str, dict[int, Tensor]] = {}
        self._grad: Tensor | None = None
        self._asked: set[int] = set()  # parameters whose gradient was looked at,
        self._had: set[int] = set()  # those that had a dense one
        self._sparse: dict[int, float] = {}  # fraction of a sparse gradient that is not there
        self._old: Tensor | None = None
        self._new: Tensor | None = None

    def release(self) -> None:
        """Free the copies of the weights."""
        self._copies = {}

    def keep(self, which: Collection[int] | None = None) -> None:
        """Copies of the weights before the step."""
        chosen = list(self.everything if which is None else which)
        self._copies = {i: _local(self.params[i]).clone() for i in chosen}
        if self._start is None and len(chosen) == len(self.params):
            self._start = self._sample([self._copies[i] for i in self.everything])

    def gradients(self, which: Collection[int] | None = None, scale: Tensor | float | None = None) -> None:
        """The gradients as they are now; ``scale`` is what the loss was multiplied by."""
        chosen = list(self.everything if which is None else which)
        grads = {i: _local(g) for i in chosen if (g := self.params[i].grad) is not None}
        for i, g in grads.items():
            if g.is_sparse:
                grads[i] = g.coalesce().values()
                self._sparse[i] = 1 - grads[i].numel() / max(self.params[i].numel(), 1)
        norms = self._lengths(list(grads.values()))
        if scale is not None:
            norms = [n / scale for n in norms]
        self._asked |= set(chosen)
        column = self._norms.setdefault("grad", {})
        for i in chosen:
            column.pop(i, None)
        column |= dict(zip(grads, norms, strict=True))
        dense = {i: g for i, g in grads.items() if i not in self._sparse}
        flat = self._sample([dense.get(i) for i in self.everything])
        if scale is not None:
            flat = flat / scale
        self._grad = flat if self._grad is None or which is None else self._only(chosen, flat, self._grad)
        self._had = (self._had - set(chosen)) | set(dense)

    def moved(self, which: Collection[int] | None = None) -> None:
        """The weights after the step, and how far it was when :meth:`keep` was called before it."""
        chosen = list(self.everything if which is None else which)
        new = [_local(self.params[i]) for i in chosen]
        self._norms.setdefault("weight", {}).update(zip(chosen, self._lengths(new), strict=True))
        self._new = self._sample([_local(p) for p in self.params])
        if self._start is None:
            self._start = self._new
        kept = [i for i in chosen if i in self._copies]
        if not kept:
            return
        old = [self._copies.pop(i) for i in kept]
        self._norms.setdefault("old", {}).update(zip(kept, self._lengths(old), strict=True))
        flat = self._sample([dict(zip(kept, old, strict=True)).get(i) for i in self.everything])
        still = self._new if self._old is None else self._old
        self._old = flat if len(kept) == len(self.params) else self._only(kept, flat, still)
        torch._foreach_sub_(old, [_local(self.params[i]) for i in kept])
        self._norms.setdefault("move", {}).update(zip(kept, self._lengths(old), strict=True))

    def glance(self) -> float | None:
        """The sum of one small gradient, on a CPU: of the first layer that has one, which NaN reaches last."""
        for p in self._glanced:
            if p.grad is not None and not p.grad.is_sparse:
                g = p.grad
                return float((g if g.numel() <= MOST else g.reshape(-1)[:MOST]).sum().item())
        return None

    def turn(self) -> None:
        """Ask the gradient of the step after a sampled one for the slope along that step."""
        if self._move is None or self._slope is None:
            return
        grads = [None if p.grad is None or p.grad.is_sparse else _local(p.grad) for p in self.params]
        after = self._sums([self._sample(grads) * self._move])[:, 0]
        self._turned = [self._slope, after]
        self._move = self._slope = None

    def read(
        self, more: Sequence[Tensor] = (), half: Collection[str] = ()
    ) -> tuple[dict[str, Numbers], Numbers, list[Any]]:
        """The numbers of each layer, those of the model, and the values of ``more`` (scalars and vectors), by one
        transfer from the device. Layers at the paths ``half`` compute in float16.
        """
        sums = self._all_sums(half)
        norms = [(name, i, n) for name, column in self._norms.items() for i, n in column.items()]
        parts = [n for _, _, n in norms]
        if sums is not None:
            parts.append(sums)
        parts += self._turned
        values = iter(_transfer([*parts, *more], self._device, self._wide))
        lengths: dict[str, dict[int, float]] = {}
        for name, i, _ in norms:
            lengths.setdefault(name, {})[i] = next(values)
        table = None if sums is None else next(values)
        turned = [next(values) for _ in self._turned]
        numbers = {}
        i = 0
        for layer in self.layers:
            span = range(i, i + len(layer.params))
            i = span.stop
            part = numbers[layer.path] = self._layer(layer, span, lengths, table, turned)
            if table is not None:
                now, start = (sum(table[k][SUMS.index(name)] for k in span) for name in ("w", "start"))
                self.checks[layer.path] = part["weight_norm"] or 0.0, now, part["grad_norm"] or 0.0, start
        whole: Numbers = {"turn": _ratio(sum(turned[1]), sum(turned[0])) if turned else None, "coherence": None}
        if table is not None and self._last is not None:
            gg, gl, ll = (math.fsum(row[SUMS.index(name)] for row in table) for name in ("gg", "gl", "ll"))
            whole["coherence"] = _ratio(gl, math.sqrt(gg * ll)) if gg * ll >= 0 else None
        if sums is not None:
            self._last = self._grad
            if self._old is not None and self._new is not None:
                self._move, self._slope = self._new - self._old, sums[:, SUMS.index("gs")]
        self._turned = []
        self.clear()
        return numbers, whole, list(values)

    def state_dict(self) -> dict[str, Any]:
        """The kept samples as text, exact to the last bit."""
        kept = {"start": self._start, "last": self._last, "move": self._move, "slope": self._slope}
        kept |= {f"turned_{i}": t for i, t in enumerate(self._turned)}
        return {name: _packed(t) for name, t in kept.items() if t is not None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state``; samples of another model are left aside."""
        kept = {name: self._unpacked(text) for name, text in state.items()}
        lengths = dict.fromkeys(("start", "last", "move"), self._size)
        if any(len(t) != lengths.get(name, len(self.params)) for name, t in kept.items()):
            kept = {}
        self._start, self._last = kept.get("start"), kept.get("last")
        self._move, self._slope = kept.get("move"), kept.get("slope")
        self._turned = [kept[name] for name in ("turned_0", "turned_1") if name in kept]

    def _lengths(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Euclidean norms, one kernel for all; they stay on the device."""
        if not tensors:
            return []
        norms = list(torch._foreach_norm(list(tensors), 2, dtype=self._norm))
        if self._norm is None and self._device.type == "cpu":
            for i, value in enumerate(torch.stack([n.float() for n in norms]).tolist()):
                if value in (0.0, math.inf):  # squares may have left the range
                    norms[i] = torch.linalg.vector_norm(tensors[i], dtype=torch.float64)
        return norms

    def _sample(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """At most :data:`MOST` elements of each parameter, [elements]; zeros where there is no tensor."""
        if not self.params:
            return torch.zeros(0, dtype=self._wide, device=self._device)
        picked = []
        for p, k, t in zip(self.params, self._strides, tensors, strict=True):
            if t is None:
                picked.append(torch.zeros(-(-_local(p).numel() // k), dtype=p.dtype, device=self._device))
            else:
                picked.append(t.reshape(-1)[::k].to(self._device))
        return torch.cat(picked).to(self._wide)

    def _only(self, chosen: Collection[int], new: Tensor, old: Tensor) -> Tensor:
        mask = torch.zeros(len(self.params), dtype=torch.bool)
        mask[list(chosen)] = True
        return torch.where(mask.to(self._device)[self._owner], new, old)

    def _sums(self, rows: Sequence[Tensor]) -> Tensor:
        """Sums over each parameter's sample, [parameters, rows]."""
        values = torch.stack(list(rows), 1)
        out = torch.zeros(len(self.params), values.shape[1], dtype=values.dtype, device=values.device)
        return out.index_add_(0, self._owner, values)

    def _all_sums(self, half: Collection[str]) -> Tensor | None:
        """What :data:`SUMS` names, [parameters, sums]."""
        g, new = self._grad, self._new
        if g is None or new is None or not self.params:
            return None
        live = g != 0
        size = g.abs()
        tiny = live & (size < self._tiny)
        if half:
            # What float16 computed and no scaler magnified lies on its grid, of steps 2**-24 where it loses digits.
            small = live & (size < torch.finfo(torch.float16).smallest_normal) & ((g * 2.0**24) % 1 == 0)
            owners = [layer.path in half for layer in self.layers for _ in layer.params]
            tiny = torch.where(torch.tensor(owners, device=self._device)[self._owner], small, tiny)
        nothing = torch.zeros_like(g)
        step = nothing if self._old is None else new - self._old
        last = nothing if self._last is None else self._last
        away = nothing if self._start is None else new - self._start
        origin = nothing if self._start is None else self._start
        stuck = nothing if self._old is None else (live & (step == 0)).to(g.dtype)
        return self._sums(
            [
                *(torch.ones_like(g), (~live).to(g.dtype), tiny.to(g.dtype), live.to(g.dtype), stuck, g * g, g * last),
                *(last * last, away * away, origin * origin, g * step, new, origin),
            ]
        )

    def _layer(
        self,
        layer: Layer,
        span: range,
        lengths: dict[str, dict[int, float]],
        table: list[list[float]] | None,
        turned: list[list[float]],
    ) -> Numbers:
        """The numbers of one layer from those of its parameters."""
        joint = {name: _joint([column[i] for i in span if i in column]) for name, column in lengths.items()}
        old, move = joint.get("old"), joint.get("move")
        out: Numbers = {
            "grad_norm": joint.get("grad"),
            "weight_norm": joint.get("weight"),
            "update_ratio": move / old if move is not None and old else None,
        }
        if table is not None:
            dense = [i for i in span if i in self._had]
            of = {name: sum(table[i][k] for i in dense) for k, name in enumerate(SUMS)}
            absent = [(self._sparse[i], self.params[i].numel()) for i in span if i in self._sparse]
            count = sum(self.params[i].numel() for i in dense)
            zero = [(of["zero"] / of["size"], count)] if of["size"] else []
            weights = sum(n for _, n in zero + absent)
            out["grad_zero"] = sum(f * n for f, n in zero + absent) / weights if weights else None
            out["grad_tiny"] = _ratio(of["tiny"], of["size"])
            out["stuck"] = _ratio(of["stuck"], of["live"]) if self._old is not None else None
            angle = self._last is not None and of["live"] >= min(FEW, of["size"])
            out["coherence"] = _ratio(of["gl"], math.sqrt(of["gg"] * of["ll"])) if angle else None
            far = [sum(table[i][SUMS.index(name)] for i in span) for name in ("dd", "ww")]
            out["moved"] = math.sqrt(far[0] / far[1]) if far[0] >= 0 and far[1] > 0 else None
        if asked := [i for i in span if i in self._asked]:
            names = {id(p): name for name, p in layer.module.named_parameters(recurse=False)}
            norms = lengths.get("grad", {})
            out["without"] = [names.get(id(self.params[i]), "") for i in asked if not norms.get(i)]
        out["turn"] = _ratio(sum(turned[1][i] for i in span), sum(turned[0][i] for i in span)) if turned else None
        return out

    def _unpacked(self, text: str) -> Tensor:
        data = bytearray(base64.b64decode(text))
        return torch.frombuffer(data, dtype=torch.float64).to(self._device, self._wide, copy=True)


def _local(t: Tensor) -> Tensor:
    """The part of a sharded tensor that lies in this process; any other tensor itself."""
    t = t.detach()
    to_local = getattr(t, "to_local", None)
    return t if to_local is None else to_local()


def _stride(p: Tensor) -> int:
    """Between elements of the sample: not a multiple of a row's length, which would pick one column only."""
    t = _local(p)
    k = -(-t.numel() // MOST) or 1
    row = t.shape[-1] if t.dim() > 1 else 1
    while k > 1 and math.gcd(k, row) > 1:
        k += 1
    return k


def _joint(norms: Sequence[float]) -> float | None:
    """The norm of the parts together."""
    return sum(n * n for n in norms) ** 0.5 if norms else None


def _ratio(a: float, b: float) -> float | None:
    return a / b if b and math.isfinite(a) and math.isfinite(b) else None


def _packed(t: Tensor) -> str:
    return base64.b64encode(t.to("cpu", torch.float64).numpy().tobytes()).decode()


def _transfer(tensors: Sequence[Tensor], device: torch.device, dtype: torch.dtype) -> list[Any]:
    """Tensors as numbers and nested lists, read from the device together."""
    if not tensors:
        return []
    kinds: dict[tuple[torch.dtype, torch.device], list[int]] = {}
    for k, t in enumerate(tensors):
        kinds.setdefault((t.dtype, t.device), []).append(k)
    order = [k for ks in kinds.values() for k in ks]
    parts = [torch.cat([tensors[k].detach().reshape(-1) for k in ks]).to(device, dtype) for ks in kinds.values()]
    flat = torch.cat(parts).tolist()
    out: list[Any] = [None] * len(tensors)
    i = 0
    for k in order:
        t = tensors[k]
        part = flat[i : i + t.numel()]
        i += t.numel()
        if t.dim() == 0:
            out[k] = part[0]
        elif t.dim() == 2:
            out[k] = [part[r * t.shape[1] : (r + 1) * t.shape[1]] for r in range(t.shape[0])]
        else:
            out[k] = part
    return out
