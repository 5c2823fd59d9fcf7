"""Batches of a table that is not in memory: cells read ahead in a thread, decoded ahead in other processes.

What of decoding is Python, threads of one process take turns at with the loop that trains; only in processes does it
run beside the loop. So it is done there (torch's ``DataLoader`` keeps them), and batches come back in their order. With
a single worker on two cores no difference from a thread was measured. What is decoded depends on the row alone, so the
number of workers changes nothing but the time.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils import data as torch_data

from hesse.finding import InputError
from hesse.multimodal.dataset import Dataset
from hesse.multimodal.schema import Schema
from hesse.multimodal.stream.order import Window, windows
from hesse.multimodal.stream.source import Source
from hesse.multimodal.stream.tolerant import read_what_can_be
from hesse.multimodal.table import Table

__all__ = ["Decoded", "Loader", "usual_workers"]

PR_SET_PDEATHSIG = 1  # of Linux' prctl: a signal when the parent dies
AHEAD = 4  # batches a worker may be ahead


@dataclass(frozen=True)
class Decoded:
    """One process's share of a batch.

    Attributes:
        whole: rows of the batch, over all processes.
        data: the rows of the share that could be read; ``data.rows`` is their place in the share.
        errors: what is wrong with the others, by place in the share.
    """

    whole: int
    data: Dataset
    errors: dict[int, InputError]


class Loader:
    """The wanted rows of a source, shuffled and decoded, epoch by epoch.

    Args:
        schema: how cells are read.
        source: the table.
        wanted: bool ``[rows]``, which rows to deal.
        root: the folder that paths in cells are relative to.
        buffer: rows that are shuffled together; their cells are in memory, and those of the next buffer too.
        workers: processes that decode; 0 decodes here, while the loop waits.
    """

    def __init__(
        self, schema: Schema, source: Source, wanted: NDArray[np.bool_], *, root: Path, buffer: int, workers: int
    ) -> None:
        self._schema, self._source, self._wanted, self._root = schema, source, wanted, root
        self._buffer, self.workers = buffer, workers
        self._counts = np.diff(np.concatenate([[0], np.cumsum(wanted)])[source.starts])
        self._columns = [column.name for column in schema.columns if column.role in ("input", "target")]
        self._tasks: Iterator[tuple[int, Table]] = iter(())
        self._loader: Any = None

    def __len__(self) -> int:
        return int(self._counts.sum())

    def batches(
        self, epoch: int, start: int, size: int, seed: int, share: Callable[[Tensor], Tensor]
    ) -> Iterator[Decoded]:
        """The batches of an epoch from the ``start``-th on; what comes before is neither read nor decoded.

        Args:
            share: this process's part of the positions 0 to ``size`` - 1 of a batch.

        Raises:
            InputError: the table has been changed.
        """
        if self._loader is None:
            self._start()
        self._tasks = self._cells(epoch, start, size, seed, share)
        for whole, data, errors in self._loader:
            yield Decoded(whole, _as_tensors(data), errors)

    def close(self) -> None:
        """End the workers; the next epoch would start new ones."""
        self._loader = None
        self._tasks = iter(())

    def _start(self) -> None:
        """Start the workers, before any thread of ours runs: they are copies of this process."""
        context: Any = None
        if self.workers and "fork" in multiprocessing.get_all_start_methods():
            context = multiprocessing.get_context("fork")
        with warnings.catch_warnings():
            # Of more workers than processors, and of a fork while other threads (of BLAS, of a screen) live: none of
            # them holds a lock that decoding takes.
            warnings.simplefilter("ignore", UserWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            self._loader = torch_data.DataLoader(
                _Decoder(self._schema, self._root),
                batch_size=None,
                sampler=_Tasks(self),
                num_workers=self.workers,
                collate_fn=_same,
                worker_init_fn=_begin,
                prefetch_factor=AHEAD if self.workers else None,
                persistent_workers=self.workers > 0,
                multiprocessing_context=context,
                generator=torch.Generator(),  # else it would draw from torch's own, which a resumed run would not
            )
            list(self._loader)

    def _cells(
        self, epoch: int, start: int, size: int, seed: int, share: Callable[[Tensor], Tensor]
    ) -> Iterator[tuple[int, Table]]:
        """Of each batch, how many rows it has and the cells of this process's share."""
        skipped = start * size
        ahead = [w for w in windows(self._counts, self._buffer, epoch, seed) if w.first + w.rows > skipped]
        waiting: Table | None = None
        with ThreadPoolExecutor(1) as reader:
            future = reader.submit(self._read, ahead[0]) if ahead else None
            for i, window in enumerate(ahead):
                assert future is not None
                table = future.result()
                future = reader.submit(self._read, ahead[i + 1]) if i + 1 < len(ahead) else None
                table = table.slice(max(0, skipped - window.first))
                waiting = table if waiting is None else _behind(waiting, table)
                whole = len(waiting) // size * size if i + 1 < len(ahead) else len(waiting)
                for at in range(0, whole, size):
                    rows = torch.arange(at, min(at + size, whole))
                    yield len(rows), waiting.take(share(rows).numpy())
                waiting = waiting.slice(whole)

    def _read(self, window: Window) -> Table:
        """The cells of a window in their order."""
        rows = [
            int(self._source.starts[piece])
            + np.flatnonzero(self._wanted[self._source.starts[piece] : self._source.starts[piece + 1]])
            for piece in window.pieces
        ]
        return self._source.gather(np.concatenate(rows), self._columns).take(window.order())


def usual_workers() -> int:
    """As many as there are processors to spare, one at least; processes of one team share them."""
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, processors // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) - 1)


class _Tasks:
    """What the workers are to do next."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def __iter__(self) -> Iterator[tuple[int, Table]]:
        return self._loader._tasks


class _Decoder(torch_data.Dataset[Any]):
    """Lives in the workers."""

    def __init__(self, schema: Schema, root: Path) -> None:
        self._schema, self._root = schema, root

    def __getitem__(self, task: tuple[int, Table]) -> tuple[int, Dataset, dict[int, InputError]]:
        whole, table = task
        try:
            data, errors = read_what_can_be(self._schema, table, root=self._root)
        except InputError as error:  # of no row: torch would lose its parts on the way
            return whole, read_what_can_be(self._schema, table.slice(0, 0), root=self._root)[0], {-1: error}
        return whole, _as_arrays(data), errors


def _begin(_: int) -> None:
    """What a worker does first: Ctrl-C is for the process that trains, and when that is killed the worker ends too.

    torch's own watch over the parent is by a clock, and does not look while a worker waits for a lock that has died.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _same(thing: Any) -> Any:
    return thing


def _behind(one: Table, other: Table) -> Table:
    assert one.places is not None and other.places is not None
    data = pa.concat_tables([one.data, other.data], promote_options="permissive").combine_chunks()
    places = type(one.places)(
        one.places.names,
        np.concatenate([one.places.file, other.places.file]),
        np.concatenate([one.places.row, other.places.row]),
    )
    return Table(data, one.name, one.folder, places=places)


def _as_arrays(data: Dataset) -> Dataset:
    """Arrays go through a pipe; tensors would take shared memory, of which a container may have very little."""
    return _mapped(data, lambda t: t.numpy())


def _as_tensors(data: Dataset) -> Dataset:
    return _mapped(data, torch.as_tensor)


def _mapped(data: Dataset, change: Callable[[Any], Any]) -> Dataset:
    def each(thing: Any) -> Any:
        return tuple(map(change, thing)) if isinstance(thing, tuple) else change(thing)

    inputs = {key: (each(values), change(present)) for key, (values, present) in data.inputs.items()}
    targets = None if data.targets is None else each(data.targets)
    return Dataset(inputs, targets, change(data.rows), data.findings)
