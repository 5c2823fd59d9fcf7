"""The model card: what a model is for, what it learnt from, how good it is and where nobody looked, in Markdown.

After Mitchell et al., Model cards for model reporting (FAT* 2019), with the header that model hubs read. It is made
from a run's records alone, so it can be rebuilt at any time, and says no more than they do.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hesse.files import write_text
from hesse.finding import Finding
from hesse.report.numbers import duration, score_name, value, wilson
from hesse.report.records import Records, read

__all__ = ["build_card"]

MOST_CLASSES = 50  # of a target
MOST_COLUMNS = 200
MOST_FINDINGS = 50
FEW = 10  # test rows of a class: less say little about it
LONGEST = 120  # characters of a cell
TASKS = {"classification": "tabular-classification", "multilabel": "tabular-classification"}
ACTIVE = re.compile(r"[\\`*_\[\]|~<>&$#!]")  # what Markdown or HTML could take for more than a character


def build_card(folder: Path) -> Path:
    """Write ``card.md`` into a run folder, from the run's records, and return its path.

    Raises:
        InputError: the folder is not a run folder, or one of its records is damaged.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    page = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=lambda shown: shown if isinstance(shown, _Raw) else escaped(shown),
    )
    path = Path(folder) / "card.md"
    write_text(path, page.get_template("card.md.j2").render(yaml=_yaml, code=_code, **_view(read(Path(folder)))))
    return path


class _Raw(str):
    """Text that is Markdown already."""


def escaped(text: object) -> str:
    """One line that Markdown shows as it stands, in a table too.

    Example:
        >>> print(escaped("a|b <script>\\n_x_"))
        a\\|b &lt;script&gt; \\_x\\_
    """
    line = " ".join(str(text).split())
    entities = {"<": "&lt;", ">": "&gt;", "&": "&amp;"}
    return ACTIVE.sub(lambda found: entities.get(found[0], "\\" + found[0]), line)


def _yaml(value: Any) -> _Raw:
    """JSON is YAML."""
    return _Raw(json.dumps(value, ensure_ascii=True))


def _code(text: str) -> _Raw:
    """A block that no backticks inside can end."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return _Raw(f"{fence}\n{text}\n{fence}")


def _view(run: Records) -> dict[str, Any]:
    """What the template shows."""
    config, evaluation = run.config, run.evaluation
    part = evaluation.get("part", "test")
    targets = [_target(run, one) for one in run.targets] if evaluation else []
    measured = [(one, evaluation.get("targets", {}).get(one["name"], evaluation)) for one in run.targets]
    results = [
        {"type": TASKS.get(one["task"], "tabular-regression"), "metrics": _scores(found)} for one, found in measured
    ]
    names = sorted({name for result in results for name in result["metrics"]})
    modalities = [
        {
            "name": one["name"],
            "kind": one["kind"],
            **{key: value(found.get(key), run.score) for key in ("alone", "without", "shapley")},
        }
        for one in config["modalities"]
        if (found := evaluation.get("modalities", {}).get(one["key"]))
    ]
    return {
        "config": config,
        "evaluation": evaluation,
        "part": part,
        "score": score_name(run.score),
        "title": f"{config['target']} from {config['table'] or 'a table'}",
        "tags": ["hesse", "pytorch", "tabular", *(["multimodal"] if len(config["modalities"]) > 1 else [])],
        "sentence": _sentence(run),
        "metrics_list": names,
        "results": [result for result in results if result["metrics"]],
        "targets": targets,
        "several": len(targets) > 1,
        "modalities": modalities,
        "data": _data(run),
        "columns": _columns(run),
        "findings": _findings(run),
        "limits": list(_limits(run)),
        "made": _made(run),
    }


def _scores(found: dict[str, Any]) -> dict[str, float]:
    """The measures of a target that are numbers, its score first."""
    scores = {found["score"]: found.get("value")} if "score" in found else {}
    return {name: number for name, number in (scores | found.get("metrics", {})).items() if number is not None}


def _target(run: Records, one: dict[str, Any]) -> dict[str, Any]:
    """One target's measures, as words."""
    found = run.evaluation.get("targets", {}).get(one["name"], run.evaluation)
    n, score = found.get("n", 0), found.get("score", run.score)
    scores = _scores(found)
    low, high = wilson(scores["accuracy"], n) if "accuracy" in scores and n else (0.0, 0.0)
    classes = [
        {"name": _brief(name), "n": row.get("n"), **{key: value(row.get(key)) for key in ("precision", "recall", "f1")}}
        for name, row in found.get("by_class", {}).items()
    ]
    calibration = found.get("calibration") or {}
    return {
        "name": _brief(one["name"]),
        "n": n,
        "metrics": [(score_name(name), value(number, name)) for name, number in scores.items()],
        "interval": f"{value(low, 'accuracy')} to {value(high, 'accuracy')}" if high else "",
        "score": score_name(score),
        "baseline": value(found.get("baseline"), score),
        "usual": "mean" if one["task"] == "regression" else "most frequent answer",
        "classes": classes[:MOST_CLASSES],
        "more": max(0, len(classes) - MOST_CLASSES),
        "calibration": calibration
        and {
            "temperature": value(calibration.get("temperature")),
            "before": value(calibration.get("ece_before")),
            "after": value(calibration.get("ece")),
        },
    }


def _sentence(run: Records) -> str:
    what = [
        _brief(one["name"]) + (" (a number)" if one["task"] == "regression" else f" ({len(one['classes'])} classes)")
        for one in run.targets
    ]
    parts = [
        _brief(one["name"]) + (f" ({one['kind']})" if one["kind"] != one["name"] else "")
        for one in run.config["modalities"]
    ]
    return f"Predicts {_list(what)} of a row from {_list(parts)}. {_any(parts)}"


def _any(parts: list[str]) -> str:
    return "Any of them may be absent in a row." if len(parts) > 1 else "Cells may be empty."


def _data(run: Records) -> str:
    config = run.config
    split = ", ".join(f"{n} {name}" for name, n in config["split"].items())
    by = config.get("split_column")
    how = f"by the column {_brief(by)}" if by else "drawn at random, stratified by class where there are classes"
    rows = "" if config["rows"] is None else f" of {config['rows']} rows"
    return f"{config['table'] or 'A table'}{rows}: {split}; {how}."


def _columns(run: Records) -> list[dict[str, Any]]:
    columns = run.columns.get("columns", [])
    rows = [{**column, "name": _brief(column["name"]), "reason": _brief(column["reason"])} for column in columns]
    if len(rows) > MOST_COLUMNS:
        rest = {"name": f"and {len(rows) - MOST_COLUMNS} more", "reason": "see columns.json"}
        rows = [*rows[:MOST_COLUMNS], {**dict.fromkeys(("kind", "role", "missing", "unique"), ""), **rest}]
    return rows


def _findings(run: Records) -> list[dict[str, str]]:
    shown = [{"severity": f["severity"], "text": str(Finding(**f))} for f in run.findings[:MOST_FINDINGS]]
    left = len(run.findings) - len(shown)
    return shown + ([{"severity": "info", "text": f"{left} more are in findings.json."}] if left else [])


def _limits(run: Records) -> Iterator[str]:
    """What the numbers above do not show."""
    config, evaluation = run.config, run.evaluation
    held = config["split"].get("test", 0)
    if evaluation:
        yield f"It was judged on {evaluation['n']} rows of one table, once, and on nothing else."
    if config.get("split_column") is None and held:
        yield (
            "Test rows were drawn at random among the others: what rows have in common (a speaker, a camera, a day) is "
            "on both sides, and how it does with new ones was not tested. A split column tests that."
        )
    for one in run.targets:
        by_class = evaluation.get("targets", {}).get(one["name"], {}).get("by_class", {})
        few = [f"{_brief(name)} ({row['n']})" for name, row in by_class.items() if row.get("n", 0) < FEW]
        if few:
            more = f" and {len(few) - 10} more" if len(few) > 10 else ""
            yield f"Fewer than {FEW} {evaluation['part']} rows, so little is known: {', '.join(few[:10])}{more}."
        if one["task"] == "classification":
            yield f"A row that is none of the classes of {_brief(one['name'])} is given one of them all the same."
    inputs = [column for column in run.columns.get("columns", []) if column["role"] == "input"]
    kinds = {column["kind"] for column in inputs}
    own = {column["kind"] for column in inputs if "source" not in column["settings"]}  # no pretrained encoder
    if kinds & {"number", "date"}:
        yield "Numbers far outside of those it was trained on are taken for the nearest that is ten deviations away."
    if "category" in kinds:
        yield "A category that it was not trained on counts as missing."
    if own & {"image", "images"}:
        yield "Pictures are shrunk to at most 64 pixels a side: smaller details are not seen."
    if "audio" in own:
        yield "Of a sound the loudest ten seconds at most are heard."
    if "text" in own:
        yield "Of a text the first 256 characters at most are read, as letters: it knows no language."
    yield "Whether it treats groups of people alike was not tested."


def _made(run: Records) -> str:
    config = run.config
    seconds = run.metrics[-1]["seconds"] if run.metrics else None
    parts = [
        f"hesse {config['hesse']}",
        *(f"{name} {config[key]}" for name, key in (("torch", "torch"), ("Python", "python")) if key in config),
        f"optimizer {run.label}",
        *([f"{config['parameters']} parameters"] if config["parameters"] else []),
        *([f"{len(run.metrics)} epochs in {duration(seconds)}"] if seconds is not None else []),
        *([str(config["created"])] if config["created"] else []),
    ]
    return ", ".join(parts) + ". The same again:"


def _list(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _brief(text: object) -> str:
    whole = " ".join(str(text).split())
    return whole if len(whole) <= LONGEST else whole[: LONGEST - 1] + "…"
