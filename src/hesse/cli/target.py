"""What a factory of the user's gives: a model with what it is fed, for ``hesse check`` and ``hesse doctor``.

A factory is called without arguments and returns one of

    model, inputs                          # model(*inputs) is the loss
    model, loss_fn, data                   # data: one batch (inputs, targets), or a loader of them
    model, loss_fn, data, optimizer
    hesse.closure(model, loss_fn, batch)
    {"model": ..., "loss_fn": ..., "data": ..., "optimizer": ...} or {"model": ..., "inputs": ..., "jac": ...}
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from hesse.cli.code import attribute, blame
from hesse.finding import InputError

__all__ = ["Target", "target"]

NAMES = ("model", "loss_fn", "data", "optimizer")
OTHERS = ("inputs", "jac", "hess")
REMEDY = (
    "Return (model, inputs) of a model that computes its loss, or (model, loss_fn, data) with one batch "
    "(inputs, targets) or a loader of them, and an optimizer if you like."
)


@dataclass(frozen=True)
class Target:
    """What was found. Either ``inputs`` or ``loss_fn`` and ``data`` are there, or ``model`` brings its own.

    Attributes:
        model: a module, a function, or a closure of :func:`hesse.closure`.
        loss_fn: takes outputs and targets.
        data: an iterable of batches (inputs, targets).
        optimizer: that trains the model, where the factory gave one.
        inputs, jac, hess: as :func:`hesse.check.gradients` and :func:`hesse.check.hessian` take them.
    """

    model: Any
    loss_fn: Callable[..., Any] | None = None
    data: Iterable[Any] | None = None
    optimizer: Any = None
    inputs: Any = None
    jac: Any = None
    hess: Any = None

    def subject(self) -> tuple[Any, Any]:
        """The first two arguments of the checks; of a loader its first batch is taken."""
        from hesse.objective import closure

        if self.loss_fn is None or self.data is None:
            return self.model, self.inputs
        return closure(self.model, self.loss_fn, next(iter(self.data))), None


def target(spec: str) -> Target:
    """Call the factory ``module:name`` or ``path/to/file.py:name``.

    Raises:
        InputError: there is none, its code fails, or it returns something else.
    """
    factory = attribute(spec)
    if not callable(factory):
        raise InputError("no factory", spec, f"It is a {type(factory).__name__}, not a function.", REMEDY)
    try:
        found = factory()
    except Exception as error:
        blame(error, spec)
        raise
    return _read(found, spec)


def _read(found: Any, spec: str) -> Target:
    from hesse.objective import Closure

    if isinstance(found, Closure):
        return Target(found)
    if isinstance(found, tuple) and len(found) == 2:
        return Target(found[0], inputs=found[1])
    if isinstance(found, tuple) and len(found) in (3, 4):
        found = dict(zip(NAMES, found, strict=False))
    if not isinstance(found, Mapping):
        what = f"a tuple of {len(found)}" if isinstance(found, tuple) else f"a {type(found).__name__}"
        raise InputError("no target", spec, f"The factory returned {what}.", REMEDY)
    unknown = [str(name) for name in found if name not in (*NAMES, *OTHERS)]
    if unknown or "model" not in found or ("loss_fn" in found) != ("data" in found):
        has = ", ".join(map(str, found))
        raise InputError(
            "no target", spec, f"The factory returned {has}; known are {', '.join((*NAMES, *OTHERS))}.", REMEDY
        )
    if "loss_fn" not in found:
        return Target(**found)
    if not callable(found["loss_fn"]):
        kind = type(found["loss_fn"]).__name__
        raise InputError("no target", spec, f"The loss function is a {kind} and cannot be called.", REMEDY)
    data = found["data"]
    return Target(**{**found, "data": [data] if isinstance(data, tuple) and len(data) == 2 else data})
