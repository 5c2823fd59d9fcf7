"""The coverage table: what hesse's products are, row by row, held against the reference.

A row is right, refused by a sentence that names the culprit (and then right by the fallback that the sentence
names), or wrong; a wrong row is a bug. Where the gradient is that of no function (its differences are not symmetric),
there is no right product, and only a refusal will do.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from covered import difficult, layers, losses, operations, pointwise
from covered.reference import SEED, Reference, directions, relative_error
from covered.subject import Subject, Table
from hesse.curvature import DerivativeError, ggn, hessian

__all__ = ["FAMILIES", "LEFT_OUT", "NAMES", "PAGE", "Cell", "Row", "measure", "page", "subject"]

FAMILIES: dict[str, Table] = {
    "Linear": layers.LINEAR,
    "Convolution": layers.CONVOLUTION,
    "Normalisation": layers.NORM,
    "Recurrent": layers.RECURRENT,
    "Attention": layers.ATTENTION,
    "Embedding": layers.EMBEDDING,
    "Parametrisations": layers.PARAMETRISED,
    "Activations": pointwise.ACTIVATIONS,
    "Dropout, with the same mask in every product": pointwise.DROPOUT,
    "Pooling": pointwise.POOLING,
    "Padding": pointwise.PADDING,
    "Shapes": pointwise.SHAPES,
    "Distances": pointwise.DISTANCES,
    "Losses": losses.LOSSES,
    "Operations: products": operations.PRODUCTS,
    "Operations: element by element": operations.ELEMENTWISE,
    "Operations: reductions": operations.REDUCTIONS,
    "Operations: indices": operations.INDEXING,
    "Operations: linear algebra": operations.LINEAR_ALGEBRA,
    "Operations: Fourier and complex": operations.SPECTRAL,
    "Operations: functional layers": operations.FUNCTIONAL,
    "Custom autograd Functions": difficult.FUNCTIONS,
    "Out of the ordinary": difficult.DIFFICULT,
}

PAGE = Path(__file__).parents[2] / "docs" / "coverage.md"

NAMES = [name for table in FAMILIES.values() for name in table]

LEFT_OUT = {
    "Module, Container, Sequential, ModuleList, ModuleDict, ParameterList, ParameterDict": "they compute nothing",
    "RNNBase, RNNCellBase": "base classes of the recurrent layers",
    "NLLLoss2d": "the deprecated name of NLLLoss",
    "DataParallel": "it copies the model to several GPUs; without one it is the module inside",
}

# The reference is good to about 1e-9; autograd in float64 is better. Differences have an error of their own.
EXACT, DIFFERENCES = 1e-7, 1e-4
# The matrix of second derivatives is symmetric; differences of a field that is no gradient are not, by far more.
ASYMMETRY = 1e-6


class Cell(NamedTuple):
    """One product: ``verdict`` as it is printed, the mode, the error found and the limit it was held to."""

    verdict: str
    mode: str
    error: float
    limit: float

    @property
    def wrong(self) -> bool:
        return self.verdict == "wrong"


class Row(NamedTuple):
    name: str
    hessian: Cell
    ggn: Cell

    def __str__(self) -> str:
        limit = max((c.limit for c in self[1:] if c.mode), default=0.0)
        error = f"< {limit:.0e}".replace("e-0", "e-") if limit else ""
        h, g = self.hessian, self.ggn
        return f"| {self.name} | {h.verdict} | {h.mode} | {g.verdict} | {g.mode} | {error} |"


def subject(name: str) -> Subject:
    """The subject of that row: the same model and batch at every call, in float64."""
    for table in FAMILIES.values():
        if name in table:
            with _float64():
                torch.manual_seed(SEED)
                return table[name]()
    raise KeyError(name)


@contextmanager
def _float64() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def measure(name: str) -> Row:
    """The row of that name."""
    case = subject(name)
    v = directions(sum(p.numel() for p in case.model.parameters() if p.requires_grad))
    right = Reference(case, v)
    return Row(name, _cell(hessian, case, v, right.hessian), _cell(ggn, case, v, right.ggn))


def _cell(make: Callable[..., Any], case: Subject, v: Tensor, right: Tensor) -> Cell:
    limit = case.error or EXACT
    pointless = _asymmetry(v, right) > ASYMMETRY
    try:
        operator = _make(make, case, "auto")
    except DerivativeError as refusal:
        return _fallback(make, case, v, right, f"refused: {_told(refusal)}", pointless)
    except (TypeError, ValueError) as refusal:
        if isinstance(refusal, TypeError) and right.any():  # only a loss without curvature is refused so
            raise
        return Cell(f"refused: {_told(refusal)}", "", 0.0, 0.0)
    error = _error(operator, case, v, right)
    return Cell("wrong" if pointless or not error < limit else "right", operator.mode, error, limit)


def _fallback(
    make: Callable[..., Any], case: Subject, v: Tensor, right: Tensor, sentence: str, pointless: bool
) -> Cell:
    """What the refusal offers instead, where there is anything."""
    if pointless:
        return Cell(sentence, "", 0.0, 0.0)
    try:
        operator = _make(make, case, "differences")
        error = _error(operator, case, v, right)
    except DerivativeError:
        return Cell(sentence, "", 0.0, 0.0)
    return Cell(sentence if error < DIFFERENCES else "wrong", operator.mode, error, DIFFERENCES)


def _make(make: Callable[..., Any], case: Subject, mode: str) -> Any:
    torch.manual_seed(SEED)  # an objective remembers the state of the generators at its first evaluation
    return make(case.model, case.loss_fn, case.batch, mode=mode)


def _error(operator: Any, case: Subject, v: Tensor, right: Tensor) -> float:
    """Of all columns at once and of one alone, for these are two routes."""
    alone = (operator @ v.sum(1))[:, None]
    found, expected = torch.cat([operator @ v, alone], 1), torch.cat([right, right.sum(1, keepdim=True)], 1)
    return relative_error(found, expected, case.model)


def _asymmetry(v: Tensor, product: Tensor) -> float:
    form = v.T @ product
    return float((form - form.T).norm() / form.norm().clamp_min(1e-300))


def _told(refusal: Exception) -> str:
    """The part of the message that names the culprit, fit for a cell of a table."""
    text = re.sub(r"\s+", " ", str(refusal)).replace("|", "\\|")
    return text.partition("first to fail: ")[2].partition(". ")[0] or text.partition(". ")[0]


HEAD = """# What is covered

Hessian and Gauss-Newton products of every layer of `torch.nn` and of {operations} operations, as
`hesse.curvature.hessian(model, loss_fn, batch)` and `hesse.curvature.ggn(model, loss_fn, batch)` give them with the
mode left to them. Each was held against a dense float64 reference that uses no second-derivative code (fourth-order
differences of plain gradients, and of outputs) on a tiny model whose inputs are parameters too; with more than 24
parameters, against six random directions of it.

- **right**: the products agree with the reference, each parameter's part to the relative error in the last column.
- **refused**: `DerivativeError` names the module and the operation. The mode beside it is the fallback that the error
  offers, `mode="differences"`, whose products agree to the error in the last column. No mode beside it: there is none,
  for the gradient is not that of the loss, the loss is no function of the parameters or has no curvature, or torch
  gives no gradient that could be differenced.

No row is wrong: `tests/curvature/test_coverage.py` measures every one, and fails when this page says anything else or a
layer of `torch.nn` is missing. `PYTHONPATH=tests python -m covered` writes it.

Left out:
"""

COLUMNS = "| | Hessian product | mode | Gauss-Newton product | mode | error |"


def page(rows: Mapping[str, Row | str]) -> str:
    """The document."""
    count = sum(len(table) for family, table in FAMILIES.items() if family.startswith("Operations"))
    parts = [HEAD.format(operations=count), *(f"- {names}: {reason}.\n" for names, reason in LEFT_OUT.items())]
    for family, table in FAMILIES.items():
        lines = [f"\n## {family}\n", COLUMNS, "|---|---|---|---|---|---|", *(str(rows[name]) for name in table)]
        parts.append("\n".join(lines) + "\n")
    return "".join(parts)
