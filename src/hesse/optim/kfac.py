"""K-FAC that tunes itself: x - alpha B^{-1} grad f with B from Kronecker factors, and alpha and damping from a
quadratic model.

The direction is natural gradient through Kronecker-factored curvature (Martens and Grosse, 2015). Step size and
momentum are no settings: at every step they minimise the loss's quadratic model, with the exact Gauss-Newton matrix
of the batch, on the plane of the new direction and the last update (section 7 there). Plain natural gradient is the
case without the second direction, Levenberg-Marquardt the one in which the factors are exact.

The damping obeys two judges. The trust ratio compares the change of the loss with the one the model promised: below
1/4 the damping grows, above 3/4 it shrinks. But a batch is its own best advocate: a model with more parameters than
examples fits any batch, the ratio stays near 1 and the damping would fall until each step memorises noise. So it may
not fall further than the batch can answer for: the effective dimension of the damped curvature, sum_i f_i / (f_i +
damping), is kept below ``DIRECTIONS`` directions for each term of the loss. (By the Fisher identity that sum over
the number of terms is also the expected curvature-weighted length of a step made of the gradient's sampling noise
alone.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from hesse import tree
from hesse.curvature.kronecker import apply_inverse, invert
from hesse.curvature.layers import Form, as_matrix, from_matrix
from hesse.curvature.output import OutputCurvature, output_curvature
from hesse.curvature.quadratic import quadratic_model
from hesse.curvature.statistics import Kronecker, statistics
from hesse.curvature.uses import Use, watch_uses
from hesse.objective import Closure, Objective
from hesse.optim.base import Base

__all__ = ["KFAC"]

BURN_IN = 10  # first steps, each with fresh statistics: the factors are then averages of ten batches
PERIOD = 5  # steps between later statistics: they change slowly and cost half a step
INVERSES = 10  # steps between later inverses
MEMORY = 0.95  # of the statistics, in batches: about the last twenty
DIRECTIONS = 4.0  # effective dimensions a term of the loss may answer for
TRUST = (0.25, 0.75)  # trust ratios below which damping grows and above which it shrinks
GENTLE = 0.95  # factor of the damping a step
HARSH = 2.0  # factor of the damping after a rejected step
CALIBRATION = 12  # decades of damping tried at most on the first batch
CURVATURE = ("diagonal", "factor_a", "factor_g", "inverse_a", "inverse_g")  # of the state: what statistics made
RANGE = (1e-8, 1e4)  # of the damping: beyond it the way back takes hundreds of steps


class KFAC(Base):
    """Self-tuning K-FAC: learning rate, momentum and damping are found, not given.

    Every weight that is applied as a linear map, a convolution (grouped and transposed ones too) or an embedding has a
    Kronecker block, however it is called: by its layer, as a function, several times, tied, inside attention or a
    recurrent layer. The scales and shifts of norms, and biases that no single weight goes with, have their diagonal.
    Every other parameter (used in a way of its own, parametrised, an embedding tied to the head) gets the diagonal of
    the sampled Fisher matrix, inside the same quadratic model: none is left out.

    A step costs about three of AdamW's: a forward and a backward pass, two forward-mode products, a forward pass
    that judges the step before it is taken, and every few steps a sampled backward pass and Cholesky factorisations.
    A step that would raise the loss of its own batch, or meets a NaN, is not taken: the parameters stay, the damping
    doubles, and the rejection is counted.

    What it found is in ``param_groups[0]``: ``lr``, ``momentum``, ``damping``, ``trust_ratio``,
    ``effective_dimension``, ``rejections``, ``steps``, and ``blocks``: which weights have a Kronecker block, with the
    number of its matrices, whether they are transposed, and the bias it takes in.

    Args:
        model: the module to train; its trainable parameters are optimised.

    Raises:
        TypeError: the first argument is not a module; or, at a step, the closure is not one of
            :func:`hesse.closure`, or its loss has no Gauss-Newton factor, as :func:`hesse.curvature.output_curvature`
            says.
        ValueError: no parameter is trainable; or, at a step, the closure is of another model.

    References:
        Martens and Grosse, Optimizing neural networks with Kronecker-factored approximate curvature, ICML 2015.
        Grosse and Martens, A Kronecker-factored approximate Fisher matrix for convolution layers, ICML 2016.

    Example:
        Linear regression on badly scaled inputs, solved to five digits with nothing to set:

        >>> import hesse
        >>> _ = torch.manual_seed(0)
        >>> x = torch.randn(64, 3) * torch.tensor([1.0, 10.0, 100.0])
        >>> y = x @ torch.tensor([[1.0], [2.0], [3.0]])
        >>> model = nn.Linear(3, 1)
        >>> optimizer = KFAC(model)
        >>> for _ in range(10):
        ...     loss = optimizer.step(hesse.closure(model, nn.functional.mse_loss, (x, y)))
        >>> [round(w, 5) for w in model.weight[0].tolist()]
        [1.0, 2.0, 3.0]
    """

    def __init__(self, model: nn.Module) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(
                "KFAC takes the module, not its parameters: it needs the layers. "
                f"Got {type(model).__name__}; write KFAC(model)."
            )
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        if not named:
            raise ValueError("The model has no trainable parameter; did requires_grad_(False) freeze them all?")
        found: dict[str, Any] = {
            "lr": 0.0,
            "momentum": 0.0,
            "damping": 1.0,
            "trust_ratio": 1.0,
            "effective_dimension": 0.0,
            "rejections": 0,
            "steps": 0,
            "updates": 0,
            "blocks": {},
        }
        super().__init__(named, found)
        self.model = model

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Tensor | None:  # type: ignore[override]
        """Take one step on the batch of ``closure``, and leave the gradient in ``.grad``.

        Args:
            closure: from :func:`hesse.closure`. Without one nothing happens if there are no gradients, which is how
                frameworks ask for an optimiser's state; with gradients it is an error.

        Returns:
            The loss before the step, a scalar.
        """
        if closure is None:
            self._refuse_gradients()
            return None
        objective = self._objective_of(closure)
        group = self.param_groups[0]
        params = self._params()
        kept = {name: b.clone() for name, b in self.model.named_buffers()}
        fresh = group["steps"] < BURN_IN or group["steps"] % PERIOD == 0

        with torch.enable_grad():
            watch: AbstractContextManager[list[Use]] = watch_uses(params) if fresh else nullcontext([])
            with watch as uses:
                outputs = objective.forward()
            loss = objective.loss_fn(outputs, objective.targets)
        curvature = output_curvature(objective.loss_fn, outputs, objective.targets)
        found = torch.autograd.grad(loss, list(params.values()), retain_graph=fresh, allow_unused=True)
        grad = {}
        for (name, p), g in zip(params.items(), found, strict=True):
            p.grad = g
            grad[name] = torch.zeros_like(p) if g is None else g
        value = float(loss)
        if not (math.isfinite(value) and tree.is_finite(grad)):
            for name, b in self.model.named_buffers():
                b.copy_(kept[name])  # running statistics have seen the NaN too
            self._reject(params)
            return loss.detach()

        if fresh:
            self._learn(params, uses, outputs, curvature)
            if group["steps"] == 0:
                self._calibrate(params, objective, curvature, grad, value)
        last = {name: self.state[p]["update"] for name, p in params.items() if "update" in self.state[p]}
        if group["steps"] < BURN_IN or group["steps"] % INVERSES == 0 or not last:  # none after a rejection
            self._invert(params)
        direction = self._direction(params, grad)
        plane = [direction, last] if last else [direction]
        model = quadratic_model(objective, curvature.product, grad, plane)
        step = model.minimiser(group["damping"])
        update = tree.add(*zip(step, plane, strict=True))
        trial = {name: p + update[name] for name, p in params.items()}
        group["steps"] += 1
        if self._judge(float(objective(trial)) - value, model.value(step), value, curvature.terms):
            group["lr"], group["momentum"] = step[0], step[1] if last else 0.0
            for name, p in params.items():
                p.copy_(trial[name])
                self.state[p]["update"] = update[name]
        else:
            self._reject(params)
        return loss.detach()

    def _judge(self, change: float, promised: float, value: float, terms: float) -> bool:
        """Whether to take a step that changes the loss by ``change``, ``promised`` < 0 being expected; sets damping."""
        group = self.param_groups[0]
        if -promised <= 1e-6 * abs(value) and abs(change) <= 1e-5 * abs(value):
            return True  # converged to the precision of the loss: the ratio of two roundings says nothing
        if not (change <= 0 and math.isfinite(promised)):  # NaN is no descent either
            return False
        group["trust_ratio"] = change / promised
        limit = DIRECTIONS * terms
        if group["trust_ratio"] < TRUST[0] or group["effective_dimension"] > 1.2 * limit:
            group["damping"] /= GENTLE
        elif group["trust_ratio"] > TRUST[1] and group["effective_dimension"] < limit:
            group["damping"] = max(GENTLE * group["damping"], RANGE[0])
        return True

    def _reject(self, params: tree.Params) -> None:
        group = self.param_groups[0]
        group["rejections"] += 1
        group["damping"] = min(HARSH * group["damping"], RANGE[1])
        for p in params.values():
            self.state[p].pop("update", None)  # the old direction led here

    def _learn(self, params: tree.Params, uses: Sequence[Use], outputs: Tensor, curvature: OutputCurvature) -> None:
        """Average the batch's statistics in. What the forward pass did not reach this time keeps those it has."""
        group = self.param_groups[0]
        group["updates"] += 1
        weight = max(1 / group["updates"], 1 - MEMORY)
        blocks = dict(group["blocks"])  # a state_dict taken before may hold the old one
        for name, found in statistics(uses, params, outputs, curvature).items():
            state = self.state[params[name]]
            if isinstance(found, Kronecker):
                parts, block = {"factor_a": found.a, "factor_g": found.g}, (*found.form, found.bias)
            else:
                parts, block = {"diagonal": found.values}, None
            if not tree.is_finite(parts):
                continue  # an overflow averaged in would never leave
            if blocks.get(name) != block:  # new, or used in another way than before
                owners = [name, found.bias] if isinstance(found, Kronecker) and found.bias else [name]
                for owner in owners:
                    for key in CURVATURE:
                        self.state[params[owner]].pop(key, None)
                blocks[name] = block
            for key, value in parts.items():
                state[key] = state[key].lerp_(value, weight) if key in state else value
        group["blocks"] = {name: block for name, block in blocks.items() if block}

    def _invert(self, params: tree.Params) -> None:
        """Refresh the inverses at the present damping. A block that has none keeps its old one."""
        group = self.param_groups[0]
        dimension = 0.0
        for p in params.values():
            state = self.state[p]
            if "factor_a" in state:
                inverse = invert(state["factor_a"], state["factor_g"], group["damping"])
                if inverse is not None:
                    state["inverse_a"], state["inverse_g"] = inverse.a, inverse.g
                    dimension += inverse.effective_dimension
            elif "diagonal" in state:
                dimension += float((state["diagonal"] / (state["diagonal"] + group["damping"])).sum())
        group["effective_dimension"] = dimension

    def _direction(self, params: tree.Params, grad: tree.Params) -> tree.Params:
        """``-B^{-1} grad`` with the damped inverses at hand."""
        direction: tree.Params = {}
        for name, (groups, transposed, bias) in self.param_groups[0]["blocks"].items():
            if "inverse_a" not in (state := self.state[params[name]]):
                continue
            form, weight = Form(groups, transposed), grad[name]
            matrix = as_matrix(weight, form, grad[bias] if bias else None).to(state["inverse_g"].dtype)
            natural = -apply_inverse(state["inverse_a"], state["inverse_g"], matrix if groups > 1 else matrix[0])
            step, shift = from_matrix(natural, form, weight.shape, bias is not None)
            direction[name] = step.to(weight.dtype)
            if shift is not None:
                direction[bias] = shift.to(weight.dtype)
        damping = self.param_groups[0]["damping"]
        for name, p in params.items():
            if name not in direction:
                curvature = self.state[p].get("diagonal", 0.0)  # none yet for what the loss does not reach
                direction[name] = (-grad[name] / (curvature + damping)).to(p.dtype)
        return direction

    def _calibrate(
        self, params: tree.Params, objective: Objective, curvature: OutputCurvature, grad: tree.Params, value: float
    ) -> None:
        """Find the initial damping: try the first step by decades, without taking it, until the trust ratio settles."""
        group = self.param_groups[0]
        moved = 1.0
        for _ in range(CALIBRATION):
            self._invert(params)
            direction = self._direction(params, grad)
            model = quadratic_model(objective, curvature.product, grad, [direction])
            (step,) = model.minimiser(group["damping"])
            trial = {name: p + step * direction[name] for name, p in params.items()}
            promised = model.value([step])
            ratio = (float(objective(trial)) - value) / promised if promised < 0 else math.nan
            move = 0.1 if ratio > TRUST[1] else 10.0 if not ratio >= TRUST[0] else 1.0
            if move == 1.0 or moved * move == 1.0:  # settled, or turning back
                return
            moved = move
            group["damping"] = min(max(move * group["damping"], RANGE[0]), RANGE[1])

    def __getstate__(self) -> dict[str, Any]:
        """What deepcopy and pickle take along; torch's own drops all but its three fields."""
        return {**super().__getstate__(), "model": self.model}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused after construction: the layers, and with them the parameters, are those of the model."""
        if self.param_groups:
            raise ValueError("KFAC optimises the model it was given; it takes no further parameter groups.")
        super().add_param_group(param_group)

    def _params(self) -> tree.Params:
        group = self.param_groups[0]
        return dict(zip(group["param_names"], group["params"], strict=True))

    def _objective_of(self, closure: Callable[[], Any]) -> Objective:
        if not isinstance(closure, Closure):
            raise TypeError(
                f"KFAC.step takes hesse.closure(model, loss_fn, batch), which carries outputs and loss apart; got "
                f"{type(closure).__name__}. A plain closure hides what the curvature needs."
            )
        if closure.model is not self.model:
            raise ValueError(
                "The closure is of another model than the one given to KFAC. Build both from the same object."
            )
        return closure.objective

    def _refuse_gradients(self) -> None:
        for p in self._params().values():
            if p.grad is not None and bool(p.grad.any()):
                raise TypeError(
                    "KFAC.step needs hesse.closure(model, loss_fn, batch): gradients alone do not say how the loss "
                    "curves. Write optimizer.step(hesse.closure(model, loss_fn, (inputs, targets))) instead of "
                    "backward() and step()."
                )
