"""What a run does for a cure of starving modalities, besides its loss: looks at the model, and what the answer needs.

Everything is found from rows that the seed decides, before an epoch and after it, and is kept with the weights, so a
resumed run finds the same. Runs without a cure have none of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from hesse.finding import Finding
from hesse.multimodal import Dataset, Schema
from hesse.multimodal.balance import Cure, Pool, fallback
from hesse.multimodal.balance.cure import Batch
from hesse.training.evaluate import ROWS
from hesse.training.losses import loss_of

__all__ = ["before_epoch", "fallen_back", "fit_answer", "is_fitted"]

MOST_ROWS = 2048  # of a part that are looked at before an epoch
MOST_FITTED = 4096  # of the validation rows that decide the answer's few shares
MOST_NUMBERS = 2**22  # that the modalities' outputs on them may be: classes can be many


def before_epoch(schema: Schema, model: nn.Module, data: Dataset, positions: Mapping[str, Tensor]) -> None:
    """Let the cure look at training and validation rows."""
    if isinstance(model, Cure):
        train, valid = (_batches(data, _some(positions[part])) for part in ("train", "valid"))
        model.begin_epoch(loss_of(schema), train, valid)


def fit_answer(schema: Schema, model: nn.Module, data: Dataset, valid: Tensor) -> None:
    """Find what the answer of these weights needs on the validation rows, at positions ``valid``."""
    if isinstance(model, Cure):
        fits = MOST_NUMBERS // (schema.outputs * (1 + len(model.modalities)))
        model.fit(loss_of(schema), _batches(data, _some(valid, max(ROWS, min(fits, MOST_FITTED)))))


def is_fitted(model: nn.Module) -> bool:
    """Whether the scale of the model's answers comes from validation rows."""
    return isinstance(model, Pool)


def fallen_back(model: nn.Module) -> Finding | None:
    """What to say if one modality answers alone."""
    return fallback(model) if isinstance(model, Pool) else None


def _batches(data: Dataset, positions: Tensor) -> Iterator[Batch]:
    return (data.batch(rows) for rows in positions.split(ROWS))


def _some(positions: Tensor, most: int = MOST_ROWS) -> Tensor:
    """Evenly spaced, since tables are often sorted."""
    return positions[:: -(-len(positions) // most)] if len(positions) else positions
