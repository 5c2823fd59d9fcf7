"""Where training rows come from: batches in an order that the seed and the epoch decide, from wherever an epoch stands.

A feed gives each process its share of every batch and is asked for the batches from the ``start``-th on, so the loop
knows neither where the rows lie nor who else trains. :class:`Held` has all rows in memory;
:class:`hesse.training.streamed.Streamed` reads and decodes them while the loop computes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from hesse.finding import Finding
from hesse.multimodal import Dataset
from hesse.multimodal.model import Data
from hesse.training.team import Team

__all__ = ["Batch", "Feed", "Held", "deal", "hide", "skipped_rows", "without"]

MODALITY_DROPOUT = 0.1  # so that the head has met absent modalities before prediction does

Inputs = dict[str, tuple[Data, Tensor]]
Targets = Tensor | tuple[Tensor, ...]


@dataclass(frozen=True)
class Batch:
    """This process's share of a batch, as ``hesse.closure`` takes it.

    Attributes:
        inputs: some of them hidden: present in the table, and absent here.
        targets: of its rows.
        rows: of the whole batch, over all processes; 0 if none of the share's rows could be read.
        waited: seconds until it was there.
        failed: rows of the share that could not be read, and why.
    """

    inputs: Inputs
    targets: Targets | None
    rows: int
    waited: float = 0.0
    failed: tuple[Finding, ...] = ()


class Feed(Protocol):
    """The training rows, epoch by epoch."""

    @property
    def record(self) -> dict[str, Any]:
        """What ``config.json`` says about them."""

    def close(self) -> None:
        """End what works for the feed; it may be asked for batches again."""

    def __len__(self) -> int:
        """How many rows an epoch has."""

    def batches(self, epoch: int, start: int, size: int, seed: int, team: Team) -> Iterator[Batch]:
        """The batches of an epoch, but for the first ``start``; every row of the epoch is in one of them."""


@dataclass(frozen=True)
class Held:
    """Rows that are in memory: the ``positions`` of ``data``."""

    data: Dataset
    positions: Tensor

    @property
    def record(self) -> dict[str, Any]:
        return {"streamed": False}

    def close(self) -> None:
        pass

    def __len__(self) -> int:
        return len(self.positions)

    def batches(self, epoch: int, start: int, size: int, seed: int, team: Team) -> Iterator[Batch]:
        for rows, hidden in deal(self.positions, len(self.data.inputs), epoch, size, seed)[start:]:
            inputs, targets = self.data.batch(team.share(rows))
            yield Batch(without(inputs, team.share(hidden)), targets, len(rows))


def deal(rows: Tensor, modalities: int, epoch: int, size: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """The batches of an epoch: which rows [b], and bool [b, modalities], what is hidden from which row.

    Example:
        >>> [(rows.tolist(), hidden.shape) for rows, hidden in deal(torch.arange(5), 2, epoch=0, size=3, seed=0)]
        [([4, 0, 1], torch.Size([3, 2])), ([3, 2], torch.Size([2, 2]))]
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = rows[torch.randperm(len(rows), generator=generator)]
    hidden = hide(torch.rand(len(order), modalities, generator=generator))
    return list(zip(order.split(size), hidden.split(size), strict=True))


def hide(chances: Tensor) -> Tensor:
    """Which modalities are hidden, bool [b, modalities], from uniform numbers: a tenth, and never all of a row."""
    hidden = chances < MODALITY_DROPOUT
    return hidden & ~hidden.all(1, keepdim=True)  # something must be left to learn from


def without(inputs: Mapping[str, tuple[Data, Tensor]], hidden: Tensor) -> Inputs:
    """The inputs, as if what is hidden [b, modalities] were absent."""
    return {key: (data, present & ~hidden[:, i]) for i, (key, (data, present)) in enumerate(inputs.items())}


def skipped_rows(skipped: Mapping[str, dict[str, Any] | None]) -> list[Finding]:
    """What is to be said of rows that could not be read while training: how many, and the first of them."""
    listed = [Finding(**{**finding, "severity": "warning"}) for finding in skipped.values() if finding is not None]
    if not listed:
        return []
    more = "The first of them are listed below." if len(skipped) > len(listed) else ""
    message = f"{len(skipped)} training rows cannot be read and were left out."
    return [Finding("skipped rows", "", message, more, value=len(skipped)), *listed]
