"""What looks like a fault and is none is said, each only where it is so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from health_runs.records import CHAIN, written
from hesse.health.rules import notes
from hesse.health.stats import Stats

FALLING = [2.0 * 0.9**i for i in range(100)]


def still(stats: Stats, path: str) -> Stats:
    parts = stats.anatomy[path]["params"]
    stats.anatomy[path]["params"] = {name: {**part, "trainable": False} for name, part in parts.items()}
    return stats


def attention() -> Stats:
    stats = written(types={"2": "MultiheadAttention"})
    params = stats.anatomy["2"]["params"]
    stats.anatomy["2"]["params"] = {**params, "in_proj_bias": params["bias"]}
    return stats


SAID: dict[str, tuple[Callable[[Stats], list[str]], Stats, str]] = {
    "convergence": (
        notes.convergence,
        written({path: {"grad_norm": lambda i: 10.0**-i} for path in CHAIN}, told=FALLING),
        "convergence",
    ),
    "tiny units of the loss": (
        notes.units_of_loss,
        written({path: {"grad_norm": 1e-7} for path in CHAIN}, loss=1e-6),
        "small units",
    ),
    "huge units of the loss": (
        notes.units_of_loss,
        written({path: {"grad_norm": 1e5} for path in CHAIN}, loss=1e6),
        "large units",
    ),
    "a zero head": (notes.zero_head, written({"8": {"out_rms": lambda i: 0.1 * i}}), "8 starts at zero"),
    "a sparse embedding": (
        notes.sparse_embeddings,
        written({"0": {"grad_zero": 0.97}}, types={"0": "Embedding"}),
        "97%",
    ),
    "a key bias": (notes.key_bias, attention(), "key bias in 2"),
    "a bias that cancels": (notes.idle_bias, written({"4": {"without": ["bias"]}}), "bias in 4"),
    "frozen": (notes.frozen, still(written(), "2"), "2: frozen"),
    "few dead": (notes.few_dead, written({"1": {"dead": 0.4}}), "40% of the units of 1"),
}


@pytest.mark.parametrize("name", SAID)
def test_said_where_it_is_so(name: str) -> None:
    speak, stats, words = SAID[name]
    assert speak in notes.NOTES
    [note] = speak(stats)
    assert words in note
    assert not any(other(stats) for other in notes.NOTES if other is not speak)


SILENT: dict[str, Any] = {
    "a plain run": written(),
    "nothing yet": written(samples=0),
    "one layer's gradient is gone": written({"0": {"grad_norm": lambda i: 10.0**-i}}, told=FALLING),
    "small gradients of a large loss": written({path: {"grad_norm": 1e-7} for path in CHAIN}),
    "a head that stays at zero": written({"8": {"out_rms": 0.0}}),
    "a linear layer with zeros": written({"0": {"grad_zero": 0.97}}),
    "a weight without a gradient": written({"4": {"without": ["weight"]}}),
    "many dead": written({"1": {"dead": 0.9}}),
}


@pytest.mark.parametrize("name", SILENT)
def test_silent_elsewhere(name: str) -> None:
    assert [note for speak in notes.NOTES for note in speak(SILENT[name])] == []
