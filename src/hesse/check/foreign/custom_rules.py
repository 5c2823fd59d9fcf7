"""Derivatives written by hand inside JAX and TensorFlow functions, each judged by itself.

``jax.custom_vjp``, ``jax.custom_jvp`` and ``tf.custom_gradient`` are what ``autograd.Function`` is to torch: the places
where a gradient can be wrong. Their calls are recorded while the function is evaluated once,
without compilation, and each is then held against differences of itself, at the arrays it was called with.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch.utils import _pytree as pytree

from hesse.check.differences import Probe, Slope, own_scales
from hesse.check.foreign.arrays import Foreign
from hesse.check.naming.kinds import Case
from hesse.check.naming.kinds import name as kind_of
from hesse.check.parts.forward_mode import words
from hesse.check.passes.functions import defined
from hesse.finding import Finding, InputError

__all__ = ["Rule", "culprits"]


@dataclass(frozen=True)
class Rule:
    """One call of a function with a derivative of its own.

    Args:
        name: of the function.
        run: the function with that derivative.
        args: what it was called with.
        written: the code of the derivative.
    """

    name: str
    run: Callable[..., Any]
    args: tuple[Any, ...]
    written: Callable[..., Any]


def culprits(subject: Foreign, second: bool = False) -> list[Finding]:
    """The rules whose own derivative is wrong, each once, worst first; none in NumPy.

    Args:
        subject: what is checked; its tensors are as they were when it was found to be wrong.
        second: judge second derivatives.
    """
    rules = {"jax": _jax_rules, "tensorflow": _tensorflow_rules}.get(subject.language.name)
    found: dict[str, Finding] = {}
    for rule in rules(subject) if rules is not None else ():
        finding = None if rule.name in found else _judge(rule, second, subject)
        if finding is not None:
            found[rule.name] = finding
    return sorted(found.values(), key=lambda f: -float(f.value or 0))


def _judge(rule: Rule, second: bool, subject: Foreign) -> Finding | None:
    try:
        piece = Foreign(rule.run, rule.args, None, None, 0)
    except InputError:  # no floating array among its arguments
        return None
    piece.value()
    grads = piece.gradient()
    scales = list(own_scales(piece.tensors).values())
    slopes = Probe(piece.value, list(piece.tensors.values()), scales, piece.eps, piece.generator).slopes(grads)
    wrong = [s for s in slopes if s.wrong]
    if second and not wrong:
        return _judge_second(rule, piece)
    if not wrong:
        return None
    kind = kind_of(
        Case(piece.tensors, dict(zip(piece.tensors, grads, strict=True)), piece.value, piece.eps),
        slopes,
        piece.generator,
    )
    wrt = " and ".join(kind.evidence.get("tensors", piece.tensors))
    message = f"The gradient of {rule.name} with respect to {wrt} {kind.message}."
    return _finding(rule, kind.name, message, kind.remedy, wrong, kind.evidence)


def _judge_second(rule: Rule, piece: Foreign) -> Finding | None:
    tensors, scales = list(piece.tensors.values()), list(own_scales(piece.tensors).values())
    probe = Probe(piece.value, tensors, scales, piece.eps, piece.generator)
    u = probe.random_direction()

    def along() -> Any:
        return sum(
            (g.double() * w.double()).reshape(-1).sum().reshape(1) for g, w in zip(piece.gradient(), u, strict=True)
        )

    slopes = Probe(along, tensors, scales, piece.eps, piece.generator).slopes(piece.bend(u))
    wrong = [s for s in slopes if s.wrong]
    if not wrong:
        return None
    message = f"The gradient of {rule.name} is right, but its own derivative {words(slopes)}."
    remedy = "Compute the gradient from the saved inputs in differentiable operations."
    return _finding(rule, "second_derivative", message, remedy, wrong, {})


def _finding(rule: Rule, kind: str, message: str, remedy: str, wrong: list[Slope], evidence: dict[str, Any]) -> Finding:
    file, line = defined(rule.written)
    error = max(s.error for s in wrong)
    return Finding(kind, rule.name, message, remedy, "error", error, None, None, rule.name, file, line, evidence)


def _jax_rules(subject: Foreign) -> Iterator[Rule]:
    """Calls of ``custom_vjp`` and ``custom_jvp`` functions that JAX did not bring, at numbers, not at tracers."""
    jax: Any = importlib.import_module("jax")
    calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []
    with _watched(jax.custom_vjp, calls), _watched(jax.custom_jvp, calls), jax.disable_jit():
        subject.value()
    for rule, args, kwargs in calls:
        function = rule.fun
        if str(getattr(function, "__module__", "")).partition(".")[0] == "jax" or kwargs:
            continue
        if any(isinstance(x, jax.core.Tracer) for x in pytree.tree_leaves(args)):
            continue  # inside vmap, scan or another transformation
        fixed = {i % len(args) for i in rule.nondiff_argnums}
        moving = tuple(x for i, x in enumerate(args) if i not in fixed)
        written = getattr(rule, "bwd", None) or getattr(rule, "jvp", None) or function
        yield Rule(function.__name__, _with_fixed(rule, args, fixed), moving, written)


def _with_fixed(rule: Any, args: tuple[Any, ...], fixed: set[int]) -> Callable[..., Any]:
    """The rule as a function of the other arguments, under their names."""

    def run(*moving: Any) -> Any:
        rest = iter(moving)
        return rule(*(x if i in fixed else next(rest) for i, x in enumerate(args)))

    parameters = enumerate(inspect.signature(rule.fun).parameters.values())
    run.__signature__ = inspect.Signature([p for i, p in parameters if i not in fixed])  # type: ignore[attr-defined]
    return run


@contextmanager
def _watched(cls: Any, calls: list[Any]) -> Iterator[None]:
    plain = cls.__call__

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append((self, args, kwargs))
        return plain(self, *args, **kwargs)

    cls.__call__ = call
    try:
        yield
    finally:
        cls.__call__ = plain


def _tensorflow_rules(subject: Foreign) -> Iterator[Rule]:
    """Calls of functions decorated with ``tf.custom_gradient``."""
    tf: Any = importlib.import_module("tensorflow")
    home: Any = importlib.import_module("tensorflow.python.ops.custom_gradient")
    plain = getattr(home, "_eager_mode_decorator", None)
    if plain is None:
        return
    calls: list[tuple[Any, tuple[Any, ...]]] = []

    def call(f: Any, args: Any, kwargs: Any) -> Any:
        if not kwargs:
            calls.append((f, args))
        return plain(f, args, kwargs)

    eager = tf.config.functions_run_eagerly()
    home._eager_mode_decorator = call
    try:
        tf.config.run_functions_eagerly(True)
        subject.value()
    finally:
        home._eager_mode_decorator = plain
        tf.config.run_functions_eagerly(eager)
    for f, args in calls:
        if not f.__module__.startswith("tensorflow."):
            yield Rule(f.__name__, tf.custom_gradient(f), tuple(args), f)
