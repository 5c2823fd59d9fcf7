"""Curvature statistics of one batch: the forward pass is watched, a sampled gradient sent back, the layer rules asked.

``watch_layers`` notes, for each layer that has a rule, the input and the place in the graph of the output at every
call, so a layer that is called several times in one forward pass (recurrence) adds up. ``statistics`` sends one draw
of the output curvature back through that graph. Parameters that no rule covers get the diagonal of the same sampled
Fisher matrix: for a draw r over the whole batch, E[(J'r)^2] is the diagonal of J' H_L J, since the terms are drawn
independently.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from hesse.curvature.layers import Diagonal, Rule, rule_for, wide
from hesse.curvature.output import OutputCurvature

__all__ = ["Block", "Calls", "find_blocks", "statistics", "watch_layers"]


@dataclass(frozen=True)
class Block:
    """A layer that has a rule: its module, and the full names of its trainable parameters by attribute name."""

    module: nn.Module
    rule: Rule
    names: dict[str, str]


@dataclass
class Calls:
    """What the layers saw in one forward pass: by block, the (input, output edge) of each call."""

    seen: dict[int, list[tuple[Tensor, GradientEdge]]] = field(default_factory=dict)


def find_blocks(model: nn.Module) -> tuple[list[Block], list[str]]:
    """The blocks of ``model`` and the names of the trainable parameters that no block covers.

    A layer keeps its block only if it owns all its parameters alone, all are trainable and its rule knows them all:
    a tied, frozen or parametrised weight belongs to the second list.
    """
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    names = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    blocks: list[Block] = []
    covered: set[str] = set()
    for module in model.modules():
        own = dict(module.named_parameters(recurse=False))
        rule = rule_for(module)
        alone = all(owners[id(p)] == 1 and id(p) in names for p in own.values())
        if rule and alone and "weight" in own and own.keys() <= {"weight", "bias"}:
            block = Block(module, rule, {name: names[id(p)] for name, p in own.items()})
            blocks.append(block)
            covered.update(block.names.values())
    return blocks, [name for name in names.values() if name not in covered]


@contextmanager
def watch_layers(blocks: list[Block]) -> Iterator[Calls]:
    """Note the calls of each block's layer while the context is open."""
    calls = Calls()

    def hook(index: int) -> Any:
        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            if isinstance(output, Tensor) and output.requires_grad:
                # The edge, not the tensor: an activation that works in place would put its own gradient there.
                calls.seen.setdefault(index, []).append((x.detach(), get_gradient_edge(output)))

        return note

    handles = [b.module.register_forward_hook(hook(i), with_kwargs=True) for i, b in enumerate(blocks)]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def statistics(
    blocks: list[Block], calls: Calls, outputs: Tensor, curvature: OutputCurvature, loose: Mapping[str, Tensor]
) -> dict[str, dict[str, Tensor]]:
    """Curvature statistics by parameter, from one sampled backward pass.

    Args:
        blocks, calls: the layers and what :func:`watch_layers` noted.
        outputs: of the same forward pass, with its graph.
        curvature: of the loss at the outputs.
        loose: the parameters that no block covers, by name.

    Returns:
        By name of a weight ``{"factor_a", "factor_g"}``, with ``A (x) G`` approximating the weight's block (its bias
        as last column of A); by name of any other parameter ``{"diagonal"}`` with its shape. A layer that was not
        called is absent.
    """
    draw, weight = curvature.draw()
    edges = [edge for calls_of in calls.seen.values() for _, edge in calls_of]
    wanted: list[Any] = [*edges, *loose.values()]
    if not wanted:
        return {}
    grads = list(torch.autograd.grad(outputs, wanted, draw, retain_graph=True, allow_unused=True))
    found: dict[str, dict[str, Tensor]] = {}
    cursor = iter(grads)
    for index, calls_of in calls.seen.items():
        block = blocks[index]
        parts = [block.rule(block.module, x, g) for (x, _), g in zip(calls_of, cursor, strict=False) if g is not None]
        if parts:
            found.update(_combine(block, parts, weight))
    for (name, p), g in zip(loose.items(), grads[len(edges) :], strict=True):
        found[name] = {"diagonal": weight * wide(torch.zeros_like(p) if g is None else g).square()}
    return found


def _combine(block: Block, parts: list[Any], weight: float) -> dict[str, dict[str, Tensor]]:
    """Add up the calls of one layer. A is a mean over rows and G a sum, so that A (x) G is a sum over rows."""
    if isinstance(parts[0], Diagonal):
        return {
            block.names[own]: {"diagonal": weight * sum(part.squares[own] for part in parts)}
            for own in parts[0].squares
        }
    rows = max(1, sum(part.rows for part in parts))  # an embedding may have looked up nothing but padding
    return {
        block.names["weight"]: {
            "factor_a": sum(part.a for part in parts) / rows,
            "factor_g": sum(part.g for part in parts) * weight,
        }
    }
