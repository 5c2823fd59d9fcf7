"""What every optimiser of ours owes torch, in one place.

torch's ``load_state_dict`` casts every state tensor to the dtype of its parameter: float32 factors of a bfloat16
model would come back rounded to eight bits, and a resumed run would differ. ``Base`` gives the tensors back as they
were saved.
"""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["Base"]


class Base(torch.optim.Optimizer):
    """A torch optimiser whose state, a flat dict of tensors for each parameter, survives a reload in its own dtype."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, with every state tensor in the dtype it was saved in, on the device of its parameter."""
        super().load_state_dict(state_dict)
        params = [p for group in self.param_groups for p in group["params"]]
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        for p, index in zip(params, saved, strict=True):
            for name, value in state_dict["state"].get(index, {}).items():
                if isinstance(value, torch.Tensor) and value.dtype != self.state[p][name].dtype:
                    self.state[p][name] = value.detach().clone().to(p.device)
