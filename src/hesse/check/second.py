"""Are second derivatives right: Hessian-vector products by every mode, against differences of the gradient?

Training never forms them, so nobody notices when they are refused or wrong: a custom Function may have a right backward
that cannot be differentiated again, and so have some of torch's own operations. First the whole: ``H u`` of the real
model along a few directions, in float64 where the model allows, at the point and beside it. Only when that fails is
every piece asked by itself (:mod:`hesse.check.parts.bends`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.autograd.forward_ad as fw
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from hesse.check.differences import BLUNT, Probe, Slope, own_scales
from hesse.check.foreign.arrays import is_foreign
from hesse.check.foreign.checks import foreign_hessian
from hesse.check.gradient import gradients
from hesse.check.parts.bends import REFUSED, Bend, bent, by_forward_mode, mean_noise, refuser
from hesse.check.parts.forward_mode import has_jvp, judge_jvp, words
from hesse.check.passes.calls import finite
from hesse.check.passes.functions import defined
from hesse.check.passes.hooks import hooks_of
from hesse.check.passes.pieces import Pieces, operations_of
from hesse.check.passes.recording import LOSS
from hesse.check.report import Report
from hesse.check.subject import Subject
from hesse.finding import Finding, Severity
from hesse.objective import Closure

__all__ = ["hessian"]

BACKWARD = "Use double backward: mode='double-backward' in hesse.curvature, or torch.autograd.grad twice."
PLACES = ("kept", "moved")  # methods of the subject: at the point, and beside it


def hessian(
    model_or_fn: nn.Module | Closure | Callable[..., Any],
    inputs: Any = None,
    *,
    jac: Any = None,
    hess: Callable[..., Any] | None = None,
    seed: int = 0,
) -> Report:
    """Check second derivatives; say which module, autograd Function or operation is wrong or refuses.

    ``H u`` by double backward is compared with differences of the gradient, ``u'Hv`` with ``v'Hu``, and the product by
    forward over reverse with both. A refusal is a finding too. First derivatives come first: where they are wrong, the
    report is that of :func:`gradients`.

    Args:
        model_or_fn, inputs, jac, seed: as for :func:`gradients`.
        hess: of a function of one NumPy array, ``hess(x)`` [n, n].

    Returns:
        A report. Findings are of the kinds ``second_derivative`` and ``forward_mode`` (the ``jvp`` of a Function, or a
        product by forward mode that differs from the one by double backward), or those of :func:`gradients`.

    Example:
        This backward is right, but its own derivative is lost with the value kept on ``ctx``:

        >>> hessian(torch.exp, torch.linspace(0, 1, 5)).ok
        True
        >>> class Cube(torch.autograd.Function):
        ...     @staticmethod
        ...     def forward(ctx, x):
        ...         ctx.slope = 3 * x * x
        ...         return x ** 3
        ...     @staticmethod
        ...     def backward(ctx, grad):
        ...         return grad * ctx.slope
        >>> report = hessian(Cube.apply, torch.linspace(0, 1, 5))
        >>> report.culprits[0].function
        'Cube'
    """
    if is_foreign(model_or_fn, inputs, jac):
        return foreign_hessian(model_or_fn, inputs, jac, hess, seed=seed)
    first = gradients(model_or_fn, inputs, seed=seed)
    report = Report("Hessian check", first.subject)
    if any(culprit.kind != "forward_mode" for culprit in first.culprits):  # that is looked at again below
        report.slopes, report.findings = first.slopes, first.findings
        report.notes = ["The first derivative is wrong: see to that first.", *first.notes]
        return report
    subject = Subject(model_or_fn, inputs, seed)
    with subject.kept(), _in_float64(subject):
        _check(subject, report)
    return report


@dataclass
class Look:
    """What one point shows: slopes of the gradient by double backward, or who refused it, and by forward mode."""

    slopes: list[Slope] = field(default_factory=list)
    forward: list[Slope] = field(default_factory=list)
    refused: str = ""
    forward_refused: str = ""
    infinite: bool = False  # whether a product is, where the gradient is finite
    lopsided: float = 0.0  # how far u'Hv is from v'Hu, relative, where that is more than rounding

    @property
    def wrong(self) -> bool:
        return any(s.wrong for s in self.slopes)


def _check(subject: Subject, report: Report) -> None:
    excused, hooks = _circumstances(subject)
    if excused:
        report.notes.append(
            "Gradients that are declared, or taken for constant by a layer of torch, have no second derivative to "
            "compare with: the parts without them are looked at one by one."
        )
    looks: list[Look] = []
    for place in () if excused else PLACES:
        with getattr(subject, place)():
            looks.append(_look(subject))
    report.slopes = [slope for look in looks for slope in look.slopes]
    refused = next((look.refused for look in looks if look.refused), "")
    wrong = any(look.wrong for look in looks)
    blunt = bool(report.slopes) and mean_noise(report.slopes) > BLUNT
    pieces = _pieces(subject)
    infinite = next((place for place, look in zip(PLACES, looks, strict=False) if look.infinite), None)
    jvps = [p for p in pieces.functions if p.cls is not None and has_jvp(p.cls)]
    found: list[Finding] = []
    if infinite and not (refused or wrong):
        with getattr(subject, infinite)():
            found = bent(_pieces(subject), subject.eps, subject.generator, subject.settle, excused, hooks)
            message = "The Hessian is NaN or infinite, while the gradient is finite."
            found = [f for f in found if f.kind == "non_finite"] or [_whole(subject, "non_finite", message)]
        report.findings += [_placed(finding, subject) for finding in found]
    elif refused or wrong or blunt or excused:
        with subject.moved():  # a kink sits at a point, a fault is everywhere
            found = bent(_pieces(subject), subject.eps, subject.generator, subject.settle, excused, hooks)
        report.findings += [_placed(finding, subject) for finding in found]
        if not found and refused:
            message = f"Double backward is refused ({refused}), though no part of the model refuses it alone."
            report.findings.append(_whole(subject, "second_derivative", message))
        if looks and not found and all(any(s.wrong and s.error > 10 * s.noise for s in look.slopes) for look in looks):
            error = max(s.error for look in looks for s in look.slopes if s.wrong)
            message = f"The Hessian by double backward {words(report.slopes)}, though every part agrees alone."
            report.findings.append(_whole(subject, "second_derivative", message, error))
    elif all(look.lopsided for look in looks):
        message = "The Hessian is not symmetric: u'Hv and v'Hu differ. The gradient is that of no function."
        report.findings.append(_whole(subject, "second_derivative", message, max(look.lopsided for look in looks)))
    forward = [_placed(f, subject) for p in jvps if (f := judge_jvp(p, subject.eps, subject.generator)) is not None]
    report.findings += {(f.where, f.function): f for f in forward}.values()
    if looks and not report.findings and all(any(s.wrong for s in look.forward) for look in looks):
        slopes = [s for look in looks for s in look.forward]
        error = max(s.error for s in slopes if s.wrong)
        report.findings += [_placed(f, subject) for f in _by_forward_mode(subject, pieces, words(slopes), error)]
    silent = sorted({p.name for p in pieces.functions if p.cls is not None and not has_jvp(p.cls)})
    by = next((look.forward_refused for look in looks if look.forward_refused), "")
    if silent:
        report.notes.append(f"No forward mode: {', '.join(silent)} defines no jvp.")
    elif by:
        report.notes.append(f"No forward mode: {by}.")
    elif refused:
        report.notes.append("Forward over reverse (torch.func.jvp of torch.func.grad) works here.")


def _look(subject: Subject) -> Look:
    look = Look()
    tensors = list(subject.tensors.values())
    scales = list(own_scales(subject.tensors).values())

    def signs() -> list[Tensor]:
        draws = (torch.randint(0, 2, t.shape, generator=subject.generator) * 2 - 1 for t in tensors)
        return [draw.to(t) * scale for draw, t, scale in zip(draws, tensors, scales, strict=True)]

    u, v = signs(), signs()
    subject.stir()
    try:
        Hu, Hv = _product(subject, u), _product(subject, v)
    except REFUSED as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        look.refused = refuser(error)
        Hu = Hv = []
    try:
        forward = _forward_product(subject, u)
    except REFUSED as error:
        look.forward_refused = refuser(error)
        forward = []
    if not (Hu or forward) or not finite([*Hu, *Hv, *forward]):
        look.infinite = not finite([*Hu, *Hv]) and finite(subject.gradient())
        return look

    def along() -> Tensor:
        grads = subject.gradient()
        return torch.cat([(g.double() * w.double()).flatten() for g, w in zip(grads, u, strict=True)])

    probe = Probe(along, tensors, scales, subject.eps, subject.generator)
    if Hu:
        look.slopes = probe.slopes(Hu)
        look.lopsided = _lopsided(subject, probe, (u, v), (Hu, Hv))
    if forward and not (Hu and _close(forward, Hu, subject.eps)):
        look.forward = probe.slopes(forward)
    return look


def _product(subject: Subject, u: Sequence[Tensor]) -> list[Tensor]:
    """``H u`` by double backward, on the model itself."""
    tensors = list(subject.tensors.values())
    with torch.enable_grad(), subject.random.again():
        loss = subject._loss(subject.call(*subject.args, **subject.kwargs))
        if not loss.requires_grad:
            return [torch.zeros_like(t) for t in tensors]
        grads = torch.autograd.grad(loss, tensors, create_graph=True, allow_unused=True)
        pairs = [(g, w) for g, w in zip(grads, u, strict=True) if g is not None and g.requires_grad]
        rows: Sequence[Tensor | None] = [None] * len(tensors)
        if pairs:
            rows = torch.autograd.grad([g for g, _ in pairs], tensors, [w for _, w in pairs], allow_unused=True)
    subject.settle()
    dense = [row.to_dense() if row is not None and row.is_sparse else row for row in rows]
    return [torch.zeros_like(t) if row is None else row.detach() for t, row in zip(tensors, dense, strict=True)]


def _forward_product(subject: Subject, u: Sequence[Tensor]) -> list[Tensor]:
    """``H u`` by forward over reverse: the tangent of the gradient."""
    with torch.enable_grad(), subject.random.again(), fw.dual_level():
        pairs = zip(subject.tensors.items(), u, strict=True)
        duals = {name: fw.make_dual(t.detach().requires_grad_(), v) for (name, t), v in pairs}
        instead = {id(t): duals[name] for name, t in subject.tensors.items()}
        args, kwargs = pytree.tree_map_only(Tensor, lambda x: instead.get(id(x), x), (subject.args, subject.kwargs))
        if subject.model is not None:
            params = {name: duals[name] for name, _ in subject.model.named_parameters() if name in duals}
            outputs = torch.func.functional_call(subject.model, params, args, kwargs)
        else:
            outputs = subject.call(*args, **kwargs)
        # Without a graph, backward formulas take short cuts that have no tangent (torch.linalg.solve).
        loss = subject._loss(outputs)
        rows = torch.autograd.grad(loss, list(duals.values()), create_graph=True, allow_unused=True)
        tangents = [None if row is None else fw.unpack_dual(row).tangent for row in rows]
    subject.settle()
    found = zip(subject.tensors.values(), tangents, strict=True)
    return [torch.zeros_like(t) if v is None else v.detach() for t, v in found]


def _lopsided(
    subject: Subject, probe: Probe, directions: tuple[list[Tensor], ...], products: tuple[list[Tensor], ...]
) -> float:
    """How far ``u'Hv`` is from ``v'Hu``, relative; zero where rounding explains it."""
    (u, v), (Hu, Hv) = directions, products
    gap = abs(_dot(u, Hv) - _dot(v, Hu))
    size = max(sum(float((a * b).abs().sum()) for a, b in zip(x, y, strict=True)) for x, y in ((u, Hv), (v, Hu)))
    if gap <= 100 * subject.eps * size:
        return 0.0
    rounding = 0.0  # of a product: how it changes when all last digits change
    for _ in range(2):
        with torch.no_grad():
            for t, base, w in zip(probe.tensors, probe.base, probe.random_direction(), strict=True):
                t.copy_(base + subject.eps * w.sign() * base.abs())
        rounding = max(rounding, abs(_dot(v, _product(subject, u)) - _dot(v, Hu)))
        probe.restore()
    return gap / size if gap > 10 * rounding + 100 * subject.eps * size else 0.0


def _dot(x: Sequence[Tensor], y: Sequence[Tensor]) -> float:
    return sum(float(torch.sum(a.double() * b.double())) for a, b in zip(x, y, strict=True))


def _close(one: Sequence[Tensor], other: Sequence[Tensor], eps: float) -> bool:
    """Whether two products are the same but for rounding, so that what holds for one holds for the other."""
    gap = sum(float((a.double() - b.double()).square().sum()) for a, b in zip(one, other, strict=True)) ** 0.5
    return gap <= eps**0.75 * sum(float(a.double().square().sum()) for a in other) ** 0.5


def _circumstances(subject: Subject) -> tuple[set[str], list[tuple[str, Any]]]:
    """Paths of modules in which a gradient is not the derivative on purpose, and the hooks on tensors and modules."""
    recorder, _ = subject.record()
    subject.settle()
    excused = {place.path for place in recorder.places if place.declared}
    excused |= {stop.path for stop in recorder.stops if stop.accepted}
    hooks = [(entry[0], entry[1]) for entry in recorder.operations.hooked]
    if subject.model is not None:
        hooks += [(hook.path, hook.function) for hook in hooks_of(subject.model)]
    return excused, hooks


def _pieces(subject: Subject) -> Pieces:
    """The pieces of one pass."""
    pieces = Pieces(subject.model)
    with torch.enable_grad(), subject.random.again(), pieces.recording():
        outputs = subject.call(*subject.args, **subject.kwargs)
        if subject.loss_fn is not None:
            loss_fn = subject.loss_fn
            outputs = pieces.called(LOSS, loss_fn, (outputs,))
    subject.settle()
    if subject.model is None:
        pieces.whole(subject.name, subject.call, subject.args, subject.kwargs)
    return pieces


def _by_forward_mode(subject: Subject, pieces: Pieces, how: str, error: float) -> list[Finding]:
    """Forward over reverse is wrong: the jvp of a Function that a backward calls, or an operation."""
    wholes = pieces.modules[-1:] if subject.loss_fn is None else pieces.modules[-2:]
    parts = [*pieces.functions, *(part for whole in wholes for part in operations_of(whole))]
    subject.settle()
    for part in parts:
        try:
            agrees = by_forward_mode(part, subject.eps, subject.generator)
        except REFUSED:  # it has no forward mode alone
            continue
        if agrees:
            continue
        if part.cls is not None:
            called = [p for p in Bend(part, subject.eps, subject.generator).called() if p.cls and has_jvp(p.cls)]
            jvps = [judge_jvp(p, subject.eps, subject.generator) for p in called]
            found = [jvp for jvp in jvps if jvp is not None]
            if found:
                return found
        message = f"Forward over reverse through {part.name} is wrong, double backward is right."
        severity: Severity = "warning" if part.cls is None else "error"
        file, line = (part.file, part.line) if part.cls is None else defined(part.cls.jvp)
        where = part.path or subject.name
        return [Finding("forward_mode", where, message, BACKWARD, severity, error, None, None, part.name, file, line)]
    message = f"The Hessian by forward over reverse {how}, while the one by double backward is right."
    return [Finding("forward_mode", subject.name, message, BACKWARD, severity="warning", value=error)]


def _placed(finding: Finding, subject: Subject) -> Finding:
    """A finding in the model's own forward is named by the class."""
    return finding if finding.where else replace(finding, where=subject.name)


def _whole(subject: Subject, kind: str, message: str, error: float | None = None) -> Finding:
    remedy = "Look at hooks, and at what is shared between modules: values kept from one and used by another."
    return Finding(kind, subject.name, message, remedy, severity="error", value=error)


@contextmanager
def _in_float64(subject: Subject) -> Iterator[None]:
    """Inside, the model and all its inputs are float64, if it runs so; afterwards they are what they were.

    A second derivative is a property of formulas, not of a number format, and float32 blurs differences of gradients.
    """
    tensors = [t for t in _floating(subject) if t.dtype == torch.float32]
    if not tensors or any(torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda")):
        yield
        return
    before, eps, default = [t.data for t in tensors], subject.eps, torch.get_default_dtype()
    weights, buffers = subject.weights, subject.buffers
    subject.weights = None

    def back() -> None:
        subject.eps, subject.weights, subject.buffers = eps, weights, buffers
        torch.set_default_dtype(default)
        for t, data in zip(tensors, before, strict=True):
            t.data = data

    try:
        torch.set_default_dtype(torch.float64)
        for t in tensors:
            t.data = t.data.double()
        subject.buffers = [(m, n, b, v.double() if v.dtype == torch.float32 else v) for m, n, b, v in buffers]
        subject.eps = torch.finfo(torch.float64).eps
        try:
            runs = finite([subject.value(), *subject.gradient()])
        except (*REFUSED, TypeError, ValueError):
            runs = False
        if not runs:
            back()
        yield
    finally:
        back()


def _floating(subject: Subject) -> list[Tensor]:
    found = [x for x in pytree.tree_leaves((subject.args, subject.kwargs)) if isinstance(x, Tensor)]
    if subject.model is not None:
        found += [*subject.model.parameters(), *subject.model.buffers()]
    unique = {id(x): x for x in [*found, *subject.tensors.values()]}
    return [x for x in unique.values() if x.is_floating_point()]
