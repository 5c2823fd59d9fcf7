"""Where a gradient goes wrong: every module call of one real backward pass, held against differences of
that call alone.

A wrong backward spoils all gradients upstream of it, and its culprit often owns no parameter, so parameters
cannot tell where it sits. Module boundaries can: with the gradient that arrived at a module's outputs, the
gradients that left by its inputs and parameters are its vector-Jacobian product, right or wrong by itself.
What is compared comes from the real pass, so hooks, in-place edits and stale values are seen; a module that
is wrong clears the modules that contain it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hesse.check.calls import Call, Recorder
from hesse.check.differences import Probe, Slope, own_scales

__all__ = ["Culprit", "describe", "judge"]


@dataclass(frozen=True)
class Culprit:
    """A module whose own vector-Jacobian product is wrong: by what (``wrt``), and the slopes that show it."""

    path: str
    wrt: tuple[str, ...]
    slopes: tuple[Slope, ...]

    @property
    def error(self) -> float:
        return max(slope.error for slope in self.slopes if slope.wrong)


def judge(
    recorder: Recorder,
    model: nn.Module,
    grads: dict[str, Tensor],
    eps: float,
    generator: torch.Generator,
    settle: Callable[[], None],
) -> list[Culprit]:
    """The modules that are wrong by themselves, worst first; modules that contain one of them are not judged.

    Args:
        recorder: a recorded and differentiated pass.
        model: its parameters are as they were in that pass.
        grads: their gradients in that pass, by name.
        eps: rounding unit of the coarsest number format.
        generator: where random directions come from.
        settle: puts buffers back to where they were before the pass.
    """
    params: dict[str, Tensor] = dict(model.named_parameters())
    # A custom Function hides its arguments from the recorder: then the owner of the parameter uses it.
    uses = {name: recorder.uses[id(params[name])] or {name.rpartition(".")[0]} for name in grads}
    by_path: dict[str, list[Call]] = {}
    for call in recorder.calls:
        if any(w is not None for w in call.out_grads):
            by_path.setdefault(call.path, []).append(call)

    culprits: list[Culprit] = []
    for path, calls in by_path.items():
        if any(_inside(culprit.path, path) for culprit in culprits):
            continue
        evaluate = _evaluator(calls, settle)
        inside = {name: params[name] for name in grads if all(_inside(use, path) for use in uses[name])}
        own = [name for name in inside if name.rpartition(".")[0] == path]
        below = [name for name in inside if name not in own]
        inputs = {f"{k}.{i}": x for k, call in enumerate(calls) for i, x in enumerate(call.inputs)}
        arrived = zip(inputs.items(), (g for call in calls for g in call.in_grads), strict=True)
        in_grads = {name: torch.zeros_like(x) if g is None else g for (name, x), g in arrived}
        groups = [("its input" if len(inputs) == 1 else "its inputs", inputs, in_grads)]
        groups += [(name.rpartition(".")[2], {name: inside[name]}, grads) for name in own]
        groups += [("the parameters below", {name: inside[name] for name in below}, grads)]

        wrong: dict[str, list[Slope]] = {}
        for words, tensors, derivatives in groups:
            slopes = _slopes(evaluate, tensors, [derivatives[name] for name in tensors], eps, generator)
            if any(slope.wrong for slope in slopes):
                wrong[words] = slopes
        if wrong:
            culprits.append(Culprit(path, tuple(wrong), tuple(s for slopes in wrong.values() for s in slopes)))
    return sorted(culprits, key=lambda c: -c.error)


def describe(slopes: Sequence[Slope]) -> str:
    """What kind of fault the slopes along several directions show, in words.

    Example:
        >>> describe([Slope(-2.0, 2.0, 1e-3, 1e-3), Slope(-4.0, 4.0, 1e-3, 1e-3)])
        'has the wrong sign'
        >>> describe([Slope(1.0, 2.0, 1e-3, 1e-3), Slope(2.0, 4.0, 1e-3, 1e-3)])
        'is 0.5 times what it should be'
    """
    slopes = [s for s in slopes if s.wrong or s.noise < 0.1]
    if all(abs(s.analytic) <= 1e-6 * abs(s.numeric) for s in slopes):
        return "is zero although the loss depends on it: the path is detached"
    sharpest = min(slopes, key=lambda s: s.noise)
    ratio = sharpest.analytic / sharpest.numeric if sharpest.numeric else 0.0
    blur = sharpest.noise + 0.005
    if len(slopes) > 1 and all(
        abs(s.analytic - ratio * s.numeric) <= abs(ratio) * s.limit + blur * abs(s.analytic) for s in slopes
    ):
        if abs(ratio + 1) <= blur:
            return "has the wrong sign"
        if abs(ratio - 1) > 2 * blur:
            return f"is {ratio:.3g} times what it should be"
    return f"is off by {max(s.error for s in slopes):.0%}, differently in each direction"


def _slopes(
    evaluate: Callable[[], Tensor],
    tensors: dict[str, Tensor],
    grads: Sequence[Tensor],
    eps: float,
    generator: torch.Generator,
) -> list[Slope]:
    if not tensors:
        return []
    scales = own_scales(tensors)
    probe = Probe(evaluate, list(tensors.values()), list(scales.values()), eps, generator)
    return probe.slopes(grads)


def _evaluator(calls: Sequence[Call], settle: Callable[[], None]) -> Callable[[], Tensor]:
    def evaluate() -> Tensor:
        values = [call.weighted().detach() for call in calls]
        settle()
        return torch.cat(values)

    return evaluate


def _inside(path: str, container: str) -> bool:
    return not container or path == container or path.startswith(f"{container}.")
