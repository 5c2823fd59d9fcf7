"""A model evaluated without side effects: parameters and buffers exchanged, random generators put back.

``torch.func.functional_call`` does the exchange for a forward pass alone. Activation checkpointing runs the forward
pass again during backward, when the model has its own tensors back; here the exchange lasts as long as the context.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["RandomState", "carrying", "random_state", "set_random_state"]

RandomState = list[tuple[torch.device, Tensor]]


@contextmanager
def carrying(model: nn.Module, params: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> Iterator[None]:
    """``model`` has the tensors ``params`` for its parameters of those names and copies of its buffers.

    Tied parameters are exchanged together. With a ``dtype``, buffers and the parameters not in ``params`` (frozen ones)
    are converted to it.
    """
    own = dict(model.named_parameters())
    exchanged = {id(own[name]): value for name, value in params.items()}
    copies: dict[int, Tensor] = {}
    kept: list[tuple[dict[str, Any], str, Tensor]] = []
    try:
        for module in model.modules():
            parameters: dict[str, Any] = module._parameters  # typed by torch as if only Parameters could be there
            for name, p in parameters.items():
                if p is None:
                    continue
                new = exchanged.get(id(p), p)
                if new is p and dtype is not None and p.is_floating_point():
                    new = copies.setdefault(id(p), p.detach().to(dtype))
                if new is not p:
                    kept.append((parameters, name, p))
                    parameters[name] = new
            for name, b in module._buffers.items():
                if b is not None:
                    kept.append((module._buffers, name, b))
                    if id(b) not in copies:
                        copies[id(b)] = b.to(dtype, copy=True) if dtype and b.is_floating_point() else b.clone()
                    module._buffers[name] = copies[id(b)]
        yield
    finally:
        for tensors, name, value in reversed(kept):
            tensors[name] = value


def random_state(model: nn.Module) -> RandomState:
    """State of every generator that layers of ``model`` can draw from: the CPU's, and those of its devices."""
    devices = {p.device for p in model.parameters() if p.device.type in ("cuda", "xpu", "mps")}
    states = [(torch.device("cpu"), torch.get_rng_state())]
    states += [(d, getattr(torch, d.type).get_rng_state(*_index(d))) for d in sorted(devices, key=str)]
    return states


def set_random_state(states: RandomState) -> None:
    """Put generators back to what :func:`random_state` saw."""
    for device, state in states:
        if device.type == "cpu":
            torch.set_rng_state(state)
        else:
            getattr(torch, device.type).set_rng_state(state, *_index(device))


def _index(device: torch.device) -> tuple[torch.device, ...]:
    return () if device.type == "mps" else (device,)
