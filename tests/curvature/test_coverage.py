"""docs/coverage.md is what is measured: every row of it here and now, and every layer of torch.nn has one.

After a change that moves a row, or with a new release of torch: ``PYTHONPATH=tests python -m covered`` writes the page
anew; read the difference before it is committed.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from covered.reference import Reference, directions, relative_error
from covered.subject import Subject
from covered.table import LEFT_OUT, NAMES, PAGE, measure, page, subject
from hesse.curvature import ggn, hessian


@functools.cache
def documented() -> dict[str, str]:
    """The rows on the page, by name."""
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("| ") and not line.startswith("| |")]
    return {line.split(" | ")[0].removeprefix("| "): line for line in lines}


@pytest.mark.parametrize("name", NAMES)
def test_row_is_right_and_on_the_page(name: str) -> None:
    row = measure(name)
    for product in (row.hessian, row.ggn):
        assert not product.wrong, f"off by {product.error:.1e}, {product.mode}: {row}"
    assert str(row) == documented().get(name), "the page says otherwise: PYTHONPATH=tests python -m covered"


def test_page_has_these_rows_and_no_other_words() -> None:
    assert PAGE.read_text() == page(documented())


def test_every_layer_of_torch_nn_has_a_row() -> None:
    classes = {name for name, c in vars(nn).items() if inspect.isclass(c) and issubclass(c, nn.Module)}
    rows = {name.partition(",")[0] for name in NAMES}
    left_out = {name for names in LEFT_OUT for name in names.split(", ")}
    assert classes - rows - left_out == set(), "new in torch: give each a row, or a reason to leave it out"
    assert left_out - classes == set() and left_out & rows == set()


CULPRITS = {
    "EmbeddingBag, sum": ["EmbeddingBag", "_embedding_bag_backward"],
    "Hardsigmoid": ["'layer' (Hardsigmoid)", "hardsigmoid_backward"],
    "custom Function, once_differentiable": ["'layer' (Applied)", "OnceCube"],
    "custom Function, saved slope": ["'layer' (Applied)", "StaleSwish"],
    "custom Function, detached copies": ["'layer' (AppliedLinear)", "StaleLinear"],
    "spectral_norm, training": ["'layer.parametrizations.weight.0' (_SpectralNorm)"],
}


@pytest.mark.parametrize("name", CULPRITS)
def test_refusals_name_the_culprit(name: str) -> None:
    assert all(words in documented()[name] for words in ["refused", *CULPRITS[name]]), documented()[name]


# ---- float32 has kernels of its own --------------------------------------------------------------------------------

# A rounding is 6e-8 of its number; sums of tens of them, differentiated twice, stay well below this.
FLOAT32 = 1e-3

IN_FLOAT32 = [
    "Linear", "Bilinear", "Conv1d", "Conv2d", "Conv2d, depthwise", "Conv2d, grouped and dilated", "Conv3d",
    "ConvTranspose2d", "BatchNorm1d, behind a Linear", "BatchNorm2d, behind a Conv2d", "GroupNorm", "InstanceNorm1d",
    "LayerNorm, behind a Linear", "RMSNorm", "RNN, tanh", "GRU", "LSTM", "LSTM, packed", "LSTMCell",
    "MultiheadAttention, fused", "TransformerEncoderLayer", "TransformerEncoderLayer, evaluating",
    "TransformerDecoderLayer", "Embedding", "weight_norm", "weight_norm, Conv2d", "spectral_norm, evaluating",
    "orthogonal, cayley", "GELU", "Softplus", "LogSoftmax", "MaxPool2d", "Upsample, bicubic", "CrossEntropyLoss",
    "BCEWithLogitsLoss", "MSELoss", "HuberLoss", "matmul", "logsumexp", "prod", "solve", "eigh", "fft",
    "scaled_dot_product_attention, causal", "grid_sample, bilinear", "checkpoint, use_reentrant=False",
]  # fmt: skip


def in_float32(case: Subject) -> Subject:
    def lower(x: Tensor) -> Tensor:
        return x.float() if x.is_floating_point() else x

    batch: Any = pytree.tree_map_only(Tensor, lower, case.batch)
    return case._replace(model=case.model.float(), batch=batch)


@pytest.mark.parametrize("name", IN_FLOAT32)
def test_products_in_float32(name: str) -> None:
    case = subject(name)
    v = directions(sum(p.numel() for p in case.model.parameters() if p.requires_grad))
    right = Reference(case, v)
    case = in_float32(case)
    for make, expected in ((hessian, right.hessian), (ggn, right.ggn)):
        found = make(case.model, case.loss_fn, case.batch) @ v.float()
        assert found.dtype == torch.float32
        assert relative_error(found.double(), expected, case.model) < FLOAT32
