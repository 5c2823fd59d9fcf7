"""Is the gradient right, and if not, which module is wrong?

Two looks. First the whole gradient of the real model, in its own number format, on its own device, with its
hooks: along a few directions it must agree with differences of the loss, within a limit that the
differences themselves tell (see :mod:`hesse.check.differences`). That costs a few gradients at any size,
and is all there is when it agrees. Only when it does not, or when the loss is too noisy to tell, every
module is held against differences of itself (:mod:`hesse.check.boundaries`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from hesse.check.boundaries import describe, judge
from hesse.check.calls import finite, first_difference, first_non_finite
from hesse.check.differences import BLUNT, Probe, Slope, own_scales
from hesse.check.report import Report
from hesse.check.subject import Subject
from hesse.finding import Finding
from hesse.objective import Closure

__all__ = ["gradients"]


def gradients(model_or_fn: nn.Module | Closure | Callable[..., Any], inputs: Any = None, *, seed: int = 0) -> Report:
    """Check first derivatives by differences; say which module, input or parameter is wrong.

    Parameters, buffers, ``.grad`` and the random generators are left exactly as they were, also after an
    error. Dropout and other layers that draw from torch's generators draw the same numbers in every
    evaluation.

    Args:
        model_or_fn: a module with ``model(*inputs)`` returning the loss; a function of tensors; or what
            :func:`hesse.closure` returns, which brings its own inputs. An output that is no scalar is
            summed with fixed random weights.
        inputs: a tensor, a tuple or list of arguments, or a mapping of keyword arguments. Of a module the
            trainable parameters
            are checked, and inputs that require gradients; of a function the floating inputs that require
            gradients, or all of them when none does.
        seed: of the random directions.

    Returns:
        A report: ``.ok``, ``.culprits``, ``.findings``, ``.error``, ``.noise``. Module paths are those of
        ``model.named_modules()``; a fault in the model's own forward code is named by its class.

    Raises:
        InputError: there is nothing to differentiate.

    Example:
        The derivative of exp is exp, and that of a square is not what this Function says:

        >>> import torch
        >>> gradients(torch.exp, torch.linspace(0, 1, 5)).ok
        True
        >>> class Square(torch.autograd.Function):
        ...     @staticmethod
        ...     def forward(ctx, x):
        ...         ctx.save_for_backward(x)
        ...         return x * x
        ...     @staticmethod
        ...     def backward(ctx, grad):
        ...         return grad * ctx.saved_tensors[0]
        >>> class Layer(torch.nn.Module):
        ...     def forward(self, x):
        ...         return Square.apply(x)
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 3), Layer(), torch.nn.Linear(3, 1))
        >>> report = gradients(model, torch.ones(2, 3))
        >>> print(report.culprits[0])
        wrong_gradient at 1: The gradient of Layer with respect to its input is 0.5 times what it should be.
        ...
    """
    subject = Subject(model_or_fn, inputs, seed)
    with subject.kept():
        return _check(subject)


def _check(subject: Subject) -> Report:
    report = Report("Gradient check", subject.name)
    loss, again = subject.value(), subject.value()
    if subject.summed:
        report.notes.append("The output is not a scalar: it was summed with fixed random weights.")
    if not bool(loss.isfinite().all()):
        report.findings.append(_non_finite(subject, "The loss is not a finite number."))
        return report
    # Beyond a hundred roundings it is not the order of a parallel sum that differs, it is the function.
    if abs(float(loss - again)) > 100 * subject.eps * abs(float(loss)):
        report.findings.append(_not_deterministic(subject, float(loss), float(again)))
        return report

    report.slopes, grads = _whole(subject)
    if not finite(grads):
        report.findings.append(_non_finite(subject, "The loss is finite but its gradient is not."))
        return report
    if not any(s.wrong for s in report.slopes) and report.noise <= BLUNT:
        return report
    for place in (subject.moved(), subject.kept()):  # beside the point, unless the function ends there
        with place:
            slopes, grads = _whole(subject)
            if slopes:
                report.findings += _second_look(subject, report, slopes, grads)
                break
    return report


def _second_look(subject: Subject, report: Report, slopes: list[Slope], grads: list[Tensor]) -> list[Finding]:
    """Findings at a point beside the given one: a kink sits at a point, a fault is everywhere."""
    seen = [s.error for s in report.slopes if s.wrong]
    wrong = [s for s in slopes if s.wrong]
    if wrong or sorted(s.noise for s in slopes)[1] > min([BLUNT, *seen]):
        culprits = _by_module(subject, report)
        if culprits is None:
            culprits = _by_tensor(subject, grads) if wrong else []
        if culprits:
            return culprits
        if any(s.error > 10 * s.noise for s in wrong):  # no coincidence of kinks
            message = "The gradient of the whole differs from differences of the loss, but every part agrees."
            return [_wrong(subject.name, message, max(s.error for s in wrong))]
    if seen:
        message = "The point lies near kinks (ReLU, abs, max at a tie); beside it, or part by part, all is right."
        return [Finding("kink", subject.name, message, severity="info", value=max(seen))]
    return []


def _whole(subject: Subject) -> tuple[list[Slope], list[Tensor]]:
    """Slopes of the loss along three directions, and the gradient.

    There are no slopes where the loss or its gradient is not finite.
    """
    tensors = list(subject.tensors.values())
    scales = list(own_scales(subject.tensors).values())
    probe = Probe(subject.value, tensors, scales, subject.eps, subject.generator)
    subject.stir()
    grads = subject.gradient()
    if not finite([probe.centre, *grads]):
        return [], grads
    return probe.slopes(grads), grads


def _by_module(subject: Subject, report: Report) -> list[Finding] | None:
    """The modules that are wrong by themselves; None where there are none to look at."""
    if subject.model is None:
        return None
    plain = float(subject.value())
    subject.stir()
    recorder, loss = subject.record()
    if abs(float(loss.detach()) - plain) > 100 * subject.eps * abs(plain):
        report.notes.append("The model cannot be taken apart: it edits in place what it shares with others.")
        return None
    derivatives = recorder.differentiate(loss, list(subject.tensors.values()))
    grads = dict(zip(subject.tensors, derivatives, strict=True))
    subject.settle()
    named = {name: grads[name] for name, _ in subject.model.named_parameters() if name in grads}
    found = judge(recorder, subject.model, named, subject.eps, subject.generator, subject.settle)
    types = {path: type(module).__name__ for path, module in subject.model.named_modules()}
    return [
        _wrong(
            c.path or subject.name,
            f"The gradient of {types.get(c.path, 'the loss')} with respect to "
            f"{' and '.join(c.wrt)} {describe(c.slopes)}.",
            c.error,
        )
        for c in found
    ]


def _by_tensor(subject: Subject, grads: Sequence[Tensor]) -> list[Finding]:
    """One tensor at a time, on the whole loss: for functions, and for faults outside every module."""
    scales = own_scales(subject.tensors)
    found = []
    for (name, tensor), grad in zip(subject.tensors.items(), grads, strict=True):
        probe = Probe(subject.value, [tensor], [scales[name]], subject.eps, subject.generator)
        slopes = probe.slopes([grad])
        wrong = [s for s in slopes if s.wrong]
        if wrong:
            error = max(s.error for s in wrong)
            found.append(_wrong(name, f"The gradient with respect to {name} {describe(slopes)}.", error))
    return sorted(found, key=lambda f: -float(f.value or 0))


def _wrong(where: str, message: str, error: float) -> Finding:
    remedy = (
        "Look at its backward pass: custom autograd Functions, hooks, detach(), .data, in-place edits, "
        "values kept from an earlier call. If a gradient stops on purpose, say so with requires_grad_(False)."
    )
    return Finding("wrong_gradient", where, message, remedy, severity="error", value=error)


def _non_finite(subject: Subject, message: str) -> Finding:
    call = None
    if subject.model is not None:
        recorder, loss = subject.record()
        recorder.differentiate(loss, list(subject.tensors.values()))
        subject.settle()
        call = first_non_finite(recorder.calls)
    if call is not None:
        message += f" NaN or infinity first arises in {call.path or subject.name}."
    remedy = "Look for log or division at zero, overflow of exp, a square root at zero, or NaN in the inputs."
    return Finding("non_finite", call.path if call and call.path else subject.name, message, remedy, severity="error")


def _not_deterministic(subject: Subject, one: float, two: float) -> Finding:
    call = None
    if subject.model is not None:
        call = first_difference(subject.record()[0].calls, subject.record()[0].calls)
    where = call.path if call and call.path else subject.name
    message = f"Two evaluations at the same point give {one:.6g} and {two:.6g}: the gradient cannot be checked."
    remedy = "Draw random numbers from torch's generators only, and keep no state but buffers between calls."
    return Finding("non_deterministic", where, message, remedy, severity="error", value=abs(one - two))
