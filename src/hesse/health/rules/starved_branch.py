"""One tower learns so fast that another is left without anything to learn from."""

from __future__ import annotations

import math
from statistics import fmean, median, stdev
from typing import Any

from hesse.finding import Finding
from hesse.health.rules.curves import FIRST, PATIENCE
from hesse.health.stats import Record, Stats

__all__ = ["starved_branch"]

LONG = 8  # samples in a row: a tower may well be heard first and the other soon after
SLOWER = 50  # times less moved than the other: no usual choice of learning rates
UNHEARD = "what it gives differs"
FAINTER = 100  # times less told apart than by the other: a weight that many times the usual would have to make up


def starved_branch(stats: Stats) -> list[Finding]:
    """The model answers from one tower, while another has more to say than it has been taught to.

    Lengths of gradients tell it only when the damage is done, so what is compared is what towers know, with one
    another and with their own past: the share of the model's output that each explains, and how well a linear
    probe finds the target in its features (see :mod:`hesse.health.sensors.branches`). A tower is left behind when
    in sample after sample it explains less than a third of what the leading one explains. That alone is no fault: it
    may be noise, or have said all it knows. It is starved if besides

    - its probe is above zero and still rises, though the leader's does not: it learns, too slowly to be heard; or
    - its probe is above zero and below half of the leader's, and its gradient has faded to a third: the leader has
      taken the loss away before it had learnt; or
    - its features hold a part of what the model lacks, more than the leader's do: it is heard too little; or
    - it has moved fifty times less than the leader and its probe, above zero, is below half of the leader's; or
    - its probe is above zero, and what it gives for one example differs from what it gives for another a hundred times
      less than with the leader, as when its input comes in another unit: it cannot be heard, whatever it knows.

    The part of the loss that is left shrinks with the leader's success, and with it what drives the other (Wang, Tran
    and Feiszli, 2020; Peng et al., 2022). Remedy: give it a loss of its own, or batches without the leader. One that
    has its own loss, as in :mod:`hesse.multimodal.balance`, may be slow, but not for want of a gradient.
    """
    records = [record for record in stats.records if len(record.get("branches", {})) > 1]
    if len(records) < FIRST + PATIENCE:
        return []
    recent = records[-PATIENCE:]
    findings = []
    for path in recent[-1]["branches"]:
        leader = max(recent[-1]["branches"], key=lambda other: _mean(recent, other, "share"))
        if leader == path or not all(_number(record, path, "grad") for record in recent):
            continue
        if _number(recent[-1], path, "own"):  # whatever the leader does, it is driven
            continue
        why = _why(records, path, leader)
        if why is not None:
            findings.append(_finding(records, path, leader, why))
    return findings


def _why(records: list[Record], path: str, leader: str) -> str | None:
    """In what way the tower has more to say, if it has."""
    ahead = 0  # samples in a row
    while ahead < len(records) and _behind(records[-1 - ahead], path, leader):
        ahead += 1
    if ahead >= LONG and len(records) >= FIRST + LONG and (times := _fainter(records, path, leader)):
        return f"{UNHEARD} from example to example {times:.0f} times less than what {leader} gives: it cannot be heard"
    half = records[len(records) // 2 :]
    probe = _series(half, path, "probe")
    below = fmean(probe) < _mean(half, leader, "probe") / 2
    if _errors(probe) < 3 or fmean(probe) < 0.03 * _mean(half, leader, "probe"):
        return None
    if below and _slow(records[-1], path, leader):
        return f"its weights have moved more than {SLOWER} times less"
    lacking = _series(half, path, "missing")
    enough = max(2 * _mean(half, leader, "missing"), 0.1 * fmean(probe))
    if ahead >= LONG and len(records) >= FIRST + LONG and _errors(lacking) > 3 and fmean(lacking) > enough:
        return "its features hold a part of what the model still gets wrong"
    rises = _rise(_series(records, path, "probe")) > 3 and _rise(probe) > 1
    if ahead >= PATIENCE and below and rises and _rise(_series(half, leader, "probe")) < 2:
        return "its probe still rises while the other's does not"
    first, now = (median(_series(part, path, "grad")) for part in (records[:FIRST], records[-PATIENCE:]))
    if ahead >= PATIENCE and below and now < first / 3:
        return f"its gradient has faded to {now / first:.0%} of what it was at the start"
    return None


def _fainter(records: list[Record], path: str, leader: str) -> float | None:
    """How many times less the tower tells examples apart than the leader, if it never did and yet knows of the target.

    One that has grown from nothing, as with a last layer that starts at zero, is on its way.
    """
    probe = _series(records, path, "probe")
    if _errors(probe) < 3 or fmean(probe) < 0.03 * _mean(records, leader, "probe"):
        return None
    sizes = [(_number(record, path, "varies"), _number(record, leader, "varies")) for record in records]
    times = [large / small for small, large in sizes if small > 0]
    if len(times) < len(sizes) or min(times) < FAINTER or 3 * times[-1] < median(times[:FIRST]):
        return None
    return times[-1]


def _behind(record: Record, path: str, leader: str) -> bool:
    """Whether a tower explains less than a third of what the leader does, and that is most."""
    share = _number(record, leader, "share")
    return share > 0.6 and _number(record, path, "share") < share / 3


def _finding(records: list[Record], path: str, leader: str, why: str) -> Finding:
    now = records[-PATIENCE:]
    shares = _mean(now, path, "share"), _mean(now, leader, "share")
    probes = _mean(now, path, "probe"), _mean(now, leader, "probe")
    probe = _series(records, path, "probe")
    evidence: dict[str, Any] = {"steps": [record["step"] for record in records], "values": probe}
    for name in (path, leader):
        evidence[name] = {key: _series(records, name, key) for key in ("probe", "share", "grad", "curvature")}
    remedy = (
        f"Give it what {leader} takes away: a loss of its own (a head on its features), batches in which {leader} is "
        "blanked (modality dropout), or training it alone first; where it is fed on another scale or rate, normalise "
        "its inputs and features and raise its learning rate."
    )
    if why.startswith(UNHEARD):
        remedy = (
            "Bring its inputs to mean zero and variance one, as those of the others, or normalise its features before "
            f"they are joined to those of {leader}."
        )
    return Finding(
        "starved_branch",
        path,
        f"It explains {max(shares[0], 0):.0%} of the model's output, {leader} {shares[1]:.0%}; a linear probe finds "
        f"{max(probes[0], 0):.0%} of the target in its features ({probes[1]:.0%} in those of {leader}), and {why}.",
        remedy,
        value=shares[0],
        limit=shares[1] / 3,
        step=now[-1]["step"],
        evidence=evidence,
    )


def _number(record: Record, path: str, key: str) -> float:
    value = record["branches"].get(path, {}).get(key)
    return float(value) if value is not None and math.isfinite(value) else 0.0


def _series(records: list[Record], path: str, key: str) -> list[float]:
    return [_number(record, path, key) for record in records]


def _mean(records: list[Record], path: str, key: str) -> float:
    return fmean(_series(records, path, key))


def _errors(values: list[float]) -> float:
    """By how many standard errors the mean is above zero."""
    error = stdev(values) / math.sqrt(len(values))
    return fmean(values) / error if error else math.inf * fmean(values) if any(values) else 0.0


def _rise(values: list[float]) -> float:
    """By how many standard errors the second half lies above the first."""
    first, second = values[: len(values) // 2], values[len(values) // 2 :]
    error = math.hypot(stdev(first) / math.sqrt(len(first)), stdev(second) / math.sqrt(len(second)))
    return (fmean(second) - fmean(first)) / error if error else 0.0


def _slow(record: Record, path: str, leader: str) -> bool:
    """Whether the tower's layers have moved far less than the leader's, relative to their weights."""
    moved = []
    for name in (path, leader):
        layers = str(record["branches"].get(name, {}).get("layers") or "").split()
        known = [d for layer in layers if (d := record["layers"].get(layer, {}).get("moved")) is not None]
        moved.append(median(known) if known else math.nan)
    return 0 < moved[0] < moved[1] / SLOWER
