"""Is the gradient right, and if not, what is wrong, and where is it written?

Two looks. First the whole gradient of the real model, in its own number format, on its own device, with its
hooks: along a few directions it must agree with differences of the loss, within a limit that the
differences themselves tell (see :mod:`hesse.check.differences`). That costs a few gradients at any size, and is
all there is when it agrees and nothing was met that autograd does not vouch for. The second look goes to those
things first, custom Functions, hooks and places where gradients stop, each by itself
(:mod:`hesse.check.parts.boundaries`); to every module only if the whole is still wrong without them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from hesse.check.differences import BLUNT, Probe, Slope, own_scales
from hesse.check.foreign.arrays import is_foreign
from hesse.check.foreign.checks import foreign_gradients
from hesse.check.parts.accepted import excuse, hold
from hesse.check.parts.bends import bent
from hesse.check.parts.boundaries import Culprit, Judge, taken_apart
from hesse.check.parts.causes import leaping
from hesse.check.parts.evident import accumulated, drifts, non_finite, not_deterministic, overflow, overwritten, refused
from hesse.check.parts.forward_mode import function_jvps
from hesse.check.parts.telling import by_tensor, told
from hesse.check.passes.calls import BROKEN, Call, Key, finite, inside, real
from hesse.check.passes.hooks import hooks_of
from hesse.check.passes.pieces import Pieces
from hesse.check.passes.replay import Replay
from hesse.check.report import Report
from hesse.check.subject import Subject
from hesse.finding import Finding
from hesse.objective import Closure

__all__ = ["gradients"]

CHEAP = 1_000_000  # numbers in a model whose forward pass may be run a hundred times


def gradients(
    model_or_fn: nn.Module | Closure | Callable[..., Any],
    inputs: Any = None,
    *,
    jac: Any = None,
    seed: int = 0,
    parts: bool = False,
) -> Report:
    """Check first derivatives by differences; say which module, Function, hook or operation is wrong.

    Parameters, buffers, ``.grad`` and the random generators are left exactly as they were, also after an
    error. Dropout and other layers that draw from torch's generators draw the same numbers in every
    evaluation. What :func:`hesse.check.straight_through` has declared is taken as it is.

    Args:
        model_or_fn: a module with ``model(*inputs)`` returning the loss; a function of tensors; or what
            :func:`hesse.closure` returns, which brings its own inputs. An output that is no scalar is
            summed with fixed random weights, unless it has a scalar ``loss``.
        inputs: a tensor, a tuple or list of arguments, or a mapping of keyword arguments. Of a module the
            trainable parameters are checked, and inputs that require gradients; of a function the floating
            inputs that require gradients, or all of them when none does.
        jac: the gradient of a function of NumPy arrays, or True if the function returns both; see
            :mod:`hesse.check.foreign.checks`, which also takes functions of JAX and TensorFlow.
        seed: of the random directions.
        parts: judge every module by itself even if the whole agrees: a fault behind a tiny scale is then seen.

    Returns:
        A report: ``.ok``, ``.culprits``, ``.findings``, ``.error``, ``.noise``. Module paths are those of
        ``model.named_modules()``; a fault in the model's own forward code is named by its class, one in a
        closure's loss by ``loss_fn()``, one in a function by its argument.

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
        missing_factor at 1, Square (...): The gradient of Square with respect to its input is 0.5 times ...
    """
    if is_foreign(model_or_fn, inputs, jac):
        return foreign_gradients(model_or_fn, inputs, jac, seed=seed)
    subject = Subject(model_or_fn, inputs, seed)
    with subject.kept():
        return _Check(subject, parts).report


class _Check:
    """One check: what was found so far."""

    def __init__(self, subject: Subject, parts: bool) -> None:
        self.subject = subject
        self.parts = parts
        self.report = Report("Gradient check", subject.name)
        self._run()

    def _run(self) -> None:
        subject, report = self.subject, self.report
        loss, again = self._twice()
        if subject.summed:
            report.notes.append("The output is not a scalar: it was summed with fixed random weights.")
        if not bool(loss.isfinite().all()):
            report.findings.append(non_finite(subject, "The loss is not a finite number."))
            return
        subject.stir()
        if self._differs(loss, again) or self._differs(loss, subject.value()):
            return

        try:
            judge = taken_apart(subject)
        except RuntimeError as error:
            finding = refused(subject, error)
            if finding is None:
                raise
            report.findings.append(finding)
            return
        self._note(*excuse(subject, judge.recorder))
        centre, report.slopes, grads = self._whole()
        if subject.replay is None and self._differs(loss, centre):  # held places change the value, not its slopes
            return
        if not finite(grads):
            report.findings.append(non_finite(subject, "The loss is finite but its gradient is not."))
            return
        agrees = not any(s.wrong for s in report.slopes) and report.noise <= BLUNT
        report.findings += accumulated(subject, grads) + overflow(subject, judge)
        report.findings += function_jvps(judge.recorder.functions.calls, subject.eps, subject.generator)
        if agrees and not self.parts and not subject.edits and not self._suspects(judge):
            return
        for place in (subject.moved(), subject.kept()):  # beside the point, unless the function ends there
            with place:
                judge = taken_apart(subject)
                self._note(*excuse(subject, judge.recorder))
                _, slopes, grads = self._whole()
                if slopes:
                    report.findings += self._second_look(judge, slopes, grads)
                    break
        if report.ok and not subject.excused.issuperset(subject.edits):
            report.findings.append(drifts(subject))

    def _differs(self, loss: Tensor, value: Tensor) -> bool:
        """Whether two evaluations at one point are not the same; then that is all there is to say."""
        # Beyond a hundred roundings it is not the order of a parallel sum that differs, it is the function.
        differs = abs(float(loss - value)) > 100 * self.subject.eps * abs(float(loss))
        if differs:
            self.report.findings = [not_deterministic(self.subject, float(loss), float(value))]
        return differs

    def _twice(self) -> tuple[Tensor, Tensor]:
        """The loss, evaluated twice, once the model has set itself up; parameters that it edits are put back."""
        subject = self.subject
        loss = subject.value()
        if subject.edited():
            before = subject.rebase()
            again = subject.value()
            subject.edits = subject.edited()
            if not subject.edits:
                self._note("The model sets parameters at its first call: they are kept.")
                return again, subject.value()
            subject.rebase(before)  # it edits them at every call
            subject.restoring = True
            return subject.value(), subject.value()
        again = subject.value()
        if not torch.equal(loss, again) and torch.equal(again, subject.value()):
            loss = again  # it has set itself up
        return loss, again

    # ---- the whole -------------------------------------------------------------------------------------------

    def _whole(self) -> tuple[Tensor, list[Slope], list[Tensor]]:
        """The loss, its slopes along three directions, and the gradient.

        There are no slopes where the loss or its gradient is not finite.
        """
        subject = self.subject
        probe = self._probe()
        subject.stir()
        grads = subject.gradient()
        if not finite([probe.centre, *grads]):
            return probe.centre, [], grads
        return probe.centre, probe.slopes(self._kept(grads)), grads

    def _probe(self) -> Probe:
        subject = self.subject
        tensors = {name: real(t.detach()) for name, t in subject.tensors.items() if name not in subject.excused}
        scales = own_scales(tensors)
        return Probe(subject.value, list(tensors.values()), list(scales.values()), subject.eps, subject.generator)

    def _kept(self, grads: Sequence[Tensor]) -> list[Tensor]:
        pairs = zip(self.subject.tensors, grads, strict=True)
        return [real(g) for name, g in pairs if name not in self.subject.excused]

    def _note(self, *notes: str) -> None:
        self.report.notes += [note for note in notes if note not in self.report.notes]

    # ---- the parts -------------------------------------------------------------------------------------------

    def _suspects(self, judge: Judge) -> set[str]:
        """Paths of modules with something in them that autograd does not vouch for."""
        # Where the whole agrees, stops are looked at only if that is cheap: most of them are logs and targets.
        cheap = self.parts or sum(t.numel() for t in self.subject.tensors.values()) <= CHEAP
        stops = {stop.path for stop in judge.recorder.stops if not stop.accepted and cheap}
        hooks = {entry[0] for entry in judge.recorder.operations.hooked}
        if self.subject.model is not None:
            hooks |= {hook.path for hook in hooks_of(self.subject.model) if hook.backward}
        return stops | hooks | {path for _, path in judge.functions()}

    def _second_look(self, judge: Judge, slopes: list[Slope], grads: list[Tensor]) -> list[Finding]:
        """Findings at a point beside the given one: a kink sits at a point, a fault is everywhere."""
        report, subject = self.report, self.subject
        seen = [s.error for s in report.slopes if s.wrong]
        wrong = [s for s in slopes if s.wrong]
        blunt = sorted(s.noise for s in slopes)[1] > min([BLUNT, *seen])
        held = set(subject.replay.keys) if subject.replay else set()
        found = overwritten(subject, judge, grads) or self._judged(judge, held, bool(wrong) or blunt)
        if not found and wrong and subject.model is None:
            found = by_tensor(subject, grads)
        if wrong and any(call.twice for call in judge.recorder.functions.calls):
            bends = self._bends()
            inner = [finding.where for finding in bends]
            found = bends + [f for f in found if f.function or not any(inside(path, f.where) for path in inner)]
            found = [f for f in found if f in bends or f.where != subject.name] if bends else found
        if found:
            return found
        if any(s.error > 10 * s.noise for s in wrong):  # no coincidence of kinks
            message = "The gradient of the whole differs from differences of the loss, but every part agrees."
            return [_wrong(subject.name, message, max(s.error for s in wrong))]
        if seen:
            message = "The point lies near kinks (ReLU, abs, max at a tie); beside it, or part by part, all is right."
            return [Finding("kink", subject.name, message, severity="info", value=max(seen))]
        return []

    def _bends(self) -> list[Finding]:
        """Functions whose backward, which the loss differentiates, has a wrong derivative."""
        subject = self.subject
        pieces = Pieces(subject.model)
        with subject.unedited(), torch.enable_grad(), subject.random.again(), pieces.recording():
            subject.evaluate()
        pieces.modules.clear()
        found = bent(pieces, subject.eps, subject.generator, subject.settle)
        return [replace(finding, where=finding.where or subject.name) for finding in found]

    def _judged(self, judge: Judge, held: set[Key], doubtful: bool) -> list[Finding]:
        """Culprits among the parts: first those that are suspect, then all if the whole is not right without them."""
        suspects = self._suspects(judge)
        judge, edited = self._protected(judge)
        found = [self._judge(judge, calls, set(), True) for calls in judge.functions().values()]
        culprits: list[Culprit] = []
        beside: list[Culprit] = []
        for culprit in filter(None, found):
            (beside if culprit.beside else culprits).append(culprit)
        held = held | {culprit.key for culprit in culprits}
        culprits += [c for c in beside if doubtful and not self._right_around(judge, c, held)]
        held = held | {culprit.key for culprit in culprits}
        modules = judge.modules()
        judged: set[str] = set()

        def look(path: str) -> None:
            """Judge a module; if it is wrong, those inside first."""
            nonlocal held
            if path in judged:
                return
            judged.add(path)
            culprit = self._judge(judge, modules[path], held, path in suspects)
            if culprit is None:
                return
            before = held
            for inner in modules:
                if inside(inner, path):
                    look(inner)
            if held != before:
                culprit = self._judge(judge, modules[path], held, path in suspects)
            if culprit is not None:
                culprits.append(culprit)
                held = held | {culprit.key}

        for path in modules:
            if path in suspects:
                look(path)
        if self.parts or (doubtful and not (culprits and self._agrees_without(judge, held))):
            for path in modules:
                look(path)
        return edited + told(culprits, judge, self.subject)

    def _right_around(self, judge: Judge, culprit: Culprit, held: set[Key]) -> bool:
        """Whether the module around a Function is right with it: it reads elsewhere what its arguments stand for."""
        around = judge.modules().get(culprit.path)
        return around is not None and self._judge(judge, around, held, False) is None

    def _judge(self, judge: Judge, calls: Sequence[Call], held: set[Key], flat: bool) -> Culprit | None:
        """What is wrong with some calls; None, and a note, if they cannot be run again by themselves."""
        try:
            replay = Replay(judge.recorder, held)
            return judge.judge(calls, replay, flat) or (leaping(judge, calls, replay) if flat else None)
        except BROKEN as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            self._note(f"{calls[0].path or self.subject.name} cannot be run by itself: {error}".partition("\n")[0])
            return None

    def _protected(self, judge: Judge) -> tuple[Judge, list[Finding]]:
        """The Functions that edit gradients which others need too; the pass as it is when they cannot."""
        edited = [call for call in judge.recorder.functions.calls if call.edited]
        if not edited:
            return judge, []
        other = taken_apart(self.subject, protect=True)
        pairs = [(judge.grads[name], g) for name, g in other.grads.items()]
        for one, two in zip(judge.recorder.calls, other.recorder.calls, strict=False):
            both = zip(one.in_grads, two.in_grads, strict=False)
            pairs += [(a, b) for a, b in both if a is not None and b is not None]
        if all(bool((a - b).norm() <= 1000 * self.subject.eps * b.norm()) for a, b in pairs):
            return judge, []
        found: dict[Any, Finding] = {}
        for call in edited:
            file, line = call.source
            message = f"The backward of {call.name} edits, in place, the gradient that arrives; others get it too."
            remedy = "Compute a new tensor: grad * x, not grad.mul_(x) or grad *= x."
            found.setdefault(
                call.cls,
                Finding(
                    "inplace_grad", call.path or self.subject.name, message, remedy, severity="error", value=1.0,
                    function=call.name, file=file, line=line,
                ),
            )  # fmt: skip
        return other, list(found.values())

    def _agrees_without(self, judge: Judge, held: set[Key]) -> bool:
        """Whether the rest agrees with differences when the culprits are held."""
        subject = self.subject
        before = subject.replay, set(subject.excused)
        hold(subject, judge.recorder, held)
        try:
            slopes = self._probe().slopes(self._kept(list(judge.grads.values())))
        finally:
            subject.replay, subject.excused = before
        return not any(s.wrong for s in slopes)


def _wrong(where: str, message: str, error: float) -> Finding:
    remedy = (
        "Look at its backward pass: custom autograd Functions, hooks, detach(), .data, in-place edits, "
        "values kept from an earlier call. If a gradient stops on purpose, say so with requires_grad_(False)."
    )
    return Finding("wrong_gradient", where, message, remedy, severity="error", value=error)
