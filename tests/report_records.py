"""Run folders for the tests of the report: the records of a plausible run, without training one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from hesse.files import write_json, write_lines
from hesse.finding import Finding

CLASSES = tuple("0123456789")
MODALITIES = (("image", "photo"), ("audio", "voice"), ("text", "word"))

DECAY = {"kfac": 6.0, "adamw": 14.0}  # epochs (of 30) in which the error falls by e


def make_run(
    folder: Path,
    task: str = "classification",
    *,
    classes: tuple[str, ...] = CLASSES,
    target: str = "digit",
    modalities: tuple[tuple[str, str], ...] = MODALITIES,
    layers: tuple[str, ...] | None = None,
    epochs: int = 30,
    compare: tuple[str, ...] = ("adamw",),
    findings: list[Finding] | None = None,
    status: str = "finished",
    seed: int = 0,
) -> Path:
    """Write the records of one run, and of those beside it, into ``folder``; returns it."""
    random = np.random.default_rng(seed)
    write_run(folder, "kfac", task, classes, target, modalities, epochs, status, random)
    for name in compare:
        write_run(folder / "compare" / name, name, task, classes, target, modalities, epochs * 2, status, random)
    write_lines(folder / "steps.jsonl", steps(random, epochs * 8))
    write_lines(folder / "layers.jsonl", layer_rows(random, epochs * 8, layers or layer_names(modalities)))
    write_json(folder / "columns.json", {"columns": columns(modalities, target, task, len(classes))})
    write_json(folder / "findings.json", [f.to_dict() for f in (planted() if findings is None else findings)])
    return folder


def write_run(
    folder: Path,
    optimizer: str,
    task: str,
    classes: tuple[str, ...],
    target: str,
    modalities: tuple[tuple[str, str], ...],
    epochs: int,
    status: str,
    random: np.random.Generator,
) -> None:
    keys = [{"key": f"{kind}_{name}", "name": name, "kind": kind} for kind, name in modalities]
    score = "accuracy" if task == "classification" else "r2"
    seconds = 24.0
    write_json(
        folder / "config.json",
        {
            "hesse": "0.1.0",
            "torch": "2.13.0+cpu",
            "python": "3.11.2",
            "created": "2026-11-21T22:04:05",
            "command": f"hesse train digits.csv --target {target} --optimizer {optimizer} --seed 0",
            "python_call": f'hesse.train("digits.csv", target={target!r}, optimizer={optimizer!r}, seed=0)',
            "table": "digits.csv",
            "rows": 1797,
            "target": target,
            "task": task,
            "classes": list(classes) if task == "classification" else [],
            "optimizer": optimizer,
            "lr": None if optimizer == "kfac" else 0.001,
            "epochs": epochs,
            "seconds": None,
            "batch_size": 256,
            "seed": 0,
            "split": {"train": 1437, "valid": 180, "test": 180},
            "modalities": [*keys, {"key": "columns", "name": "columns", "kind": "columns"}][
                : len(keys) + (task != "classification")
            ],
            "parameters": 123_456,
            "status": status,
            "notes": [
                "The three modalities share only their class: a row's picture, word and sound have different origins."
            ],
        },
    )
    best, rows = -1.0, []
    for epoch in range(1, epochs + 1):
        error = np.exp(-epoch / DECAY.get(optimizer, 10.0))
        value = float(0.91 - 0.78 * error + random.normal(0, 0.006))
        rows.append(
            {
                "epoch": epoch,
                "step": 8 * epoch,
                "seconds": seconds * epoch / epochs,
                "train_loss": float(2.2 * error + 0.09),
                "valid_loss": float(2.1 * error + 0.32 + 0.002 * epoch + random.normal(0, 0.01)),
                "valid_score": value,
                "score": score,
                "best": value > best,
            }
        )
        best = max(best, value)
    write_lines(folder / "metrics.jsonl", rows)
    write_json(folder / "evaluation.json", evaluation(task, classes, keys, rows[-1]["valid_score"], random))


def evaluation(
    task: str, classes: tuple[str, ...], keys: list[dict[str, str]], value: float, random: np.random.Generator
) -> dict[str, Any]:
    n = 180
    record: dict[str, Any] = {
        "part": "test",
        "score": "accuracy",
        "value": value,
        "loss": 0.34,
        "n": n,
        "baseline": 1 / len(classes),
        "confusion": [],
        "actual": [],
        "predicted": [],
        "modalities": {
            key["key"]: {
                "alone": float(random.uniform(0.62, 0.75)),
                "without": float(random.uniform(0.8, 0.88)),
            }
            for key in keys
        },
    }
    if task == "classification":
        k = len(classes)
        matrix = np.zeros((k, k), dtype=int)
        actual = random.integers(k, size=n)
        predicted = np.where(random.random(n) < value, actual, random.integers(k, size=n))
        np.add.at(matrix, (actual, predicted), 1)
        return record | {"confusion": matrix.tolist(), "value": float(np.trace(matrix) / n)}
    truth = random.gamma(4.0, 30_000.0, size=n)
    return record | {
        "score": "r2",
        "baseline": 0.0,
        "actual": truth.tolist(),
        "predicted": (truth * random.lognormal(0, 0.12, n)).tolist(),
    }


def layer_names(modalities: tuple[tuple[str, str], ...]) -> tuple[str, ...]:
    names = [f"encoders.{kind}_{name}.{layer}" for kind, name in modalities for layer in LAYERS[kind]]
    return (*names, "head.0", "head.2")


LAYERS = {
    "image": ("conv1", "conv2", "conv3", "linear"),
    "audio": ("conv1", "conv2", "conv3", "norm", "linear"),
    "text": ("embedding", "conv1", "conv2", "norm", "linear"),
    "columns": ("numbers", "embedding", "linear"),
}


def layer_rows(random: np.random.Generator, count: int, names: tuple[str, ...]) -> list[dict[str, Any]]:
    rows = []
    size = random.normal(-2.5, 0.4, len(names))
    for step in range(1, count + 1, 2):
        progress = step / count
        seen = {}
        for i, name in enumerate(names):
            starved = -4.0 * progress if name.endswith("embedding") else 0.0
            grad = 10 ** (size[i] - progress + starved + random.normal(0, 0.12))
            seen[name] = {
                "grad_norm": 0.0 if name.endswith("embedding") and progress > 0.93 else 8.0 * grad,
                "weight_norm": 8.0,
                "update_ratio": float(10 ** (-1.6 - 1.4 * progress + 0.3 * size[i] + random.normal(0, 0.1))),
                "dead": 0.1,
            }
        rows.append({"step": step, "loss": 2.2 * np.exp(-3 * progress), "layers": seen})
    return rows


def steps(random: np.random.Generator, count: int) -> list[dict[str, Any]]:
    rows, rejections = [], 0
    damping = 0.5
    for step in range(1, count + 1):
        rejected = step in (4, 61)
        rejections += rejected
        damping *= 4.0 if rejected else 0.97
        rows.append(
            {
                "step": step,
                "seconds": 24.0 * step / count,
                "loss": float(2.2 * np.exp(-3 * step / count) + abs(random.normal(0, 0.05))),
                "damping": damping,
                "lr": float(0.3 + 0.1 * random.normal()) if step > 1 else 0.05,
                "momentum": float(0.85 + 0.03 * random.normal()),
                "rejections": rejections,
                "trust_ratio": float(random.normal(0.9, 0.2)) if step % 5 == 0 else None,
            }
        )
    return rows


def columns(modalities: tuple[tuple[str, str], ...], target: str, task: str, classes: int) -> list[dict[str, Any]]:
    examples = {
        "image": "media/0001.png",
        "audio": "media/0001.wav",
        "text": "vierundzwanzig",
        "columns": "3",
    }
    rows = [
        {
            "name": name,
            "kind": kind,
            "role": "input",
            "reason": f"all 100 values looked at can be read as {kind}",
            "missing": 12 * i,
            "unique": 1797 - i,
            "example": examples[kind],
        }
        for i, (kind, name) in enumerate(modalities)
    ]
    kind = "category" if task == "classification" else "number"
    return [
        *rows,
        {
            "name": target,
            "kind": kind,
            "role": "target",
            "reason": f"{classes} different values",
            "missing": 0,
            "unique": classes,
            "example": "7",
        },
        {
            "name": "id",
            "kind": "number",
            "role": "ignored",
            "reason": "every value is different",
            "missing": 0,
            "unique": 1797,
            "example": "1",
        },
    ]


def planted() -> list[Finding]:
    return [
        Finding(
            "dead units",
            "encoders.audio_voice.conv2",
            "12 of 32 units gave zero on every row of 5 batches in a row.",
            "Lower the learning rate, or use a leaky activation.",
            severity="info",
            value=0.375,
            limit=0.25,
            step=120,
        ),
        Finding(
            "vanishing",
            "encoders.text_word.embedding",
            "The gradient fell to 3e-7 of the weight while the layers above kept 2e-3.",
            "Weigh the text up, or train its encoder alone for the first epochs.",
            value=3.1e-7,
            limit=1e-6,
            step=214,
        ),
        Finding(
            "unreadable image",
            "digits.csv, row 212, column photo",
            "media/0212.png ends after 311 bytes.",
            "Replace the file. Its row was skipped, as --skip-bad-rows allows.",
            severity="error",
            value="media/0212.png",
        ),
    ]
