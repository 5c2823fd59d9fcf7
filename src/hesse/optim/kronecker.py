"""The shell of optimisers that precondition a matrix of gradients from both sides, many blocks at once.

Parameters are cut into blocks, and blocks of one shape, whosever they are, make one batch: a product, a factorisation
is then called once for a kind of layer. A subclass says what is done with a batch in :meth:`Kronecker.rule`; SOAP is
Adam in its frames, Shampoo divides by the roots of its eigenvalues.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hesse.optim.base import Gradient
from hesse.optim.blocking import Blocks, blocks_of, shared
from hesse.optim.frames import Frame, Turn

__all__ = ["Batch", "Kronecker"]


class Batch:
    """Blocks of one shape from parameters that have taken equally many steps, or one parameter that has no matrix.

    Args:
        grads: of its parameters.
        states: of its parameters; those that are new start here.
        cuts: how each is cut; None for a parameter without a matrix.
    """

    def __init__(self, grads: list[Tensor], states: list[dict[str, Any]], cuts: list[Blocks | None]) -> None:
        self.states, self.cuts = states, cuts
        self.shapes = [grad.shape for grad in grads]
        self.step = int(states[0]["step"])  # on the CPU: nothing waits for it
        first = cuts[0]
        if first is None:
            self.frame, self.grad = None, grads[0]
        else:
            self.frame = Frame.of(states, first)
            blocks = [cut.cut(grad) for cut, grad in zip(cuts, grads, strict=True) if cut is not None]
            self.grad = blocks[0] if len(blocks) == 1 else torch.cat(blocks)

    def moment(self, name: str) -> Tensor:
        """A state shaped as ``grad``, to be changed in place; zero at first."""
        if name not in self.states[0]:
            self.store(name, torch.zeros_like(self.grad))
        return shared(self.states, name)

    def store(self, name: str, blocks: Tensor) -> None:
        """Put each parameter's part [count, ...] into its state."""
        for state, part in zip(self.states, self.split(blocks), strict=True):
            state[name] = part

    def split(self, blocks: Tensor) -> list[Tensor]:
        """The blocks of each parameter."""
        if len(self.cuts) == 1:
            return [blocks]
        return list(blocks.split([cut.count for cut in self.cuts if cut is not None]))

    def paste(self, blocks: Tensor) -> list[Tensor]:
        """A direction [b, m, n] as one of each parameter, in its shape."""
        parts = zip(self.cuts, self.split(blocks), self.shapes, strict=True)
        return [part if cut is None else cut.paste(part, shape) for cut, part, shape in parts]

    def learn(self, frame: Frame, group: dict[str, Any], seen: Tensor | None = None) -> bool:
        """Average the gradient into the factors, if it is time; whether it was.

        Args:
            frame: of the batch.
            group: its settings.
            seen: the gradient in the frame, if it has been computed.
        """
        step, every = self.step, group["statistics"]
        if step > every and step % every:
            return False
        # Every gradient at first; then each stands for those since the last. The weights of all add up to one.
        spans = min(step, every) + max(0, step // every - 1)
        memory = group["factor_beta"] ** (1 if step <= every else every)
        frame.learn(frame.enter(self.grad) if seen is None else seen, max(1 / spans, 1 - memory), group["kl"])
        return True

    def turn(self, frame: Frame, group: dict[str, Any]) -> list[Turn]:
        """Turn the frames that are off, if it is time: each period, and at 1, 2, 4, 8, ... in the first."""
        step, period = self.step, group["period"]
        due = step % period == 0 or (step < period and step & (step - 1) == 0)
        return frame.turn(group["tolerance"]) if due else []


class Kronecker(Gradient):
    """What SOAP and Shampoo share; see there for the settings."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's, with the group's settings checked.

        Raises:
            ValueError: a setting is out of its range.
        """
        given = {**self.defaults, **param_group}
        for name in ("max_dim", "period", "statistics"):
            if not (isinstance(given[name], int) and given[name] >= 1):
                raise ValueError(f"Invalid {name}: {given[name]!r}. It has to be a whole number of at least 1.")
        if not 0.0 <= given["factor_beta"] < 1.0:
            raise ValueError(f"Invalid factor_beta: {given['factor_beta']}. It has to be at least 0 and less than 1.")
        if not 0.0 <= given["tolerance"] <= 1.0:
            raise ValueError(f"Invalid tolerance: {given['tolerance']}. It is a share, between 0 and 1.")
        super().add_param_group(param_group)

    def rule(self, group: dict[str, Any], batches: list[Batch]) -> list[Tensor]:
        """The direction of each batch, shaped as its ``grad``; frames learn and turn here too."""
        raise NotImplementedError

    def directions(
        self, group: dict[str, Any], grads: list[Tensor], states: list[dict[str, Any]], params: list[Tensor]
    ) -> list[Tensor]:
        """Batches of the gradients, :meth:`rule`, and the parts of what it finds; see :class:`Gradient`."""
        cuts = [blocks_of(tuple(grad.shape), group["max_dim"], group["split"]) for grad in grads]
        kinds: dict[tuple[Any, ...], list[int]] = {}
        for i, (grad, state, cut) in enumerate(zip(grads, states, cuts, strict=True)):
            if "step" not in state:
                state["step"] = torch.zeros(())
                if cut is not None:
                    Frame.start(state, cut, grad)
            state["step"] += 1
            kind: tuple[Any, ...] = (
                (i,) if cut is None else (cut.shape, cut.sides, int(state["step"]), grad.dtype, grad.device)
            )
            kinds.setdefault(kind, []).append(i)
        batches = [
            Batch([grads[i] for i in members], [states[i] for i in members], [cuts[i] for i in members])
            for members in kinds.values()
        ]
        found = list(grads)
        for members, batch, direction in zip(kinds.values(), batches, self.rule(group, batches), strict=True):
            for i, part in zip(members, batch.paste(direction), strict=True):
                found[i] = part
        return found
