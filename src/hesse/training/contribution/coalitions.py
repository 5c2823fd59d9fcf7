"""A model with parts of its input hidden: its outputs for every set of modalities, and what the sets say of each one.

The features of a modality depend on it alone, so they are computed once, and each set costs a pass through the fusion
and the head. Seen as a game whose players are the modalities, the score of a set is its worth, and the Shapley value
(Shapley, 1953) the one way of dividing the worth of all that treats equals alike, gives nothing to who adds nothing,
and adds up over games. "Alone" and "without" are two of the terms in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, TypeVar

import torch
from torch import Tensor

from hesse.multimodal import Dataset, FusedModel, Schema
from hesse.training.evaluate import known_targets, mean_score

__all__ = ["Coalitions", "by_class", "hidden", "presence", "shapley"]

MOST_PLAYERS = 5  # of whom all sets are formed: 32
ROOM = 1 << 25  # numbers among the outputs of all sets; more rows than fit are thinned evenly
ROWS = 512  # at once

Set = frozenset[str]
Worth = TypeVar("Worth", float, Tensor)


@dataclass(frozen=True)
class Coalitions:
    """Outputs of a model for sets of its modalities.

    Attributes:
        positions: of the rows in the dataset, [n].
        targets: of the rows, as in ``Dataset.targets``.
        present: bool [n] by modality: what the rows have.
        outputs: [n, outputs] by set: as if the row had those of its modalities that are in the set.
    """

    positions: Tensor
    targets: Any
    present: dict[str, Tensor]
    outputs: dict[Set, Tensor]

    @property
    def everything(self) -> Set:
        return frozenset(self.present)

    @property
    def complete(self) -> bool:
        """Whether every set is there."""
        return len(self.outputs) == 1 << len(self.present)

    def worths(self, worth: Callable[[Tensor], Worth]) -> dict[Set, Worth]:
        """A function of the outputs, by set."""
        return {one: worth(out) for one, out in self.outputs.items()}


@torch.no_grad()
def hidden(model: FusedModel, data: Dataset, positions: Tensor) -> Coalitions:
    """The model's outputs for every set of up to five modalities; of more, for none, each, all but each, and all."""
    keys = tuple(model.encoders)
    sets = _sets(keys)
    outputs: dict[Set, list[Tensor]] = {one: [] for one in sets}
    width = model(**data.batch(positions[:1])[0]).shape[1]
    positions = positions[:: -(-len(positions) * width * len(sets) // ROOM)]
    present: dict[str, list[Tensor]] = {key: [] for key in keys}
    for some in positions.split(ROWS):
        inputs, _ = data.batch(some)
        here = {key: inputs[key][1] for key in keys}
        features = model.features(**inputs)
        for key in keys:
            present[key].append(here[key])
        for one in sets:
            seen = {key: here[key] if key in one else torch.zeros_like(here[key]) for key in keys}
            outputs[one].append(model.fuse(features, seen))
    return Coalitions(
        positions,
        known_targets(data, positions),
        {key: torch.cat(parts) for key, parts in present.items()},
        {one: torch.cat(parts) for one, parts in outputs.items()},
    )


def shapley(worths: Mapping[Set, Worth], players: Sequence[str]) -> dict[str, Worth]:
    """What each player adds to those before it, averaged over all orders; together, worth(all) - worth(none).

    Args:
        worths: of every set of players, numbers or tensors of one shape.
        players: their names.

    References:
        Shapley, A value for n-person games, Contributions to the Theory of Games II, 1953.

    Example:
        A left glove and two right ones; a pair is worth 1:

        >>> def pair(s): return float("left" in s and ("right" in s or "spare" in s))
        >>> gloves = ("left", "right", "spare")
        >>> found = shapley({frozenset(s): pair(s) for n in range(4) for s in combinations(gloves, n)}, gloves)
        >>> {name: round(value, 4) for name, value in found.items()}
        {'left': 0.6667, 'right': 0.1667, 'spare': 0.1667}
    """
    count = len(players)
    values = {}
    for player in players:
        others = [other for other in players if other != player]
        gains = []
        for size in range(count):
            for before in map(frozenset, combinations(others, size)):
                gain = worths[before | {player}] - worths[before]
                gains.append(gain / (count * math.comb(count - 1, size)))
        values[player] = sum(gains[1:], start=gains[0])
    return values


def presence(schema: Schema, found: Coalitions) -> list[dict[str, Any]]:
    """The score by which modalities are there, each on the rows that have all of these, the others hidden."""
    rows = []
    for one, out in found.outputs.items():
        have = torch.ones(len(found.positions), dtype=torch.bool)
        for key in one:
            have &= found.present[key]
        if have.any():
            value = mean_score(schema, out[have], _at(found.targets, have))
            listed = [key for key in found.present if key in one]
            rows.append({"present": listed, "value": value, "n": int(have.sum())})
    return rows


def by_class(schema: Schema, found: Coalitions) -> dict[str, dict[str, float]]:
    """By modality and class of the first target, the Shapley value of the share of that class's rows that is right.

    Weighted by how many rows they have, the classes' values add up to that of the accuracy. Empty for other targets.
    """
    target = schema.targets[0]
    actual = found.targets[0] if isinstance(found.targets, tuple) else found.targets
    if target.task != "classification" or not found.complete:
        return {key: {} for key in found.present}
    right = found.worths(lambda out: (out[:, schema.slices[0]].argmax(1) == actual).double())
    rows = shapley(right, tuple(found.present))
    classes = [(name, actual == code) for code, name in enumerate(target.classes)]
    return {
        key: {name: float(value[here].mean()) for name, here in classes if here.any()} for key, value in rows.items()
    }


def _sets(keys: Sequence[str]) -> list[Set]:
    if len(keys) <= MOST_PLAYERS:
        return [frozenset(s) for size in range(len(keys) + 1) for s in combinations(keys, size)]
    every = frozenset(keys)
    return [frozenset(), *(frozenset((key,)) for key in keys), *(every - {key} for key in keys), every]


def _at(targets: Any, rows: Tensor) -> Any:
    return tuple(each[rows] for each in targets) if isinstance(targets, tuple) else targets[rows]
