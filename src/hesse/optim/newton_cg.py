"""Hessian-free optimisation: the Gauss-Newton step by conjugate gradients, from products alone.

``(G + damping I) d = -g`` is solved as far as it pays. A product ``G v`` costs about as much as a gradient, on the
graph that the step keeps; no matrix is formed. One product and no more is gradient descent with an exact step size,
as many as it takes is Levenberg-Marquardt. The damping keeps d where the quadratic model holds, the start from the
last solution carries work over from step to step, and what the iteration overdid is taken back: first along its own
iterates, then along the line.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hesse import tree
from hesse.curvature.jacobian import JACOBIANS, Jacobian
from hesse.curvature.output import OutputCurvature, output_curvature
from hesse.objective import Objective
from hesse.optim.modelled import TRUST, Modelled, Place

__all__ = ["NewtonCG", "conjugate_gradients"]

PRODUCTS = 100  # of G at a step, at most
PROGRESS = 5e-4  # of the model's value an iterate: below it the next ones are not worth their products (Martens)
WINDOW = 10  # iterates over which progress is measured, or a tenth of those made
SPACING = 1.3  # from one iterate that is kept to the next
DECAY = 0.95  # of the last solution, to start from
POWER = 0.75  # of the preconditioner's diagonal (Martens)
MEMORY = 0.9  # of that diagonal, in steps
DROP, LEAP, SURE = 4.0, 0.1, 0.95  # on the same batch: its change by the trust ratio, and one of its own near 1
CALIBRATION = 12  # decades of damping tried at most on the first batch
ARMIJO = 1e-2  # share of the slope's promise that a step must keep
BACKWARD, HALVINGS = 0.5, 12  # of the line search
RANGE = (1e-12, 1e8)  # of the damping


class NewtonCG(Modelled):
    """Hessian-free optimisation (truncated Gauss-Newton), with nothing to set.

    For full batches and large ones, where a good direction is worth tens of products: deep networks without noise,
    logistic regression, recurrent networks over long times. Every layer and every parameter counts, however it is
    used; memory is a few vectors. The damping obeys the trust ratio, on the batch itself if it is the one of the last
    step, else by what the last step did to the new batch. The first batch calibrates it.

    A loss of your own that is not convex in the outputs may show negative curvature: conjugate gradients stop there
    with what they have, at first with the preconditioned gradient.

    What it found is in ``param_groups[0]``: ``lr`` (of the line search), ``damping``, ``trust_ratio``, ``products``
    (of the last step), ``rejections``, ``steps``.

    Args:
        model: the module to train; its trainable parameters are optimised.
        lr: of the step, or None: found by the line search. With it fixed no iterate is taken back.
        damping: fixed, or None: found.
        max_products: products with the Gauss-Newton matrix at a step, at most.
        weight_decay: adds ``weight_decay / 2 ||x||^2`` to the objective, its curvature to the matrix.
        l1: adds ``l1 ||x||_1``. Weights that cross zero stop there (orthant-wise, Andrew and Gao, 2007), and stay as
            long as the gradient is smaller than ``l1``.
        maximize: a loss that is concave in the outputs.

    Raises:
        TypeError: the first argument is not a module; or, at a step, the closure is not one of
            :func:`hesse.closure`, or its loss has no curvature.
        ValueError: no parameter is trainable, a setting is out of its range; or, at a step, the closure is of another
            model, or a convex loss is to be maximised.

    References:
        Martens, Deep learning via Hessian-free optimization, ICML 2010.
        Martens and Sutskever, Training deep and recurrent networks with Hessian-free optimization, 2012.

    Example:
        Linear regression on badly scaled inputs:

        >>> import hesse
        >>> _ = torch.manual_seed(0)
        >>> x = torch.randn(64, 3) * torch.tensor([1.0, 10.0, 100.0])
        >>> y = x @ torch.tensor([[1.0], [2.0], [3.0]])
        >>> model = nn.Linear(3, 1)
        >>> optimizer = NewtonCG(model)
        >>> for _ in range(10):
        ...     loss = optimizer.step(hesse.closure(model, nn.functional.mse_loss, (x, y)))
        >>> [round(w, 4) for w in model.weight[0].tolist()]
        [1.0, 2.0, 3.0]
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float | None = None,
        damping: float | None = None,
        *,
        max_products: int = PRODUCTS,
        weight_decay: float = 0.0,
        l1: float = 0.0,
        maximize: bool = False,
    ) -> None:
        if not max_products >= 1:
            raise ValueError(f"max_products must be at least 1; got {max_products}.")
        settings = {
            "lr": 1.0,
            "damping": 1.0,
            "max_products": max_products,
            "weight_decay": weight_decay,
            "l1": l1,
            "maximize": maximize,
            "trust_ratio": 1.0,
            "promised": 0.0,
            "value": math.inf,
            "products": 0,
            "rejections": 0,
            "steps": 0,
        }
        super().__init__(model, settings, {"lr": lr, "damping": damping})

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
        objective = self._to_minimise(self._objective_of(closure))
        group = self.param_groups[0]
        point = self._point(objective)
        with self._live(objective, point) as moved:
            with torch.enable_grad():
                outputs = objective.run_model()
                loss = objective.loss_fn(outputs, objective.targets)
            found = self._gradient(loss, point, outputs)
            if found is not None:
                curvature = output_curvature(objective.loss_fn, outputs, objective.targets)
                place = self._place(objective, point, float(loss), found)
                solver = _Solver(objective, place, outputs, curvature, group["weight_decay"])
                diagonal = self._diagonal(place, solver, curvature)
                self._judge_by_this_batch(place, self._is_same(place))
                if group["steps"] == 0 and self._is_free("damping"):
                    self._calibrate(place, solver, diagonal)
                start = self._last(place)
                path = self._solve(place, solver, diagonal, start, group["max_products"])
        if found is None:
            group["rejections"] += 1
            return self._given(loss)
        self._move_buffers(moved)
        same = group["steps"] == 0 or self._is_same(place)
        group["steps"] += 1
        group["products"] = solver.products
        self._advance(place, path, same)
        return self._given(loss)

    def _solve(self, place: Place, solver: _Solver, diagonal: Tensor | None, start: Tensor | None, limit: int) -> Path:
        """The iterates at the present damping, in the space that l1 leaves free."""
        damping = self.param_groups[0]["damping"]
        free = 1.0 if place.free is None else place.free.to(solver.dtype)

        def multiply(v: Tensor) -> Tensor:
            return free * (solver.multiply(v) + damping * v)

        def precondition(r: Tensor) -> Tensor:
            return r if diagonal is None else r / (diagonal + damping) ** POWER

        x = None if start is None else free * (DECAY * start).to(solver.dtype)
        return conjugate_gradients(multiply, -place.slope.to(solver.dtype), x, precondition, limit)

    def _advance(self, place: Place, path: Path, same: bool) -> None:
        """Take the best of the iterates, if it is better than to stay, and set the damping."""
        group = self.param_groups[0]
        free_damping, free_lr = self._is_free("damping"), self._is_free("lr")
        d, promised = path.iterates[-1].double(), self._promised(path, -1)
        lr = 1.0 if free_lr else group["lr"]
        value, x = place.trial(lr * d)
        noise = 10 * place.close * abs(place.value)
        if not (math.isfinite(promised) and promised <= noise and abs(value - place.value) <= 10 * noise):
            ratio = (place.value - value) / promised if promised > 0 else -math.inf
            if free_lr:
                for i in range(len(path.iterates) - 2, -1, -1):
                    before, y = place.trial(path.iterates[i].double())
                    if not (before < value or math.isnan(value)):
                        break
                    d, value, x, promised = path.iterates[i].double(), before, y, self._promised(path, i)
                slope = float(place.slope @ d)
                for _ in range(HALVINGS):
                    if value <= place.value + ARMIJO * lr * min(slope, 0.0):
                        break
                    lr *= BACKWARD
                    value, x = place.trial(lr * d)
            if not (value < place.value or (math.isfinite(value) and not (free_lr or free_damping))):
                group["rejections"] += 1
                group["value"] = place.value
                if free_damping:
                    group["damping"] = min(DROP * group["damping"], RANGE[1])
                self._forget()
                return
            if same:
                group["trust_ratio"] = -math.inf if math.isnan(ratio) else ratio
                if free_damping and not ratio >= TRUST[0]:
                    group["damping"] = min(DROP * group["damping"], RANGE[1])
                elif free_damping and ratio > TRUST[1]:
                    group["damping"] = max(group["damping"] * (LEAP if ratio > SURE else 1 / DROP), RANGE[0])
        group["lr"], group["promised"], group["value"] = lr, lr * (2 - lr) * promised, value
        self._take(place, x)

    def _promised(self, path: Path, i: int) -> float:
        """By how much the undamped model falls at an iterate."""
        d = path.iterates[i].double()
        return -path.values[i] + 0.5 * self.param_groups[0]["damping"] * float(d @ d)

    def _calibrate(self, place: Place, solver: _Solver, diagonal: Tensor | None) -> None:
        """Find the initial damping: try first steps by decades, without taking them, until the trust ratio settles."""
        group = self.param_groups[0]
        g = place.slope.to(solver.dtype)
        along = float(torch.sum(g * solver.multiply(g), dtype=torch.float64) / torch.sum(g * g, dtype=torch.float64))
        group["damping"] = min(max(along, RANGE[0]), RANGE[1]) if along > 0 else 1.0
        moved = 1.0
        for _ in range(CALIBRATION):
            path = self._solve(place, solver, diagonal, None, min(2 * WINDOW, group["max_products"]))
            promised = self._promised(path, -1)
            value, _ = place.trial(path.iterates[-1].double())
            ratio = (place.value - value) / promised if promised > 0 else math.nan
            move = 0.1 if ratio > TRUST[1] else 10.0 if not ratio >= TRUST[0] else 1.0
            if move == 1.0 or moved * move == 1.0:  # settled, or turning back
                return
            moved = move
            group["damping"] = min(max(move * group["damping"], RANGE[0]), RANGE[1])

    def _diagonal(self, place: Place, solver: _Solver, curvature: OutputCurvature) -> Tensor | None:
        """The running mean of the curvature's diagonal, one random sample a step; None for a loss without samples.

        The mean of squares of sampled gradients is the diagonal of G itself; those of the data's own gradients, which
        Martens takes, are the empirical Fisher's, and vanish with the residuals.
        """
        group = self.param_groups[0]
        generator = torch.Generator(solver.outputs.device).manual_seed(group["steps"])
        try:
            r = curvature.draw(generator)
        except ValueError:  # a loss of one's own with too many outputs, or one that couples examples: products only
            return None
        sample = curvature.weight * solver.back(r).square()
        live = self._params()
        weight = max(1 / (group["steps"] + 1), 1 - MEMORY)
        found = []
        for name, part in place.layout.split(sample).items():
            state = self.state[live[name]]
            state["diagonal"] = state["diagonal"].lerp(part, weight) if "diagonal" in state else part.clone()
            found.append(state["diagonal"].flatten())
        return torch.cat(found) + group["weight_decay"]


class _Solver:
    """Products with ``G + decay I`` at one batch, on flat vectors in the precision of the parameters."""

    def __init__(
        self, objective: Objective, place: Place, outputs: Tensor, curvature: OutputCurvature, decay: float
    ) -> None:
        self.place, self.outputs, self.curvature, self.decay = place, outputs, curvature, decay
        self.dtype = next(iter(place.point.values())).dtype
        self.jacobian = _jacobian(objective, place.point, outputs)
        self.products = 0

    def multiply(self, v: Tensor) -> Tensor:
        """``(G + decay I) v``."""
        self.products += 1
        (u,) = self.jacobian.apply(self.place.layout.split(v))
        return self.back(self.curvature.product(u)) + self.decay * v

    def back(self, u: Tensor) -> Tensor:
        """``J' u`` [n]."""
        grads = torch.autograd.grad(
            self.outputs, list(self.place.point.values()), u.to(self.outputs), retain_graph=True, materialize_grads=True
        )
        return torch.cat([g.flatten().to(self.dtype) for g in grads])


def _jacobian(objective: Objective, point: tree.Params, outputs: Tensor) -> Jacobian:
    """``v -> J v`` from the kept graph, or by dual numbers where an operation cannot be differentiated twice."""
    try:
        return JACOBIANS["double-backward"](objective, point, outputs)
    except (NotImplementedError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        return JACOBIANS["forward"](objective, point, outputs)


class Path(NamedTuple):
    """Some of the iterates of conjugate gradients, the last among them, and the model's value at each."""

    iterates: list[Tensor]
    values: list[float]


def conjugate_gradients(
    multiply: Callable[[Tensor], Tensor],
    b: Tensor,
    start: Tensor | None,
    precondition: Callable[[Tensor], Tensor],
    limit: int,
    progress: float = PROGRESS,
) -> Path:
    """Minimise ``m(x) = x'Ax / 2 - b'x`` until an iterate gains less than ``progress`` of the value reached.

    Args:
        multiply: ``x -> A x``, A symmetric; where it shows negative curvature the iteration ends.
        b: [n].
        start: where to begin; zero if None, and if its value is above that of zero.
        precondition: ``r -> P r``, P symmetric positive definite.
        limit: products at most, at least 1.
        progress: Martens' measure: over the last k iterates m may fall by no less than ``k progress |m|``.

    Returns:
        Iterates at numbers that grow like powers of 1.3, with their values; the last is the last.

    Example:
        >>> A = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
        >>> path = conjugate_gradients(lambda x: A @ x, torch.tensor([3.0, 3.0]), None, lambda r: r, 10)
        >>> path.iterates[-1], path.values[-1]
        (tensor([1., 1.]), -3.0)
    """
    x, r, spent = torch.zeros_like(b), b.clone(), 0
    if start is not None and limit > 1 and bool(start.any()):
        left = b - multiply(start)
        spent = 1
        if -0.5 * _dot(start, b + left) < 0:
            x, r = start.clone(), left
    iterates: list[Tensor] = []
    values: list[float] = []
    history = [-0.5 * _dot(x, b + r)]
    z = precondition(r)
    p, rz = z.clone(), _dot(r, z)
    kept, done = 1.0, 0
    while spent < limit and rz > 0:
        Ap = multiply(p)
        spent += 1
        curvature = _dot(p, Ap)
        if not (curvature > 0 and math.isfinite(curvature)):
            if not x.any():
                x = p.clone()  # nothing better is known than the slope; its length is left to the line search
            break
        x = x + (rz / curvature) * p
        r = r - (rz / curvature) * Ap
        done += 1
        history.append(-0.5 * _dot(x, b + r))
        if done >= kept:
            iterates.append(x)
            values.append(history[-1])
            kept = max(SPACING * kept, done + 1)
        k = max(WINDOW, math.ceil(0.1 * done))
        if done >= k and history[-1] < 0 and history[-1 - k] - history[-1] < k * progress * -history[-1]:
            break
        z = precondition(r)
        rz, before = _dot(r, z), rz
        p = z + (rz / before) * p
    if not iterates or iterates[-1] is not x:
        iterates.append(x)
        values.append(-0.5 * _dot(x, b + r) if done or not x.any() else -0.5 * _dot(x, b))
    return Path(iterates, values)


def _dot(x: Tensor, y: Tensor) -> float:
    return float(torch.sum(x * y, dtype=torch.float64))
