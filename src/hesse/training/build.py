"""The model of a run: made from its schema and settings, always here, so that training and prediction cannot differ."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hesse.multimodal import FusedModel, Schema

__all__ = ["build_model"]


def build_model(schema: Schema, settings: Mapping[str, Any]) -> FusedModel:
    """A fresh model, drawn from torch's generator.

    Args:
        schema: of the table.
        settings: of the run, as in ``config.json``.
    """
    return FusedModel(schema.model_settings(), schema.outputs)
