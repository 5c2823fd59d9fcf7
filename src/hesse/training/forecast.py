"""Predictions of a table of any size: piece by piece, in the order of its rows, in the memory that some rows take.

A row that cannot be read does not stop the others: its prediction is empty, and it is named. So are categories that no
training row had, and columns that are absent; both count as missing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import nn

from hesse.finding import Finding, InputError
from hesse.multimodal import Schema
from hesse.multimodal.inputs import unknown
from hesse.multimodal.stream import Source, read_what_can_be
from hesse.multimodal.table import Table
from hesse.multimodal.values import short
from hesse.training.answers import answer
from hesse.training.evaluate import outputs

__all__ = ["Forecast"]

ROWS = 1024  # at once: decoded pictures of so many are tens of megabytes
MOST_NAMED = 1000  # rows that failed


class Forecast:
    """The predictions of a table; iterating reads it once and gives them chunk by chunk.

    Args:
        schema, model, calibration: of the run.
        source: the table.
        root: the folder that paths in cells are relative to.
        threshold: as in :func:`hesse.training.answers.answer`.
        strict: raise at the first row that cannot be read.
        progress: called with how many rows are done and how many there are.

    Attributes:
        rows: done so far.
        failed: how many of them cannot be read.
        failures: why, of the first thousand of these.
        findings: absent columns and unknown categories, in the rows done so far.
    """

    def __init__(
        self,
        schema: Schema,
        model: nn.Module,
        calibration: dict[str, Any],
        source: Source,
        *,
        root: Path,
        threshold: float | str | None = None,
        strict: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self._schema, self._model, self._calibration, self._threshold = schema, model, calibration, threshold
        self._source, self._root, self._strict, self._progress = source, root, strict, progress
        self.rows = self.failed = 0
        self.failures: list[Finding] = []
        self._absent: list[Finding] = []
        self._unknown: dict[str, tuple[Finding, int, Counter[str]]] = {}

    def __iter__(self) -> Iterator[pa.Table]:
        """Tables whose rows are those of the source, in its order.

        Raises:
            InputError: the table cannot be read, or no row of it, or, if strict, one row cannot.
        """
        self.rows = self.failed = 0
        self.failures, self._absent, self._unknown = [], [], {}
        wanted = {column.name for column in self._schema.inputs}
        names = [name for name in self._source.names if name in wanted]
        names = names if len(names) == len(wanted) else self._source.names  # what is absent may be called otherwise
        for piece in range(self._source.pieces):
            table = self._source.read(piece, names)
            for start in range(0, len(table), ROWS):
                yield self._answers(table.slice(start, ROWS))
                if self._progress is not None:
                    self._progress(self.rows, len(self._source))
        if self.failed == self.rows:
            f = self.failures[0]
            rest = f" None of the other {self.rows - 1} rows can be read either." if self.rows > 1 else ""
            raise InputError(f.kind, f.where, f"{f.message}{rest}", f.remedy, f.value)

    @property
    def findings(self) -> list[Finding]:
        found = list(self._absent)
        for finding, rows, counts in self._unknown.values():
            most = counts.most_common(20)
            shown = ", ".join(f"'{short(value, 30)}' ({count})" for value, count in most[:3])
            message = f"{rows} of {self.rows} values were in no training row and count as missing: {shown}."
            found.append(replace(finding, message=message, value=rows, evidence={"values": dict(most)}))
        return found

    def _answers(self, table: Table) -> pa.Table:
        data, errors = read_what_can_be(self._schema, table, root=self._root, with_target=False)
        if errors and self._strict:
            raise errors[min(errors)]
        self._note(table, data.findings, errors)
        out = outputs(self._model, data, torch.arange(len(data))) if len(data) else torch.zeros(0, self._schema.outputs)
        found = answer(self._schema, out, self._calibration, self._threshold)
        place = np.full(len(table), -1)
        place[data.rows.numpy()] = np.arange(len(data))
        return found.take(pa.array(place, mask=place < 0))

    def _note(self, table: Table, findings: list[Finding], errors: dict[int, InputError]) -> None:
        if not self.rows:
            self._absent = [finding for finding in findings if finding.kind == "missing column"]
        self.rows += len(table)
        self.failed += len(errors)
        room = MOST_NAMED - len(self.failures)
        self.failures += [replace(errors[row].finding, severity="warning") for row in sorted(errors)[:room]]
        for finding in unknown(self._schema, table):
            name = finding.where.rpartition("column ")[2]
            first, rows, counts = self._unknown.get(name, (finding, 0, Counter()))
            rows += int(finding.value or 0)
            self._unknown[name] = first, rows, counts + Counter(finding.evidence["values"])
