"""What passes through layers and activations: how large it is, how alive, how far into the flat parts.

A ReLU whose inputs are all negative and a tanh whose inputs are all large have the same fault, a slope of zero. Units
that are silent for whole batches are counted from sample to sample (one batch tells little); saturation is the share
of elements where the slope is less than a hundredth of the largest. Beside them the sizes that initialisation theory
speaks of (LeCun 1998, Glorot 2010, He 2015): rms of a layer's inputs, outputs and of the gradient at its outputs, and
how much the outputs differ between the rows of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import ceil
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hesse.health.sensors.functional import Call, Calls
from hesse.health.sensors.protocol import Reading, Section
from hesse.health.sensors.samples import Samples, plain, positions, rms, strided
from hesse.health.stats import Layer

__all__ = ["PATIENCE", "Activations", "saturated", "silent_units"]

PATIENCE = 5  # samples in a row for which a dead unit was silent
EXAMPLES = 64  # and at least so many rows: five batches of one row tell little
FLAT = 0.01  # of the largest slope

RAMPS = {"relu", "relu6", "threshold", "clamp", "clamp_min"}  # exactly zero on one side
GATES = {"gelu", "silu", "mish", "hardswish"}  # x times a gate that closes
FLOORS = {"elu": -1.0, "celu": -1.0, "selu": -1.7580993408473766}  # the value on the flat side
SIGMOIDS = {"sigmoid", "special_expit", "tanh", "softsign", "hardtanh", "hardsigmoid"}
SHARES = {"softmax", "log_softmax"}

ROWS = (nn.Linear, nn.modules.conv._ConvNd)  # a row of the weight, a unit
CHANNELS_FIRST = (nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.GroupNorm)
CHANNELS_LAST = (nn.Linear, nn.Bilinear, nn.LayerNorm, nn.RMSNorm, nn.Embedding, nn.RNNBase, nn.MultiheadAttention)
RECURRENT = (nn.RNNBase, nn.RNNCellBase)


class Activations:
    """Keys of layers: ``in_rms``, ``out_rms``, ``out_grad_rms``, ``spread``, ``order``, ``dtype``; of activations:
    ``dead``, ``saturated``, ``peaked``, ``order``.

    ``spread`` is the standard deviation over the first axis divided by the rms: 0 when all rows are the same.
    ``peaked`` is the share of a softmax's rows that are at their ends.
    An activation that is used at several places, or after several layers, is measured at each: ``relu``, ``relu#2``.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Tanh())
        >>> _ = net[0].weight.data.fill_(0), net[0].bias.data.copy_(torch.tensor([-1.0, 9.0]))
        >>> calls = Calls(net)
        >>> sensor = Activations(net, [], calls)
        >>> for _ in range(5):
        ...     calls.listen()
        ...     _ = net(torch.randn(64, 2))
        ...     calls.rest()
        ...     reading = sensor.read()
        >>> reading["1"]["dead"].item(), reading["2"]["saturated"].item(), reading["0"]["spread"].item()
        (0.5, 0.5, 0.0)
    """

    section: ClassVar[Section] = "layers"

    def __init__(self, model: nn.Module, layers: Sequence[Layer], calls: Calls) -> None:
        self.calls = calls
        self.layers = layers
        self._modules = dict(model.named_modules())
        self._samples = Samples()
        self._names: dict[str, dict[str, float | str | None]] = {}
        self._silent: dict[str, tuple[Tensor, int]] = {}  # in this pass: units that were silent, rows
        self._counts: dict[str, tuple[Tensor, int]] = {}  # samples in a row, of each unit; how many make it dead
        self._activated = False
        calls.on_modules(self._layer, _has_parameters)
        calls.on_modules(self._recurrent, lambda module: isinstance(module, RECURRENT))
        calls.on_functions(RAMPS | GATES | FLOORS.keys() | SIGMOIDS | SHARES, self._activation)

    def listen(self) -> None:
        self._samples, self._names, self._silent = Samples(), {}, {}

    def rest(self) -> None:
        for layer in self.layers:
            if layer.path in self.calls.order:
                self._names.setdefault(layer.path, {})["order"] = self.calls.order[layer.path]

    def read(self) -> Reading:
        if self._activated:
            for layer in self.layers:
                if isinstance(layer.module, ROWS):
                    self._counts.pop(layer.path, None)
        else:
            self._silent = self._without_gradient()
        for key, (silent, rows) in self._silent.items():
            count = self._counts[key][0] if key in self._counts else None
            if count is None or count.shape != silent.shape:
                count = torch.zeros(silent.shape, dtype=torch.int32, device=silent.device)
            count = torch.where(silent, count.to(silent.device) + 1, 0)
            self._counts[key] = count, max(PATIENCE, ceil(EXAMPLES / rows))
        reading: Reading = {path: dict(names) for path, names in self._names.items()}
        for path, numbers in self._samples.read().items():
            reading.setdefault(path, {}).update(numbers)
        for key, (count, needed) in self._counts.items():
            reading.setdefault(key, {})["dead"] = (count >= needed).float().mean()
        self.listen()
        return reading

    def state_dict(self) -> dict[str, Any]:
        return {key: {"samples": count.tolist(), "needed": needed} for key, (count, needed) in self._counts.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._counts = {
            key: (torch.tensor(kept["samples"], dtype=torch.int32), kept["needed"]) for key, kept in state.items()
        }

    def _layer(self, call: Call) -> None:
        y = plain(call.output)
        if y is None or not self._samples.turn("layer", call.path):
            return
        self._names[call.path] = {"order": self.calls.order.get(call.path), "dtype": str(y.dtype)}
        x = plain((call.args, call.kwargs))
        if x is not None:
            self._samples.add(call.path, "in_rms", rms(x))
        size, spread = _size_and_spread(y)
        self._samples.add(call.path, "out_rms", size)
        if spread is not None:
            self._samples.add(call.path, "spread", spread)
        if y.grad_fn is not None:  # a module may return its parameter, which would keep the hook for ever
            y.register_hook(self._gradient(call.path))

    def _gradient(self, path: str) -> Callable[[Tensor], None]:
        samples = self._samples  # of this pass: a late backward must not write into the next one
        heard = False

        def hear(grad: Tensor) -> None:
            nonlocal heard
            if heard or self.calls.listening or torch._C._functorch.is_functorch_wrapped_tensor(grad):
                return  # only the loss's own gradient, which comes first; not products with the Hessian
            heard = True
            g = plain(grad)
            if g is not None:
                with torch.no_grad():
                    samples.add(path, "out_grad_rms", rms(g))

        return hear

    def _recurrent(self, call: Call) -> None:
        y = plain(call.output)
        if y is None:
            return
        relu = getattr(call.module, "nonlinearity", "tanh") == "relu"
        self._measure(call, call.path, y, "relu" if relu else "tanh", y)

    def _activation(self, call: Call) -> None:
        x, y = plain(call.args), plain(call.output)
        if x is None or y is None or (call.name.startswith("clamp") and not _is_ramp(call)):
            return
        key = self.calls.key("activation", call.path, (call.chain[-1], call.after))
        self.calls.anatomy[key] = {"type": call.name, "after": call.after}
        self._measure(call, key, y, call.name, x)

    def _measure(self, call: Call, key: str, y: Tensor, name: str, x: Tensor) -> None:
        if not self._samples.turn("activation", key):
            return
        self._names.setdefault(key, {}).setdefault("order", self.calls.count)
        low, high = -1.0, 1.0
        if name == "hardtanh":
            low, high = float(call.argument(1, "min_val", low)), float(call.argument(2, "max_val", high))
            name = "relu" if low == 0 else name  # nn.ReLU6
        if name in SIGMOIDS:
            self._activated = True
            self._samples.add(key, "saturated", saturated(strided(y), name, low, high).float().mean())
        elif name in SHARES:
            dim = call.argument(1, "dim")
            if dim is not None:
                self._samples.add(key, "peaked", _peaked(y, dim, name == "log_softmax"))
        else:
            self._activated = True
            axis = self._unit_axis(call, y)
            silent = silent_units(y, axis, name, x)
            if silent is not None:
                rows = y.shape[0] if axis == 1 else y.numel() // y.shape[-1]
                known = self._silent.get(key)
                if known is not None and known[0].shape == silent.shape:  # silent in every turn of a loop
                    silent = silent & known[0]
                self._silent[key] = silent, rows

    def _unit_axis(self, call: Call, y: Tensor) -> int:
        """Where the units are: told by the layer that made the tensor, else the channels of images and volumes."""
        maker = self._modules.get(call.after or "")
        if isinstance(maker, CHANNELS_LAST):
            return y.dim() - 1
        if isinstance(maker, CHANNELS_FIRST) and y.dim() > 2:
            return 1
        return 1 if y.dim() > 3 else y.dim() - 1

    def _without_gradient(self) -> dict[str, tuple[Tensor, int]]:
        """In a network whose activations cannot be seen: units without any gradient in a layer that has some.

        Not in the last layer, whose units are outputs: a loss may leave some out.
        """
        silent = {}
        for layer in self.layers[:-1]:
            grads = [g.detach() for p in layer.params if (g := plain(p.grad)) is not None]
            if grads and isinstance(layer.module, ROWS):
                rows = torch.cat([g.reshape(g.shape[0], -1) for g in grads if g.shape[0] == grads[0].shape[0]], 1)
                zero = (rows == 0).all(1)
                silent[layer.path] = zero & ~zero.all(), EXAMPLES
        return silent


def saturated(y: Tensor, name: str, low: float = -1.0, high: float = 1.0) -> Tensor:
    """Where the outputs ``y`` [...] of a sigmoid-like function lie in its flat parts, boolean [...].

    Flat is a slope below a hundredth of the largest, written by the output: sigmoid y (1 - y), tanh 1 - y^2,
    softsign (1 - |y|)^2, hardtanh zero at ``low`` and ``high``, hardsigmoid zero at 0 and 1.

    Example:
        >>> saturated(torch.tensor([0.0, 2.0, 4.0]).tanh(), "tanh")
        tensor([False, False,  True])
    """
    if name == "tanh":
        return 1 - y.square() < FLAT
    if name == "softsign":
        return (1 - y.abs()).square() < FLAT
    if name == "hardtanh":
        return (y <= low) | (y >= high)
    if name == "hardsigmoid":
        return (y <= 0) | (y >= 1)
    return y * (1 - y) < FLAT / 4


def silent_units(y: Tensor, axis: int, name: str = "relu", x: Tensor | None = None) -> Tensor | None:
    """Units of an activation that are flat for the whole batch, boolean of shape [units].

    A ramp (relu) is flat where it gives zero; a gate (gelu, silu) where it lets less than a thousandth of its input
    through; elu and its kin where they are within a hundredth of their floor.

    Args:
        y: its outputs [...].
        axis: of the units.
        name: of the function.
        x: its inputs [...], which gates are compared with.

    Example:
        >>> x = torch.tensor([[-9.0, -1.0], [-8.0, 3.0]])
        >>> silent_units(x.relu(), 1), silent_units(nn.functional.gelu(x), 1, "gelu", x)
        (tensor([ True, False]), tensor([ True, False]))
    """
    if y.dim() < 2 or not y.numel():
        return None
    y = positions(y, axis)
    others = [d for d in range(y.dim()) if d != axis]
    if name in FLOORS:
        return y.amax(others) <= (1 - FLAT) * FLOORS[name]
    if name in GATES and x is not None and x.shape[axis] == y.shape[axis]:
        return y.abs().amax(others) <= 1e-3 * positions(x, axis).abs().amax(others)
    return y.amax(others) <= 0


def _size_and_spread(y: Tensor) -> tuple[Tensor, Tensor | None]:
    """Rms of a sample of ``y`` [rows, ...], and the deviation over the rows in units of it."""
    if y.dim() < 2 or y.shape[0] < 2:
        return rms(y), None
    y = y.detach()
    part = positions(y[:: -(-y.shape[0] // 256)], 0, 256).flatten(1)
    part = part if part.dtype == torch.float64 else part.float()
    size = torch.linalg.vector_norm(part)
    spread = torch.linalg.vector_norm(part - part.mean(0)) / size.clamp_min(torch.finfo(size.dtype).tiny)
    return size / part.numel() ** 0.5, spread


def _peaked(y: Tensor, dim: int, log: bool) -> Tensor:
    """Share of the rows of a softmax whose largest entry is so near 1 that the slope is below a hundredth."""
    top = positions(y, dim % y.dim()).amax(dim).float()
    p = top.exp() if log else top
    return (p * (1 - p) < FLAT / 4).float().mean()


def _is_ramp(call: Call) -> bool:
    """Whether a clamp is a ReLU: at zero, from below only, of what a layer has just made."""
    low = call.argument(1, "min")
    return call.direct and isinstance(low, (int, float)) and low == 0 and call.argument(2, "max") is None


def _has_parameters(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters(recurse=False))
