"""What every optimiser that takes the model, and not its parameters, has in common.

Such an optimiser asks more of a loss than its gradient: what it is at other parameters, how it curves at the outputs,
which layers there are. A :func:`hesse.closure` carries all of it. K-FAC, Hessian-free optimisation and the
Gauss-Newton step in the space of samples are cases; each brings its direction, and judges its own steps.

Its one parameter group holds plain numbers: what was found, and what was fixed by hand.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hesse import tree
from hesse.curvature.losses import FORMS, function_of
from hesse.curvature.product import working
from hesse.objective import Objective
from hesse.objective.replicas import Replicas, inner
from hesse.optim.base import Base, closure_inside, follow, wide

__all__ = ["TRUST", "Modelled", "Place", "loss_at"]

TRUST = (0.25, 0.75)  # trust ratios below which damping grows and above which it shrinks
NOISY = 4.0  # judgements by another batch are noisy: the k-th changes the damping by a factor 1 + NOISY / k


class Modelled(Base):
    """An optimiser of all trainable parameters of a module, in one group.

    Args:
        model: the module that closures are of, or a ``DistributedDataParallel`` around it. ``self.model`` is the module
            itself, ``self.replicas`` the processes that have copies of it.
        settings: of the group, by name. Those that are None in ``fixed`` are found by the optimiser.
        fixed: settings that the user may fix: those that are not None are put into the group, and their names into
            ``group["fixed"]``; such a setting is never changed by the optimiser (learning-rate schedulers may).

    Raises:
        TypeError: the model is no module, or a parameter is complex.
        ValueError: no parameter is trainable, or a setting is out of its range.
    """

    spreads = False  # whether it can train copies of a model in several processes

    def __init__(self, model: nn.Module, settings: dict[str, Any], fixed: dict[str, Any] | None = None) -> None:
        kind = type(self).__name__
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"{kind} takes the module, not its parameters: it needs the layers. "
                f"Got {type(model).__name__}; write {kind}(model)."
            )
        named = [(name, p) for name, p in inner(model).named_parameters() if p.requires_grad]
        if not named:
            raise ValueError("The model has no trainable parameter; did requires_grad_(False) freeze them all?")
        for name, p in named:
            if p.is_complex():
                raise TypeError(
                    f"The parameter {name!r} is complex, and {kind} is for real ones. Keep its real and imaginary "
                    "parts as two parameters and join them with torch.complex in forward."
                )
        given = {name: value for name, value in (fixed or {}).items() if value is not None}
        super().__init__(named, {**settings, **given, "fixed": tuple(given)})
        self.model, self.replicas = inner(model), Replicas(model)
        if self.replicas.size > 1 and not self.spreads:
            raise TypeError(
                f"{kind} works in one process, and the model is a DistributedDataParallel over {self.replicas.size}. "
                "KFAC and the optimisers that step along .grad train in several."
            )

    def __getstate__(self) -> dict[str, Any]:
        """What deepcopy and pickle take along; torch's own drops all but its three fields."""
        return {**super().__getstate__(), "model": self.model, "replicas": self.replicas}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused after construction: the layers, and with them the parameters, are those of the model."""
        if self.param_groups:
            raise ValueError(
                f"{type(self).__name__} optimises the model it was given; it takes no further parameter groups."
            )
        super().add_param_group(param_group)

    def _params(self) -> tree.Params:
        """The parameters by name, without those that have been frozen since."""
        group = self.param_groups[0]
        pairs = zip(group["param_names"], group["params"], strict=True)
        return {name: p for name, p in pairs if p.requires_grad}

    def _objective_of(self, closure: Callable[[], Any]) -> Objective:
        """The loss that a step is asked to take; brings the state to where the model is now."""
        kind = type(self).__name__
        found = closure_inside(closure)
        if found is None:
            raise TypeError(
                f"{kind}.step takes hesse.closure(model, loss_fn, batch), which carries outputs and loss apart; got "
                f"{type(closure).__name__}. A plain closure hides what the curvature needs."
            )
        if found.objective.model is not self.model or found.objective.replicas.group is not self.replicas.group:
            raise ValueError(
                f"The closure is of another model than the one given to {kind}. Build both from the same object."
            )
        for p in self._params().values():
            follow(self.state[p], wide(p))
        return found.objective

    def _refuse_gradients(self) -> None:
        """Raise if there are gradients to step along; without any a step does nothing, as frameworks expect."""
        kind = type(self).__name__
        for p in self._params().values():
            if p.grad is not None and bool(p.grad.any()):
                raise TypeError(
                    f"{kind}.step needs hesse.closure(model, loss_fn, batch): gradients alone do not say how the loss "
                    "curves. Write optimizer.step(hesse.closure(model, loss_fn, (inputs, targets))) instead of "
                    "backward() and step()."
                )

    def _is_free(self, name: str) -> bool:
        """Whether the setting is the optimiser's to find."""
        return name not in self.param_groups[0]["fixed"]

    # -- one step ---------------------------------------------------------------------------------------------------

    def _to_minimise(self, objective: Objective) -> Objective:
        """The objective in float32 at least, and turned round if it is to be maximised."""
        return working(self._turned(objective))

    def _turned(self, objective: Objective) -> Objective:
        """The objective, with its sign changed if it is to be maximised.

        Raises:
            ValueError: to be maximised, and convex in the outputs: it has no Gauss-Newton model that bends downwards.
        """
        if self.param_groups[0]["maximize"]:
            loss_fn = objective.loss_fn
            function, _ = function_of(loss_fn)
            if function in FORMS:
                raise ValueError(
                    f"maximize=True, and the loss {getattr(function, '__name__', function)!r} is convex in the "
                    "outputs: its Gauss-Newton model has no maximum. Maximise a concave function of the outputs, "
                    "(a log-likelihood), or use a first-order optimiser."
                )
            objective = copy.copy(objective)
            objective.loss_fn = lambda outputs, targets: -loss_fn(outputs, targets)
        return objective

    def _given(self, loss: Tensor) -> Tensor:
        """The loss as the user's function gave it, detached."""
        return -loss.detach() if self.param_groups[0]["maximize"] else loss.detach()

    def _point(self, objective: Objective) -> tree.Params:
        """The parameters to differentiate by: the live ones, or copies in the precision of the objective."""
        mine = self._params()
        return {name: p for name, p in objective.params.items() if name in mine}

    @contextmanager
    def _live(self, objective: Objective, point: tree.Params) -> Iterator[dict[str, Tensor]]:
        """The model at its own parameters, on kernels that can be differentiated twice.

        Buffers are moved in copies, which stay out of sight until :meth:`_move_buffers` brings them in: a batch with
        a NaN would spoil running statistics for good. Copies are in the dictionary once the context has closed.
        """
        moved: dict[str, Tensor] = {}
        with objective.at(point):
            yield moved
            moved.update(self.model.named_buffers())

    def _move_buffers(self, moved: dict[str, Tensor]) -> None:
        """Write what a forward pass has made of the buffers into the model's own."""
        for name, b in self.model.named_buffers():
            if name in moved and b.shape == moved[name].shape:
                b.copy_(moved[name])

    def _gradient(self, loss: Tensor, point: tree.Params, outputs: Tensor) -> tuple[Tensor, Tensor] | None:
        """The gradient in the parameters [n], left in ``.grad`` too, and in the outputs; None if they are not finite.

        Raises:
            ValueError: the loss depends on no parameter.
        """
        if not loss.requires_grad:
            raise ValueError(
                "the loss depends on no trainable parameter: all are frozen, or a detach(), .item() or no_grad() "
                "in the model or the loss cuts the graph."
            )
        if not isinstance(outputs, Tensor):
            raise TypeError(
                f"the Gauss-Newton factor needs the model to return one tensor; it returned {type(outputs).__name__}. "
                "Return the tensor that the loss is taken of, or wrap the model in one that does."
            )
        at_outputs, *found = torch.autograd.grad(loss, [outputs, *point.values()], retain_graph=True, allow_unused=True)
        live = self._params()
        sign = -1 if self.param_groups[0]["maximize"] else 1
        for (name, _), g in zip(point.items(), found, strict=True):
            live[name].grad = None if g is None else (sign * g).to(live[name].dtype)
        grads = [torch.zeros_like(p) if g is None else g for p, g in zip(point.values(), found, strict=True)]
        if not bool(loss.isfinite()) or not tree.is_finite(grads):
            return None
        return torch.cat([g.flatten().double() for g in grads]), at_outputs

    def _place(self, objective: Objective, point: tree.Params, value: float, found: tuple[Tensor, Tensor]) -> Place:
        group = self.param_groups[0]
        dtypes = {name: p.dtype for name, p in self._params().items()}
        return Place(objective, point, dtypes, value, found, group["weight_decay"], group["l1"])

    def _judge_by_this_batch(self, place: Place, same: bool) -> None:
        """Compare what the last step promised with what it did to this batch, if that had no part in it.

        A batch is its own best advocate: a model with more parameters than terms fits any batch, and a trust ratio on
        the batch that the step was made from would let the damping fall until each step memorises noise.
        """
        group = self.param_groups[0]
        last = self._last(place)
        if same or last is None or not self._is_free("damping") or not group["promised"] > 0:
            return
        ratio = (place.trial(-last)[0] - place.value) / group["promised"]
        group["trust_ratio"] = -math.inf if math.isnan(ratio) else ratio
        gain = 1 + NOISY / group["steps"]
        if not group["trust_ratio"] >= TRUST[0]:
            group["damping"] *= gain
        elif group["trust_ratio"] > TRUST[1]:
            group["damping"] /= gain

    def _is_same(self, place: Place) -> bool:
        """Whether the batch is the one of the last step: the loss is what that step ended with."""
        end = self.param_groups[0]["value"]
        return abs(place.value - end) <= place.close**0.5 * abs(place.value)

    def _take(self, place: Place, x: Tensor) -> None:
        """Move the parameters to x [n], and keep the update for the next step."""
        live = self._params()
        updates = place.layout.split(x - place.x)
        for name, value in place.layout.split(x).items():
            live[name].copy_(value)
            self.state[live[name]]["update"] = updates[name].to(place.point[name].dtype, copy=True)

    def _last(self, place: Place) -> Tensor | None:
        """The update before this [n], or None."""
        live = self._params()
        if not all("update" in self.state[live[name]] for name in place.point):
            return None
        return place.layout.flatten({name: self.state[live[name]]["update"].double() for name in place.point})

    def _forget(self) -> None:
        for p in self._params().values():
            self.state[p].pop("update", None)


class Place:
    """The objective with its penalties around the parameters of one step, on flat float64 vectors [n].

    Args:
        objective: the loss.
        point: the parameters.
        dtypes: of the model's own parameters, to which trial parameters are rounded.
        value: the loss there.
        found: the loss's gradients in the parameters [n] and the outputs.
        decay, l1: of the penalties ``decay / 2 ||x||^2 + l1 ||x||_1``.

    Attributes:
        value: with the penalties.
        gradient: of the loss alone.
        slope: of everything that is minimised: its steepest direction where l1 has a kink.
        free: 1 for the elements that l1 does not hold at zero, 0 for the others; None if there is no l1.
        close: the relative rounding of the loss.
    """

    def __init__(
        self,
        objective: Objective,
        point: tree.Params,
        dtypes: dict[str, torch.dtype],
        value: float,
        found: tuple[Tensor, Tensor],
        decay: float,
        l1: float,
    ) -> None:
        self.objective, self.point, self.dtypes, self.decay, self.l1 = objective, point, dtypes, decay, l1
        self.layout = tree.Layout.of(point)
        self.x = self.layout.flatten(point).detach().double()
        self.gradient, self.at_outputs = found
        self.value = value + self.penalty(self.x)
        self.close = torch.finfo(self.at_outputs.dtype).eps
        self.slope = self.gradient + decay * self.x
        self.free: Tensor | None = None
        self.orthant = self.x.sign()
        if l1:
            # The orthant-wise choice at zero: move if the loss's slope is steeper than the kink, else stay.
            pull = -self.slope.sign() * (self.slope.abs() > l1)
            self.orthant = torch.where(self.x == 0, pull, self.orthant)
            self.free = (self.orthant != 0).double()
            self.slope = (self.slope + l1 * self.orthant) * self.free

    def penalty(self, x: Tensor) -> float:
        if not (self.decay or self.l1):
            return 0.0
        return float(0.5 * self.decay * (x @ x) + self.l1 * x.abs().sum())

    def params_at(self, x: Tensor) -> tree.Params:
        """Named tensors at x, as the model can hold them, in the precision that is computed in."""
        return {
            name: value.to(self.dtypes[name]).to(self.point[name].dtype) for name, value in self.layout.split(x).items()
        }

    def trial(self, step: Tensor) -> tuple[float, Tensor]:
        """The value after a step, and the parameters [n] there. What l1 drives across zero stops at it."""
        x = self.x + step
        if self.l1:
            x = torch.where(x.sign() == self.orthant, x, 0.0)
        return float(loss_at(self.objective, self.params_at(x))) + self.penalty(x), x

    def outputs_at(self, step: Tensor) -> Tensor:
        """The model's outputs after a step, float64."""
        with torch.enable_grad():  # see loss_at
            outputs: Tensor = self.objective.outputs(self.params_at(self.x + step))
        return outputs.detach().double()


def loss_at(objective: Objective, params: tree.Params) -> Tensor:
    """The loss at trial parameters, a detached scalar.

    With gradients enabled: a model may differentiate its own network in its forward pass, as physics-informed ones do.
    Tensors that require none record no graph.
    """
    with torch.enable_grad():
        return objective({name: p.detach() for name, p in params.items()}).detach()
