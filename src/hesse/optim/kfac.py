"""K-FAC that tunes itself: x - alpha B^{-1} grad f with B from Kronecker factors, and alpha and damping from a
quadratic model.

The direction is natural gradient through Kronecker-factored curvature (Martens and Grosse, 2015). Step size and
momentum are no settings: at every step they minimise the loss's quadratic model, with the exact Gauss-Newton matrix
of the batch, on the plane of the new direction and the last update (section 7 there). Plain natural gradient is the
case without the second direction, Levenberg-Marquardt the one in which the factors are exact.

The damping obeys two judges. The trust ratio compares the change of the loss with the one the model promised: below
1/4 the damping grows. But a batch is its own best advocate: a model with more parameters than examples fits any batch,
the ratio stays near 1 and says nothing of where to stop. So the damping is led to where the curvature has a given
**effective dimension**, sum_i f_i / (f_i + damping): a tenth of the parameters, but at most sixteen directions and at
least a quarter of one for each term of the loss. It is a place in the spectrum, not a number in the loss's units:
networks of every kind train fastest at dampings many decades apart, and over a far narrower range of shares
(docs/damping.md).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from hesse import tree
from hesse.curvature.jacobian import jvp, secant
from hesse.curvature.output import OutputCurvature, output_curvature
from hesse.curvature.quadratic import QuadraticModel, quadratic_model
from hesse.curvature.statistics import Block, Statistics, statistics
from hesse.curvature.turned import turned_squares
from hesse.curvature.uses import Use, Uses, watch_uses
from hesse.objective import Objective
from hesse.optim.base import precise
from hesse.optim.corrected import Corrected
from hesse.optim.factors import Factors
from hesse.optim.modelled import TRUST, Modelled, loss_at
from hesse.optim.penalty import Penalty
from hesse.optim.shares import draw

__all__ = ["KFAC"]

BURN_IN = 10  # first steps, each with fresh statistics: the factors are then averages of ten batches
PATCHES = 2048  # of a convolution's inputs that go into its factor
PERIOD = 3  # steps between later statistics: they change slowly and cost as much as a step of AdamW
MEMORY = 0.9  # of the statistics, an update: about the last thirty steps
STALE = 0.3  # how far the inverses may be off, relative to the gradient
SHARE = 0.1  # of the parameters, as effective dimension: a plateau from 1/25 to 1/6 on the training benchmark
PER_TERM = 0.25  # effective dimensions that a term of the loss answers for, where terms outnumber parameters
MOST = 16.0  # effective dimensions a term at most: a batch cannot answer for more, and steps would memorise it
FAST = 0.4  # factor of the damping a step, at most
GENTLE = 0.85  # factor of the damping after a bad trust ratio
HARSH = 1.5  # factor of the damping after a rejected step
SHORTER = 4  # lengths tried where the damping is fixed, each a quarter of the one before
CALIBRATION = 12  # decades of damping tried at most on the first batch
RANGE = (1e-8, 1e4)  # of the damping: beyond it the way back takes hundreds of steps
TRUSTED = 50  # steps for which products by differences are used before they are compared again
AGREE = 0.05  # how far they may be from the exact ones


@dataclass(frozen=True, eq=False)
class Point:
    """Where a step begins.

    Args:
        objective: the loss of one batch.
        params: the parameters.
        outputs: of the model there, without a graph.
        curvature: of the loss at the outputs.
        grad: of everything that is minimised.
        value: of everything that is minimised.
        penalty: what is minimised beside the loss.
    """

    objective: Objective
    params: tree.Params
    outputs: Tensor
    curvature: OutputCurvature
    grad: tree.Params
    value: float
    penalty: Penalty

    def trial(self, update: tree.Params) -> tuple[tree.Params, float]:
        """The parameters after an update, and the value there."""
        there = {name: self.penalty.end(name, p + update[name]) for name, p in self.params.items()}
        (value,) = self.objective.replicas.mean(float(loss_at(self.objective, there)) + self.penalty.value(there))
        return there, value


class KFAC(Modelled):
    """Self-tuning K-FAC: learning rate, momentum and damping are found, not given.

    Every weight that is applied as a linear map, a convolution (grouped and transposed ones too) or an embedding has a
    Kronecker block, however it is called: by its layer, as a function, several times, tied, inside attention or a
    recurrent layer. The scales and shifts of norms, and biases that no single weight goes with, have their diagonal.
    Every other parameter (used in a way of its own, parametrised, an embedding tied to the head) gets the diagonal of
    the sampled Fisher matrix, inside the same quadratic model: none is left out.

    A step costs about three of AdamW's, more on the smallest networks: a forward and a backward pass, two forward
    passes for the quadratic model, one that judges the step before it is taken, and every few steps a sampled backward
    pass and Cholesky factorisations. A step that would raise the loss of its own batch, or meets a NaN, is not taken:
    the parameters stay, the damping grows by half, and the rejection is counted. With a damping that you have fixed the
    step is shortened first.

    With ``KFAC(DistributedDataParallel(model))`` and closures of the same, every process has its part of the batch, and
    keeps and inverts the factors of its part of the weights; its ``state_dict`` holds those. The steps are those of one
    process on the whole batch if the parts are of one size; if not, each part counts the same, as DDP has it. All must
    come to ``step``, and a part with a NaN makes all reject it. Buffers, such as a BatchNorm's, are each one's own.

    What it found is in ``param_groups[0]``: ``lr``, ``momentum``, ``damping``, ``trust_ratio``,
    ``effective_dimension``, ``rejections``, ``steps``; ``products``, how the quadratic model's products are formed,
    "differences" as long as they agree with exact ones ("forward"); and ``blocks``: which weights have a Kronecker
    block, with the number of its matrices, whether they are transposed, and the bias it takes in.

    Args:
        model: the module to train, or a ``DistributedDataParallel`` around it; its trainable parameters are optimised.
        lr, momentum, damping: None to be found. A number is kept: learning-rate schedulers then act on it.
        ekfac: correct the eigenvalues of the blocks (George et al., 2018): dearer steps, better curvature where
            inputs and gradients are not independent. Not for weights with a side above ``max_dim``.
        max_dim: the largest Kronecker factor. A side of a weight's matrix (the bias is a column) that is longer is cut
            into equal parts, each with a factor of its own: memory and time of a factor then grow with the side, not
            with its square and cube. An embedding's side of rows always has a diagonal.
        weight_decay: L2, a part of what is minimised: ``weight_decay / 2 ||x||^2``.
        decoupled_weight_decay: shrink the weights by ``lr * weight_decay`` a step instead.
        l1: a part of what is minimised, ``l1 ||x||_1``; weights become exactly zero.
        maximize: a loss of your own that is concave in the outputs.

    Raises:
        TypeError: the first argument is not a module; or, at a step, the closure is not one of
            :func:`hesse.closure`, or its loss has no Gauss-Newton factor, as :func:`hesse.curvature.output_curvature`
            says.
        ValueError: no parameter is trainable; ``max_dim`` is out of its range; or, at a step, the closure is of
            another model.

    References:
        Martens and Grosse, Optimizing neural networks with Kronecker-factored approximate curvature, ICML 2015.
        Grosse and Martens, A Kronecker-factored approximate Fisher matrix for convolution layers, ICML 2016.
        George, Laurent, Bouthillier, Ballas and Vincent, Fast approximate natural gradient descent in a
        Kronecker-factored eigenbasis, NeurIPS 2018.

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
        >>> [round(w, 4) for w in model.weight[0].tolist()]
        [1.0, 2.0, 3.0]
    """

    spreads = True

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: float | None = None,
        momentum: float | None = None,
        damping: float | None = None,
        ekfac: bool = False,
        max_dim: int = 2048,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = False,
        l1: float = 0.0,
        maximize: bool = False,
    ) -> None:
        if not (isinstance(max_dim, int) and max_dim >= 1):
            raise ValueError(f"Invalid max_dim: {max_dim!r}. It has to be a whole number of at least 1.")
        settings: dict[str, Any] = {
            "lr": 0.0,
            "momentum": 0.0,
            "damping": 1.0,
            "ekfac": ekfac,
            "max_dim": max_dim,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
            "l1": l1,
            "maximize": maximize,
            "trust_ratio": 1.0,
            "effective_dimension": 0.0,
            "rejections": 0,
            "steps": 0,
            "updates": 0,
            "products": "differences",
            "blocks": {},
        }
        super().__init__(model, settings, {"lr": lr, "momentum": momentum, "damping": damping})
        if ekfac and self.replicas.size > 1:
            raise ValueError(
                f"ekfac=True works in one process, and the model is a DistributedDataParallel over "
                f"{self.replicas.size}: every one would need all eigenbases. Leave it out."
            )

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
        objective = self._turned(self._objective_of(closure))
        group, params = self.param_groups[0], self._params()
        factors = (Corrected if group["ekfac"] else Factors)(self.state, params, group["blocks"], self.replicas)
        scheduled = group["steps"] < BURN_IN or group["steps"] % PERIOD == 0
        fresh = scheduled or not self.replicas.all(factors.known)
        kept = {name: b.clone() for name, b in self.model.named_buffers()}

        with torch.enable_grad():
            watch: AbstractContextManager[Uses] = watch_uses(params) if fresh else nullcontext(Uses())
            with watch as uses:
                outputs = objective.forward(plain=True)
            loss = objective.loss_fn(outputs, objective.targets)
        curvature = output_curvature(objective.loss_fn, outputs, objective.targets)
        grad = self._gradients(loss, params, retain=fresh)
        loss = loss.detach().clone()
        self.replicas.mean_([loss])
        value = float(loss)
        if not (math.isfinite(value) and tree.is_finite(grad)):
            for name, b in self.model.named_buffers():
                b.copy_(kept[name])  # running statistics have seen the NaN too
            self._reject(params)
            return self._given(loss)

        penalty = Penalty.of(group, params)
        # The last digit of a sum depends on where in memory it lies, so even what all processes have is averaged.
        added, terms = self.replicas.mean(penalty.value(params), curvature.terms)
        value, terms, grad = value + added, terms * self.replicas.size, penalty.slope(params, grad)
        if fresh:
            group["updates"] += 1
            r = draw(objective, outputs, curvature, group["steps"])
            found = self._statistics(uses, params, outputs, curvature, r, factors)
            factors.learn(found, max(1 / group["updates"], 1 - MEMORY))
            group["blocks"] = factors.blocks
            if uses.rewritten:  # by other operations, and not to the last digit what differences have to start from
                outputs = objective.outputs(params)
        point = Point(objective, params, outputs.detach(), curvature, grad, value, penalty)
        if group["steps"] == 0 and self._is_free("damping"):
            self._calibrate(point, factors)
        damping = group["damping"] + penalty.curvature
        last = {name: self.state[p]["update"].to(p.dtype) for name, p in params.items() if "update" in self.state[p]}
        if fresh and factors.refresh(damping, STALE, grad):
            group["effective_dimension"] = float(factors.effective_dimension(damping))
        direction = penalty.keep(factors.direction(grad, damping))
        plane = [direction, last] if last else [direction]
        model = self._model(point, plane)
        fixed = [None if self._is_free(name) else group[name] for name in ("lr", "momentum")]
        step = model.minimiser(damping, fixed)
        group["steps"] += 1
        for _ in range(1 if self._is_free("damping") else SHORTER):
            update = tree.add(*zip(step, plane, strict=True))
            there, after = point.trial(update)
            if self._judge(after - value, model.value(step, penalty.curvature), value, terms):
                taken = {"lr": step[0], "momentum": step[1] if last else 0.0}
                group.update({name: c for name, c in taken.items() if self._is_free(name)})
                self._move(params, there, update)
                break
            step = [0.25 * c for c in step]
        else:
            self._reject(params)
        return self._given(loss)

    # -- parts of a step --------------------------------------------------------------------------------------------

    def _gradients(self, loss: Tensor, params: tree.Params, retain: bool) -> tree.Params:
        """Gradients in float32 at least and dense, left in ``.grad`` as they came."""
        found = torch.autograd.grad(loss, list(params.values()), retain_graph=retain, allow_unused=True)
        given = [torch.zeros_like(p) if g is None else g for p, g in zip(params.values(), found, strict=True)]
        grad = {name: g.to_dense() if g.is_sparse else g for name, g in zip(params, given, strict=True)}
        if self.replicas.size > 1:
            grad = {name: g.contiguous() for name, g in grad.items()}
            self.replicas.mean_(list(grad.values()))
            given = list(grad.values())
        for p, old, g in zip(params.values(), found, given, strict=True):
            p.grad = None if old is None else -g if self.param_groups[0]["maximize"] else g
        return grad

    @precise
    def _statistics(
        self, uses: Uses, params: tree.Params, outputs: Tensor, curvature: OutputCurvature, r: Tensor, factors: Factors
    ) -> Statistics:
        bases, max_dim = factors.bases(), self.param_groups[0]["max_dim"]

        def values(block: Block, pairs: Sequence[tuple[Use, Tensor]], batch: int) -> Tensor | None:
            return turned_squares(block, pairs, bases[block.weight], batch) if block.weight in bases else None

        patches = max(1, PATCHES // self.replicas.size)
        return statistics(uses, params, outputs, curvature, patches=patches, draw=r, values=values, max_dim=max_dim)

    def _model(self, point: Point, plane: Sequence[tree.Params]) -> QuadraticModel:
        """The quadratic model on the plane, by differences as long as they agree with exact products."""
        group = self.param_groups[0]
        exact = functools.partial(jvp, point.objective)
        quick = functools.partial(secant, point.objective, point.outputs)
        if point.outputs.dtype in (torch.bfloat16, torch.float16):
            group["products"] = "forward"
        elif group["steps"] % TRUSTED == 0:
            product = exact(plane[0])
            off, whole = self.replicas.mean(
                *torch.stack([(quick(plane[0]) - product).norm(), product.norm()]).square().tolist()
            )
            group["products"] = "differences" if off <= AGREE**2 * whole else "forward"
        along = quick if group["products"] == "differences" else exact
        model = quadratic_model(point.objective, point.curvature.product, point.grad, plane, along)
        rows = [model.slope, *model.curvature, *model.gram]
        entries = iter(self.replicas.mean(*chain(*rows)))
        slope, *square = [[next(entries) for _ in row] for row in rows]
        return QuadraticModel(slope, square[: len(plane)], square[len(plane) :])

    def _judge(self, change: float, promised: float, value: float, terms: float) -> bool:
        """Whether to take a step that changes the loss by ``change``, ``promised`` < 0 being expected; sets damping."""
        group = self.param_groups[0]
        if -promised <= 1e-6 * abs(value) and abs(change) <= 1e-5 * abs(value):
            return True  # converged to the precision of the loss: the ratio of two roundings says nothing
        if not (change <= 0 and math.isfinite(promised)):  # NaN is no descent either
            return False
        group["trust_ratio"] = change / promised
        wanted = min(SHARE * sum(p.numel() for p in group["params"]), MOST * terms)
        wanted = max(wanted, PER_TERM * terms)
        excess = max(group["effective_dimension"], 1.0) / wanted
        if group["trust_ratio"] < TRUST[0]:
            self._scale_damping(1 / GENTLE)
        elif group["trust_ratio"] > TRUST[1] or excess > 1:
            self._scale_damping(min(max(excess, FAST), 1 / FAST))
        return True

    def _scale_damping(self, factor: float) -> None:
        group = self.param_groups[0]
        if self._is_free("damping"):
            group["damping"] = min(max(factor * group["damping"], RANGE[0]), RANGE[1])

    def _move(self, params: tree.Params, there: tree.Params, update: tree.Params) -> None:
        group = self.param_groups[0]
        for name, p in params.items():
            p.copy_(there[name])
            if group["decoupled_weight_decay"]:
                p.mul_(1 - group["lr"] * group["weight_decay"])
            self.state[p]["update"] = update[name]

    def _reject(self, params: tree.Params) -> None:
        self.param_groups[0]["rejections"] += 1
        self._scale_damping(HARSH)
        for p in params.values():
            self.state[p].pop("update", None)  # the old direction led here

    def _calibrate(self, point: Point, factors: Factors) -> None:
        """Find the initial damping: try the first step by decades, without taking it, until the trust ratio settles."""
        group = self.param_groups[0]
        moved = 1.0
        for _ in range(CALIBRATION):
            damping = group["damping"] + point.penalty.curvature
            factors.refresh(damping)
            direction = point.penalty.keep(factors.direction(point.grad, damping))
            model = self._model(point, [direction])
            (step,) = model.minimiser(damping)
            promised = model.value([step], point.penalty.curvature)
            change = point.trial(tree.scale(step, direction))[1] - point.value
            ratio = change / promised if promised < 0 else math.nan
            move = 0.1 if ratio > TRUST[1] else 10.0 if not ratio >= TRUST[0] else 1.0
            if move == 1.0 or moved * move == 1.0:  # settled, or turning back
                return
            moved = move
            self._scale_damping(move)
