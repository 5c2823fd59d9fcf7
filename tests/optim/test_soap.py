"""SOAP is Adam in the eigenbases of its factors: a loop in plain coordinates finds the same numbers."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hesse.optim import frames
from hesse.optim.blocking import blocks_of, joined
from hesse.optim.shampoo import Shampoo
from hesse.optim.soap import SOAP
from tolerances import ALGEBRA, ROUNDING

BETAS, EPS, BETA = (0.9, 0.95), 1e-8, 0.9

# Rounding of 1e-16 divided by the gaps between eigenvalues, and by the shift where the first gradient leaves a zero.
LOOP = {"rtol": 1e-8, "atol": 1e-10}


def gradients(*shape: int, steps: int = 12, seed: int = 0) -> list[Tensor]:
    """Noise of a covariance that is far from diagonal, about a mean."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    if len(shape) != 2:
        return [draw(math.prod(shape)).view(shape) for _ in range(steps)]
    left, right, mean = draw(shape[0], shape[0]), draw(shape[1], shape[1]), draw(*shape)
    return [left @ draw(*shape) @ right + mean for _ in range(steps)]


def run(make: Callable[[list[Tensor]], torch.optim.Optimizer], grads: list[list[Tensor]]) -> list[Tensor]:
    """Parameters from zero, after a step along each of their gradients."""
    params = [torch.zeros_like(g, requires_grad=True) for g in grads[0]]
    optimizer = make(params)
    for step in grads:
        for p, g in zip(params, step, strict=True):
            p.grad = g.clone()
        optimizer.step()
    return [p.detach() for p in params]


def textbook(grads: list[Tensor], lr: float, period: int, tolerance: float, kl: bool, every: int = 1) -> Tensor:
    """SOAP on one matrix, in the coordinates of the parameter."""
    m, n = grads[0].shape
    W, M, V = torch.zeros(m, n).double(), torch.zeros(m, n).double(), torch.zeros(m, n).double()
    Q = [torch.eye(m).double(), torch.eye(n).double()]
    F = [torch.zeros(m, m).double(), torch.zeros(n, n).double()]
    learned = 0
    for t, G in enumerate(grads, 1):
        M = BETAS[0] * M + (1 - BETAS[0]) * G
        V = BETAS[1] * V + (1 - BETAS[1]) * (Q[0].T @ G @ Q[1]) ** 2
        mean = Q[0].T @ (M / (1 - BETAS[0] ** t)) @ Q[1]
        W = W - lr * Q[0] @ (mean / ((V / (1 - BETAS[1] ** t)).sqrt() + EPS)) @ Q[1].T
        if t <= every or t % every == 0:
            learned += 1
            w = max(1 / learned, 1 - (BETA if t <= every else BETA**every))
            inverse = [torch.eye(m).double(), torch.eye(n).double()]
            if kl and learned == 1:
                inverse[1] = inverse[1] / (G**2).mean()
            elif kl:
                for side in range(2):
                    values = (Q[side].T @ F[side] @ Q[side]).diagonal()
                    values = values.clamp_min(frames.FLOOR * float(values.mean()))
                    inverse[side] = Q[side] @ torch.diag(1 / values) @ Q[side].T
            F = [
                (1 - w) * F[0] + w * G @ inverse[1] @ G.T / n,
                (1 - w) * F[1] + w * G.T @ inverse[0] @ G / m,
            ]
        if t % period == 0 or (t < period and t in (1, 2, 4, 8, 16)):
            turned = [turn(Q[side], F[side], tolerance) for side in range(2)]
            R = [Q[side].T @ turned[side] for side in range(2)]
            V = torch.einsum("ia,jb,ij->ab", R[0] ** 2, R[1] ** 2, V)
            Q = turned
    return W


def turn(Q: Tensor, A: Tensor, tolerance: float) -> Tensor:
    framed = Q.T @ A @ Q
    off = float((framed - framed.diagonal().diag()).norm() / framed.norm())
    if off <= tolerance:
        return Q
    shift = frames.SHIFT * A.diagonal().mean()
    if off > frames.LOST:
        return torch.linalg.eigh(A + shift * Q @ torch.linspace(1, 0, len(A)).double().diag() @ Q.T)[1].flip(1)
    return torch.linalg.qr(A @ Q[:, order := framed.diagonal().argsort(descending=True)] + shift * Q[:, order])[0]


@pytest.mark.parametrize("shape", [(4, 5), (5, 4), (5, 5)])
@pytest.mark.parametrize(("period", "tolerance"), [(1, 0.0), (4, 0.01), (3, 0.2)])
def test_it_is_the_textbooks(shape: tuple[int, int], period: int, tolerance: float) -> None:
    grads = gradients(*shape)
    (found,) = run(
        lambda p: SOAP(p, 0.1, betas=BETAS, factor_beta=BETA, period=period, tolerance=tolerance, statistics=1),
        [[g] for g in grads],
    )
    torch.testing.assert_close(found, textbook(grads, 0.1, period, tolerance, kl=False), **LOOP)


@pytest.mark.parametrize("every", [1, 4])
def test_the_kl_variant_is_the_textbooks(every: int) -> None:
    grads = gradients(4, 5)
    (found,) = run(
        lambda p: SOAP(p, 0.1, betas=BETAS, factor_beta=BETA, period=3, statistics=every, kl=True), [[g] for g in grads]
    )
    torch.testing.assert_close(found, textbook(grads, 0.1, 3, 0.01, kl=True, every=every), **LOOP)
    plain = textbook(grads, 0.1, 3, 0.01, kl=False, every=every)
    assert (plain - found).norm() > 1e-2 * found.norm()


def test_the_loops_steps_are_not_all_of_one_kind() -> None:
    """Else the tests above would not tell an eigendecomposition, a step of iteration and standing still apart."""
    kinds = set()
    for period, tolerance in ((1, 0.0), (3, 0.2)):
        Q, A = torch.eye(4).double(), torch.zeros(4, 4).double()
        for t, G in enumerate(gradients(4, 6), 1):
            A = A + max(1 / t, 1 - BETA) * (G @ G.T / 6 - A)
            if t % period == 0 or (t < period and t in (1, 2)):
                framed = Q.T @ A @ Q
                off = float((framed - framed.diagonal().diag()).norm() / framed.norm())
                kinds.add("still" if off <= tolerance else "far" if off > frames.LOST else "near")
                Q = turn(Q, A, tolerance)
    assert kinds == {"still", "far", "near"}


def test_the_first_step_is_adams() -> None:
    grads = [[g] for g in gradients(4, 6, steps=1)]
    adam = run(lambda p: torch.optim.Adam(p, 0.1), grads)
    torch.testing.assert_close(run(lambda p: SOAP(p, 0.1), grads), adam, **ALGEBRA)


@pytest.mark.parametrize("shape", [(), (1,), (7,), (1, 7), (7, 1, 1)])
@pytest.mark.parametrize("cls", [SOAP, Shampoo])
def test_what_has_no_matrix_gets_adam(cls: Callable[..., Any], shape: tuple[int, ...]) -> None:
    grads = [[g] for g in gradients(*shape)] if len(shape) != 2 else [[g.view(shape)] for g in gradients(7)]
    adam = run(lambda p: torch.optim.Adam(p, 0.1, betas=BETAS), grads)
    torch.testing.assert_close(run(lambda p: cls(p, 0.1, betas=BETAS), grads), adam, **ALGEBRA)


@pytest.mark.parametrize("cls", [SOAP, Shampoo])
def test_weight_decay_is_torchs_of_either_kind(cls: Callable[..., Any]) -> None:
    grads, settings = [[g] for g in gradients(7)], {"betas": BETAS, "weight_decay": 0.3}
    for decoupled, peer in ((True, torch.optim.AdamW), (False, torch.optim.Adam)):
        expected = run(lambda p, peer=peer: peer(p, 0.1, **settings), grads)
        found = run(lambda p, d=decoupled: cls(p, 0.1, decoupled_weight_decay=d, **settings), grads)
        torch.testing.assert_close(found, expected, **ALGEBRA)


def test_adam_is_what_is_left_without_factors() -> None:
    grads = [[g] for g in gradients(6, 7)]
    adam = run(lambda p: torch.optim.Adam(p, 0.1, betas=BETAS), grads)
    found = run(lambda p: SOAP(p, 0.1, betas=BETAS, max_dim=5, split=False), grads)
    torch.testing.assert_close(found, adam, **ALGEBRA)


@pytest.mark.parametrize("cls", [SOAP, Shampoo])
def test_parameters_of_one_shape_are_as_if_alone(cls: Callable[..., Any]) -> None:
    """[4, 6] thrice, once as a kernel, in one batch; [5, 4] apart; a vector between them."""
    shapes = [(4, 6), (4, 6), (5,), (5, 4), (4, 3, 2)]
    grads = [gradients(4, 6), gradients(4, 6, seed=1), gradients(5), gradients(5, 4), gradients(4, 6, seed=2)]
    together = [[g.view(shape) for g, shape in zip(step, shapes, strict=True)] for step in zip(*grads, strict=True)]
    found = run(lambda p: cls(p, 0.1), together)
    for one, alone in zip(found, grads, strict=True):
        (expected,) = run(lambda p: cls(p, 0.1), [[g] for g in alone])
        torch.testing.assert_close(one, expected.view(one.shape), **ALGEBRA)


@pytest.mark.parametrize("cls", [SOAP, Shampoo])
def test_blocks_are_as_if_parameters_of_their_own(cls: Callable[..., Any]) -> None:
    grads = gradients(6, 8)
    (found,) = run(lambda p: cls(p, 0.1, max_dim=4), [[g] for g in grads])
    apart = [[block for rows in g.split(3) for block in rows.split(4, dim=1)] for g in grads]
    a, b, c, d = run(lambda p: cls(p, 0.1), apart)
    torch.testing.assert_close(found, torch.cat([torch.cat([a, b], 1), torch.cat([c, d], 1)]), **ALGEBRA)


def test_a_side_without_factor_keeps_the_identity() -> None:
    """The rotation on the other side is that of the factor of all rows."""
    grads = gradients(40, 2)
    found = run(lambda p: SOAP(p, 0.1, max_dim=4, statistics=1, factor_beta=BETA), [[g] for g in grads])[0]
    M, V, A, Q = torch.zeros(40, 2), torch.zeros(40, 2), torch.zeros(2, 2).double(), torch.eye(2).double()
    W = torch.zeros(40, 2).double()
    for t, G in enumerate(grads, 1):
        M, V = 0.9 * M + 0.1 * G, 0.95 * V + 0.05 * (G @ Q) ** 2
        W = W - 0.1 * (M / (1 - 0.9**t) @ Q / ((V / (1 - 0.95**t)).sqrt() + EPS)) @ Q.T
        A = A + max(1 / t, 1 - BETA) * (G.T @ G / 40 - A)
        if t in (1, 2, 4, 8):
            new = turn(Q, A, 0.01)
            V, Q = V @ (Q.T @ new) ** 2, new
    torch.testing.assert_close(found, W, **ALGEBRA)


# fmt: off
CUTS = [
    # shape, largest factor, rows x columns, grid, sides
    ((64, 32), 128, (64, 32), (1, 1), (True, True)),
    ((16, 8, 3, 3), 128, (16, 72), (1, 1), (True, True)),
    ((16, 1, 3, 3), 128, (16, 9), (1, 1), (True, True)),          # depthwise
    ((1, 50, 64), 128, (50, 64), (1, 1), (True, True)),           # positions
    ((300, 64), 128, (300, 64), (3, 1), (True, True)),
    ((301, 257), 128, (301, 257), (3, 3), (True, True)),          # padded
    ((50000, 64), 128, (50000, 64), (1, 1), (False, True)),       # an embedding
    ((10, 784), 128, (10, 784), (1, 7), (True, True)),            # long, but not many blocks
    ((11008, 4096), 1024, (11008, 4096), (11, 4), (True, True)),  # many blocks, but not long
]
# fmt: on


@pytest.mark.parametrize(("shape", "limit", "size", "grid", "sides"), CUTS, ids=[str(c[0]) for c in CUTS])
def test_shapes_are_cut_as_documented(
    shape: tuple[int, ...], limit: int, size: tuple[int, int], grid: tuple[int, int], sides: tuple[bool, bool]
) -> None:
    cut = blocks_of(shape, limit)
    assert cut is not None
    assert ((cut.rows, cut.columns), cut.grid, cut.sides) == (size, grid, sides)
    assert all(not has or d <= limit for has, d in zip(cut.sides, cut.shape, strict=True))


@pytest.mark.parametrize("shape", [(7, 5), (6, 8), (3, 5, 2), (9, 4)])
def test_what_is_cut_is_pasted_back(shape: tuple[int, ...]) -> None:
    x = gradients(*shape, steps=1)[0]
    cut = blocks_of(shape, 4)
    assert cut is not None and cut.count > 1
    blocks = cut.cut(x)
    assert blocks.shape == (cut.count, *cut.shape)
    assert torch.equal(cut.paste(blocks, shape), x)
    torch.testing.assert_close(blocks.square().sum(), x.square().sum(), **ALGEBRA)  # padded with zeros


@pytest.mark.parametrize("shape", [(), (5,), (1, 5), (0, 3), (4, 0)])
def test_shapes_without_a_matrix_are_not_cut(shape: tuple[int, ...]) -> None:
    assert blocks_of(shape, 4) is None


def test_neighbours_are_joined_without_a_copy_and_strangers_with_one() -> None:
    whole = torch.randn(6, 2, 2)
    parts = whole.split([1, 2, 3])
    assert joined(parts).data_ptr() == whole.data_ptr()
    assert torch.equal(joined(parts), whole)
    for strangers in ([parts[1], parts[0]], [parts[0], parts[2]], [parts[0], parts[1].clone()]):
        assert joined(strangers).data_ptr() != strangers[0].data_ptr()
        assert torch.equal(joined(strangers), torch.cat(list(strangers)))


def test_a_turn_keeps_the_second_moment_of_uncorrelated_elements() -> None:
    """The diagonal of (Q_L' (x) Q_R') diag(v) (Q_L (x) Q_R), formed densely."""
    left, right = (torch.linalg.qr(gradients(d, d, steps=1)[0])[0] for d in (3, 4))
    v = gradients(3, 4, steps=1)[0].square()
    found = v[None].clone()
    frames.Turn(0, slice(None), left[None]).squares(found)
    frames.Turn(1, torch.tensor([0]), right[None]).squares(found)
    both = torch.kron(left, right)
    dense = (both.T @ v.flatten().diag() @ both).diagonal().view(3, 4)
    torch.testing.assert_close(found[0], dense, **ALGEBRA)


def test_a_basis_that_is_right_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients of one direction: after the first factors their bases have nothing to learn."""
    asked = []

    def counting(matrix: Tensor, guess: Tensor | None = None) -> Tensor:
        asked.append(guess is not None)
        return eigenbasis(matrix, guess)

    eigenbasis = frames.eigenbasis
    monkeypatch.setattr(frames, "eigenbasis", counting)
    grad = gradients(4, 6, steps=1)[0]
    run(lambda p: SOAP(p, period=2, statistics=1), [[grad * s] for s in (1.0, 2.0, -1.0, 3.0, 0.5, 1.0)])
    assert asked == [False, False]


@pytest.mark.parametrize("cls", [SOAP, Shampoo])
def test_zero_gradients_begin_the_state_and_move_nothing(cls: Callable[..., Any]) -> None:
    """The distributed checkpoint begins a state in this way before it fills it."""
    shapes = [(4, 6), (5,), (300, 2), (0, 3), ()]
    params = [torch.ones(shape, requires_grad=True) for shape in shapes]
    optimizer = cls(params, max_dim=128)
    for _ in range(9):
        for p in params:
            p.grad = torch.zeros_like(p)
        optimizer.step()
    assert all(torch.equal(p, torch.ones_like(p)) for p in params)
    for state in optimizer.state.values():
        assert all(isinstance(x, Tensor) and bool(x.isfinite().all()) for x in state.values())
    params[0].grad = torch.randn(4, 6)
    optimizer.step()
    assert params[0].isfinite().all() and not torch.equal(params[0], torch.ones(4, 6))


def model_and_batch() -> tuple[nn.Module, Callable[[], None]]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 12), nn.Linear(12, 3)
    )
    x = torch.randn(64, 8)

    def backward() -> None:
        model.zero_grad()
        nn.functional.cross_entropy(model(x), x[:, :3].argmax(1)).backward()

    return model, backward


@pytest.mark.parametrize("cls", [SOAP, Shampoo])
def test_resumed_is_uninterrupted(cls: Callable[..., Any]) -> None:
    """Bit for bit, though the state of equal layers was one piece of memory and comes back as many."""
    model, backward = model_and_batch()
    optimizer = cls(model.parameters())
    for k in range(25):
        backward()
        optimizer.step()
        if k == 6:
            buffer = io.BytesIO()
            torch.save([model.state_dict(), optimizer.state_dict()], buffer)
    resumed, again = model_and_batch()
    second = cls(resumed.parameters())
    buffer.seek(0)
    weights, state = torch.load(buffer, weights_only=True)
    resumed.load_state_dict(weights)
    second.load_state_dict(copy.deepcopy(state))
    for _ in range(18):
        again()
        second.step()
    for one, other in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("cls", [SOAP, Shampoo])
def test_a_layer_frozen_in_between_goes_on_where_it_was(cls: Callable[..., Any]) -> None:
    """Its equals then have taken more steps; they are no batch any more, and each is as if alone."""
    one, other = gradients(4, 6), gradients(4, 6, seed=1)
    params = [torch.zeros(4, 6, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    optimizer = cls(params, 0.1)
    for k, (a, b) in enumerate(zip(one, other, strict=True)):
        params[0].grad, params[1].grad = a.clone(), None if k in (4, 5) else b.clone()
        optimizer.step()
    torch.testing.assert_close(params[0].detach(), run(lambda p: cls(p, 0.1), [[g] for g in one])[0], **ALGEBRA)
    kept = [[g] for k, g in enumerate(other) if k not in (4, 5)]
    torch.testing.assert_close(params[1].detach(), run(lambda p: cls(p, 0.1), kept)[0], **ALGEBRA)


def test_bfloat16_parameters_have_float32_state() -> None:
    p = torch.zeros(4, 6, dtype=torch.bfloat16, requires_grad=True)
    optimizer = SOAP([p], 0.1)
    for g in gradients(4, 6):
        p.grad = g.bfloat16()
        optimizer.step()
    assert all(x.dtype == torch.float32 for x in optimizer.state[p].values())
    (exact,) = run(lambda q: SOAP(q, 0.1), [[g.bfloat16().double()] for g in gradients(4, 6)])
    torch.testing.assert_close(p.detach().double(), exact, **ROUNDING[torch.bfloat16])


def test_it_needs_fewer_steps_than_adam_where_axes_are_mixed() -> None:
    """A matrix least squares problem A W B = C with conditions of 30 on either side, in rotated axes."""
    generator = torch.Generator().manual_seed(0)

    def mixed(d: int) -> Tensor:
        Q = torch.linalg.qr(torch.randn(d, d, generator=generator))[0]
        return Q @ torch.logspace(0, -1.5, d).diag() @ Q.T

    A, B, target = mixed(8), mixed(10), torch.randn(8, 10, generator=generator)

    def left(make: Callable[[list[Tensor]], torch.optim.Optimizer]) -> float:
        W = torch.zeros(8, 10, requires_grad=True)
        optimizer = make([W])
        for _ in range(300):
            optimizer.zero_grad()
            (A @ (W - target) @ B).square().sum().backward()
            optimizer.step()
        return float((A @ (W - target) @ B).square().sum().detach())

    adam = min(left(lambda p, lr=lr: torch.optim.Adam(p, lr)) for lr in (0.003, 0.01, 0.03, 0.1))
    soap = min(left(lambda p, lr=lr: SOAP(p, lr)) for lr in (0.01, 0.03))
    assert soap < 0.1 * adam


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"max_dim": 0}, "max_dim"),
        ({"period": 0}, "period"),
        ({"statistics": 1.5}, "statistics"),
        ({"factor_beta": 1.0}, "factor_beta"),
        ({"tolerance": -0.1}, "tolerance"),
        ({"betas": (0.9, 1.0)}, "beta parameter at index 1"),
    ],
)
def test_settings_out_of_range_are_refused_in_any_group(settings: dict[str, Any], match: str) -> None:
    p = torch.zeros(2, 2, requires_grad=True)
    with pytest.raises(ValueError, match=match):
        SOAP([p], **settings)
    optimizer = SOAP([p])
    with pytest.raises(ValueError, match=match):
        optimizer.add_param_group({"params": [torch.zeros(2, 2, requires_grad=True)], **settings})
    assert len(optimizer.param_groups) == 1
