"""Parameters that are spread over processes: as many of a rule's tensors as it needs whole, and the way back.

FSDP2 (``fully_shard``) and tensor parallelism hold a parameter as a ``DTensor``, of which each process has a part. A
preconditioner needs the whole gradient: it is gathered, every process computes the same direction, and takes its part
of it. State that is the same everywhere is kept as a replicated ``DTensor``, so that the distributed checkpoint knows
it for what it is, and mixes with nothing.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor

__all__ = ["is_sharded", "keep", "local", "part_of", "view", "whole"]


def is_sharded(x: Tensor) -> bool:
    """Whether it is a ``DTensor``. Where there is one its module is loaded; where not, loading it would take long."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def whole(x: Tensor) -> Tensor:
    """The full tensor, gathered from all processes; a plain tensor as it is."""
    return x.full_tensor() if is_sharded(x) else x  # type: ignore[attr-defined]


def local(x: Tensor) -> Tensor:
    """The part that this process holds, in the same memory; a plain tensor as it is."""
    return x.to_local() if is_sharded(x) else x  # type: ignore[attr-defined]


def part_of(x: Tensor, like: Tensor) -> Tensor:
    """Of a tensor that all processes have, what this one holds of ``like``; nothing is sent."""
    if not is_sharded(like):
        return x
    return local(replicated(x, like).redistribute(placements=like.placements))  # type: ignore[attr-defined]


def replicated(x: Tensor, like: Tensor) -> Any:
    """A tensor that all processes have, as a ``DTensor`` on the mesh of ``like``."""
    from torch.distributed.tensor import DTensor, Replicate

    mesh = like.device_mesh  # type: ignore[attr-defined]
    return DTensor.from_local(x, mesh, [Replicate()] * mesh.ndim, run_check=False)


def view(state: dict[str, Any], p: Tensor) -> dict[str, Any]:
    """The state of a parameter as plain tensors; of a plain parameter the state itself."""
    return {name: local(x) for name, x in state.items()} if is_sharded(p) else state


def keep(state: dict[str, Any], found: dict[str, Any], p: Tensor) -> None:
    """Put what a rule has left in a :func:`view` back into the state, replicated. Step counters stay plain tensors."""
    if found is state:
        return
    for name in state.keys() - found.keys():
        del state[name]
    for name, x in found.items():
        if x.ndim == 0:
            state[name] = x
        elif name not in state or local(state[name]) is not x:
            state[name] = replicated(x, p)
