"""Units that are the same and stay the same: equal weights with equal gradients never part.

A constant initialisation makes a layer of a thousand units worth one. Copied branches make two worth one, and two
layers that are both zero make none: each waits for the other (Goodfellow, Bengio and Courville 2016, section 8.4).
"""

from __future__ import annotations

from hesse.finding import Finding
from hesse.health.rules.curves import PATIENCE, curve, number, weighted
from hesse.health.stats import Record, Stats

__all__ = ["symmetry"]

MOST = 0.5  # of a layer's units have a twin: fewer may be pruned or unused ones


def symmetry(stats: Stats) -> list[Finding]:
    """Units, layers or branches that coincide in weights and gradient, so that training cannot tell them apart.

    Compared are the units of a layer with each other and layers of one shape with each other, for several samples
    in a row; no number decides, since any random initialisation breaks the tie for good. The layer nearest to the
    loss is left out: rows for classes that a batch lacks coincide there until they are seen.
    """
    recent = stats.records[-PATIENCE:]
    if len(recent) < PATIENCE:
        return []
    return _units(stats, recent) or _zeros(stats, recent) or _copies(stats, recent)


def _units(stats: Stats, recent: list[Record]) -> list[Finding]:
    if not any((number(layer, "twins") or 0.0) > MOST for layer in recent[-1]["layers"].values()):
        return []
    trained = [path for path in weighted(stats, recent[-1]) if number(recent[-1]["layers"][path], "grad_norm")]
    twins = [
        path
        for path in trained[:-1]
        if all((number(record["layers"].get(path, {}), "twins") or 0.0) > MOST for record in recent)
    ]
    if not twins:
        return []
    share = recent[-1]["layers"][twins[0]]["twins"]
    more = f" So have those of {len(twins) - 1} more layers." if len(twins) > 1 else ""
    return [
        Finding(
            "symmetry",
            twins[0],
            f"{share:.0%} of its units have a twin with the same weights and the same gradient; they will never "
            f"learn different things.{more}",
            "Give it random initial weights (torch.nn.init.kaiming_normal_, or its own reset_parameters()) instead "
            "of constant or copied ones.",
            severity="error",
            value=share,
            limit=MOST,
            step=recent[-1]["step"],
            evidence={**curve(stats, twins[0], "twins"), "layers": twins},
        )
    ]


def _zeros(stats: Stats, recent: list[Record]) -> list[Finding]:
    """Layers of zeros that get no gradient: what follows them is zero too, or each waits for the other."""
    zero = [
        path
        for path, layer in recent[-1]["layers"].items()
        if layer.get("weight_norm") == 0
        and all(record["layers"].get(path, {}).get("grad_norm") == 0 for record in recent)
    ]
    others = [p for p, layer in recent[-1]["layers"].items() if p not in zero and number(layer, "grad_norm")]
    if not zero or not others:
        return []
    more = f" {', '.join(zero[1:4])} likewise." if len(zero) > 1 else ""
    return [
        Finding(
            "symmetry",
            zero[0],
            f"Its weights are all zero and its gradient is too, so it can never leave zero.{more}",
            "Of two layers in a row only one may start at zero: give this one small random weights.",
            severity="error",
            value=0.0,
            limit="not zero",
            step=recent[-1]["step"],
            evidence={**curve(stats, zero[0], "grad_norm"), "layers": zero},
        )
    ]


def _copies(stats: Stats, recent: list[Record]) -> list[Finding]:
    """Layers of one shape whose weights and gradients have had the same norms, to the last digit, all along."""
    groups: dict[tuple[float, float], list[str]] = {}
    for path, layer in recent[-1]["layers"].items():
        grad, weight = number(layer, "grad_norm"), number(layer, "weight_norm")
        if grad and weight:
            groups.setdefault((grad, weight), []).append(path)
    found = [paths for paths in groups.values() if len(paths) > 1]
    copies = [paths for paths in found if _alike(stats, recent, paths)]
    if not copies:
        return []
    paths = copies[0]
    return [
        Finding(
            "symmetry",
            paths[1],
            f"It has the same weights and the same gradient as {paths[0]}, step by step; the two will never learn "
            "different things.",
            "Copy only what is meant to be shared, and give each branch random initial weights of its own "
            "(reset_parameters() after copy.deepcopy).",
            severity="error",
            value=len(copies),
            limit=0,
            step=recent[-1]["step"],
            evidence={**curve(stats, paths[1], "grad_norm"), "layers": [path for group in copies for path in group]},
        )
    ]


def _alike(stats: Stats, recent: list[Record], paths: list[str]) -> bool:
    """Whether layers have matrices of one shape, and the same norms in every sample."""
    known = weighted(stats, recent[-1])
    shapes = {str([p["shape"] for p in stats.anatomy.get(path, {}).get("params", {}).values()]) for path in paths}
    if len(shapes) > 1 or any(path not in known for path in paths):
        return False
    for record in recent:
        layers = [record["layers"].get(path, {}) for path in paths]
        norms = {(number(layer, "grad_norm"), number(layer, "weight_norm")) for layer in layers}
        if len(norms) > 1 or not all(next(iter(norms))):
            return False
    return True
