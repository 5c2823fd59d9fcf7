"""Gradients that are not derivatives, and need not be: declared, torch's own, or a teacher's.

What is taken as it is, is held still while the rest is compared (:mod:`hesse.check.passes.replay`), and said in a note.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from hesse.check.passes.calls import inside
from hesse.check.passes.recording import Recorder
from hesse.check.passes.replay import Replay
from hesse.check.subject import Subject

__all__ = ["excuse", "hold"]

ALIKE = 0.5  # cosine of the weights of a teacher and its student; those of strangers have none in common


def excuse(subject: Subject, recorder: Recorder) -> list[str]:
    """Hold what was declared, and what torch's own layers take for constant; says what that is."""
    notes: list[str] = []
    held = {place.key for place in recorder.places if place.declared}
    if held:
        notes.append("Straight-through gradients were declared, and are taken as they are.")
    accepted = {stop.key for stop in recorder.stops if stop.accepted}
    if accepted:
        notes.append("A layer of torch takes some of its values for constant (a power iteration).")
    teachers = _teachers(subject.model, recorder)
    for path, student in teachers.items():
        notes.append(f"{path} is a copy of {student} that runs without gradients, a teacher: it is taken for frozen.")
    params = dict(subject.model.named_parameters()) if teachers and subject.model is not None else {}
    for name, p in params.items():
        if any(inside(name, path) for path in teachers):
            subject.excused.add(name)
            recorder.private.add(id(p))
            accepted |= {key for key, source in recorder.operations.written if source == id(p)}  # it follows
    hold(subject, recorder, held | accepted)
    for weight, row in recorder.operations.untrained:
        for name, tensor in subject.tensors.items():
            if tensor is weight and row is None:
                subject.excused.add(name)
                notes.append(f"The gradient of {name} is scaled by the frequencies of words, and is not checked.")
            elif tensor is weight and row is not None:
                subject.pin(tensor, row)
                notes.append(f"Row {row} of {name} is padding, which has no gradient.")
    return notes


def hold(subject: Subject, recorder: Recorder, keys: set[tuple[Any, ...]]) -> None:
    subject.replay = Replay(recorder, keys) if keys else None
    paths = [key[1] for key in keys if key[0] == "module"]
    params = dict(subject.model.named_parameters()) if subject.model is not None else {}
    for name, p in params.items():
        uses = recorder.uses[id(p)]
        if id(p) in recorder.private or any(inside(use, path) for use in uses for path in paths):
            subject.excused.add(name)


def _teachers(model: nn.Module | None, recorder: Recorder) -> dict[str, str]:
    """Modules that never run with gradients and whose weights resemble those of a module that does: of whom."""
    modules = {path: m for path, m in model.named_modules() if path} if model is not None else {}
    dark = recorder.dark - recorder.lit
    if not dark:
        return {}
    found: dict[str, str] = {}
    for path, module in modules.items():
        params = list(module.named_parameters())
        if any(inside(path, other) for other in found) or not params or not all(id(p) in dark for _, p in params):
            continue
        for other, twin in modules.items():
            pairs = list(zip(params, twin.named_parameters(), strict=False))
            same = len(pairs) == len(params) == len(list(twin.parameters())) and twin is not module
            if same and all(n == m and p.shape == q.shape and id(q) in recorder.lit for (n, p), (m, q) in pairs):
                one = torch.cat([p.detach().flatten() for (_, p), _ in pairs])
                two = torch.cat([q.detach().flatten() for _, (_, q) in pairs])
                if float(torch.nn.functional.cosine_similarity(one, two, dim=0)) > ALIKE:
                    found[path] = other
    return found
