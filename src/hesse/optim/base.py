"""What every optimiser of ours owes torch, in one place.

An optimiser is a rule (tensors in, a direction out) and a shell that carries it: settings are checked, the closure is
called, state is looked up and survives a reload, regularisers act. The shell is here, so that a rule can be a page.
``Base`` is what all share; ``Gradient`` is the shell of those that run after ``loss.backward()``, as torch's Adam does:
with the direction ``-grad`` it is SGD, with ``-m / sqrt(v)`` it would be Adam.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from hesse.objective import Closure
from hesse.optim.sharded import keep, local, part_of, view, whole

__all__ = ["Base", "Gradient", "closure_inside"]

P = ParamSpec("P")
T = TypeVar("T")


class Base(torch.optim.Optimizer):
    """A torch optimiser whose settings are checked in every group, and whose state survives a reload in its own dtype.

    State is a flat ``dict[str, Tensor]`` for each parameter: it then passes through ``weights_only`` and the
    distributed checkpoint.
    """

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; the group's settings, with the defaults in place of those not given, are checked.

        Raises:
            TypeError: a parameter is complex.
            ValueError: a setting is out of its range.
        """
        super().add_param_group(param_group)
        try:
            refuse_settings(self.param_groups[-1])
            self._refuse_complex(self.param_groups[-1])
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    def _refuse_complex(self, group: dict[str, Any]) -> None:
        names = group.get("param_names") or [f"number {i}" for i in range(len(group["params"]))]
        for name, p in zip(names, group["params"], strict=True):
            if p.is_complex():
                raise TypeError(
                    f"The parameter {name!r} is complex, and {type(self).__name__} is for real ones. Keep its real and "
                    "imaginary parts as two parameters and join them with torch.complex in forward."
                )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, with every state tensor in the dtype it was saved in, on the device of its parameter.

        torch casts the state of a parameter to the parameter's dtype: float32 factors of a bfloat16 model would come
        back rounded to eight bits, and a resumed run would differ.
        """
        saved: dict[str, Any] = state_dict

        def stash(_: torch.optim.Optimizer, given: dict[str, Any]) -> None:
            nonlocal saved
            saved = given  # a user's hooks may have replaced it

        with self.register_load_state_dict_pre_hook(stash):
            super().load_state_dict(state_dict)
        params = [p for group in self.param_groups for p in group["params"]]
        numbers = [number for group in saved["param_groups"] for number in group["params"]]
        for p, number in zip(params, numbers, strict=True):
            for name, value in saved["state"].get(number, {}).items():
                if isinstance(value, Tensor) and value.dtype != self.state[p][name].dtype:
                    device = self.state[p][name].device
                    self.state[p][name] = value.detach().clone().to(device)


class Gradient(Base):
    """An optimiser that runs on the gradients in ``.grad``, by the rule :meth:`directions`.

    The shell does the rest: ``maximize``, coupled and decoupled weight decay, the proximal step of ``l1``, sparse
    gradients (made dense), low precision (rules compute in float32 at least), parameters without a gradient (left
    alone) or sharded over processes (:mod:`hesse.optim.sharded`), and gradients that are not finite: such a step is not
    taken, nothing of it enters the state, and ``param_groups[i]["rejections"]`` counts it.

    Settings of every group, beside the rule's own: ``lr`` (a number or a tensor of one element), ``weight_decay``,
    ``decoupled_weight_decay``, ``l1``, ``maximize``.
    """

    def directions(
        self, group: dict[str, Any], grads: list[Tensor], states: list[dict[str, Any]], params: list[Tensor]
    ) -> list[Tensor]:
        """The rule: what is added to each parameter, times ``lr``.

        Args:
            group: its settings.
            grads: finite gradients, float32 at least, shaped as the parameters, in the sense of minimising. Those of
                sharded parameters are whole, the same in every process.
            states: of each parameter, empty before its first step; the rule keeps tensors in it, plain ones always.
            params: the parameters, to look at; sharded ones as ``DTensor``.
        """
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step along the gradients.

        Args:
            closure: computes the loss and the gradients, and returns the loss; optional, as in torch.

        Returns:
            The closure's loss, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._step(group, [p for p in group["params"] if p.grad is not None])
        return loss

    def _step(self, group: dict[str, Any], params: list[Tensor]) -> None:
        grads = [_dense(whole(p.grad)) for p in params if p.grad is not None]
        if not grads:
            return
        if not all_finite(grads):
            group["rejections"] += 1
            return
        lr, decay, decoupled = float(group["lr"]), group["weight_decay"], group["decoupled_weight_decay"]
        if group["maximize"]:
            grads = list(torch._foreach_neg(grads))
        if decay != 0 and not decoupled:
            grads = list(torch._foreach_add(grads, [wide(whole(p)) for p in params], alpha=decay))
        states = [follow(view(self.state[p], p), grad) for p, grad in zip(params, grads, strict=True)]
        found = precise(self.directions)(group, grads, states, params)
        for p, state in zip(params, states, strict=True):
            keep(self.state[p], state, p)
        mine = [local(p) for p in params]
        values = [wide(p) for p in mine]
        steps = [part_of(d, p).to(v.dtype) for d, p, v in zip(found, params, values, strict=True)]
        if decay != 0 and decoupled:
            torch._foreach_mul_(values, 1 - lr * decay)
        torch._foreach_add_(values, steps, alpha=lr)
        if group["l1"] != 0:
            values = [shrink(value, lr * group["l1"]) for value in values]
        for p, value in zip(mine, values, strict=True):
            if value is not p:
                p.copy_(value)


def precise(rule: Callable[P, T]) -> Callable[P, T]:
    """The rule outside autocast: a step inside it computes as one outside."""

    @functools.wraps(rule)
    def outside(*args: P.args, **kwargs: P.kwargs) -> T:
        with contextlib.ExitStack() as stack:
            for kind in ("cpu", "cuda", "xpu", "mps"):
                if torch.is_autocast_enabled(kind):
                    stack.enter_context(torch.autocast(kind, enabled=False))
            return rule(*args, **kwargs)

    return outside


def follow(state: dict[str, Any], like: Tensor) -> dict[str, Any]:
    """The state, moved in place to the dtype and the device of the gradient: the model may have been."""
    for name, x in state.items():
        if name != "step" and (x.dtype != like.dtype or x.device != like.device):
            state[name] = x.to(like)
    return state


def shrink(x: Tensor, threshold: float | Tensor) -> Tensor:
    """The proximal step of ``threshold * ||x||_1``: every element moves towards zero by the threshold, and stays there.

    Example:
        >>> shrink(torch.tensor([3.0, -0.5, -2.0]), 1.0)
        tensor([ 2., -0., -1.])
    """
    return x.sign() * (x.abs() - threshold).clamp_min(0)


def wide(x: Tensor) -> Tensor:
    """At least float32: an update of half precision is lost in the rounding of a longer sum."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether every element is a finite number, with one synchronisation."""
    tensors = [x for x in tensors if x.numel()]
    norms = [x.abs().sum() if x.is_complex() else x.sum() for x in tensors]
    # A sum is finite unless an element is not, or it overflows: only then each element is looked at.
    if not norms or bool(torch.stack([n.to(norms[0].device) for n in norms]).isfinite().all()):
        return True
    return all(bool(x.isfinite().all()) for x in tensors)


def closure_inside(closure: Any) -> Closure | None:
    """The :class:`hesse.closure` that a framework has wrapped in its own, or None.

    Lightning hands ``optimizer.step`` a ``functools.partial`` with the user's closure among its arguments.
    """
    if isinstance(closure, Closure):
        return closure
    if isinstance(closure, functools.partial):
        for inner in (closure.func, *closure.args, *closure.keywords.values()):
            found = closure_inside(inner)
            if found is not None:
                return found
    return None


# Of settings: name, the least value, whether that value itself is allowed, and the least value that is too large.
_RANGES: tuple[tuple[str, str, float, bool, float], ...] = (
    ("lr", "learning rate", 0.0, True, math.inf),
    ("weight_decay", "weight_decay value", 0.0, True, math.inf),
    ("l1", "l1 value", 0.0, True, math.inf),
    ("eps", "epsilon value", 0.0, True, math.inf),
    ("momentum", "momentum value", 0.0, True, math.inf),
    ("damping", "damping", 0.0, False, math.inf),
)


def refuse_settings(group: Mapping[str, Any]) -> None:
    """Raise a ValueError for a setting that every optimiser reads alike and that is out of its range; ``None`` is free.

    The wording "Invalid ..." is torch's, which tests and users look for.
    """
    for name, words, least, allowed, limit in _RANGES:
        value = group.get(name)
        if value is None:
            continue
        if isinstance(value, Tensor) and value.numel() != 1:
            raise ValueError(f"Tensor {name} must be 1-element; got shape {list(value.shape)}.")
        if not (least <= value < limit and (allowed or value != least)):
            side = "at least" if allowed else "more than"
            raise ValueError(f"Invalid {words}: {value}. It has to be {side} {least:g}, and finite.")
    for i, beta in enumerate(group.get("betas") or ()):
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"Invalid beta parameter at index {i}: {beta}. It has to be at least 0 and less than 1.")


def _dense(grad: Tensor) -> Tensor:
    return wide(grad.to_dense() if grad.is_sparse else grad)
