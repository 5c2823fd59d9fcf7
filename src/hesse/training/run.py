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
evaluation.json      score on held-out rows, by class and by modality
compare/NAME/        the same for an optimiser trained beside it
report.html          the page
===================  ==============================================================================
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hesse.files import atomic_path, read_json
from hesse.finding import InputError
from hesse.multimodal import FusedModel, Schema, encode, read_table
from hesse.training.evaluate import outputs

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["Run"]

RECORDS = (
    "config.json",
    "columns.json",
    "model.safetensors",
    "checkpoint.pt",
    "metrics.jsonl",
    "steps.jsonl",
    "layers.jsonl",
    "findings.json",
    "evaluation.json",
    "report.html",
)
MOST_PROBABILITIES = 20  # columns of a prediction


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
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                "not a run folder",
                str(self.folder),
                "The folder holds no readable config.json and columns.json, which every run has.",
                "Give the folder that hesse train named with --out.",
            ) from error

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r}, {self.config['status']})"

    @property
    def evaluation(self) -> dict[str, Any]:
        """The record of the last evaluation; empty before the end of training."""
        path = self.folder / "evaluation.json"
        return read_json(path) if path.exists() else {}

    @property
    def findings(self) -> list[dict[str, Any]]:
        """What was noticed in data, derivatives and training, as JSON objects."""
        path = self.folder / "findings.json"
        return read_json(path) if path.exists() else []

    def model(self) -> nn.Module:
        """The trained model: averaged weights of the best epoch, in eval mode."""
        path = self.folder / "model.safetensors"
        model = FusedModel(self.schema.model_settings(), self.schema.outputs)
        try:
            model.load_state_dict(load_file(path))
        except FileNotFoundError as error:
            raise InputError(
                "no model", str(path), "The run has no model yet.", "Let it finish an epoch: hesse train --resume."
            ) from error
        except (SafetensorError, RuntimeError) as error:
            raise InputError(
                "damaged model", str(path), f"The weights cannot be read: {error}.", "Train the run anew."
            ) from error
        return model.eval()

    def predict(
        self,
        table: Any,
        *,
        data_root: str | os.PathLike[str] | None = None,
        delimiter: str | None = None,
        skip_bad_rows: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> pa.Table:
        """Predict the target of each row.

        Args:
            table: a path or any data frame with the columns that the run was trained on (the target may be absent).
            data_root: the folder that paths in cells are relative to; by default the table's own.
            delimiter: of a CSV file, when it cannot be told.
            skip_bad_rows: leave the prediction of unreadable rows empty instead of raising.
            progress: called with how many files are decoded and how many there are.

        Returns:
            A pyarrow table of as many rows as ``table``, in its order: the prediction under the target's name; for
            classes also ``confidence``, the probability of the predicted one, and, up to 20 classes, ``probability
            of CLASS`` each.
        """
        import pyarrow as pa

        source = read_table(table, delimiter=delimiter)
        root = Path(data_root) if data_root is not None else source.folder or Path.cwd()
        data = encode(self.schema, source, root=root, skip_bad_rows=skip_bad_rows, with_target=False, progress=progress)
        out = outputs(self.model().eval(), data, torch.arange(len(data)))
        rows = data.rows.tolist()

        def whole(values: list[Any]) -> list[Any]:
            column: list[Any] = [None] * len(source)
            for row, value in zip(rows, values, strict=True):
                column[row] = value
            return column

        target = self.config["target"]
        if self.schema.task == "regression":
            return pa.table({target: whole((self.schema.mean + self.schema.scale * out[:, 0].double()).tolist())})
        probability = out.double().softmax(1)
        best = probability.max(1)
        columns = {
            target: whole([self.schema.classes[i] for i in best.indices.tolist()]),
            "confidence": whole(best.values.tolist()),
        }
        if len(self.schema.classes) <= MOST_PROBABILITIES:
            for i, name in enumerate(self.schema.classes):
                columns[f"probability of {name}"] = whole(probability[:, i].tolist())
        return pa.table(columns)

    def report(self) -> Path:
        """Write ``report.html`` from the records, and return its path."""
        from hesse.report import build

        return build(self.folder)


def write_model(folder: Path, weights: dict[str, Tensor]) -> None:
    """Write ``model.safetensors``, atomically."""
    with atomic_path(folder / "model.safetensors") as temporary:
        save_file({name: t.contiguous() for name, t in weights.items()}, temporary, metadata={"format": "pt"})


def clear(folder: Path) -> None:
    """Remove a run's own files from ``folder``, and nothing else."""
    for name in RECORDS:
        (folder / name).unlink(missing_ok=True)
    if (folder / "compare").is_dir():
        shutil.rmtree(folder / "compare")
