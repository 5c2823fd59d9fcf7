"""Training without a folder: a table in memory becomes a model in memory, and no file is written.

It is the main job without its records: no page, no checkpoint, no test rows (who trains in memory tests by himself, by
cross-validation for one). A tenth of the rows still validates, because that is what chooses the epoch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from hesse.finding import InputError
from hesse.multimodal import FusedModel, Schema, Table, encode, make_schema
from hesse.multimodal.table import unused
from hesse.training import call
from hesse.training.balance import is_fitted
from hesse.training.build import build_model, refuse_balance
from hesse.training.calibration import calibrate
from hesse.training.choose import choose_fusion, refuse_fusion
from hesse.training.evaluate import known_targets, outputs
from hesse.training.interrupt import interruptible
from hesse.training.job import make_plan
from hesse.training.loop import epochs, start
from hesse.training.optimizers import make_optimizer, refuse_optimizer
from hesse.training.screen import Screen

__all__ = ["Learned", "learn"]


@dataclass(frozen=True)
class Learned:
    """What training in memory leaves.

    Attributes:
        schema: how a table becomes tensors.
        settings: what the model is built from, besides the schema.
        model: averaged weights of the best epoch, in eval mode.
        calibration: temperatures of the targets with classes, as in ``calibration.json``.
        epochs: how many were trained.
    """

    schema: Schema
    settings: dict[str, Any]
    model: FusedModel
    calibration: dict[str, Any]
    epochs: int


def learn(
    source: Table,
    target: str,
    *,
    columns: Mapping[str, str],
    root: Path,
    settings: Mapping[str, Any],
    screen: Screen | None = None,
) -> Learned:
    """Train a model that predicts ``target`` from the other columns.

    Args:
        source: the table.
        target: the column to predict; all rows have one.
        columns: kinds to use instead of those found, as in :func:`hesse.train`.
        root: the folder that paths in cells are relative to.
        settings: ``optimizer``, ``lr``, ``epochs``, ``seconds``, ``batch_size``, ``seed`` and whatever else
            :func:`hesse.train` takes; absent ones have its defaults. Without ``epochs`` and ``seconds`` up to 40
            epochs, fewer when the validation loss has not improved for 8.
        screen: shows progress.

    Raises:
        InputError: the table or an argument cannot be used, or training diverged in its first epoch.
        KeyboardInterrupt: nothing is kept.

    Example:
        >>> from hesse.multimodal import read_table
        >>> table = read_table(pa.table({"weight": [4.0, 21.5, 3.8, 23.5] * 10, "species": ["cat", "dog"] * 20}))
        >>> learned = learn(table, "species", columns={}, root=Path(), settings={"epochs": 3})
        >>> learned.schema.outputs, learned.epochs, learned.model.training
        (2, 3, False)
    """
    settings = call.DEFAULTS | call.given(**settings)
    refuse_optimizer(settings["optimizer"], settings["lr"], settings["weight_decay"])
    refuse_fusion(settings["fusion"])
    refuse_balance(settings["balance"], settings["optimizer"])
    screen = screen or Screen(quiet=True)
    # A column that says "train" in every row: a tenth of them is set aside to validate, and none to test.
    split = unused("split", source.names)
    marked = Table(
        source.data.append_column(split, pa.array(["train"] * len(source), pa.large_string())), source.name, None
    )
    schema, parts = make_schema(
        marked,
        target,
        split_column=split,
        root=root,
        **call.for_schema({**settings, "columns": columns}),
    )
    refuse_balance(settings["balance"], settings["optimizer"], schema)
    data = encode(schema, marked, root=root, skip_bad_rows=settings["skip_bad_rows"])
    plan = make_plan(settings, schema, data, parts, source.name)
    if settings["fusion"] == "auto":
        settings |= choose_fusion(plan, settings, screen)
    with torch.random.fork_rng(devices=[]), interruptible() as interrupted:
        torch.default_generator.manual_seed(plan.seed)
        model = build_model(schema, settings)
        state = start(model, make_optimizer(settings["optimizer"], model, settings["lr"], settings["weight_decay"]))
        with state.monitor, screen.training(plan, settings["optimizer"]) as bar:

            def stepped(loss: float) -> None:
                bar.step(state, loss)
                if interrupted.is_set():
                    raise KeyboardInterrupt

            for row in epochs(plan, state, stepped):
                bar.epoch(row)
    if not state.best:
        raise InputError(
            "diverged",
            settings["optimizer"],
            "The validation loss was never a number, so there is no model.",
            "Give a lower lr, or use kfac, which finds its own.",
        )
    model.load_state_dict(state.best)
    valid = plan.positions["valid"]
    calibration = calibrate(schema, outputs(model, data, valid), known_targets(data, valid), is_fitted(model))
    return Learned(schema, settings, model.eval(), calibration, state.epoch)
