"""The exact Gauss-Newton step, solved in the smaller of two spaces: samples or parameters.

The damped step ``-(G + damping I)^{-1} g`` with ``G = J' H_L J`` is Levenberg-Marquardt; with the damping large it is
gradient descent, with none Gauss and Newton's own. Where a batch has fewer terms than the model has parameters the
same step is ``-J' R (K + damping I)^{-1} r`` with the Gram matrix ``K = R' J J' R`` of the samples, the form in
which minimal-norm Gauss-Newton, kernel natural gradient and stochastic reconfiguration (SPRING with ``momentum``) are
written. A factorisation is all that another damping costs, so a step tries several on its own batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hesse import tree
from hesse.curvature.gram import JacobianRows
from hesse.curvature.output import output_curvature
from hesse.curvature.samples import jacobian_rows
from hesse.curvature.uses import watch_uses
from hesse.optim.modelled import TRUST, Modelled, Place

__all__ = ["GaussNewton"]

LARGEST = 8192  # rows of the matrix that is factorised: half a gigabyte, and some minutes on one core
START = 0.1  # of the mean eigenvalue: the first damping tried
CALIBRATION = 12  # trials of the first step, by decades
TRIALS = 10  # dampings tried at a step, the larger ones after a rejection
SEARCH = 3  # smaller dampings tried after a success on a batch that comes again
SHRINK, GROW = 0.3, 3.0  # of the damping from one trial to the next
BEND = 0.75  # the longest acceleration, as a share of half the step (Transtrum and Sethna, 2012)
PROBE = 0.1  # of the step, to where the curving of the outputs is measured
RANGE = (1e-15, 1e12)  # of the damping, in mean eigenvalues


class GaussNewton(Modelled):
    """Levenberg-Marquardt on the exact Gauss-Newton matrix, for small batches and small models, with nothing to set.

    Made for regression and physics-informed networks, whose outputs are residuals (``mse_loss`` against zeros), in
    float64: tens of steps reach errors that first-order methods do not reach at all. Any loss works whose Hessian at
    the outputs has a root: those of torch.nn, and your own, of which the positive semidefinite part is taken.

    A step factorises the Gram matrix of the batch's samples, or the normal matrix of the parameters if that is smaller,
    and tries dampings until the loss falls. If the batch is the one of the last step it goes on to smaller ones while
    the loss falls further; if not, what the last step promised is compared with what it did to the new batch, which
    had no part in it. Each trial is bent along the geodesic: the outputs' second derivative along the step, from one
    more forward pass, is taken back by half.

    What it found is in ``param_groups[0]``: ``lr``, ``damping``, ``trust_ratio``, ``rejections``, ``steps``.

    Args:
        model: the module to train; its trainable parameters are optimised.
        lr: of the step, or None: 1.
        damping: fixed, or None: found. With it fixed a step that would raise the loss is shortened instead, and with
            both fixed every finite step is taken.
        momentum: share of the last step that a step starts from (SPRING, Goldshlager et al., 2024): it carries
            directions over that a batch says nothing about. For noisy batches; 0 is best where the batch is everything.
        weight_decay: adds ``weight_decay / 2 ||x||^2`` to the objective, its curvature to the matrix.
        l1: adds ``l1 ||x||_1``. Weights that cross zero stop there (orthant-wise, Andrew and Gao, 2007), and stay as
            long as the gradient is smaller than ``l1``.
        maximize: a loss that is concave in the outputs.

    Raises:
        TypeError: the first argument is not a module; or, at a step, the closure is not one of
            :func:`hesse.closure`, or its loss has no curvature.
        ValueError: no parameter is trainable, a setting is out of its range; or, at a step, the closure is of another
            model, samples and parameters are both too many, or a convex loss is to be maximised.

    References:
        Marquardt, An algorithm for least-squares estimation of nonlinear parameters, SIAM J. Appl. Math. 1963.
        Transtrum and Sethna, Improvements to the Levenberg-Marquardt algorithm, arXiv 1201.5885, 2012.
        Goldshlager, Abrahamsen and Lin, A Kaczmarz-inspired approach to accelerate the optimization of neural network
        wavefunctions, J. Comput. Phys. 2024.

    Example:
        Least squares is solved by one step, with more weights than data (the nearest solution) as with fewer:

        >>> import hesse
        >>> x, y = torch.tensor([[3.0, 4.0]]).double(), torch.tensor([[5.0]]).double()
        >>> model = nn.Linear(2, 1, bias=False).double()
        >>> _ = model.weight.data.zero_()
        >>> loss = GaussNewton(model).step(hesse.closure(model, nn.functional.mse_loss, (x, y)))
        >>> [round(w, 6) for w in model.weight[0].tolist()]
        [0.6, 0.8]
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float | None = None,
        damping: float | None = None,
        *,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        l1: float = 0.0,
        maximize: bool = False,
    ) -> None:
        settings = {
            "lr": 1.0,
            "damping": 1.0,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "l1": l1,
            "maximize": maximize,
            "trust_ratio": 1.0,
            "promised": 0.0,
            "value": math.inf,
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
        given = self._objective_of(closure)
        objective = self._to_minimise(given)
        group = self.param_groups[0]
        point = self._point(objective)
        with self._live(objective, point) as moved:
            with torch.enable_grad(), watch_uses(point) as uses:
                outputs = objective.run_model()
                loss = objective.loss_fn(outputs, objective.targets)
            found = self._gradient(loss, point, outputs)
            if found is not None:
                curvature = output_curvature(objective.loss_fn, outputs, objective.targets)
                rows = jacobian_rows(objective, point, uses, outputs, curvature)
                place = self._place(objective, point, float(loss), found)
                solver = _Solver(rows, outputs, point, place)
        if found is None:
            group["rejections"] += 1
            return self._given(loss)
        self._move_buffers(moved)
        same = self._is_same(place)
        self._judge_by_this_batch(place, same)
        step = self._search(solver, place, same or group["steps"] == 0)
        group["steps"] += 1
        if step is None:
            group["rejections"] += 1
            group["value"] = place.value
            self._forget()
        else:
            group["lr"], group["promised"], group["value"] = step.lr, step.promised, step.value
            self._take(place, step.x)
        return self._given(loss)

    def _search(self, solver: _Solver, place: Place, greedy: bool) -> _Trial | None:
        """The best of the steps tried, or None if none is better than to stay; sets the damping."""
        group = self.param_groups[0]
        first = group["steps"] == 0 and self._is_free("damping")
        if first:
            group["damping"] = START * solver.scale
        damping, lr = group["damping"], 1.0 if self._is_free("lr") else group["lr"]
        momentum = self._last(place) if group["momentum"] else None
        best, failed = None, False
        for _ in range(TRIALS):
            trial = self._try(solver, place, damping, lr, momentum)
            if trial is not None and (trial.value < place.value or self._forced(trial) or trial.is_level(place)):
                best = trial
                break
            failed = True
            if not self._is_free("damping"):
                lr /= GROW
            else:
                damping *= 10 if first else GROW
            momentum = None
        if best is None:
            if self._is_free("damping"):
                group["damping"] = min(damping, RANGE[1] * solver.scale)
            return None
        if greedy and not failed and self._is_free("damping") and not best.is_level(place):
            least = RANGE[0] * solver.scale
            for _ in range(CALIBRATION if first else SEARCH):
                smaller = max(damping * (0.1 if first else SHRINK), least)
                trial = self._try(solver, place, smaller, lr, momentum) if smaller < damping else None
                if trial is None or not trial.value < best.value:
                    break
                best, damping = trial, smaller
        if self._is_free("damping"):
            if best.promised > 0 and not best.is_level(place):
                group["trust_ratio"] = (place.value - best.value) / best.promised
                damping *= 2.0 if group["trust_ratio"] < TRUST[0] else 1.0
            group["damping"] = damping
        return best

    def _forced(self, trial: _Trial) -> bool:
        """Whether a step is taken as it is, since nothing about it is free to be found."""
        return not (self._is_free("lr") or self._is_free("damping")) and math.isfinite(trial.value)

    def _try(self, solver: _Solver, place: Place, damping: float, lr: float, last: Tensor | None) -> _Trial | None:
        """The step at that damping, with what the loss makes of it; None if it cannot be computed."""
        decay = self.param_groups[0]["weight_decay"]
        if not solver.factor(damping + decay):
            return None
        v, curved = solver.step(decay, None if last is None else self.param_groups[0]["momentum"] * last)
        v, curved = lr * v, lr * curved
        promised = -float(place.slope @ v + 0.5 * solver.energy(v, curved) + 0.5 * decay * (v @ v))
        bend = solver.bend((place.outputs_at(PROBE * v) - solver.outputs) / PROBE, curved)
        if 2 * float(bend.norm()) <= BEND * float(v.norm()):  # False for a NaN
            v = v + bend
        value, x = place.trial(v)
        return _Trial(value, x, promised, lr)


class _Trial(NamedTuple):
    """A step that was tried: the value it leads to, the parameters there, the decrease its model promised."""

    value: float
    x: Tensor
    promised: float
    lr: float

    def is_level(self, place: Place) -> bool:
        """Whether nothing is left to gain but roundings."""
        noise = 10 * place.close * abs(place.value)
        return self.promised <= noise and abs(self.value - place.value) <= 10 * noise


class _Solver:
    """``(G + damping I)^{-1}`` at one batch by Cholesky in float64, in the space of samples or of parameters.

    In the first a right-hand side is ``(R'J)' r + e``, with r in samples, and only e needs the other inverse
    ``(e - (R'J)' (K + damping I)^{-1} (R'J) e) / damping``, which loses digits as the damping falls.
    """

    def __init__(self, rows: JacobianRows, outputs: Tensor, point: tree.Params, place: Place) -> None:
        self.rows, self.graph, self.point, self.place = rows, outputs, point, place
        self.outputs = outputs.detach().double()
        samples, parameters = rows.root.size, rows.layout.size
        self.in_samples = samples <= parameters
        if min(samples, parameters) > LARGEST:
            raise ValueError(
                f"GaussNewton factorises a matrix of as many rows as the batch has samples (terms times outputs), "
                f"{samples} here, or the model parameters, {parameters}; it does up to {LARGEST}. Take a smaller "
                "batch, or an optimiser that needs no such matrix: NewtonCG, KFAC."
            )
        self.held = rows.dense() * place.free if place.free is not None else None
        d = self.held
        self.e: Tensor | None = None
        if self.in_samples:
            self.matrix = rows.gram() if d is None else d @ d.mT
            self.r, left = rows.root.solve(place.at_outputs)
            tiny = 100 * place.close * float(place.at_outputs.norm())
            rest = self.back(left) if float(left.norm()) > tiny else torch.zeros_like(place.slope)
            # What is no gradient of the loss: weight decay and the slope of l1.
            pulls = rest + place.slope - place.gradient
            pulls = pulls if place.free is None else pulls * place.free
            self.e = pulls if bool(pulls.any()) else None
        else:
            self.matrix = rows.normal() if d is None else d.mT @ d
        mean = float(self.matrix.diagonal().mean())
        self.scale = mean if 0 < mean < math.inf else 1.0
        self.cholesky = self.matrix

    def factor(self, damping: float) -> bool:
        """Factorise at that damping; whether it could be done."""
        damped = self.matrix.clone()
        damped.diagonal().add_(damping)
        self.cholesky, info = torch.linalg.cholesky_ex(damped)
        self.damping = damping
        return int(info) == 0 and bool(self.cholesky.diagonal().isfinite().all())

    def step(self, decay: float, last: Tensor | None) -> tuple[Tensor, Tensor]:
        """``v = -(G + damping I)^{-1} g`` and what G makes of it: ``R'J v`` in samples, ``G v`` in parameters.

        With ``last`` the step from there: damping pulls towards it in place of 0.
        """
        if not self.in_samples:
            x = self._inverse(
                self.place.slope if last is None else self.place.slope + (self.matrix @ last + decay * last)
            )
            v = -x if last is None else last - x
            return v, self.matrix @ v
        image = None if last is None else self._times(last)
        r = self.r if image is None else self.r + image
        extra = None if last is None or not decay else decay * last
        e = extra if self.e is None else self.e if extra is None else self.e + extra
        x, found = self._in_samples(r, e)
        return (-x, -found) if last is None or image is None else (last - x, image - found)

    def energy(self, v: Tensor, curved: Tensor) -> Tensor:
        """``v'Gv``."""
        return curved @ curved if self.in_samples else v @ curved

    def bend(self, change: Tensor, curved: Tensor) -> Tensor:
        """``-(G + damping I)^{-1} J' H_L o'' / 2``, with o'' the outputs' second derivative along v: twice what
        ``change``, the mean slope of the outputs over the probe, is more than J v, over the probe's length."""
        samples = self.rows.root.to_samples(change)
        if self.in_samples:
            return -self._in_samples((samples - curved) / PROBE, None)[0]
        return -self._inverse((self.back(self.rows.root.to_outputs(samples)) - curved) / PROBE)

    def back(self, u: Tensor) -> Tensor:
        """``J' u`` [n]."""
        grads = torch.autograd.grad(
            self.graph, list(self.point.values()), u.to(self.graph.dtype), retain_graph=True, materialize_grads=True
        )
        flat = torch.cat([g.flatten().double() for g in grads])
        return flat if self.place.free is None else flat * self.place.free

    def _in_samples(self, r: Tensor, e: Tensor | None) -> tuple[Tensor, Tensor]:
        """``x = (G + damping I)^{-1} ((R'J)' r + e)`` and ``R'J x``."""
        w = self._inverse(r)
        curved = self.matrix @ w
        if e is None:
            return self.back(self.rows.root.to_outputs(w)), curved
        u = self._inverse(self._times(e))
        return self.back(self.rows.root.to_outputs(w - u / self.damping)) + e / self.damping, curved + u

    def _times(self, v: Tensor) -> Tensor:
        return self.rows.times(v) if self.held is None else self.held @ v

    def _inverse(self, rhs: Tensor) -> Tensor:
        return torch.cholesky_solve(rhs[:, None], self.cholesky)[:, 0]
