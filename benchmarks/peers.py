"""The same products by other libraries, where they are installed: curvlinops, BackPACK, PyHessian.

    pip install --no-deps curvlinops-for-pytorch backpack-for-pytorch pyhessian einops einconv unfoldNd \\
        linear_operator jaxtyping wadler_lindig

Each function gives calls by name for one model and batch; a peer that is missing or refuses the model gives a reason
in place of a call.
"""

from __future__ import annotations

import contextlib
import importlib
import io
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Call", "calls"]

Call = Callable[[], Any] | str


def calls(model: nn.Module, batch: tuple[Tensor, Tensor], v: Tensor, block: Tensor) -> dict[str, dict[str, Call]]:
    """By product and by peer: what computes it once."""
    found: dict[str, dict[str, Call]] = {}
    for peer, make in {"curvlinops": _curvlinops, "PyHessian": _pyhessian, "BackPACK": _backpack}.items():
        try:
            made = make(model, batch, v, block)
        except ImportError as error:
            made = {"": f"not installed ({error.name})"}
        for product, call in made.items():
            found.setdefault(product, {})[peer] = call if isinstance(call, str) else _or_reason(call)
    return found


def _or_reason(call: Callable[[], Any]) -> Call:
    try:
        call()
    except Exception as error:  # noqa: BLE001 - a peer may refuse in any way; its reason is printed in the table
        return f"refused: {type(error).__name__}"
    return call


def _curvlinops(model: nn.Module, batch: tuple[Tensor, Tensor], v: Tensor, block: Tensor) -> dict[str, Call]:
    library = importlib.import_module("curvlinops")
    params = list(model.parameters())

    def operator(name: str, **options: Any) -> Any:
        kind = getattr(library, name)
        return kind(model, nn.CrossEntropyLoss(), params, [batch], check_deterministic=False, **options)

    def factors() -> Any:
        return operator("KFACLinearOperator", separate_weight_and_bias=False) @ v

    hessian, ggn = operator("HessianLinearOperator"), operator("GGNLinearOperator")
    return {
        "HVP, fresh": lambda: hessian @ v,
        "GGN product": lambda: ggn @ v,
        "32 HVPs, each": lambda: hessian @ block,
        "K-FAC factors": factors,
    }


def _pyhessian(model: nn.Module, batch: tuple[Tensor, Tensor], v: Tensor, block: Tensor) -> dict[str, Call]:
    importlib.import_module("pyhessian")
    kind = importlib.import_module("pyhessian.hessian").hessian
    product = importlib.import_module("pyhessian.utils").hessian_vector_product

    def made() -> Any:
        return kind(model.eval(), nn.CrossEntropyLoss(), data=batch, cuda=False)

    kept = made()
    parts = [x.view_as(p) for x, p in zip(v.split([p.numel() for p in kept.params]), kept.params, strict=True)]

    def eigenvalues() -> int:
        """How many products its power iteration takes to 1e-3."""
        steps = 0
        utils = importlib.import_module("pyhessian.hessian")
        plain = utils.hessian_vector_product

        def counted(*arguments: Any) -> Any:
            nonlocal steps
            steps += 1
            return plain(*arguments)

        utils.hessian_vector_product = counted
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                kept.eigenvalues(maxIter=200, tol=1e-3, top_n=5)
        finally:
            utils.hessian_vector_product = plain
        return steps

    return {
        "HVP, kept": lambda: product(kept.gradsH, kept.params, parts),
        "HVP, set-up": made,
        "top-5 eigenvalues": eigenvalues,
    }


def _backpack(model: nn.Module, batch: tuple[Tensor, Tensor], v: Tensor, block: Tensor) -> dict[str, Call]:
    library = importlib.import_module("backpack")
    extensions = importlib.import_module("backpack.extensions")
    extended = library.extend(_copy(model))
    loss_fn = library.extend(nn.CrossEntropyLoss())

    def diagonal() -> None:
        with library.backpack(extensions.DiagGGNExact()):
            loss_fn(extended(batch[0]), batch[1]).backward()

    return {"exact GGN diagonal": diagonal}


def _copy(model: nn.Module) -> nn.Module:
    """BackPACK's hooks stay on what it extends."""
    import copy

    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            p.grad = None
    return other
