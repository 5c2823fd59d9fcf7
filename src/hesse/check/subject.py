"""What is checked: a loss as a function of live tensors that can be moved in place, and are put back bit
for bit.

A module, a function of tensors and a :func:`hesse.closure` become the same thing here. Evaluations leave no
trace: buffers are put back and the random generators rewound after each, so that BatchNorm and dropout are
functions too.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from hesse.check.differences import own_scales
from hesse.check.passes.calls import RandomState, cuda_devices, differentiable, gradients_of, real, tensors_of
from hesse.check.passes.functions import defined
from hesse.check.passes.recording import LOSS, Recorder
from hesse.check.passes.replay import Replay
from hesse.finding import InputError
from hesse.objective import Closure

__all__ = ["Subject"]

AWAY = 0.05  # how far from the point, in each tensor's own unit, :meth:`Subject.moved` goes


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
        self.frozen: list[tuple[Tensor, Tensor]] = []
        self.buffers: list[tuple[nn.Module, str, Tensor, Tensor]] = []
        if self.model is not None:
            self.call, self.name = self.model, type(self.model).__name__
        self.args, self.kwargs = self._take(inputs)
        if self.model is not None:
            self._set_up(self.model)
        if not self.tensors:
            raise InputError(
                "nothing to check",
                self.name,
                "No floating tensor requires a gradient.",
                "Give a model with trainable parameters, or floating inputs to a function.",
            )
        self.edits: list[str] = []  # names of tensors that every evaluation edits
        self.restoring = False  # whether evaluations edit the tensors, which then are put back after each
        self.base: list[Tensor] = []  # the values of the tensors at the given point
        self.weights: Tensor | None = None
        self.replay: Replay | None = None  # what is held in :meth:`value`
        self.excused: set[str] = set()  # tensors that what is held has differentiated in its own way
        self.pinned: list[tuple[Tensor, int, Tensor]] = []  # rows of embeddings that have no gradient, and their values
        self.random = RandomState(cuda_devices([*self.tensors.values(), *(b for _, _, b, _ in self.buffers)]))
        dtypes = {t.dtype for t in self.tensors.values()}
        dtypes |= {torch.get_autocast_dtype(d) for d in ("cpu", "cuda") if torch.is_autocast_enabled(d)}
        self.eps = max(torch.finfo(dtype).eps for dtype in dtypes)

    def _set_up(self, model: nn.Module) -> None:
        """Take the parameters and buffers of a model, once it has them."""
        if any(nn.parameter.is_lazy(t) for t in (*model.parameters(), *model.buffers())):
            with torch.no_grad(), RandomState([]).again():
                self.call(*self.args, **self.kwargs)
        inputs, self.tensors = self.tensors, {}
        self.tensors = {n: p for n, p in model.named_parameters() if p.requires_grad and p.numel()} | inputs
        for module in model.modules():
            self.buffers += [(module, n, b, b.clone()) for n, b in module.named_buffers(recurse=False)]
        # What is frozen is a buffer: the weights of a teacher follow the student's during the forward pass.
        self.frozen = [(p, p.detach().clone()) for p in model.parameters() if not p.requires_grad]

    @property
    def summed(self) -> bool:
        return self.weights is not None and self.weights.numel() > 1

    def value(self) -> Tensor:
        """The loss, float64 of shape [1]; leaves buffers and random generators alone.

        Evaluated as in training, with autograd on: some losses take derivatives themselves, and some models
        take another path without it.
        """
        return self._value(self.replay)

    def _value(self, replay: Replay | None) -> Tensor:
        holding: AbstractContextManager[list[Tensor]] = replay.running() if replay else nullcontext([])
        with self.unedited(), torch.enable_grad(), self.random.again(), holding as terms:
            loss = self.evaluate().detach().double().reshape(1)
            for term in terms:
                loss = loss + term.sum()
        return loss

    def evaluate(self) -> Tensor:
        """The loss with its graph; whoever calls it puts buffers back."""
        return self._loss(self.call(*self.args, **self.kwargs))

    def source(self, path: str) -> tuple[str | None, int | None]:
        """File and line of what runs at a path."""
        if path == LOSS:
            return defined(self.loss_fn)
        return defined(self.call if self.model is None else type(self.model.get_submodule(path)).forward)

    def gradient(self) -> list[Tensor]:
        """Gradients with respect to ``tensors`` by the real backward pass."""
        with self.unedited(), torch.enable_grad(), self.random.again():
            loss = self.evaluate()
            return gradients_of(loss, list(self.tensors.values()))

    def record(self, silent: bool = False, protect: bool = False) -> tuple[Recorder, Tensor]:
        """A recorded forward pass and its loss, ready for ``recorder.differentiate``; buffers have moved.

        Args:
            silent, protect: as for :class:`Recorder`.
        """
        self.settle()
        whole: set[str] = set()  # what edits its arguments must be given them, not copies: it is left in one piece
        while True:
            recorder = Recorder(self.model, silent, protect)
            recorder.whole = frozenset(whole)
            call = self.call if self.model is not None else recorder.function("", self.call)
            with torch.enable_grad(), self.random.again(), recorder.recording():
                outputs = call(*self.args, **self.kwargs)
                loss = self._loss(outputs, recorder.function(LOSS, self.loss_fn) if self.loss_fn else None)
            if recorder.editing <= whole:
                return recorder, loss
            self.settle()
            if abs(float(loss.detach()) - float(self._value(None))) <= 100 * self.eps * abs(float(loss.detach())):
                return recorder, loss
            whole |= recorder.editing

    def pin(self, tensor: Tensor, row: int) -> None:
        """Let a row of a tensor stay what it is while the rest is moved."""
        if not any(t is tensor and i == row for t, i, _ in self.pinned):
            self.pinned.append((tensor, row, tensor[row].detach().clone()))

    def stir(self) -> None:
        """Evaluate once somewhere else, as a training step before would have: what is stale then shows."""
        with self.moved(torch.Generator().manual_seed(1)):
            self._value(None)

    def settle(self) -> None:
        """Put the buffers back, the same tensors with the same values, and rows that are not trained."""
        with torch.no_grad():
            for tensor, value in self.frozen:
                tensor.copy_(value)
            for tensor, row, value in self.pinned:
                tensor[row] = value
            for module, name, buffer, value in self.buffers:
                buffer.copy_(value)
                module._buffers[name] = buffer

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Whatever happens inside, tensors and buffers are afterwards what they were, bit for bit."""
        before = [t.detach().clone() for t in self.tensors.values()]
        self.base = self.base or before
        try:
            yield
        finally:
            self.settle()
            with torch.no_grad():
                for tensor, value in zip(self.tensors.values(), before, strict=True):
                    tensor.copy_(value)

    def rebase(self, base: list[Tensor] | None = None) -> list[Tensor]:
        """Take the present values of the tensors, or those given, for the given point; returns what it was."""
        before = [value.clone() for value in self.base]
        with torch.no_grad():
            for i, tensor in enumerate(self.tensors.values()):
                if base is not None:
                    tensor.copy_(base[i])
                self.base[i].copy_(tensor)
        return before

    def edited(self) -> list[str]:
        """Names of the tensors that the evaluations so far have changed."""
        pairs = zip(self.tensors.items(), self.base, strict=True)
        return [name for (name, t), value in pairs if not torch.equal(t, value)]

    @contextmanager
    def unedited(self) -> Iterator[None]:
        """Buffers, rows that are not trained, and if ``restoring`` all tensors, are afterwards what they were."""
        self.settle()
        if self.restoring:
            with self.kept():
                yield
            return
        try:
            yield
        finally:
            self.settle()

    @contextmanager
    def back(self) -> Iterator[None]:
        """Inside, the point is the given one."""
        with self.kept():
            with torch.no_grad():
                for tensor, value in zip(self.tensors.values(), self.base, strict=True):
                    tensor.copy_(value)
            yield

    @contextmanager
    def moved(self, generator: torch.Generator | None = None) -> Iterator[None]:
        """Inside, the point lies a little beside the given one."""
        scales = own_scales(self.tensors)
        with self.kept():
            with torch.no_grad():
                for name, tensor in self.tensors.items():
                    noise = torch.randn(tensor.shape, generator=generator or self.generator).to(tensor)
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
        floating = [x for x in tensors_of((args, kwargs)) if x.is_floating_point()]
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

    @property
    def batch(self) -> int | None:
        """Rows of the batch: the length that most arguments share."""
        rows = [x.shape[0] for x in tensors_of((self.args, self.kwargs)) if x.ndim]
        return max(rows, key=rows.count) if rows else None

    def _loss(self, outputs: Any, loss_fn: Callable[[Any], Any] | None = None) -> Tensor:
        loss_fn = loss_fn or self.loss_fn
        outputs = loss_fn(outputs) if loss_fn else outputs
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
        if isinstance(loss, Tensor) and loss.numel() == 1:
            return loss.reshape(())
        floating = [real(y) for y in tensors_of(outputs) if differentiable(y)]
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
