"""The model of a run: made from its schema and settings, always here, so that training and prediction cannot differ."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, cast

from torch import Tensor

from hesse.curvature.losses.own import WIDEST
from hesse.finding import InputError
from hesse.multimodal import FusedModel, Schema, encoders
from hesse.multimodal.balance import CURES, Cure, Pool
from hesse.training.losses import loss_of

__all__ = ["build_model", "plain", "refuse_balance", "training_loss"]

CLASSES_ONLY = ("ogm-ge", "pmr")


def refuse_balance(name: str, optimizer: str, schema: Schema | None = None) -> None:
    """Raise :class:`InputError` unless there is such a cure, for the optimizer and the targets of ``schema``."""
    if name not in (*CURES, "none"):
        names = ", ".join(CURES)
        message = f"There is no cure {name!r} for modalities that starve."
        raise InputError("no such cure", "balance", message, f"Choose from {names} and none.", name)
    if schema is None:
        return
    if name in CLASSES_ONLY and [target.task for target in schema.targets] != ["classification"]:
        message = (
            f"{name} compares modalities by the probability of the right class, and needs one target with classes."
        )
        raise InputError("unsuitable cure", "balance", message, "Choose pool, heads, gblend, mmpareto or none.", name)
    if name == "pmr" and optimizer == "kfac" and schema.outputs > WIDEST:
        message = (
            f"pmr with kfac is for up to {WIDEST} classes, for the curvature of an entropy is that of all of them."
        )
        raise InputError("unsuitable cure", "balance", message, "Choose pool, or soap.", schema.outputs)


def build_model(schema: Schema, settings: Mapping[str, Any]) -> FusedModel:
    """A fresh model, drawn from torch's generator; with a cure around it, if the run has one, which answers as it does.

    Args:
        schema: of the table.
        settings: of the run, as in ``config.json``.
    """
    fusion = settings.get("fusion", "concat")  # runs of version 0.1.0 know no other
    answers = [(target.task, target.width) for target in schema.targets]
    model = FusedModel(schema.model_settings(), schema.outputs, fusion, answers, _prior(schema))
    name = settings.get("balance", "none")
    if name == "none" or len(model.encoders) < 2:
        return model
    widths = dict.fromkeys(model.encoders, encoders.FEATURES)
    if name == "pool":
        cure: Cure = Pool(model, schema.outputs, widths, targets=[width for _, width in answers])
    else:
        cure = CURES[name](model, schema.outputs, widths)
    return cast(FusedModel, cure)


def _prior(schema: Schema) -> list[float] | None:
    """The outputs that say of each target what is known without looking; None of a run of version 0.1.0."""
    outputs: list[float] = []
    for target in schema.targets:
        if target.task == "regression":
            outputs.append(0.0)  # the mean, standardised
        elif not target.prior:
            return None
        elif target.task == "multilabel":
            outputs += [math.log(p / (1 - p)) for p in target.prior]
        else:
            outputs += [math.log(p) for p in target.prior]
    return outputs


def plain(model: FusedModel) -> FusedModel:
    """The model inside its cure, if it has one."""
    return cast(FusedModel, model.model) if isinstance(model, Cure) else model


def training_loss(schema: Schema, model: FusedModel) -> Callable[[Tensor, Any], Tensor]:
    """What training lowers: of the model's outputs, or of all those that a cure has while it trains."""
    loss_fn = loss_of(schema)
    return model.loss(loss_fn) if isinstance(model, Cure) else loss_fn
