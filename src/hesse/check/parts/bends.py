"""Which piece of a pass has a wrong second derivative?

The gradient that a piece returns is itself a function: of its inputs, its parameters and the gradients that arrive.
Along any direction it must change as differences of it do. Functions whose backward computes from detached values, or
from intermediates kept on ``ctx``, have a right gradient with a wrong one of its own, often zero;
``once_differentiable`` and operations without a formula refuse. The innermost piece that fails is to blame and clears
what contains it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.autograd.forward_ad as fw
from torch import Tensor

from hesse.check.differences import Probe, Slope, own_scales
from hesse.check.parts.forward_mode import words
from hesse.check.passes.calls import finite
from hesse.check.passes.functions import Functions, backward_of, defined
from hesse.check.passes.hooks import title
from hesse.check.passes.pieces import Piece, Pieces, operations_of, piece_of
from hesse.check.straight_through import declared
from hesse.curvature.culprit import operation
from hesse.finding import Finding

__all__ = ["REFUSED", "Bend", "bent", "by_forward_mode", "mean_noise", "refuser", "second_derivative"]

CALLS = 2  # of one module or Function that are asked; a recurrent cell may have many
REFUSED = (RuntimeError, NotImplementedError)
MATH = "Run it with torch.nn.attention.sdpa_kernel(SDPBackend.MATH), which can be differentiated twice."
NORM = "torch's fused kernel is wrong at second order: write the weight as g * v / v.norm(dim=..., keepdim=True)."
PLAIN = "Write the operation out in plain ones, or take differences of gradients (hesse.curvature, mode='differences')."
NO_FORMULA = re.compile(r"not implemented|differentiate twice|double backward|does not support|for the operator")
# Of torch's own operations that refuse or are wrong: part of the name, and the way round.
KNOWN = (
    ("scaled_dot_product", MATH),
    ("multi_head_attention", MATH),
    ("weight_norm", NORM),
    ("cudnn", "Run it with torch.backends.cudnn.flags(enabled=False)."),
    ("mkldnn", "Run it with torch.backends.mkldnn.flags(enabled=False)."),
    ("embedding_bag", "Use nn.Embedding, and take the mean, sum or maximum of its rows."),
)


@dataclass(frozen=True)
class Verdict:
    """What is wrong with a piece: refused (and by what), not finite, or wrong, and the slopes that show it.

    Those are of the piece's gradient: along its inputs and parameters, and along the gradients that arrive. A piece
    that the backward of another (``caller``) calls is wrong in its own first derivative.
    """

    piece: Piece
    refused: str = ""
    infinite: bool = False
    inner: tuple[Slope, ...] = ()
    arriving: tuple[Slope, ...] = ()
    caller: str = ""

    @property
    def error(self) -> float:
        return 1.0 if self.refused or self.infinite else max(s.error for s in (*self.inner, *self.arriving) if s.wrong)


def bent(
    pieces: Pieces,
    eps: float,
    generator: torch.Generator,
    settle: Callable[[], None],
    excused: Collection[str] = (),
    hooks: Sequence[tuple[str, Any]] = (),
) -> list[Finding]:
    """The pieces of a pass whose own second derivative is wrong or refused, Functions first, worst first.

    Args:
        pieces: of a recorded pass.
        eps: rounding unit of the coarsest number format.
        generator: where random directions come from.
        settle: puts buffers back after a call.
        excused: paths of modules that are not asked, nor those that contain them.
        hooks: on modules and tensors, with the paths where they were hung.
    """
    verdicts: list[Verdict] = []
    asked: Counter[Any] = Counter()
    for piece in pieces.functions:
        key = piece.cls, piece.path
        asked[key] += 1
        if asked[key] <= CALLS and not declared(piece.cls):
            verdict = second_derivative(piece, eps, generator, settle)
            if verdict is not None:
                asked[key] = CALLS
                verdicts.append(verdict)
    guilty = [*excused, *(verdict.piece.path for verdict in verdicts)]
    for piece in pieces.modules:
        asked[piece.path] += 1
        hooked = any(path == piece.path for path, _ in hooks)
        if any(_inside(path, piece.path) for path in guilty) or asked[piece.path] > CALLS:
            continue
        if verdicts and piece.plain and not hooked:
            continue  # layers of torch rarely have a fault of their own beside one that was found
        verdict = second_derivative(piece, eps, generator, settle)
        if verdict is not None:
            guilty.append(piece.path)
            verdicts.append(_inner(verdict, eps, generator, settle))
    order = sorted(verdicts, key=lambda v: (v.piece.kind != "function", -v.error))
    return [_finding(verdict, [hook for path, hook in hooks if path == verdict.piece.path]) for verdict in order]


def second_derivative(
    piece: Piece, eps: float, generator: torch.Generator, settle: Callable[[], None] = lambda: None
) -> Verdict | None:
    """What is wrong with the second derivative of a piece, by itself; None if nothing is, or there is none."""
    bend = Bend(piece, eps, generator, settle)
    return bend.verdict() if bend.weights else None


class Bend:
    """The gradient of a piece along fixed numbers, as a function to be differentiated once more.

    What is differentiated first is ``sum(weights * outputs)``; then inputs, parameters and weights alike move, for a
    backward pass depends on what arrives, too.

    Args:
        piece, eps, generator, settle: as for :func:`second_derivative`.
    """

    def __init__(
        self, piece: Piece, eps: float, generator: torch.Generator, settle: Callable[[], None] = lambda: None
    ) -> None:
        self.piece, self.eps, self.generator, self.settle = piece, eps, generator, settle
        self.live = piece.tensors
        outputs = piece.outputs() if self.live else []
        settle()
        self.weights: list[Tensor] = []
        if any(y.requires_grad for y in outputs):
            self.weights = [torch.randn(y.shape, generator=generator).to(y).requires_grad_() for y in outputs]
        self.scales = own_scales(self.live)
        signs = {n: torch.randint(0, 2, x.shape, generator=generator) * 2 - 1 for n, x in self.live.items()}
        self.along = {name: sign.to(self.live[name]) * self.scales[name] for name, sign in signs.items()}

    def gradient(self, create: bool) -> list[Tensor]:
        """The gradient times the fixed numbers, element by element."""
        pairs = [(y, w) for y, w in zip(self.piece.outputs(), self.weights, strict=True) if y.requires_grad]
        found = torch.autograd.grad(
            [y for y, _ in pairs],
            list(self.live.values()),
            [w for _, w in pairs],
            create_graph=create,
            allow_unused=True,
        )
        dense = [g.to_dense() if g is not None and g.is_sparse else g for g in found]
        return [(g * self.along[name]).flatten() for name, g in zip(self.live, dense, strict=True) if g is not None]

    def evaluate(self) -> Tensor:
        with torch.enable_grad():
            parts = [part.detach().double() for part in self.gradient(False)]
        self.settle()  # not before: a backward pass may need the buffers as they are
        return torch.cat([*parts, torch.zeros(1, dtype=torch.float64)])

    def verdict(self) -> Verdict | None:
        points = [*self.live.values(), *self.weights]
        try:
            with torch.enable_grad():
                curved = [part for part in self.gradient(True) if part.requires_grad]
                if self.piece.cls is not None and any(_is_once_differentiable(part.grad_fn) for part in curved):
                    return Verdict(self.piece, refused="@once_differentiable")
                rows = torch.autograd.grad([part.sum() for part in curved], points, allow_unused=True) if curved else ()
        except REFUSED as error:
            # Other errors may be due to a call that makes no sense alone.
            return Verdict(self.piece, refused=refuser(error)) if NO_FORMULA.search(str(error)) else None
        finally:
            self.settle()
        products = [torch.zeros_like(x) for x in points]
        for i, row in enumerate(rows):
            products[i] = products[i] if row is None else row.detach().to_dense()
        if not finite(products):
            return Verdict(self.piece, infinite=True) if finite([self.evaluate()]) else None
        n = len(self.live)
        inner = self._slopes(points[:n], list(self.scales.values()), products[:n])
        arriving = self._slopes(points[n:], [1.0] * len(self.weights), products[n:])
        if not any(s.wrong for s in (*inner, *arriving)):
            return None
        return self._deeper() or Verdict(self.piece, inner=tuple(inner), arriving=tuple(arriving))

    def _slopes(self, points: list[Tensor], scales: list[float], products: list[Tensor]) -> list[Slope]:
        return Probe(self.evaluate, points, scales, self.eps, self.generator).slopes(products)

    def _deeper(self) -> Verdict | None:
        """The Function that the backward of this one calls, if that is what is wrong."""
        for inner in self.called() if self.piece.cls is not None else ():
            slopes = _first_derivative(inner, self.eps, self.generator)
            if any(s.wrong for s in slopes):
                return Verdict(inner, inner=tuple(slopes), caller=self.piece.name)
        return None

    def called(self) -> list[Piece]:
        """The calls of other Functions that its backward makes."""
        recorder = Functions(lambda: self.piece.path)
        with torch.enable_grad(), recorder.recording():
            self.gradient(True)
        return [piece_of(call) for call in recorder.calls if call.cls is not self.piece.cls]


def by_forward_mode(piece: Piece, eps: float, generator: torch.Generator) -> bool:
    """Whether forward over reverse gives a piece the second derivative that double backward does."""
    bend = Bend(piece, eps, generator)
    if not bend.weights:
        return True
    curved = [part.sum() for part in bend.gradient(True) if part.requires_grad]
    inputs = list(bend.live.values())
    rows = torch.autograd.grad(curved, inputs, allow_unused=True) if curved else [None] * len(inputs)
    with fw.dual_level():
        duals = {name: fw.make_dual(x.detach().requires_grad_(), bend.along[name]) for name, x in bend.live.items()}
        outputs = piece.outputs({id(x): duals[name] for name, x in bend.live.items()})
        pairs = [(y, w.detach()) for y, w in zip(outputs, bend.weights, strict=True) if y.requires_grad]
        found = torch.autograd.grad(  # without a graph, linear solves take a short cut that has no tangent
            [y for y, _ in pairs], list(duals.values()), [w for _, w in pairs], create_graph=True, allow_unused=True
        )
        tangents = [None if g is None else fw.unpack_dual(g).tangent for g in found]
    gap = size = 0.0
    for x, row, t in zip(inputs, rows, tangents, strict=True):
        one, two = (torch.zeros_like(x) if v is None else v.detach().double() for v in (row, t))
        gap, size = gap + float((one - two).square().sum()), size + float(one.square().sum() + two.square().sum())
    return gap <= eps * size


def _first_derivative(piece: Piece, eps: float, generator: torch.Generator) -> list[Slope]:
    """Slopes of a piece's outputs along its inputs, beside its gradient."""
    outputs = piece.outputs()
    if not any(y.requires_grad for y in outputs):
        return []
    weights = [torch.randn(y.shape, generator=generator).to(y) for y in outputs]
    live = piece.tensors
    total = sum((y * w).sum() for y, w in zip(outputs, weights, strict=True) if y.requires_grad)
    assert isinstance(total, Tensor)
    grads = torch.autograd.grad(total, list(live.values()), allow_unused=True)

    def evaluate() -> Tensor:
        pairs = zip(piece.outputs(), weights, strict=True)
        return torch.cat([(y.detach().double() * w.double()).flatten() for y, w in pairs])

    probe = Probe(evaluate, list(live.values()), list(own_scales(live).values()), eps, generator)
    return probe.slopes([torch.zeros_like(x) if g is None else g for x, g in zip(live.values(), grads, strict=True)])


def _is_once_differentiable(node: Any) -> bool:
    """Whether a gradient was cut off by ``@once_differentiable``, near its end.

    torch ends the graph there with a node that raises, but hands out None where unused inputs are allowed.
    """
    near = [node]
    for _ in range(4):
        if any(type(n).__name__ == "Error" for n in near):
            return True
        near = [after for n in near for after, _ in n.next_functions if after is not None]
    return False


def refuser(error: BaseException) -> str:
    """The operation that has no derivative, or torch's words."""
    text = str(error)
    match = re.search(r"forward AD with (\S+)|differentiate twice a function that was marked with (\S+)", text)
    return next(group for group in match.groups() if group) if match else operation(error).strip(".'")


def _inner(verdict: Verdict, eps: float, generator: torch.Generator, settle: Callable[[], None]) -> Verdict:
    """The operation inside a module that is to blame, or the module."""
    try:
        operations = operations_of(verdict.piece)
    finally:
        settle()
    for piece in operations:
        try:
            inner = second_derivative(piece, eps, generator)
        except REFUSED:  # it makes no sense alone: it needs what another has prepared in place
            continue
        if inner is not None:
            return inner
    return verdict


def _inside(path: str, container: str) -> bool:
    return not container or path == container or path.startswith(f"{container}.")


def _finding(verdict: Verdict, hooks: Sequence[Any]) -> Finding:
    piece = verdict.piece
    function = None if piece.kind in ("module", "loss") else piece.name
    file, line = piece.file, piece.line
    remedy = _remedy(verdict)
    if function is None and hooks:
        function, (file, line) = title(hooks[0]), defined(hooks[0])
        remedy = "Let the hook compute in differentiable operations on the gradient: not with detach(), .data or NumPy."
    if piece.cls is not None:
        file, line = defined(backward_of(piece.cls))
    return Finding(
        "non_finite" if verdict.infinite else "second_derivative",
        piece.path or "",
        _message(verdict),
        remedy,
        severity="error",
        value=verdict.error,
        function=function,
        file=file,
        line=line,
        evidence={"refused": bool(verdict.refused)},
    )


def _message(verdict: Verdict) -> str:
    piece = verdict.piece
    if verdict.refused:
        by = "" if verdict.refused == piece.name else f": {verdict.refused}"
        return f"The second derivative of {piece.name} is refused{by}."
    if verdict.infinite:
        return f"The second derivative of {piece.name} is NaN or infinite, while its gradient is finite."
    if verdict.caller:
        return (
            f"The gradient of {piece.name}, which the backward of {verdict.caller} calls, {words(verdict.inner)}: so "
            f"is the second derivative of {verdict.caller}."
        )
    by, slopes = "its inputs", verdict.inner
    if not any(s.wrong for s in slopes):
        by, slopes = "the gradient that arrives", verdict.arriving
    return f"The gradient of {piece.name} is right, but its own derivative by {by} {words(slopes)}."


def _remedy(verdict: Verdict) -> str:
    piece = verdict.piece
    if verdict.infinite:
        return (
            "Keep away from roots, norms and powers at zero, and from torch.where around them: add eps inside the "
            "root, or choose the argument before the operation."
        )
    if verdict.caller:
        return "It is a Function like any other: derive its backward, and check it by itself with gradients()."
    if piece.kind == "function":
        if "once_differentiable" in verdict.refused:
            return (
                "Write the backward in differentiable operations on ctx.saved_tensors and the arriving gradient, and "
                "take @once_differentiable off."
            )
        return (
            "In backward, compute from inputs and outputs kept with ctx.save_for_backward and from the arriving "
            "gradient, in differentiable operations: not from intermediates kept on ctx, detach(), .data or NumPy."
        )
    return next((way for part, way in KNOWN if part in f"{piece.name} {verdict.refused}"), PLAIN)


def mean_noise(slopes: Sequence[Slope]) -> float:
    """The middle one of the slopes' noises."""
    return sorted(s.noise for s in slopes)[len(slopes) // 2] if slopes else 0.0
