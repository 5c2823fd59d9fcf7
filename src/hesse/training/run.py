"""A run: the folder that training leaves, and what can be done with it.

===================  ==============================================================================
config.json          what was asked, by what versions, and how it ended
columns.json         the schema: how a table becomes tensors
model.safetensors    the averaged weights of the best epoch: what predicts
checkpoint.pt        the state between two steps: what resumes
metrics.jsonl        a row an epoch
steps.jsonl          loss, damping and step size, a row a step (thinned)
layers.jsonl         gradient and update of each layer, a row a sampled step
findings.json        what was noticed in data, derivatives and training
evaluation.json      score and metrics on held-out rows, by target, by class and by modality
calibration.json     temperature and thresholds of the predicted probabilities
samples/             pictures, sounds and texts of rows on which the modalities disagree
compare/NAME/        the same for an optimiser trained beside it
report.html          the page
card.md              the model card
model.onnx           the model for other programs (``hesse export``)
spectrum.json        how the loss curves: eigenvalues, traces, density (``hesse spectrum``)
spectrum.html        the same as a page
===================  ==============================================================================
"""

from __future__ import annotations

import math
import operator
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from hesse.files import atomic_path, read_json, write_json
from hesse.finding import InputError
from hesse.multimodal import FusedModel, Schema
from hesse.multimodal.stream import open_source
from hesse.training.answers import refuse_threshold
from hesse.training.build import build_model
from hesse.training.forecast import Forecast

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["Run", "clear", "refuse_used", "write_model"]

RECORDS = (
    "columns.json",
    "model.safetensors",
    "checkpoint.pt",
    "metrics.jsonl",
    "steps.jsonl",
    "layers.jsonl",
    "findings.json",
    "evaluation.json",
    "calibration.json",
    "report.html",
    "card.md",
    "model.onnx",
    "spectrum.json",
    "spectrum.html",
    "config.json",  # last to go: it is what makes a folder a run folder
)
CONFIG = (
    "status",
    "target",
    "optimizer",
    "arguments",
    "command",
    "rows",
    "seed",
)  # what this version cannot do without
WORTH = ("model.safetensors", "checkpoint.pt", "metrics.jsonl")  # of which a run without any holds nothing to lose
LOCK = ".lock"  # there while a process trains
ANEW = "Put the file back that hesse wrote, or train anew with --overwrite."


class Run:
    """A trained run on disk.

    Args:
        folder: as ``hesse train --out`` wrote it.

    Raises:
        InputError: the folder is not a run folder.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        try:
            self.config: dict[str, Any] = read_json(self.folder / "config.json")
            self.schema = Schema.from_json(read_json(self.folder / "columns.json"))
            for key in CONFIG:
                self.config[key]
        except (OSError, ValueError, KeyError, TypeError) as error:
            lacking = "The folder holds no config.json and columns.json of hesse, which every run has."
            raise InputError(
                "not a run folder",
                str(self.folder),
                lacking if self.folder.is_dir() else "There is no such folder.",
                "Give the folder that hesse train wrote (--out).",
            ) from error

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r}, {self.config['status']})"

    @property
    def evaluation(self) -> dict[str, Any]:
        """The record of the last evaluation; empty before the end of training."""
        path = self.folder / "evaluation.json"
        return read_json(path) if path.exists() else {}

    @property
    def calibration(self) -> dict[str, Any]:
        """Temperature and thresholds of each target that has classes; empty where none were fitted."""
        path = self.folder / "calibration.json"
        return read_json(path) if path.exists() else {}

    @property
    def compared(self) -> dict[str, dict[str, Any]]:
        """The evaluations of the optimisers that were trained beside it, by name."""
        records = sorted(self.folder.glob("compare/*/evaluation.json"))
        return {path.parent.name: read_json(path) for path in records}

    @property
    def findings(self) -> list[dict[str, Any]]:
        """What was noticed in data, derivatives and training, as JSON objects."""
        path = self.folder / "findings.json"
        return read_json(path) if path.exists() else []

    def model(self) -> FusedModel:
        """The trained model: averaged weights of the best epoch, in eval mode.

        Raises:
            InputError: there is none yet, or the file is damaged or of another model.
        """
        path = self.folder / "model.safetensors"
        try:
            weights = load_file(path)
        except FileNotFoundError as error:
            raise InputError(
                "no model",
                str(path),
                "The run has no model: no epoch was completed, or the file was removed.",
                f"Let it finish: {self.config['command']} --resume",
            ) from error
        except (SafetensorError, OSError) as error:
            raise InputError("damaged model", str(path), f"The weights cannot be read: {error}.", ANEW) from error
        with torch.random.fork_rng(devices=[]):  # initial weights are drawn, and overwritten at once
            model = build_model(self.schema, self.config)
        try:
            model.load_state_dict(weights)
        except RuntimeError as error:
            message = "The weights are those of another model than columns.json describes."
            raise InputError("foreign model", str(path), message, ANEW) from error
        return model.eval()

    def predict(
        self,
        table: Any,
        *,
        data_root: str | os.PathLike[str] | None = None,
        delimiter: str | None = None,
        strict: bool = False,
        threshold: float | str | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> pa.Table:
        """Predict the target of each row.

        Rows that cannot be read have empty predictions and are named in a warning. Columns that are absent and
        categories that no training row had count as missing, with a warning too.

        Args:
            table: a path (of a file or a folder of files) or any data frame with the columns that the run was trained
                on (the target may be absent).
            data_root: the folder that paths in cells are relative to; by default the table's own.
            delimiter: of a CSV file, when it cannot be told.
            strict: raise at the first row that cannot be read.
            threshold: from which probability on a row is of the second of two classes, or has a label: a number, or
                "best" for the one with the best F1 on the rows that validated. By default the likelier of two classes
                is predicted, and each label by its own best threshold.
            progress: called with how many rows are done and how many there are.

        Returns:
            A pyarrow table of as many rows as ``table``, in its order: the prediction under the target's name; for
            classes also ``confidence``, the probability of the predicted one, and, up to 20 classes, ``probability
            of CLASS`` each. Probabilities are calibrated. Labels are a list in each cell. Where there are several
            targets, columns are called after them: ``TARGET confidence``.
        """
        import pyarrow as pa

        forecast = self.forecast(
            table, data_root=data_root, delimiter=delimiter, strict=strict, threshold=threshold, progress=progress
        )
        predictions = pa.concat_tables(list(forecast))
        if forecast.failed:
            count = f"{forecast.failed} of {forecast.rows} rows cannot be read, and their predictions are empty"
            warnings.warn(f"{count}. The first: {forecast.failures[0]}", stacklevel=2)
        for finding in forecast.findings:
            warnings.warn(str(finding), stacklevel=2)
        return predictions

    def forecast(
        self,
        table: Any,
        *,
        data_root: str | os.PathLike[str] | None = None,
        delimiter: str | None = None,
        strict: bool = False,
        threshold: float | str | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Forecast:
        """The predictions of a table of any size, chunk by chunk, in the memory that a chunk takes.

        Takes what :meth:`predict` takes. Iterating over what it returns gives pyarrow tables, whose rows are those of
        ``table`` in its order; afterwards ``failures`` and ``findings`` say what was wrong.
        """
        refuse_threshold(self.schema, threshold)
        source = open_source(table, delimiter=delimiter)
        return Forecast(
            self.schema,
            self.model(),
            self.calibration,
            source,
            root=Path(data_root) if data_root is not None else source.folder or Path.cwd(),
            threshold=threshold,
            strict=strict,
            progress=progress,
        )

    def report(self) -> Path:
        """Write ``report.html`` and ``card.md`` from the records, and return the path of the page."""
        from hesse.report import build
        from hesse.training.card import build_card

        build_card(self.folder)
        return build(self.folder)

    def spectrum(
        self,
        *,
        table: Any = None,
        data_root: str | os.PathLike[str] | None = None,
        split: str | None = None,
        rows: int = 512,
        batch_size: int = 512,
        k: int = 5,
        seed: int = 0,
        out: str | os.PathLike[str] | None = None,
        verbose: bool = False,
    ) -> dict[str, Any]:
        """The curvature of the trained model's loss, as ``spectrum.json`` and ``spectrum.html``.

        Of the Gauss-Newton matrix and of the Hessian: the largest eigenvalues, the trace and how the eigenvalues are
        spread; of the Hessian also the most negative one; of the Gauss-Newton matrix also each modality's block.

        Args:
            table: the table of the run; by default where it was when the run was made.
            data_root: the folder that paths in cells are relative to; by default as the run had it.
            split: "train", "valid" or "test"; by default "test", or "valid" if there are no test rows.
            rows: most rows of it, drawn by the seed.
            batch_size: rows at once. If all fit into one batch, its graph is kept and a product costs about one and a
                half gradients instead of three; if not, memory is bounded and the result is the same.
            k: how many of the largest eigenvalues.
            seed: of the rows and of the estimates: the same seed gives the same files.
            out: the folder for both files; by default the run's own.
            verbose: progress on stderr.

        Returns:
            The record. An eigenvalue has its ``value`` and an ``error`` that bounds its distance from an eigenvalue;
            a trace has its ``value`` and a standard error.

        Raises:
            InputError: an argument, the table or the run cannot be used; nothing has been written.
        """
        from hesse.report import build_spectrum
        from hesse.training.screen import Screen
        from hesse.training.spectrum import measure

        record = measure(self, table, data_root, split, rows, batch_size, k, seed, Screen(quiet=not verbose))
        folder = self.folder if out is None else Path(out)
        write_json(folder / "spectrum.json", record)
        build_spectrum(folder)
        return record

    def unlike(self, schema: Schema, rows: int, exactly: bool = False) -> str:
        """In what a table of so many rows is another one than the run was trained on; empty if in nothing.

        Every count and statistic of the columns must be as it was; unless ``exactly``, up to the rounding of other
        threads or machines.
        """
        same = operator.eq if exactly else _alike
        then, now = ([target.name for target in one.targets] for one in (self.schema, schema))
        if then != now:
            return f"the target was '{', '.join(then)}' and is '{', '.join(now)}'"
        if self.config["rows"] != rows:
            return f"it had {self.config['rows']} rows and has {rows}"
        if same(self.schema.to_json(), schema.to_json()):
            return ""
        pairs = zip(self.schema.columns, schema.columns, strict=False)
        changed = [b.name for a, b in pairs if not same(a.to_json(), b.to_json())]
        return f"the columns have changed ({', '.join(changed[:5]) or 'their number'})"


def write_model(folder: Path, weights: dict[str, Tensor]) -> None:
    """Write ``model.safetensors``, atomically."""
    with atomic_path(folder / "model.safetensors") as temporary:
        # As bytes: what the library writes itself fails with errors of its own when the disk is full.
        temporary.write_bytes(save({name: t.contiguous() for name, t in weights.items()}, metadata={"format": "pt"}))


def refuse_used(folder: Path, overwrite: bool) -> None:
    """Raise unless a run may be written into ``folder``: new, empty, with a run to overwrite, or with a failed one."""
    if folder.exists() and not folder.is_dir():
        raise InputError("not a folder", str(folder), "The place for the run is a file.", "Choose another --out.")
    is_run = _is_run(folder)
    if is_run and not overwrite and any((folder / name).exists() for name in WORTH):
        raise InputError(
            "run exists",
            str(folder),
            "There is a run in this folder already.",
            "Go on with it (--resume), replace it (--overwrite), or choose another --out.",
        )
    if folder.is_dir() and not is_run and any(path.name != LOCK for path in folder.iterdir()):
        raise InputError(
            "folder in use",
            str(folder),
            "The folder holds other files, among which a run would get lost.",
            "Choose a new or empty folder with --out.",
        )


def clear(folder: Path) -> None:
    """Remove a run's own files from ``folder``, what a crash left half-written among them, and nothing else."""
    for name in ("compare", "samples"):
        if (folder / name).is_dir():
            shutil.rmtree(folder / name)
    for name in RECORDS:
        for left in folder.glob(f".{name}.*"):
            left.unlink()
        (folder / name).unlink(missing_ok=True)


def _is_run(folder: Path) -> bool:
    """Whether ``config.json`` is hesse's own: other programs keep files of that name, and their models, too."""
    try:
        return "hesse" in read_json(folder / "config.json")
    except (OSError, ValueError, TypeError):
        return False


def _alike(then: Any, now: Any) -> bool:
    """Whether two JSON values are the same, numbers to five digits."""
    if isinstance(then, dict) and isinstance(now, dict):
        return then.keys() == now.keys() and all(_alike(then[key], now[key]) for key in then)
    if isinstance(then, list | tuple) and isinstance(now, list | tuple):
        return len(then) == len(now) and all(map(_alike, then, now))
    if isinstance(then, float) and isinstance(now, float):
        return math.isclose(then, now, rel_tol=1e-5, abs_tol=1e-5)
    return bool(then == now)
