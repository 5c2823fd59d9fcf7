"""The true gradient, element by element: what a wrong one is held against to tell how it is wrong.

Directions show that a gradient is wrong, elements show in which way: a factor, a transposition or a missing
sum each leave their own trace. Every element is moved by itself when there are few, and a grid of elements
beside those with the largest gradients when there are many. The slope of each output element is kept too,
because the rows of a batch must be told apart to see that a sum over them is missing. As in
:mod:`hesse.check.differences`, each number comes with the error it may have: one-sided slopes bracket kinks,
and the rounding is measured.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hesse.check.differences import Probe, Slope, own_scales

__all__ = ["Case", "Elements", "measure", "sample"]

SECONDS = 0.2  # for all tensors of a case
ELEMENTS = 480  # measured at most, for all tensors of a case
LEAST = 24  # elements of one tensor that are measured however slow the function is
FEW = 32  # elements at which the search for a wrong one ends
TENSORS = 6  # looked at element by element
KEPT = 4_000_000  # numbers of single outputs kept for one tensor
SHARP = 0.2  # an element whose limit is below this part of its size can be judged
TOGETHER = 0.6  # correlation from which on long moves are taken to follow the gradient
MOVES = 16  # long ones, to see whether a gradient is right on average
STEPS = (1.0, 1 / 8, 8.0, 1 / 64)  # in units of eps^(1/3), as in hesse.check.differences


@dataclass(frozen=True)
class Case:
    """A vector-Jacobian product that is known to be wrong.

    Args:
        tensors: what was differentiated by, none of them empty; live, moved in place and put back bit for bit.
        grads: what the backward pass gave for each of them.
        evaluate: float64 vector [n] of the outputs times the gradients that arrived at them; its sum is
            what was differentiated.
        eps: rounding unit of the coarsest number format in the computation.
        batch: rows of the batch, if there is one.
    """

    tensors: dict[str, Tensor]
    grads: dict[str, Tensor]
    evaluate: Callable[[], Tensor]
    eps: float
    batch: int | None = None


@dataclass(frozen=True)
class Elements:
    """Some or all elements of one gradient, as given and as measured; everything float64 on the CPU.

    Args:
        name: of the tensor.
        shape: of the tensor.
        index: which elements, positions in the flattened tensor, [k].
        given: what the backward pass gave there, [k].
        true: what differences give, [k].
        limit: how far the two may differ for reasons that are not a fault, [k].
        parts: the slope of each output element, [m, n] for the first m of them, as many as memory allows.
        blurs: how far each of those slopes may be off for reasons that are not a fault, [m, n], float32.
        values: the tensor there, [k].
        grad: the whole gradient as given, flat.
        blocks: slopes along directions that move many elements at once, taken where single ones are blunt.
        far: differences over moves as long as the tensor's own scale, as a multiple of what the gradient
            predicts; zero where the two do not go together, None where the function does not change at all.
            Measured where hardly any of the gradient is seen in small steps; else zero.
        more: measures other elements, at the same step.
    """

    name: str
    shape: tuple[int, ...]
    index: Tensor
    given: Tensor
    true: Tensor
    limit: Tensor
    parts: Tensor
    blurs: Tensor
    values: Tensor
    grad: Tensor
    blocks: tuple[Slope, ...]
    far: float | None
    more: Callable[[Tensor], tuple[Tensor, Tensor, Tensor, Tensor]]

    @property
    def size(self) -> Tensor:
        return torch.maximum(self.given.abs(), self.true.abs())

    @property
    def wrong(self) -> Tensor:
        """Where the two differ by more than they may, [k]."""
        return (self.given - self.true).abs() > self.limit

    @property
    def sharp(self) -> Tensor:
        """Where the measured value can be relied on, [k]."""
        seen = self.limit.isfinite()
        largest = self.size[seen].max() if bool(seen.any()) else 0.0
        return (self.limit <= SHARP * self.size) & (self.size > 1e-6 * largest)

    @property
    def right(self) -> Tensor:
        """Where the two agree although a difference would have been seen, [k]."""
        return self.sharp & ~self.wrong

    @property
    def complete(self) -> bool:
        return self.index.numel() == self.grad.numel()


def measure(case: Case, generator: torch.Generator) -> list[Elements]:
    """The elements of each tensor's gradient; of many tensors, only of those where directions show most."""
    names = list(case.tensors)
    scales = own_scales(case.tensors)
    probes = {n: Probe(case.evaluate, [case.tensors[n]], [scales[n]], case.eps, generator) for n in names}
    if len(names) > TENSORS:
        errors = {name: _error(probes[name], case.grads[name]) for name in names}
        names = sorted(names, key=lambda name: -errors[name])[:TENSORS]
    return [_measure(case, name, probes[name], len(names), generator) for name in names]


def sample(shape: Sequence[int], grad: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Positions of at most ``count`` elements: a grid with the borders of every axis, and where ``grad`` is.

    Example:
        >>> sample((3,), torch.ones(3), 10, torch.Generator())
        tensor([0, 1, 2])
        >>> grid = sample((100, 100), torch.zeros(10_000), 60, torch.Generator())
        >>> len(grid) <= 60, int(grid[0]), int(grid[-1])
        (True, 0, 9999)
    """
    n = grad.numel()
    if n <= count:
        return torch.arange(n)
    # Sparse gradients: a grid would meet little but zeros.
    hit = grad.nonzero().reshape(-1)
    some = hit[torch.randperm(len(hit), generator=generator)[: count // 4]]
    largest = grad.abs().topk(count // 4).indices

    points = [1] * len(shape)
    growing = True
    while growing:  # along the axis that has the fewest points, while it fits
        axis = min((a for a in range(len(shape)) if points[a] < shape[a]), key=lambda a: points[a])
        points[axis] += 1
        growing = math.prod(points) <= count // 2
    points[axis] -= 1
    grid = torch.zeros(1, dtype=torch.long)
    for size, p in zip(shape, points, strict=True):
        ends = [0, size - 1][:p] if size > 1 else [0]
        inner = (torch.randperm(max(size - 2, 0), generator=generator) + 1)[: p - len(ends)]
        grid = (grid[:, None] * size + torch.cat([torch.tensor(ends), inner])).reshape(-1)
    return torch.unique(torch.cat([grid, some, largest]))


def _error(probe: Probe, grad: Tensor) -> float:
    directions = probe.aligned_direction([grad]), probe.random_direction()
    slopes = [probe.slope([grad], direction, tries=2) for direction in directions]
    return max((s.error for s in slopes if s.wrong), default=0.0)


def _measure(case: Case, name: str, probe: Probe, sharing: int, generator: torch.Generator) -> Elements:
    """The elements of one tensor; ``sharing`` tensors share the time."""
    tensor, grad = case.tensors[name], case.grads[name].detach()
    flat = grad.reshape(-1).double().cpu()
    unit = case.eps ** (1 / 3) * probe.scales[0]

    def more(index: Tensor, step: float = unit) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        true, limit, parts, blurs = _differences(probe, index, step)
        # The gradient is rounded too, and a wide step leaves truncation where only the third derivative is not zero.
        own = 4 * case.eps * flat[index].abs() + (step / probe.scales[0]) ** 2 * true.abs()
        return true, limit + own, parts, blurs

    few = flat.abs().topk(min(2, len(flat))).indices
    few = torch.unique(torch.cat([few, torch.randint(0, len(flat), (2,), generator=generator)]))

    def bluntness(step: float) -> float:
        true, limit, *_ = more(few, step)
        return float((limit / torch.maximum(flat[few].abs(), true.abs()).clamp_min(1e-300)).median().nan_to_num(9e9))

    start = time.process_time()
    steps: list[tuple[float, float]] = []
    for factor in STEPS:
        steps.append((bluntness(factor * unit), factor * unit))
        if steps[-1][0] <= SHARP / 5:
            break
    step = min(steps)[1]
    cost = (time.process_time() - start) / (len(few) * len(steps))  # of one element
    count = min(ELEMENTS, int(SECONDS / cost)) // sharing
    index = sample(tensor.shape, flat, max(LEAST, count), generator)
    true, limit, parts, blurs = more(index, step)
    if len(index) < len(flat) and not bool(((flat[index] - true).abs() > limit).any()) and cost < SECONDS / 20:
        found = _hunt(probe, grad)
        if len(found):
            at, blur, *_ = more(found, step)
            index, true, limit = torch.cat([index, found]), torch.cat([true, at]), torch.cat([limit, blur])
    given = flat[index]
    sharp = limit <= SHARP * torch.maximum(given.abs(), true.abs())
    blocks = () if int(sharp.sum()) >= min(8, len(index)) else _blocks(probe, grad, generator)
    values = probe.base[0].reshape(-1).double().cpu()[index]
    believed = limit <= SHARP * given.abs()
    most = float(given[believed].norm()) > 0.8 * float(given.norm())
    unseen = most and float(true[believed].norm()) < float(given[believed].norm()) / 4
    return Elements(
        name,
        tuple(tensor.shape),
        index,
        given,
        true,
        limit,
        parts,
        blurs,
        values,
        flat,
        tuple(blocks),
        _far(probe, grad, generator) if unseen else 0.0,
        lambda index: more(index, step),
    )


def _differences(probe: Probe, index: Tensor, step: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Slopes along single elements [k], their limits [k]; slopes of single outputs [m, n], their limits [m, n]."""
    tensor, base, centre, rounding = probe.tensors[0], probe.base[0], probe.centre, probe.rounding
    n = centre.numel()
    chunk = max(1, KEPT // (4 * n))
    true: list[Tensor] = []
    limit: list[Tensor] = []
    parts: list[Tensor] = []
    blurs: list[Tensor] = []
    kept = 0
    try:
        for positions in index.split(chunk):
            ups, downs, widths = [], [], []
            for position in positions.tolist():
                place = _place(position, base.shape)
                up, above = _at(probe, place, step)
                down, below = _at(probe, place, -step)
                with torch.no_grad():
                    tensor[place] = base[place]
                ups.append(up)
                downs.append(down)
                widths.append((above - below) / 2)
            up, down = torch.stack(ups), torch.stack(downs)
            width = torch.tensor(widths, dtype=torch.float64, device=up.device)[:, None]
            slope = (up - down) / (2 * width)
            # Half the difference of the one-sided slopes covers a kink wherever it lies between the points.
            kinks = ((up + down - 2 * centre).abs() - 4 * rounding).clamp_min(0) / (2 * width)
            touched = (up != centre) | (down != centre)
            # Where nothing moved, a move may have been rounded away.
            blur = (rounding * touched).square().sum(1).sqrt().clamp_min(float(rounding.median()))
            noise = 2 * blur / width[:, 0]
            value, error = slope.sum(1), kinks.sum(1) + noise
            lost = ~(value.isfinite() & error.isfinite())
            true.append(value.masked_fill(lost, 0.0).cpu())
            limit.append(error.masked_fill(lost, math.inf).cpu())
            if kept < KEPT // n or not parts:
                parts.append(slope.nan_to_num().cpu())
                blurs.append((kinks + 2 * rounding / width).nan_to_num(math.inf).float().cpu())
                kept += len(positions)
    finally:
        probe.restore()
    return torch.cat(true), torch.cat(limit), torch.cat(parts), torch.cat(blurs)


def _place(position: int, shape: Sequence[int]) -> tuple[int, ...]:
    place = []
    for size in reversed(shape):
        position, i = divmod(position, size)
        place.append(i)
    return tuple(reversed(place))


def _at(probe: Probe, place: tuple[int, ...], step: float) -> tuple[Tensor, float]:
    """The function with one element moved, and how far the element went as rounded."""
    tensor, base = probe.tensors[0], probe.base[0]
    with torch.no_grad():
        tensor[place] = base[place] + step
        went = float(tensor[place].double() - base[place].double())
    return probe.evaluate(), went or step


def _hunt(probe: Probe, grad: Tensor) -> Tensor:
    """Positions of a few elements among which one is wrong, by halving; none when no direction shows it."""
    n = grad.numel()
    signs = torch.where(grad == 0, probe.random_direction()[0].sign(), grad.sign()).reshape(-1) * probe.scales[0]
    low, high = 0, n
    while high - low > FEW:
        halves = ((low, (low + high) // 2), ((low + high) // 2, high))
        worst = 0.0
        for start, end in halves:
            direction = torch.zeros_like(signs)
            direction[start:end] = signs[start:end]
            slope = probe.slope([grad], [direction.reshape(grad.shape)], tries=2)
            gap = abs(slope.analytic - slope.numeric) - slope.limit
            if gap > worst:
                worst, low, high = gap, start, end
        if not worst:
            break
    return torch.arange(low, high) if high - low <= FEW else torch.arange(0)


def _blocks(probe: Probe, grad: Tensor, generator: torch.Generator) -> list[Slope]:
    """Slopes along the gradient's signs (random ones where it is zero) on random halves of the elements."""
    slopes = []
    for _ in range(4):
        signs = torch.where(grad == 0, probe.random_direction()[0].sign(), grad.sign())
        half = torch.randint(0, 2, grad.shape, generator=generator).to(signs)
        slopes.append(probe.slope([grad], [signs * half * probe.scales[0]]))
    return slopes


def _far(probe: Probe, grad: Tensor, generator: torch.Generator) -> float | None:
    """What long moves do to the function, as a multiple of what the gradient predicts."""
    tensor, base = probe.tensors[0], probe.base[0]
    found, expected = [], []
    try:
        for _ in range(MOVES):
            move = torch.randn(grad.shape, generator=generator).to(grad) * probe.scales[0]
            ends, values = [], []
            for sign in (1, -1):
                with torch.no_grad():
                    tensor.copy_(base + sign * move)
                ends.append(tensor.detach().clone().double())
                values.append(probe.evaluate())
            found.append(float((values[0] - values[1]).sum()))
            expected.append(float(((ends[0] - ends[1]) * grad).sum()))
    finally:
        probe.restore()
    f, e = torch.tensor(found, dtype=torch.float64), torch.tensor(expected, dtype=torch.float64)
    if not bool(f.any()):
        return None
    cosine = float(f @ e / (f.norm() * e.norm()))
    return float(f @ e / (e @ e)) if cosine > TOGETHER else 0.0
