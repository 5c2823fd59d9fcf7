"""The rows on which the modalities, each by itself, say the most different things, and are sure of it.

How far distributions are apart is their Jensen-Shannon divergence: the entropy of their mean less the mean of their
entropies. It is large only where each is sure and they contradict each other; two that do not know agree.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hesse.multimodal import Dataset, Schema
from hesse.multimodal.target import Target
from hesse.training.calibration import cuts_of, probabilities, temperature_of
from hesse.training.contribution.coalitions import Coalitions, shapley

__all__ = ["disagreements", "divergence"]

MOST = 12  # rows


def divergence(p: Tensor, here: Tensor) -> Tensor:
    """Jensen-Shannon divergence [n] of several distributions, as a part of the most that so many can have: 0 to 1.

    Args:
        p: probabilities [M, n, classes].
        here: bool [M, n], which count; of one or none it is 0.

    References:
        Lin, Divergence measures based on the Shannon entropy, IEEE Transactions on Information Theory 37, 1991.

    Example:
        Two that are sure and contradict each other, two that agree, two of whom one does not count:

        >>> p = torch.tensor([[[1.0, 0.0], [0.9, 0.1], [1.0, 0.0]], [[0.0, 1.0], [0.9, 0.1], [0.0, 1.0]]])
        >>> divergence(p, torch.tensor([[True, True, True], [True, True, False]]))
        tensor([1., 0., 0.])
    """
    count = here.sum(0)
    weight = here.to(p.dtype) / count.clamp_min(1)
    mean = (weight.unsqueeze(2) * p).sum(0)
    apart = _entropy(mean) - (weight * _entropy(p)).sum(0)
    most = torch.minimum(count, torch.tensor(p.shape[2])).clamp_min(2).log().to(p.dtype)
    return torch.where(count > 1, (apart / most).clamp_min(0), torch.zeros_like(apart))


def disagreements(
    schema: Schema, data: Dataset, found: Coalitions, calibration: dict[str, Any]
) -> list[dict[str, Any]]:
    """The rows of ``disagreements`` in ``evaluation.json``, the furthest apart first, of the first target.

    A quantity's modalities are as far apart as the standard deviation of what they say, in units of the target's.

    Args:
        found: for every set, or at least for each modality alone and for all.
        calibration: the record ``calibration.json``.
    """
    target, columns = schema.targets[0], schema.slices[0]
    keys = tuple(found.present)
    actual = found.targets[0] if isinstance(found.targets, tuple) else found.targets
    own = {one: out[:, columns] for one, out in found.outputs.items()}
    alone = torch.stack([own[frozenset((key,))] for key in keys])
    here = torch.stack([found.present[key] for key in keys])
    known = ~actual[:, 0].isnan() if actual.is_floating_point() else actual >= 0
    if not bool(alone.isfinite().all()):
        return []
    temperature = temperature_of(calibration, target)
    score = torch.where(known, _apart(target, alone, here, temperature), 0.0)
    chosen = [i for i in score.argsort(descending=True, stable=True)[:MOST].tolist() if score[i] > 0]
    parts = _parts(target, found, own, chosen) if found.complete else {}
    rows = []
    for place, i in enumerate(chosen):
        predicted, confidence = _answer(target, own[found.everything][i], calibration)
        by_modality = {}
        for m, key in enumerate(keys):
            if here[m, i]:
                said, sure = _answer(target, alone[m, i], calibration)
                by_modality[key] = {"predicted": said, "confidence": sure}
                if parts:
                    by_modality[key]["shapley"] = float(parts[key][place])
        rows.append(
            {
                "row": int(data.rows[found.positions[i]]),
                "actual": _actual(target, actual[i]),
                "predicted": predicted,
                "confidence": confidence,
                "by_modality": by_modality,
                "score": float(score[i]),
            }
        )
    return rows


def _apart(target: Target, alone: Tensor, here: Tensor, temperature: float) -> Tensor:
    """How far the modalities are apart, [n], from their outputs [M, n, width]."""
    if target.task == "regression":
        count = here.sum(0).clamp_min(1)
        values = torch.where(here, alone[:, :, 0].double(), 0.0)
        mean = values.sum(0) / count
        return torch.where(here, (values - mean).square(), 0.0).sum(0).div(count).sqrt()
    p = torch.stack([probabilities(target.task, out, temperature) for out in alone])
    if target.task == "classification":
        return divergence(p, here)
    labels = torch.stack([p, 1 - p], dim=3)  # each label is a question of its own
    return torch.stack([divergence(one, here) for one in labels.unbind(2)]).mean(0)


def _parts(
    target: Target, found: Coalitions, own: Mapping[frozenset[str], Tensor], rows: list[int]
) -> dict[str, Tensor]:
    """By modality, the Shapley value [rows] of the log-probability of what is predicted; of a quantity, of itself."""
    full = own[found.everything][rows]

    def worth(out: Tensor) -> Tensor:
        out = out[rows].double()
        if target.task == "regression":
            return target.scale * out[:, 0]
        if target.task == "classification":
            return out.log_softmax(1).gather(1, full.argmax(1, keepdim=True))[:, 0]
        sign = torch.where(full > 0, 1.0, -1.0)
        return torch.nn.functional.logsigmoid(sign * out).sum(1)

    return shapley({one: worth(out) for one, out in own.items()}, tuple(found.present))


def _answer(target: Target, out: Tensor, calibration: dict[str, Any]) -> tuple[str | float, float | None]:
    """What outputs [width] say, as predictions do, and how sure they are."""
    if target.task == "regression":
        return target.mean + target.scale * float(out[0]), None
    p = probabilities(target.task, out[None], temperature_of(calibration, target))[0]
    if target.task == "classification":
        best = int(p.argmax())
        return target.classes[best], float(p[best])
    given = p >= cuts_of(target, calibration.get(target.name, {}).get("threshold"))
    return _labels(target, given), float(torch.where(given, p, 1 - p).prod())


def _actual(target: Target, value: Tensor) -> str | float:
    if target.task == "regression":
        return target.mean + target.scale * float(value[0])
    if target.task == "classification":
        return target.classes[int(value)]
    return _labels(target, value > 0)


def _labels(target: Target, given: Tensor) -> str:
    return ", ".join(name for name, yes in zip(target.classes, given.tolist(), strict=True) if yes)


def _entropy(p: Tensor) -> Tensor:
    return -(torch.special.xlogy(p, p)).sum(-1)
