"""What an optimiser owes whoever saves it: the state comes back, all of it and in its own number format, and belongs to
one optimiser alone.

A run that is interrupted, saved and resumed must be the run that was not, bit for bit. What breaks that is kept outside
``self.state`` (in an attribute, a class, a module), is cast by torch's ``load_state_dict`` (float32 moments of bfloat16
parameters), or is drawn from a generator that no seed reaches.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from hesse.check.contract.trial import RAISED, Stand, Trial, sentence
from hesse.finding import Finding

__all__ = ["STATE"]

BEFORE, AFTER = 3, 4  # steps before it is saved, and from there on


def determinism(stand: Stand) -> Iterator[Finding]:
    """The same numbers and the same seed give the same steps, whoever else is at work."""
    alone = [stand.trial().run(BEFORE) for _ in range(2)]
    if not _same(*alone):
        before = _memory(stand.kind)
        stand.trial().run(BEFORE)
        if _memory(stand.kind) != before:
            yield _shared(stand, "A second optimiser, made after the first, does not take the same steps")
            return
        message = "The same problem with the same seeds gives other steps when it is run again."
        remedy = "Draw random numbers from torch's generators, and keep nothing in the class or the module."
        yield stand.finding("determinism", message, remedy)
        return
    one, two = stand.trial(), stand.trial(shapes=_others(stand))
    found = []
    for i in range(BEFORE):
        stand.sow(1 if i == 0 else 100 + i)
        random = torch.get_rng_state()
        two.step()
        torch.set_rng_state(random)
        one.step()
        found.append(one.values())
    twin = stand.trial()
    there = []
    for i in range(BEFORE):
        stand.sow(1 if i == 0 else 100 + i)
        twin.step()
        there.append(twin.values())
    if not _same(found, there):
        yield _shared(stand, "Two optimisers at work by turns disturb each other")


def resume(stand: Stand) -> Iterator[Finding]:
    """Saved and loaded, it goes on as if nothing had happened."""
    trial = stand.trial()
    trial.run(BEFORE)
    saved, finding = _through_a_file(stand, trial)
    if finding is not None:
        yield finding
    if saved is None:
        return
    again = stand.trial()
    _move(again, trial)
    method = stand.method("load_state_dict", "state_dict")
    try:
        again.optimizer.load_state_dict(saved)
    except RAISED as error:
        message = f"Its own saved state is refused: {sentence(error)}."
        remedy = "Keep the state of a parameter as a flat dict of tensors in self.state[p]."
        yield stand.finding("resume", message, remedy, method=method)
        return
    try:
        one, two = trial.run(AFTER, seed=2), again.run(AFTER, seed=2)
    except RAISED as error:
        message = f"A step after load_state_dict raises {sentence(error)}."
        remedy = "Keep everything that steps need in self.state[p] or in param_groups, and rebuild the rest from there."
        yield stand.finding("resume", message, remedy, method=method)
        return
    if not _same(one, two):
        first = next(i for i, (a, b) in enumerate(zip(one, two, strict=True)) if not _same([a], [b]))
        message = f"Resumed from its saved state, it goes another way from step {first + 1} on."
        remedy = (
            "Something that steps depend on is not in state_dict(): an attribute of the optimiser, a counter. Keep "
            "it in self.state[p] or in param_groups."
        )
        yield stand.finding("resume", message, remedy, method=method)


def state_dtype(stand: Stand) -> Iterator[Finding]:
    """State tensors come back in the dtype and with the values they were saved in."""
    try:
        trial = stand.trial(dtype=torch.bfloat16)
        trial.run(BEFORE)
        again = stand.trial(dtype=torch.bfloat16)
    except RAISED:
        return
    saved = copy.deepcopy(trial.optimizer.state_dict())
    again.optimizer.load_state_dict(copy.deepcopy(saved))
    lost: dict[str, str] = {}
    minor: dict[str, str] = {}
    for name, a, b in _pairs(saved["state"], again.optimizer.state_dict()["state"]):
        if a.dtype != b.dtype:
            words = f"{str(a.dtype).removeprefix('torch.')} comes back as {str(b.dtype).removeprefix('torch.')}"
            small = a.ndim == 0 and a.is_floating_point()
            (minor if small else lost)[name] = words
    for names, severity in ((lost, "error"), (minor, "warning")):
        if names:
            listed = ", ".join(f"{name!r} ({words})" for name, words in names.items())
            message = (
                f"State changes its number format when it is loaded into an optimiser of bfloat16 parameters: {listed}."
            )
            remedy = (
                "torch casts all state but 'step' to the parameter's dtype: put the saved tensors back after "
                "super().load_state_dict()."
            )
            method = stand.method("load_state_dict")
            yield stand.finding("state_dtype", message, remedy, method=method, severity=severity)


def copies(stand: Stand) -> Iterator[Finding]:
    """A deep copy goes the same way, and leaves the original alone."""
    trial = stand.trial()
    trial.run(BEFORE)
    try:
        twin = trial.copy()
        one = twin.run(AFTER, seed=2)
    except (*RAISED, pickle.PicklingError) as error:
        # torch's own LBFGS is no better: Optimizer.__getstate__ leaves attributes out. Loud, and so only a warning.
        message = f"A deep copy of model and optimiser cannot be made or stepped: {sentence(error)}."
        remedy = "torch copies param_groups and state only: write __getstate__ and __setstate__ for other attributes."
        yield stand.finding("copy", message, remedy, severity="warning")
        return
    if not _same(one, trial.run(AFTER, seed=2)):
        message = "A deep copy of model and optimiser does not take the steps of the original."
        yield stand.finding("copy", message, "Keep no table by id(p) and no reference to parameters elsewhere.")


def graph(stand: Stand) -> Iterator[Finding]:
    """State holds numbers, not the history of how they came about."""
    trial = stand.trial()
    trial.run(BEFORE)
    leaves = pytree.tree_leaves(list(trial.optimizer.state.values()))
    if any(isinstance(x, Tensor) and x.requires_grad for x in leaves):
        message = "State tensors carry an autograd graph: memory grows with every step."
        yield stand.finding("graph", message, "Decorate step with torch.no_grad().")
    if any(not p.is_leaf or not p.requires_grad for p in trial.params):
        message = "After a step parameters are no longer leaves that require gradients."
        yield stand.finding("graph", message, "Update p in place under torch.no_grad().")


def _through_a_file(stand: Stand, trial: Trial) -> tuple[dict[str, Any] | None, Finding | None]:
    """The state dict as it comes back from a file, and what was wrong with that."""
    file = io.BytesIO()
    method = stand.method("state_dict")
    remedy = "Keep numbers, tensors and plain dicts and lists of them in state and param_groups, nothing else."
    try:
        torch.save(trial.optimizer.state_dict(), file)
    except (*RAISED, pickle.PicklingError) as error:
        message = f"torch.save of its state_dict() raises {sentence(error)}."
        return None, stand.finding("pickle", message, remedy, method=method)
    file.seek(0)
    try:
        return torch.load(file, weights_only=True), None
    except pickle.UnpicklingError as error:
        message = f"Its saved state cannot be loaded with weights_only=True, torch's default: {_class_named(error)}."
    # What else it does is asked of a copy: pickled objects are never loaded.
    return copy.deepcopy(trial.optimizer.state_dict()), stand.finding("pickle", message, remedy, method=method)


def _class_named(error: BaseException) -> str:
    words = str(error).replace("\n", " ").split()
    named = [word.strip("`'[],.") for word in words if "." in word.strip("`'[],.") and "(" not in word]
    known = [word for word in named if not word.startswith(("torch.", "https"))]
    return f"it holds a {known[0]}" if known else sentence(error)


def _move(to: Trial, source: Trial) -> None:
    with torch.no_grad():
        for p, q in zip(to.params, source.params, strict=True):
            p.copy_(q)


def _pairs(saved: Any, loaded: Any) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Tensors at the same place of two nests, with the name of the entry they belong to."""
    for number, entries in saved.items():
        for name, value in entries.items():
            one, two = (pytree.tree_leaves(x) for x in (value, loaded.get(number, {}).get(name)))
            for a, b in zip(one, two, strict=False):
                if isinstance(a, Tensor) and isinstance(b, Tensor):
                    yield str(name), a, b


def _others(stand: Stand) -> list[tuple[int, ...]] | None:
    """The shapes of a second problem, the same number of parameters."""
    return None if stand.takes == "model" else [tuple(shape) for shape in stand.shapes]


def _shared(stand: Stand, message: str) -> Finding:
    remedy = "Keep state in self.state[p]: class attributes, default arguments and module globals are shared by all."
    return stand.finding("shared_state", f"{message}.", remedy)


def _memory(kind: type) -> list[Any]:
    """What a class could remember outside its objects: attributes, default arguments, closures, globals in use."""
    found: list[Any] = []
    for owner in kind.__mro__:
        if owner.__module__.startswith("torch.") or owner is object:
            break
        for value in vars(owner).values():
            function = getattr(value, "__wrapped__", value)
            while hasattr(function, "__wrapped__"):
                function = function.__wrapped__
            code = getattr(function, "__code__", None)
            if code is None:
                found.append(_print(value))
                continue
            found.append(_print([function.__defaults__, function.__kwdefaults__]))
            found.append(_print([cell.cell_contents for cell in function.__closure__ or ()]))
            found.append(_print([function.__globals__.get(name) for name in code.co_names]))
    return found


def _print(value: Any, depth: int = 4) -> Any:
    """A value's fingerprint: equal for equal numbers."""
    if isinstance(value, Tensor):
        return tuple(value.shape), float(value.detach().abs().double().sum()) if value.numel() else 0.0
    if isinstance(value, int | float | str | bytes | bool | None):
        return value
    if depth and isinstance(value, dict):
        return len(value), [_print(x, depth - 1) for x in value.values()]
    if depth and isinstance(value, list | tuple | set):
        return len(value), [_print(x, depth - 1) for x in value]
    return type(value).__name__


def _same(one: list[list[Tensor]], other: list[list[Tensor]]) -> bool:
    return all(torch.equal(a, b) for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True))


STATE: dict[str, Callable[[Stand], Iterator[Finding]]] = {
    "determinism": determinism,
    "resume": resume,
    "state_dtype": state_dtype,
    "copy": copies,
    "graph": graph,
}
