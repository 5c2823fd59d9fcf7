"""What is written down about a model at a sampled step, and what the model is made of: all that rules may read.

A record holds numbers by layer; a layer is a module that holds trainable parameters of its own. The anatomy says
what the modules are, so that a rule can tell a normalisation from a head without the model at hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

__all__ = ["Anatomy", "Layer", "Record", "Stats", "anatomy", "find_layers", "unwrapped"]

Record = dict[str, Any]
Anatomy = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Layer:
    """A module with trainable parameters of its own; a parameter that several share belongs to the first."""

    path: str
    module: nn.Module
    params: tuple[nn.Parameter, ...]


@dataclass
class Stats:
    """The records of a run, oldest first: what the rules read.

    A record is ``{"step": int, "loss": float | None, "lr": float | None, "rows": int | None, "layers": {path:
    {key: number}}, "branches": {path: {key: number}}, "times": {path: {key: list}}, "ties": {parameter: {use:
    number}}}``; what was not measured is None or absent. Layers come in the order of the model's modules. Of each:

    - ``grad_norm``, ``weight_norm``: Euclidean norms over its trainable parameters, after the step.
    - ``update_ratio``: |w_new - w_old| / |w_old| of the one step.
    - ``grad_zero``, ``grad_tiny``: fraction of elements of the gradient that are exactly zero; that are not, but lie
      below the smallest normal number of its dtype (of float16, when that is what autocast computed it in).
    - ``stuck``: fraction of the elements with a gradient that is not zero whose weight did not change.
    - ``turn``: (g_new . s) / (g_old . s) along the last step s that was sampled and has been followed by another.
      With the same data: 1 where the loss is straight, 0 where the step led to the minimum along it, -1 at the
      largest stable step, below that the steps grow.
    - ``coherence``: cosine between this gradient and that of the sample before.
    - ``moved``: |w - w_start| / |w_start|.
    - ``lr``: the learning rate with which an optimiser has just stepped it; None when no optimiser did.
    - ``without``: names of its own parameters that have no gradient, or one of zeros only.
    - what sensors heard: ``dead``, ``saturated``, ``in_rms``, ``out_rms``, ``out_grad_rms``, ``spread``,
      ``entropy``, ``twins`` and more, by path of a module, or ``path.relu`` for a function that it calls.

    A record also has ``turn`` and ``coherence`` over all layers, ``autocast`` (a dtype's name or None), ``skipped``
    (whether the guard left the step out) and ``origin`` (where a loss or gradient that was not finite came from, see
    :mod:`hesse.health.origin`, or None).

    Attributes:
        records: the samples; the older ones of a long run are thinned.
        anatomy: see :func:`anatomy`.
        told: ``[step, loss]`` of every step whose loss is known, also between samples; the older ones of a long run
            are thinned.
    """

    records: list[Record] = field(default_factory=list)
    anatomy: Anatomy = field(default_factory=dict)
    told: list[list[float]] = field(default_factory=list)

    def series(self, path: str, key: str) -> list[float]:
        """One number of one layer over time, where it was measured."""
        values = (record["layers"].get(path, {}).get(key) for record in self.records)
        return [value for value in values if value is not None]

    @property
    def losses(self) -> list[float]:
        """The recorded losses, oldest first."""
        return [record["loss"] for record in self.records if record["loss"] is not None]


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside ``torch.compile``, DistributedDataParallel or DataParallel; any other model itself.

    Example:
        >>> inner = nn.Linear(1, 1)
        >>> unwrapped(nn.DataParallel(inner)) is unwrapped(inner) is inner
        True
    """
    while True:
        if isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        elif isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        else:
            return model


def find_layers(model: nn.Module) -> list[Layer]:
    """The layers of a model, in the order of its modules; the model itself goes by its class's name.

    Parameters whose shape a lazy module does not know yet are left out.

    Example:
        >>> [layer.path for layer in find_layers(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1)))]
        ['0', '2']
    """
    model = unwrapped(model)
    seen: set[int] = set()
    layers = []
    for path, module in model.named_modules():
        own = [p for p in module.parameters(recurse=False) if p.requires_grad and id(p) not in seen and not is_lazy(p)]
        seen |= {id(p) for p in own}
        if own:
            layers.append(Layer(path or type(model).__name__, module, tuple(own)))
    return layers


def anatomy(model: nn.Module) -> Anatomy:
    """What a model is made of, as a JSON object with an entry for each module.

    ``{path: {"type": name of the class, "index": place among the modules, "params": {name: {"shape": [...], "dtype":
    str, "trainable": bool}}, "tied": [other paths that hold one of its parameters]}}``. The model itself goes by its
    class's name; shapes that a lazy module does not know yet are None.

    Example:
        >>> anatomy(nn.Sequential(nn.Linear(2, 3, bias=False)))["0"]
        {'type': 'Linear', 'index': 1, 'params': {'weight': {'shape': [3, 2], 'dtype': 'float32', 'trainable': True}}, 'tied': []}
    """  # noqa: E501
    model = unwrapped(model)
    owners: dict[int, list[str]] = {}
    modules = [(path or type(model).__name__, module) for path, module in model.named_modules()]
    for path, module in modules:
        for p in module.parameters(recurse=False):
            owners.setdefault(id(p), []).append(path)
    parts: Anatomy = {}
    for index, (path, module) in enumerate(modules):
        own = dict(module.named_parameters(recurse=False))
        parts[path] = {
            "type": type(module).__name__,
            "index": index,
            "params": {name: _described(p) for name, p in own.items()},
            "tied": list(dict.fromkeys(other for p in own.values() for other in owners[id(p)] if other != path)),
        }
    return parts


def _described(p: Tensor) -> dict[str, Any]:
    return {
        "shape": None if is_lazy(p) else list(p.shape),
        "dtype": str(p.dtype).removeprefix("torch."),
        "trainable": p.requires_grad,
    }


def same_parameters(layers: Sequence[Layer], others: Sequence[Layer]) -> bool:
    """Whether two lists name the same tensors at the same places."""
    return [(layer.path, *map(id, layer.params)) for layer in layers] == [
        (layer.path, *map(id, layer.params)) for layer in others
    ]
