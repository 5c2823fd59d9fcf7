"""Many minimisations at once: each row of x has its own function value, its own region and its own end.

``fun`` takes all rows together and returns one value a row. The Hessian of the sum is then block diagonal, so that n
products give the blocks of all rows, and one batched eigendecomposition solves all trust regions exactly (More and
Sorensen). Rows that are done stand still. Many starts of one function are the case in which rows may be moved: then
only those that are not done are evaluated. Many problems, a function that holds data for each row, is the other; which
it is, is found out by evaluating some rows in other places.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hesse.minimizers.method import ROUNDING
from hesse.minimizers.result import Status
from hesse.minimizers.rows import Batch, Rows
from hesse.minimizers.searches.regions import ENOUGH, GOOD, MOST_TRIALS, NOISE, POOR
from hesse.minimizers.solve import FAR

__all__ = ["BatchResult", "minimize_rows", "regions"]

RUNNING = -1


@dataclass(frozen=True)
class BatchResult:
    """What a batch of solves says, a row each; fields as in :class:`hesse.minimizers.result.Result`.

    Args:
        x, jac: [B, ...], or dicts of such tensors, as x0.
        fun: [B].
        success: [B], bool.
        status: [B], integers of :class:`hesse.minimizers.result.Status`.
        nit: [B], steps taken.
        message: how many rows ended in which way.
        nfev, njev, nhev: how often all remaining rows were evaluated together.
    """

    x: Any
    fun: Tensor
    jac: Any
    success: Tensor
    status: Tensor
    nit: Tensor
    message: str
    nfev: int
    njev: int
    nhev: int

    def __repr__(self) -> str:
        good = self.fun[self.success]
        least = f"{float(good.min()):.10g}" if good.numel() else "-"
        rows = [("message", self.message), ("success", f"{int(self.success.sum())} of {self.success.numel()}")]
        rows += [("fun", f"least of the successful {least}"), ("nit", f"at most {max(self.nit.tolist(), default=0)}")]
        rows += [(name, str(getattr(self, name))) for name in ("nfev", "njev", "nhev")]
        return "\n".join(f"{name:>8}: {value}" for name, value in rows)


def minimize_rows(
    fun: Callable[[Any], Tensor],
    x0: Tensor | Mapping[str, Tensor],
    *,
    rtol: float | None = None,
    atol: float = 0.0,
    max_steps: int = 1000,
) -> BatchResult:
    """Minimise ``fun(x)[b]`` over ``x[b]`` for all b at once, by Newton's method in exact trust regions.

    Args:
        fun: from [B, ...], or a dict of such tensors, to [B]; row b of the result depends on row b of x only. It is
            also called with some of the rows, where a trial shows that it does not mind.
        x0: starts, float32 or float64, the batch in the first dimension.
        rtol: a row has converged when the model promises less than this part of what was gained; 1e-12 in float64,
            1e-6 in float32.
        atol: or when no element of its gradient is above this.
        max_steps: of each row.

    Raises:
        TypeError: x0 is not of floating tensors, or fun returned no tensor with a gradient.
        ValueError: fun returned another shape than [B], or its rows depend on each other.

    References:
        More and Sorensen, Computing a trust region step, SIAM J. Sci. Stat. Comput. 1983.

    Example:
        The double well (x^2 - 1)^2 has a maximum in the middle, and a row that starts on it leaves it:

        >>> r = minimize_rows(lambda x: (x**2 - 1).square().sum(1), torch.tensor([[-2.0], [0.0], [0.5]]).double())
        >>> r.x.abs().flatten(), r.success
        (tensor([1.0000, 1.0000, 1.0000], dtype=torch.float64), tensor([True, True, True]))
    """
    rows = Rows(fun, x0)
    if rtol is None:
        rtol = 1e-12 if rows.start.dtype == torch.float64 else 1e-6
    rows.probe()
    solve = _Solve(rows)
    while bool((solve.status == RUNNING).any()):
        solve.finish(rtol, atol, max_steps)
        solve.advance()
    return solve.result()


class _Solve:
    """Where every row stands: tensors [B, ...]."""

    def __init__(self, rows: Rows) -> None:
        self.rows, self.x = rows, rows.start.clone()
        device, wide = self.x.device, torch.float64
        b, n = self.x.shape
        self.eps = torch.finfo(self.x.dtype).eps
        self.status = torch.full((b,), RUNNING, device=device)
        self.nit, self.trials = torch.zeros_like(self.status), torch.zeros_like(self.status)
        self.told = torch.zeros(b, dtype=wide, device=device)  # last trust ratio that was no rounding
        self.f, self.g = torch.zeros(b, dtype=wide, device=device), torch.zeros_like(self.x)
        # The Hessians: eigenvalues, eigenvectors, and the gradients among them.
        self.w, self.c = torch.zeros(b, n, dtype=wide, device=device), torch.zeros(b, n, dtype=wide, device=device)
        self.Q = torch.zeros(b, n, n, dtype=wide, device=device)
        if b and n:
            everyone = torch.arange(b, device=device)
            batch = rows.at(self.x, everyone, self.x)
            self.f, self.g = batch.f, batch.gradient()
            self.status[~(self.f.isfinite() & self.g.isfinite().all(1))] = int(Status.NOT_FINITE)
            self._look(batch, everyone, everyone)
        elif b:
            self.f = rows.values(self.x).detach().double()
        self.begin = self.f.clone()
        self.radius = self._natural_length()
        self.first = self.radius.clone()

    def _look(self, batch: Batch, places: Tensor, among: Tensor) -> None:
        """Take the curvature at ``places``, which are the rows ``among`` of those in the batch."""
        H = batch.hessians()[among].double()
        fine = H.isfinite().flatten(1).all(1)
        self.status[places[~fine & (self.status[places] == RUNNING)]] = int(Status.NOT_FINITE)
        w, Q = torch.linalg.eigh(torch.where(fine[:, None, None], H, 0.0))
        self.w[places], self.Q[places] = w, Q
        self.c[places] = (Q.mT @ self.g[places].double()[..., None])[..., 0]

    def _natural_length(self) -> Tensor:
        """[B], the length of Newton's step by the magnitude of the curvature."""
        top = self.w.abs().amax(1) if self.w.shape[1] else self.f * 0
        size = self.w.abs().clamp_min(1e-3 * top[:, None])
        length = torch.where(top > 0, torch.where(size > 0, self.c / size, 0.0).norm(dim=1), self.c.norm(dim=1))
        # On top of a hill or at a saddle the gradient says nothing; then a part of x, or of 1.
        size = self.x.double().norm(dim=1)
        away = torch.maximum(0.1 * torch.where(size > 0, size, 1.0), self._visible())
        return torch.where((length <= 1e-6 * away) & self._curved_down(), away, length)

    def _visible(self) -> Tensor:
        """[B], the length along the lowest eigenvector at which its curvature stands far above the rounding of f."""
        lowest = self.w[:, 0].abs() if self.w.shape[1] else self.f * 0
        return torch.where(lowest > 0, (200 * NOISE * self.eps * self.f.abs() / lowest).sqrt(), 0.0)

    def _slack(self) -> Tensor:
        """[B], what an eigenvalue is off by rounding."""
        n = self.w.shape[1]
        return n * self.eps * self.w.abs().amax(1) if n else self.f * 0

    def _curved_down(self) -> Tensor:
        return self.w[:, 0] < -self._slack() if self.w.shape[1] else self.f < self.f

    # --- are we done? -------------------------------------------------------------------------------------------------

    def finish(self, rtol: float, atol: float, max_steps: int) -> None:
        """Give a status to the rows with nothing left to gain (see :mod:`hesse.minimizers.solve`)."""
        if not self.w.shape[1]:
            self.status[self.status == RUNNING] = int(Status.CONVERGED)
            return
        promised, steep = self._promised(), self.g.abs().amax(1).double()
        gained = self.begin - self.f
        enough = torch.maximum(torch.minimum(gained, self.f.abs()) * rtol, gained * rtol**1.5)
        up = ~self._curved_down()
        self._end(up & ((steep <= atol) | (promised <= enough)), Status.CONVERGED)
        self._end(up & (promised <= ROUNDING * self.eps * self.f.abs()), Status.PRECISION)
        gone = (self.x - self.rows.start).double().norm(dim=1)
        far = gone > FAR * torch.maximum(self.first, self.rows.start.double().norm(dim=1))
        self._end((promised.isinf() & far) | (self.f == -math.inf), Status.UNBOUNDED)
        self._end(self.nit >= max_steps, Status.MAX_STEPS)

    def _promised(self) -> Tensor:
        """[B], decrease by the model without a limit: half the squared Newton decrement, inf without a least value."""
        w = self.w.clamp_min(self._slack()[:, None])
        parts = torch.where(self.c == 0, 0.0, self.c.square() / w)
        return torch.where(self._curved_down(), math.inf, 0.5 * parts.sum(1))

    def _end(self, rows: Tensor, status: Status) -> None:
        self.status[rows & (self.status == RUNNING)] = int(status)

    # --- one trial of every row ---------------------------------------------------------------------------------------

    def advance(self) -> None:
        """Try one step of every row that goes on; take it where the function falls enough, else shorten it."""
        a = (self.status == RUNNING).nonzero()[:, 0]
        if not len(a):
            return
        y, predicted = regions(self.w[a], self.c[a], self.radius[a])
        s = (self.Q[a] @ y[..., None])[..., 0]
        length, old = y.norm(dim=1), self.f[a]
        x = self.x[a] + s.to(self.x.dtype)
        batch = self.rows.at(x, a, self.x)
        gained = old - batch.f
        rounding = NOISE * self.eps * torch.maximum(old.abs(), batch.f.abs())
        blurred = (predicted <= rounding) & (gained.abs() <= rounding)
        ratio = torch.where(predicted > 0, gained / predicted, -math.inf)
        good = batch.f.isfinite() & (blurred | (ratio > ENOUGH))
        if bool(good.any()):
            g = batch.gradient()
            # Where values are rounding alone, the gradient decides.
            flatter = g.abs().amax(1) < self.g[a].abs().amax(1)
            good &= g.isfinite().all(1) & (~blurred | flatter)
        ratio = torch.where(blurred & good, 1.0, torch.where(batch.f == -math.inf, math.inf, ratio))
        good |= batch.f == -math.inf
        self._refuse(a[~good], batch.f[~good], ratio[~good], blurred[~good], predicted[~good], length[~good], s[~good])
        if bool(good.any()):
            places = a[good]
            self.x[places], self.f[places], self.g[places] = x[good], batch.f[good], g[good]
            self.nit[places] += 1
            self.trials[places] = 0
            r, size, limit = ratio[good], length[good], self.radius[places]
            self.radius[places] = torch.where(
                r < POOR, 0.5 * size, torch.where(r > GOOD, torch.maximum(limit, 2 * size), limit)
            )
            self._look(batch, places, good.nonzero()[:, 0])

    def _refuse(
        self, places: Tensor, f: Tensor, ratio: Tensor, blurred: Tensor, predicted: Tensor, length: Tensor, s: Tensor
    ) -> None:
        """Shorten steps to the least value of the parabola through slope and values; end rows that have none."""
        slope = (self.g[places].double() * s).sum(1)
        bend = -ratio * predicted - slope
        part = torch.where((bend > 0) & (slope < 0), -slope / (2 * bend), 0.5).clamp(0.1, 0.5)
        part = torch.where(ratio.isfinite() & f.isfinite(), part, 0.25)
        # Where the way down from a saddle is lost in rounding, go far enough to see it.
        near = blurred & self._curved_down()[places] & (length < 0.5 * (visible := self._visible()[places]))
        self.radius[places] = torch.where(near, visible, length * part)
        self.trials[places] += 1
        self.told[places] = torch.where(blurred | ~ratio.isfinite(), self.told[places], ratio)
        short = length <= self.eps * self.x[places].double().norm(dim=1)
        lost = torch.zeros_like(self.status, dtype=torch.bool)
        lost[places] = (blurred & ~near) | (short & ~near) | (self.trials[places] >= MOST_TRIALS)
        # Nothing lowers these rows any more: why?
        still = self.g.abs().amax(1) == 0
        self._end(lost & self._curved_down() & still, Status.SADDLE)
        self._end(lost & (self._promised() <= NOISE * self.eps * self.f.abs()), Status.PRECISION)
        # As a smooth function is looked at from nearer, the ratio tends to 1.
        self._end(lost & (self.told < 0), Status.KINK)
        self._end(lost, Status.STALLED)

    def result(self) -> BatchResult:
        """As the user reads it."""
        counts = Counter(self.status.tolist())
        told = [f"{counts[int(s)]} {s.sentence.split(':')[0]}" for s in Status if counts[int(s)]]
        success = torch.tensor([s.success for s in Status], device=self.x.device)[self.status.clamp_min(0)]
        rows = self.rows
        return BatchResult(
            x=rows.outside(self.x),
            fun=self.f.to(self.x.dtype),
            jac=rows.outside(self.g),
            success=success,
            status=self.status,
            nit=self.nit,
            message="; ".join(told) or "no rows",
            nfev=rows.nfev,
            njev=rows.njev,
            nhev=rows.nhev,
        )


def regions(w: Tensor, c: Tensor, radius: Tensor) -> tuple[Tensor, Tensor]:
    """The least values of ``c'y + 1/2 sum_i w_i y_i^2`` within ``||y|| <= radius``, a row each.

    The root of the secular equation ``||c / (w + shift)|| = radius`` by Newton's method in 1 / ||y||, started where the
    largest element alone is as long as the radius: from there it never passes the root, and is at most sqrt(n) away.
    Where c has no part along the lowest eigenvector (the hard case) that vector makes up the length.

    Args:
        w: [A, n] eigenvalues, ascending, float64.
        c: [A, n] gradients in the eigenbases.
        radius: [A], positive.

    Returns:
        y [A, n] and the decreases [A] that the models predict.

    References:
        More and Sorensen, Computing a trust region step, SIAM J. Sci. Stat. Comput. 1983.

    Example:
        >>> w, c = torch.tensor([[1.0, 4.0], [-1.0, 4.0]]), torch.tensor([[3.0, 0.0], [0.0, 0.0]])
        >>> regions(w, c, torch.tensor([1.0, 2.0]))
        (tensor([[-1.,  0.],
                [ 2.,  0.]]), tensor([2.5000, 2.0000]))
    """
    low = (-w[:, :1]).clamp_min(0)
    d, limit = w + low, radius[:, None]
    delta = (c.abs() / limit - d).amax(1, keepdim=True).clamp_min(0)
    for _ in range(50):
        y = torch.where(c == 0, 0.0, -c / (d + delta))
        size = y.norm(dim=1, keepdim=True)
        long = size > limit * (1 + 1e-12)
        if not bool(long.any()):
            break
        # From ||y|| = size on, 1 / ||y|| rises by this much of itself for each unit of the shift.
        rise = torch.where(y == 0, 0.0, y.square() / (d + delta)).sum(1, keepdim=True) / size.square()
        delta = torch.where(long, delta + (size / limit - 1) / rise, delta)
    y = torch.where(c == 0, 0.0, -c / (d + delta))
    short = (limit.square() - y.square().sum(1, keepdim=True)).clamp_min(0).sqrt()
    hard = (low > 0) & (delta == 0)
    y[:, :1] += torch.where(hard, short, 0.0)
    return y, -(c * y + 0.5 * w * y.square()).sum(1)
