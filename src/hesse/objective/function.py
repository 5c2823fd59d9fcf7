"""The loss of a model on one batch as a pure function of its parameters.

A model's forward pass is full of side effects and of kernels that were written to be differentiated once. Here they
are dealt with in one place, so that gradients, products, trial steps and checks all mean the same function.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree  # walks whatever containers a model takes, PackedSequence and all

from hesse.objective import kernels, purity
from hesse.objective.replicas import Replicas, inner
from hesse.tree import Params

__all__ = ["LossFn", "Objective", "objective"]

LossFn = Callable[[Any, Any], Tensor]


class Objective:
    """Loss of ``model`` on one batch as a pure function of its trainable parameters.

    Pure means three things. The model's own parameters and buffers are left alone (BatchNorm's running statistics
    are written into copies). Random layers draw the same numbers at every evaluation, because the state of the random
    generators is remembered at the first and put back for each later one; the generators themselves move on only
    at the first. And evaluating twice gives the same value, unless the model keeps state elsewhere.

    Whatever is evaluated here can be differentiated twice: attention and ``weight_norm`` run on plain operations
    (see :mod:`hesse.objective.kernels`).

    Of a model in ``DistributedDataParallel`` it is the loss of the module inside, on this process's part of the batch:
    nothing is sent, except that :meth:`forward` goes through DDP, whose hooks then average the gradients.

    Args:
        model: a module. Its mode (train or eval) is used as it stands.
        loss_fn: ``loss_fn(outputs, targets)``, a scalar tensor.
        inputs: a tensor, a tuple (``model(*inputs)``) or a mapping (``model(**inputs)``).
        targets: whatever ``loss_fn`` takes.
        dtype: evaluate in this precision: parameters, buffers, inputs and targets are converted, the model is not.
    """

    def __init__(
        self, model: nn.Module, loss_fn: LossFn, inputs: Any, targets: Any, dtype: torch.dtype | None = None
    ) -> None:
        self.given = model
        self.model = inner(model)
        self.replicas = Replicas(model)
        self.loss_fn = loss_fn
        self.inputs = _cast(inputs, dtype)
        self.targets = _cast(targets, dtype)
        self.dtype = dtype
        self._random: purity.RandomState | None = None
        self._plain = kernels.plain_for(self.model)

    def cast(self, dtype: torch.dtype) -> Objective:
        """The same function evaluated in another precision, with the same random numbers."""
        other = Objective(self.given, self.loss_fn, self.inputs, self.targets, dtype)
        other._random = self._random
        return other

    @property
    def params(self) -> Params:
        """The trainable parameters by name: the live tensors, or copies in another ``dtype``. Tied ones appear once."""
        live: Params = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        if self.dtype is None:
            return live
        return {name: p.detach().to(self.dtype, copy=True).requires_grad_() for name, p in live.items()}

    def __call__(self, params: Mapping[str, Tensor]) -> Tensor:
        """The loss at ``params``, a scalar."""
        with self.at(params):
            return self.loss_fn(self.run_model(), self.targets)

    def outputs(self, params: Mapping[str, Tensor]) -> Any:
        """The model's outputs at ``params``."""
        with self.at(params):
            return self.run_model()

    def forward(self, plain: bool = False) -> Any:
        """The outputs of the live model: buffers move and hooks see its own parameters, as in plain training.

        With ``plain`` on the kernels that every other evaluation uses, so that the two differ by no rounding, and past
        DDP, which would wait for a ``backward()``.
        """
        with self._plain() if plain else nullcontext(), self._same_random_numbers():
            return self._call(self.model if plain else self.given)

    @contextmanager
    def at(self, params: Mapping[str, Tensor]) -> Iterator[None]:
        """The model carries ``params``, copies of its buffers and the remembered random numbers while this is open.

        A backward pass that may run parts of the model again (activation checkpointing) belongs inside too: outside, it
        would recompute with the model's own parameters.
        """
        with ExitStack() as stack:
            stack.enter_context(purity.carrying(self.model, params, self.dtype))
            stack.enter_context(self._plain())
            stack.enter_context(self._same_random_numbers())
            yield

    def run_model(self) -> Any:
        """The model on the inputs as everything stands, for use inside :meth:`at`."""
        return self._call(self.model)

    def _call(self, model: nn.Module) -> Any:
        if isinstance(self.inputs, Mapping):
            return model(**self.inputs)
        if isinstance(self.inputs, tuple | list):
            return model(*self.inputs)
        return model(self.inputs)

    @contextmanager
    def _same_random_numbers(self) -> Iterator[None]:
        if self._random is None:
            self._random = purity.random_state(self.model)
            yield
            return
        current = purity.random_state(self.model)
        purity.set_random_state(self._random)
        try:
            yield
        finally:
            purity.set_random_state(current)


def objective(model: nn.Module, loss_fn: LossFn, batch: tuple[Any, Any]) -> Objective:
    """The :class:`Objective` of ``model`` on ``batch``, a pair ``(inputs, targets)`` as a ``DataLoader`` yields it.

    Raises:
        TypeError: the model is no module, the batch not a pair, or the loss not a callable.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"the model comes first and is a torch.nn.Module; got {type(model).__name__}.")
    if not callable(loss_fn):
        raise TypeError(f"loss_fn must be callable as loss_fn(outputs, targets); got {type(loss_fn).__name__}.")
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        size = f" of length {len(batch)}" if isinstance(batch, tuple | list) else ""
        raise TypeError(
            f"batch must be a pair (inputs, targets), as a DataLoader yields it; got {type(batch).__name__}{size}. "
            "Several inputs go in one tuple or dict: ((image, sound), targets)."
        )
    inputs, targets = batch
    return Objective(model, loss_fn, inputs, targets)


def _cast(values: Any, dtype: torch.dtype | None) -> Any:
    if dtype is None:
        return values
    return pytree.tree_map_only(Tensor, lambda x: x.to(dtype) if x.is_floating_point() else x, values)
