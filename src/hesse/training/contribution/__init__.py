"""What each modality brings to a trained model, from several sides; one file a side, and here they are put together.

===================  ===============================================================================================
``alone, without``   the score with all others hidden, and with it alone hidden
``shapley``          the part of the score that it adds, averaged over all orders; also by class and by row
``probe``            the score of a linear model on its encoder's features: what it knows, used or not
``gradient_share``   its part of the gradient of all encoders
``curvature_share``  its part of the curvature of all encoders
``speed``            how far a step moved its encoder's weights, epoch by epoch
===================  ===============================================================================================

The model is not trained again for any of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hesse.files import write_json
from hesse.multimodal import Table
from hesse.training.contribution.coalitions import by_class, hidden, presence, shapley
from hesse.training.contribution.disagreements import disagreements
from hesse.training.contribution.probes import probes
from hesse.training.contribution.samples import copy_samples
from hesse.training.contribution.shares import shares, speeds
from hesse.training.evaluate import mean_score
from hesse.training.loop import Plan, State
from hesse.training.run import Run

__all__ = ["contribute", "contributions"]


def contribute(folder: Path, plan: Plan, state: State, source: Table, root: Path) -> None:
    """Add what each modality brings to ``evaluation.json``, and ``samples/`` of the rows on which they disagree.

    Nothing is done where there is one modality, or no evaluation.

    Args:
        folder: of a run whose model has been evaluated.
        plan, state: of the run.
        source: its table.
        root: the folder that paths in cells are relative to.
    """
    run = Run(folder)
    record = run.evaluation
    if not record or len(plan.schema.modalities) < 2:
        return
    found = contributions(run, plan, state, record)
    copy_samples(folder, plan.schema, source, root, found["disagreements"])
    if source.places is not None:  # some rows of a table that was streamed: they are told as its files count them
        for row in found["disagreements"]:
            row["row"] = int(source.places.row[row["row"]])
    for key, brings in found.pop("modalities").items():
        record["modalities"].setdefault(key, {}).update(brings)
    write_json(folder / "evaluation.json", record | found)


def contributions(run: Run, plan: Plan, state: State, record: dict[str, Any]) -> dict[str, Any]:
    """``modalities``, ``presence`` and ``disagreements`` of the record ``evaluation.json``, from the model on disk."""
    schema, data = plan.schema, plan.data
    model = run.model()
    keys = tuple(schema.modalities)
    sets = hidden(model, data, plan.positions[record["part"]])
    modalities: dict[str, dict[str, Any]] = {key: {} for key in keys}
    if sets.complete:
        worths = sets.worths(lambda out: mean_score(schema, out, sets.targets))
        for key, value in shapley(worths, keys).items():
            modalities[key]["shapley"] = value
        for key, classes in by_class(schema, sets).items():
            modalities[key] |= {"by_class": classes} if classes else {}
    train = plan.positions["train"]
    for key, value in probes(schema, model, data, train, plan.positions[record["part"]]).items():
        modalities[key]["probe"] = value
    for key, both in shares(schema, model, data, train, plan.batch_size, plan.seed).items():
        modalities[key] |= both
    for key, each in speeds(state.monitor.records, state.metrics, keys).items():
        modalities[key]["speed"] = each
    return {
        "modalities": modalities,
        "presence": presence(schema, sets),
        "disagreements": disagreements(schema, data, sets, run.calibration),
    }
