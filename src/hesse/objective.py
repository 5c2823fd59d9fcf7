"""What is minimised: the loss of a model on one batch, as a closure and as a pure function of the parameters.

``closure(model, loss_fn, batch)`` gives one object with two faces. Called, it is what any torch optimiser expects: it
zeroes the gradients, runs forward and backward and returns the loss, so SGD, Adam and LBFGS run on it unchanged. Its
``.objective`` is the same loss as a function of named parameters without side effects, which is what curvature,
trial steps and gradient checks need.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from hesse.tree import Params

__all__ = ["Closure", "Objective", "closure"]

LossFn = Callable[[Any, Any], Tensor]


class Objective:
    """Loss of ``model`` on one batch as a pure function of its trainable parameters.

    Pure means three things. The model's own parameters and buffers are left alone (BatchNorm's running statistics
    are written into copies). Random layers draw the same numbers at every evaluation, because the state of the random
    generators is remembered at the first and put back for each later one; the generators themselves move on only
    at the first. And evaluating twice gives the same value, unless the model keeps state elsewhere.

    Args:
        model: a module. Its mode (train or eval) is used as it stands.
        loss_fn: ``loss_fn(outputs, targets)``, a scalar tensor.
        inputs: a tensor, a tuple (``model(*inputs)``) or a mapping (``model(**inputs)``).
        targets: whatever ``loss_fn`` takes.
    """

    def __init__(self, model: nn.Module, loss_fn: LossFn, inputs: Any, targets: Any) -> None:
        self.model = model
        self.loss_fn = loss_fn
        self.inputs = inputs
        self.targets = targets
        self._random: list[tuple[torch.device, Tensor]] | None = None

    @property
    def params(self) -> Params:
        """The trainable parameters by name: the live tensors, not copies. Tied ones appear once."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def __call__(self, params: Mapping[str, Tensor]) -> Tensor:
        """The loss at ``params``, a scalar."""
        return self.loss_fn(self.outputs(params), self.targets)

    def outputs(self, params: Mapping[str, Tensor]) -> Any:
        """The model's outputs at ``params``."""
        buffers = {name: b.clone() for name, b in self.model.named_buffers()}
        args, kwargs = self._arguments()
        with self._same_random_numbers():
            return functional_call(self.model, {**buffers, **params}, args, kwargs)

    def forward(self) -> Any:
        """The outputs of the live model: buffers move and hooks see its own parameters, as in plain training."""
        args, kwargs = self._arguments()
        with self._same_random_numbers():
            return self.model(*args, **kwargs)

    def _arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if isinstance(self.inputs, Mapping):
            return (), dict(self.inputs)
        if isinstance(self.inputs, tuple | list):
            return tuple(self.inputs), {}
        return (self.inputs,), {}

    @contextmanager
    def _same_random_numbers(self) -> Iterator[None]:
        if self._random is None:
            self._random = _generator_states(self.model)
            yield
            return
        current = _generator_states(self.model)
        _set_generator_states(self._random)
        try:
            yield
        finally:
            _set_generator_states(current)


class Closure:
    """What :func:`closure` returns: a torch closure that carries its :class:`Objective`."""

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        self.outputs: Any = None

    @property
    def model(self) -> nn.Module:
        return self.objective.model

    @property
    def loss_fn(self) -> LossFn:
        return self.objective.loss_fn

    def __call__(self) -> Tensor:
        """Zero the gradients, run forward and backward, return the loss, a detached scalar."""
        with torch.enable_grad():
            self.model.zero_grad(set_to_none=True)
            self.outputs = self.objective.forward()
            loss = self.loss_fn(self.outputs, self.objective.targets)
            loss.backward()
        return loss.detach()


def closure(model: nn.Module, loss_fn: LossFn, batch: tuple[Any, Any]) -> Closure:
    """The loss of ``model`` on ``batch``, for any optimiser's ``step``.

    Args:
        model: a module.
        loss_fn: ``loss_fn(outputs, targets)``, a scalar tensor, for instance ``torch.nn.functional.cross_entropy``.
        batch: ``(inputs, targets)``, as a ``DataLoader`` yields it; inputs are a tensor, a tuple (``model(*inputs)``)
            or a dict (``model(**inputs)``).

    Returns:
        A callable that zeroes the gradients, runs forward and backward and returns the loss; ``.objective`` is the pure
        function of the parameters, ``.outputs`` the outputs of the last call.

    Raises:
        TypeError: the batch is not a pair, or the loss is not a callable.

    Example:
        One object, any optimiser. The loss mean((w - 2)^2) is least at w = 2, and 4 at w = 0:

        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> batch = torch.ones(4, 1), torch.full((4, 1), 2.0)
        >>> step = closure(model, torch.nn.functional.mse_loss, batch)
        >>> _ = torch.optim.LBFGS(model.parameters()).step(step)
        >>> round(model.weight.item(), 4)
        2.0
        >>> step.objective({"weight": torch.zeros(1, 1)}).item()
        4.0
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"closure() takes the module itself first; got {type(model).__name__}.")
    if not callable(loss_fn):
        raise TypeError(f"loss_fn must be callable as loss_fn(outputs, targets); got {type(loss_fn).__name__}.")
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        size = f" of length {len(batch)}" if isinstance(batch, tuple | list) else ""
        raise TypeError(
            f"batch must be a pair (inputs, targets), as a DataLoader yields it; got {type(batch).__name__}{size}. "
            "Several inputs go in one tuple or dict: ((image, sound), targets)."
        )
    inputs, targets = batch
    return Closure(Objective(model, loss_fn, inputs, targets))


def _generator_states(model: nn.Module) -> list[tuple[torch.device, Tensor]]:
    """State of every generator that layers of ``model`` can draw from: the CPU's, and those of its devices."""
    devices = {p.device for p in model.parameters() if p.device.type in ("cuda", "xpu", "mps")}
    states = [(torch.device("cpu"), torch.get_rng_state())]
    states += [(d, getattr(torch, d.type).get_rng_state(*_index(d))) for d in sorted(devices, key=str)]
    return states


def _set_generator_states(states: list[tuple[torch.device, Tensor]]) -> None:
    for device, state in states:
        if device.type == "cpu":
            torch.set_rng_state(state)
        else:
            getattr(torch, device.type).set_rng_state(state, *_index(device))


def _index(device: torch.device) -> tuple[torch.device, ...]:
    return () if device.type == "mps" else (device,)
