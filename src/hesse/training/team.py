"""The processes that train one model together: ``torchrun --nproc-per-node 2 -m hesse train ...`` starts several.

Each reads the table and has all its rows; of every batch it computes its share, and the steps are those of one process
on the whole. What is drawn at random is drawn alike. The first one writes and speaks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

__all__ = ["Team", "joined"]


@contextmanager
def joined() -> Iterator[None]:
    """While this is open, the processes that torchrun started can talk to each other. Alone it does nothing."""
    begin = dist.is_available() and dist.is_torchelastic_launched() and not dist.is_initialized()
    if begin:
        dist.init_process_group("gloo")
    try:
        yield
    finally:
        if begin:
            dist.destroy_process_group()


@dataclass(frozen=True)
class Team:
    """This process among those that train together; by default there is no other."""

    rank: int = 0
    size: int = 1
    group: Any = None

    @classmethod
    def present(cls) -> Team:
        """Of the process group that there is, if it works on the CPU, as training does."""
        if not (dist.is_available() and dist.is_initialized() and "gloo" in dist.get_backend()):
            return cls()
        return cls(dist.get_rank(), dist.get_world_size(), dist.group.WORLD)

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    def wait(self) -> None:
        """Until all have come here."""
        if self.size > 1:
            dist.barrier(self.group)

    def agreed(self, thing: Any) -> Any:
        """What the first process has, in all of them."""
        if self.size == 1:
            return thing
        things = [thing]
        dist.broadcast_object_list(things, src=dist.get_global_rank(self.group, 0), group=self.group)
        return things[0]

    def replica(self, model: nn.Module) -> nn.Module:
        """The model, with the weights of the first process and gradients that are averaged over all."""
        return DistributedDataParallel(model, process_group=self.group) if self.size > 1 else model

    def share(self, rows: Tensor) -> Tensor:
        """This process's part of the rows; all of them, if there are fewer than processes.

        Example:
            >>> import torch
            >>> Team(1, 2).share(torch.arange(5)), Team(1, 2).share(torch.arange(1))
            (tensor([3, 4]), tensor([0]))
        """
        return rows.tensor_split(self.size)[self.rank] if len(rows) >= self.size else rows
