"""How far along a direction, found by trying: a line search on the loss of the batch at hand.

Any optimiser gives a direction d, its own step. The loss along it falls at first with slope g'd, and a step of t d is
long enough not to be timid and short enough to be trusted when the loss falls by a fraction c of what the slope
promises (Armijo, 1966); t shrinks until it does. With SGD of lr 1 this is the stochastic line search of Vaswani et al.
(2019), which converges as fast as gradient descent does when the model can fit all the data; with torch's Adam, Adam
whose learning rate is only a first guess.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hesse.objective import purity
from hesse.optim.base import Base, all_finite, closure_inside, wide
from hesse.optim.diagonal import alone, dense, mean
from hesse.optim.modelled import loss_at

__all__ = ["LineSearch"]

TRIALS = 100  # as many at most: 0.9^100 is 3e-5


class LineSearch(Base):
    """A stochastic Armijo line search around another optimiser.

    ``step`` computes the gradient g, lets the optimiser take its step d at its own lr, and moves by t d with the first
    t of ``t0, beta t0, beta^2 t0, ...`` for which the batch's loss falls enough::

        f(x + t d) <= f(x) + c t g'd

    The first search begins at ``initial``, a later one by one of the rules of the paper: 0, where the last one ended;
    1, at ``initial`` again; 2, at ``gamma^(1 / batches)`` times where the last one ended, so that t can grow by
    ``gamma`` in an epoch.

    The penalties that the optimiser itself minimises count as part of f: ``weight_decay / 2 |x|^2`` and ``l1 |x|_1``
    of its groups; with ``maximize`` it is -f. Where d is no descent direction (momentum may point uphill on a new
    batch) the search goes along the steepest descent instead, as long as d, so that the loss of the batch never
    rises. Where no t will do, or the loss or gradient is not finite, the parameters stay, and ``rejections`` counts.

    ``param_groups[i]["step_size"]`` is the t that was found, ``searches`` how many have found one. The groups and the
    state are the inner optimiser's own: learning-rate schedulers, ``state_dict`` and ``add_param_group`` act on both.

    Trials evaluate ``closure.objective`` of a :func:`hesse.closure`: no backward pass, the random numbers of the first
    evaluation, buffers untouched. A plain closure is called again, backward pass and all, with the same random numbers
    of torch's generators, and its gradients are put away; what else it does (running statistics of BatchNorm) happens
    again at each trial. Under ``DistributedDataParallel`` the loss is the mean over the processes, which then all find
    the same step.

    Args:
        optimizer: any that steps on gradients: torch's SGD, Adam, AdamW, ours.
        c: fraction of the promised decrease that is enough, above 0, below 1. 0.1 for networks, 0.5 for convex losses.
        beta: factor from one trial to the next, above 0, below 1.
        gamma: growth of the step in an epoch, at least 1, for rule 2.
        batches: of an epoch, for rule 2.
        initial: the first t, and for rule 1 the first of every search.
        reset: 0, 1 or 2.

    Raises:
        TypeError: the first argument is no optimiser; or, at a step, there is no closure, or it returns no loss.
            Without a closure and without gradients nothing happens, which is how frameworks ask for a state.
        ValueError: a setting is out of its range.

    References:
        Armijo, Minimization of functions having Lipschitz continuous first partial derivatives, Pacific J. Math. 1966.
        Vaswani, Mishkin, Laradji, Schmidt, Gidel and Lacoste-Julien, Painless stochastic gradient: interpolation,
        line-search, and convergence rates, NeurIPS 2019.

    Example:
        On 50 w^2 gradient descent goes down enough with steps up to 0.02 (1 - c); the first of 1, 1/2, 1/4, ... that is
        as short is 1/64:

        >>> import hesse
        >>> model = nn.Linear(1, 1, bias=False)
        >>> _ = nn.init.ones_(model.weight)
        >>> optimizer = LineSearch(torch.optim.SGD(model.parameters(), lr=1.0), beta=0.5)
        >>> loss_fn = lambda outputs, _: 50 * outputs.square().sum()
        >>> loss = optimizer.step(hesse.closure(model, loss_fn, (torch.ones(1, 1), None)))
        >>> optimizer.param_groups[0]["step_size"] == 1 / 64
        True
    """

    optimizer: torch.optim.Optimizer

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        c: float = 0.1,
        beta: float = 0.9,
        gamma: float = 2.0,
        batches: int = 500,
        initial: float = 1.0,
        reset: int = 2,
    ) -> None:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(
                f"LineSearch goes around an optimiser; got {type(optimizer).__name__}. Write "
                "LineSearch(torch.optim.SGD(model.parameters(), lr=1.0))."
            )
        for name, value in (("c", c), ("beta", beta)):
            if not 0 < value < 1:
                raise ValueError(f"Invalid {name}: {value}. It has to be above 0 and below 1.")
        if not (0 < initial < math.inf and 1 <= gamma < math.inf and batches >= 1):
            raise ValueError(
                f"Invalid initial, gamma or batches: {initial}, {gamma}, {batches}. initial has to be above 0, gamma "
                "and batches at least 1, and all finite."
            )
        if reset not in (0, 1, 2):
            raise ValueError(f"Invalid reset: {reset}. It is 0 (go on), 1 (begin anew) or 2 (go on, growing).")
        self.optimizer = optimizer
        self.c, self.beta, self.initial = c, beta, initial
        self.growth = gamma ** (1 / batches) if reset == 2 else 1.0
        self.anew = reset == 1
        groups, state = optimizer.param_groups, optimizer.state
        try:
            super().__init__(groups, {"step_size": initial, "searches": 0, "rejections": 0})  # empties both
        finally:
            self.param_groups, self.state = groups, state

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Those of the inner optimiser, the same objects."""
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.optimizer.param_groups = groups

    @property
    def state(self) -> Any:
        """That of the inner optimiser, the same object."""
        return self.optimizer.state

    @state.setter
    def state(self, state: Any) -> None:
        self.optimizer.state = state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As the inner optimiser's, with its checks and its defaults."""
        self.optimizer.add_param_group(param_group)
        group = self.param_groups.pop()
        if self.param_groups:
            for name in self.defaults:  # one search moves all groups
                group.setdefault(name, self.param_groups[0][name])
        super().add_param_group(group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step of the inner optimiser, as long as the search finds right.

        Args:
            closure: computes the loss and the gradients and returns the loss; best one of :func:`hesse.closure`.

        Returns:
            The loss before the step, as the closure gave it.
        """
        params = [p for group in self.param_groups for p in group["params"]]
        if closure is None:
            self._begin(params)
            return None
        own = isinstance(self.optimizer, Base)  # ours call the closure themselves, and leave all as it is at a NaN
        counts = [group["rejections"] for group in self.param_groups]
        random = purity.random_state(nn.ParameterList(params))
        old = [p.detach().clone() for p in params]
        if own:
            loss = self.optimizer.step(closure)
        else:
            with torch.enable_grad():
                loss = closure()
        if loss is None:
            raise TypeError("LineSearch compares losses; the closure has to return the loss, and returned None.")
        inside = closure_inside(closure)
        value = loss.detach() if isinstance(loss, Tensor) else torch.tensor(float(loss))
        start = float(value if inside is None else mean(inside.model, value))
        slopes = [dense(p.grad) if p.grad is not None else None for p in params]
        if not (math.isfinite(start) and all_finite([g for g in slopes if g is not None])):
            self._reject(params, old, counts)
            return loss
        if not own:
            self.optimizer.step()
        if all(g is None for g in slopes):
            return loss

        merit = self._merit(start, old)
        directions = [wide(p) - wide(x) for p, x in zip(params, old, strict=True)]
        slope = self._slope(slopes, old, directions)
        if not slope < 0:
            directions = self._steepest(slopes, old, directions)
            slope = self._slope(slopes, old, directions)
        found = self._search(params, old, directions, merit, slope, lambda: self._again(closure, params, random))
        if found is None:
            self._reject(params, old, counts)
            return loss
        for group in self.param_groups:
            group["step_size"] = found
            group["searches"] += 1
        return loss

    def _search(
        self,
        params: list[Tensor],
        old: list[Tensor],
        directions: list[Tensor],
        value: float,
        slope: float,
        evaluate: Callable[[], float],
    ) -> float | None:
        """The step size at which the merit has fallen enough, with the parameters there; None if there is none."""
        if not slope < 0:  # a stationary point, or a NaN
            return None
        first = self.param_groups[0]
        t = self.initial if self.anew or first["searches"] == 0 else first["step_size"] * self.growth
        for _ in range(TRIALS):
            for p, x, d in zip(params, old, directions, strict=True):
                p.copy_(wide(x) + t * d)
            if self._merit(evaluate(), params) <= value + self.c * t * slope:  # a NaN is not
                return float(t)
            t *= self.beta
        return None

    def _again(self, closure: Callable[[], Any], params: list[Tensor], random: purity.RandomState) -> float:
        """The loss where the parameters are now, with the random numbers of the first evaluation."""
        inside = closure_inside(closure)
        if inside is not None:
            with alone(inside.model):
                return float(mean(inside.model, loss_at(inside.objective, inside.objective.params)))
        grads, current = [p.grad for p in params], purity.random_state(nn.ParameterList(params))
        purity.set_random_state(random)
        torch.clear_autocast_cache()  # of weights as they were at the last trial
        try:
            for p in params:
                p.grad = None
            with torch.enable_grad():
                loss = closure()
            return float(loss.detach() if isinstance(loss, Tensor) else loss)
        finally:
            purity.set_random_state(current)
            for p, grad in zip(params, grads, strict=True):
                p.grad = grad

    def _merit(self, loss: float, params: Sequence[Tensor]) -> float:
        """What is minimised: the loss, or its negative, and the penalties of the groups."""
        total, values = loss * self._sign, iter(params)
        for group in self.param_groups:
            x = [next(values) for _ in group["params"]]
            if decay := float(group.get("weight_decay", 0.0)):
                total += decay / 2 * sum(float(v.double().square().sum()) for v in x)
            if l1 := float(group.get("l1", 0.0)):
                total += l1 * sum(float(v.double().abs().sum()) for v in x)
        return total

    def _slope(self, grads: Sequence[Tensor | None], old: Sequence[Tensor], directions: Sequence[Tensor]) -> float:
        """Of the merit along the directions; of its L1 part, what a whole step changes, which is no less."""
        total, values = torch.zeros((), dtype=torch.float64), iter(zip(grads, old, directions, strict=True))
        for group in self.param_groups:
            decay, l1 = float(group.get("weight_decay", 0.0)), float(group.get("l1", 0.0))
            for _ in group["params"]:
                g, x, d = next(values)
                x, d = x.double(), d.double()
                change = decay * (x * d).sum() + l1 * ((x + d).abs().sum() - x.abs().sum())
                if g is not None:
                    change = change + self._sign * (g.double() * d).sum()
                total = total + change.to(total.device)
        return float(total)

    def _steepest(
        self, grads: Sequence[Tensor | None], old: Sequence[Tensor], directions: Sequence[Tensor]
    ) -> list[Tensor]:
        """The steepest descent of loss and weight decay, as long as ``directions``."""
        found, values = [], iter(zip(grads, old, directions, strict=True))
        for group in self.param_groups:
            decay = float(group.get("weight_decay", 0.0))
            for _ in group["params"]:
                g, x, d = next(values)
                found.append(torch.zeros_like(d) if g is None else -self._sign * g - decay * wide(x))
        length, wanted = (
            math.sqrt(sum(float(v.double().square().sum()) for v in tree)) for tree in (found, directions)
        )
        factor = wanted / length if length > 0 else 0.0
        return [factor * v for v in found]

    @property
    def _sign(self) -> float:
        return -1.0 if self.param_groups[0].get("maximize", False) else 1.0

    def _reject(self, params: list[Tensor], old: list[Tensor], counts: list[int]) -> None:
        for p, x in zip(params, old, strict=True):
            p.copy_(x)
        for group, count in zip(self.param_groups, counts, strict=True):
            group["rejections"] = count + 1  # the inner optimiser may have counted the same one

    def _begin(self, params: list[Tensor]) -> None:
        """A step without a closure: states begin where gradients are zero, and nothing moves."""
        grads = [p.grad for p in params if p.grad is not None]
        if not grads:
            return
        if any(bool(dense(g).any()) for g in grads):
            raise TypeError(
                "LineSearch.step needs a closure: gradients alone do not say how long a step may be. Write "
                "optimizer.step(hesse.closure(model, loss_fn, (inputs, targets))) instead of backward() and step()."
            )
        old = [p.detach().clone() for p in params]
        self.optimizer.step()
        for p, x in zip(params, old, strict=True):
            p.copy_(x)

    def __getstate__(self) -> dict[str, Any]:
        """What deepcopy and pickle take along; groups and state go with the inner optimiser."""
        return {
            "defaults": self.defaults,
            "optimizer": self.optimizer,
            **{name: getattr(self, name) for name in ("c", "beta", "initial", "growth", "anew")},
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        """As torch's, which ``load_state_dict`` calls too: groups and state are the inner optimiser's."""
        shared: dict[str, Any] = {name: state[name] for name in ("state", "param_groups") if name in state}
        super().__setstate__({name: value for name, value in state.items() if name not in shared})
        if shared:
            self.optimizer.__setstate__(shared)  # with what it does for older states
