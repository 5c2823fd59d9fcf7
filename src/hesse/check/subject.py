"""What is checked: a loss as a function of live tensors that can be moved in place, and are put back bit
for bit.

A module, a function of tensors and a :func:`hesse.closure` become the same thing here. Evaluations leave no
trace: buffers are put back and the random generators rewound after each, so that BatchNorm and dropout are
functions too.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from hesse.check.calls import RandomState, Recorder, cuda_devices, gradients_of
from hesse.check.differences import own_scales
from hesse.finding import InputError
from hesse.objective import Closure

__all__ = ["Subject"]

AWAY = 0.05  # how far from the point, in each tensor's own unit, :meth:`Subject.moved` goes
LOSS = "loss_fn()"


class Subject:
    """A loss and the tensors it is differentiated by.

    Args:
        model_or_fn, inputs: as in :func:`hesse.check.gradients`.
        seed: of random directions and of the weights that sum an output that is no scalar.
    """

    def __init__(self, model_or_fn: Any, inputs: Any, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.loss_fn: Callable[[Any], Any] | None = None
        self.model: nn.Module | None = None
        if isinstance(model_or_fn, Closure):
            objective = model_or_fn.objective
            self.model, inputs = objective.model, objective.inputs
            self.loss_fn = lambda outputs: objective.loss_fn(outputs, objective.targets)
        elif isinstance(model_or_fn, nn.Module):
            self.model = model_or_fn
        elif not callable(model_or_fn):
            raise TypeError(f"gradients() takes a module, a function or a closure; got {type(model_or_fn)}.")
        self.call: Callable[..., Any] = model_or_fn
        self.name = getattr(model_or_fn, "__name__", "the function")
        self.tensors: dict[str, Tensor] = {}
        self.buffers: list[tuple[nn.Module, str, Tensor, Tensor]] = []
        if self.model is not None:
            self.call, self.name = self.model, type(self.model).__name__
            self.tensors = {n: p for n, p in self.model.named_parameters() if p.requires_grad and p.numel()}
            for module in self.model.modules():
                self.buffers += [(module, n, b, b.clone()) for n, b in module.named_buffers(recurse=False)]
        self.args, self.kwargs = self._take(inputs)
        if not self.tensors:
            raise InputError(
                "nothing to check",
                self.name,
                "No floating tensor requires a gradient.",
                "Give a model with trainable parameters, or floating inputs to a function.",
            )
        self.weights: Tensor | None = None
        self.random = RandomState(cuda_devices([*self.tensors.values(), *(b for _, _, b, _ in self.buffers)]))
        dtypes = {t.dtype for t in self.tensors.values()}
        dtypes |= {torch.get_autocast_dtype(d) for d in ("cpu", "cuda") if torch.is_autocast_enabled(d)}
        self.eps = max(torch.finfo(dtype).eps for dtype in dtypes)

    @property
    def summed(self) -> bool:
        return self.weights is not None and self.weights.numel() > 1

    def value(self) -> Tensor:
        """The loss, float64 of shape [1]; leaves buffers and random generators alone.

        Evaluated as in training, with autograd on: some losses take derivatives themselves, and some models
        take another path without it.
        """
        with torch.enable_grad(), self.random.again():
            loss = self._loss(self.call(*self.args, **self.kwargs))
        self.settle()
        return loss.detach().double().reshape(1)

    def gradient(self) -> list[Tensor]:
        """Gradients with respect to ``tensors`` by the real backward pass."""
        with torch.enable_grad(), self.random.again():
            loss = self._loss(self.call(*self.args, **self.kwargs))
            grads = gradients_of(loss, list(self.tensors.values()))
        self.settle()
        return grads

    def record(self) -> tuple[Recorder, Tensor]:
        """A recorded forward pass and its loss, ready for ``recorder.differentiate``; buffers have moved."""
        assert self.model is not None
        recorder = Recorder(self.model)
        with torch.enable_grad(), self.random.again(), recorder.recording():
            outputs = self.call(*self.args, **self.kwargs)
            loss = self._loss(outputs, recorder.function(LOSS, self.loss_fn) if self.loss_fn else None)
        return recorder, loss

    def stir(self) -> None:
        """Evaluate once somewhere else, as a training step before would have: what is stale then shows."""
        with self.moved():
            self.value()

    def settle(self) -> None:
        """Put the buffers back: the same tensors with the same values."""
        with torch.no_grad():
            for module, name, buffer, value in self.buffers:
                buffer.copy_(value)
                module._buffers[name] = buffer

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Whatever happens inside, tensors and buffers are afterwards what they were, bit for bit."""
        before = [t.detach().clone() for t in self.tensors.values()]
        try:
            yield
        finally:
            self.settle()
            with torch.no_grad():
                for tensor, value in zip(self.tensors.values(), before, strict=True):
                    tensor.copy_(value)

    @contextmanager
    def moved(self) -> Iterator[None]:
        """Inside, the point lies a little beside the given one."""
        scales = own_scales(self.tensors)
        with self.kept():
            with torch.no_grad():
                for name, tensor in self.tensors.items():
                    noise = torch.randn(tensor.shape, generator=self.generator).to(tensor)
                    tensor.add_(noise, alpha=AWAY * scales[name])
            yield

    def _take(self, inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments for the call; floating inputs that are checked become copies, entered in ``tensors``."""
        args: tuple[Any, ...] = ()
        kwargs: dict[str, Any] = {}
        if isinstance(inputs, Mapping):
            kwargs = dict(inputs)
        elif inputs is not None:
            args = tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)
        floating = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.is_floating_point()]
        every = self.model is None and not any(x.requires_grad for x in floating)

        def take(name: str, x: Any) -> Any:
            if not (isinstance(x, Tensor) and x.is_floating_point() and x.numel()):
                return x
            if every or x.requires_grad:
                x = self.tensors[name] = x.detach().clone().requires_grad_()
            return x

        names = _names(self.call) if self.model is None else []
        names += [f"input {i}" for i in range(len(names), len(args))]
        args = tuple(take(name, x) for name, x in zip(names, args, strict=False))
        return args, {name: take(name, x) for name, x in kwargs.items()}

    def _loss(self, outputs: Any, loss_fn: Callable[[Any], Any] | None = None) -> Tensor:
        loss_fn = loss_fn or self.loss_fn
        outputs = loss_fn(outputs) if loss_fn else outputs
        floating = [y for y in pytree.tree_leaves(outputs) if isinstance(y, Tensor) and y.is_floating_point()]
        if not floating:
            raise InputError("nothing to check", self.name, "The output holds no floating tensor.", "Return the loss.")
        if len(floating) == 1 and floating[0].numel() == 1:
            return floating[0].reshape(())
        flat = torch.cat([y.flatten() for y in floating])
        if self.weights is None:
            self.weights = torch.randn(flat.shape, generator=self.generator).to(flat)
        return flat @ self.weights.to(flat)


def _names(function: Callable[..., Any]) -> list[str]:
    """Names of the positional parameters, none for a builtin that does not tell."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:
        return []
    return [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
