"""Training rows that are not in memory: read and decoded while the loop computes, batch by batch.

A large table is understood from a sample of its rows; what validates and tests is held in memory, and so is a part of
the sample, for everything that looks at training rows without training on them. All else streams from the disk.
"""

from __future__ import annotations

import math
import os
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hesse.finding import Finding, InputError
from hesse.multimodal import Dataset, Schema, Table, encode
from hesse.multimodal.dataset import read_rows
from hesse.multimodal.split import Parts
from hesse.multimodal.stream import Loader, Source, divide, usual_workers
from hesse.multimodal.stream.divide import TEST, TRAIN, VALID, marked
from hesse.multimodal.table import unused
from hesse.training.feed import Batch, hide, without
from hesse.training.team import Team

__all__ = ["Streamed", "cells_are_many", "decode_large", "stream_rows"]

SAMPLE = 20_000  # training rows that columns are understood from
HELD = 4096  # of these, decoded and in memory
BUFFER = 256 << 20  # bytes of cells that are shuffled together
FEWEST, MOST = 1 << 12, 1 << 18  # rows that are
AS_CELLS = 4  # bytes of memory for a byte of a file: text cells are longer as columns, and Parquet is compressed


@dataclass(frozen=True)
class Streamed:
    """The training rows of a table on disk."""

    loader: Loader
    skip_bad_rows: bool
    record: dict[str, Any]

    def close(self) -> None:
        self.loader.close()

    def __len__(self) -> int:
        return len(self.loader)

    def batches(self, epoch: int, start: int, size: int, seed: int, team: Team) -> Iterator[Batch]:
        for number, found in enumerate(self.loader.batches(epoch, start, size, seed, team.share), start):
            if found.errors and not (self.skip_bad_rows and -1 not in found.errors):
                raise _refusal(found.errors[min(found.errors)])
            modalities = len(found.data.inputs)
            chances = np.random.default_rng((seed, epoch, number)).random((found.whole, modalities), np.float32)
            hidden = team.share(hide(torch.from_numpy(chances)))[found.data.rows]
            inputs, targets = found.data.batch(slice(None))
            rows = found.whole - len(found.errors) if len(found.data) else 0
            failed = tuple(error.finding for _, error in sorted(found.errors.items()))
            yield Batch(without(inputs, hidden), targets, rows, failed=failed)


def stream_rows(
    source: Source,
    target: str | Sequence[str],
    understand: Callable[..., tuple[Schema, Parts]],
    *,
    split_column: str | None,
    root: Path,
    seed: int,
    skip_bad_rows: bool,
    workers: int | None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Table, Schema, Parts, Dataset, Streamed]:
    """Divide a table, understand its columns, and hold what has to be held.

    Args:
        source: the table.
        target: the columns to predict.
        understand: :func:`hesse.multimodal.make_schema` with everything but the table and the split column.
        split_column: says train, valid or test.
        root: the folder that paths in cells are relative to.
        seed: of the division.
        skip_bad_rows: leave out rows that cannot be read.
        workers: processes that decode; by default as many as there are processors to spare.
        progress: called with how many files of the held rows are decoded, and how many there are.

    Returns:
        The held rows as a table, the schema, their indices by part, the held rows encoded, and the training rows.
    """
    targets = [_composed(name) for name in ([target] if isinstance(target, str) else target)]
    split_column = None if split_column is None else _composed(split_column)
    if not targets or not {*targets, *([split_column] if split_column else [])} <= set(source.names):
        understand(source.read(0), target, split_column=split_column)  # says what is wrong
    division = divide(source, targets, split_column, seed)
    sample = division.sample(SAMPLE)
    rows = np.sort(np.concatenate([sample, division.rows(VALID), division.rows(TEST)]))
    table = source.gather(rows)
    part = division.part[rows]
    said = split_column or unused("part", source.names)
    schema, _ = understand(marked(table, part, said), target, split_column=said)
    columns = schema.columns if split_column else [column for column in schema.columns if column.name != said]
    schema = Schema(tuple(columns), schema.targets)

    few = np.union1d(division.sample(HELD), np.intersect1d(sample, division.examples))
    kept = np.isin(rows, few) | (part != TRAIN)
    held = table.take(np.flatnonzero(kept))
    data = encode(schema, held, root=root, skip_bad_rows=skip_bad_rows, progress=progress)
    parts = {
        name: np.flatnonzero(part[kept] == code) for name, code in (("train", TRAIN), ("valid", VALID), ("test", TEST))
    }
    buffer = int(np.clip(BUFFER // max(1, table.data.nbytes // len(table)), FEWEST, MOST))
    workers = usual_workers() if workers is None else workers
    loader = Loader(schema, source, division.part == TRAIN, root=root, buffer=buffer, workers=workers)
    held_rows = {"sample": len(sample), "valid": len(parts["valid"]), "test": len(parts["test"])}
    feed = Streamed(loader, skip_bad_rows, {"rows": len(source), "streamed": True, "held": held_rows, "buffer": buffer})
    data.findings.insert(0, _told(source, feed, held_rows, int((division.part > TEST).sum())))
    return held, schema, parts, data, feed


def cells_are_many(table: Any) -> bool:
    """Whether a table is a folder, or a file whose cells would take more than half of the memory that is free."""
    if not isinstance(table, str | os.PathLike):
        return False
    path = Path(os.fspath(table))
    return path.is_dir() or (path.is_file() and path.stat().st_size * AS_CELLS > free() / 2)


def decode_large(schema: Schema, table: Table, root: Path) -> bool:
    """Whether the decoded rows would take more than half of the memory that is free."""
    none, _ = read_rows(schema, table.slice(0, 0), root=root)
    parts = [part for data, _ in none.inputs.values() for part in (data if isinstance(data, tuple) else (data,))]
    each = sum(part.element_size() * math.prod(part.shape[1:]) for part in parts)
    return each * len(table) > free() / 2


def free() -> int:
    """Bytes of memory that are free: of the machine, or of the container that this process is in."""
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")] if hasattr(os, "sysconf") else [1 << 33]
    for path, unit in (("/proc/meminfo", 1024), ("/sys/fs/cgroup/memory.max", 1)):
        try:
            text = Path(path).read_text(encoding="utf-8")
        except OSError:  # another system
            continue
        words = re.search(r"MemAvailable:\s*(\d+)" if unit > 1 else r"^(\d+)$", text.strip())
        found += [int(words[1]) * unit] if words else []
    return min(found)


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name).strip()


def _told(source: Source, feed: Streamed, held: dict[str, int], without: int) -> Finding:
    left = (
        f" {without} rows take no part: they have no target, or were too many to validate or test on."
        if without
        else ""
    )
    return Finding(
        "streamed",
        source.name,
        f"{len(feed)} rows are read from disk while training, {feed.record['buffer']} shuffled together at a time. The "
        f"columns were understood from {held['sample']} of them. The {held['valid']} rows that validate and the "
        f"{held['test']} that test are held in memory.{left}",
        severity="info",
        value=len(feed),
    )


def _refusal(error: InputError) -> InputError:
    f = error.finding
    remedy = f"{f.remedy} Then go on with --resume, or train with --skip-bad-rows.".strip()
    return InputError(f.kind, f.where, f.message, remedy, f.value)
