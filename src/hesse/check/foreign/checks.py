"""The checks of functions that are not torch's: the same questions, asked of arrays.

Is the gradient that of the function, is it the same whatever was evaluated before, and is the second derivative that of
the gradient? Where not: which argument, which elements, and whose function.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from hesse.check.differences import BLUNT, Probe, Slope, own_scales
from hesse.check.foreign.arrays import Foreign
from hesse.check.foreign.custom_rules import culprits
from hesse.check.naming.kinds import Case
from hesse.check.naming.kinds import name as kind_of
from hesse.check.parts.bends import mean_noise
from hesse.check.parts.forward_mode import words
from hesse.check.passes.calls import finite
from hesse.check.passes.functions import defined
from hesse.check.report import Report
from hesse.finding import Finding, InputError

__all__ = ["foreign_gradients", "foreign_hessian"]

FEW = 8  # columns of a wrong Hessian that are looked at element by element
AWAY = 0.05  # how far from the point, in each array's own unit, the second look is taken


def foreign_gradients(
    fun: Callable[..., Any], inputs: Any, jac: Callable[..., Any] | bool | None = None, *, seed: int = 0
) -> Report:
    """Check the gradient of a function of NumPy, JAX or TensorFlow arrays.

    Args:
        fun: ``fun(*inputs)``, a number or an array; with ``jac=True`` the value and the gradient.
        inputs: an array, a tuple of arguments, or a mapping of keyword arguments; left as they are.
        jac: the gradient; None takes that of JAX or TensorFlow.
        seed: of the random directions.

    Raises:
        InputError: there is nothing to differentiate, no gradient to check, or one of another shape.

    Example:
        >>> import numpy as np
        >>> x = np.array([1.0, 2.0, -3.0])
        >>> foreign_gradients(lambda x: (x**2).sum(), x, lambda x: 2 * x).ok
        True
        >>> print(foreign_gradients(lambda x: (x**2).sum(), x, lambda x: x).culprits[0].message)
        The gradient with respect to x is 0.5 times what it should be.
    """
    subject = Foreign(fun, inputs, jac, None, seed)
    report = Report("Gradient check", subject.name)
    with _kept(subject):
        _gradients(subject, report)
    return report


def foreign_hessian(
    fun: Callable[..., Any],
    inputs: Any,
    jac: Callable[..., Any] | bool | None = None,
    hess: Callable[..., Any] | None = None,
    *,
    seed: int = 0,
) -> Report:
    """Check the second derivative of a function of NumPy, JAX or TensorFlow arrays against differences of its gradient.

    Args:
        fun, inputs, jac, seed: as for :func:`foreign_gradients`; the gradient is checked first.
        hess: of one array, ``hess(x)`` [n, n]; None takes that of JAX or TensorFlow.

    Example:
        >>> import numpy as np
        >>> x = np.array([1.0, 2.0])
        >>> f, g = (lambda x: x[0] ** 2 * x[1]), (lambda x: np.array([2 * x[0] * x[1], x[0] ** 2]))
        >>> right, wrong = (lambda x, k=k: np.array([[2 * x[1], k * x[0]], [2 * x[0], 0]]) for k in (2, 3))
        >>> foreign_hessian(f, x, g, right).ok
        True
        >>> foreign_hessian(f, x, g, wrong).culprits[0].evidence["elements"]
        [[0, 1]]
    """
    first = foreign_gradients(fun, inputs, jac, seed=seed)
    subject = Foreign(fun, inputs, jac, hess, seed)
    report = Report("Hessian check", subject.name)
    if not first.ok:
        report.slopes, report.findings = first.slopes, first.findings
        report.notes = ["The first derivative is wrong: see to that first.", *first.notes]
        return report
    if hess is None and (jac is not None or subject.language.pull is None):
        what = "There is no second derivative but the one that is given."
        raise InputError("nothing to check", subject.name, what, "Give it: hess=function of x that returns [n, n].")
    if hess is not None and len(subject.tensors) > 1:
        what = f"hess is that of one array; there are {len(subject.tensors)}."
        raise InputError("nothing to check", subject.name, what, "Join them into one, or leave hess to the library.")
    with _kept(subject):
        _hessian(subject, report)
    return report


def _gradients(subject: Foreign, report: Report) -> None:
    value, again = subject.value(), subject.value()
    if subject.weights is not None:
        report.notes.append("The output is not a scalar: it was summed with fixed random weights.")
    if not bool(value.isfinite().all()):
        report.findings.append(_finding(subject, "non_finite", "The value is not a finite number.", subject.fun))
        return
    if float((value - again).abs().max()) > 100 * subject.eps * float(value.abs().max()):
        message = f"Two calls at the same point give {float(value.sum()):.6g} and {float(again.sum()):.6g}."
        report.findings.append(_finding(subject, "non_deterministic", message, subject.fun))
        return
    fresh = subject.gradient()
    if subject.edits:
        message = "The input array is changed in place: the caller's x is another one afterwards."
        report.findings.append(_finding(subject, "input_changed", message, subject.rule))
        return
    if not finite(fresh):
        report.findings.append(_finding(subject, "non_finite", "The gradient is not finite.", subject.rule))
        return
    report.slopes = _slopes(subject, fresh)
    if not any(s.wrong for s in report.slopes) and report.noise <= BLUNT:
        _stale(subject, report, fresh)
        return
    with _moved(subject):  # a kink sits at a point, a fault is everywhere
        subject.value()
        grads = subject.gradient()
        slopes = _slopes(subject, grads) if finite([subject.value(), *grads]) else report.slopes
        if any(s.wrong for s in slopes):
            report.findings += culprits(subject) or _by_argument(subject, grads)
    if not report.findings and any(s.wrong for s in report.slopes):
        message = "The point lies near kinks (abs, max at a tie); beside it all is right."
        error = max(s.error for s in report.slopes if s.wrong)
        report.findings.append(Finding("kink", subject.name, message, severity="info", value=error))


def _stale(subject: Foreign, report: Report, fresh: list[Tensor]) -> None:
    """A gradient kept from the last call is right only when the function was last called here."""
    with _moved(subject):
        subject.value()
    later = subject.gradient()
    gap = max(float((a - b).abs().max()) for a, b in zip(fresh, later, strict=True))
    if gap > 100 * subject.eps * max(float(a.abs().max()) for a in fresh):
        message = "The gradient depends on where the function was called last: it uses values kept from that call."
        report.findings.append(_finding(subject, "stale_value", message, subject.rule, gap))


def _by_argument(subject: Foreign, grads: list[Tensor]) -> list[Finding]:
    """Each argument by itself."""
    scales = own_scales(subject.tensors)
    found = []
    for (name, tensor), grad in zip(subject.tensors.items(), grads, strict=True):
        slopes = Probe(subject.value, [tensor], [scales[name]], subject.eps, subject.generator).slopes([grad])
        if any(s.wrong for s in slopes):
            kind = kind_of(Case({name: tensor}, {name: grad}, subject.value, subject.eps), slopes, subject.generator)
            file, line = defined(subject.rule)
            error = max(s.error for s in slopes if s.wrong)
            message = f"The gradient with respect to {name} {kind.message}."
            function = getattr(subject.rule, "__name__", None)
            found.append(
                Finding(
                    kind.name,
                    name,
                    message,
                    kind.remedy,
                    "error",
                    error,
                    None,
                    None,
                    function,
                    file,
                    line,
                    kind.evidence,
                )
            )
    return sorted(found, key=lambda f: -float(f.value or 0))


def _hessian(subject: Foreign, report: Report) -> None:
    looks: list[list[Slope]] = []
    for place in (_kept(subject), _moved(subject)):
        with place:
            looks.append(_bend(subject))
    report.slopes = [slope for look in looks for slope in look]
    if not all(any(s.wrong for s in look) for look in looks):
        if mean_noise(report.slopes) > BLUNT:
            report.notes.append("Differences of the gradient are too noisy here to tell more.")
        return
    error = max(s.error for s in report.slopes if s.wrong)
    if subject.hess is None:
        message = (
            f"The second derivative by {subject.language.name} {words(report.slopes)}, while the gradient is right."
        )
        report.findings += culprits(subject, second=True) or [
            _finding(subject, "second_derivative", message, subject.fun, error)
        ]
        return
    with _moved(subject):
        H = subject.second()
        wrong = _wrong_elements(subject, H)
    lopsided = not torch.allclose(H, H.T, rtol=1e-6, atol=float(H.abs().max()) * 1e-9)
    message = f"The second derivative {words(report.slopes)}"
    message += f", at {len(wrong)} of {H.numel()} elements, first {wrong[0]}" if wrong else ""
    message += "; it is not symmetric." if lopsided else "."
    finding = _finding(subject, "second_derivative", message, subject.hess, error, elements=wrong[:16])
    report.findings.append(finding)


def _bend(subject: Foreign) -> list[Slope]:
    """Slopes of the gradient along one direction, beside the Hessian times that direction."""
    tensors = list(subject.tensors.values())
    scales = list(own_scales(subject.tensors).values())
    signs = [torch.randint(0, 2, t.shape, generator=subject.generator) * 2 - 1 for t in tensors]
    u = [sign.to(t) * scale for sign, t, scale in zip(signs, tensors, scales, strict=True)]

    def along() -> Tensor:
        return torch.cat([(g.double() * w.double()).reshape(-1) for g, w in zip(subject.gradient(), u, strict=True)])

    if subject.hess is not None:
        # Rows times u: with an asymmetric matrix columns times u may agree by chance, rows then do not.
        H, (x,) = subject.second(), tensors
        product = [(u[0].reshape(-1).double() @ H).reshape(x.shape).to(x.dtype)]
    else:
        product = subject.bend(u)
    probe = Probe(along, tensors, scales, subject.eps, subject.generator)
    return probe.slopes(product)


def _wrong_elements(subject: Foreign, H: Tensor) -> list[list[int]]:
    """Rows and columns of the elements that are wrong, of a matrix that is not too large to look at whole."""
    ((_, x),) = subject.tensors.items()
    n = x.numel()
    if n > 64:
        return []
    scale = own_scales(subject.tensors).popitem()[1]
    found = []

    def agrees(j: int, rows: Tensor) -> bool:
        """Whether the rows times column j are what differences of the gradient along j give."""

        def along() -> Tensor:
            return subject.gradient()[0].reshape(-1).double() * rows

        unit, column = torch.zeros_like(x).reshape(-1), torch.zeros_like(x).reshape(-1)
        unit[j], column[j] = scale, rows @ H[:, j]
        probe = Probe(along, [x], [scale], subject.eps, subject.generator)
        return not probe.slope([column.reshape(x.shape)], [unit.reshape(x.shape)]).wrong

    signs = torch.randn(n, generator=subject.generator, dtype=torch.float64)
    for j in [j for j in range(n) if not agrees(j, signs)][:FEW]:
        found += [[i, j] for i, row in enumerate(torch.eye(n, dtype=torch.float64)) if not agrees(j, row)]
    return sorted(found)


def _slopes(subject: Foreign, grads: list[Tensor]) -> list[Slope]:
    scales = list(own_scales(subject.tensors).values())
    probe = Probe(subject.value, list(subject.tensors.values()), scales, subject.eps, subject.generator)
    return probe.slopes(grads)


REMEDIES = {
    "non_finite": "Look for log or division at zero, overflow of exp, or NaN in the inputs.",
    "non_deterministic": "Seed what is random inside, and keep no state between calls.",
    "input_changed": "Work on a copy: x = x.copy().",
    "stale_value": "Compute what the gradient needs from its own x, or keep it together with the x it belongs to.",
    "second_derivative": "Derive it again, and compare with differences of the gradient element by element.",
}


def _finding(
    subject: Foreign, kind: str, message: str, function: Any, error: float | None = None, **evidence: Any
) -> Finding:
    file, line = defined(function)
    name = getattr(function, "__name__", None)
    return Finding(kind, subject.name, message, REMEDIES[kind], "error", error, None, None, name, file, line, evidence)


@contextmanager
def _kept(subject: Foreign) -> Iterator[None]:
    before = [t.clone() for t in subject.tensors.values()]
    try:
        yield
    finally:
        for t, value in zip(subject.tensors.values(), before, strict=True):
            t.copy_(value)


@contextmanager
def _moved(subject: Foreign) -> Iterator[None]:
    """Inside, the point lies a little beside the given one."""
    scales = own_scales(subject.tensors)
    with _kept(subject):
        for name, t in subject.tensors.items():
            t.add_(torch.randn(t.shape, generator=subject.generator).to(t), alpha=AWAY * scales[name])
        yield
