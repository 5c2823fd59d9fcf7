"""Culprits in words: each as a finding that says what is wrong, where, and in whose line.

What names the place is the innermost that a user can change: a Function, a hook or an operation with its line, else
the forward of a module of theirs. Torch's own layers are right; where one seems wrong, what surrounds it is to blame.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from hesse.check.differences import Probe, own_scales
from hesse.check.naming.kinds import Case
from hesse.check.naming.kinds import name as kind_of
from hesse.check.parts.boundaries import Culprit, Judge
from hesse.check.parts.causes import cause_of
from hesse.check.passes.calls import real
from hesse.check.passes.functions import FunctionCall
from hesse.check.passes.recording import LOSS
from hesse.check.subject import Subject
from hesse.finding import Finding

__all__ = ["by_tensor", "told"]


def told(culprits: Sequence[Culprit], judge: Judge, subject: Subject) -> list[Finding]:
    """The culprits as findings, best guess first."""
    model = subject.model
    types = {path: type(m).__name__ for path, m in model.named_modules()} if model else {"": subject.name}
    wrong = by_tensor(subject, list(judge.grads.values())) if culprits and model is None else []
    # One layer of torch that is wrong was edited; several are used in a way that spoils them.
    layers = [c.path for c in culprits if model is not None and _of_user(model, c.path) != c.path]
    surrounded = layers if len({_of_user(model, path) for path in layers if model}) < len(layers) else []
    findings = []
    for culprit in culprits:
        call = culprit.calls[0]
        label = call.name if isinstance(call, FunctionCall) else types.get(culprit.path, "the loss")
        for cause in cause_of(culprit, judge, subject):
            function, file, line = cause.function, cause.file, cause.line
            if isinstance(call, FunctionCall):
                function, (file, line) = call.name, call.source
            elif file is None:
                file, line = subject.source(culprit.path)
            where = culprit.path if cause.where is None else cause.where
            if model is not None and function is None and (call.checkpointed or call.path in surrounded):
                where = _of_user(model, where)
                file, line = subject.source(where)
            message = f"The gradient of {label} with respect to {culprit.wrt} {cause.message}."
            findings.append(
                Finding(
                    cause.kind, wrong[0].where if wrong else where or subject.name, message, cause.remedy,
                    severity="error", value=culprit.error, function=function, file=file, line=line,
                    evidence=cause.evidence,
                )
            )  # fmt: skip
    findings.sort(key=lambda f: (f.function is None, -float(f.value or 0)))
    once = {(f.kind, f.where, f.function, f.line): f for f in reversed(findings)}
    return [f for f in findings if once.get((f.kind, f.where, f.function, f.line)) is f]


def by_tensor(subject: Subject, grads: Sequence[Tensor]) -> list[Finding]:
    """One tensor at a time, on the whole loss: for functions, and for faults outside every module."""
    scales = own_scales(subject.tensors)
    found = []
    for (name, tensor), grad in zip(subject.tensors.items(), grads, strict=True):
        if name in subject.excused:
            continue
        tensor, grad = real(tensor.detach()), real(grad)
        probe = Probe(subject.value, [tensor], [scales[name]], subject.eps, subject.generator)
        slopes = probe.slopes([grad])
        if any(s.wrong for s in slopes):
            error = max(s.error for s in slopes if s.wrong)
            case = Case({name: tensor}, {name: grad}, subject.value, subject.eps, subject.batch)
            kind = kind_of(case, slopes, subject.generator)
            message = f"The gradient with respect to {name} {kind.message}."
            file, line = subject.source("")
            found.append(
                Finding(
                    kind.name, name, message, kind.remedy, severity="error", value=error, file=file, line=line,
                    evidence=kind.evidence,
                )
            )  # fmt: skip
    return sorted(found, key=lambda f: -float(f.value or 0))


def _of_user(model: nn.Module, path: str) -> str:
    """The innermost module at or around ``path`` whose forward torch did not bring; ``path`` if there is none."""
    here = path
    while path != LOSS:
        if not type(model.get_submodule(here)).forward.__module__.startswith("torch."):
            return here
        if not here:
            break
        here = here.rpartition(".")[0]
    return path
