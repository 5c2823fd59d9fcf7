"""What a step of an optimiser owes its user: downhill, whatever the shape; nothing where no gradient came; the closure
called as torch calls it; gradients read, not written.

Each promise is a function from a stand to findings. It compares runs of the same optimiser from the same numbers, so
that no method is held to another's steps.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hesse.check.contract.trial import ANY, LATE, RAISED, Stand, gap, same, sentence
from hesse.finding import Finding

__all__ = ["STEPS"]

LONG = 60  # steps in which a loss falls, if only by a little


def direction(stand: Stand) -> Iterator[Finding]:
    """The first step goes downhill, in every shape and number format."""
    remedy = "Subtract what points along the gradient, lr times; look for a sign, a transposition, a wrong broadcast."
    slope, steps = stand.trial().slope()
    if not steps:
        yield stand.finding("direction", "Ten steps move no parameter.", "Update the parameters in place in step.")
        return
    if not slope < 0:
        yield _uphill(stand, "The first step", slope, remedy)
        return
    shapes: list[tuple[int, ...]] = [(), (3,), (4, 3), (2, 3, 2, 2)]
    if stand.takes == "parameters" and stand.shapes is ANY:
        for shape in shapes:
            what = f"The first step on a parameter of shape {list(shape)}"
            try:
                slope, steps = stand.trial(shapes=(shape,)).slope()
            except RAISED as error:
                yield stand.finding("shape", f"{what} raises {sentence(error)}.", "Handle parameters of any shape.")
                continue
            if not (steps and slope < 0):
                yield _uphill(stand, what, slope, remedy)
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        try:
            trial = stand.trial(dtype=dtype)
            slope, _ = trial.slope()
        except RAISED as error:
            if dtype != torch.float64:
                stand.notes.append(f"{name} parameters are refused: {sentence(error)}.")
                continue
            message = f"A step on float64 parameters raises {sentence(error)}."
            yield stand.finding("dtype", message, "Make state with torch.zeros_like(p).")
            continue
        if slope != slope and dtype != torch.float64:
            message = f"The first step makes {name} parameters NaN or infinite: eps may be too small for the format."
            yield stand.finding(
                "dtype", message, "Compute in float32, whatever the parameters are.", severity="warning"
            )
        elif not slope <= 0:  # in low precision the first steps may be lost in rounding
            yield _uphill(stand, f"The first step on {name} parameters", slope, remedy)
        elif any(p.dtype != dtype for p in trial.params):
            yield stand.finding("dtype", f"A step changes {name} parameters into another dtype.", "Update in place.")


def layout(stand: Stand) -> Iterator[Finding]:
    """Where numbers lie in memory is of no matter."""
    if stand.takes == "model":
        return
    shapes = ((4, 3), (3, 5))
    with_bias = {} if stand.shapes is not ANY else {"shapes": shapes}
    plain = stand.trial(**with_bias)
    start, there = plain.values(), plain.run(3)
    for what in ("parameters", "gradients"):
        trial = stand.trial(**with_bias, prepare=_strided if what == "parameters" else None)
        if what == "gradients":
            if not stand.plain:
                continue
            for p in trial.params:
                p.register_post_accumulate_grad_hook(_stride_the_gradient)
        try:
            found = trial.run(3)
        except RAISED as error:
            # Those that gather all parameters into one vector (LBFGS) do so with view: loud, and torch's own.
            severity = "error" if stand.plain and what == "parameters" else "warning"
            message = f"Non-contiguous {what} are refused: {sentence(error)}."
            yield stand.finding("layout", message, "Use reshape, not view.", severity=severity)
            continue
        if gap(found[-1], there[-1]) > 0.05 * gap(there[-1], start):
            message = f"Non-contiguous {what} are moved otherwise than contiguous ones with the same numbers."
            # autograd gives a gradient the layout of its parameter: others come from hands, and fused kernels err there
            severity = "error" if what == "parameters" else "warning"
            remedy = "Use reshape, not view, and strides only through torch's operations."
            yield stand.finding("layout", message, remedy, severity=severity)


def maximize(stand: Stand) -> Iterator[Finding]:
    """``maximize=True`` climbs."""
    if "maximize" not in stand.accepts:
        return
    slope, steps = stand.trial(maximize=True, loss_fn=lambda o, y: -F.mse_loss(o, y)).slope()
    if steps and not slope > 0:
        yield stand.finding(
            "maximize", "With maximize=True the first step goes downhill.", "Negate the gradient first."
        )


def none_gradient(stand: Stand) -> Iterator[Finding]:
    """A parameter without a gradient is left alone, and may get one later."""
    remedy = "Skip parameters whose .grad is None, before any state is made for them."
    no_decay = {"weight_decay": 0.0} if stand.takes == "model" and "weight_decay" in stand.accepts else {}
    trial = stand.trial(**no_decay)
    trial.model.used = 1
    before = [p.detach().clone() for p in trial.part(1)]
    trial.run(3)
    if not same(before, trial.part(1)):
        yield stand.finding("none_gradient", "A parameter whose .grad is None is moved.", remedy)
    trial.model.used = 2
    trial.run(LATE)
    if same(before, trial.part(1)):
        message = "A parameter that had no gradient at first is not moved when it gets one."
        yield stand.finding("none_gradient", message, "Make its state at its own first step.")
    if stand.plain:
        trial = stand.trial()
        start = trial.values()
        trial.optimizer.step()
        trial.optimizer.step()
        if not same(start, trial.params):
            yield stand.finding("none_gradient", "A step before any gradient exists moves parameters.", remedy)


def zero_gradient(stand: Stand) -> Iterator[Finding]:
    """Gradients of zero do no harm."""
    remedy = "Guard divisions by norms and roots of sums of squares with eps; a fresh optimiser sees zeros first."
    trial = stand.trial()
    x = trial.x
    trial.x = torch.zeros_like(x)  # the outputs of bowls are zero then, whatever the parameters
    if stand.takes == "model":
        trial.loss_fn = lambda o, y: 0.0 * F.mse_loss(o, y)
    trial.run(2)
    if not all(bool(p.isfinite().all()) for p in trial.params):
        yield stand.finding("zero_gradient", "A step on gradients of zero makes parameters NaN or infinite.", remedy)
        return
    trial.x, trial.loss_fn = x, F.mse_loss
    trial.run(3)
    if not all(bool(p.isfinite().all()) for p in trial.params):
        yield stand.finding("zero_gradient", "After gradients of zero, ordinary ones make parameters NaN.", remedy)


def closures(stand: Stand) -> Iterator[Finding]:
    """``step(closure)`` calls the closure with autograd on, steps on its gradients and returns its loss."""
    if stand.needs == "sparse gradient":
        return
    template = "if closure is not None: with torch.enable_grad(): loss = closure()"
    trial, seen, losses = stand.trial(), list[bool](), list[float]()

    def watched() -> Tensor:
        seen.append(torch.is_grad_enabled())
        losses.append(float(trial.backward()))
        return torch.tensor(losses[-1])

    if stand.needs == "hesse.closure":
        returned = trial.step()
        if returned is None:
            yield stand.finding("closure", "step(closure) does not return the loss.", "End step with return loss.")
        return
    if stand.needs == "gradient and closure":
        trial.backward()
    stand.sow(1)
    returned = trial.optimizer.step(watched)  # type: ignore[arg-type]
    if not torch.is_grad_enabled():
        torch.set_grad_enabled(True)
        yield stand.finding("closure", "step leaves autograd switched off.", "Use torch.no_grad() as a decorator.")
    if not losses:
        yield stand.finding("closure", "step(closure) does not call the closure.", f"Begin step with {template}.")
        return
    if not all(seen):
        yield stand.finding("closure", "The closure is called without autograd.", f"Begin step with {template}.")
    if returned is None or not any(abs(float(returned) - loss) <= 1e-6 * abs(loss) for loss in losses):
        got = "None" if returned is None else f"{float(returned):.6g}"
        message = f"step(closure) returns {got}, not the closure's loss, {losses[0]:.6g}."
        yield stand.finding("closure", message, "End step with return loss.")
    if not stand.plain:
        return
    other = stand.trial()
    start = other.values()
    there = other.run(1)[-1]
    if gap(trial.values(), there) > 1e-3 * gap(there, start):
        message = "step(closure) does not go where backward() and step() go."
        yield stand.finding("closure", message, "Call the closure before any gradient is read.")
    try:
        trial.optimizer.step(closure=trial.backward)  # type: ignore[arg-type]
        trial.backward()
        trial.optimizer.step(None)
    except RAISED as error:
        message = f"step(closure=closure) or step(None) raises {sentence(error)}."
        yield stand.finding("closure", message, "Declare it as def step(self, closure=None).")


def gradient_changed(stand: Stand) -> Iterator[Finding]:
    """Gradients are read, not written: they may be logged, accumulated or all-reduced afterwards."""
    if not stand.plain:
        return
    settings: list[dict[str, Any]] = [{}]
    settings += [{name: value} for name, value in (("weight_decay", 0.1), ("maximize", True)) if name in stand.accepts]
    for given in settings:
        try:
            trial = stand.trial(**given)
        except RAISED:
            continue
        trial.run(1)
        trial.backward()
        before = [p.grad.clone() for p in trial.params if p.grad is not None]
        trial.optimizer.step()
        after = [p.grad for p in trial.params if p.grad is not None]
        if len(before) != len(after) or not same(before, after):
            words = f"{stand.kind.__doc__ or ''} {stand.kind.step.__doc__ or ''}"  # type: ignore[attr-defined]
            if re.search(r"in[- ]place|overwrit|modif|clip|clear|zero", words, re.IGNORECASE) and "grad" in words:
                stand.notes.append("A step changes .grad, as its documentation says.")
                return
            how = "".join(f" with {name}={value}" for name, value in given.items())
            message = f"A step{how} changes .grad."
            remedy = "Use grad.add(...) in place of grad.add_(...), or say in the docstring that .grad is modified."
            yield stand.finding("gradient_changed", message, remedy)
            return


def surroundings(stand: Stand) -> Iterator[Finding]:
    """Hooks see every step, ``zero_grad`` clears, and parameters stay where they are in memory."""
    trial, seen = stand.trial(), list[int]()
    places = [p.data_ptr() for p in trial.params]
    trial.optimizer.register_step_post_hook(lambda optimizer, args, kwargs: seen.append(1))
    trial.step()
    if not seen:  # twice is torch's own doing, where a step calls that of its base class
        message = "A step does not run its hooks: profilers and monitors do not see it."
        remedy = "Call super().__init__ before the first step, and let step be a method of the class."
        yield stand.finding("hooks", message, remedy)
    if places != [p.data_ptr() for p in trial.params]:
        message = "A step gives parameters new memory: flat views, tied tensors and compiled graphs keep the old one."
        remedy = "Update in place: p.add_(...), not p.data = ..."
        yield stand.finding("memory", message, remedy, severity="warning")
    trial.backward()
    trial.optimizer.zero_grad()
    if any(p.grad is not None and bool(p.grad.to_dense().any()) for p in trial.params):
        message = "zero_grad leaves gradients that are not zero."
        yield stand.finding("zero_grad", message, "Leave it to torch, or set every p.grad to None.", method="zero_grad")


def sparse_gradient(stand: Stand) -> Iterator[Finding]:
    """Sparse gradients are taken, or refused by name."""
    if not stand.plain:
        return
    shape = (6, 3)
    trial = stand.trial(shapes=(shape,))
    trial.backward()
    before, (p,) = trial.values(), trial.params
    assert p.grad is not None
    rows = torch.zeros(shape)
    rows[:2] = p.grad[:2]
    p.grad = rows.to_sparse(1)
    try:
        trial.optimizer.step()
    except (*RAISED, NotImplementedError) as error:
        if "sparse" not in str(error).lower():
            message = f"Sparse gradients are refused without saying so: {sentence(error)}."
            remedy = "if p.grad.is_sparse: raise RuntimeError('... does not support sparse gradients')."
            yield stand.finding("sparse_gradient", message, remedy, severity="warning")
        return
    move = p.detach() - before[0]
    if bool(move[:2].any()) and not float((move * rows).sum()) < 0:
        yield stand.finding(
            "sparse_gradient", "The first step on a sparse gradient goes uphill.", "Make it dense first."
        )


def complex_parameters(stand: Stand) -> Iterator[Finding]:
    """Complex parameters are moved downhill, or refused."""
    if not stand.plain or stand.shapes is not ANY:
        return

    def square(outputs: Tensor, y: Tensor) -> Tensor:
        return (outputs - y).abs().square().mean()

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "discards the imaginary part": it shows in the direction
            slope, steps = stand.trial(dtype=torch.complex64, loss_fn=square).slope()
    except RAISED:
        return
    if steps and not slope < 0:
        message = f"The first step on complex parameters goes uphill (relative slope {slope:.2g})."
        remedy = "Look at them with torch.view_as_real, or refuse them when they are given."
        yield stand.finding("complex", message, remedy, severity="warning")


def convergence(stand: Stand) -> Iterator[Finding]:
    """On a convex problem the loss ends lower than it began, at its learning rate or at a smaller one."""
    lr, tried = stand.lr, []
    steps = LONG if stand.plain else LONG // 4  # a step on closures is many, or a long one
    for factor in (1.0, 0.1, 0.01) if lr else (1.0,):
        trial = stand.trial()
        first = trial.loss()
        for group in trial.optimizer.param_groups:
            if lr:
                group["lr"] = factor * lr
        trial.run(steps)
        last = trial.loss()
        tried.append(last)
        if last < first:
            return
    message = f"After {steps} steps on a convex problem the loss has not fallen ({first:.4g}, now {min(tried):.4g})"
    yield stand.finding(
        "convergence",
        f"{message}{', nor at a hundredth of the learning rate' if lr else ''}.",
        "Only the first step is right: look at momentum, bias correction and what is kept between steps.",
    )


def _uphill(stand: Stand, what: str, slope: float, remedy: str) -> Finding:
    if slope == 0.0:
        return stand.finding("direction", f"{what} moves nothing.", remedy)
    if slope != slope:
        return stand.finding("direction", f"{what} makes parameters NaN or infinite.", remedy)
    how = "goes uphill" if slope > 0 else "is not downhill"
    return stand.finding("direction", f"{what} {how} (slope {slope:.2g} of the steepest).", remedy, slope=slope)


def _strided(model: nn.Module) -> None:
    for p in model.parameters():
        wide = p.data.new_empty(*p.shape, 2)[..., 0] if p.ndim < 2 else p.data.new_empty(p.shape[::-1]).T
        p.data = wide.copy_(p.data)


def _stride_the_gradient(p: Tensor) -> None:
    assert p.grad is not None
    p.grad = p.grad.new_empty(*p.shape, 2)[..., 0].copy_(p.grad)


STEPS: dict[str, Callable[[Stand], Iterator[Finding]]] = {
    "direction": direction,
    "layout": layout,
    "maximize": maximize,
    "none_gradient": none_gradient,
    "zero_gradient": zero_gradient,
    "closure": closures,
    "gradient_changed": gradient_changed,
    "surroundings": surroundings,
    "sparse_gradient": sparse_gradient,
    "complex": complex_parameters,
    "convergence": convergence,
}
