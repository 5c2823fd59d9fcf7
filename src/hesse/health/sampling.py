"""When to look: every so many steps, or as often as a share of the running time pays for.

The first steps are always looked at: young nets change quickly, and bad ones do not live long. With a fixed number
of steps between looks a run is sampled alike each time, every tenth step at least while it is young: one modality
starves another within an epoch or two. Without one, the time of a sampled step is held against
that of plain ones, and the interval is what keeps the difference at :data:`SHARE` of the whole. The early steps are
looked at more often, at intervals that grow with the age of the run, until this has cost :data:`ALLOWANCE`.
"""

from __future__ import annotations

import math
import time
from collections import deque
from statistics import median

import torch

__all__ = ["FIRST", "SHARE", "Pace"]

FIRST = 5
YOUNG, OFTEN = 120, 10  # so many steps are sampled every so many at least
SHARE = 0.015  # of the running time; a plain step is counted and glanced at too, about 0.08 ms, and what a sample
# evicts from the caches is paid for by the steps after it
ALLOWANCE = 0.1  # seconds in all that early samples may cost beyond the share
PLAIN = 3  # plain steps that must have been timed before an interval is chosen
RENEWED = 25  # timings of plain steps, after which the interval is chosen again
LONGEST = 10_000


class Pace:
    """Decides which steps are sampled; told of every step as it ends.

    Args:
        every: steps between samples, or None: as the time allows.
        device: where the model is; a device that works on by itself is waited for before and after a sample.
        agree: several processes choose for themselves but must look at the same steps: intervals are powers of two.
    """

    def __init__(self, every: int | None, device: torch.device, agree: bool = False) -> None:
        if every is not None and every < 1:
            raise ValueError(f"every counts steps between samples and must be at least 1; got {every}.")
        self.every = every
        self.agree = agree
        self._waits = device if device.type == "cuda" else None
        self._last = 0  # step that was sampled last
        self._plain: deque[float] = deque(maxlen=51)
        self._sampled: deque[float] = deque(maxlen=5)  # the first of all, which also warms up, is no median
        self._began: float | None = None
        self._timings = 0  # of plain steps
        self._count = 0  # plain steps since then
        self._sample: float | None = None  # seconds of the sampled step whose numbers are still to be read
        self._chosen: int | None = None  # the interval, until more is known
        self._asked = False
        self._cost = 0.0  # seconds of samples after the first

    @property
    def interval(self) -> int:
        """Steps between samples as things stand."""
        if self.every is not None:
            return self.every
        if self._chosen is None:
            self._chosen = self._choose()
        return self._chosen

    def _choose(self) -> int:
        if len(self._plain) < PLAIN or not self._sampled:
            return PLAIN + 1
        usual = median(self._plain)
        extra = max(median(self._sampled) - usual, 0.0)
        steps = math.ceil(extra / (SHARE * usual)) if usual > 0 else LONGEST
        steps = min(max(steps, 1), LONGEST)
        return 1 << (steps - 1).bit_length() if self.agree else steps

    def due(self, step: int) -> bool:
        """Whether ``step``, counted from one, is to be sampled."""
        if step <= FIRST:
            return True
        if self.every is not None:
            return step % self.every == 0 or (step <= YOUNG and step % OFTEN == 0)
        if self.agree:
            return step % self.interval == 0
        wait = step - self._last
        if self._cost < ALLOWANCE and wait >= max(FIRST, step // 4):
            return True
        return wait >= self.interval or (self._asked and wait >= self.interval / 4)

    def ask(self) -> None:
        """Something looks unusual: sample the next step, if the last sample is not too near."""
        self._asked = True

    def ended(self, step: int, sampled: bool) -> None:
        """A step has ended."""
        if sampled:
            self._last, self._asked = step, False
        if self.every is not None:
            return
        if sampled:
            now = self.now()
            self._sample = None if self._began is None else now - self._began
            self._began, self._count = now, 0
        else:
            self._count += 1
            if self._waits is None:
                self._timed()

    def begins(self) -> None:
        """A step that is sampled begins."""
        if self._waits is not None and self.every is None and self._count:
            self._timed()

    def _timed(self) -> None:
        """The time of the plain steps since the last look at the clock."""
        now = self.now()
        if self._began is not None:
            self._plain.append((now - self._began) / self._count)
            self._timings += 1
            if self._timings <= PLAIN or self._timings % RENEWED == 0:
                self._chosen = None
        self._began, self._count = now, 0

    def now(self) -> float:
        """Seconds of this process on a CPU, which other work on the machine does not lengthen; else of the clock."""
        if self._waits is None:
            return time.process_time()
        torch.cuda.synchronize(self._waits)
        return time.perf_counter()

    def spent(self, seconds: float) -> None:
        """So long it took to read a sample and to judge it: no part of the step under way."""
        if self._began is not None:
            self._began += seconds
        if self._sample is not None:
            self._sampled.append(self._sample + seconds)
            self._chosen = None
            if self._last > FIRST and self._plain:
                self._cost += self._sampled[-1] - median(self._plain)
            self._sample = None
