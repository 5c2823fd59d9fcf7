"""Copies of one model in several processes, each with its part of the batch: what they have to tell each other.

``DistributedDataParallel`` averages gradients inside ``backward()``. Whoever asks more of a loss (its value at a trial
point, its curvature) has to average that too, or the copies part: every decision is made from numbers that all
processes have, bit for bit. The loss of all is the mean of the processes' losses, as DDP has it; with a mean over
examples that is the loss of the whole batch if the parts are of one size.

One process is the case in which nothing is sent and nothing changes.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

__all__ = ["Replicas", "inner"]

BUCKET = 2**24  # elements that are sent at once: a copy of so many is made


def inner(model: nn.Module) -> nn.Module:
    """The module that DDP is around; any other as it is."""
    module: nn.Module = model.module if isinstance(model, DistributedDataParallel) else model
    return module


class Replicas:
    """The processes that train copies of a model; by default this one alone.

    Args:
        model: a module. If it is a ``DistributedDataParallel``, its process group is that of the replicas.

    Example:
        >>> alone = Replicas(nn.Linear(1, 1))
        >>> alone.size, alone.mean(3.0, 5.0), alone.owners({"first": 8.0, "second": 1.0})
        (1, [3.0, 5.0], {'first': 0, 'second': 0})
    """

    def __init__(self, model: nn.Module | None = None) -> None:
        self.group: Any = None
        self.rank, self.size = 0, 1
        self.device = torch.device("cpu")
        if isinstance(model, DistributedDataParallel):
            self.group = model.process_group
            self.rank, self.size = dist.get_rank(self.group), dist.get_world_size(self.group)
            self.device = next(model.parameters()).device

    def __deepcopy__(self, memo: dict[int, Any]) -> Replicas:
        return self  # processes cannot be copied, and there is nothing else

    # -- numbers ----------------------------------------------------------------------------------------------------

    def mean(self, *values: float) -> list[float]:
        """The means over the processes."""
        return [value / self.size for value in self._numbers(values, "SUM")] if self.size > 1 else list(values)

    def largest(self, values: Sequence[float]) -> list[float]:
        """The largest of each over the processes. No value may be NaN: what is larger is then not defined."""
        return self._numbers(values, "MAX")

    def all(self, value: bool) -> bool:
        """Whether it is so in all of them."""
        return self.largest([float(not value)]) == [0.0]

    def same(self, thing: object) -> bool:
        """Whether all have the same, judged by its ``repr``."""
        if self.size == 1:
            return True
        mark = float(zlib.crc32(repr(thing).encode()))
        most, least = self.largest([mark, -mark])
        return most == -least

    def _numbers(self, values: Sequence[float], how: str) -> list[float]:
        if self.size == 1 or not values:
            return list(values)
        sent = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(sent, op=getattr(dist.ReduceOp, how), group=self.group)
        found: list[float] = sent.tolist()
        return found

    # -- tensors ----------------------------------------------------------------------------------------------------

    def mean_(self, tensors: Sequence[Tensor]) -> None:
        """Replace each by its mean over the processes."""
        self._send(tensors, lambda flat: dist.all_reduce(flat.div_(self.size), group=self.group))

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Replace each by its sum over the processes."""
        self._send(tensors, lambda flat: dist.all_reduce(flat, group=self.group))

    def mean_at_(self, rank: int, tensors: Sequence[Tensor]) -> None:
        """Replace each by its mean over the processes, in the process ``rank`` only; elsewhere they are as they were.

        All processes call it, with tensors of the same shapes.
        """
        if self.size == 1:
            return
        there = dist.get_global_rank(self.group, rank)
        self._send(tensors, lambda flat: dist.reduce(flat.div_(self.size), there, group=self.group), rank == self.rank)

    def gather(self, x: Tensor) -> Tensor:
        """[size * n, ...]: the x [n, ...] of all processes, one behind the other."""
        if self.size == 1:
            return x
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(self.size)]
        dist.all_gather(parts, x.contiguous(), group=self.group)
        return torch.cat(parts)

    def share(self, x: Tensor) -> Tensor:
        """This process's part of what :meth:`gather` gives."""
        return x.chunk(self.size)[self.rank] if self.size > 1 else x

    def objects(self, thing: Any) -> list[Any]:
        """What every process has, pickled and sent: slow, for what is rare."""
        if self.size == 1:
            return [thing]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, thing, group=self.group)
        return found

    def _send(self, tensors: Sequence[Tensor], send: Callable[[Tensor], Any], receive: bool = True) -> None:
        """Send tensors, flattened and joined, and write what has become of them back."""
        if self.size == 1:
            return
        for some in _buckets(tensors):
            flat = torch.cat([x.detach().reshape(-1) for x in some])
            send(flat)
            if receive:
                for x, part in zip(some, flat.split([x.numel() for x in some]), strict=True):
                    x.detach().copy_(part.view(x.shape))

    # -- work -------------------------------------------------------------------------------------------------------

    def owners(self, costs: Mapping[str, float]) -> dict[str, int]:
        """Which process is to do what, so that all are done at about the same time: the longest first, to whoever is
        free first. Every process finds the same.

        Example:
            >>> two = Replicas()
            >>> two.size = 2
            >>> two.owners({"a": 3.0, "b": 1.0, "c": 2.0, "d": 2.0})
            {'a': 0, 'c': 1, 'd': 1, 'b': 0}
        """
        load, found = [0.0] * self.size, {}
        for name in sorted(costs, key=lambda name: -costs[name]):
            first = load.index(min(load))
            load[first] += costs[name]
            found[name] = first
        return found


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """The tensors in their order, by type and device, so many at a time as may be joined."""
    kinds: dict[Any, list[Tensor]] = {}
    for x in tensors:
        kinds.setdefault((x.dtype, x.device), []).append(x)
    for kind in kinds.values():
        some, size = [kind[0]], kind[0].numel()
        for x in kind[1:]:
            if size + x.numel() > BUCKET:
                yield some
                some, size = [], 0
            some.append(x)
            size += x.numel()
        yield some
