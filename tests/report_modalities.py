"""What a run of several modalities records beyond the simplest: contributions, absences, disagreements, targets."""

from __future__ import annotations

import wave
from itertools import chain, combinations
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from hesse.files import read_json, write_json

PART = {"image": 0.45, "audio": 0.27, "text": 0.06}  # of the score, by kind


def deepen(folder: Path, seed: int = 0) -> dict[str, Any]:
    """Add to a run of one class target what training knows of its modalities; returns the evaluation."""
    random = np.random.default_rng(seed)
    config, record = read_json(folder / "config.json"), read_json(folder / "evaluation.json")
    modalities, classes = config["modalities"], config["classes"] or ["cheap", "dear"]
    added = {each["key"]: PART.get(each["kind"], 0.05) for each in modalities}
    nothing = record["value"] - sum(added.values())
    keys = list(added)
    record["modalities"] = {
        key: {
            "alone": nothing + 1.3 * added[key],
            "without": record["value"] - 0.7 * added[key],
            "shapley": added[key],
            "probe": nothing + 1.4 * added[key],
            "gradient_share": added[key] / sum(added.values()),
            "curvature_share": 1 / len(keys),
            "speed": (added[key] * np.exp(-np.arange(6) / 2)).tolist(),
            "by_class": {name: float(added[key] + random.normal(0, 0.1)) for name in classes},
        }
        for key in keys
    }
    some = chain.from_iterable(combinations(keys, count) for count in range(1, len(keys) + 1))
    record["presence"] = [
        {"present": list(each), "value": nothing + sum(added[key] for key in each), "n": 180 - 3 * len(each)}
        for each in some
    ]
    (folder / "samples").mkdir(exist_ok=True)
    record["disagreements"] = [
        {
            "row": 16 + i,
            "actual": classes[i % len(classes)],
            "predicted": classes[(i + i % 2) % len(classes)],
            "confidence": 0.51 + 0.03 * i,
            "by_modality": {
                key: {"predicted": classes[(i + j) % len(classes)], "confidence": 0.9 - 0.1 * j}
                for j, key in enumerate(keys)
            },
            "score": 1.5 - 0.1 * i,
            "samples": {each["key"]: sample(folder, each["kind"], i, random) for each in modalities},
        }
        for i in range(4)
    ]
    write_json(folder / "evaluation.json", record)
    return record


def sample(folder: Path, kind: str, i: int, random: np.random.Generator) -> dict[str, Any]:
    """A small file in ``samples``, or a text."""
    if kind == "image":
        path = folder / "samples" / f"{i}.png"
        Image.fromarray(random.integers(0, 255, (16, 16, 3)).astype(np.uint8)).save(path)
    elif kind == "audio":
        path = folder / "samples" / f"{i}.wav"
        with wave.open(str(path), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(8000)
            file.writeframes((8000 * np.sin(np.arange(4000) * (0.1 + 0.05 * i))).astype("<i2").tobytes())
    else:
        return {"kind": kind, "text": f"vierundzwanzig {i}, مرحبا 🦊"}
    return {"kind": kind, "file": f"samples/{path.name}"}


def calibration(temperature: float = 1.6) -> dict[str, Any]:
    """Of a model that is too sure of itself before, and honest after."""
    sure = np.linspace(0.15, 0.95, 9)
    return {
        "temperature": temperature,
        "ece_before": 0.092,
        "ece": 0.021,
        "log_loss_before": 0.412,
        "log_loss": 0.355,
        "bins_before": [{"confidence": c, "accuracy": c - 0.1, "n": 5 + 3 * i} for i, c in enumerate(sure.tolist())],
        "bins": [{"confidence": c, "accuracy": c, "n": 5 + 3 * i} for i, c in enumerate(sure.tolist())],
    }


def several_targets(folder: Path, seed: int = 0) -> dict[str, Any]:
    """Turn a run of one target into one of classes, labels, a quantity and two classes; returns the evaluation."""
    random = np.random.default_rng(seed)
    config, record = read_json(folder / "config.json"), read_json(folder / "evaluation.json")
    classes = config["classes"]
    tags = ["shiny", "grün", "<b>bold</b>"]
    targets = [
        {"name": config["target"], "task": "classification", "classes": classes},
        {"name": "tags", "task": "multilabel", "classes": tags},
        {"name": "price in €", "task": "regression", "classes": []},
        {"name": "sold", "task": "classification", "classes": ["no", "yes"]},
    ]
    write_json(
        folder / "config.json", config | {"targets": targets, "target": ", ".join(each["name"] for each in targets)}
    )
    matrix = record.pop("confusion")
    truth = random.gamma(4.0, 30_000.0, size=180)
    base = {"value": 0.8, "loss": 0.4, "baseline": 0.5, "n": 180}
    record["targets"] = {
        config["target"]: {
            **base,
            "task": "classification",
            "score": "accuracy",
            "metrics": {"accuracy": 0.8, "balanced_accuracy": 0.79, "f1_macro": 0.78, "log_loss": 0.41},
            "classes": classes,
            "confusion": matrix,
            "calibration": calibration(),
        },
        "tags": {
            **base,
            "task": "multilabel",
            "score": "f1_macro",
            "metrics": {"f1_macro": 0.8, "exact_match": 0.61, "hamming_loss": 0.09, "house points": 12.0},
            "classes": tags,
            "by_class": {
                tag: {"precision": 0.9 - 0.1 * i, "recall": 0.7, "f1": 0.75, "n": 40 - i} for i, tag in enumerate(tags)
            },
            "threshold": dict(zip(tags, (0.5, 0.37, 0.21), strict=True)),
        },
        "price in €": {
            **base,
            "task": "regression",
            "score": "r2",
            "baseline": 0.0,
            "metrics": {"r2": 0.8, "mae": 8123.4, "rmse": 15020.6},
            "actual": truth.tolist(),
            "predicted": (truth * random.lognormal(0, 0.12, 180)).tolist(),
        },
        "sold": {
            **base,
            "task": "classification",
            "score": "accuracy",
            "metrics": {"roc_auc": 0.91},
            "confusion": [[80, 20], [16, 64]],
            "threshold": 0.42,
            "calibration": calibration(0.7),
        },
    }
    record |= {"score": "mean score", "value": 0.8, "baseline": 0.4}
    write_json(folder / "evaluation.json", record)
    return record
