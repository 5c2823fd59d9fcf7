"""Whether the processes of a run still train the same model.

Copies of a model that average their gradients must hold the same weights; they drift apart unnoticed when one process
skips a batch, seeds a layer otherwise or changes a weight alone. So at sampled steps each process posts a few numbers a
layer, of its weights and its gradient, to the key-value store by which the processes found one another, and reads what
the others posted at earlier ones. Nothing waits: a monitor in one process only is no deadlock.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from hesse.finding import Finding

__all__ = ["Team", "compare"]

SAME = 1e-5  # of the length; copies that do the same computations differ in the last bits at most
UNREAD = 64  # posts that the others have not answered
Numbers = Mapping[str, tuple[float, float, float, float]]
"""By layer: length and sum of the weights, length of the gradient, sum of the weights at the start."""


class Team:
    """The processes of ``torch.distributed``, and what they posted."""

    _made = 0  # teams so far: those that belong together were made at the same place of the program

    def __init__(self, model: nn.Module) -> None:
        Team._made += 1
        self.name = f"hesse.watch/{Team._made}"
        self.replicas = isinstance(model, nn.parallel.DistributedDataParallel)
        sharded = any(hasattr(p, "to_local") for p in model.parameters())
        together = torch.distributed.is_available() and torch.distributed.is_initialized()
        self.size = torch.distributed.get_world_size() if together and not sharded else 1
        self.rank = torch.distributed.get_rank() if self.size > 1 else 0
        self._waiting: dict[int, Numbers] = {}  # own numbers of steps that not all have posted yet

    def post(self, step: int, numbers: Numbers) -> None:
        """Tell the others."""
        if self.size == 1:
            return
        flat = [value for part in numbers.values() for value in part]
        head = "\n".join(numbers).encode()
        data = struct.pack(f"<I{len(flat)}d", len(head), *flat)
        _store().set(self._key(step, self.rank), data[:4] + head + data[4:])
        self._waiting[step] = dict(numbers)

    def read(self) -> list[Finding]:
        """Compare the steps that all have posted by now."""
        findings = []
        for step in sorted(self._waiting):
            others = [rank for rank in range(self.size) if rank != self.rank]
            store = _store()
            if not store.check([self._key(step, rank) for rank in others]):
                if len(self._waiting) > UNREAD:  # the others do not look at this step, or do not look at all
                    del self._waiting[step]
                    store.delete_key(self._key(step, self.rank))
                continue
            theirs = {rank: _unpacked(store.get(self._key(step, rank))) for rank in others}
            own = self._waiting.pop(step)
            findings += compare(step, own, theirs, self.rank, self.replicas)
        return findings

    def _key(self, step: int, rank: int) -> str:
        return f"{self.name}/{step}/{rank}"


def compare(step: int, own: Numbers, theirs: Mapping[int, Numbers], rank: int, copies: bool) -> list[Finding]:
    """What processes that should agree do not agree in.

    Args:
        step: that the numbers are of.
        own: numbers by layer; ``theirs`` by rank.
        rank: of this process.
        copies: whether they are known to hold the same model. Without it only those are taken for copies that started
            with the same weights or have the same gradients.

    Example:
        >>> [finding] = compare(5, {"0": (1.0, 0.0, 2.0, 0.0)}, {1: {"0": (1.5, 0.0, 2.0, 0.0)}}, 0, copies=True)
        >>> finding.kind, finding.where
        ('ranks_disagree', '0')
    """
    for other, numbers in theirs.items():
        if numbers.keys() != own.keys():
            continue  # each has a part of the model
        weights, grads = _apart(own, numbers)
        same = copies or all(_close(own[path][3], numbers[path][3], own[path][0]) for path in own)
        if not (weights or grads) or (grads and not same):
            continue
        # Averaged gradients are the same even where weights are not: so when they differ, they were not averaged.
        what = "gradients, after they should have been averaged," if grads else "weights"
        layers = grads or weights
        where = layers[0]
        remedy = (
            "Give all processes the same weights before training (DistributedDataParallel does; else "
            "torch.distributed.broadcast each parameter), and let no process change weights or skip a step alone."
            if not grads
            else "Wrap the model in DistributedDataParallel and call the wrapper, not the model inside; average "
            "gradients that you compute by hand (all_reduce); pass find_unused_parameters=True where processes use "
            "different layers."
        )
        column = 2 if grads else 0
        pair = own[where][column], numbers[where][column]
        return [
            Finding(
                "ranks_disagree",
                where,
                f"Processes {rank} and {other} have different {what} in {len(layers)} of {len(own)} layers.",
                remedy,
                "error",
                value=pair[0],
                limit=pair[1],
                step=step,
                evidence={"layers": layers, "ranks": [rank, other], "values": list(pair)},
            )
        ]
    return []


def _apart(own: Numbers, other: Numbers) -> tuple[list[str], list[str]]:
    """Layers whose weights differ, and those whose gradients do."""
    weights, grads = [], []
    for path, (length, total, grad, _) in own.items():
        length_there, total_there, grad_there, _ = other[path]
        size = max(length, length_there, abs(total))
        if not _close(length, length_there, size) or not _close(total, total_there, size):
            weights.append(path)
        if not _close(grad, grad_there, max(grad, grad_there)):
            grads.append(path)
    return weights, grads


def _close(a: float, b: float, size: float) -> bool:
    return a == b or abs(a - b) <= SAME * size or (a != a and b != b)


def _unpacked(data: bytes) -> Numbers:
    size = struct.unpack_from("<I", data)[0]
    paths = data[4 : 4 + size].decode().split("\n")
    flat = struct.unpack_from(f"<{4 * len(paths)}d", data, 4 + size)
    return {path: (flat[4 * i], flat[4 * i + 1], flat[4 * i + 2], flat[4 * i + 3]) for i, path in enumerate(paths)}


def _store() -> Any:
    """The store that ``init_process_group`` made."""
    return torch.distributed.distributed_c10d._get_default_store()
