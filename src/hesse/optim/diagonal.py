"""Curvature of each parameter alone, guessed every few steps from one more backward pass.

The diagonal of a matrix that is known by its products alone need not be formed to be averaged. For random signs z,
E[z * (H z)] = diag H: the guess of Hutchinson (1989), used by AdaHessian and SophiaH. For r drawn at the outputs with
E[r r'] = H_L, E[(J'r)^2] = diag(J' H_L J), the Gauss-Newton-Bartlett guess of SophiaG. One guess is noise; moving
averages of many are what the rules divide by.

The pass forward is shared: loss, gradient and guess come from one graph. The draws are a function of ``seed`` and the
number of the step alone, not of torch's generator: a resumed run goes on bit for bit with no more state than the count,
dropout draws the same numbers whether or not curvature is looked at, and processes that train together agree.
"""

from __future__ import annotations

import functools
import sys
from abc import abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, NamedTuple, TypeGuard

import torch
from torch import Generator, Tensor, nn

from hesse.curvature.hessian import MODES
from hesse.curvature.losses import FORMS, function_of
from hesse.curvature.losses.base import signs
from hesse.curvature.output import output_curvature
from hesse.curvature.product import hold_padding, points, working
from hesse.curvature.verify import choose_hessian
from hesse.objective import Closure, Objective
from hesse.optim.base import Gradient, all_finite, closure_inside, follow, wide
from hesse.tree import Params

__all__ = ["Diagonal", "Draws", "Pass", "bartlett", "hutchinson"]

Draws = Callable[[torch.device], Generator]


class Pass(NamedTuple):
    """One pass forward and one backward, with the graphs kept.

    Args:
        objective: whose passes they are.
        params: of the objective, by name, the live tensors.
        outputs: of the model.
        slopes: d loss / d params, in the order of ``params``; None for what the loss does not depend on.
    """

    objective: Objective
    params: Params
    outputs: Any
    slopes: tuple[Tensor | None, ...]


def hutchinson(seen: Pass, draws: Draws) -> Params:
    """``z * (H z)`` for one z of random signs: the diagonal of the Hessian in expectation, exact if H is diagonal.

    On the kept graph of the gradient where torch differentiates it rightly, else in the first mode of
    :func:`hesse.curvature.hessian` that does; which one, is found and verified once for a model. Parameters of less
    than float32, and models under autocast, are looked at in float32: eight bits do not survive two backward passes.

    Returns:
        By name, shaped as the parameters. Parameters that the gradient does not depend on are left out.

    Raises:
        hesse.curvature.DerivativeError: no mode is right.

    References:
        Hutchinson, A stochastic estimator of the trace of the influence matrix, Commun. Stat. Simul. 1989.
    """
    objective = seen.objective
    exact = working(objective)
    device = next(iter(seen.params.values())).device.type
    if torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):
            return hutchinson(seen._replace(slopes=()), draws)
    mode = choose_hessian(objective, MODES, "auto", verify=True)
    shapes = exact.params
    # new_empty: a layout of its own would draw other signs for the same parameter
    z = {name: signs(p.detach().new_empty(p.shape), draws(p.device)) for name, p in shapes.items()}
    z = hold_padding(objective.model, z)
    hooked = any(p._backward_hooks for p in seen.params.values())  # these act on slopes, and are no part of the loss
    if mode == "double-backward" and exact is objective and seen.slopes and not hooked:
        live = {n: g for n, g in zip(seen.params, seen.slopes, strict=True) if g is not None and g.requires_grad}
        rows = torch.autograd.grad(
            list(live.values()), list(seen.params.values()), [z[name] for name in live], allow_unused=True
        )
        return {name: z[name] * row for name, row in zip(seen.params, rows, strict=True) if row is not None}
    product = MODES[mode](exact, points(exact), 0)
    found = product.apply(z)
    return {name: z[name] * row for name, row in found.items() if name not in product.unreached()}


def bartlett(seen: Pass, draws: Draws, maximize: bool = False) -> Params:
    """``(J'r)^2`` for one draw r at the outputs: in expectation the diagonal of the Gauss-Newton matrix.

    Never negative. For cross-entropy r is the gradient at labels drawn from the model, hence the name: by Bartlett's
    identity their covariance is the Hessian at the outputs. Any loss of
    :func:`hesse.curvature.output.output_curvature` will do.

    Args:
        maximize: the curvature is that of the negative loss.

    Returns:
        By name, shaped as the parameters. Parameters that the outputs do not depend on are left out.

    Raises:
        TypeError: the loss has no curvature, as ``l1_loss``.
        ValueError: to be maximised, and convex in the outputs.

    References:
        Bartlett, Approximate confidence intervals, Biometrika 1953.
    """
    objective = seen.objective
    loss_fn = objective.loss_fn
    if maximize:
        if function_of(loss_fn)[0] in FORMS:
            raise ValueError(
                "maximize=True, and the loss is one of torch's, convex in the outputs: its Gauss-Newton matrix has no "
                "maximum to climb to. Maximise a concave function of the outputs (a log-likelihood), or use SophiaH."
            )
        curvature = output_curvature(lambda o, targets: -loss_fn(o, targets), seen.outputs, objective.targets)
    else:
        curvature = output_curvature(loss_fn, seen.outputs, objective.targets)
    r = curvature.weight**0.5 * curvature.draw(draws(seen.outputs.device))
    rows = torch.autograd.grad(seen.outputs, list(seen.params.values()), r.to(seen.outputs.dtype), allow_unused=True)
    return {name: dense(row).square() for name, row in zip(seen.params, rows, strict=True) if row is not None}


class Diagonal(Gradient):
    """An optimiser on gradients that looks at a diagonal curvature every ``every`` steps.

    A step at which new curvature is due takes a :func:`hesse.closure`, or one that a framework has wrapped in
    ``functools.partial``; the wrapper is then called as it is, and the curvature costs a pass forward of its own. The
    steps between take any closure, or none after ``loss.backward()``.

    A subclass says what it looks at (:meth:`curvature`), what it keeps of it (:meth:`learn`), and its rule
    (:meth:`directions`). Beside the settings of ``Gradient``, groups hold ``every``, ``seed`` (that of the first group
    counts) and ``steps``, the number of steps taken.
    """

    twice: ClassVar[bool]  # whether the gradient is to be differentiated again

    @abstractmethod
    def curvature(self, seen: Pass, draws: Draws) -> Params:
        """A guess of the diagonal, by name; what it leaves out keeps the curvature it has, zero at first."""

    @abstractmethod
    def learn(self, group: dict[str, Any], state: dict[str, Tensor], value: Tensor) -> None:
        """Average the guess ``value``, float32 at least, into the state of its parameter."""

    @abstractmethod
    def begin(self, state: dict[str, Tensor], like: Tensor) -> None:
        """Fill an empty state with zeros like ``like``."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; the group's settings, with the defaults in place of those not given, are checked."""
        every = param_group.get("every", self.defaults["every"]) if isinstance(param_group, dict) else 1
        if not (isinstance(every, int) and every >= 1):
            raise ValueError(f"Invalid every: {every!r}. It is a number of steps: an int, at least 1.")
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Args:
            closure: from :func:`hesse.closure` when new curvature is due (at the first step, and then every ``every``
                steps); any, or none after ``loss.backward()``, at the others.

        Returns:
            The closure's loss before the step, or None.

        Raises:
            TypeError: curvature is due, and the closure is none of :func:`hesse.closure`. Without a closure and
                without gradients nothing happens, which is how frameworks ask for an optimiser's state.
        """
        due = [group for group in self.param_groups if group["steps"] % group["every"] == 0]
        loss: Any = None
        found: dict[Tensor, Tensor] | None = {}
        inside = closure_inside(closure)
        if due and inside is None:
            if closure is None and not self._any_gradient():
                return None
            raise TypeError(self._wanted(closure))
        if due and closure is inside and inside is not None:
            loss, found = self._look(inside, live=True)
        elif closure is not None:
            with torch.enable_grad():
                loss = closure()
            if due and inside is not None:
                _, found = self._look(inside, live=False)
        groups = [(group, [p for p in group["params"] if p.grad is not None]) for group in self.param_groups]
        grads = [dense(p.grad) for _, params in groups for p in params]
        if not grads:
            return loss
        if found is None or not all_finite([*grads, *found.values()]):
            for group in self.param_groups:
                group["rejections"] += 1
            return loss
        for group in due:
            for p in group["params"]:
                if p in found:
                    self.learn(group, self._state(p), found[p])
        for group, params in groups:
            for p in params:
                self._state(p)
            self._step(group, params)
            group["steps"] += 1
        return loss

    def _look(self, inside: Closure, live: bool) -> tuple[Tensor, dict[Tensor, Tensor] | None]:
        """Loss and curvature, or None if they are not finite.

        If ``live``, as the closure's call: gradients are left in ``.grad``, buffers move.
        """
        objective, model = inside.objective, inside.model
        params = objective.params
        if live:
            model.zero_grad(set_to_none=True)
        # The kernels stay plain while the graph is walked: activation checkpointing runs the model again.
        with torch.enable_grad(), objective.at(params), _uncompiled(), alone(model):
            outputs = objective.run_model()
            loss = objective.loss_fn(outputs, objective.targets)
            slopes = torch.autograd.grad(
                loss, list(params.values()), retain_graph=True, create_graph=self.twice, allow_unused=True
            )
            moved = dict(model.named_buffers())  # copies, which the model sees while this is open
            grads = [None if slope is None else mean(model, slope.detach()) for slope in slopes]
            finite = all_finite([mean(model, loss.detach()), *(dense(g) for g in grads if g is not None)])
            found = self.curvature(Pass(objective, params, outputs, slopes), self._draws(model)) if finite else {}
        if live:
            inside.outputs = outputs
            for p, grad in zip(params.values(), grads, strict=True):
                p.grad = grad
            for name, b in model.named_buffers():
                if finite:  # a NaN would stay in running statistics for good
                    b.copy_(moved[name])
        values = {params[name]: mean(model, wide(value.detach())) for name, value in found.items()}
        return loss.detach(), values if finite else None

    def _draws(self, model: nn.Module) -> Draws:
        """Generators of this step's draws, one a device.

        Processes that train together multiply by the same signs, so that the mean of their products is the product of
        the mean; draws at the outputs are of each one's own examples, and independent.
        """
        number = self.param_groups[0]["seed"] * 0x9E3779B1 + max(group["steps"] for group in self.param_groups)
        if is_replica(model) and not self.twice:
            number += torch.distributed.get_rank(model.process_group) * 0x85EBCA6B
        return functools.cache(lambda device: Generator(device).manual_seed(number % 2**32))

    def _state(self, p: Tensor) -> dict[str, Tensor]:
        """The state of a parameter, begun if it is empty, and moved where the parameter has been moved since."""
        state: dict[str, Tensor] = self.state[p]
        if not state:
            self.begin(state, wide(p))
        return follow(state, wide(p))

    def _any_gradient(self) -> bool:
        """Whether a gradient is not zero; states begin for those that are there."""
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        if any(bool(dense(p.grad).any()) for p in params):
            return True
        for p in params:
            self._state(p)
        return False

    def _wanted(self, closure: Callable[[], Any] | None) -> str:
        name = type(self).__name__
        got = "no closure" if closure is None else f"a {type(closure).__name__}"
        return (
            f"{name} looks at the curvature at this step, and gradients alone do not say how the loss curves; got "
            f"{got}. Write optimizer.step(hesse.closure(model, loss_fn, (inputs, targets))) instead of backward() and "
            f"step(); the steps between, every={self.param_groups[0]['every']} apart, take any closure, or none."
        )


def dense(grad: Tensor) -> Tensor:
    """The gradient, float32 at least, with the zeros that a sparse one leaves out."""
    return wide(grad.to_dense() if grad.is_sparse else grad)


def is_replica(model: nn.Module) -> TypeGuard[nn.parallel.DistributedDataParallel]:
    """Whether other processes have copies of the model, and other parts of the batch."""
    return isinstance(model, nn.parallel.DistributedDataParallel)


def alone(model: nn.Module) -> AbstractContextManager[None]:
    """Passes that no ``backward()`` follows, for which a replica must not wait."""
    return model.no_sync() if is_replica(model) else nullcontext()


def mean(model: nn.Module, x: Tensor) -> Tensor:
    """The mean over all replicas of the model; of a model that has none, x itself."""
    if not is_replica(model):
        return x
    x = (x.to_dense() if x.is_sparse else x).clone(memory_format=torch.contiguous_format)
    torch.distributed.all_reduce(x, group=model.process_group)
    return x.div_(torch.distributed.get_world_size(model.process_group))


def _uncompiled() -> AbstractContextManager[Any]:
    """Compiled modules run as they are written: what the compiler makes of them is differentiated once only."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled then, and loading the compiler takes a second
        return nullcontext()
    return torch.compiler.set_stance("force_eager")
