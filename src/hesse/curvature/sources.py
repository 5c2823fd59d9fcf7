"""Where the batches of a curvature come from: one batch, or a data set that is gone through once a product.

A data set's loss is the mean of what its batches average over: each batch counts by its number of terms (examples,
tokens that are not ignored, summed class weights), so that the curvature does not depend on how the data are cut.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

from torch import Tensor, nn
from torch import distributed as dist
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, DistributedSampler

from hesse.curvature.output import output_curvature
from hesse.objective import Objective
from hesse.objective.function import LossFn, objective

__all__ = ["Batches", "Reduction", "batches_of"]

Reduction = Literal["mean", "sum"]


@dataclass(frozen=True)
class Batches:
    """The objectives of one or several batches.

    Args:
        first: the objective of the first batch, on which modes are chosen and checked.
        rest: what yields all batches anew at every pass, or None when the first is the only one.
        reduction: how their losses make one.
        progress: whether to show a bar on stderr.
    """

    first: Objective
    rest: Iterable[Any] | None
    reduction: Reduction
    progress: bool

    def __iter__(self) -> Iterator[tuple[int, Objective]]:
        """The objectives of this rank's share of the batches, with their place in the whole."""
        if self.rest is None:
            yield 0, self.first
            return
        from tqdm.auto import tqdm  # only who goes through many batches waits for it

        model, loss_fn = self.first.model, self.first.loss_fn
        rank, ranks = self._share()
        shown = tqdm(self.rest, disable=not self.progress or rank != 0, desc="batches", leave=False)
        for i, batch in islice(enumerate(shown), rank, None, ranks):
            yield i, objective(model, loss_fn, batch)

    def _share(self) -> tuple[int, int]:
        """This rank and the number of ranks; (0, 1) when nothing has to be shared out."""
        if not self.distributed:
            return 0, 1
        shared_already = isinstance(self.rest, DataLoader) and isinstance(self.rest.sampler, DistributedSampler)
        return (0, 1) if shared_already else (dist.get_rank(), dist.get_world_size())

    @property
    def distributed(self) -> bool:
        """Whether the batches are spread over several processes. One batch belongs to the process that has it."""
        return self.rest is not None and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1

    def weight(self, batch: Objective, outputs: Any) -> float:
        """What the loss of ``batch`` counts in the total: the number of terms it averages over, or 1 for a sum."""
        if self.rest is None or self.reduction == "sum":
            return 1.0
        return float(_terms(batch, outputs))


def batches_of(model: nn.Module, loss_fn: LossFn, batch: Any, reduction: Reduction, progress: bool) -> Batches:
    """Tell one batch from a data set, and look at the first.

    A tuple is a batch. So is a list of two of which the first is a tensor or mapping, for a ``DataLoader`` yields such;
    a list whose elements are pairs is a data set, like every other iterable.

    Raises:
        TypeError: an iterator, which can be gone through only once.
        ValueError: no batch in it, or an unknown ``reduction``.
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be 'mean' or 'sum'; got {reduction!r}.")
    if _is_pair(batch) or not isinstance(batch, Iterable):
        return Batches(objective(model, loss_fn, batch), None, reduction, progress)
    if isinstance(batch, Iterator):
        raise TypeError(
            f"a {type(batch).__name__} can be gone through only once, and every product needs all batches again. "
            "Give a list of batches or a DataLoader."
        )
    for first in batch:
        return Batches(objective(model, loss_fn, first), batch, reduction, progress)
    raise ValueError("there is no batch: the iterable is empty.")


def _is_pair(batch: Any) -> bool:
    if isinstance(batch, tuple):
        return True
    if not isinstance(batch, list) or len(batch) != 2:
        return False
    return isinstance(batch[0], Tensor | Mapping) or not all(_looks_like_a_batch(b) for b in batch)


def _looks_like_a_batch(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 2


def _terms(batch: Objective, outputs: Any) -> float:
    if isinstance(outputs, Tensor):
        try:
            return output_curvature(batch.loss_fn, outputs.detach(), batch.targets).total
        except (TypeError, ValueError):
            pass  # a loss that has no Gauss-Newton factor here: its mean is over examples
    leaves = [x for x in pytree.tree_leaves(outputs) if isinstance(x, Tensor) and x.ndim > 0]
    return float(len(leaves[0])) if leaves else 1.0
