"""Kinds: a wrong vector-Jacobian product is called by its kind, whatever its size and number format."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hesse.check.differences import Probe, Slope, own_scales
from hesse.check.naming.elements import measure, sample
from hesse.check.naming.kinds import ORDER, Case, Kind, name
from hesse.check.naming.patterns import named_factor, sizes_of, where_words

Tensors = dict[str, Tensor]
Wrong = Callable[[Tensors, Tensors, Tensor], Tensors]
DTYPES = {"float64": torch.float64, "float32": torch.float32}


def case_of(function: Callable[..., Tensor], tensors: Tensors, wrong: Wrong, batch: int | None = None) -> Case:
    """``wrong(tensors, true gradients, arriving gradient)`` gives what replaces the true gradients."""
    live = {n: t.clone().requires_grad_() for n, t in tensors.items()}
    out = function(**live)
    arriving = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    found = torch.autograd.grad(out, list(live.values()), arriving, allow_unused=True)
    true = {n: torch.zeros_like(t) if g is None else g for (n, t), g in zip(tensors.items(), found, strict=True)}

    def evaluate() -> Tensor:
        return (function(**tensors).double() * arriving.double()).flatten()

    eps = max(torch.finfo(t.dtype).eps for t in tensors.values())
    return Case(tensors, true | wrong(tensors, true, arriving), evaluate, eps, batch)


def named(case: Case) -> Kind:
    generator = torch.Generator().manual_seed(0)
    tensors = list(case.tensors.values())
    before = [t.clone() for t in tensors]
    probe = Probe(case.evaluate, tensors, list(own_scales(case.tensors).values()), case.eps, generator)
    kind = name(case, probe.slopes([case.grads[n] for n in case.tensors]), generator)
    assert all(torch.equal(t, b) for t, b in zip(tensors, before, strict=True))
    json.dumps(kind.evidence)
    assert kind.remedy and kind.name in ORDER
    return kind


def draw(dtype: torch.dtype, **shapes: tuple[int, ...]) -> Tensors:
    generator = torch.Generator().manual_seed(0)
    return {n: torch.randn(shape, generator=generator).to(dtype) for n, shape in shapes.items()}


def linear(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return x @ w + b


def conv(x: Tensor, k: Tensor, b: Tensor) -> Tensor:
    return F.conv2d(x, k, b)


def binarised(x: Tensor) -> Tensor:
    return x.sign() * x.abs().mean()


def softmax_without_sum(t: Tensors, true: Tensors, w: Tensor) -> Tensors:
    return {"x": t["x"].softmax(-1) * w}


def softmax_of_each(t: Tensors, true: Tensors, w: Tensor) -> Tensors:
    p = t["x"].softmax(-1)
    return {"x": p * (w - w * p)}


def log_prob(x: Tensor, s: Tensor) -> Tensor:
    return -(0.5 * (x * (-s).exp()).square() + s).sum(-1)


def small_row(t: Tensors, w: Tensor) -> Tensor:
    """What the row that counts least contributes to the gradient by ``s``."""
    each = w[:, None] * ((t["x"] * (-t["s"]).exp()).square() - 1)
    return each[each.norm(dim=1).argmin()]


ROWS = {"x": (16, 24)}
DENSE = {"x": (16, 24), "w": (24, 24), "b": (24,)}
CONV = {"x": (4, 3, 6, 6), "k": (5, 3, 3, 3), "b": (5,)}
SOFT = {"x": (8, 10)}
NORMAL = {"x": (16, 3), "s": (3,)}

# function, shapes, what is wrong, kind, words of the message
TABLE: dict[str, tuple[Callable[..., Tensor], dict[str, tuple[int, ...]], Wrong, str, str]] = {
    "sign": (torch.tanh, ROWS, lambda t, g, w: {"x": -g["x"]}, "wrong_sign", "has the wrong sign"),
    "sign and factor": (torch.tanh, ROWS, lambda t, g, w: {"x": -3 * g["x"]}, "wrong_sign", "3 times"),
    "half": (torch.tanh, ROWS, lambda t, g, w: {"x": g["x"] / 2}, "missing_factor", "is 0.5 times what it should be"),
    "three per cent": (torch.tanh, ROWS, lambda t, g, w: {"x": 1.03 * g["x"]}, "missing_factor", "1.03 times"),
    "pi": (torch.tanh, ROWS, lambda t, g, w: {"x": g["x"] / math.pi}, "missing_factor", "1 / (pi)"),
    "root": (torch.tanh, ROWS, lambda t, g, w: {"x": 24**0.5 * g["x"]}, "missing_factor", "sqrt(24)"),
    "batch": (torch.tanh, ROWS, lambda t, g, w: {"x": g["x"] / 16}, "wrong_reduction", "16 is the batch size"),
    "elements": (
        lambda x: x.square().mean(), ROWS, lambda t, g, w: {"x": 384 * g["x"]}, "wrong_reduction",
        "384 is the number of elements of x, and a sum stands where the mean belongs",
    ),
    "unbiased": (torch.tanh, ROWS, lambda t, g, w: {"x": g["x"] * 16 / 15}, "wrong_reduction", "16 and 16 - 1"),
    "zero": (torch.tanh, ROWS, lambda t, g, w: {"x": 0 * g["x"]}, "detached", "is zero"),
    "weight zero": (linear, DENSE, lambda t, g, w: {"w": 0 * g["w"]}, "detached", "is zero"),
    "first row": (linear, DENSE, lambda t, g, w: {"b": w[0]}, "missing_sum", "the first row alone"),
    "some row": (linear, DENSE, lambda t, g, w: {"b": w[5]}, "missing_sum", "the 5th row alone"),
    "small row": (log_prob, NORMAL, lambda t, g, w: {"s": small_row(t, w)}, "missing_sum", "row alone"),
    "mean of rows": (linear, DENSE, lambda t, g, w: {"b": w.mean(0)}, "wrong_reduction", "a mean stands where"),
    "no space": (conv, CONV, lambda t, g, w: {"b": w.sum(0)[:, 0, 0]}, "missing_sum", "axis 2"),
    "number": (
        lambda x, s: x * s, {"x": (8, 10), "s": ()}, lambda t, g, w: {"s": (w * t["x"])[0].sum()}, "missing_sum", "row",
    ),
    "number by chance": (
        lambda x, s: x * s, {"x": (8, 10), "s": ()}, lambda t, g, w: {"s": 0.3712 * g["s"]},
        "wrong_gradient", "0.371 times",
    ),
    "softmax": (lambda x: x.softmax(-1), SOFT, softmax_without_sum, "missing_sum", "sums over axis 1"),
    "softmax of each": (lambda x: x.softmax(-1), SOFT, softmax_of_each, "missing_sum", "the sum over the outputs"),
    "norm of constants": (
        lambda x: F.layer_norm(x, (10,)), SOFT,
        lambda t, g, w: {"x": w / t["x"].std(1, keepdim=True, unbiased=False)}, "missing_sum", "axis 1",
    ),
    "weight transposed": (linear, DENSE, lambda t, g, w: {"w": g["w"].T}, "transposed", "is transposed"),
    "product transposed": (linear, DENSE, lambda t, g, w: {"x": w @ t["w"]}, "transposed", "transposed matrix"),
    "reshaped": (
        lambda x, w: x @ w, {"x": (9, 6), "w": (6, 4)}, lambda t, g, w: {"w": g["w"].T.reshape(6, 4)},
        "transposed", "reshaped",
    ),
    "kernel reversed": (conv, CONV, lambda t, g, w: {"k": g["k"].flip(-1)}, "transposed", "reversed along axis 3"),
    "other order": (
        torch.tanh, {"x": (12,)}, lambda t, g, w: {"x": g["x"][torch.randperm(12)]}, "transposed", "in the wrong order",
    ),
    "columns in another order": (
        lambda x: x.tanh().cumsum(1), {"x": (5, 8)}, lambda t, g, w: {"x": g["x"][:, [1, 0, 2, 3, 4, 5, 7, 6]]},
        "transposed", "has its slices along axis 1 in another order",
    ),
    "decay": (
        linear, DENSE, lambda t, g, w: {"w": g["w"] + 0.1 * t["w"]}, "wrong_gradient", "0.1 times the tensor itself",
    ),
    "swapped": (
        torch.mul, {"input": (30,), "other": (30,)}, lambda t, g, w: {"input": g["other"], "other": g["input"]},
        "wrong_gradient", "equals the gradient with respect to other",
    ),
    "factor of another": (
        lambda x, v: x.tanh() * v, {"x": (8, 10), "v": (10,)}, lambda t, g, w: {"x": g["x"] / t["v"]},
        "missing_factor", "lacks the factor v",
    ),
    "factor for each row": (
        torch.tanh, ROWS, lambda t, g, w: {"x": g["x"] * torch.arange(2, 18)[:, None]},
        "wrong_gradient", "along axis 0",
    ),
    "half the columns": (
        torch.tanh, ROWS, lambda t, g, w: {"x": g["x"] * (torch.arange(24) < 12)},
        "some_elements", "in columns 12 to 23",
    ),
    "all but one row": (
        torch.tanh, ROWS, lambda t, g, w: {"x": g["x"] * (torch.arange(16) < 1)[:, None]}, "some_elements",
        "in all rows but the first: it is zero there",
    ),
    "negative ones": (
        torch.tanh, ROWS, lambda t, g, w: {"x": torch.where(t["x"] < 0, -g["x"], g["x"])}, "some_elements",
        "where x < 0: its sign is wrong there",
    ),
    "large ones": (
        torch.tanh, ROWS, lambda t, g, w: {"x": torch.where(t["x"].abs() > 1, 0, g["x"])},
        "some_elements", "where |x| > 1",
    ),
    "one in four": (
        torch.tanh, ROWS, lambda t, g, w: {"x": g["x"] * torch.where(torch.rand(16, 24) < 0.25, 1, 2)},
        "some_elements", "it is 2 times the true one there",
    ),
    "the first of two": (
        lambda x: x.unflatten(1, (12, 2)).amax(-1), ROWS,
        lambda t, g, w: {"x": torch.stack([w, 0 * w], -1).flatten(1)}, "some_elements", "at (0, ",
    ),
    "below the diagonal": (
        lambda x: x.tanh().triu(), {"x": (12, 12)}, lambda t, g, w: {"x": w * (1 - t["x"].tanh() ** 2)},
        "some_elements", "below the diagonal: the function does not depend on these",
    ),
    "unrelated": (
        torch.tanh, ROWS, lambda t, g, w: {"x": w * (1 - t["x"].tanh())},
        "wrong_gradient", "cosine with the true one 0.",
    ),
    "rounding": (lambda x: (3 * x).round(), ROWS, lambda t, g, w: {"x": 3 * w}, "straight_through", "small steps"),
    "binarised": (binarised, ROWS, lambda t, g, w: {"x": w}, "straight_through", "small steps"),
    "signs": (torch.sign, ROWS, lambda t, g, w: {"x": -w}, "straight_through", "small steps"),
    "not used": (
        lambda x, v: 1 * v, {"x": (8, 5), "v": (8, 5)}, lambda t, g, w: {"x": w},
        "wrong_gradient", "does not depend on it",
    ),
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("what", TABLE)
def test_a_fault_is_called_by_its_kind(what: str, dtype: str) -> None:
    function, shapes, wrong, kind, words = TABLE[what]
    torch.manual_seed(0)
    tensors = draw(DTYPES[dtype], **shapes)
    found = named(case_of(function, tensors, wrong, next(iter(shapes.values()))[0]))
    assert (found.name, words in found.message) == (kind, True), found.message


@pytest.mark.parametrize("scale", [1e-6, 1e5])
def test_the_scale_of_a_tensor_does_not_matter(scale: float) -> None:
    for what in ("first row", "mean of rows", "weight transposed", "product transposed", "weight zero"):
        function, shapes, wrong, kind, words = TABLE[what]
        tensors = draw(torch.float32, **shapes)
        tensors["x"] *= scale
        tensors["w"] /= scale
        found = named(case_of(function, tensors, wrong, 16))
        assert (found.name, words in found.message) == (kind, True), found.message


def test_a_term_of_elements_that_do_not_mix_is_no_missing_sum() -> None:
    """The slope of x^2 + 3 x is 2 x + 3, not x + 3; the difference is the tensor itself."""
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    case = Case({"x": x}, {"x": torch.randn(8, 1).double() * x + 2 * x + 3}, lambda: (x * x + 3 * x).flatten(), 2e-16)
    assert name(case, [], torch.Generator().manual_seed(0)).name == "wrong_gradient"


def test_kinks_are_not_taken_for_wrong_elements() -> None:
    """Half the elements sit on the kink of ReLU, where any slope from 0 to 1 is right."""
    tensors = draw(torch.float32, x=(16, 24))
    tensors["x"][:, ::2] = 0.0
    found = named(case_of(torch.relu, tensors, lambda t, g, w: {"x": 2 * g["x"]}, 16))
    assert found.message == "is 2 times what it should be"


@pytest.mark.parametrize("what", ["sign", "half", "zero", "mean of rows", "weight transposed"])
def test_half_precision_suffices_for_the_plain_kinds(what: str) -> None:
    function, shapes, wrong, kind, _ = TABLE[what]
    assert named(case_of(function, draw(torch.bfloat16, **shapes), wrong, 16)).name == kind


def test_the_step_is_as_wide_as_the_noise_asks() -> None:
    """Beside a million, float32 sees nothing of a step of its usual length."""
    case = case_of(lambda x: x.sum() + 1e6, draw(torch.float32, x=(6,)), lambda t, g, w: {})
    (found,) = measure(case, torch.Generator().manual_seed(0))
    usual = 2 * case.eps * 1e6 / case.eps ** (1 / 3)  # what rounding leaves of a slope at the usual step
    assert float((found.limit / found.grad.abs()).max()) < usual / 4


def test_tensors_are_put_back_when_the_function_fails() -> None:
    tensors = draw(torch.float64, x=(5,))
    before = tensors["x"].clone()
    case = case_of(torch.tanh, tensors, lambda t, g, w: {"x": -g["x"]})
    calls = 0

    def failing() -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 7:  # the first four belong to the rounding
            raise RuntimeError("outside its domain")
        return case.evaluate()

    with pytest.raises(RuntimeError, match="outside its domain"):
        name(Case(case.tensors, case.grads, failing, case.eps), [], torch.Generator())
    assert torch.equal(tensors["x"], before)


def test_a_single_wrong_row_is_found_among_many() -> None:
    def wrong(t: Tensors, true: Tensors, w: Tensor) -> Tensors:
        return {"x": true["x"].index_fill(0, torch.tensor([137]), 0.0)}

    found = named(case_of(torch.tanh, draw(torch.float32, x=(300, 100)), wrong, 300))
    assert found.name == "some_elements"
    assert "in row 137: it is zero there" in found.message
    assert found.evidence["indices"][0][0] == 137


def test_the_wrong_tensors_are_listed_and_the_most_particular_kind_is_told() -> None:
    case = case_of(linear, draw(torch.float64, **DENSE), lambda t, g, w: {"w": g["w"].T, "b": g["b"] + w[0]}, 16)
    found = named(case)
    assert (found.name, found.evidence["tensors"]) == ("transposed", ["w", "b"])


def test_many_tensors_are_looked_at_where_directions_show_a_fault() -> None:
    shapes = {f"w{i}": (3, 3) for i in range(9)}
    case = case_of(
        lambda **w: torch.stack(list(w.values())).tanh(),
        draw(torch.float32, **shapes),
        lambda t, g, w: {"w7": -g["w7"]},
    )
    found = named(case)
    assert (found.name, found.evidence["tensors"]) == ("wrong_sign", ["w7"])
    assert found.message == "has the wrong sign"


def test_directions_speak_where_single_elements_drown() -> None:
    """A sum of a hundred thousand squares in float32: no single element can be seen in its last digits."""
    case = case_of(
        lambda x: x.square().sum() + 1e6,
        draw(torch.float32, x=(300, 300)),
        lambda t, g, w: {"x": g["x"] / 2},
    )
    assert name(case, [], torch.Generator().manual_seed(0)).message == "is 0.5 times what it should be"
    nothing = Case({}, {}, lambda: torch.zeros(1, dtype=torch.float64), 1e-7)
    assert name(nothing, [Slope(0.0, 2.0, 1e-3, 1e-3)], torch.Generator()).name == "detached"
    assert name(nothing, [], torch.Generator()).name == "wrong_gradient"


def test_functions_that_end_nearby_do_no_harm() -> None:
    tensors = {"x": torch.tensor([1e-9, 1.0, 2.0, 3.0], dtype=torch.float64)}
    assert named(case_of(torch.log, tensors, lambda t, g, w: {"x": g["x"] / 2})).name == "missing_factor"
    empty = {"x": torch.zeros(0, 3), "y": torch.randn(4)}
    assert named(case_of(lambda x, y: 2 * y, empty, lambda t, g, w: {"y": -g["y"]})).name == "wrong_sign"


# ---- pieces ----------------------------------------------------------------------------------------------


def test_measured_elements_are_the_gradient() -> None:
    """Against autograd, and each output's own slope against its Jacobian."""
    tensors = draw(torch.float64, x=(3, 4))
    (found,) = measure(case_of(lambda x: x.softmax(-1), tensors, lambda t, g, w: {}), torch.Generator())
    assert found.complete and not bool(found.wrong.any())
    torch.testing.assert_close(found.true, found.grad, rtol=1e-6, atol=1e-9)
    jacobian = torch.autograd.functional.jacobian(lambda x: x.softmax(-1), tensors["x"]).reshape(12, 12)
    arriving = torch.randn(3, 4, generator=torch.Generator().manual_seed(1)).double()
    torch.testing.assert_close(found.parts, (arriving.reshape(12, 1) * jacobian).T, rtol=1e-6, atol=1e-9)


def test_samples_hold_borders_and_gradients() -> None:
    grad = torch.zeros(50, 40, 6)
    grad[17, 23, 4] = 1.0
    index = sample(grad.shape, grad.flatten(), 100, torch.Generator())
    assert len(index) <= 100 and len(index.unique()) == len(index)
    assert {0, grad.numel() - 1, int(grad.flatten().argmax())} <= set(index.tolist())


def test_factors_are_named() -> None:
    sizes = sizes_of({"x": (32, 10, 64)}, 320, 32)
    for factor, kind, words in (
        (32.0, "wrong_reduction", "32 is the batch size"),
        (1 / 320, "wrong_reduction", "320 is"),
        (1 / 8, "missing_factor", "sqrt(64)"),
        (1 / 640, "wrong_reduction", "640 is the size of axes 1 to 2 of x"),
        (2 * math.pi, "missing_factor", "that is 2 pi"),
        (0.5, "missing_factor", ""),
        (0.9, "missing_factor", ""),
        (7 / 10, "missing_factor", ""),
        (10 / 9, "wrong_reduction", "10 and 10 - 1"),
    ):
        found, says = named_factor(factor, 1e-3, sizes, 32)
        assert (found, words in says) == (kind, True), (factor, found, says)
        assert bool(says) == bool(words)


def test_places_are_described() -> None:
    rows, columns = torch.meshgrid(torch.arange(6), torch.arange(8), indexing="ij")
    values = torch.linspace(-2, 2, 48)[torch.randperm(48, generator=torch.Generator().manual_seed(0))]
    for mask, words in (
        (columns == 7, "in the last column"),
        (columns == 3, "in column 3"),
        (rows > 0, "in all rows but the first"),
        ((rows == 2) | (rows == 3), "in rows 2 to 3"),
        (columns % 2 == 1, "in every second column"),
        (columns > rows, "above the diagonal"),
        (columns != rows, "off the diagonal"),
        (values.reshape(6, 8) < 0, "where x < 0"),
        (values.reshape(6, 8).abs() > 1, "where |x| > 1"),
        ((rows == 0) | (rows == 5) | (columns == 0) | (columns == 7), "at the borders"),
    ):
        wrong = mask.flatten()
        assert where_words(wrong, ~wrong, torch.arange(48), (6, 8), values, torch.ones(48)) == words
