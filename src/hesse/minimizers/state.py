"""Everything a solve remembers between two steps, as one value that can be saved and gone on from."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from hesse.files import atomic_path
from hesse.minimizers.functions.border import Border, described
from hesse.minimizers.functions.foreign import ForeignBorder, language
from hesse.minimizers.result import Row, Trace
from hesse.tree import Layout, Params

__all__ = ["State"]


@dataclass
class State:
    """Where a solve stands: ``hesse.minimize(fun, state)`` takes the steps that it would have taken.

    Args:
        method: name of the method.
        border: the kind of x.
        memory: flat tensors by name: ``x`` [n], the value at the start, and what the method keeps (a radius, pairs of
            steps and changes of the gradient).
        trace: the rows so far, from which evaluations are counted on.
    """

    method: str
    border: Border
    memory: Params
    trace: Trace = field(default_factory=Trace)

    @property
    def x(self) -> Any:
        """x, of the kind that the solve was started with."""
        return self.border.outside(self.memory["x"])

    def copy(self, method: str) -> State:
        """The same for a solve that goes on from here, so that this one can be gone on from again."""
        return State(method, self.border, dict(self.memory), Trace(list(self.trace.rows)))

    def save(self, path: str | Path) -> None:
        """Write the state as one safetensors file, whole or not at all.

        Raises:
            ModuleNotFoundError: safetensors is not installed.
        """
        safetensors = _safetensors()
        rows = torch.tensor([list(row) for row in self.trace], dtype=torch.float64).reshape(-1, len(Row._fields))
        tensors = {name: value.contiguous() for name, value in self.memory.items()}
        about = {"hesse": "minimize", "method": self.method, "x": json.dumps(self.border.describe())}
        with atomic_path(Path(path)) as part:
            safetensors.torch.save_file({**tensors, "trace": rows}, part, metadata=about)

    @classmethod
    def load(cls, path: str | Path) -> State:
        """The state that :meth:`save` wrote.

        Raises:
            ValueError: the file is not one of a solve.
        """
        safetensors = _safetensors()
        try:
            with safetensors.safe_open(str(path), framework="pt") as file:
                about = file.metadata() or {}
                memory = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except safetensors.SafetensorError as error:
            raise ValueError(f"{path} is not a safetensors file, or is cut off: {error}.") from error
        if (
            about.get("hesse") != "minimize"
            or not {"method", "x"} <= about.keys()
            or not {"x", "trace"} <= memory.keys()
        ):
            raise ValueError(f"{path} is not the state of a solve: it was not written by State.save().")
        rows = [_row(values) for values in memory.pop("trace").tolist()]
        kind = json.loads(about["x"])
        if kind["kind"] in ("jax", "tensorflow"):
            layout = Layout({name: torch.Size(shape) for name, shape in kind["shapes"].items()})
            border: Border = ForeignBorder(memory["x"], language(kind["kind"]), layout)
        else:
            border = described(kind, memory["x"])
        return cls(about["method"], border, memory, Trace(rows))


def _row(values: list[float]) -> Row:
    whole = ("step", "nfev", "njev", "nhev", "nhvp")
    named = dict(zip(Row._fields, values, strict=True))
    return Row(**{name: int(v) if name in whole else v for name, v in named.items()})  # type: ignore[arg-type]


def _safetensors() -> ModuleType:
    try:
        import safetensors.torch
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "a state is a safetensors file. Install it with: pip install 'hesse[minimize]'", name=error.name
        ) from error
    return safetensors


def scalar(value: float) -> Tensor:
    """A number as a state keeps it."""
    return torch.tensor(value, dtype=torch.float64)
